"""Login of a virtual slot: one member first, the others only if it agreed, and no PIN twice after a refusal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core.codes import PIN_REFUSED, Code
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.member import ConnectError, Lose, Member, MemberState, PinRefused
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.slot import NOBODY, VirtualSlot

# What SoftHSM answers, by itself or behind a server, when several processes log in at once, without a look at the
# PIN. Of any other answer, a vendor's own above all, nobody knows whether it cost a try.
_STUMBLES = (ck.CKR_TOKEN_NOT_PRESENT, ck.CKR_GENERAL_ERROR, ck.CKR_USER_PIN_NOT_INITIALIZED)
_PAUSES_S = (0.005, 0.02, 0.08)  # before it is tried again: so long, a file that others write is in pieces
# Flags of a token on which somebody's PIN was wrong since the last right one (PKCS#11 5.5.6, CK_TOKEN_INFO).
_COUNTED = {
    ck.CKU_USER: ck.CKF_USER_PIN_COUNT_LOW | ck.CKF_USER_PIN_FINAL_TRY | ck.CKF_USER_PIN_LOCKED,
    ck.CKU_SO: ck.CKF_SO_PIN_COUNT_LOW | ck.CKF_SO_PIN_FINAL_TRY | ck.CKF_SO_PIN_LOCKED,
}
_NOT_LOOKED_AT = (Code.DEAD, Code.SESSION, Code.LIBRARY)

InTime = Callable[[Callable[[], None]], bool]


class NotLookedAt(CkError):
    """Nobody has looked at the PIN; `broken` are the members whose libraries are at fault, and were lost."""

    def __init__(self, rv: int, broken: Sequence[Member]) -> None:
        super().__init__(rv)
        self.broken = broken


class Pin:
    """The PIN for one member: the application's, or the member's own.  NULL where the device asks for it."""

    def __init__(self, pointer: Any, size: int) -> None:
        self.pointer, self.size = pointer, size


def own_pin(member: Member) -> Any:
    """The ha_secret of a member's pin_source, None without one; raises ConnectError if it cannot be read."""
    if member.config.pin_source is None:
        return None
    error = native.ffi.new("char[512]")
    secret = native.lib.ha_secret_read(native.text(member.config.pin_source), error, 512)
    if not secret:
        raise ConnectError(
            ck.CKR_PIN_INVALID, f"pin_source: {native.ffi.string(error).decode('utf-8', 'replace')}"
        )
    return secret


def login_member(member: Member, user: int, pin: Pin) -> int:
    """Logs in on one member, with its own PIN if it has one; what the member said at last.

    One that stumbles is tried again, as long as its token says that no PIN was wrong there.
    """
    own = own_pin(member) if user == ck.CKU_USER else None
    try:
        if own is not None:
            pin = Pin(native.lib.ha_secret_bytes(own), native.lib.ha_secret_size(own))
        rv = member.login(user, pin.pointer, pin.size)
        for pause_s in _PAUSES_S:
            if rv not in _STUMBLES:
                break
            time.sleep(pause_s)
            flags = member.token_flags()
            if flags is None:
                continue  # it cannot even say that now
            if flags & _COUNTED[user]:
                break
            rv = member.login(user, pin.pointer, pin.size)
        return rv
    finally:
        if own is not None:
            native.lib.ha_secret_wipe(own)


def restore(slot: VirtualSlot, member: Member) -> None:
    """Logs a member in or out, as its slot is; raises ConnectError, PinRefused if it must not be tried again."""
    user = slot.user
    if user == NOBODY:
        leave(slot, member)
    if user == NOBODY or slot.id in member.logins:
        return
    with slot.pin_copy() as secret:
        if secret is None and (member.config.pin_source is None or user == ck.CKU_SO):
            raise ConnectError(ck.CKR_USER_NOT_LOGGED_IN, "logged in without a PIN that could be kept")
        pin = Pin(native.ffi.NULL, 0)
        if secret is not None:
            pin = Pin(native.lib.ha_secret_bytes(secret), native.lib.ha_secret_size(secret))
        rv = login_member(member, user, pin)
    if rv not in (ck.CKR_OK, ck.CKR_USER_ALREADY_LOGGED_IN):
        kind = PinRefused if _may_have_cost_a_try(member, user, rv) else ConnectError
        raise kind(rv, f"C_Login answers {ck.rv_name(rv)}")
    member.logins.add(slot.id)


