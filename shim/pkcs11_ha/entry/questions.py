"""What the data plane asks in the middle of a call: where an object is, what a fault means, what comes next."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core.codes import Code
from pkcs11_ha.core.policy import Answer, Verdict, judge
from pkcs11_ha.entry.life import current, slot_by_id, slot_of
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import login, native
from pkcs11_ha.runtime.breaker import count_fault
from pkcs11_ha.runtime.member import ConnectError, Member, MemberState, PinRefused
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.objects import NotItself, VirtualObject
from pkcs11_ha.runtime.slot import NOBODY, VirtualSlot
from pkcs11_ha.spec.functions import FUNCTIONS, Effect

AGAIN = 0xFFFFFFFF  # HA_AGAIN: the data plane looks again

_REPAIRABLE = (Code.SESSION, Code.LOGIN, Code.HANDLE, Code.LIBRARY, Code.OPERATION)
_REPAIR_BIT = {code: 1 << bit for bit, code in enumerate(_REPAIRABLE)}
_LOOKED_AGAIN = 1 << len(_REPAIRABLE)


def _slot(call: Any) -> VirtualSlot:
    return slot_by_id(native.lib.ha_slot_id(call.slot))


def _row_name(call: Any) -> str:
    return FUNCTIONS[int(call.row)].name


def check(native_slot: Any) -> None:
    """The recovery check is due."""
    current().check(slot_by_id(native.lib.ha_slot_id(native_slot)))


def look(native_slot: Any) -> None:
    """It is time to compare the members."""
    current().look(slot_by_id(native.lib.ha_slot_id(native_slot)))


def decide(call: Any) -> int:
    """A member's answer was not clean: repair, move on, or let it stand."""
    slot = _slot(call)
    member = slot.by_index[call.member]
    row = FUNCTIONS[int(call.row)]
    code = member.code(call.rv)
    active = native.lib.ha_session_active(call.session)
    verdict = judge(
        Answer(
            code=code,
            effect=row.effect,
            phase=row.phase,
            sent=bool(call.sent),
            makes_token_objects=bool(call.creates_token),
            other_operations=bool(active & ~int(row.ops)),
            can_move=bool(native.lib.ha_session_may_move(call.session)),
            logged_in=slot.user != NOBODY,
            repaired=frozenset(c for c, bit in _REPAIR_BIT.items() if call.repairs & bit),
        )
    )
    if verdict is not Verdict.ANSWER:
        count_fault(member, code)
    if code in _REPAIR_BIT:
        call.repairs |= _REPAIR_BIT[code]
    answer = _CARRY_OUT[verdict](call, slot, member)
    if answer == AGAIN and call.tried >> slot.index(member) & 1:
        native.lib.ha_member_failover(member.native)
    return answer


def _answer(call: Any, _slot: VirtualSlot, _member: Member) -> int:
    return int(call.rv)


def _lose_and_move(call: Any, _slot: VirtualSlot, member: Member) -> int:
    _lose(call, member)
    call.rv = ck.CKR_DEVICE_ERROR  # should nobody be left who can
    call.tried |= 1 << call.member
    return _again(call)


def _lose_and_tell(call: Any, _slot: VirtualSlot, member: Member) -> int:
    _lose(call, member)
    return ck.CKR_DEVICE_ERROR


def _suspect(call: Any, _slot: VirtualSlot, _member: Member) -> int:
    if not call.suspects:
        call.first_rv = call.rv  # rather than that of a member which is merely incapable
    call.suspects |= 1 << call.member
    return _elsewhere(call, _slot, _member)


def _elsewhere(call: Any, _slot: VirtualSlot, _member: Member) -> int:
    _answered(call)
    return _again(call)


def _is_well(call: Any, member: Member) -> bool:
    """Who has kept a call waiting is not asked: it would have to wait once more."""
    return not call.late >> call.member & 1 and member.probe()


def _probe(call: Any, _slot: VirtualSlot, member: Member) -> int:
    if _is_well(call, member):
        return int(call.rv)
    _lose(call, member)
    if FUNCTIONS[int(call.row)].ops and not native.lib.ha_session_may_move(call.session):
        return AGAIN  # the data plane finds the operation lost, and says so
    return ck.CKR_DEVICE_ERROR


