"""Questions and answers: what is asked at a terminal, or answered by the lines of a script; and what is shown."""

from __future__ import annotations

import re
import sys
import termios
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, TextIO, TypeVar

from pkcs11_ha.cli.menu.attributes import ValueForm, boolean
from pkcs11_ha.cli.terminal import put_back
from pkcs11_ha.config import problem_with
from pkcs11_ha.uri import UriError, parse_file_uri

Answer = TypeVar("Answer")

WIDTH = 80

_PART = re.compile(r"\[([^\]]+)\]\s*")


class NotDone(Exception):
    """It was not done, or not well; `str` is one line that says why, and what to type instead."""


class EndOfInput(Exception):
    """Ctrl-D, or the end of a script."""


class Source(Protocol):
    """Where lines come from."""

    interactive: bool

    @property
    def where(self) -> str:
        """The line that was read last, for a message."""
        ...

    def choice(self, prompt: str) -> str | None:
        """A number of the menu; None at the end."""
        ...

    def answer(self, prompt: str, *, secret: bool = False) -> str | None:
        """An answer; None at the end."""
        ...


class Terminal:
    """A person."""

    interactive = True
    where = "the terminal"

    def __init__(self, lines: TextIO, out: TextIO) -> None:
        self._lines, self._out = lines, out

    def choice(self, prompt: str) -> str | None:
        """What is typed."""
        return self.answer(prompt)

    def answer(self, prompt: str, *, secret: bool = False) -> str | None:
        """What is typed, unseen if it is secret."""
        with self._unseen() if secret else nullcontext():
            self._out.write(prompt)
            self._out.flush()
            line = self._lines.readline()
        if not line:
            self._out.write("\n")
            return None
        return line.strip()

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        before = termios.tcgetattr(self._lines)
        silent = termios.tcgetattr(self._lines)
        silent[3] &= ~termios.ECHO
        with put_back():
            try:
                termios.tcsetattr(self._lines, termios.TCSAFLUSH, silent)
                yield
            finally:
                termios.tcsetattr(self._lines, termios.TCSADRAIN, before)
                self._out.write("\n")
                self._out.flush()


class Script:
    """Lines of a file: numbers of the menu, each with its answers below it.

    A line that begins with # is a comment, one like [NAME] the head of a part.  An indented line is an answer and never
    a number; once answers are indented, a line that is not ends them, and those that were left out are empty.  An
    empty line is the empty answer where one is asked for, and nothing elsewhere.
    """

    interactive = False

    def __init__(
        self, name: str, lines: Iterable[tuple[int, str]], out: TextIO, *, indents: bool = False
    ) -> None:
        self._name, self._lines, self._out = name, iter(lines), out
        self._number = 0
        self._kept: str | None = None
        self._indents = indents
        self.skips = False
        """Whether the answers that follow belong to something that failed."""

    @property
    def where(self) -> str:
        """FILE:LINE"""
        return f"{self._name}:{self._number}"

    def _next(self) -> str | None:
        if self._kept is not None:
            line, self._kept = self._kept, None
            return line
        for number, line in self._lines:
            self._number = number
            if not line.lstrip().startswith("#") and not _PART.fullmatch(line):
                return line.rstrip("\r\n")
        return None

    def choice(self, prompt: str) -> str | None:
        """The next number; raises NotDone for an answer that nobody asked for."""
        while (line := self._next()) is not None:
            indented = line[:1].isspace()
            if not line.strip() or (indented and self.skips):
                continue
            text = line.partition("#")[0].strip()
            self._show(prompt, text)
            if indented:
                raise NotDone(f"{text!r} is indented: an answer, and nothing asks for one here")
            self.skips = False
            return text
        return None

    def answer(self, prompt: str, *, secret: bool = False) -> str | None:
        """The next line."""
        line = self._next()
        if line is None and not self._indents:
            return None
        self._indents = self._indents or is_answer(line or "")
        if line is not None and self._indents and line.strip() and not is_answer(line):
            self._kept, line = line, ""
        text = (line or "").strip().removeprefix("\\")
        self._show(prompt, "(not shown)" if secret else text)
        return text

    def _show(self, prompt: str, text: str) -> None:
        self._out.write(f"{prompt}{text}\n")
        self._out.flush()


def script_of(path: Path, lines: list[tuple[int, str]], out: TextIO) -> Script:
    """A file's lines, or a part of them."""
    return Script(str(path), lines, out, indents=any(is_answer(line) for _, line in lines))


