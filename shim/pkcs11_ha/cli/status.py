"""`p11ha status`: the groups and their members, as a new process sees them, and as JSON, as running ones do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pkcs11_ha import ck
from pkcs11_ha.cli import segments
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


def joined_json(
    processes: Sequence[segments.Process], skipped: Sequence[segments.Skipped]
) -> dict[str, object]:
    """What --json prints of running processes."""
    now_ns = time.monotonic_ns()
    return {
        "groups": [
            {
                "label": group.text.label,
                "serial": group.text.serial,
                "slot": group.text.slot,
                "balance": group.text.balance,
                "configuration": group.configuration,
                "members": [_joined_member(member, now_ns) for member in group.members],
            }
            for group in segments.join(processes)
        ],
        "processes": [_process(process) for process in processes],
        "skipped": [str(each) for each in skipped],
    }


def _process(process: segments.Process) -> dict[str, object]:
    """Of one that is being initialised only who it is."""
    text = {} if process.text is None else asdict(process.text)
    return {"pid": process.pid, "segment": process.name, **{k: v for k, v in text.items() if k != "groups"}}


def _joined_member(member: segments.Member, now_ns: int) -> dict[str, object]:
    return {
        "name": member.name,
        "serial": member.serial,
        "role": "standby" if member.standby else "active",
        "status": member.status,
        "why": next((v.member.why for v in member.views if v.member.why), ""),
        "states": member.states,
        **_counted(member.counters),
        "processes": [_view(view, now_ns) for view in member.views],
    }


def _view(view: segments.View, now_ns: int) -> dict[str, object]:
    text, said = view.process.text, view.member
    due = said.next_monotonic_ns
    return {
        "pid": view.process.pid,
        "program": text.program if text else "",
        "state": said.state,
        "status": view.status,
        "since": datetime.fromtimestamp(said.since_ns / 1e9, tz=UTC).isoformat(timespec="milliseconds"),
        "code": said.code,
        "call": said.call,
        "why": said.why,
        "attempts_failed": said.failed,
        "attempts": text.attempts if text else None,
        "next_attempt_s": None if due is None else round((due - now_ns) / 1e9, 3),
        "pin_refused": said.stopped,
        "owed": said.owed,
        **_counted(view.counters),
    }


def _counted(counters: segments.Counters) -> dict[str, object]:
    return {
        "calls": counters.calls,
        "in_flight": counters.in_flight,
        "failovers": counters.failovers,
        "faults": counters.faults,
        "latency": {
            name: {
                "samples": latency.samples,
                "total_ns": latency.total_ns,
                "p50_ns": latency.quantile_ns(0.5),
                "p99_ns": latency.quantile_ns(0.99),
                "up_to_ns": {
                    segments.edge_ns(bucket): count for bucket, count in enumerate(latency.counts) if count
                },
            }
            for name, latency in counters.latency.items()
        },
    }


_OF_PROCESSES: dict[str, object] = {
    "states": {},
    "calls": None,
    "in_flight": None,
    "failovers": None,
    "faults": {},
    "latency": {},
    "processes": [],
}
"""What only running processes know of a member."""


def as_json(
    groups: list[GroupStatus], configuration: str, skipped: Sequence[segments.Skipped]
) -> dict[str, object]:
    """What --json prints of a new process: the keys are those of running ones."""
    return {
        "groups": [
            {
                **asdict(group),
                "configuration": configuration,
                "members": [asdict(member) | _OF_PROCESSES for member in group.members],
            }
            for group in groups
        ],
        "processes": [],
        "skipped": [str(each) for each in skipped],
    }


def show(groups: list[GroupStatus], console: Console) -> None:
    """A table, then the listing that people who know Luna's tools look for."""
    table = _wide(groups) if console.width >= _WIDE else _narrow(groups)
    console.print(table)
    for group in groups:
        console.print()
        console.print(f"HA group {group.serial} status:", highlight=False)
        for member in group.members:
            console.print(f"HSM {member.serial} - {member.status}", highlight=False, soft_wrap=True)


_WIDE = 80


def _wide(groups: list[GroupStatus]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("group", "slot", "member"):
        table.add_column(name, overflow="fold")
    for name in ("serial", "role", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    for group in groups:
        for m in group.members:
            table.add_row(
                Text(group.label), str(group.slot), m.name, m.serial, m.role, _coloured(m), Text(m.why)
            )
    return table


def _narrow(groups: list[GroupStatus]) -> Table:
    """The same, but for the serials that stand below, in three columns that fold."""
    table = Table(box=None, header_style="bold")
    for name in ("group", "member", "status"):
        table.add_column(name, overflow="fold")
    for group in groups:
        for m in group.members:
            table.add_row(
                Text(f"{group.label}\nslot {group.slot}"),
                f"{m.name}\n{m.role}",
                _coloured(m).append(f"\n{m.why}"),
            )
    return table


def _coloured(member: MemberStatus) -> Text:
    good = member.status == ck.rv_name(ck.CKR_OK)
    return Text().append(member.status, "green" if good else "red")
