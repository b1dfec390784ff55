"""A program in a terminal of its own: its screen, its keys, its size."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from typing import Self

import pyte

PATIENCE_S = 30.0


class Terminal:
    """As wide and high as is said; `screen` is what a person would see."""

    def __init__(
        self, command: Sequence[str], columns: int = 80, lines: int = 24, **environment: str
    ) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        self.raw = b""
        self._size(columns, lines)
        self._before = termios.tcgetattr(slave)
        self._slave = slave
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm-256color"} | environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 (no threads here)
        )

    def _size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        """What a terminal does whose window is dragged."""
        self.screen.resize(lines, columns)
        self._size(columns, lines)  # the kernel sends SIGWINCH

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def shows(self, holds: Callable[[list[str]], object], what: str) -> list[str]:
        """The screen's lines, once they are as is wanted."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds(self.lines):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {PATIENCE_S:.0f} s until {what}:\n" + "\n".join(self.lines))
            self._take(0.1)
        return self.lines

    def says(self, text: str) -> list[str]:
        return self.shows(lambda lines: any(text in line for line in lines), f"it shows {text!r}")

    def _take(self, patience_s: float) -> None:
        if select.select([self._master], [], [], patience_s)[0]:
            piece = os.read(self._master, 1 << 16)
            self.raw += piece
            self._stream.feed(piece)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def ends(self) -> int:
        """Its exit status; the terminal is as it was."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            self._take(0.1)
        assert termios.tcgetattr(self._slave) == self._before
        return int(self.process.returncode)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
