"""Each return value falls into the class that the table of peers gives it, and the C table says the same."""

from __future__ import annotations

import pytest

from pkcs11_ha import ck
from pkcs11_ha.config import PROFILES
from pkcs11_ha.core.codes import CLEAN_SIZE, PIN_REFUSED, Code, classify, clean_table

ALL = {name: value for name, value in vars(ck).items() if name.startswith("CKR_")}

CLASSES = {
    Code.DEAD: "DEVICE_REMOVED TOKEN_NOT_PRESENT TOKEN_NOT_RECOGNIZED SLOT_ID_INVALID FIPS_SELF_TEST_FAILED "
    "LIBRARY_LOAD_FAILED",
    Code.SUSPECT: "DEVICE_ERROR GENERAL_ERROR FUNCTION_FAILED VENDOR_DEFINED",
    Code.BUSY: "DEVICE_MEMORY HOST_MEMORY SESSION_COUNT TOKEN_RESOURCE_EXCEEDED",
    Code.SESSION: "SESSION_HANDLE_INVALID SESSION_CLOSED",
    Code.LOGIN: "USER_NOT_LOGGED_IN",
    Code.HANDLE: "OBJECT_HANDLE_INVALID KEY_HANDLE_INVALID WRAPPING_KEY_HANDLE_INVALID UNWRAPPING_KEY_HANDLE_INVALID",
    Code.OPERATION: "OPERATION_ACTIVE OPERATION_NOT_INITIALIZED",
    Code.LIBRARY: "CRYPTOKI_NOT_INITIALIZED",
    Code.CAPABILITY: "FUNCTION_NOT_SUPPORTED MECHANISM_INVALID KEY_SIZE_RANGE CURVE_NOT_SUPPORTED",
    # Answers to what the application asked, which a member gives because it is well.
    Code.CLEAN: "OK ARGUMENTS_BAD BUFFER_TOO_SMALL DATA_INVALID DATA_LEN_RANGE ENCRYPTED_DATA_INVALID "
    "ENCRYPTED_DATA_LEN_RANGE SIGNATURE_INVALID SIGNATURE_LEN_RANGE WRAPPED_KEY_INVALID WRAPPED_KEY_LEN_RANGE "
    "KEY_FUNCTION_NOT_PERMITTED KEY_TYPE_INCONSISTENT KEY_UNEXTRACTABLE KEY_EXHAUSTED ATTRIBUTE_SENSITIVE "
    "ATTRIBUTE_TYPE_INVALID TEMPLATE_INCONSISTENT SESSION_READ_ONLY TOKEN_WRITE_PROTECTED STATE_UNSAVEABLE "
    "SAVED_STATE_INVALID FUNCTION_CANCELED CANCEL FUNCTION_REJECTED RANDOM_NO_RNG USER_ALREADY_LOGGED_IN "
    "USER_PIN_NOT_INITIALIZED USER_TYPE_INVALID PIN_INCORRECT PIN_LOCKED PIN_EXPIRED PIN_INVALID PIN_LEN_RANGE",
}


@pytest.mark.parametrize(
    ("name", "code"), [(name, code) for code, names in CLASSES.items() for name in names.split()]
)
def test_return_value_is_in_its_class(name: str, code: Code) -> None:
    assert classify(ALL[f"CKR_{name}"]) is code


def test_what_is_not_listed_here_is_the_application_s_own_affair() -> None:
    listed = {ALL[f"CKR_{name}"] for names in CLASSES.values() for name in names.split()}
    assert {classify(rv) for rv in set(ALL.values()) - listed} == {Code.CLEAN}


def test_unknown_vendor_code_is_suspect_and_an_unknown_one_of_the_standard_is_not() -> None:
    assert classify(ck.CKR_VENDOR_DEFINED + 0x1234) is Code.SUSPECT
    assert classify(ck.CKR_VENDOR_DEFINED - 1) is Code.CLEAN
    assert classify(0x1F0) is Code.CLEAN


def test_refused_pin_never_counts_against_a_member() -> None:
    """A member whose PIN was refused is left out by the login; a class that repeats would try the PIN again."""
    assert {classify(rv) for rv in PIN_REFUSED} == {Code.CLEAN}
    assert {ck.CKR_PIN_INCORRECT, ck.CKR_PIN_LOCKED, ck.CKR_PIN_EXPIRED} <= PIN_REFUSED
    assert ck.CKR_USER_PIN_NOT_INITIALIZED not in PIN_REFUSED  # no PIN was compared


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "auto"])
def test_the_data_plane_s_table_says_what_classify_says(profile: str) -> None:
    table = clean_table(profile)
    assert len(table) == CLEAN_SIZE
    assert [bool(entry) for entry in table] == [
        classify(rv, profile) is Code.CLEAN for rv in range(CLEAN_SIZE)
    ]
    assert table[ck.CKR_OK] == 1
