"""Reading attributes of a member's object: what it gives, as bytes; what it does not give is left out."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core import template
from pkcs11_ha.core.identity import Identity, attributes_to_read, identify
from pkcs11_ha.core.template import Nested
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError

_GUESS = 1024  # bytes for an attribute before its length is known: enough for all but those of _LONG
_LAST = (ck.CKA_MODIFIABLE, ck.CKA_COPYABLE, ck.CKA_DESTROYABLE)
SAID_MAX = 1 << 20
# Beside an attribute that an object has not, NSS does not give these (CK_ULONG) either, though it has them.
_NUMBERS = (ck.CKA_CLASS, ck.CKA_KEY_TYPE, ck.CKA_CERTIFICATE_TYPE, ck.CKA_VALUE_LEN)
_LONG = (ck.CKA_VALUE, ck.CKA_SUBJECT, ck.CKA_ISSUER, ck.CKA_URL, ck.CKA_ATTR_TYPES)

# A value that cannot be read is no failure of the others (PKCS#11 5.7.5).
_PARTIAL = (ck.CKR_OK, ck.CKR_ATTRIBUTE_SENSITIVE, ck.CKR_ATTRIBUTE_TYPE_INVALID, ck.CKR_BUFFER_TOO_SMALL)


def read(member: Member, session: int, object_: int, types: Sequence[int]) -> dict[int, bytes]:
    """CKA number -> value, of those the member gives; raises CkError if it gives none at all."""
    values = _read(member, session, object_, types)
    for number in _NUMBERS if len(types) > 1 else ():
        if number in types and number not in values:
            values |= _read(member, session, object_, (number,))
    return values


def _read(member: Member, session: int, object_: int, types: Sequence[int]) -> dict[int, bytes]:
    values: dict[int, bytes] = {}
    wanted = [(number, _GUESS) for number in types]
    for _ in range(2):
        buffers = [native.ffi.new("CK_BYTE[]", size) for _, size in wanted]
        asked = native.ffi.new("CK_ATTRIBUTE[]", len(wanted))
        for attribute, (number, size), buffer in zip(asked, wanted, buffers, strict=True):
            attribute.type, attribute.pValue, attribute.ulValueLen = number, buffer, size
        rv = member.call("C_GetAttributeValue", session, object_, asked, len(wanted))
        if rv not in _PARTIAL:
            raise CkError(rv, f"C_GetAttributeValue of member {member.name}", member)
        larger = []
        for attribute, (number, size), buffer in zip(asked, wanted, buffers, strict=True):
            if attribute.ulValueLen <= size:
                values[number] = bytes(native.ffi.buffer(buffer, attribute.ulValueLen))
            # One code speaks for all: beside another's fault a buffer that is too small goes without saying.
            elif rv == ck.CKR_BUFFER_TOO_SMALL or number in _LONG:
                larger.append(number)
        wanted = _lengths(member, session, object_, larger) if larger else []
        if not wanted:
            break
    return values


def _lengths(member: Member, session: int, object_: int, types: Sequence[int]) -> list[tuple[int, int]]:
    asked: Any = native.ffi.new("CK_ATTRIBUTE[]", len(types))
    for attribute, number in zip(asked, types, strict=True):
        attribute.type = number
    member.call("C_GetAttributeValue", session, object_, asked, len(types))
    return [(a.type, a.ulValueLen) for a in asked if a.ulValueLen != ck.CK_UNAVAILABLE_INFORMATION]


def who(member: Member, session: int, object_: int) -> Identity:
    """The identity of a member's object; raises CkError."""
    first = read(member, session, object_, (ck.CKA_CLASS, ck.CKA_KEY_TYPE))
    rest = read(
        member,
        session,
        object_,
        attributes_to_read(_ulong(first, ck.CKA_CLASS), _ulong(first, ck.CKA_KEY_TYPE)),
    )
    return identify(rest)


def template_of(member: Member, session: int, object_: int) -> dict[int, bytes | Nested]:
    """What a copy of a member's object is made with; raises CkError."""
    first = read(member, session, object_, (ck.CKA_CLASS, ck.CKA_KEY_TYPE))
    numbers = template.attributes_of(_ulong(first, ck.CKA_CLASS), _ulong(first, ck.CKA_KEY_TYPE))
    flat = [number for number in numbers if not number & ck.CKF_ARRAY_ATTRIBUTE]
    shown: dict[int, bytes | Nested] = dict(_read_steadily(member, session, object_, flat))
    for number in set(numbers) - set(flat):
        if (nested := _read_nested(member, session, object_, number)) is not None:
            shown[number] = nested
    return shown


def _read_steadily(member: Member, session: int, object_: int, types: Sequence[int]) -> dict[int, bytes]:
    """As `read`; an attribute at which the member stumbles (SoftHSM at a private key's dates) is left out alone."""
    try:
        return read(member, session, object_, types)
    except CkError as error:
        if error.rv not in (ck.CKR_GENERAL_ERROR, ck.CKR_FUNCTION_FAILED) or not member.probe():
            raise
    values: dict[int, bytes] = {}
    for number in types:
        with suppress(CkError):
            values |= read(member, session, object_, (number,))
    return values


