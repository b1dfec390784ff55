"""C_Initialize and C_Finalize in the core: the one Core there is between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.config import ConfigError, log_of
from pkcs11_ha.log import Event, open_log
from pkcs11_ha.runtime import core, native
from pkcs11_ha.runtime.core import Core
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.slot import VirtualSlot

_current: Core | None = None
_before_fork: list[Core] = []  # of the parent: never touched again, never collected


def current() -> Core:
    """The core of this run; raises CkError(CKR_CRYPTOKI_NOT_INITIALIZED) outside of one."""
    if _current is None:
        raise CkError(ck.CKR_CRYPTOKI_NOT_INITIALIZED)
    return _current


def slot_by_id(slot_id: int) -> VirtualSlot:
    """Raises CkError(CKR_SLOT_ID_INVALID)."""
    found = current().slots.get(int(slot_id))
    if found is None:
        raise CkError(ck.CKR_SLOT_ID_INVALID)
    return found


def slot_of(session: Any) -> VirtualSlot:
    """The slot of a session of the data plane."""
    return slot_by_id(native.lib.ha_slot_id(native.lib.ha_session_slot(session)))


def report_fault(where: str, error: BaseException) -> None:
    """Our own fault: into the log, or to stderr while there is none.  Never an argument's content."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        place, trace = (
            f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}",
            trace.tb_next,
        )
    if _current is not None:
        _current.log(Event("core.failed", details={"call": where, "why": repr(error), "where": place}))
    else:
        native.lib.ha_say(native.text(f"{where}: {error!r} at {place}"))


def _initialize(flags: int) -> None:
    global _current
    if _current is not None:  # in the child of a fork
        _before_fork.append(_current)
        _current = None
    try:
        _current = core.start(flags)
    except ConfigError as error:
        native.lib.ha_say(native.text(str(error)))
        log = open_log(*log_of(error.path))
        log.write(Event("core.failed", details={"why": str(error)}))
        log.close()
        raise CkError(ck.CKR_GENERAL_ERROR) from None


def _stopping() -> None:
    current().stop()


def _finalize() -> None:
    global _current
    ending, _current = current(), None
    ending.finalise()


HANDLERS: dict[str, Callable[..., int | None]] = {
    "initialize": _initialize,
    "stopping": _stopping,
    "finalize": _finalize,
}
