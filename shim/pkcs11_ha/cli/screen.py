"""What `p11ha status` and `p11ha watch` show of running processes: groups, members and processes, a line each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

from rich.console import Console
from rich.text import Text

from pkcs11_ha.cli.segments import Counters, Group, Member, View
from pkcs11_ha.spec.functions import Deadline

FEW = 8
"""Processes of a member that are shown one by one, unless all are asked for."""

_NAME = 22
_DETAIL = 72
_HEADS = (
    ("state", 10),
    ("for", 7),
    ("calls", 7),
    ("faults", 6),
    ("over", 5),
    ("now", 4),
    ("p50", 5),
    ("p99", 5),
)
_COLOURS = {"up": "green", "away": "red", "connecting": "yellow", "ejected": "yellow", "drained": "cyan"}

SORTS: dict[str, Callable[[View], tuple[object, ...]]] = {
    "trouble": lambda view: (view.member.state == "up", -view.counters.calls),
    "process": lambda view: (view.process.pid,),
    "program": lambda view: (view.process.text.program if view.process.text else "", view.process.pid),
    "calls": lambda view: (-view.counters.calls,),
    "faults": lambda view: (-view.counters.faulty,),
}
"""How the processes of a member may be ordered; the first is the usual way."""


@dataclass(frozen=True)
class Look:
    """What is to be shown, and how; `rates`: calls a second instead of calls, by (file, member)."""

    sort: str = "trouble"
    every: bool = False
    wanted: str = ""
    rates: dict[tuple[str, str], float] | None = None
    now_ns: int = field(default_factory=time.monotonic_ns)


def heading(look: Look) -> Text:
    """The names of the columns."""
    heads = [("calls/s" if name == "calls" and look.rates is not None else name, n) for name, n in _HEADS]
    line = "  member".ljust(_NAME) + "".join(
        f" {name:<{n}}" if name == "state" else f"{name:>{n + 1}}" for name, n in heads
    )
    return Text(line, style="bold")


def lines(groups: Sequence[Group], look: Look) -> list[Text]:
    """All groups that have what is wanted, without the heading."""
    shown: list[Text] = []
    for group in groups:
        part = [line for member in group.members for line in _member_lines(group, member, look)]
        if part:
            several = len({each.configuration for each in groups}) > 1
            shown += [Text(), *_group_lines(group, several)] if shown else _group_lines(group, several)
            shown += part
    return shown


def _group_lines(group: Group, several: bool) -> list[Text]:
    many = len(group.processes)
    line = Text.assemble(
        (group.text.label, "bold"),
        f"  serial {group.text.serial}, slot {group.text.slot}, {group.text.balance},"
        f" {many} process{'es' if many != 1 else ''}",
    )
    return [line, Text(f"  {group.configuration}")] if several else [line]


def _member_lines(group: Group, member: Member, look: Look) -> list[Text]:
    views = [view for view in member.views if _is_wanted(group, member, view, look.wanted)]
    if not views:
        return []
    views.sort(key=SORTS[look.sort])
    few = views if look.every or len(views) <= FEW + 1 else views[:FEW]
    name = f"  {member.name}{' (standby)' if member.standby else ''}"
    shown = [_row(name, _states(member), "", member.counters, _rate(member.views, look), "bold")]
    for view in few:
        shown += _view_lines(view, look)
    if len(views) > len(few):
        left = views[len(few) :]
        states = ", ".join(dict.fromkeys(view.member.state for view in left))
        shown.append(Text(f"    … and {len(left)} more processes: {states} (--all)", style="dim"))
    return shown


def _is_wanted(group: Group, member: Member, view: View, wanted: str) -> bool:
    program = view.process.text.program if view.process.text else ""
    words = (group.text.label, member.name, member.serial, view.member.state, program, str(view.process.pid))
    return any(wanted.casefold() in word.casefold() for word in words)


def _states(member: Member) -> str:
    states = member.states
    return next(iter(states)) if len(states) == 1 else "differs"


def _view_lines(view: View, look: Look) -> list[Text]:
    program = view.process.text.program if view.process.text else ""
    name = f"    {view.process.pid} {program}"
    age = duration(look.now_ns - view.member.since_monotonic_ns)
    shown = [_row(name, view.member.state, age, view.counters, _rate([view], look))]
    if what := detail(view, look.now_ns):
        shown += [Text(f"      {line}", style="dim") for line in wrap(what, _DETAIL)]
    return shown


def detail(view: View, now_ns: int) -> str:
    """Why a member is away and when it is tried again; what it is owed."""
    member, parts = view.member, []
    if member.state in ("away", "connecting"):
        parts.append(member.why or member.code)
        parts.append(attempts(view, now_ns))
    if member.owed:
        parts.append(f"owed {member.owed} object{'s' if member.owed != 1 else ''}")
    return "; ".join(part for part in parts if part)


def attempts(view: View, now_ns: int) -> str:
    """Which attempts were made to recover a member, and when the next is due."""
    member = view.member
    limit = view.process.text.attempts if view.process.text else -1
    of = f" of {limit}" if limit >= 0 else ""
    tried = f"attempt {member.failed}{of} failed" if member.failed else ""
    if member.state == "connecting":
        return ", ".join(part for part in (tried, "trying now") if part)
    if member.stopped:
        then = "not tried again: its PIN was refused"
    elif member.next_monotonic_ns is None:
        then = "not tried again" if member.failed else "it is not tried again: recovery is off"
    else:
        left = member.next_monotonic_ns - now_ns
        then = f"next in {duration(left)}" if left > 0 else "next with the next call"
    return ", ".join(part for part in (tried, then) if part)


def _rate(views: Sequence[View], look: Look) -> float | None:
    if look.rates is None:
        return None
    return sum(look.rates.get((view.process.name, view.member.name), 0.0) for view in views)


def _row(name: str, state: str, age: str, counters: Counters, rate: float | None, style: str = "") -> Text:
    latency = counters.latency[Deadline.CRYPTOGRAPHY.value]
    cells = (
        age,
        number(counters.calls if rate is None else round(rate)),
        number(counters.faulty),
        number(counters.failovers),
        number(counters.in_flight),
        time_of(latency.quantile_ns(0.5)),
        time_of(latency.quantile_ns(0.99)),
    )
    widths = [width for _, width in _HEADS]
    line = Text(f"{name[:_NAME]:<{_NAME}} ", style=style)
    line.append(f"{state:<{widths[0]}}", style=_COLOURS.get(state, "yellow"))
    line.append("".join(f" {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)))
    return line


def number(count: int) -> str:
    """In five places at most."""
    if count < 100_000:
        return str(count)
    for unit in "kMGTP":
        count_in = count / 1000
        if count_in < 999.5:
            return f"{count_in:.0f}{unit}" if count_in >= 100 else f"{count_in:.1f}{unit}"
        count = round(count_in)
    return f"{count}P"


def duration(ns: int) -> str:
    """In six places at most: `42s`, `12m05s`, `3h20m`, `5d04h`."""
    seconds = max(0, ns) // 1_000_000_000
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24:02}h"


def time_of(ns: int | None) -> str:
    """How long a call took, in five places at most; a dash without any."""
    if ns is None:
        return "-"
    for unit, size in (("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)):
        if ns < 1000 * size:
            value = ns / size
            return f"{value:.0f}{unit}" if value >= 10 else f"{value:.1f}{unit}"
    return f"{ns // 1_000_000_000}s"


def show(groups: Sequence[Group], every: bool, console: Console) -> None:
    """The groups, then the listing that people who know Luna's tools look for."""
    look = Look(every=every)
    console.print(heading(look), soft_wrap=True)
    for line in lines(groups, look):
        console.print(line, highlight=False, soft_wrap=True)
    for group in groups:
        console.print()
        console.print(f"HA group {group.text.serial} status:", highlight=False, markup=False)
        for member in group.members:
            console.print(
                f"HSM {member.serial} - {member.status}", highlight=False, markup=False, soft_wrap=True
            )
