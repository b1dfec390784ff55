"""Status segments, read: hostile bytes in, dataclasses or one line out; and what several processes say, joined."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import stat
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pkcs11_ha import ck
from pkcs11_ha.runtime.process import is_alive, pid_namespace
from pkcs11_ha.runtime.segment import left, sweep
from pkcs11_ha.spec import segment as layout
from pkcs11_ha.spec.segment import GroupText, MemberText, ProcessText

SIZE_MAX = 4 << 20
_MOMENT_S = 5.0  # in which a file gets its header
_OTHERS = "look as root, or as its owner"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}
_TRIES, _STEP_S = 50, 0.002  # of reading a text while it is written
_SEQUENCE_AT = next(at for each, at in layout.offsets(layout.HEADER) if each.name == "text_sequence")
_LOAD_MASK = (1 << layout.LOAD_BITS) - 1

T = TypeVar("T")


class Damaged(Exception):
    """A file is no segment that can be read: `str` says why in one line, `cure` what to do; {} is its path."""

    def __init__(self, problem: str, cure: str = "rm {}") -> None:
        super().__init__(problem)
        self.cure = cure


class Unfinished(Exception):
    """A file is about to become a segment."""


# ---- one segment ----


@dataclass(frozen=True)
class Latency:
    """Times of sampled calls of one class."""

    counts: tuple[int, ...]
    total_ns: int

    @property
    def samples(self) -> int:
        return sum(self.counts)

    def quantile_ns(self, share: float) -> int | None:
        """At most so long took that share of the calls (the upper edge of the bucket); None without any."""
        left = share * self.samples
        for bucket, count in enumerate(self.counts):
            left -= count
            if count and left <= 0:
                return edge_ns(bucket)
        return None

    def __add__(self, other: Latency) -> Latency:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Latency(counts, self.total_ns + other.total_ns)


def edge_ns(bucket: int) -> int:
    """The upper edge of a bucket; what is in the last one may have taken longer."""
    return 1 << (layout.SHORTEST_BITS + bucket)


@dataclass(frozen=True)
class Counters:
    """What was counted of one member; `faults` and `latency` by class."""

    calls: int
    in_flight: int
    failovers: int
    faults: dict[str, int]
    latency: dict[str, Latency]

    @property
    def faulty(self) -> int:
        return sum(self.faults.values())

    def __add__(self, other: Counters) -> Counters:
        names = {**self.faults, **other.faults}
        return Counters(
            self.calls + other.calls,
            self.in_flight + other.in_flight,
            self.failovers + other.failovers,
            {name: self.faults.get(name, 0) + other.faults.get(name, 0) for name in names},
            {name: latency + other.latency[name] for name, latency in self.latency.items()},
        )


NOTHING = Counters(0, 0, 0, {}, {each.value: Latency((0,) * layout.BUCKETS, 0) for each in layout.CLASSES})


def total(counters: Iterable[Counters]) -> Counters:
    return sum(counters, NOTHING)


@dataclass(frozen=True)
class Process:
    """A process that uses the library; `text` is None while it initialises, `counters` are those of its records."""

    name: str
    pid: int
    started: int
    namespace: int
    text: ProcessText | None
    counters: tuple[Counters, ...]

    def of(self, member: MemberText) -> Counters:
        return self.counters[member.record] if member.record >= 0 else NOTHING


def parse(data: bytes, name: str = "") -> Process:
    """A segment's bytes; raises Damaged, Unfinished."""
    if len(data) < layout.HEADER_SIZE:
        raise Damaged(f"truncated: {len(data)} bytes") if data.strip(b"\0") else Unfinished
    header = layout.unpack(layout.HEADER, data)
    if header["magic"] != layout.MAGIC:
        raise Damaged("not a status segment") if data[: layout.HEADER_SIZE].strip(b"\0") else Unfinished
    if header["version"] != layout.VERSION:
        raise Damaged(
            f"of format {header['version']}, this p11ha reads format {layout.VERSION}",
            "use the p11ha of the library that this process has loaded",
        )
    if header["size"] != len(data):
        short = len(data) < header["size"]
        raise Damaged(f"{'truncated' if short else 'damaged'}: {len(data)} of {header['size']} bytes")
    records_end = header["records_at"] + header["records"] * header["record_size"]
    text_end = header["text_at"] + header["text_size"]
    if (
        header["record_size"] != layout.RECORD_SIZE
        or records_end > len(data)
        or text_end > len(data)
        or header["text_size"] > header["text_room"]
    ):
        raise Damaged("damaged: its header makes no sense")
    text = _text(data[header["text_at"] : text_end], header["records"]) if header["text_size"] else None
    counters = tuple(
        _counters(data, header["records_at"] + number * layout.RECORD_SIZE, text)
        for number in range(header["records"])
    )
    return Process(name, header["pid"], header["started"], header["pid_namespace"], text, counters)


