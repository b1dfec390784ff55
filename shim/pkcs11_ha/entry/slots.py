"""Slots, tokens, mechanisms and the HA status, as the application asks for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from pkcs11_ha import __version__, ck
from pkcs11_ha.core.codes import Code
from pkcs11_ha.entry.life import current, slot_by_id
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.member import TOKEN_NUMBERS, ConnectError, Member, MemberState
from pkcs11_ha.runtime.native import CkError, OutOfTime, pad
from pkcs11_ha.runtime.slot import VirtualSlot

_TOKEN_S = 0.25  # a slow member is not waited for: what it said last is good enough


def _version() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", __version__)[:2]
    return int(major), int(minor)


def _get_info(info: Any) -> None:
    info.cryptokiVersion.major, info.cryptokiVersion.minor = 3, 2
    pad(info.manufacturerID, current().settings.ha.manufacturer)
    info.flags = 0
    pad(info.libraryDescription, "pkcs11-ha")
    info.libraryVersion.major, info.libraryVersion.minor = _version()


def _checked(slot_id: int) -> VirtualSlot:
    """The slot, after the recovery check that every call makes."""
    slot = slot_by_id(slot_id)
    current().changes.heed_in_passing()
    native.lib.ha_slot_gate(slot.native)
    return slot


def _get_slot_list(token_present: int, slots: Any, count: Any) -> None:
    current().changes.heed_in_passing()
    for slot in current().slots.values():
        native.lib.ha_slot_gate(slot.native)
    ids = [slot.id for slot in current().slots.values() if slot.present or not token_present]
    room, count[0] = count[0], len(ids)
    if slots == native.ffi.NULL:
        return
    if room < len(ids):
        raise CkError(ck.CKR_BUFFER_TOO_SMALL)
    for index, slot_id in enumerate(ids):
        slots[index] = slot_id


def _get_slot_info(slot_id: int, info: Any) -> None:
    slot = _checked(slot_id)
    pad(info.slotDescription, slot.face.description)
    pad(info.manufacturerID, current().settings.ha.manufacturer)
    info.flags = slot.flags | (ck.CKF_TOKEN_PRESENT if slot.present else 0)
    for version in (info.hardwareVersion, info.firmwareVersion):
        version.major, version.minor = _version()


def _get_token_info(slot_id: int, info: Any) -> None:
    slot = _checked(slot_id)
    member = _first_that_tells(slot)
    facts = member.facts
    assert facts
    face = slot.face
    pad(info.label, face.label if slot.is_group else facts.label)
    pad(info.manufacturerID, face.manufacturer if slot.is_group else facts.manufacturer)
    pad(info.model, face.model if slot.is_group else facts.model)
    pad(info.serialNumber, face.serial if slot.is_group else facts.serial)
    info.flags = _token_flags(slot) if slot.is_group else facts.flags
    for name, value in zip(TOKEN_NUMBERS, facts.numbers, strict=True):
        setattr(info, name, value)
    if slot.is_group:
        known = [m.facts for m in slot.serving() if m.facts]
        most, least = TOKEN_NUMBERS.index("ulMaxPinLen"), TOKEN_NUMBERS.index("ulMinPinLen")
        info.ulMaxPinLen = min((f.numbers[most] for f in known), default=info.ulMaxPinLen)
        info.ulMinPinLen = max((f.numbers[least] for f in known), default=info.ulMinPinLen)
        info.ulMaxSessionCount = info.ulMaxRwSessionCount = ck.CK_EFFECTIVELY_INFINITE
        for name in TOKEN_NUMBERS[6:]:  # memory: of no member in particular
            setattr(info, name, ck.CK_UNAVAILABLE_INFORMATION)
    info.ulSessionCount = native.lib.ha_slot_sessions(slot.native, False)
    info.ulRwSessionCount = native.lib.ha_slot_sessions(slot.native, True)
    for version, known_version in (
        (info.hardwareVersion, facts.hardware),
        (info.firmwareVersion, facts.firmware),
    ):
        version.major, version.minor = known_version
    native.ffi.buffer(info.utcTime)[:] = b" " * 16


def _first_that_tells(slot: VirtualSlot) -> Member:
    """A serving member, its facts as fresh as they come in a moment; a member found dead is lost."""
    core = current()
    while serving := slot.serving():
        member = serving[0]
        epoch = member.epoch
        if member.learning:
            return member  # another caller is waiting for it already
        member.learning = True
        try:
            native.within(_TOKEN_S, core.may_use_threads, member.learn, partial(_learnt, member))
            member.learning = False
            return member
        except OutOfTime:
            return member
        except ConnectError as error:
            member.learning = False
            if member.code(error.rv) not in (Code.DEAD, Code.SUSPECT, Code.LIBRARY):
                return member
            core.lose(member, error.rv, "C_GetTokenInfo", epoch)
    raise CkError(ck.CKR_TOKEN_NOT_PRESENT)


def _learnt(member: Member, _error: BaseException | None) -> None:
    member.learning = False


_ALL = ck.CKF_RNG | ck.CKF_DUAL_CRYPTO_OPERATIONS  # only what every member has
_WARNINGS = (
    ck.CKF_USER_PIN_COUNT_LOW
    | ck.CKF_USER_PIN_FINAL_TRY
    | ck.CKF_USER_PIN_LOCKED
    | ck.CKF_USER_PIN_TO_BE_CHANGED
    | ck.CKF_SO_PIN_COUNT_LOW
    | ck.CKF_SO_PIN_FINAL_TRY
    | ck.CKF_SO_PIN_LOCKED
    | ck.CKF_SO_PIN_TO_BE_CHANGED
    | ck.CKF_WRITE_PROTECTED
    | ck.CKF_LOGIN_REQUIRED
    | ck.CKF_PROTECTED_AUTHENTICATION_PATH
    | ck.CKF_ERROR_STATE
)  # what any member warns of


def _token_flags(slot: VirtualSlot) -> int:
    members = [m.facts.flags for m in slot.serving() if m.facts]
    if not members:
        raise CkError(ck.CKR_TOKEN_NOT_PRESENT)
    flags = members[0] & ~(_ALL | _WARNINGS | ck.CKF_CLOCK_ON_TOKEN | ck.CKF_RESTORE_KEY_NOT_NEEDED)
    for flag in (1 << bit for bit in range(32)):
        if (flag & _ALL and all(m & flag for m in members)) or (
            flag & _WARNINGS and any(m & flag for m in members)
        ):
            flags |= flag
    return flags


def _mechanisms(slot: VirtualSlot) -> list[int]:
    """What every serving member offers, in the order of the first."""
    serving = slot.serving()
    if not serving:
        raise CkError(ck.CKR_TOKEN_NOT_PRESENT)
    return [m for m in serving[0].mechanisms if all(m in other.mechanisms for other in serving)]


def _get_mechanism_list(slot_id: int, mechanisms: Any, count: Any) -> None:
    offered = _mechanisms(_checked(slot_id))
    room, count[0] = count[0], len(offered)
    if mechanisms == native.ffi.NULL:
        return
    if room < len(offered):
        raise CkError(ck.CKR_BUFFER_TOO_SMALL)
    for index, mechanism in enumerate(offered):
        mechanisms[index] = mechanism


def _get_mechanism_info(slot_id: int, mechanism: int, info: Any) -> None:
    slot = _checked(slot_id)
    if mechanism not in _mechanisms(slot):
        raise CkError(ck.CKR_MECHANISM_INVALID)
    core = current()
    while True:
        known = []
        for member in slot.serving():
            epoch = member.epoch
            try:
                known.append(member.mechanism_info(mechanism))
            except CkError as error:
                if member.code(error.rv) not in (Code.DEAD, Code.SUSPECT, Code.LIBRARY):
                    raise
                core.lose(member, error.rv, "C_GetMechanismInfo", epoch)
                break
        else:
            break
    if not known:
        raise CkError(ck.CKR_TOKEN_NOT_PRESENT)
    info.ulMinKeySize = max(least for least, _, _ in known)
    info.ulMaxKeySize = min(most for _, most, _ in known)
    info.flags = known[0][2]
    for _, _, flags in known[1:]:
        info.flags &= flags


def _init_token(slot_id: int, pin: Any, size: int, label: Any) -> int:
    slot = _checked(slot_id)
    if slot.is_group:
        raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED)  # a group has no token of its own to wipe
    if native.lib.ha_slot_sessions(slot.native, False):
        raise CkError(ck.CKR_SESSION_EXISTS)
    member = slot.by_index[0]
    if member not in slot.up():
        raise CkError(ck.CKR_TOKEN_NOT_PRESENT)
    if len(current().slots_of(member)) > 1:
        raise CkError(ck.CKR_SESSION_EXISTS)  # a group uses it
    with member.service:
        member.call("C_CloseSession", member.session)
        native.lib.ha_slot_drain_pools(slot.native, False)
        native.lib.ha_slot_drain_pools(slot.native, True)
        rv = member.call("C_InitToken", native.lib.ha_member_slot_id(member.native), pin, size, label)
    current().lose(member, rv, "C_InitToken", member.epoch)  # whatever it was, it is to be met anew
    current().reconnect_now(member)
    return rv


def _wait_for_slot_event(flags: int, slot: Any, reserved: Any) -> None:
    if reserved != native.ffi.NULL:
        raise CkError(ck.CKR_ARGUMENTS_BAD)
    core = current()
    with core.changed:
        while True:
            if core.stopping:
                raise CkError(ck.CKR_CRYPTOKI_NOT_INITIALIZED)
            for candidate in core.slots.values():
                if candidate.is_group and core.reported[candidate.id] != candidate.present:
                    core.reported[candidate.id] = candidate.present
                    slot[0] = candidate.id
                    return
            if flags & ck.CKF_DONT_BLOCK:
                raise CkError(ck.CKR_NO_EVENT)
            core.changed.wait(1.0)


def _ha_state(slot_id: int, status: Any) -> None:
    status.listSize = 0
    slot = _checked(slot_id)
    native.ffi.memmove(status, bytes(native.ffi.sizeof("CK_HA_STATUS")), native.ffi.sizeof("CK_HA_STATUS"))
    if not slot.is_group:
        raise CkError(ck.CKR_SLOT_ID_INVALID)
    native.ffi.memmove(
        status.groupSerial, slot.face.serial.encode()[:19], len(slot.face.serial.encode()[:19])
    )
    core = current()
    with core.lock:
        for entry, member in zip(status.memberList, slot.members, strict=False):
            serial = member.serial.encode()[:19]
            native.ffi.memmove(entry.memberSerial, serial, len(serial))
            if member.state is MemberState.UP:
                entry.memberStatus = ck.CKR_OK
            else:
                entry.memberStatus = ck.CKR_TOKEN_NOT_PRESENT if member.loss_was_read else ck.CKR_DEVICE_ERROR
                member.loss_was_read = True
        status.listSize = len(slot.members)
        core.tell()


HANDLERS: dict[str, Callable[..., int | None]] = {
    "C_GetInfo": _get_info,
    "C_GetSlotList": _get_slot_list,
    "C_GetSlotInfo": _get_slot_info,
    "C_GetTokenInfo": _get_token_info,
    "C_GetMechanismList": _get_mechanism_list,
    "C_GetMechanismInfo": _get_mechanism_info,
    "C_InitToken": _init_token,
    "C_WaitForSlotEvent": _wait_for_slot_event,
    "ha_state": _ha_state,
}
