"""The group's own calls on a member's service session: done, or failed for one of two reasons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core.codes import Code
from pkcs11_ha.core.template import Template
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.attributes import Filled
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError

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


@contextmanager
def on(member: Member) -> Iterator[None]:
    """The service session, held over some calls; what fails in them is MemberFault or Refused."""
    with member.service:
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
    return Refused(member, rv, call)


def create(member: Member, template: Template) -> int:
    """C_CreateObject on the service session; the handle."""
    filled, made = Filled(template), native.ffi.new("CK_OBJECT_HANDLE *")
    do(member, "C_CreateObject", member.session, filled.array, filled.count, made)
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
