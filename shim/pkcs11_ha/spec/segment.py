"""The status segment: what a process that uses the library shows of itself, laid out once for C, Python and docs.

A file has a header, a text and a record of counters for each member.  Header and records are the fields below, from
which C's structures, Python's and docs/status-segments.md are drawn; the text is JSON of the dataclasses below.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .functions import Deadline

MAGIC = b"P11HASEG"
VERSION = 1
NAME = r"([1-9][0-9]{0,9})-([0-9]{1,20})(?:-[1-9])?\.segment"
"""A file's name: process id and start; a process that is in a directory twice counts on."""

LOAD_BITS = 20
"""Of `load`: calls inside the member's library now; the rest is calls ever."""
FAULTS = 16
SAMPLED_BITS = 6
"""The time of one call in 2 ** 6 is taken."""
SHORTEST_BITS, BUCKETS = 8, 32
"""The first bucket of a histogram is up to 2 ** 8 ns, each other up to twice the one before."""

CLASSES = tuple(each for each in Deadline if each is not Deadline.CONNECT)
"""Functions whose times are kept apart: those of `call_timeout_s`."""

MEMBER_STATES = ("up", "away", "connecting", "drained", "ejected")

_ALIGNED = 64  # records: what one member's calls write is in no cache line of another's
_SIZES = {"char": 1, "uint32_t": 4, "uint64_t": 8}
_CODES = {"char": "s", "uint32_t": "I", "uint64_t": "Q"}


@dataclass(frozen=True)
class Field:
    """One field of a structure; `shape` of an array, `atomic` if it changes while others read it."""

    name: str
    kind: str
    doc: str
    shape: tuple[int, ...] = ()
    atomic: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return _SIZES[self.kind] * self.count


HEADER = (
    Field("magic", "char", f"`{MAGIC.decode()}`; zeros while the file is being made", (len(MAGIC),)),
    Field("version", "uint32_t", f"of this format: {VERSION}"),
    Field("pid", "uint32_t", "the process"),
    Field("size", "uint64_t", "bytes of the file"),
    Field("started", "uint64_t", "start of the process, in ticks since the system's (field 22 of /proc/PID/stat)"),
    Field("pid_namespace", "uint64_t", "in which `pid` means something: inode of /proc/PID/ns/pid"),
    Field("text_at", "uint64_t", "where the text begins"),
    Field("text_room", "uint64_t", "bytes that it may have"),
    Field("records_at", "uint64_t", "where the records of counters begin"),
    Field("records", "uint64_t", "how many there is room for"),
    Field("record_size", "uint64_t", "bytes of one"),
    Field("text_sequence", "uint64_t", "odd while the text is being written, another when it has been", atomic=True),
    Field("text_size", "uint64_t", "bytes that it has; 0: none yet", atomic=True),
)  # fmt: skip

COUNTERS = (
    Field(
        "load", "uint64_t", f"calls ever × 2^{LOAD_BITS} + calls inside the member's library now", atomic=True
    ),
    Field(
        "failovers", "uint64_t", "calls and operations that went on elsewhere after it failed", atomic=True
    ),
    Field(
        "faults", "uint64_t", "answers that were at fault, by class (`faults` of the text)", (FAULTS,), True
    ),
    Field("latency_ns", "uint64_t", "sum of the times below, by class of function", (len(CLASSES),), True),
    Field(
        "latency",
        "uint64_t",
        f"calls whose time was taken: by class of function, up to 2^{SHORTEST_BITS} ns, 2^{SHORTEST_BITS + 1} ns, …;"
        " the last is of all that took longer",
        (len(CLASSES), BUCKETS),
        True,
    ),
)


def aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


HEADER_SIZE = aligned(sum(each.size for each in HEADER))
RECORD_SIZE = aligned(sum(each.size for each in COUNTERS))


def offsets(fields: Sequence[Field]) -> list[tuple[Field, int]]:
    """Each field with its place: they stand in such an order that nothing lies between them."""
    at, placed = 0, []
    for each in fields:
        assert at % _SIZES[each.kind] == 0, each.name
        placed.append((each, at))
        at += each.size
    return placed


def unpack(fields: Sequence[Field], data: bytes, at: int = 0) -> dict[str, Any]:
    """Name -> bytes, number or (of an array) flat tuple of numbers; struct.error if there is not so much data."""
    values: dict[str, Any] = {}
    for each, place in offsets(fields):
        form = f"={each.count if each.shape else ''}{_CODES[each.kind]}"
        found = struct.unpack_from(form, data, at + place)
        values[each.name] = found if each.shape and each.kind != "char" else found[0]
    return values


