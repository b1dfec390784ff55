"""docs/operations.md, typed in pseudo-terminals: every command, every answer, every line that it promises."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from demo.practice import prepare
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "operations.md"
THERE = "/tmp/practice"
PATIENCE_S = 40.0
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[()][A-Z0-9]|[=>78])")


@dataclass
class Line:
    """One line of a block: typed into its terminal, or expected there."""

    number: int
    terminal: str
    typed: bool
    text: str


def lines() -> Iterator[Line]:
    terminal = ""
    for number, text in enumerate(PAGE.read_text().splitlines(), 1):
        if text.startswith("```"):
            terminal = text.partition("terminal=")[2] if not terminal else ""
        elif terminal:
            typed = text.startswith(("$ ", ">"))
            yield Line(number, terminal, typed, text[2:] if typed else text)


@dataclass
class Terminal:
    """A shell in a pseudo-terminal of 80 columns; `seen` is what it wrote since something was typed last."""

    directory: Path
    seen: str = ""
    child: int = field(init=False)
    descriptor: int = field(init=False)

    def __post_init__(self) -> None:
        self.child, self.descriptor = pty.fork()
        if self.child == 0:
            os.chdir(ROOT)
            settings = {"PS1": "prompt> ", "TERM": "xterm"}
            os.execvpe("bash", ["bash", "--norc", "-i"], os.environ | settings)
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.expect("prompt>")

    def type(self, text: str) -> None:
        self.read(0.05)
        self.seen = ""
        os.write(self.descriptor, text.encode() + (b"" if text == "q" else b"\n"))

    def expect(self, pattern: str) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        wanted = re.compile(r"[^\n]*".join(map(re.escape, re.split(r"\s*…\s*", pattern))))
        while True:
            found = wanted.search(self.seen)
            if found:
                self.seen = self.seen[found.end() :]
                return True
            if time.monotonic() > deadline:
                return False
            self.read(0.1)

    def read(self, patience_s: float) -> None:
        while select.select([self.descriptor], [], [], patience_s)[0]:
            try:
                data = os.read(self.descriptor, 65536)
            except OSError:
                return
            self.seen += ESCAPES.sub("", data.decode("utf-8", "replace")).replace("\r", "")

    def close(self) -> None:
        os.close(self.descriptor)
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)


@pytest.fixture
def practice(tmp_path: Path) -> Iterator[Path]:
    """Three HSMs as the page's first command makes them."""
    directory = tmp_path / "p"
    prepare(directory)
    yield directory
    for pid in directory.glob("*/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            continue


@pytest.mark.timeout(300)
def test_the_hour(practice: Path, module: Path) -> None:
    assert module.exists()
    terminals: dict[str, Terminal] = {}
    told = "three HSMs"
    try:
        for line in lines():
            if line.terminal not in terminals:
                terminals[line.terminal] = Terminal(practice)
            terminal = terminals[line.terminal]
            text = line.text.replace(THERE, str(practice))
            if text.startswith(("make build", told)):
                continue  # the fixture has done it
            if line.typed:
                terminal.type(text)
            else:
                assert terminal.expect(text.strip()), (
                    f"{PAGE.name}:{line.number}: {line.text!r} is not in {terminal.seen[-3000:]}"
                )
            if line.typed and text.startswith(("$", ". ")):
                terminal.expect("prompt>")
    finally:
        for terminal in terminals.values():
            terminal.close()
