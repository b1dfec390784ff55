"""Workers, and threads of ours in their place, as the core sees them: started, their functions, killed, left."""

from __future__ import annotations

import math
import pwd
from collections.abc import Iterator
from typing import Any

from pkcs11_ha.config import WORKER_ENVIRONMENT, MemberConfig
from pkcs11_ha.runtime import native
from pkcs11_ha.spec.functions import Deadline

SOCKET = "unix:"


class WorkerError(Exception):
    """A worker cannot be started or reached; `str` is one line."""


class Remote:
    """What makes a member's calls instead of their callers; one that a fork left behind belongs to the parent."""

    def __init__(self, config: MemberConfig, connect_timeout_s: float) -> None:
        self.config = config
        self.connect_timeout_s = connect_timeout_s
        self.generation = native.lib.ha_fork_generation()
        self.number = int(native.lib.ha_remote_new())
        if self.number < 0:
            raise WorkerError("too many members with a worker in one process")

    def _limits_ms(self) -> Any:
        return native.ffi.new("unsigned[]", [_milliseconds(self._limit_s(each)) for each in Deadline])

    def _limit_s(self, deadline: Deadline) -> float:
        if deadline is Deadline.CONNECT:
            return self.connect_timeout_s
        return float(getattr(self.config.timeouts, deadline.value))

    def function(self, row: int) -> Any:
        """The stub of a row; NULL if the library has no such function."""
        return native.lib.ha_remote_function(self.number, row)

    def take_turns(self) -> None:
        """From now on its library is given one call at a time."""
        native.lib.ha_remote_take_turns(self.number)

    @property
    def is_alive(self) -> bool:
        """Whether calls are made."""
        return bool(native.lib.ha_remote_alive(self.number))

    def kill(self) -> None:
        """At once; calls in it come back."""
        if self._is_ours:
            native.lib.ha_remote_kill(self.number)

    @property
    def _is_ours(self) -> bool:
        return bool(self.generation == native.lib.ha_fork_generation())


class Worker(Remote):
    """The process that has a member's vendor library."""

    def start(self) -> None:
        """A new process, or a new one behind the socket; the one before is killed.  Raises WorkerError."""
        host, why = self.config.host, native.ffi.new("char[512]")
        limits_ms = self._limits_ms()
        if host.startswith(SOCKET):
            path = native.text(host.removeprefix(SOCKET))
            done = native.lib.ha_remote_connect(self.number, path, limits_ms, why, 512)
        else:
            arguments = [native.text(each) for each in self._arguments()]
            entries = [native.text(f"{name}={value}") for name, value in self._environment().items()]
            done = native.lib.ha_remote_start(
                self.number,
                native.ffi.new("char *[]", [*arguments, native.ffi.NULL]),
                native.ffi.new("char *[]", [*entries, native.ffi.NULL]),
                limits_ms,
                why,
                512,
            )
        if not done:
            raise WorkerError(_printable(native.ffi.string(why)))

    def _arguments(self) -> Iterator[str]:
        """What the worker is told besides whose it is."""
        yield self.config.module
        for name, value in self.config.limits:
            yield from ("--limit", f"{name}={value}")
        if self.config.user is not None:
            yield from ("--user", self.config.user)

    def _environment(self) -> dict[str, str]:
        """All that it gets: the application's may hold secrets, and steer a library where nobody would look for it."""
        kept = {name: value for name in WORKER_ENVIRONMENT if (value := native.getenv(name)) is not None}
        if self.config.user is not None:
            kept["HOME"] = pwd.getpwnam(self.config.user).pw_dir
        return kept | dict(self.config.env)

    def version(self) -> tuple[int, int]:
        """Of the library's function list."""
        major, minor = native.ffi.new("unsigned *"), native.ffi.new("unsigned *")
        native.lib.ha_remote_version(self.number, major, minor)
        return major[0], minor[0]

    def leave(self) -> None:
        """C_Finalize, for a moment at most, and its end."""
        if self._is_ours:
            native.lib.ha_remote_stop(self.number)
            native.lib.ha_remote_free(self.number)


class Hands(Remote):
    """Threads of this process: one that is late is left behind in the library, and its caller goes on."""

    def start(self, library: Any, functions: Any, count: int) -> None:
        """From now on the functions of this list are called.  Raises WorkerError."""
        if not native.lib.ha_remote_here(self.number, library, functions, count, self._limits_ms()):
            raise WorkerError("no memory")

    @property
    def left_behind(self) -> int:
        """Calls inside the library that nobody waits for any more."""
        return int(native.lib.ha_remote_left_behind(self.number)) if self._is_ours else 0

    def leave(self) -> None:
        """What is left behind ends when it comes back."""
        if self._is_ours:
            native.lib.ha_remote_free(self.number)


def _milliseconds(seconds: float) -> int:
    """0 is no limit, and none comes of rounding; more than 24 days are as good as for ever."""
    return min(math.ceil(seconds * 1000), 2**31 - 1)


def _printable(text: bytes) -> str:
    """One line, whatever a worker that somebody else started has said."""
    line = text.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in line)
