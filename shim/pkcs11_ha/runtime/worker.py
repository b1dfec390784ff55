"""A worker as the core sees it: started or connected, its functions, killed or bid farewell."""

from __future__ import annotations

from typing import Any

from pkcs11_ha.config import MemberConfig
from pkcs11_ha.runtime import native

SOCKET = "unix:"
_HELLO_S = 30.0  # for a library to be loaded; less where calls have a limit
_LATE = 10  # times the limit of a call


class WorkerError(Exception):
    """A worker cannot be started or reached; `str` is one line."""


class Worker:
    """The process that has a member's vendor library; one that a fork left behind belongs to the parent."""

    def __init__(self, config: MemberConfig) -> None:
        self.config = config
        self.generation = native.lib.ha_fork_generation()
        self.number = int(native.lib.ha_remote_new())
        if self.number < 0:
            raise WorkerError("too many members with a worker in one process")

    def start(self) -> None:
        """A new process, or a new one behind the socket; the one before is killed.  Raises WorkerError."""
        host, why = self.config.host, native.ffi.new("char[512]")
        limit_ms = (
            max(1, round((self.config.call_timeout_s or 0) * 1000)) if self.config.call_timeout_s else 0
        )
        patience_ms = min(round(_HELLO_S * 1000), limit_ms * _LATE or round(_HELLO_S * 1000))
        if host.startswith(SOCKET):
            path = native.text(host.removeprefix(SOCKET))
            done = native.lib.ha_remote_connect(self.number, path, limit_ms, patience_ms, why, 512)
        else:
            variables = [native.text(name) for name, _ in self.config.env]
            entries = [native.text(f"{name}={value}") for name, value in self.config.env]
            done = native.lib.ha_remote_start(
                self.number,
                native.text(self.config.module),
                native.ffi.new("char *[]", variables),
                native.ffi.new("char *[]", entries),
                len(entries),
                limit_ms,
                patience_ms,
                why,
                512,
            )
        if not done:
            raise WorkerError(_printable(native.ffi.string(why)))

    def function(self, row: int) -> Any:
        """The stub of a row; NULL if the library has no such function."""
        return native.lib.ha_remote_function(self.number, row)

    def version(self) -> tuple[int, int]:
        """Of the library's function list."""
        major, minor = native.ffi.new("unsigned *"), native.ffi.new("unsigned *")
        native.lib.ha_remote_version(self.number, major, minor)
        return major[0], minor[0]

    def kill(self) -> None:
        """At once; calls in it come back."""
        if self._is_ours:
            native.lib.ha_remote_kill(self.number)

    def leave(self) -> None:
        """C_Finalize, for a moment at most, and its end."""
        if self._is_ours:
            native.lib.ha_remote_stop(self.number)
            native.lib.ha_remote_free(self.number)

    @property
    def _is_ours(self) -> bool:
        return bool(self.generation == native.lib.ha_fork_generation())


def _printable(text: bytes) -> str:
    """One line, whatever a worker that somebody else started has said."""
    line = text.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in line)
