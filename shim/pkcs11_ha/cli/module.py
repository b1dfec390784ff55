"""The library in the command's own process: it shares our interpreter, so its core can be looked at."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pkcs11_ha import ck
from pkcs11_ha.entry import life
from pkcs11_ha.runtime.core import Core

_HERE = Path(__file__).resolve()
# In a source tree, and as `make install` lays it out.
_PLACES = (_HERE.parents[3] / "build" / "libpkcs11-ha.so", _HERE.parents[4] / "pkcs11" / "libpkcs11-ha.so")


class ModuleError(Exception):
    """The library cannot be used; `str` is one line."""


def path() -> Path:
    """$PKCS11_HA_MODULE, else the library this command was built with; raises ModuleError."""
    wanted = os.environ.get("PKCS11_HA_MODULE")
    for place in (Path(wanted),) if wanted else _PLACES:
        if place.exists():
            return place
    raise ModuleError(f"{wanted or 'libpkcs11-ha.so'}: not found")


class _Member(ctypes.Structure):
    _fields_ = (("serial", ctypes.c_char * 20), ("status", ctypes.c_ulong))


class Status(ctypes.Structure):
    """CK_HA_STATUS of include/pkcs11_ha.h."""

    _fields_ = (("serial", ctypes.c_char * 20), ("members", _Member * 32), ("size", ctypes.c_ulong))


class Library:
    """Between C_Initialize and C_Finalize."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded

    @property
    def core(self) -> Core:
        return life.current()

    def ha_state(self, slot: int) -> Status:
        """One CA_GetHAState; raises ModuleError."""
        status = Status()
        rv = self._loaded.CA_GetHAState(ctypes.c_ulong(slot), ctypes.byref(status))
        if rv != ck.CKR_OK:
            raise ModuleError(f"CA_GetHAState answers {ck.rv_name(rv)}")
        return status


@contextmanager
def initialised() -> Iterator[Library]:
    """C_Initialize to C_Finalize; what goes wrong has been said on stderr by the library itself."""
    loaded = ctypes.CDLL(str(path()), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    for function in (loaded.C_Initialize, loaded.C_Finalize, loaded.CA_GetHAState):
        function.restype = ctypes.c_ulong
    rv = loaded.C_Initialize(None)
    if rv != ck.CKR_OK:
        raise ModuleError(f"C_Initialize answers {ck.rv_name(rv)}")
    try:
        yield Library(loaded)
    finally:
        loaded.C_Finalize(None)
