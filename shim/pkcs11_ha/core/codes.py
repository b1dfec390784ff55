"""What a return value says about the member that gave it: the one table of fault classes, and profiles of it."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from pkcs11_ha import ck


class Code(enum.Enum):
    """Classes of return values (PKCS#11 5.1; how peers read them: see docs/return-codes.md)."""

    CLEAN = "clean"  # the answer to the application's request: never a matter of health
    DEAD = "dead"  # the token is gone
    SUSPECT = "suspect"  # the token may be at fault: settled by doing the same elsewhere
    BUSY = "busy"  # not now, here: another member may, and nobody is at fault
    SESSION = "session"  # the member lost the session: a new one
    LOGIN = "login"  # the member lost the login
    HANDLE = "handle"  # the member does not know the object (any more)
    OPERATION = "operation"  # member and session disagree about the operation under way
    LIBRARY = "library"  # somebody finalised the library
    CAPABILITY = "capability"  # this member cannot; another may


_TABLE: Mapping[Code, tuple[int, ...]] = {
    Code.DEAD: (
        ck.CKR_DEVICE_REMOVED,
        ck.CKR_TOKEN_NOT_PRESENT,
        ck.CKR_TOKEN_NOT_RECOGNIZED,
        ck.CKR_SLOT_ID_INVALID,
        ck.CKR_FIPS_SELF_TEST_FAILED,
        ck.CKR_LIBRARY_LOAD_FAILED,
    ),
    Code.SUSPECT: (ck.CKR_DEVICE_ERROR, ck.CKR_GENERAL_ERROR, ck.CKR_FUNCTION_FAILED),
    Code.BUSY: (
        ck.CKR_DEVICE_MEMORY,
        ck.CKR_HOST_MEMORY,
        ck.CKR_SESSION_COUNT,
        ck.CKR_TOKEN_RESOURCE_EXCEEDED,
    ),
    Code.SESSION: (ck.CKR_SESSION_HANDLE_INVALID, ck.CKR_SESSION_CLOSED),
    Code.LOGIN: (ck.CKR_USER_NOT_LOGGED_IN,),
    Code.HANDLE: (
        ck.CKR_OBJECT_HANDLE_INVALID,
        ck.CKR_KEY_HANDLE_INVALID,
        ck.CKR_WRAPPING_KEY_HANDLE_INVALID,
        ck.CKR_UNWRAPPING_KEY_HANDLE_INVALID,
    ),
    Code.OPERATION: (ck.CKR_OPERATION_ACTIVE, ck.CKR_OPERATION_NOT_INITIALIZED),
    Code.LIBRARY: (ck.CKR_CRYPTOKI_NOT_INITIALIZED,),
    Code.CAPABILITY: (
        ck.CKR_FUNCTION_NOT_SUPPORTED,
        ck.CKR_MECHANISM_INVALID,
        ck.CKR_KEY_SIZE_RANGE,
        ck.CKR_CURVE_NOT_SUPPORTED,
    ),
}

_DEFAULT: Mapping[int, Code] = {rv: code for code, rvs in _TABLE.items() for rv in rvs}

# What a profile reads otherwise.
_PROFILES: Mapping[str, Mapping[int, Code]] = {
    "generic": {},
    "softhsm": {},
    "p11-kit": {},
    "nss": {},
}

CLEAN_SIZE = 512  # the data plane's table; return values beyond it are always asked about


def classify(rv: int, profile: str = "generic") -> Code:
    """The class of a return value; vendor-defined ones without an entry are suspect."""
    own = _PROFILES[profile].get(rv)
    if own is not None:
        return own
    return _DEFAULT.get(rv, Code.SUSPECT if rv >= ck.CKR_VENDOR_DEFINED else Code.CLEAN)


def clean_table(profile: str = "generic") -> bytes:
    """CLEAN_SIZE bytes: 1 where a return value is nothing that the core must look at."""
    return bytes(classify(rv, profile) is Code.CLEAN for rv in range(CLEAN_SIZE))


# Answers to C_Login and its kin that forbid another try of the same PIN.
PIN_REFUSED = frozenset(
    {
        ck.CKR_PIN_INCORRECT,
        ck.CKR_PIN_LOCKED,
        ck.CKR_PIN_EXPIRED,
        ck.CKR_PIN_INVALID,
        ck.CKR_PIN_LEN_RANGE,
        ck.CKR_PIN_TOO_WEAK,
    }
)
