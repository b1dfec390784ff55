"""Progress of what takes long: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY_S = 5.0

Report = Callable[[int, int], None]
"""(done, of how many)."""


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """On stderr, so that what a command prints stays its own."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(what: str, console: Console) -> Report:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _EVERY_S:
            last = time.monotonic()
            console.print(f"{what}: {done} of {total}", highlight=False, soft_wrap=True)

    return report
