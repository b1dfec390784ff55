"""A client process as tests hold it: what it is asked, what it answers, and whether it lives."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.crash import EXIT_STATUS
from tests.chaos.objects import Thing
from tests.conftest import ROOT

PATIENCE_S = 20.0


@dataclass(frozen=True)
class Answer:
    """`rv` is the name of the code; empty if the process has crashed as planned instead of answering."""

    rv: str
    value: Any = None

    def __str__(self) -> str:
        return f"{self.rv or 'crashed'} {str(self.value or '')[:80]}".rstrip()

    @property
    def ok(self) -> bool:
        return self.rv == "CKR_OK"

    @property
    def crashed(self) -> bool:
        return not self.rv


class Client:
    """One process.  It ends with `end`, by its crash plan, or as a failure of the test."""

    def __init__(self, module: Path, pin: str, env: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.client", str(module), pin],
                cwd=ROOT,
                env=os.environ | env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )

    def ask(self, command: str, **arguments: object) -> Answer:
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: object) -> None:
        assert self._process.stdin
        line = json.dumps({"do": command} | arguments, default=Thing.as_json)
        with suppress(BrokenPipeError):  # then there is nobody to answer, and `receive` says so
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> Answer:
        assert self._process.stdout
        deadline = time.monotonic() + PATIENCE_S
        output = select.poll()
        output.register(self._process.stdout, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            left_s = max(0.0, deadline - time.monotonic())
            if not output.poll(left_s * 1000):
                self.end()
                raise AssertionError(f"the client hangs\n{self.said()}")
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                return self._crashed()
            line += more
        return Answer(**json.loads(line))

    def end(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with suppress(BrokenPipeError):
                pipe.close()

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return self.log.read_text(errors="replace")[-2000:]

    def _crashed(self) -> Answer:
        status = self._process.wait()
        self.end()
        assert status == EXIT_STATUS, f"the client ended with status {status}\n{self.said()}"
        return Answer("")
