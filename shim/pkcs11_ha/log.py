"""The HA log: what happened to which member, one line per event, to a file, to syslog or to stderr."""

import errno
import json
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from pkcs11_ha.uri import UriError, parse_file_uri

IDENT = "pkcs11-ha"
FORMATS = ("text", "json")
SYSLOG_SOCKET = "/dev/log"

EVENTS = {
    "call.failed_over": "a call was repeated on another member after its member failed",
    "config.refused": "the changed configuration cannot be used: the one before stays in force",
    "config.reloaded": "the configuration has changed: what was done, and what waits for a restart or a member",
    "config.warned": "the configuration is valid but probably not what was meant",
    "core.failed": "the library could not start, or met a fault of its own",
    "core.started": "C_Initialize brought the library up",
    "core.stopped": "C_Finalize took the library down",
    "domain.refused": "a member has not the group's domain key, so it is left out",
    "group.returned": "the first member of a group that had none is back",
    "group.vanished": "the last member of a group is lost",
    "login.member_refused": "a member refused the login that the others accepted",
    "login.refused": "the login was refused, and no other member was tried with that PIN",
    "login.succeeded": "the application is logged in",
    "member.admitted": "a member that was ejected takes load again, slowly at first",
    "member.drained": "an operator has the member take no new work",
    "member.ejected": "a member much slower or more faulty than its peers takes only what no other can do, for a while",
    "member.enabled": "an operator has the member take work again",
    "member.lost": "a member failed and is left out",
    "member.recovered": "a lost member is back: connected, logged in, its objects reconciled",
    "member.trial": "the time of an ejected member is up: one operation is let through to it",
    "object.ambiguous": "several objects of a member fit one virtual object, so none was chosen",
    "object.pinned": "an object has no counterpart elsewhere and is served by its own member only",
    "object.settled": "an object was made, changed or destroyed on a member that had missed it",
    "operation.lost": "an operation could not be continued on another member",
    "recovery.asked": "an operator has a member tried at once",
    "recovery.exhausted": "the last permitted attempt to recover a member failed",
    "recovery.failed": "an attempt to recover a member failed",
    "recovery.stopped": "a member refused the PIN, so no further attempt is made to recover it",
    "replication.owed": "a member cannot be given what it missed of an object",
    "replication.refused": "an object was not made, changed or destroyed, because it would not be everywhere",
    "request.refused": "a file in the state directory is no request that can be heeded",
    "standby.promoted": "a standby serves because no active member is left",
    "standby.released": "an active member is back and the standby serves no longer",
    "status.unavailable": "the process has no status segment, so `p11ha status` does not see it",
    "write.partial": "a write reached some members and not others",
}
"""Every event there is, and what it means."""

# A pipe takes a write of up to PIPE_BUF bytes (4096 on Linux) whole, so the lines of many processes do not
# mix. The rest is room for time, ident and process id.
_TEXT_MAX_BYTES = 4000
_CHECK_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Event:
    """One thing that happened: `name` out of EVENTS; group and member may be empty."""

    name: str
    group: str = ""
    member: str = ""
    details: Mapping[str, str | int] = field(default_factory=dict)


def _verify(event: Event) -> None:
    """Raises ValueError for an event that is not in EVENTS or a key that is not a word, TypeError for a value
    that is neither text nor number: faults of ours, never of what a member said."""
    if event.name not in EVENTS:
        raise ValueError(f"no such event: {event.name!r}")
    for key in event.details:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", key):
            raise ValueError(f"{event.name}: not a word: {key!r}")
    for value in (event.group, event.member, *event.details.values()):
        # bytes may be a PIN or a key, and would come out as b'…'
        if not isinstance(value, str | int):
            raise TypeError(f"a log value is text or a number, not {type(value).__name__}")


def describe(event: Event) -> str:
    """The event as one printable line: `group=prod member=east member.lost code=CKR_DEVICE_ERROR`.

    Raises what `_verify` raises.
    """
    _verify(event)
    roles = {"group": event.group, "member": event.member}
    who = [f"{role}={quote(name)}" for role, name in roles.items() if name]
    what = [f"{key}={quote(value)}" for key, value in event.details.items()]
    return _cut(" ".join([*who, event.name, *what]))


