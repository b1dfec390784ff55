"""`p11ha events`: the HA log read back, over rotated files and as it grows, in either of its forms."""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

from pkcs11_ha.log import IDENT, Event, line, quote

_PIECE = 1 << 16
_LONGEST = 1 << 16  # what goes on for longer without an end is no line of ours
_STEP_S = 0.2
_LAST = 10  # lines that --follow begins with
_OLD_ROUNDS = 5  # for which a file that was renamed is still looked at: a line may have been on its way

_ROTATED = re.compile(r"\.(?:[0-9]{8}T[0-9]{6}\.[0-9]{3}Z|[0-9]{1,6})")
_LINE = re.compile(rf"([0-9]{{4}}-[0-9:T.-]+Z) {re.escape(IDENT)}\[([0-9]{{1,10}})\] (.+)")
_WORD = re.compile(r'(?:([a-z][a-z0-9_]*)=)?("(?:\\.|[^"\\])*"?|[^ ]*) ?')
_ESCAPED = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.)")
_SINGLE = {"n": "\n", "t": "\t", "r": "\r"}


@dataclass(frozen=True)
class Entry:
    """One line of the log."""

    at: datetime
    pid: int
    event: Event

    def text(self) -> str:
        """As the log's usual form has it."""
        event = self.event
        who = {"group": event.group, "member": event.member}
        told = [f"{key}={quote(name)}" for key, name in who.items() if name]
        told += [event.name, *(f"{key}={quote(value)}" for key, value in event.details.items())]
        at_ms = int(self.at.timestamp() * 1000 + 0.5)
        return line(" ".join(told), at_ms, self.pid).decode().rstrip("\n")

    def as_json(self) -> dict[str, object]:
        event = self.event
        return {
            "time": self.at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "pid": self.pid,
            "group": event.group or None,
            "member": event.member or None,
            "event": event.name,
            "details": dict(event.details),
        }


@dataclass(frozen=True)
class Wanted:
    """Which entries; what is empty leaves it open."""

    group: str = ""
    member: str = ""
    event: str = ""  # a name, or one with * in it
    since: datetime | None = None

    def has(self, entry: Entry) -> bool:
        event = entry.event
        return (
            self.group in ("", event.group)
            and self.member in ("", event.member)
            and (not self.event or fnmatchcase(event.name, self.event))
            and (self.since is None or entry.at >= self.since)
        )


# ---- lines ----


def entry_of(text: str) -> Entry | None:
    """What a line says; None if it is not one of ours."""
    try:
        entry = _of_json(text) if text.startswith("{") else _of_text(text)
        return entry if entry is not None and _is_event(entry.event) else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def _is_event(event: Event) -> bool:
    """Whether it could be one, also of a later version."""
    return (
        re.fullmatch(r"[a-z]+\.[a-z_]+", event.name) is not None
        and all(isinstance(name, str) for name in (event.group, event.member))
        and all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in event.details)
        and all(isinstance(value, str | int) for value in event.details.values())
    )


def _of_text(text: str) -> Entry | None:
    match = _LINE.fullmatch(text)
    if match is None:
        return None
    who, name, details = {"group": "", "member": ""}, "", {}
    for word in _WORD.finditer(match[3]):
        key, value = word[1], word[2]
        if key is None and not name:
            name = value
        elif key in who and not name:
            who[key] = _unquoted(value)
        elif key is not None:
            details[key] = _unquoted(value)
    return Entry(_moment(match[1]), int(match[2]), Event(name, who["group"], who["member"], details))


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    return _ESCAPED.sub(_unescaped, value[1:].removesuffix('"'))


def _unescaped(match: re.Match[str]) -> str:
    what = match[1]
    return chr(int(what[1:], 16)) if len(what) > 1 else _SINGLE.get(what, what)


def _of_json(text: str) -> Entry:
    plain = json.loads(text)
    event = Event(plain["event"], plain["group"] or "", plain["member"] or "", dict(plain["details"]))
    return Entry(_moment(plain["time"]), int(plain["pid"]), event)


