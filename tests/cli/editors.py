"""Programs that edit a configuration: many times beside others of their kind, and killed on the way.

python -m tests.cli.editors count FILE TIMES     adds one to the number in east's init_args, so many times
python -m tests.cli.editors killed FILE          edits a copy of it, killed ahead of each call that it makes
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from pathlib import Path
from types import FrameType

from pkcs11_ha import config
from pkcs11_ha.cli import edit
from pkcs11_ha.cli.edit import edited


def add_one(path: str) -> None:
    with edited(path) as draft:
        before = int(draft.settings.members[0].init_args or 0)
        draft.document.set("member", {"init_args": str(before + 1)}, 0)


def count(path: str, times: int) -> None:
    for _ in range(times):
        add_one(path)
        config.load(path)


def killed_at(path: Path, step: int) -> bool:
    """Whether an edit, in a process of its own, was killed before its `step`-th call of a function in C."""
    child = os.fork()
    if child == 0:
        calls = 0

        def profile(frame: FrameType, event: str, _: object) -> None:
            nonlocal calls
            calls += event == "c_call" and frame.f_code.co_filename in (edit.__file__, pathlib.__file__)
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(profile)
        add_one(str(path))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def killed(path: Path) -> None:
    """Prints for each call what was there afterwards: the number, and that of the backup."""
    text, step = path.read_bytes(), 0
    while True:
        step += 1
        place = path.with_name(f"{step}.toml")
        place.write_bytes(text)
        Path(f"{place}~").write_bytes(text)
        ended = not killed_at(place, step)
        numbers = [config.load(str(file)).members[0].init_args for file in (place, f"{place}~")]
        add_one(str(place))  # nothing stands in the way of the next one
        after = config.load(str(place)).members[0].init_args
        os.write(2, f"{step} {ended} {' '.join(map(str, numbers))} {after}\n".encode())
        if ended:
            return


if __name__ == "__main__":
    if sys.argv[1] == "count":
        count(sys.argv[2], int(sys.argv[3]))
    else:
        killed(Path(sys.argv[2]))
