"""The ledger: what the group knows of each object it made, as entries that are kept on the members themselves.

An entry is the state an object is to have on every member.  A write announces a new version of it on all members
that are there, does it on one after the other, and marks each as done.  Whatever ends in between, whoever finds the
entries can tell what is missing where.  All of it is decided here, nothing is done.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from hashlib import sha256
from typing import Any, TypeVar

from pkcs11_ha.core.identity import Name

T = TypeVar("T")

_FORMAT = 1


class Stage(Enum):
    """How far a member is with a version of an entry; the value stands in the label of the ledger object."""

    ANNOUNCED = "announced"  # it is to be done
    PLACED = "placed"  # it is done here; some other member may still be owed
    KEPT = "kept"  # it is done everywhere


@dataclass(frozen=True)
class Owner:
    """The process that writes: whether it lives can be told on its own host."""

    host: str  # of one start of the system, and one namespace of process ids
    pid: int
    start: int  # ticks after the system's start
    nonce: str  # of this write


@dataclass(frozen=True)
class Wrapped:
    """A key under the domain key of that generation."""

    generation: int
    form: str
    blob: bytes
    size: int = 0  # CKA_VALUE_LEN of a secret key; 0: not known


@dataclass(frozen=True)
class Entry:
    """What an object is to be.  Versions grow; of one version a tombstone outweighs the rest."""

    uid: str  # 32 hexadecimal digits
    version: int
    alive: bool
    name: Name
    former: tuple[Name, ...] = ()  # what it was called before, the oldest first
    fingerprint: bytes | None = None
    evidence: bytes | None = None  # what the key shows in an operation, see core.proof
    wrapped: Wrapped | None = None
    change: Mapping[int, bytes] = field(default_factory=dict)  # attributes set since it was made
    owed: frozenset[str] = (
        frozenset()
    )  # members that have the object and were away, as no entry of theirs says
    foreign: bool = False  # provisioned outside: members may not have it
    owner: Owner | None = None
    together: tuple[Entry, ...] = ()  # objects made by the same call, all or none

    @property
    def weight(self) -> tuple[int, bool, str]:
        """What outweighs what."""
        return self.version, not self.alive, self.owner.nonce if self.owner else ""


class LedgerError(Exception):
    """An entry that cannot be read: of a later version, or damaged."""


def is_uid(text: str) -> bool:
    """Whether it can be the uid of an entry."""
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)


def oid(uid: str) -> bytes:
    """CKA_OBJECT_ID of an entry: 2.25.N, where N is the uid's number (ITU-T X.667), in DER."""
    number = int(uid, 16)
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(0x80 | number & 0x7F)
    body = bytes([2 * 40 + 25, *reversed(digits)])
    return bytes([6, len(body)]) + body


def name_digest(name: Name) -> str:
    """32 hexadecimal digits: how entries are found by what their objects are called."""
    return sha256(repr(tuple(name)).encode()).hexdigest()[:32]


def encode(entry: Entry) -> bytes:
    """CKA_VALUE of an entry."""
    return json.dumps({"format": _FORMAT, **_plain(entry)}, separators=(",", ":")).encode()


def _plain(entry: Entry) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "uid": entry.uid,
        "version": entry.version,
        "alive": entry.alive,
        "name": _plain_name(entry.name),
    }
    if entry.former:
        plain["former"] = [_plain_name(name) for name in entry.former]
    if entry.fingerprint is not None:
        plain["fingerprint"] = _text(entry.fingerprint)
    if entry.evidence is not None:
        plain["evidence"] = _text(entry.evidence)
    if entry.wrapped:
        plain["wrapped"] = [
            *(entry.wrapped.generation, entry.wrapped.form, _text(entry.wrapped.blob), entry.wrapped.size)
        ]
    if entry.change:
        plain["change"] = {str(number): _text(value) for number, value in entry.change.items()}
    if entry.owed:
        plain["owed"] = sorted(entry.owed)
    if entry.foreign:
        plain["foreign"] = True
    if entry.owner:
        plain["owner"] = [entry.owner.host, entry.owner.pid, entry.owner.start, entry.owner.nonce]
    if entry.together:
        plain["together"] = [_plain(other) for other in entry.together]
    return plain


def _plain_name(name: Name) -> list[int | str | None]:
    return [v if isinstance(v, int | None) else _text(v) for v in name]