def _moment(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def since(text: str, now: datetime) -> datetime:
    """`10m`, `2h`, `3d` ago, or a moment (`2026-11-23T12:00`, in UTC as the log is); raises ValueError."""
    ago = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    if ago:
        unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[ago[2]]
        return now - timedelta(**{unit: int(ago[1])})
    with suppress(ValueError):
        return _moment(text)
    raise ValueError(f"{text!r} is neither a time (2026-11-23T12:00, in UTC) nor an age (10m, 2h, 3d)")


# ---- files ----


def files(path: Path) -> list[Path]:
    """The log and what was rotated of it, in order of time."""
    with suppress(OSError):
        beside = [p for p in path.parent.iterdir() if p.name.startswith(path.name)]
        old = [p for p in beside if _ROTATED.fullmatch(p.name[len(path.name) :])]
        return [*sorted(old, key=_changed), path]
    return [path]


def _changed(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


class _Reader:
    """A log file that is open, and stays so when it is renamed."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        self.identity = _identity(os.fstat(self._file))
        self.rounds_left = _OLD_ROUNDS
        self._rest = b""

    def entries(self) -> Iterator[Entry]:
        """What was added since."""
        if os.fstat(self._file).st_size < os.lseek(self._file, 0, os.SEEK_CUR):
            os.lseek(self._file, 0, os.SEEK_SET)  # it was emptied
            self._rest = b""
        while piece := os.read(self._file, _PIECE):
            *whole, self._rest = (self._rest + piece).split(b"\n")
            self._rest = self._rest[-_LONGEST:]
            for each in whole:
                entry = entry_of(each.decode(errors="replace"))
                if entry is not None:
                    yield entry

    def close(self) -> None:
        os.close(self._file)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def read(path: Path, wanted: Wanted) -> Iterator[Entry]:
    """All that there is; raises OSError if the log itself cannot be read."""
    for each in files(path):
        if wanted.since is not None and each != path and _changed(each) < wanted.since.timestamp():
            continue
        try:
            reader = _Reader(each)
        except OSError:
            if each == path:
                raise
            continue  # rotated files come and go
        try:
            yield from filter(wanted.has, reader.entries())
        finally:
            reader.close()


def follow(
    path: Path, wanted: Wanted, wait: Callable[[], None] = lambda: time.sleep(_STEP_S)
) -> Iterator[Entry]:
    """The last entries, or all since the moment that is wanted, then each that is added, over all rotations."""
    tail = _Tail(path, wanted.since)
    yield from deque(filter(wanted.has, tail.added()), maxlen=None if wanted.since else _LAST)
    while True:
        yield from filter(wanted.has, tail.added())
        wait()


class _Tail:
    """The log's files, each read once from its beginning, whatever it is called meanwhile."""

    def __init__(self, path: Path, since: datetime | None) -> None:
        self._path = path
        self._open: dict[tuple[int, int], _Reader] = {}
        there = self._there()
        # read to their end already, or never to be read
        self._done = {i for i, each in there[:-1] if since is not None and _changed(each) < since.timestamp()}
        if since is None:
            self._done.update(i for i, _ in there[:-2])

    def _there(self) -> list[tuple[tuple[int, int], Path]]:
        found = []
        for each in files(self._path):
            with suppress(OSError):
                found.append((_identity(each.stat()), each))
        return found

    def added(self) -> Iterator[Entry]:
        """What was added to any of them since."""
        there = self._there()
        self._done &= {identity for identity, _ in there}  # a number that is free again may be a new file's
        for identity, each in there:
            if identity not in self._open and identity not in self._done:
                with suppress(OSError):
                    reader = _Reader(each)
                    self._open[reader.identity] = reader
        live = next((identity for identity, each in there if each == self._path), None)
        for identity, reader in list(self._open.items()):
            yield from reader.entries()
            if identity != live:
                reader.rounds_left -= 1
            if reader.rounds_left < 0:
                reader.close()
                del self._open[identity]
                self._done.add(identity)