def quote(value: str | int) -> str:
    """A value as it may stand in a line: bare if harmless, else in double quotes, with `\\` escapes."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9._:/+@%,-]+", text):
        return text
    return '"' + "".join(_escape(character) for character in text) + '"'


def _escape(character: str) -> str:
    # Line breaks of every kind, terminal escapes, direction marks and lone surrogates are all not printable.
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def _cut(text: str) -> str:
    data = text.encode()
    return text if len(data) <= _TEXT_MAX_BYTES else data[:_TEXT_MAX_BYTES].decode(errors="ignore") + "…"


def line(text: str, at_ms: int, pid: int) -> bytes:
    """The line as written to a file or to stderr: `2026-11-22T17:18:27.123Z pkcs11-ha[PID] TEXT`.

    `at_ms` is milliseconds since the epoch; the time is written in UTC (ISO 8601).
    """
    return f"{_moment(at_ms)} {IDENT}[{pid}] {text}\n".encode()


def _moment(at_ms: int, form: str = "%Y-%m-%dT%H:%M:%S") -> str:
    seconds, milliseconds = divmod(at_ms, 1000)
    return f"{time.strftime(form, time.gmtime(seconds))}.{milliseconds:03d}Z"


def record(event: Event, at_ms: int, pid: int) -> str:
    """The event as one JSON object in ASCII, with the same six keys always; raises what `_verify` raises.

    What is too long for a line has its long values cut, so that it stays an object.
    """
    _verify(event)

    def cut(value: str | int, room: int) -> str | int:
        return value[:room] + "…" if isinstance(value, str) and len(value) > room else value

    room = _TEXT_MAX_BYTES
    while True:
        text = json.dumps(
            {
                "time": _moment(at_ms),
                "pid": pid,
                "group": cut(event.group, room) or None,
                "member": cut(event.member, room) or None,
                "event": event.name,
                "details": {key: cut(value, room) for key, value in event.details.items()},
            }
        )
        if len(text) <= _TEXT_MAX_BYTES or room == 0:
            return text
        room //= 2


def parse_target(spec: str) -> str:
    """Where `spec` wants the log: "syslog", "stderr", "off", or the path of "file:/path"; else ValueError."""
    if spec in ("syslog", "stderr", "off"):
        return spec
    try:
        return parse_file_uri(spec)
    except UriError as error:
        raise ValueError(f'expected "file:/path", "syslog", "stderr" or "off" ({error})') from None


class Sink(Protocol):
    """A place for lines. It may lose one, but never raises: a log that fails must not fail a C_Sign."""

    def put(self, text: str) -> None: ...

    def close(self) -> None: ...


class Log:
    """Takes events, from any thread."""

    def __init__(self, sink: Sink, form: Callable[[Event], str] = describe) -> None:
        self._sink = sink
        self._form = form

    def write(self, event: Event) -> None:
        """Write the event; raises only what `describe` raises, and that also when the log is off."""
        self._sink.put(self._form(event))

    def close(self) -> None:
        """Let go of what is open."""
        self._sink.close()


def open_log(spec: str, form: str = "text", max_bytes: int = 0) -> Log:
    """The log that `spec` asks for (see `parse_target`), its lines in one of FORMATS; ValueError if it is none, no
    other error ever.

    A file that has grown to `max_bytes` is renamed, and a new one begun; 0: it grows.
    """
    stamp, describe_as = (_now, describe) if form == "text" else (_bare, _record_now)
    match parse_target(spec):
        case "syslog":
            return Log(_Syslog(SYSLOG_SOCKET), describe_as)
        case "stderr":
            return Log(_Stderr(stamp), describe_as)
        case "off":
            return Log(_Off(), describe_as)
        case path:
            return Log(_File(path, _Syslog(SYSLOG_SOCKET), stamp=stamp, max_bytes=max_bytes), describe_as)


def _now(text: str) -> bytes:
    return line(text, time.time_ns() // 1_000_000, os.getpid())


def _bare(text: str) -> bytes:
    return f"{text}\n".encode()


def _record_now(event: Event) -> str:
    return record(event, time.time_ns() // 1_000_000, os.getpid())


class _Off:
    def put(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Stderr:
    def __init__(self, stamp: Callable[[str], bytes] = _now) -> None:
        self._stamp = stamp

    def put(self, text: str) -> None:
        with suppress(OSError):  # closed by the host: there is nowhere left to say so
            _write(2, self._stamp(text))

    def close(self) -> None:
        pass


class _Syslog:
    """Datagrams to the local syslog daemon (RFC 3164; the daemon adds the time).

    Not the syslog module: its openlog() changes ident and facility for the whole process, so the host's own
    messages would come out as ours, and it waits when the daemon is slow. Each of these rare events has its
    own socket: a descriptor that is kept may have been closed by the host and be something else by now.
    """

    _PRIORITY = 3 * 8 + 5  # LOG_DAEMON, LOG_NOTICE

    def __init__(self, address: str) -> None:
        self._address = address

    def put(self, text: str) -> None:
        message = f"<{self._PRIORITY}>{IDENT}[{os.getpid()}]: {text}".encode()
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        # no daemon, or one that does not keep up: the line is lost, as syslog() loses it
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message, flags, self._address)

    def close(self) -> None:
        pass


class _Descriptor:
    """An open log file. Closed when nobody refers to it any more, so never under a thread that is writing."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.file = _file_behind(number)

    def is_ours(self) -> bool:
        """Whether the number still means that file: daemons close all descriptors, and numbers come again."""
        return self.file is not None and _file_behind(self.number) == self.file

    def __del__(self) -> None:
        if self.is_ours():
            os.close(self.number)


