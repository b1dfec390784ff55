"""The group's own calls on a member's service session: done, or failed for one of two reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core.codes import Code
from pkcs11_ha.core.domain import KEY_ID
from pkcs11_ha.core.template import TRUE, Template
from pkcs11_ha.runtime import attributes, native
from pkcs11_ha.runtime.attributes import Filled
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError

# What a token says that has no room for what another one may take.
_FULL = (ck.CKR_DEVICE_MEMORY, ck.CKR_TOKEN_RESOURCE_EXCEEDED)
_BLOB_MAX = 16384  # bytes; the size is not asked for, as some modules (NSS) give too small a one


class MemberFault(Exception):
    """A member failed in the middle of the group's own work: it is to be left out."""

    def __init__(self, member: Member, rv: int, call: str) -> None:
        super().__init__(f"{call} answers {ck.rv_name(rv)}")
        self.member, self.rv, self.call = member, rv, call


class Refused(Exception):
    """A member is well and does not do it; `rv` is what it says."""

    def __init__(self, member: Member, rv: int, call: str) -> None:
        super().__init__(f"{member.name}: {call} answers {ck.rv_name(rv)}")
        self.member, self.rv, self.call = member, rv, call

    @property
    def is_suspect(self) -> bool:
        """Whether it may be the member's own fault: that is known when another one has done the same."""
        return self.member.code(self.rv) is Code.SUSPECT or self.rv in _FULL


@contextmanager
def on(member: Member) -> Iterator[None]:
    """The service session, held over some calls; what fails in them is MemberFault or Refused."""
    with member.service, member.one_life():
        try:
            yield
        except CkError as error:
            raise judged(member, error.rv, str(error).partition(": ")[2] or "a call") from None


def do(member: Member, name: str, *arguments: Any) -> None:
    """One call of the group's own; raises MemberFault or Refused."""
    rv = member.call(name, *arguments)
    if rv != ck.CKR_OK:
        raise judged(member, rv, name)


def judged(member: Member, rv: int, call: str) -> MemberFault | Refused:
    """What an answer that is not CKR_OK means for the member that gave it."""
    code = member.code(rv)
    gone = code in (Code.DEAD, Code.LIBRARY, Code.SESSION, Code.LOGIN)
    if gone or (code in (Code.SUSPECT, Code.HANDLE) and not (member.probe() and member.keeps_login())):
        return MemberFault(member, rv, call)
    if code is Code.HANDLE and not is_itself(member):
        return MemberFault(member, rv, call)
    return Refused(member, rv, call)


def is_itself(member: Member) -> bool:
    """Whether a member that shows nothing is to be believed: its domain key must still be there.

    SoftHSM whose files are out of reach answers CKR_OK, and knows of no object.  Where an operator has put another
    domain key in the place of the one before, the member is well.
    """
    if not member.witnesses:
        return True
    with member.service:
        for handle in member.witnesses:
            with suppress(CkError):
                attributes.read(member, member.session, handle, (ck.CKA_CLASS,))
                return True
        with suppress(CkError):
            shown = {
                handle: attributes.read(member, member.session, handle, (ck.CKA_LABEL,)).get(
                    ck.CKA_LABEL, b""
                )
                for handle in attributes.find(member, {ck.CKA_ID: KEY_ID, ck.CKA_TOKEN: TRUE})
            }
            if set(shown.values()) - set(member.witnesses.values()):
                member.witnesses = shown
                return True
    return False


def find(member: Member, wanted: Mapping[int, bytes]) -> list[int]:
    """Handles of all objects that match; that there is none is believed of a member that is itself."""
    with on(member):
        found = attributes.find(member, wanted)
    if not found and not is_itself(member):
        raise MemberFault(member, ck.CKR_DEVICE_ERROR, "a search that finds not even the domain key")
    return found


def look(member: Member, handle: int, types: Sequence[int], call: str) -> dict[int, bytes]:
    """Attributes of an object that `call` has just made; SoftHSM without room for it says CKR_OK for nothing."""
    try:
        with on(member):
            return attributes.read(member, member.session, handle, types)
    except Refused as error:
        if member.code(error.rv) is not Code.HANDLE:
            raise
        raise Refused(member, ck.CKR_DEVICE_MEMORY, f"{call}, which made nothing,") from None


def create(member: Member, template: Template) -> int:
    """C_CreateObject on the service session; the handle.  Of a token object: it was seen there."""
    filled, made = Filled(template), native.ffi.new("CK_OBJECT_HANDLE *")
    do(member, "C_CreateObject", member.session, filled.array, filled.count, made)
    if template.get(ck.CKA_TOKEN) == TRUE:
        look(member, int(made[0]), (ck.CKA_CLASS,), "C_CreateObject")
    return int(made[0])


def destroy(member: Member, handle: int) -> None:
    """C_DestroyObject."""
    do(member, "C_DestroyObject", member.session, handle)


def mechanism(number: int, parameter: Any = None, size: int = 0) -> Any:
    """A CK_MECHANISM; `parameter` must outlive it."""
    made = native.ffi.new("CK_MECHANISM *")
    made.mechanism = number
    if parameter is not None:
        made.pParameter, made.ulParameterLen = parameter, size
    return made


def wrap(member: Member, mechanism_: Any, wrapping_key: int, key: int) -> bytes:
    """C_WrapKey."""
    blob, size = native.ffi.new("CK_BYTE[]", _BLOB_MAX), native.ffi.new("CK_ULONG *", _BLOB_MAX)
    do(member, "C_WrapKey", member.session, mechanism_, wrapping_key, key, blob, size)
    return bytes(native.ffi.buffer(blob, size[0]))


def unwrap(member: Member, mechanism_: Any, key: int, blob: bytes, template: Template) -> int:
    """C_UnwrapKey; the handle."""
    filled, made = Filled(template), native.ffi.new("CK_OBJECT_HANDLE *")
    do(
        member,
        "C_UnwrapKey",
        *(member.session, mechanism_, key, blob, len(blob), filled.array, filled.count, made),
    )
    return int(made[0])
