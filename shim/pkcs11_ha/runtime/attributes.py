"""Reading attributes of a member's object: what it gives, as bytes; what it does not give is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core.identity import Identity, attributes_to_read, identify
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError

_GUESS = 512  # bytes for an attribute before its length is known: enough for all but certificates

# A value that cannot be read is no failure of the others (PKCS#11 5.7.5).
_PARTIAL = (ck.CKR_OK, ck.CKR_ATTRIBUTE_SENSITIVE, ck.CKR_ATTRIBUTE_TYPE_INVALID, ck.CKR_BUFFER_TOO_SMALL)


def read(member: Member, session: int, object_: int, types: Sequence[int]) -> dict[int, bytes]:
    """CKA number -> value, of those the member gives; raises CkError if it gives none at all."""
    values: dict[int, bytes] = {}
    wanted = [(number, _GUESS) for number in types]
    for _ in range(2):
        buffers = [native.ffi.new("CK_BYTE[]", size) for _, size in wanted]
        template = native.ffi.new("CK_ATTRIBUTE[]", len(wanted))
        for attribute, (number, size), buffer in zip(template, wanted, buffers, strict=True):
            attribute.type, attribute.pValue, attribute.ulValueLen = number, buffer, size
        rv = member.call("C_GetAttributeValue", session, object_, template, len(wanted))
        if rv not in _PARTIAL:
            raise CkError(rv, f"C_GetAttributeValue of member {member.name}", member)
        larger = []
        for attribute, (number, size), buffer in zip(template, wanted, buffers, strict=True):
            if attribute.ulValueLen <= size:
                values[number] = bytes(native.ffi.buffer(buffer, attribute.ulValueLen))
            elif rv == ck.CKR_BUFFER_TOO_SMALL or attribute.ulValueLen != ck.CK_UNAVAILABLE_INFORMATION:
                larger.append(number)
        if not larger or rv != ck.CKR_BUFFER_TOO_SMALL:
            break
        wanted = [(number, size) for number, size in _lengths(member, session, object_, larger)]
        if not wanted:
            break
    return values


def _lengths(member: Member, session: int, object_: int, types: Sequence[int]) -> list[tuple[int, int]]:
    template: Any = native.ffi.new("CK_ATTRIBUTE[]", len(types))
    for attribute, number in zip(template, types, strict=True):
        attribute.type = number
    member.call("C_GetAttributeValue", session, object_, template, len(types))
    return [(a.type, a.ulValueLen) for a in template if a.ulValueLen != ck.CK_UNAVAILABLE_INFORMATION]


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


def _ulong(values: dict[int, bytes], number: int) -> int:
    return int.from_bytes(values.get(number, b""), "little")


def copy(template: Any, count: int) -> tuple[Any, list[Any]] | None:
    """A template of our own, with the memory that it points to; None if it holds pointers itself."""
    if any(template[i].type & ck.CKF_ARRAY_ATTRIBUTE for i in range(count)):
        return None
    sizes = [int(template[i].ulValueLen) for i in range(count)]
    buffers = [native.ffi.new("CK_BYTE[]", max(1, size)) for size in sizes]
    array: Any = native.ffi.new("CK_ATTRIBUTE[]", count)
    for index, (size, buffer) in enumerate(zip(sizes, buffers, strict=True)):
        native.ffi.memmove(buffer, template[index].pValue, size)
        array[index].type, array[index].pValue, array[index].ulValueLen = template[index].type, buffer, size
    return array, buffers


def find(member: Member, session: int, template: Sequence[tuple[int, bytes]]) -> list[int]:
    """Handles of all objects that match; raises CkError."""
    buffers = [native.ffi.new("CK_BYTE[]", value) for _, value in template]
    array: Any = native.ffi.new("CK_ATTRIBUTE[]", max(1, len(template)))
    for index, (number, value) in enumerate(template):
        array[index].type, array[index].pValue, array[index].ulValueLen = number, buffers[index], len(value)
    native.check(member.call("C_FindObjectsInit", session, array, len(template)), "finding", member)
    found: list[int] = []
    handles, count = native.ffi.new("CK_OBJECT_HANDLE[]", 256), native.ffi.new("CK_ULONG *")
    try:
        while True:
            native.check(member.call("C_FindObjects", session, handles, 256, count), "finding", member)
            found += [int(handles[i]) for i in range(count[0])]
            if count[0] < 256:
                return found
    finally:
        member.call("C_FindObjectsFinal", session)
