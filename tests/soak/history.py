"""What happened in a soak: one line of JSON for each thing, the name of its kind first, times in microseconds.

Times are of CLOCK_MONOTONIC, which all processes of a host share.  A file has one writer, but a client's is carried
on by the process that takes the place of one that was killed; what that one was writing when it died may be cut short.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """What was set up: the first line of a driver's history."""

    arena: str
    seed: int
    members: list[str]
    call_timeout_us: int
    connect_timeout_us: int
    clients: int
    writes: list[str]  # names of operations that write token objects: one client after the other
    unable: dict[str, list[str]] = {}  # noqa: RUF012 (a NamedTuple's): member -> operations that it has not got at all


class Fault(NamedTuple):
    at: int
    step: int
    kind: str
    target: str  # a member or a client


class Over(NamedTuple):
    """The cause is gone; what the fault broke may still be broken."""

    at: int
    step: int
    kind: str
    target: str


class Settled(NamedTuple):
    """Every client has the member again."""

    at: int
    member: str


class NotTakenIn(NamedTuple):
    """The member was back, and a client had it not in all the time that there was."""

    at: int
    member: str
    client: str


class Client(NamedTuple):
    """A client process: it began, it was killed, it left, or it died of itself (`what`)."""

    at: int
    client: str
    what: str


class Given(NamedTuple):
    """An object that was provisioned on every token."""

    kind: str
    label: str
    proof: str


class Held(NamedTuple):
    """An object that the bare token holds in the end."""

    member: str
    kind: str
    label: str
    proof: str


class Left(NamedTuple):
    """Something of the group's own that should not be there in the end."""

    member: str
    what: str


class Wish(NamedTuple):
    """A client is about to write a token object: to make it, to name it anew, or to destroy it (no label)."""

    client: str
    at: int
    kind: str
    uid: str
    label: str | None


class Wrote(NamedTuple):
    """The answer to the wish before it that has the same kind and uid."""

    client: str
    start: int
    end: int
    kind: str
    uid: str
    rv: str


class Seen(NamedTuple):
    """What the key or content behind an object has shown of itself, through the module."""

    client: str
    kind: str
    uid: str
    proof: str


class Did(NamedTuple):
    """One operation: its slowest call, how it ended, and whether what came out was right.

    `rv` is the name of the code of the call that failed, else CKR_OK; `why` is empty unless the result was wrong.
    """

    client: str
    thread: int
    name: str
    start: int
    end: int
    slowest: int
    call: str  # the slowest one, or the one that failed
    rv: str
    why: str


class Pin(NamedTuple):
    """A C_Login that reached a token; the PIN is a hash of it, `client` is empty where the token cannot tell."""

    at: int
    client: str
    member: str
    pin: str
    rv: int


Record = (
    Setting
    | Fault
    | Over
    | Settled
    | NotTakenIn
    | Client
    | Given
    | Held
    | Left
    | Wish
    | Wrote
    | Seen
    | Did
    | Pin
)
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in Record.__args__}


def now() -> int:
    return time.monotonic_ns() // 1000


def line(record: Record) -> bytes:
    return json.dumps([type(record).__name__, *record], separators=(",", ":")).encode() + b"\n"


def parse(text: bytes) -> Record:
    """Raises ValueError, KeyError or TypeError if it is no record."""
    kind, *values = json.loads(text)
    record: Record = _KINDS[kind](*values)
    return record


class Writer:
    """Appends records, each in one write: what was written outlives a process that is killed."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if os.lseek(self._file, 0, os.SEEK_END):
            os.write(self._file, b"\n")  # ends a line that was cut short

    def write(self, *records: Record) -> None:
        os.write(self._file, b"".join(map(line, records)))

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> Iterator[Record]:
    """The records of a file, one after the other; a line that was cut short is passed over."""
    with path.open("rb") as file:
        for text in file:
            if text.endswith(b"]\n"):
                yield parse(text)
