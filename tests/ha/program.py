"""A program of its own on the group: it can hang or be killed without taking the tests with it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.conftest import ROOT

LIMIT_S = 4.0  # a few times to connect, and far less than for ever

PROGRAM = textwrap.dedent(
    """
    import json, sys, time
    from tests import p11

    took, answers = {}, {}

    def timed(name, call):
        began = time.monotonic()
        try:
            answers[name] = call()
        except p11.CkError as error:
            answers[name] = error.name
        took[name] = time.monotonic() - began
        return answers[name]

    module = p11.Module(sys.argv[1])
    timed("C_Initialize", module.initialize)
    """
)
FAREWELL = textwrap.dedent(
    """
    timed("C_Finalize", module.finalize)
    print(json.dumps([took, answers]))
    """
)


class Program:
    """A Python program; `body` stands between C_Initialize and C_Finalize, `timed(name, call)` records an answer."""

    def __init__(self, module: Path, body: str) -> None:
        source = PROGRAM + textwrap.dedent(body) + FAREWELL
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, str(module)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, line: str) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline().strip() == line

    def go_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[dict[str, float], dict[str, object]]:
        """How long each call took and what it answered."""
        try:
            output, _ = self.process.communicate(timeout=10 * LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise AssertionError("it hangs") from None
        took, answers = json.loads(output.splitlines()[-1])
        return took, answers
