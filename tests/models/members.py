"""Members in worker processes, as a story kills them and brings them back."""

from __future__ import annotations

from collections.abc import Mapping

from demo.members import Worker


class Members:
    """Who runs; `life` counts their deaths."""

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self.workers = workers
        self.life = dict.fromkeys(workers, 0)
        self.running = set(workers)

    def kill(self, name: str) -> None:
        self.workers[name].kill()
        self.running.remove(name)
        self.life[name] += 1

    def start(self, name: str) -> None:
        self.workers[name].start()
        self.running.add(name)

    def start_all(self) -> None:
        for name in set(self.workers) - self.running:
            self.start(name)
