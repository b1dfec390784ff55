"""C_Login, C_Logout and changes of PINs on a virtual slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.entry.carry import Carried
from pkcs11_ha.entry.life import current, slot_of
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import login, native
from pkcs11_ha.runtime.login import Pin
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.slot import NOBODY, VirtualSlot


def _login(handle: int, user: int, pin: Any, size: int) -> int | None:
    session = native.lib.ha_session_find(handle)
    slot = slot_of(session)
    if user == ck.CKU_CONTEXT_SPECIFIC:
        return _context_login(session, slot, pin, size)
    if user not in (ck.CKU_USER, ck.CKU_SO):
        raise CkError(ck.CKR_USER_TYPE_INVALID)
    core = current()
    for again in (True, False):
        try:
            login.login(slot, user, Pin(pin, size), core.lose, core.refuse, core.in_time)
            break
        except login.NotLookedAt as error:
            # Here, where nobody holds the login: a member that returns waits for that.
            returned = [member for member in error.broken if again and core.reconnect_now(member)]
            if not returned:
                raise
    return None


def _context_login(session: Any, slot: VirtualSlot, pin: Any, size: int) -> int:
    """On the member that runs the operation (PKCS#11 5.6.8, CKA_ALWAYS_AUTHENTICATE): one try, wherever it is."""
    index = native.lib.ha_session_member(session)
    if index < 0:
        raise CkError(ck.CKR_OPERATION_NOT_INITIALIZED)
    carried = Carried("C_Login", slot, session).only(slot.by_index[index])
    return carried.run(
        lambda function, call: function(call.member_session, ck.CKU_CONTEXT_SPECIFIC, pin, size)
    )


def _login_user(handle: int, user: int, pin: Any, size: int, _name: Any, name_size: int) -> int | None:
    """C_LoginUser (3.0): without a user name it is C_Login; names mean something to one token only."""
    if name_size == 0:
        return _login(handle, user, pin, size)
    raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED)


def _logout(handle: int) -> None:
    slot = slot_of(native.lib.ha_session_find(handle))
    if slot.user == NOBODY:
        raise CkError(ck.CKR_USER_NOT_LOGGED_IN)
    if not slot.up():
        raise CkError(ck.CKR_DEVICE_ERROR)
    core = current()
    login.logout(slot, core.lose, core.in_time)


def _everybody(slot: VirtualSlot, call: str) -> list[Member]:
    """All members, for a change that must reach all or none; refused while one is away."""
    there = slot.working()
    away = [member.name for member in slot.members if member not in there]
    if away:
        current().log(
            Event(
                "login.refused",
                slot.face.label,
                away[0],
                {"call": call, "why": "a member is away or drained"},
            )
        )
        raise CkError(ck.CKR_DEVICE_ERROR)
    if any(member.config.pin_source for member in slot.members):
        why = "a member has a PIN of its own"
        current().log(Event("login.refused", slot.face.label, "", {"call": call, "why": why}))
        raise CkError(ck.CKR_FUNCTION_REJECTED)
    return list(slot.members)


def _set_pin(handle: int, old: Any, old_size: int, new: Any, new_size: int) -> None:
    session = native.lib.ha_session_find(handle)
    slot = slot_of(session)
    with slot.login_lock:
        changed: list[Member] = []
        for member in _everybody(slot, "C_SetPIN"):
            rv = _on(member, "C_SetPIN", slot, session, old, old_size, new, new_size)
            if rv != ck.CKR_OK:
                for done in changed:
                    _undo(slot, done, _on(done, "C_SetPIN", slot, session, new, new_size, old, old_size))
                raise CkError(rv)
            changed.append(member)
        if slot.secret is not None and new != native.ffi.NULL:
            slot.keep_pin(new, new_size)  # of whoever is logged in: it is that PIN which was changed


def _init_pin(handle: int, pin: Any, size: int) -> None:
    session = native.lib.ha_session_find(handle)
    slot = slot_of(session)
    with slot.login_lock:
        done: list[Member] = []
        for member in _everybody(slot, "C_InitPIN"):
            rv = _on(member, "C_InitPIN", slot, session, pin, size)
            if rv != ck.CKR_OK:
                for other in done:  # what their PIN was before, nobody knows
                    _undo(slot, other, rv)
                raise CkError(rv)
            done.append(member)


def _on(member: Member, name: str, slot: VirtualSlot, session: Any, *arguments: Any) -> int:
    """One call on one member, in this session's counterpart there; never repeated."""
    carried = Carried(name, slot, session).only(member)
    return carried.run(lambda function, call: function(call.member_session, *arguments))


def _undo(slot: VirtualSlot, member: Member, rv: int) -> None:
    if rv != ck.CKR_OK:
        details: dict[str, str | int] = {"call": "C_SetPIN", "code": ck.rv_name(rv)}
        current().log(Event("write.partial", slot.face.label, member.name, details))


HANDLERS: dict[str, Callable[..., int | None]] = {
    "C_Login": _login,
    "C_LoginUser": _login_user,
    "C_Logout": _logout,
    "C_SetPIN": _set_pin,
    "C_InitPIN": _init_pin,
}
