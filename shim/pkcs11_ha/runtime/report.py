"""What the core knows, as the text of the status segment tells it."""

from __future__ import annotations

from collections.abc import Iterable

from pkcs11_ha import __version__
from pkcs11_ha.config import Config
from pkcs11_ha.core.codes import Code
from pkcs11_ha.core.recovery import NEVER_NS, Rule, due_at_ns
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.member import Member, MemberState
from pkcs11_ha.runtime.process import program
from pkcs11_ha.runtime.slot import VirtualSlot
from pkcs11_ha.spec.segment import GroupText, MemberText, ProcessText

_FAULTS = tuple(code.value for code in Code)


def report(settings: Config, rule: Rule, slots: Iterable[VirtualSlot]) -> ProcessText:
    """Of all groups; since when a member is as it is, the segment knows."""
    groups = tuple([_group(slot, rule) for slot in slots if slot.is_group])
    return ProcessText(program(), __version__, settings.path, rule.attempts, _FAULTS, groups)


def _group(slot: VirtualSlot, rule: Rule) -> GroupText:
    members = tuple([_member(slot, member, rule) for member in slot.members])
    balance = slot.group.balance if slot.group is not None else ""
    return GroupText(slot.face.label, slot.face.serial, slot.id, balance, members)


def _member(slot: VirtualSlot, member: Member, rule: Rule) -> MemberText:
    up = member.state is MemberState.UP
    due = NEVER_NS if up or member.connecting else due_at_ns(member.outage, rule)
    return MemberText(
        name=member.name,
        serial=member.serial,
        standby=slot.is_standby(slot.index(member)),
        state=_state(slot, member),
        up=up,
        since_ns=0,
        since_monotonic_ns=0,
        code=member.fault[0],
        call=member.fault[1],
        why="" if up else member.why,
        loss_was_read=member.loss_was_read,
        failed=0 if up else member.outage.failed,
        next_monotonic_ns=None if due == NEVER_NS else due,
        stopped=not up and member.outage.stopped,
        owed=slot.replication.party.owed_to(member.name) if slot.replication is not None else None,
        record=int(native.lib.ha_member_record(member.native)),
    )


def _state(slot: VirtualSlot, member: Member) -> str:
    if member.drained:
        return "drained"
    if member.state is not MemberState.UP:
        return "connecting" if member.connecting else "away"
    return "ejected" if slot.breaker is not None and member.name in slot.breaker.ejected else "up"
