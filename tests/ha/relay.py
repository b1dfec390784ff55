"""A member that is slow and well: what goes to its server is held up on the way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from demo.members import Server, Table


class Relay:
    """A socket before a server's; `delay_s` is what each message to it waits."""

    def __init__(self, server: Server, path: Path) -> None:
        self.server, self.path = server, path
        self.delay_s = 0.0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def member(self) -> Table:
        """The server as a `[[member]]` that is reached by this way."""
        return dict(self.server.member()) | {"env": {"P11_KIT_SERVER_ADDRESS": f"unix:path={self.path}"}}

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client = self._listener.accept()[0]
                there = socket.socket(socket.AF_UNIX)
                there.connect(str(self.server.socket))
                self._ends += [client, there]
                self._start(self._pump, client, there, True)
                self._start(self._pump, there, client, False)

    def _pump(self, source: socket.socket, target: socket.socket, held_up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if held_up and self.delay_s:
                    time.sleep(self.delay_s)
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for end in (self._listener, *self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()