def _new_session(call: Any, slot: VirtualSlot, member: Member) -> int:
    """What was under way in it is begun again, if it may be."""
    if member.code(call.rv) is Code.OPERATION:
        native.lib.ha_session_renew(call.session, call.member)  # its objects stay
        return _with_login(call, slot, member)
    native.lib.ha_session_drop(call.session, call.member)
    native.lib.ha_slot_drain_pools_of(slot.native, call.member)
    return _with_login(call, slot, member)


def _new_login(call: Any, slot: VirtualSlot, member: Member) -> int:
    """The member forgot the login; its PIN was right before.  A refusal now stops all further tries.

    Where the group keeps its objects everywhere, it may have missed some since: it is taken in as one that returns.
    """
    if slot.replication is not None and not _is_logged_in(slot, member):
        return _new_library(call, slot, member)
    with slot.login_lock:
        if member.state is not MemberState.UP or member.epoch != call.epoch:
            return _again(call)  # another caller has met it, and been refused or not
        member.logins.discard(slot.id)
        try:
            member.is_logged_in()  # which needs, and renews, the service session
            login.restore(slot, member)
            slot.objects.login_lost(call.member)
        except PinRefused as error:
            current().refuse(member, error.rv)
            call.tried |= 1 << call.member
        except ConnectError as error:
            current().lose(member, error.rv, "C_Login", int(call.epoch))
            call.tried |= 1 << call.member
    return _again(call)


def _is_logged_in(slot: VirtualSlot, member: Member) -> bool:
    """Whether it is as it should be: also where the application has just logged out."""
    with slot.login_lock:
        if slot.user == NOBODY:
            return True
        try:
            return member.is_logged_in()
        except ConnectError:
            return False


def _with_login(call: Any, slot: VirtualSlot, member: Member) -> int:
    """A member that forgot sessions or objects may have forgotten the login, too."""
    try:
        forgotten = not member.is_logged_in() and slot.user != NOBODY
    except ConnectError:
        forgotten = False
    return _new_login(call, slot, member) if forgotten else _again(call)


def _new_handles(call: Any, slot: VirtualSlot, member: Member) -> int:
    for place in range(call.objects):
        if call.object[place]:
            slot.objects.forget(int(call.object[place]), call.member)
    return _with_login(call, slot, member)


def _new_library(call: Any, _slot: VirtualSlot, member: Member) -> int:
    _lose(call, member)
    if FUNCTIONS[int(call.row)].effect is Effect.CREDENTIAL:
        return (
            ck.CKR_DEVICE_ERROR
        )  # who changes a PIN holds the login, and a member that returns waits for that
    if not current().reconnect_now(member):
        call.tried |= 1 << call.member
    return _again(call)


_CARRY_OUT: dict[Verdict, Callable[[Any, VirtualSlot, Member], int]] = {
    Verdict.ANSWER: _answer,
    Verdict.LOSE: _lose_and_move,
    Verdict.LOSE_AND_TELL: _lose_and_tell,
    Verdict.SUSPECT: _suspect,
    Verdict.PROBE: _probe,
    Verdict.ELSEWHERE: _elsewhere,
    Verdict.NEW_SESSION: _new_session,
    Verdict.NEW_LOGIN: _new_login,
    Verdict.NEW_HANDLES: _new_handles,
    Verdict.NEW_LIBRARY: _new_library,
}


def _again(call: Any) -> int:
    call.sent = 0
    return AGAIN


def _answered(call: Any) -> None:
    if not call.answered:
        call.first_rv = call.rv
    call.answered |= 1 << call.member
    call.tried |= 1 << call.member


def _lose(call: Any, member: Member) -> None:
    current().lose(member, int(call.rv), _row_name(call), int(call.epoch))


def locate(call: Any) -> int:
    """Handles of the call's objects on its member are not known: look, prove, or mark them absent."""
    slot = _slot(call)
    for place in range(call.objects):
        if not call.object[place]:
            continue
        try:
            known = slot.objects.get(int(call.object[place]))
        except CkError:
            return _no_such_object(call)
        try:
            if not slot.objects.handle_at(known, call.member) and known.recipe is not None:
                _make_again(slot, call, known)
        except CkError as error:
            if error.member is slot.by_index[call.member]:
                call.rv = error.rv
                if isinstance(error, NotItself):
                    return _new_library(call, slot, slot.by_index[call.member])
                return decide(call)
            blame(slot, error, _row_name(call))
            proven = slot.objects.gives_up_claims(known, call.member)
            if not proven and any(member is error.member for member in slot.up()):
                call.tried |= 1 << call.member  # while the other one cannot say, this one proves nothing
    return AGAIN


