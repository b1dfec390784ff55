"""`p11ha check`: the configuration and every member in it, a line for each, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pkcs11_ha.cli import domain, objects, operator
from pkcs11_ha.cli.module import Library
from pkcs11_ha.runtime.login import own_pin
from pkcs11_ha.runtime.member import ConnectError, Member, MemberState
from pkcs11_ha.runtime.replication import Replication
from pkcs11_ha.runtime.slot import VirtualSlot


@dataclass(frozen=True)
class Finding:
    """One line about one thing."""

    subject: str
    good: bool
    text: str


def findings(library: Library, pin_source: str = "") -> list[Finding]:
    """Members first, in the configuration's order, then what they have in common.

    With a PIN (`file:/path`, or where each member has its own) also what a group keeps on its members.
    """
    members = list(library.core.members.values())
    unused = [m.name for m in library.core.settings.members if m.name not in library.core.members]
    return [
        *(_member(member) for member in members),
        *(Finding(name, True, "not in a group: never loaded") for name in unused),
        *_twins(members),
        *_mechanisms(library),
        *_replication(library, pin_source),
        *_pin(library, pin_source),
    ]


def _member(member: Member) -> Finding:
    if member.state is not MemberState.UP or member.facts is None:
        return Finding(member.name, False, member.why)
    try:
        _pin_file(member)
    except ConnectError as error:
        return Finding(member.name, False, str(error))
    text = (
        f"ok: token {member.facts.label!r}, serial {member.facts.serial}, {len(member.mechanisms)} mechanisms"
    )
    return Finding(member.name, True, text)


def _pin_file(member: Member) -> None:
    path = member.config.pin_source
    if path is None:
        return
    own_pin(member)  # raises if it cannot be read
    if Path(path).stat().st_mode & 0o077:
        raise ConnectError(0, f"pin_source: {path} can be read by others than its owner")


def _twins(members: list[Member]) -> list[Finding]:
    """Two members that are one token would be no help to each other."""
    tokens = Counter((m.facts.serial, m.facts.label) for m in members if m.facts and m.facts.serial)
    return [
        Finding(member.name, False, f"the same token as another member (serial {member.facts.serial})")
        for member in members
        if member.facts and tokens[(member.facts.serial, member.facts.label)] > 1
    ]


def _mechanisms(library: Library) -> list[Finding]:
    """What some members of a group lack is not offered by the group."""
    lines = []
    for slot in library.core.slots.values():
        up = slot.up()
        if slot.is_group and len(up) > 1:
            common = set.intersection(*(set(m.mechanisms) for m in up))
            lacking = [m.name for m in up if set(m.mechanisms) != common]
            if lacking:
                text = f"{len(common)} mechanisms in common; more on {', '.join(lacking)}"
                lines.append(Finding(slot.face.label, True, text))
    return lines


def _replication(library: Library, pin_source: str) -> list[Finding]:
    """Domain key, ledger and debts of the groups that keep their objects everywhere."""
    lines = []
    for slot in library.core.slots.values():
        if slot.replication is None:
            continue
        if not pin_source and not all(member.config.pin_source for member in slot.members):
            text = "domain key and ledger are private: --pin-source would let them be looked at"
            lines.append(Finding(slot.face.label, True, text))
            continue
        try:
            with operator.at_work(slot, slot.up(), pin_source) as replication:
                lines += _domain(slot, replication)
        except operator.OperatorError as error:
            lines.append(Finding(slot.face.label, False, str(error)))
    return lines


def _pin(library: Library, pin_source: str) -> list[Finding]:
    """Whoever gives a PIN that nobody is asked with would else take it for a good one."""
    slots = [slot for slot in library.core.slots.values() if slot.replication is not None]
    if not pin_source or any(m.config.pin_source is None for slot in slots for m in slot.members):
        return []
    try:
        with operator.pin(pin_source):
            pass  # it can be read
    except operator.OperatorError as error:
        return [Finding("--pin-source", False, str(error))]
    why = "each member has its own" if slots else 'no group has replication = "domain"'
    text = (
        f"not tried on any token, as {why}: p11ha member test MEMBER --pin-source {pin_source} tries it, once"
    )
    return [Finding("--pin-source", True, text)]


def _domain(slot: VirtualSlot, replication: Replication) -> list[Finding]:
    label, members = slot.face.label, slot.up()
    generation, refused = domain.agreed(domain.holders(members))
    text = f"domain key of generation {generation.number}, check value {generation.check}"
    lines = [Finding(label, True, text), *(Finding(name, False, why) for name, why in refused.items())]
    fit = [member for member in members if member.name not in refused]
    replication.party.take_part(fit, generation)
    for member in fit:
        if not replication.party.ledger.keeps(member):
            text = "keeps no data objects: it is given and loses only what it is proven to lack or to have"
            lines.append(Finding(member.name, True, text))
    for debt in objects.debts(replication):
        owed = len(debt.open) + len(debt.missing)
        if owed:
            lines.append(Finding(debt.member, False, f"owed {owed} objects: p11ha sync {label}"))
    for row in objects.diff(replication):
        if not row.good and not row.in_ledger:
            where = ", ".join(row.on)
            lines.append(Finding(label, False, f"{row.object} is on {where} alone, and not in the ledger"))
    return lines