def _read_nested(member: Member, session: int, object_: int, number: int) -> bytes | Nested | None:
    """An attribute that is a list of attributes (CKF_ARRAY_ATTRIBUTE) or of mechanisms; None if it has none."""
    sizes = _lengths(member, session, object_, [number])
    if not sizes or not sizes[0][1]:
        return None
    if number == ck.CKA_ALLOWED_MECHANISMS:
        return read(member, session, object_, (number,)).get(number)
    count = sizes[0][1] // native.ffi.sizeof("CK_ATTRIBUTE")
    inside = native.ffi.new("CK_ATTRIBUTE[]", count)
    outside = native.ffi.new("CK_ATTRIBUTE *")
    outside.type, outside.pValue, outside.ulValueLen = number, inside, sizes[0][1]
    native.check(
        member.call("C_GetAttributeValue", session, object_, outside, 1), "reading a template", member
    )
    buffers = [native.ffi.new("CK_BYTE[]", max(1, attribute.ulValueLen)) for attribute in inside]
    for attribute, buffer in zip(inside, buffers, strict=True):
        attribute.pValue = buffer
    native.check(
        member.call("C_GetAttributeValue", session, object_, outside, 1), "reading a template", member
    )
    return tuple(
        (int(attribute.type), bytes(native.ffi.buffer(buffer, attribute.ulValueLen)))
        for attribute, buffer in zip(inside, buffers, strict=True)
    )


class Filled:
    """A CK_ATTRIBUTE array, with the memory that it points to."""

    def __init__(self, attributes: Mapping[int, bytes | Nested]) -> None:
        self.count = len(attributes)
        self.array: Any = native.ffi.new("CK_ATTRIBUTE[]", max(1, self.count))
        self._kept: list[Any] = []
        # Who says first that it must not be modified is refused the rest by some tokens (SoftHSM).
        for place, (number, value) in enumerate(
            sorted(attributes.items(), key=lambda each: each[0] in _LAST)
        ):
            self._put(self.array[place], number, value)

    def _put(self, attribute: Any, number: int, value: bytes | Nested) -> None:
        attribute.type = number
        if isinstance(value, bytes):
            buffer = native.ffi.new("CK_BYTE[]", value or b"\0")
            attribute.pValue, attribute.ulValueLen = buffer, len(value)
            self._kept.append(buffer)
        else:
            inside = Filled(dict(value))
            attribute.pValue = inside.array
            attribute.ulValueLen = inside.count * native.ffi.sizeof("CK_ATTRIBUTE")
            self._kept.append(inside)


class Changed(Filled):
    """An application's template with some attributes otherwise, or left out; the rest stays in its memory."""

    def __init__(self, array: Any, count: int, changes: Mapping[int, bytes | None]) -> None:
        kept = [i for i in range(count) if int(array[i].type) not in changes]
        new = {number: value for number, value in changes.items() if value is not None}
        self.count = len(kept) + len(new)
        self.array = native.ffi.new("CK_ATTRIBUTE[]", max(1, self.count))
        self._kept = [array]
        for place, (number, value) in enumerate(new.items()):
            self._put(self.array[place], number, value)
        for place, i in enumerate(kept, len(new)):
            self.array[place] = array[i]


def said(array: Any, count: int, numbers: Container[int] | None = None) -> dict[int, bytes]:
    """What an application's template says, as far as it is asked for and lies in the template itself."""
    return {
        int(array[i].type): bytes(native.ffi.buffer(array[i].pValue, array[i].ulValueLen))
        for i in range(count)
        if (numbers is None or int(array[i].type) in numbers)
        and not array[i].type & ck.CKF_ARRAY_ATTRIBUTE
        and array[i].pValue != native.ffi.NULL
        and array[i].ulValueLen < SAID_MAX
    }


def _ulong(values: dict[int, bytes], number: int) -> int:
    return int.from_bytes(values.get(number, b""), "little")


def find(member: Member, wanted: Mapping[int, bytes]) -> list[int]:
    """Handles of all objects that match, found on the service session; raises CkError.

    Of a token that has forgotten its login they would be the public ones alone, with CKR_OK (PKCS#11 5.7.7): what is
    not among them would be taken for destroyed.
    """
    return member.on_service_session(lambda: _find(member, member.session, wanted))


def _find(member: Member, session: int, wanted: Mapping[int, bytes]) -> list[int]:
    asked = Filled(wanted)
    native.check(member.call("C_FindObjectsInit", session, asked.array, asked.count), "finding", member)
    found: list[int] = []
    handles, count = native.ffi.new("CK_OBJECT_HANDLE[]", 256), native.ffi.new("CK_ULONG *")
    try:
        while True:  # until none is left: a library may give fewer than it is asked for (PKCS#11 5.7.7)
            native.check(member.call("C_FindObjects", session, handles, 256, count), "finding", member)
            found += [int(handles[i]) for i in range(count[0])]
            if not count[0]:
                break
    finally:
        member.call("C_FindObjectsFinal", session)
    if member.logins:
        info = native.ffi.new("CK_SESSION_INFO *")
        native.check(member.call("C_GetSessionInfo", session, info), "finding", member)
        if info.state in (ck.CKS_RO_PUBLIC_SESSION, ck.CKS_RW_PUBLIC_SESSION) and member.logins:
            raise CkError(ck.CKR_USER_NOT_LOGGED_IN, "finding", member)
    return found