def take_in(slot: VirtualSlot, member: Member) -> bool:
    """As `restore`; and where the group keeps its objects everywhere, what the member missed is made up for.

    Whether anything was to do, so that what it shows may be another thing now.
    """
    before = slot.id in member.logins
    restore(slot, member)
    replication = slot.replication
    if replication and slot.user == ck.CKU_USER and not replication.party.takes_part(member):
        replication.admit_back(member)
        return True
    return before != (slot.id in member.logins)


def _may_have_cost_a_try(member: Member, user: int, rv: int) -> bool:
    """Whether the PIN may have been refused; codes of a vendor's own can mean anything, and a stumble may be that
    token's way of saying so, if it shows that a PIN was wrong there."""
    if rv in _STUMBLES:
        return bool((member.token_flags() or 0) & _COUNTED[user])
    return member.code(rv) not in _NOT_LOOKED_AT and rv != ck.CKR_DEVICE_ERROR


def leave(slot: VirtualSlot, member: Member) -> int:
    """Logs a member out, unless it serves another slot that is logged in: a token has one login."""
    if slot.id in member.logins:
        member.logins.discard(slot.id)
        if not member.logins:
            return member.logout()
    return ck.CKR_OK


def _leave_in_time(slot: VirtualSlot, member: Member, in_time: InTime) -> int:
    answers: list[int] = []
    done = in_time(lambda: answers.append(leave(slot, member)))
    return answers[0] if done else ck.CKR_DEVICE_ERROR


def login(
    slot: VirtualSlot,
    user: int,
    pin: Pin,
    lose: Lose,
    refuse: Callable[[Member, int], None],
    in_time: InTime,
) -> None:
    """C_Login of CKU_USER or CKU_SO on a virtual slot (PKCS#11 5.6.8).  Raises CkError.

    NotLookedAt among them: after `broken` were restarted it may be tried once more.  `lose(member, rv, call,
    epoch)` drops a member that failed, `refuse(member, rv)` one that alone refused a PIN; `in_time(work)` does it
    in the time of `connect_timeout_s`, or answers False.
    """
    with slot.login_lock:
        if slot.user != NOBODY:
            raise CkError(
                ck.CKR_USER_ALREADY_LOGGED_IN if slot.user == user else ck.CKR_USER_ANOTHER_ALREADY_LOGGED_IN
            )
        if user == ck.CKU_SO:
            _make_way_for_so(slot)
        _verify(slot, user, pin, lose)
        slot.user = user
        slot.keep_pin(pin.pointer, pin.size)
        for member in [m for m in slot.working() if slot.id not in m.logins]:
            _follow(slot, member, user, pin, lose, refuse)
        if slot.replication and user == ck.CKU_USER:
            slot.replication.begin([member for member in slot.up() if slot.id in member.logins])
        if not any(slot.id in member.logins for member in slot.members):
            logout(slot, lose, in_time)
            raise CkError(ck.CKR_DEVICE_ERROR)  # each member has a PIN of its own, and none took it
        slot.publish_login()
    slot.log(Event("login.succeeded", slot.face.label))


def _make_way_for_so(slot: VirtualSlot) -> None:
    """The SO may not log in while a read-only session is open (PKCS#11 5.6.8): not ours either."""
    total = native.lib.ha_slot_sessions(slot.native, False)
    if total > native.lib.ha_slot_sessions(slot.native, True):
        raise CkError(ck.CKR_SESSION_READ_ONLY_EXISTS)
    native.lib.ha_slot_drain_pools(slot.native, False)


