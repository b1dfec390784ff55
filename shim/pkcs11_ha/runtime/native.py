"""The data plane as Python sees it: cffi's `ffi` and `lib`, set once when the library attaches the core."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from pkcs11_ha import ck

ffi: Any = None
lib: Any = None

T = TypeVar("T")


class CkError(Exception):
    """A PKCS#11 return value on its way to the application (never CKR_OK); `member` gave it, if one did."""

    def __init__(self, rv: int, why: str = "", member: object = None) -> None:
        super().__init__(f"{ck.rv_name(rv)}{f': {why}' if why else ''}")
        self.rv = rv if rv != ck.CKR_OK else ck.CKR_GENERAL_ERROR
        self.member = member


def check(rv: int, why: str = "", member: object = None) -> None:
    """Raises CkError unless `rv` is CKR_OK."""
    if rv != ck.CKR_OK:
        raise CkError(rv, why, member)


def text(value: str) -> Any:
    """A char * with the UTF-8 of `value`; lives as long as what is returned."""
    return ffi.new("char[]", value.encode("utf-8", "surrogateescape"))


def padded(field: Any) -> str:
    """A blank-padded field of PKCS#11 as text without the blanks."""
    return bytes(ffi.buffer(field)).split(b"\0")[0].decode("utf-8", "replace").rstrip(" ")


def pad(field: Any, value: str) -> None:
    """Writes `value` into a blank-padded field, cut at a character's border (PKCS#11 2.2)."""
    size = len(field)
    raw = value.encode("utf-8")
    while len(raw) > size:
        value = value[:-1]
        raw = value.encode("utf-8")
    ffi.buffer(field)[:] = raw.ljust(size)


def start_thread(work: Callable[[], object], name: str) -> threading.Thread:
    """A thread that takes no signal meant for the application: the mask is inherited from who starts it."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return thread


class OutOfTime(Exception):
    """A piece of work did not end in its time; it may still be under way."""


def within(
    limit_s: float,
    may_use_threads: bool,
    work: Callable[[], T],
    late: Callable[[BaseException | None], None],
) -> T:
    """Does `work`, at most so long; raises OutOfTime, and `late` is told how it ended when it ends after all.

    A call into a vendor library cannot be taken back, so the work has a thread of its own.  Where the
    application forbids threads (CKF_LIBRARY_CANT_CREATE_OS_THREADS), and in a Python host that is ending, where
    no thread starts any more, it is done here, without a bound.
    """
    if not may_use_threads or sys.is_finalizing():
        return work()
    results: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()
    lock = threading.Lock()
    abandoned = False

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller, whatever it is
            errors.append(error)
        with lock:
            ended.set()
            too_late = abandoned
        if too_late:
            late(errors[0] if errors else None)

    start_thread(body, "pkcs11-ha member")
    with suppress(BaseException):  # Ctrl-C in a Python host: the work goes on, and is no longer waited for
        ended.wait(limit_s)
    with lock:
        if not ended.is_set():
            abandoned = True
            raise OutOfTime
    if errors:
        raise errors[0]
    return results[0]


def getenv(name: str) -> str | None:
    """The variable as it is now; os.environ of an embedded Python is as old as the interpreter."""
    value = lib.ha_getenv(text(name))
    return None if value == ffi.NULL else str(ffi.string(value).decode("utf-8", "surrogateescape"))
