"""A terminal that is changed for a while: it is as it was again, however the command ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = signal.SIGTERM, signal.SIGHUP


class _Left(BaseException):
    """Leaves all that is between a signal and `put_back`, as Ctrl-C does."""


@contextmanager
def put_back() -> Iterator[None]:
    """SIGTERM and SIGHUP leave the body by an exception, so that it can put back what it changed, and then end the
    process as they would have.

    The body must wait in Python: inside C a signal waits too.
    """
    came = 0

    def leave(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends it wherever it is
        raise _Left

    taken = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]  # nohup stays nohup
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        if came:
            signal.raise_signal(came)