def _counters(data: bytes, at: int, text: ProcessText | None) -> Counters:
    values = layout.unpack(layout.COUNTERS, data, at)
    rows = [
        values["latency"][n : n + layout.BUCKETS] for n in range(0, len(values["latency"]), layout.BUCKETS)
    ]
    return Counters(
        values["load"] >> layout.LOAD_BITS,
        values["load"] & _LOAD_MASK,
        values["failovers"],
        {
            name: count
            for name, count in zip(text.faults if text else (), values["faults"], strict=False)
            if count
        },
        {
            each.value: Latency(tuple(row), total_ns)
            for each, row, total_ns in zip(layout.CLASSES, rows, values["latency_ns"], strict=True)
        },
    )


def _text(data: bytes, records: int) -> ProcessText:
    try:
        text: ProcessText = _shaped(ProcessText, json.loads(data))
    except (ValueError, RecursionError):
        raise Damaged("damaged: its text makes no sense") from None
    for group in text.groups:
        for member in group.members:
            if member.state not in layout.MEMBER_STATES or not -1 <= member.record < records:
                raise Damaged("damaged: its text makes no sense")
    return text


_HINTS = {cls: get_type_hints(cls) for cls in layout.TEXTS}


def _shaped(wanted: Any, plain: Any) -> Any:
    """JSON as the type that is wanted; what is not known is passed over.  Raises ValueError."""
    if wanted in _HINTS and isinstance(plain, dict):
        hints = _HINTS[wanted]
        if not hints.keys() <= plain.keys():
            raise ValueError
        return wanted(**{name: _shaped(hint, plain[name]) for name, hint in hints.items()})
    if get_origin(wanted) is tuple and isinstance(plain, list):
        return tuple(_shaped(get_args(wanted)[0], each) for each in plain)
    if isinstance(wanted, UnionType):
        return None if plain is None else _shaped(get_args(wanted)[0], plain)
    if wanted is str and isinstance(plain, str):
        return printable(plain)
    if wanted is int and type(plain) is int and abs(plain) < 1 << 64:
        return plain
    if wanted is bool and isinstance(plain, bool):
        return plain
    raise ValueError


def printable(text: str) -> str:
    """Nothing that steers a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# ---- all of a directory ----


@dataclass(frozen=True)
class Skipped:
    """A file that is passed over, what is wrong with it and what to do about that."""

    path: str
    problem: str
    cure: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.problem}"


@dataclass(frozen=True)
class Found:
    """What there is in a state directory; `left`: files of processes that ended, where they were not removed."""

    processes: tuple[Process, ...]
    skipped: tuple[Skipped, ...]
    left: tuple[str, ...] = ()


def read_all(directory: str, *, remove: bool = True) -> Found:
    """All processes that run, by process id.  Files of those that ended are removed."""
    processes, skipped, gone = [], [], []
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Found((), ())
    except OSError as error:
        return Found((), (Skipped(directory, error.strerror or "cannot be read", _OTHERS),))
    try:
        if remove:
            sweep(folder)
        else:
            gone = sorted(left(folder))
        for name in sorted(os.listdir(folder)):  # noqa: PTH208 (a descriptor)
            if name.endswith(".segment") and name not in gone:
                try:
                    process = _read(folder, name)
                    if process is not None:
                        processes.append(process)
                except Damaged as error:
                    path = f"{directory}/{name}"
                    typed = (
                        shlex.quote(path) if path.isprintable() else f"-i {shlex.quote(directory)}/*.segment"
                    )
                    skipped.append(Skipped(path, str(error), error.cure.format(typed)))
    finally:
        os.close(folder)
    ordered = sorted(processes, key=lambda p: (p.pid, p.name))
    return Found(tuple(ordered), tuple(skipped), tuple(f"{directory}/{name}" for name in gone))


def _read(folder: int, name: str) -> Process | None:
    """None: it is being made, or its process is gone.  Raises Damaged."""
    match = re.fullmatch(layout.NAME, name)
    if match is None:
        raise Damaged("not the name of a status segment")
    pid, started = int(match[1]), int(match[2])
    try:
        data, changed_s = _bytes(folder, name)
        process = parse(data, name)
    except Unfinished:
        what = "without a header" if data else "empty"
        if not is_alive(pid, started):
            raise Damaged(f"{what}, and process {pid} that it is named for is gone") from None
        if time.time() - changed_s > _MOMENT_S:
            raise Damaged(f"{what} for more than a moment") from None
        return None
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Damaged("a symbolic link") from None
        raise Damaged(error.strerror or "cannot be read", _OTHERS) from None
    if (process.pid, process.started) != (pid, started):
        raise Damaged(f"says that it is of process {process.pid}")
    here = process.namespace == pid_namespace()
    return process if not here or is_alive(process.pid, process.started) else None


def _bytes(folder: int, name: str) -> tuple[bytes, float]:
    """The file as it was at a moment when nobody was writing its text, and when it was changed last, in s since 1970.

    Raises Damaged, OSError.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    file = os.open(name, flags, dir_fd=folder)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            kind = stat.S_IFMT(status.st_mode)
            raise Damaged(_KINDS.get(kind, "not a file"), "rm -r {}" if kind == stat.S_IFDIR else "rm {}")
        if status.st_size > SIZE_MAX:
            raise Damaged("too large for a status segment")
        for _ in range(_TRIES):
            before = os.pread(file, 8, _SEQUENCE_AT)
            data = os.pread(file, status.st_size + 1, 0)
            if not data.startswith(layout.MAGIC) or (
                before == os.pread(file, 8, _SEQUENCE_AT)
                and not (before and before[0 if _LITTLE else -1] & 1)
            ):
                return data, status.st_mtime
            time.sleep(_STEP_S)
    finally:
        os.close(file)
    raise Damaged("half written", "nothing, while its process writes it: look again")


