"""`p11ha status`: the groups and their members, as seen from here and now."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from pkcs11_ha import ck
from pkcs11_ha.cli.module import Library
from pkcs11_ha.runtime.slot import VirtualSlot


@dataclass(frozen=True)
class MemberStatus:
    """One member as CA_GetHAState tells it, with what the configuration calls it."""

    name: str
    serial: str
    role: str
    status: str
    why: str


@dataclass(frozen=True)
class GroupStatus:
    """One group."""

    label: str
    serial: str
    slot: int
    balance: str
    members: tuple[MemberStatus, ...]


def read(library: Library) -> list[GroupStatus]:
    """All groups, in the configuration's order; raises ModuleError."""
    return [_group(library, slot) for slot in library.core.slots.values() if slot.is_group]


def _group(library: Library, slot: VirtualSlot) -> GroupStatus:
    state = library.ha_state(slot.id)
    settings = next(g for g in library.core.settings.groups if g.label == slot.face.label)
    members = []
    for index, member in enumerate(slot.members):
        entry = state.members[index]
        members.append(
            MemberStatus(
                member.name,
                entry.serial.decode("utf-8", "replace"),
                "standby" if member.name in settings.standby else "active",
                ck.rv_name(entry.status),
                "drained" if member.drained else member.why if entry.status != ck.CKR_OK else "",
            )
        )
    return GroupStatus(slot.face.label, slot.face.serial, slot.id, settings.balance, tuple(members))


def as_json(groups: list[GroupStatus]) -> dict[str, object]:
    """What --json prints."""
    return {"groups": [asdict(group) for group in groups]}


def show(groups: list[GroupStatus], console: Console) -> None:
    """A table, then the listing that people who know Luna's tools look for."""
    table = Table("group", "slot", "member", box=None, header_style="bold")
    for name in ("serial", "role", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    for group in groups:
        for member in group.members:
            good = member.status == ck.rv_name(ck.CKR_OK)
            colour = "green" if good else "red"
            table.add_row(
                group.label,
                str(group.slot),
                member.name,
                member.serial,
                member.role,
                f"[{colour}]{member.status}[/]",
                member.why,
            )
    console.print(table)
    for group in groups:
        console.print()
        console.print(f"HA group {group.serial} status:", highlight=False)
        for member in group.members:
            console.print(f"HSM {member.serial} - {member.status}", highlight=False, soft_wrap=True)
