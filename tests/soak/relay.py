"""A relay between Unix sockets: a link that can be slow, stall, end in one direction, or be cut."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_PIECE = 1 << 16


class Relay:
    """Listens at `path` and passes everything on to `target` and back."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self._target = path, target
        self.delay_s = 0.0  # for each piece
        self._flows = threading.Event()
        self._flows.set()
        self._takes = True
        self._ends: set[socket.socket] = set()
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()

    def stall(self) -> None:
        """Nothing is passed on, until `flow`."""
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    def cut(self) -> None:
        """No connection is left and none is taken, until `mend`."""
        self._takes = False
        with self._lock:
            ends = list(self._ends)
        for end in ends:
            _shut(end, socket.SHUT_RDWR)

    def mend(self) -> None:
        self._takes = True

    def half_close(self) -> None:
        """Clients hear no more of what they ask."""
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            _shut(client, socket.SHUT_WR)

    def __enter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.flow()
        _shut(self._listener, socket.SHUT_RDWR)
        self.cut()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        with self._listener, suppress(OSError):  # which ends when it is shut down
            while True:
                self._connect(self._listener.accept()[0])

    def _connect(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        try:
            if not self._takes:
                raise ConnectionRefusedError
            server.connect(str(self._target))
        except OSError:
            client.close()
            server.close()
            return
        with self._lock:
            self._ends |= {client, server}
            self._clients.add(client)
        left = [2]  # directions
        for ends in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(*ends, left), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE):
                self._flows.wait()
                if self.delay_s:
                    time.sleep(self.delay_s)
                target.sendall(piece)
        _shut(target, socket.SHUT_WR)
        with self._lock:
            left[0] -= 1
            if left[0] == 0:
                self._ends -= {source, target}
                self._clients -= {source, target}
                source.close()
                target.close()


def _shut(end: socket.socket, how: int) -> None:
    with suppress(OSError):
        end.shutdown(how)