def _name(plain: list[Any]) -> Name:
    object_class, kind, *texts = plain
    for number in (object_class, kind):
        if number is not None:
            _is(number, int)
    return Name(object_class, kind, *(base64.b64decode(text) for text in texts))


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def decode(value: bytes) -> Entry:
    """The entry in a CKA_VALUE; raises LedgerError."""
    try:
        plain = json.loads(value)
        if plain["format"] != _FORMAT:
            raise LedgerError(f"a ledger entry of format {plain['format']}: written by a later version")
        return _entry(plain)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise LedgerError(f"a ledger entry cannot be read: {type(error).__name__}") from None


def _is(value: Any, kind: type[T]) -> T:
    """The value, which must be of this very type: True is no number.  Raises TypeError."""
    if type(value) is not kind:
        raise TypeError(kind.__name__)
    return value


def _wrapped(generation: Any, form: Any, blob: Any, size: Any) -> Wrapped:
    return Wrapped(_is(generation, int), _is(form, str), base64.b64decode(blob), _is(size, int))


def _owner(host: Any, pid: Any, start: Any, nonce: Any) -> Owner:
    return Owner(_is(host, str), _is(pid, int), _is(start, int), _is(nonce, str))


def _entry(plain: Mapping[str, Any]) -> Entry:
    wrapped, owner = plain.get("wrapped"), plain.get("owner")
    return Entry(
        uid=_is(plain["uid"], str),
        version=_is(plain["version"], int),
        alive=_is(plain["alive"], bool),
        name=_name(plain["name"]),
        former=tuple(_name(each) for each in plain.get("former", ())),
        fingerprint=base64.b64decode(plain["fingerprint"]) if "fingerprint" in plain else None,
        evidence=base64.b64decode(plain["evidence"]) if "evidence" in plain else None,
        wrapped=_wrapped(*wrapped) if wrapped else None,
        change={int(n): base64.b64decode(v) for n, v in plain.get("change", {}).items()},
        owed=frozenset(_is(member, str) for member in plain.get("owed", ())),
        foreign=_is(plain.get("foreign", False), bool),
        owner=_owner(*owner) if owner else None,
        together=tuple(_entry(other) for other in plain.get("together", ())),
    )


@dataclass(frozen=True)
class Replica:
    """An entry as one member has it.  `handles`: (index of the member it lies on, its handle there)."""

    member: str
    stage: Stage
    entry: Entry
    handles: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Situation:
    """Where the members stand with one entry."""

    target: Entry
    done: frozenset[str]  # members that need nothing
    behind: frozenset[str]  # members that do
    away: frozenset[str]  # members that do, when they return
    announced: tuple[Owner, ...]  # who is, or was, at work on it


def assess(replicas: Sequence[Replica], there: Iterable[str], roster: Iterable[str]) -> Situation:
    """What is to be done, and where, for the object of these replicas (all of one uid).

    `there` are the members that can be worked on now, `roster` all that the group has.  A member is done with an
    object when it has placed the newest version of its entry.  A tombstone concerns members that have an older
    entry, those it names, and those that are away until they have shown that they have none.
    """
    target = max((replica.entry for replica in replicas), key=lambda entry: entry.weight)
    at_target = [r for r in replicas if r.entry.weight == target.weight]
    done = {r.member for r in at_target if r.stage is not Stage.ANNOUNCED}
    everybody, present = frozenset(roster), frozenset(there)
    if any(r.stage is Stage.KEPT for r in at_target):
        # A member that was admitted or replaced since is brought in by its own command, not here.
        done |= everybody - {r.member for r in replicas if r.entry.weight < target.weight}
    elif not target.alive:
        # Who is away may have an entry that nobody sees now.
        done |= (everybody & present) - {r.member for r in replicas} - target.owed
    return Situation(
        target,
        frozenset(done) & everybody,
        (everybody - done) & present,
        everybody - done - present,
        tuple(r.entry.owner for r in at_target if r.stage is Stage.ANNOUNCED and r.entry.owner),
    )


def tombstone(entry: Entry, owner: Owner, owed: Iterable[str] = ()) -> Entry:
    """The entry of the same object, destroyed."""
    return replace(
        entry,
        version=entry.version + 1,
        alive=False,
        wrapped=None,
        change={},
        owed=entry.owed | frozenset(owed),
        owner=owner,
        together=(),
    )
