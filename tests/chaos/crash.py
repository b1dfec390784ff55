"""The crash module as tests hold it: a plan, shared with the library in tests/chaos/crash.c."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from ctypes import c_uint64
from pathlib import Path

from tests import p11

HERE = Path(__file__).parent
EXIT_STATUS = 86
_TRACE = 256


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("every", "after", "whole_group", "countdown", "counted")),
        ("trace", c_uint64 * _TRACE),
    )
    every: int
    after: int
    whole_group: int
    countdown: int
    counted: int


def build(directory: Path, *, sanitized: bool = False) -> Path:
    """Compile the library."""
    return compiled("crash.c", directory / "libcrash.so", *(["SANITIZED"] if sanitized else []))


def compiled(source: str, library: Path, *macros: str) -> Path:
    """A library from a file of this directory; warnings are errors, as in ours."""
    flags = "-std=c11 -O1 -g -Wall -Wextra -Wconversion -Werror -shared -fPIC -Wl,-Bsymbolic".split()
    flags += [f"-I{HERE.parent.parent / 'include'}", *(f"-D{macro}" for macro in macros)]
    subprocess.run(["cc", *flags, "-o", library, HERE / source, "-ldl"], check=True)
    return library


class CrashPlan:
    """When the processes that share this plan end, and what they have called so far."""

    def __init__(self, file: Path, *, whole_group: bool = False, every: bool = False) -> None:
        self.file = file
        size = ctypes.sizeof(_Plan)
        file.write_bytes(bytes(size))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), size)
        self._plan: _Plan = _Plan.from_buffer(self._map)
        self._plan.whole_group, self._plan.every = whole_group, every

    def env(self, module: Path | str) -> dict[str, str]:
        """What the process that loads the crash module must have in its environment."""
        return {"CRASH_MODULE": str(module), "CRASH_PLAN": str(self.file)}

    def close(self) -> None:
        """Let go of the file; who has it mapped keeps it."""
        del self._plan
        self._map.close()

    def arm(self, nth: int, *, after: bool) -> None:
        """The n-th counted call from now on is the end: before it is made, or after it has done its work."""
        self._plan.countdown = 0
        self._plan.after = after
        self._plan.countdown = nth

    def disarm(self) -> bool:
        """No end is planned any more; whether one that was has been left."""
        waiting = self._plan.countdown != 0
        self._plan.countdown = 0
        return waiting

    @property
    def counted(self) -> int:
        return self._plan.counted

    def forget(self) -> None:
        """Count from 0 again."""
        self._plan.counted = 0

    def trace(self) -> list[str]:
        """The counted calls, as far as they are remembered."""
        seen = self._plan.trace[: min(self.counted, _TRACE)]
        return [p11.FUNCTIONS_2_40[number] for number in seen]