def is_answer(line: str) -> bool:
    """Whether a line of a script can only be an answer."""
    return line[:1].isspace() and line.strip() != "" and not line.lstrip().startswith("#")


def numbered(path: Path) -> list[tuple[int, str]]:
    """The lines of a script file; raises NotDone."""
    try:
        if problem := _problem_with(path):
            raise NotDone(f"{path}: {problem}")
        # Editors of some systems begin a file with a byte order mark.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except (OSError, ValueError) as error:
        raise NotDone(f"{path}: {_reason(error)}") from None
    return list(enumerate(text.splitlines(), 1))


def parts(lines: Iterable[tuple[int, str]]) -> dict[str, list[tuple[int, str]]]:
    """The lines below each [NAME], until the next one."""
    found: dict[str, list[tuple[int, str]]] = {}
    part: list[tuple[int, str]] | None = None
    for number, line in lines:
        head = _PART.fullmatch(line)
        if head:
            part = found.setdefault(head[1].strip(), [])
        elif part is not None:
            part.append((number, line))
    return found


class Dialogue:
    """Asks of the source in turn; shows on `out`."""

    def __init__(self, source: Source, out: TextIO | None = None) -> None:
        self.source = source
        self.out = out or sys.stdout

    def say(self, text: str = "") -> None:
        """A line, or several."""
        self.out.write(text + "\n")
        self.out.flush()

    def ask(self, prompt: str, read: Callable[[str], Answer], default: str | None = None) -> Answer:
        """An answer that `read` takes, which raises ValueForm; the empty one is `default`.

        A person is asked again; what a script says wrongly raises NotDone.
        """
        hint = f" [{default}]" if default else ""
        while True:
            text = self.source.answer(f"{prompt}{hint}: ")
            if text is None:
                raise EndOfInput
            try:
                if not text and default is None:
                    raise ValueForm(
                        "nothing was typed (Ctrl-C: back to the menu)"
                        if self.source.interactive
                        else f"the answer is empty where one is asked for: {prompt}"
                    )
                return read(text or default or "")
            except ValueForm as error:
                self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        if not self.source.interactive:
            raise NotDone(str(error)) from None
        self.say(textwrap.fill(str(error), WIDTH, initial_indent="  ", subsequent_indent="  "))

    def text(self, prompt: str, default: str | None = None) -> str:
        """Any text."""
        return self.ask(prompt, str, default)

    def yes(self, prompt: str, *, default: bool) -> bool:
        """yes or no."""
        return self.ask(f"{prompt} (yes, no)", boolean, "yes" if default else "no")

    def sure(self, prompt: str) -> bool:
        """Asks a person before something is lost; a script means what it says."""
        return not self.source.interactive or self.yes(prompt, default=False)

    def pin(self, prompt: str) -> bytes:
        """A PIN: typed unseen, or `file:/PATH` with it in the first line; raises NotDone."""
        text = self.source.answer(f"{prompt} (or file:/PATH): ", secret=True)
        if text is None:
            raise EndOfInput
        if not text.startswith("file:"):
            return text.encode("utf-8", "surrogateescape")
        try:
            with Path(parse_file_uri(text)).open("rb") as file:
                pin = file.readline(4096).rstrip(b"\r\n")
        except (OSError, UriError, ValueError) as error:
            raise NotDone(f"file with the PIN: {_reason(error)}") from None
        if not pin:
            raise NotDone("file with the PIN: its first line is empty")
        return pin

    def new_pin(self, prompt: str) -> bytes:
        """A PIN that a person types twice; raises NotDone."""
        pin = self.pin(prompt)
        if self.source.interactive and self.pin(f"{prompt}, again") != pin:
            raise NotDone("the two are not the same; nothing was changed")
        return pin


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _problem_with(path: Path) -> str:
    """Why it is no file to be read as a whole; "" if it is one."""
    return problem_with(str(path)) or ("" if path.is_file() else "not a regular file")


def read_file(path: Path, most: int = 1 << 28) -> bytes:
    """A file as data; raises ValueForm."""
    try:
        if problem := _problem_with(path):
            raise ValueForm(f"{path}: {problem}")
        if path.stat().st_size > most:
            raise ValueForm(f"{path}: more than {most >> 20} MiB")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ValueForm(f"{path}: {_reason(error)}") from None


def write_file(path: Path, data: bytes) -> None:
    """Raises NotDone."""
    try:
        path.write_bytes(data)
    except (OSError, ValueError) as error:
        raise NotDone(f"{path}: {_reason(error)}") from None
