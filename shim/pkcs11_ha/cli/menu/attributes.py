"""Attributes for people: how a value is shown, and how one is typed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pkcs11_ha import ck
from pkcs11_ha.cli.menu.client import value_bytes

HEX_WIDTH = 24
"""Bytes shown of a long value, unless the options say otherwise."""


class ValueForm(Exception):
    """A text is no value of its attribute; `str` says what to type."""


def _named(*names: str) -> frozenset[int]:
    return frozenset(getattr(ck, f"CKA_{name}") for name in names)


def _names(prefix: str) -> dict[int, str]:
    return {v: n for n, v in reversed(vars(ck).items()) if n.startswith(prefix) and isinstance(v, int)}


KEY_TYPES = _names("CKK_")

_BOOLEAN = _named(
    *"TOKEN PRIVATE TRUSTED SENSITIVE ENCRYPT DECRYPT WRAP UNWRAP SIGN SIGN_RECOVER VERIFY VERIFY_RECOVER".split(),
    *"DERIVE EXTRACTABLE LOCAL NEVER_EXTRACTABLE ALWAYS_SENSITIVE MODIFIABLE COPYABLE DESTROYABLE".split(),
    *"SECONDARY_AUTH ALWAYS_AUTHENTICATE WRAP_WITH_TRUSTED OTP_USER_FRIENDLY_MODE RESET_ON_INIT".split(),
    *"HAS_RESET COLOR ENCAPSULATE DECAPSULATE X2RATCHET_ISALICE".split(),
)
_NUMBER = _named(
    *"MODULUS_BITS PRIME_BITS SUBPRIME_BITS VALUE_BITS VALUE_LEN AUTH_PIN_FLAGS PIXEL_X PIXEL_Y".split(),
    *"RESOLUTION CHAR_ROWS CHAR_COLUMNS BITS_PER_PIXEL CERTIFICATE_CATEGORY JAVA_MIDP_SECURITY_DOMAIN".split(),
    *"HW_FEATURE_TYPE OTP_FORMAT OTP_LENGTH OTP_TIME_INTERVAL PROFILE_ID PARAMETER_SET".split(),
    *"OTP_CHALLENGE_REQUIREMENT OTP_TIME_REQUIREMENT OTP_COUNTER_REQUIREMENT OTP_PIN_REQUIREMENT".split(),
)
_DATE = _named("START_DATE", "END_DATE")
_TEXT = _named("LABEL", "UNIQUE_ID", "APPLICATION", "URL", "OTP_USER_IDENTIFIER", "OTP_SERVICE_IDENTIFIER")
_CHOICE: Mapping[int, dict[int, str]] = {
    ck.CKA_CLASS: ck.CLASS_NAMES,
    ck.CKA_KEY_TYPE: KEY_TYPES,
    ck.CKA_CERTIFICATE_TYPE: _names("CKC_"),
    ck.CKA_KEY_GEN_MECHANISM: ck.MECHANISM_NAMES,
    ck.CKA_MECHANISM_TYPE: ck.MECHANISM_NAMES,
    ck.CKA_NAME_HASH_ALGORITHM: ck.MECHANISM_NAMES,
}
_TEMPLATES = frozenset(number for number in ck.ATTRIBUTE_NAMES if number & ck.CKF_ARRAY_ATTRIBUTE) - {
    ck.CKA_ALLOWED_MECHANISMS
}

SHOWN = tuple(n for n in sorted(ck.ATTRIBUTE_NAMES) if n not in _TEMPLATES and n != ck.CKA_VENDOR_DEFINED)
"""What is asked of an object that is to be shown; templates inside an object are left out."""


def mechanism_name(mechanism: int) -> str:
    """CKM_…, or the number."""
    return ck.MECHANISM_NAMES.get(mechanism) or f"0x{mechanism:X}"


def attribute_name(number: int) -> str:
    """CKA_…, or the number."""
    return ck.ATTRIBUTE_NAMES.get(number) or f"0x{number:X}"


def plain(data: bytes) -> str:
    """Text of a token, with nothing in it that a terminal obeys."""
    text = data.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def hexadecimal(data: bytes, width: int = HEX_WIDTH) -> str:
    """The first bytes; and how many there are where not all are shown."""
    if len(data) <= width:
        return data.hex() or "(empty)"
    return f"{data[:width].hex()}… ({len(data)} bytes)"


def shown(number: int, data: bytes, width: int = HEX_WIDTH) -> str:
    """One value; what has not the form of its attribute is shown as bytes."""
    if number in _TEXT:
        return plain(data) or "(empty)"
    if number in _BOOLEAN and len(data) == 1:
        return "no" if data == b"\0" else "yes"
    if number in _DATE:
        return _date(data)
    if len(data) == _ULONG and (number in _CHOICE or number in _NUMBER):
        return _word(number, int.from_bytes(data, "little"))
    if number == ck.CKA_ALLOWED_MECHANISMS and data and len(data) % _ULONG == 0:
        words = (data[at : at + _ULONG] for at in range(0, len(data), _ULONG))
        return " ".join(mechanism_name(int.from_bytes(word, "little")) for word in words)
    return hexadecimal(data, width)


_ULONG = 8


def _word(number: int, value: int) -> str:
    if value == ck.CK_UNAVAILABLE_INFORMATION:
        return "(not known)"
    names = _CHOICE.get(number)
    if names is None:
        return str(value)
    return names.get(value) or f"0x{value:X}"


def _date(data: bytes) -> str:
    if len(data) == 8 and data.isdigit():
        return f"{data[:4].decode()}-{data[4:6].decode()}-{data[6:].decode()}"
    return hexadecimal(data)


def attribute_number(text: str) -> int:
    """Of `CKA_LABEL`, `label` or `0x3`; raises ValueForm."""
    return _number_of(text, "CKA_", {name: number for number, name in ck.ATTRIBUTE_NAMES.items()})


def mechanism_number(text: str) -> int:
    """Of `CKM_ECDSA`, `ecdsa` or `0x1041`; raises ValueForm."""
    return _number_of(text, "CKM_", {name: number for number, name in ck.MECHANISM_NAMES.items()})


def _number_of(text: str, prefix: str, numbers: Mapping[str, int]) -> int:
    word = text.strip().upper().replace("-", "_")
    for name in (word, prefix + word):
        if name in numbers:
            return numbers[name]
    number = unsigned(text)
    if number is None:
        raise ValueForm(f"{text!r} is no {prefix}… and no number")
    return number


def unsigned(text: str) -> int | None:
    """A CK_ULONG, decimal or with 0x; None for what is none."""
    if not re.fullmatch(r"[0-9]{1,20}|0[xX][0-9A-Fa-f]{1,16}", text.strip()):
        return None
    number = int(text.strip(), 0) if "x" in text.lower() else int(text)
    return number if number < 1 << 64 else None


def value_of(number: int, text: str) -> bytes:
    """A typed value as it stands in memory; raises ValueForm."""
    if number in _TEXT:
        return text.encode("utf-8", "surrogateescape")
    if number in _BOOLEAN:
        return value_bytes(boolean(text))
    if number in _DATE:
        date = text.replace("-", "")
        if not re.fullmatch(r"[0-9]{8}|", date):
            raise ValueForm(f"{text!r} is no date: type one like 2030-12-31, or nothing")
        return date.encode()
    if number in _CHOICE:
        names = _CHOICE[number]
        prefix = next(iter(names.values())).partition("_")[0] + "_"
        return value_bytes(_number_of(text, prefix, {name: value for value, name in names.items()}))
    if number in _NUMBER:
        value = unsigned(text)
        if value is None:
            raise ValueForm(f"{text!r} is no number")
        return value_bytes(value)
    return octets(text)


def boolean(text: str) -> bool:
    """yes or no; raises ValueForm."""
    match text.strip().lower():
        case "y" | "yes" | "true" | "1":
            return True
        case "n" | "no" | "false" | "0":
            return False
    raise ValueForm(f"{text!r} is neither yes nor no")


def octets(text: str) -> bytes:
    """Bytes in hexadecimal, with or without 0x, spaces and colons; raises ValueForm."""
    digits = re.sub(r"[\s:]", "", text).removeprefix("0x").removeprefix("0X")
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise ValueForm(f"{text!r} is not hexadecimal: type two digits a byte, like 01ab") from None