def _make_again(slot: VirtualSlot, call: Any, known: VirtualObject) -> None:
    """A session object that died with its member's sessions, or is needed where it was not made."""
    assert known.recipe
    again = known.recipe.run(slot, call.session, call.member)
    if again is not None:
        native.lib.ha_session_own(call.session, again.index)
        slot.objects.also_at(known, again.index, again.epoch, again.made)


def blame(slot: VirtualSlot, error: CkError, where: str) -> None:
    """A member failed in the middle of the core's own work on it: it is lost, unless it was well, and is."""
    for member in slot.up():
        epoch = member.epoch
        if member is error.member and (member.code(error.rv) is Code.DEAD or not member.probe()):
            current().lose(member, error.rv, where, epoch)


def _no_such_object(call: Any) -> int:
    return ck.CKR_OBJECT_HANDLE_INVALID if _row_name(call) in _ON_OBJECTS else ck.CKR_KEY_HANDLE_INVALID


_ON_OBJECTS = {row.name for row in FUNCTIONS if row.name.endswith(("AttributeValue", "Object", "ObjectSize"))}


def no_member(call: Any) -> int:
    """Nobody is left for this call."""
    slot = _slot(call)
    if call.alone:
        return int(call.first_rv or call.rv or ck.CKR_DEVICE_ERROR)
    if _looks_again(slot, call):
        return AGAIN
    served = slot.serving_mask
    if call.answered:
        # What was on a suspect alone, and it is lost, is made once more.
        if _lose_suspects(slot, call) and _doubt(slot, call):
            return AGAIN
        alive = [
            i for i, m in enumerate(slot.by_index) if call.answered >> i & 1 and m.state is MemberState.UP
        ]
        if alive:
            return int(call.first_rv)  # they all say so: it is the answer
        if slot.serving_mask & ~served & ~call.tried:
            return AGAIN  # a standby has taken over
    complete = len(slot.working()) == len(slot.members)
    if slot.serving_mask & ~call.tried:
        serving = slot.serving_mask & ~call.tried
        if not call.objects or any(_present(slot, call, place) & serving for place in range(call.objects)):
            scattered = complete and _scattered(slot, call, serving)
            return ck.CKR_KEY_HANDLE_INVALID if scattered else ck.CKR_DEVICE_ERROR
    if call.objects and slot.serving_mask and (complete or _is_gone(slot, call)):
        return _no_such_object(call)
    return ck.CKR_DEVICE_ERROR


def _is_gone(slot: VirtualSlot, call: Any) -> bool:
    """Whether an object was only on a member that is away, and the others know that it is no more, or not yet."""
    if slot.replication is None:
        return False
    for place in range(call.objects):
        with suppress(Exception):  # who cannot say it leaves it open
            known = slot.objects.get(int(call.object[place]))
            serving = slot.serving_mask
            there = [member for i, member in enumerate(slot.by_index) if serving >> i & 1]
            if not known.identity.token or slot.replication.whereabouts.is_on_any(known.identity, there):
                continue
            # What was on one of them is to be on all of them.
            if known.homes & serving or slot.replication.whereabouts.is_gone(known.identity.name):
                return True
    return False


def _looks_again(slot: VirtualSlot, call: Any) -> bool:
    """Before a call fails, once: what a member had not may be there by now, if its store was away, say."""
    if call.repairs & _LOOKED_AGAIN:
        return False
    call.repairs |= _LOOKED_AGAIN
    return _doubt(slot, call)


def _lose_suspects(slot: VirtualSlot, call: Any) -> bool:
    """Whether one of them is not well."""
    lost = False
    for index, member in enumerate(slot.by_index):
        if call.suspects >> index & 1 and member.state is MemberState.UP:
            epoch = member.epoch
            if not member.probe():
                current().lose(member, int(call.first_rv), _row_name(call), epoch)
                lost = True
    return lost


def _doubt(slot: VirtualSlot, call: Any) -> bool:
    """Whether members that are left may have what the call needs, though they were thought not to."""
    left = slot.serving_mask & ~int(call.tried)
    doubted = [slot.objects.doubt(handle, left) for handle in _needed(call)]
    return any(doubted)


