"""A lock among the threads of this process and, as far as a state directory can be shared, the processes of this host.

Leases and announcements on the tokens do for hosts what this does on one: but SoftHSM hides from a process that writes
what another one wrote just before (2.6), so that looking after writing is not enough there.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256

_STEP_S = 0.01


class HostLock:
    """As threading.RLock.  `taken` is called each time it came from another thread or process, or might have, and
    `given_back` before it goes there."""

    def __init__(
        self,
        directory: str,
        name: str,
        patience_s: float,
        taken: Callable[[], None],
        given_back: Callable[[], None],
    ) -> None:
        self._path = os.path.join(directory, f"{sha256(name.encode()).hexdigest()[:16]}.lock")
        self._patience_s = patience_s
        self._taken = taken
        self._given_back = given_back
        self._threads = threading.RLock()
        self._depth = 0
        self._file: int | None = None

    def acquire(self, blocking: bool = True) -> bool:
        """A process that holds it for longer than patience lasts, as it was stopped, is not waited for."""
        if not self._threads.acquire(blocking=blocking):
            return False
        self._depth += 1
        if self._depth == 1:
            if not self._lock_file(self._patience_s if blocking else 0.0) and not blocking:
                self.release()
                return False
            self._taken()
        return True

    def _lock_file(self, patience_s: float) -> bool:
        """False: another process has it.  Where there can be no file, there is nobody to wait for."""
        deadline = time.monotonic() + patience_s
        with suppress(OSError):
            os.makedirs(os.path.dirname(self._path), mode=0o755, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._file = file
                    return True
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        os.close(file)
                        return False
                    time.sleep(_STEP_S)
        return True

    def release(self) -> None:
        """Once for each `acquire`."""
        self._depth -= 1
        if self._depth == 0:
            self._given_back()
            if self._file is not None:
                os.close(self._file)
                self._file = None
        self._threads.release()

    def __enter__(self) -> HostLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
