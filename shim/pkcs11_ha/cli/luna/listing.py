"""Groups and slots as lunacm and vtl print them: scripts look for these very words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NOBODY = "<none>"
UNKNOWN_SLOT = "------"
UNKNOWN_LABEL = "------------"


@dataclass(frozen=True)
class Settings:
    """What holds for all groups."""

    retries: int
    interval_s: float
    mode: str
    log: str
    log_bytes: int | None
    only: bool


@dataclass(frozen=True)
class Row:
    """A member as it is now."""

    slot: str
    serial: str
    label: str
    status: str


@dataclass(frozen=True)
class Group:
    """A group; without `rows` as it is configured, which is all that is known before applications use it."""

    label: str
    number: str
    slot: str
    synchronised: bool
    members: tuple[str, ...]
    standby: tuple[str, ...]
    needs_sync: str = "unknown"
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Slot:
    """A slot of ours."""

    number: int
    description: str
    label: str
    serial: str
    present: bool


def _on(on: bool) -> str:
    return "enabled" if on else "disabled"


def _yes(yes: bool) -> str:
    return "yes" if yes else "no"


def _fields(width: int, fields: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name:>{width}}:  {value}".rstrip() for name, value in fields]


def mode_of(mode: str) -> str:
    """What Luna calls our way of recovery: sessions and login are kept in both."""
    return {"background": "activeEnhanced"}.get(mode, "passive")


def hagroup(settings: Settings | None, groups: Sequence[Group]) -> list[str]:
    """`lunacm hagroup listGroups`."""
    lines = [] if settings is None else settings_lines(settings)
    for group in groups:
        lines += ["", *group_lines(group)]
    return lines


def settings_lines(settings: Settings) -> list[str]:
    """The head of it."""
    fields = [
        ("HA auto recovery", _on(settings.retries != 0)),
        ("HA recovery mode", mode_of(settings.mode)),
        ("Maximum auto recovery retry", str(settings.retries)),
        ("Auto recovery poll interval", f"{settings.interval_s:g} seconds"),
        ("HA logging", _on(settings.log != "off")),
    ]
    if settings.log != "off":
        fields += [("HA log file", settings.log.removeprefix("file:"))]
    if settings.log_bytes:
        fields += [("Maximum HA log file length", f"{settings.log_bytes} bytes")]
    return _fields(27, [*fields, ("Only Show HA Slots", _yes(settings.only))])


def group_lines(group: Group, width: int | None = None) -> list[str]:
    """One group of it; a `width` has its lists of members broken to fit."""
    parted = ", " if width is None else ",\n" + " " * 22
    fields = [
        ("HA Group Label", group.label),
        ("HA Group Number", group.number),
        ("HA Group Slot ID", group.slot),
        ("Synchronization", _on(group.synchronised)),
        ("Group Members", parted.join((*group.members, *group.standby))),
        ("Needs sync", group.needs_sync),
        ("Standby Members", parted.join(group.standby) or NOBODY),
    ]
    lines = "\n".join(_fields(19, fields)).split("\n")
    if group.rows:
        size = max(12, *(len(row.serial) for row in group.rows)), max(12, *(len(r.label) for r in group.rows))
        lines += ["", f"Slot #    {'Member S/N':<{size[0]}}    {'Member Label':<{size[1]}}    Status"]
        lines += [
            f"{row.slot:<6}    {row.serial:<{size[0]}}    {row.label:<{size[1]}}    {row.status}"
            for row in group.rows
        ]
    return lines


def ha_admin(settings: Settings, groups: Sequence[Group]) -> list[str]:
    """`vtl haAdmin show`."""
    fields = [
        ("HA Proxy", "disabled"),
        ("HA Auto Recovery", _on(settings.retries != 0)),
        ("Maximum Auto Recovery Retry", str(settings.retries)),
        ("Auto Recovery Poll Interval", f"{settings.interval_s:g} seconds"),
        ("HA Logging", _on(settings.log != "off")),
        ("HA Log File", settings.log.removeprefix("file:")),
        *([("Maximum HA Log File Length", f"{settings.log_bytes} bytes")] if settings.log_bytes else []),
        ("Only Show HA Slots", _yes(settings.only)),
    ]
    lines = ["", "================ HA Global Configuration Settings ===============", ""]
    lines += [f"{name}: {value}" for name, value in fields]
    lines += ["", "================ HA Group and Member Information ================"]
    for group in groups:
        lines += [
            "",
            f"HA Group Label: {group.label}",
            f"HA Group Number: {group.number}",
            f"HA Group Slot #: {group.slot}",
            f"Synchronization: {_on(group.synchronised)}",
            f"Group Members: {', '.join((*group.members, *group.standby))}",
            f"Standby members: {', '.join(group.standby)}".rstrip(),
            "",
            f"{'Slot #':<6} {'Member S/N':<16} {'Member Label':<32} Status",
            f"{'=' * 6} {'=' * 16} {'=' * 32} {'=' * 6}",
        ]
        lines += [f"{row.slot:<6} {row.serial:<16} {row.label:<32} {row.status}" for row in group.rows]
    return lines


def slots(found: Sequence[Slot]) -> list[str]:
    """`vtl listSlots`."""
    size = max([20, *(len(slot.label) for slot in found)])
    lines = [f"Number of slots: {len(found)}", "", "The following slots were found:", ""]
    lines += [
        f"{'Slot #':<9} {'Description':<20} {'Label':<{size}} {'Serial #':<16} Status",
        f"{'=' * 9} {'=' * 20} {'=' * size} {'=' * 16} {'=' * 11}",
    ]
    for slot in found:
        words = (slot.description, slot.label, slot.serial) if slot.present else ("-", "-", "-")
        what, label, serial = words
        status = "Present" if slot.present else "Not present"
        lines += [f"{f'slot #{slot.number}':<9} {what:<20} {label:<{size}} {serial:<16} {status}"]
    return lines
