"""The Python side of the C boundary: handlers are attached here, and nothing unforeseen passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.entry import life, login, making, objects, questions, slots
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.native import CkError

_ALL_BITS = 0xFFFFFFFF  # what the seal leaves room for; as an answer, HA_AGAIN
_SEAL = 0x5041C0DE00000000  # HA_SEAL: an answer without it is CKR_GENERAL_ERROR

Handler = Callable[..., int | None]


def _sealed(name: str, handler: Handler) -> Callable[..., int]:
    """The only catch-all: a CkError is its code, anything else our own fault; None is CKR_OK."""

    def answer(*arguments: Any) -> int:
        try:
            rv = handler(*arguments) or ck.CKR_OK
        except CkError as error:
            rv = error.rv
        except BaseException as error:  # nothing may escape into C
            life.report_fault(name, error)
            rv = ck.CKR_GENERAL_ERROR
        return _SEAL | (rv if 0 <= rv <= _ALL_BITS else ck.CKR_GENERAL_ERROR)

    return answer


def attach(ffi: Any, lib: Any) -> None:
    """Called once by the library when it starts the core; says in one line what keeps it from working."""
    native.ffi, native.lib = ffi, lib
    if not lib.ha_is_version(native.text(ck.STAMP)):
        return  # before anything that may differ
    handlers: dict[str, Handler] = {
        **life.HANDLERS,
        **slots.HANDLERS,
        **login.HANDLERS,
        **objects.HANDLERS,
        **making.HANDLERS,
        **questions.HANDLERS,
    }
    if set(handlers) != set(ck.UPCALLS):
        wrong = ", ".join(sorted(set(handlers) ^ set(ck.UPCALLS)))
        lib.ha_say(native.text(f"broken installation: handlers and function table differ: {wrong}"))
        return
    for name, handler in handlers.items():
        ffi.def_extern(name=f"core_{name}", error=ck.CKR_GENERAL_ERROR)(_sealed(name, handler))
    lib.ha_attached(native.text(ck.STAMP))


__all__ = ["attach"]