def header(values: Mapping[str, int]) -> bytes:
    """The header of a new file; what is not named is 0."""
    data = bytearray(HEADER_SIZE)
    for each, place in offsets(HEADER):
        value = MAGIC if each.name == "magic" else values.get(each.name, 0)
        struct.pack_into(f"={each.count if each.shape else ''}{_CODES[each.kind]}", data, place, value)
    return bytes(data)


# ---- the text ----


def _said(doc: str) -> Any:
    return field(metadata={"doc": doc})


@dataclass(frozen=True)
class MemberText:
    """`members` of a group."""

    name: str = _said("as the configuration calls it")
    serial: str = _said("of its token")
    standby: bool = _said("whether it serves only when no active member is left")
    state: str = _said(
        f"{', '.join(MEMBER_STATES[:-1])} or {MEMBER_STATES[-1]}; connecting: an attempt to recover it is under way"
    )
    up: bool = _said(
        "whether it is connected and its objects matched: it is while up or ejected, may be while drained"
    )
    since_ns: int = _said("when it came to be so, in ns since 1970; connecting: when it was lost")
    since_monotonic_ns: int = _said("the same by CLOCK_MONOTONIC")
    code: str = _said("the last code for which it was lost or not recovered, empty if there was none")
    call: str = _said("the call that gave it")
    why: str = _said("why it is away, in one line")
    loss_was_read: bool = _said("whether the application has read of the loss by CA_GetHAState")
    failed: int = _said("attempts to recover it that failed")
    next_monotonic_ns: int | None = _said("after when the next is due, by CLOCK_MONOTONIC; null: none is")
    stopped: bool = _said("whether it refused the PIN, so that none will be")
    owed: int | None = _said("objects that it has yet to be given, or to lose; null: not known")
    record: int = _said("number of its record, from 0; -1: it has none")


@dataclass(frozen=True)
class GroupText:
    """`groups` of a process."""

    label: str = _said("of the virtual token")
    serial: str = _said("of the virtual token")
    slot: int = _said("number of the virtual slot")
    balance: str = _said("how operations choose a member")
    members: tuple[MemberText, ...] = _said("active ones first, in the configuration's order")


@dataclass(frozen=True)
class ProcessText:
    """The whole."""

    program: str = _said("name of the process's executable")
    version: str = _said("of pkcs11-ha")
    configuration: str = _said("path of the file")
    attempts: int = _said("permitted to recover a member (N); -1: without limit")
    faults: tuple[str, ...] = _said("names of the classes of faults, in the records' order")
    groups: tuple[GroupText, ...] = _said("in the configuration's order")


TEXTS = (ProcessText, GroupText, MemberText)


# ---- C ----


def _c_struct(name: str, fields: Sequence[Field], size: int) -> str:
    lines = [f"struct {name} {{"]
    for number, each in enumerate(fields):
        kind = f"_Atomic {each.kind}" if each.atomic else each.kind
        start = f"_Alignas({_ALIGNED}) " if number == 0 else ""
        lines.append(f"    {start}{kind} {each.name}{''.join(f'[{n}]' for n in each.shape)};")
    lines.append("};")
    for each, place in offsets(fields):
        lines.append(f'_Static_assert(offsetof(struct {name}, {each.name}) == {place}, "layout");')
    lines.append(f'_Static_assert(sizeof(struct {name}) == {size}, "layout");')
    return "\n".join(lines)


def c_header() -> str:
    """segment.gen.h"""
    constants = {
        "HA_LOAD_BITS": LOAD_BITS,
        "HA_SAMPLED_BITS": SAMPLED_BITS,
        "HA_SEGMENT_CLASSES": len(CLASSES),
        "HA_SEGMENT_BUCKETS": BUCKETS,
        "HA_SEGMENT_SHORTEST_BITS": SHORTEST_BITS,
    }
    numbers = ", ".join(f"{name} = {value}" for name, value in constants.items())
    return (
        "/* Generated by build.py from shim/pkcs11_ha/spec/segment.py; do not edit. */\n"
        "#ifndef PKCS11_HA_SEGMENT_GEN_H\n#define PKCS11_HA_SEGMENT_GEN_H\n\n"
        f"#include <stddef.h>\n#include <stdint.h>\n\nenum {{ {numbers} }};\n\n"
        f'_Static_assert(HA_FAULTS == {FAULTS}, "layout");\n\n'
        f"{_c_struct('ha_segment_header', HEADER, HEADER_SIZE)}\n\n"
        f"{_c_struct('ha_counters', COUNTERS, RECORD_SIZE)}\n\n#endif\n"
    )