def _file_behind(number: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _File:
    """Appends to the file at `path`, also after log rotation; lines it cannot write go to `fallback`.

    There is no lock among threads, for the child of a fork() must not find it taken: threads that race may open
    the file twice, and one of the two is closed again.

    With `max_bytes`, whoever finds the file full after its line renames it, and the others look before each line
    whether it is still the one at the path: a line that is on its way meanwhile is the last that goes into it.
    """

    def __init__(
        self,
        path: str,
        fallback: Sink,
        clock: Callable[[], float] = time.monotonic,
        stamp: Callable[[str], bytes] = _now,
        max_bytes: int = 0,
    ) -> None:
        self._path = path
        self._fallback = fallback
        self._clock = clock
        self._stamp = stamp
        self._max_bytes = max_bytes
        self._held: _Descriptor | None = None
        self._check_at = 0.0
        self._complaints: set[str] = set()
        try:
            self._follow()
        except (OSError, ValueError) as error:
            self._complain("cannot be written", error, ": events go to syslog")

    def put(self, text: str) -> None:
        try:
            held = self._current()
            if held is not None:
                _write(held.number, self._stamp(text))
                self._rotate(held)
                return
        except (OSError, ValueError) as error:
            self._complain("cannot be written", error, ": events go to syslog")
        self._fallback.put(text)

    def close(self) -> None:
        self._held = None

    def _current(self) -> _Descriptor | None:
        """The open file: looked for again at once when the host closed it, else before each line if it is rotated
        here, at most once a second if not."""
        stolen = self._held is not None and not self._held.is_ours()
        if stolen or self._max_bytes or self._clock() >= self._check_at:
            self._follow()
        return self._held

    def _follow(self) -> None:
        """Hold the file that is at the path now; raises OSError, ValueError if no file can have that path."""
        self._check_at = self._clock() + _CHECK_INTERVAL_S
        try:
            new = _Descriptor(self._open())
        except (OSError, ValueError):
            self._held = None
            raise
        held = self._held
        if held is None or held.file != new.file or not held.is_ours():
            self._held = new

    def _open(self) -> int:
        # O_NONBLOCK: a FIFO without a reader is an error, not a wait
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK
        try:
            return os.open(self._path, flags)
        except FileNotFoundError:
            before = os.fstat(self._held.number) if self._held is not None and self._held.is_ours() else None
            number = os.open(self._path, flags | os.O_CREAT, 0o640)
        if before is not None:  # who could write to the one before can write to this one
            with suppress(OSError):
                os.fchown(number, before.st_uid if os.geteuid() == 0 else -1, before.st_gid)
            with suppress(OSError):
                os.fchmod(number, stat.S_IMODE(before.st_mode))
        return number

    def _rotate(self, held: _Descriptor) -> None:
        """Renames the file if it is full and still at the path; what goes wrong is said once, and the file grows."""
        try:
            if self._max_bytes and _is_full(os.fstat(held.number), self._max_bytes):
                path = os.path.realpath(self._path)  # a link stays where it is
                if _file_at(path) == held.file:
                    self._put_away(path, held)
                self._follow()
        except FileNotFoundError:
            pass  # another was quicker
        except OSError as error:
            self._complain("cannot be rotated", error, ": it grows")

    @staticmethod
    def _put_away(path: str, held: _Descriptor) -> None:
        """Gives the file a name with the time in it, `PATH.20261123T101530.123Z`, that no other file has.

        Without a lock, as nobody is to wait for one who was stopped holding it: of many who find the file full, each
        may rename it. One who comes too late by a moment renames the next one, which is shorter then: no line is lost.
        """
        at_ms = time.time_ns() // 1_000_000
        while True:
            name = f"{path}.{_moment(at_ms, '%Y%m%dT%H%M%S')}"
            try:
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                break
            except FileExistsError:
                at_ms += 1
        try:
            if _file_at(path) != held.file:
                raise FileNotFoundError
            os.rename(path, name)  # in the place of the empty file that kept the name
        except OSError:
            os.unlink(name)
            raise

    def _complain(self, what: str, error: Exception, so: str) -> None:
        if what in self._complaints:
            return
        self._complaints.add(what)
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        _Stderr().put(f"log file {quote(self._path)} {what} ({why}){so}")


def _is_full(status: os.stat_result, max_bytes: int) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_size >= max_bytes


def _file_at(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _write(descriptor: int, data: bytes) -> None:
    """Write the line with one call; raises OSError, but no SIGPIPE, which would kill the host."""
    pending = signal.SIGPIPE in signal.sigpending()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except BrokenPipeError:
        if not pending:
            signal.sigtimedwait({signal.SIGPIPE}, 0)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