def _needed(call: Any) -> list[int]:
    """Its objects, and the keys of the operations that it would take along."""
    objects = [int(call.object[place]) for place in range(call.objects)]
    if FUNCTIONS[int(call.row)].ops:
        count = native.lib.ha_session_keys(call.session, native.ffi.NULL, 0)
        keys = native.ffi.new("CK_OBJECT_HANDLE[]", count)
        native.lib.ha_session_keys(call.session, keys, count)
        objects += list(keys)
    return objects


def _present(slot: VirtualSlot, call: Any, place: int) -> int:
    try:
        return ~slot.objects.get(int(call.object[place])).absent
    except CkError:
        return 0


def _scattered(slot: VirtualSlot, call: Any, serving: int) -> bool:
    """Each object is somewhere, but no member has all that this call needs."""
    together = serving
    for place in range(call.objects):
        together &= _present(slot, call, place)
    return not together


def settled(call: Any) -> None:
    """Another member did what the suspects did not: they are at fault.  If it refused, they may have been right:
    who sends forgeries must not be able to take out members that are clumsy about saying so."""
    slot = _slot(call)
    did = int(call.rv) in (ck.CKR_OK, ck.CKR_BUFFER_TOO_SMALL)
    for index, member in enumerate(slot.by_index):
        if call.suspects >> index & 1 and member.state is MemberState.UP and (did or not member.probe()):
            current().lose(member, int(call.first_rv), _row_name(call), member.epoch)
    if call.suspects and call.member >= 0:
        details: dict[str, str | int] = {"call": _row_name(call), "code": ck.rv_name(int(call.first_rv))}
        current().log(Event("call.failed_over", slot.face.label, slot.by_index[call.member].name, details))


def failed(call: Any) -> None:
    """A member answered badly to what was to end something there."""
    member = _slot(call).by_index[call.member]
    if member.state is not MemberState.UP or member.epoch != call.epoch or current().stopping:
        return
    code = member.code(call.rv)
    if code is Code.DEAD or (code is Code.SUSPECT and not _is_well(call, member)):
        _lose(call, member)


def operation_lost(call: Any) -> None:
    """The data plane gave up an operation that had taken input on a member that is gone."""
    slot = _slot(call)
    member = slot.by_index[call.member].name if call.member >= 0 else ""
    current().log(Event("operation.lost", slot.face.label, member, {"call": _row_name(call)}))


def adopt(call: Any, made: int, handle: Any) -> None:
    """A call made an object on its member."""
    slot = _slot(call)
    owner = int(native.lib.ha_session_handle(call.session))
    try:
        known = slot.objects.adopt(call.member, int(call.epoch), int(call.member_session), int(made), owner)
    except CkError as error:
        blame(slot, error, _row_name(call))
        raise
    if not known.identity.token:
        native.lib.ha_session_own(call.session, call.member)
    slot.objects.pinned(known)
    handle[0] = known.handle


def identify(call: Any, found: Any, count: int, handles: Any) -> None:
    """A member found objects that the data plane does not know."""
    slot = _slot(call)
    members_handles = [int(found[i]) for i in range(count)]
    try:
        recognised = slot.objects.recognise(
            call.member, int(call.epoch), int(call.member_session), members_handles
        )
    except CkError as error:
        blame(slot, error, _row_name(call))
        raise
    for place, handle in enumerate(recognised):
        handles[place] = handle


def session_closing(session: Any) -> None:
    """Session objects die with the session that made them."""
    slot_of(session).objects.session_closed(int(native.lib.ha_session_handle(session)))


def session_objects_lost(session: Any, index: int) -> None:
    """A session's counterpart on a member is closed, and with it what it made there."""
    slot_of(session).objects.session_lost(int(native.lib.ha_session_handle(session)), index)


def last_session_closed(native_slot: Any) -> None:
    """Closing the last session logs out (PKCS#11 5.6.2); at C_Finalize the libraries' own does."""
    slot = slot_by_id(native.lib.ha_slot_id(native_slot))
    with slot.login_lock:
        # Another thread may have opened a session since, and have logged in: it is the last one no more.
        if not current().stopping and not native.lib.ha_slot_sessions(slot.native, False):
            login.logout(slot, current().lose, current().in_time)


HANDLERS: dict[str, Callable[..., int | None]] = {
    "check": check,
    "look": look,
    "no_member": no_member,
    "locate": locate,
    "decide": decide,
    "settled": settled,
    "failed": failed,
    "operation_lost": operation_lost,
    "adopt": adopt,
    "identify": identify,
    "session_closing": session_closing,
    "session_objects_lost": session_objects_lost,
    "last_session_closed": last_session_closed,
}
