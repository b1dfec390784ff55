"""The thread that waits for operators: it notices what changes in directories, and does nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from pkcs11_ha.runtime import native


class Watch:
    """Calls `noticed` whenever something has changed in one of the directories; they need not exist."""

    def __init__(self, directories: Callable[[], Iterable[str]], noticed: Callable[[], None]) -> None:
        self._directories = directories
        self._noticed = noticed
        self._lock = threading.Lock()  # of what follows
        self._native: Any = None
        self._ended = False
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Where there can be no watch (inotify's limits), there is no thread either."""
        if self._begin():
            self.thread = native.start_thread(self._run, "pkcs11-ha watch")

    @property
    def is_there(self) -> bool:
        """Whether changes are noticed."""
        return self._native is not None

    def end(self, patience_s: float) -> None:
        """Wakes the thread and waits for its end; one that cannot be woken ends later, by itself."""
        with self._lock:
            self._ended = True
            woken = self._native is not None and native.lib.ha_watch_end(self._native)
        if self.thread is not None and (woken or not self.is_there):
            self.thread.join(patience_s)

    def _begin(self) -> bool:
        with self._lock:
            self._native = None if self._ended else native.lib.ha_watch_new() or None
        self._look_at_all()
        return self.is_there

    def _look_at_all(self) -> None:
        """Again after each change: a directory may be another one by now."""
        for path in self._directories() if self.is_there else ():
            native.lib.ha_watch_directory(self._native, native.text(path))

    def _run(self) -> None:
        while self.is_there:
            while native.lib.ha_watch_wait(self._native):
                self._look_at_all()
                self._noticed()
            with self._lock:
                gone, self._native = self._native, None
                native.lib.ha_watch_free(gone)
            if self._begin():  # the host has closed our descriptor
                self._noticed()