_LITTLE = struct.pack("=H", 1)[0] == 1


# ---- what several processes say ----


@dataclass(frozen=True)
class View:
    """A member as one process sees it."""

    process: Process
    member: MemberText
    counters: Counters

    @property
    def status(self) -> str:
        """Name of the code that CA_GetHAState would give there."""
        if self.member.up:
            return ck.rv_name(ck.CKR_OK)
        known = self.member.loss_was_read or self.member.failed
        return ck.rv_name(ck.CKR_TOKEN_NOT_PRESENT if known else ck.CKR_DEVICE_ERROR)


@dataclass(frozen=True)
class Member:
    """A member as all of them see it."""

    name: str
    serial: str
    standby: bool
    views: tuple[View, ...]

    @property
    def status(self) -> str:
        """CKR_OK if it is that for all, else what a new loss says, else an old one."""
        said = {view.status for view in self.views}
        order = (ck.CKR_DEVICE_ERROR, ck.CKR_TOKEN_NOT_PRESENT, ck.CKR_OK)
        return next(ck.rv_name(code) for code in order if ck.rv_name(code) in said)

    @property
    def counters(self) -> Counters:
        return total(view.counters for view in self.views)

    @property
    def states(self) -> dict[str, int]:
        """State -> how many processes see it so."""
        found = {state: sum(v.member.state == state for v in self.views) for state in layout.MEMBER_STATES}
        return {state: count for state, count in found.items() if count}


@dataclass(frozen=True)
class Group:
    """A group as all processes that have it see it; `text` is that of one of them."""

    configuration: str
    text: GroupText
    processes: tuple[Process, ...]
    members: tuple[Member, ...]


def join(processes: Sequence[Process]) -> list[Group]:
    """Group -> member -> processes; groups of different configurations are different ones."""
    seen: dict[tuple[str, str, str], list[tuple[Process, GroupText]]] = {}
    for process in processes:
        for group in process.text.groups if process.text else ():
            assert process.text
            key = (process.text.configuration, group.label, group.serial)
            seen.setdefault(key, []).append((process, group))
    return [_joined(configuration, found) for (configuration, _, _), found in seen.items()]


def _joined(configuration: str, found: Sequence[tuple[Process, GroupText]]) -> Group:
    # The one that started last knows the configuration best.
    _, newest = max(found, key=lambda pair: pair[0].started)
    views: dict[str, list[View]] = {member.name: [] for member in newest.members}
    for process, group in found:
        for member in group.members:
            views.setdefault(member.name, []).append(View(process, member, process.of(member)))
    members = []
    for name, each in views.items():
        if each:
            last = max(each, key=lambda view: view.process.started).member
            members.append(Member(name, last.serial, last.standby, tuple(each)))
    return Group(configuration, newest, tuple(process for process, _ in found), tuple(members))


def of_configuration(processes: Iterable[Process], path: str) -> list[Process]:
    """Those that use this file; with an empty path all."""
    wanted = os.path.realpath(path)
    return [p for p in processes if not path or (p.text and os.path.realpath(p.text.configuration) == wanted)]
