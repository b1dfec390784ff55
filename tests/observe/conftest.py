"""Applications that tests steer from outside, each a process of its own, and the command that looks at them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from tests.conftest import ROOT

P11HA = Path(sys.executable).parent / "p11ha"
PATIENCE_S = 60

_PROGRAM = """
import json, os, sys
from tests import p11

module = p11.Module(sys.argv[1])
module.initialize()
slot = module.slots(present=False)[-1]
session = None
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    try:
        try:
            answer = eval(line)
        except SyntaxError:
            answer = exec(line)
    except Exception as error:
        answer = getattr(error, "name", repr(error))
    print(json.dumps(answer if isinstance(answer, (int, str)) else None), flush=True)
"""


class Client:
    """A Python program with the module: it does what it is told, a line at a time."""

    def __init__(self, module: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(module)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    @property
    def pid(self) -> int:
        return self.process.pid

    def do(self, line: str) -> Any:
        """What a line of Python gives, or the name of its CKR_*; `module`, `slot`, `session` are there."""
        assert self.process.stdin
        print(line, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def call(self, times: int = 1) -> Any:
        """Calls that any member can serve."""
        if times == 1:
            return self.do("session.random(8) and 0") if self._session() else None
        return self.do(f"[session.random(8) for _ in range({times})] and 0") if self._session() else None

    def _session(self) -> bool:
        self.do("session = session or module.open(slot)")
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


ClientFactory = Callable[[], Client]


@pytest.fixture
def client(module: Path) -> Iterator[ClientFactory]:
    """Starts applications on the group that is configured."""
    with ExitStack() as clients:
        yield lambda: clients.enter_context(Client(module))


def p11ha(*arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    done = subprocess.run(
        [P11HA, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        env=os.environ | environment,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def shown() -> Any:
    """The only group, as `p11ha status --json` has it."""
    (group,) = json.loads(p11ha("status", "--json").stdout)["groups"]
    return group
