"""`p11ha check`: the configuration and every member in it, a line for each, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pkcs11_ha.cli.module import Library
from pkcs11_ha.runtime.login import own_pin
from pkcs11_ha.runtime.member import ConnectError, Member, MemberState


@dataclass(frozen=True)
class Finding:
    """One line about one thing."""

    subject: str
    good: bool
    text: str


def findings(library: Library) -> list[Finding]:
    """Members first, in the configuration's order, then what they have in common."""
    members = list(library.core.members.values())
    unused = [m.name for m in library.core.settings.members if m.name not in library.core.members]
    return [
        *(_member(member) for member in members),
        *(Finding(name, True, "not in a group: never loaded") for name in unused),
        *_twins(members),
        *_mechanisms(library),
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