def _verify(slot: VirtualSlot, user: int, pin: Pin, lose: Lose) -> None:
    """The PIN is tried on one member alone; the next one only if that member was lost."""
    candidates = slot.working()
    if user == ck.CKU_USER:
        candidates = [m for m in candidates if m.config.pin_source is None]
        if slot.working() and all(m.config.pin_source for m in slot.members):
            _verify_against_own(slot, pin)
            return
    first, broken = ck.CKR_OK, list[Member]()
    for member in candidates:
        epoch = member.epoch
        try:
            rv = login_member(member, user, pin)
        except ConnectError as error:  # it has no session left for it
            rv = error.rv
        if rv == ck.CKR_OK:
            member.logins.add(slot.id)
            return
        if rv == ck.CKR_USER_ALREADY_LOGGED_IN:
            # The host is logged in on this token by itself, or a fork's parent was: the PIN is still to be verified.
            continue
        code, stumbled = member.code(rv), rv in _STUMBLES
        doubtful = stumbled or code is Code.SUSPECT
        if code in _NOT_LOOKED_AT or (doubtful and _is_broken(member, rv)):
            lose(member, rv, "C_Login", epoch)
            if stumbled:
                broken.append(member)
            continue
        slot.log(Event("login.refused", slot.face.label, member.name, {"code": ck.rv_name(rv)}))
        if not stumbled or _may_have_cost_a_try(member, user, rv):
            raise CkError(rv)
        first = first or rv
    if first != ck.CKR_OK or broken:
        raise NotLookedAt(first or ck.CKR_DEVICE_ERROR, broken)
    if any(member.state is MemberState.UP for member in candidates):
        why = "each token is logged in already, and looks at no PIN"
        details = {"code": ck.rv_name(ck.CKR_USER_ALREADY_LOGGED_IN), "why": why}
        slot.log(Event("login.refused", slot.face.label, details=details))
        raise CkError(ck.CKR_USER_ALREADY_LOGGED_IN)
    raise CkError(ck.CKR_DEVICE_ERROR)


def _is_broken(member: Member, rv: int) -> bool:
    """Whether a library does not work, or denies what its token's flags say.

    SoftHSM goes on with what it once read of a file that another process was writing, until it is restarted.
    """
    if not member.probe():
        return True
    flags = member.token_flags() or 0
    return rv == ck.CKR_USER_PIN_NOT_INITIALIZED and bool(flags & ck.CKF_USER_PIN_INITIALIZED)


def _verify_against_own(slot: VirtualSlot, pin: Pin) -> None:
    """Every member has a PIN of its own: the application must know the first one's."""
    try:
        own = own_pin(slot.working()[0])
    except ConnectError as error:
        raise CkError(ck.CKR_GENERAL_ERROR, str(error)) from None
    try:
        if pin.pointer == native.ffi.NULL or not native.lib.ha_secret_equal(own, pin.pointer, pin.size):
            slot.log(Event("login.refused", slot.face.label, "", {"code": "CKR_PIN_INCORRECT"}))
            raise CkError(ck.CKR_PIN_INCORRECT)
    finally:
        native.lib.ha_secret_wipe(own)


def _follow(
    slot: VirtualSlot, member: Member, user: int, pin: Pin, lose: Lose, refuse: Callable[[Member, int], None]
) -> None:
    epoch = member.epoch
    try:
        rv = login_member(member, user, pin)
    except ConnectError as error:
        rv = error.rv
    if rv in (ck.CKR_OK, ck.CKR_USER_ALREADY_LOGGED_IN):
        member.logins.add(slot.id)
        return
    slot.log(Event("login.member_refused", slot.face.label, member.name, {"code": ck.rv_name(rv)}))
    if rv in PIN_REFUSED:
        refuse(member, rv)
    else:
        lose(member, rv, "C_Login", epoch)


def forget(slot: VirtualSlot, patience_s: float) -> None:
    """Wipes the PIN at the end of a run, though a login that hangs may hold the lock for ever."""
    locked = slot.login_lock.acquire(timeout=patience_s)
    slot.user = NOBODY
    slot.keep_pin(native.ffi.NULL, 0)
    if locked:
        slot.login_lock.release()


def logout(slot: VirtualSlot, lose: Lose, in_time: InTime) -> None:
    """C_Logout: private objects become invisible, the PIN is wiped (PKCS#11 5.6.9).

    A member that does not log out, or not in time, is lost: its token would stay open without anybody being
    logged in.
    """
    with slot.login_lock:
        slot.user = NOBODY
        slot.publish_login()
        slot.keep_pin(native.ffi.NULL, 0)
        if slot.replication:
            slot.replication.party.disband()
        slot.objects.drop_if(lambda known: known.identity.private)
        for member in slot.up():
            epoch = member.epoch
            rv = _leave_in_time(slot, member, in_time)
            if rv not in (ck.CKR_OK, ck.CKR_USER_NOT_LOGGED_IN):
                lose(member, rv, "C_Logout", epoch)
