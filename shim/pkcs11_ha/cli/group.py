"""`p11ha group`: the groups of the configuration, listed and edited."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pkcs11_ha import config
from pkcs11_ha.cli import complete, tokens
from pkcs11_ha.cli.edit import Draft, EditError, edited
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.cli.options import (
    ConfigPath,
    DryRun,
    Group,
    Json,
    MemberName,
    load,
    option,
    value,
)
from pkcs11_ha.config import Config, GroupConfig, MemberConfig
from pkcs11_ha.runtime.core import SERIAL_SIZE
from pkcs11_ha.runtime.identity_file import remembered

app = typer.Typer(no_args_is_help=True, help="The groups of the configuration.")


# ---- what can be found


def group_of(settings: Config, label: str) -> tuple[int, GroupConfig]:
    """Its place in the file, and what it says; raises EditError."""
    for number, group in enumerate(settings.groups):
        if group.label == label:
            return number, group
    known = ", ".join(repr(group.label) for group in settings.groups) or "none: p11ha group create"
    raise EditError(f"no group {label!r}: there is {known}")


def member_of(settings: Config, name: str) -> tuple[int, MemberConfig]:
    """Its place in the file, and what it says; raises EditError."""
    for number, member in enumerate(settings.members):
        if member.name == name:
            return number, member
    known = ", ".join(member.name for member in settings.members) or "none: p11ha member add"
    raise EditError(f"no member {name!r}: there is {known}")


def home_of(settings: Config, name: str) -> GroupConfig | None:
    """The group that a member is in."""
    return next((group for group in settings.groups if name in (*group.members, *group.standby)), None)


def _free(settings: Config, name: str) -> None:
    """Raises EditError for a member that does not exist, or is in a group."""
    member_of(settings, name)
    home = home_of(settings, name)
    if home is not None:
        verb = "remove-standby" if name in home.standby else "remove-member"
        raise EditError(f"{name} is in group {home.label!r}: p11ha group {verb} {home.label} {name}")


# ---- changes


def create(draft: Draft, label: str, members: list[str], standby: list[str], more: dict[str, object]) -> None:
    """A group of members that are in none."""
    if any(group.label == label for group in draft.settings.groups):
        raise EditError(f"group {label!r} is there already: p11ha group show {label}")
    for name in (*members, *standby):
        _free(draft.settings, name)
    both = [*members, *standby]
    twice = next((name for name in both if both.count(name) > 1), None)
    if twice is not None:
        raise EditError(f"{twice} is named twice")
    table: dict[str, object] = {"label": label, "members": members}
    if standby:
        table["standby"] = standby
    draft.document.add("group", table | more)
    if more.get("replication", "none") == "none":
        draft.note(
            "keys made elsewhere must be on all members already: applications find what any of them has"
        )
    else:
        draft.note(f"make its domain key next: p11ha domain init {label}")


def delete(draft: Draft, label: str) -> None:
    """The group alone: its members stay configured, and all objects stay on them."""
    number, group = group_of(draft.settings, label)
    if len(draft.settings.groups) == 1:
        raise EditError(
            f"{label!r} is the only group, and without one no application starts: create another first"
        )
    draft.document.remove("group", number)
    draft.note(f"all objects stay on the members {', '.join((*group.members, *group.standby))}")
    draft.note(f"applications that look for the token {label!r} find it no more")


def add(draft: Draft, label: str, name: str) -> None:
    """A new active member, behind the others; a standby of the group becomes active."""
    number, group = group_of(draft.settings, label)
    if name in group.standby:
        _lists(draft, number, [*group.members, name], [each for each in group.standby if each != name])
        return
    if name in group.members:
        return
    _free(draft.settings, name)
    _lists(draft, number, [*group.members, name], list(group.standby))
    _note_new(draft, group, name)


def add_standby(draft: Draft, label: str, name: str, serial: str) -> None:
    """A new standby; an active member of the group becomes one."""
    number, group = group_of(draft.settings, label)
    if name in group.standby:
        return
    if name in group.members:
        _leave_active(draft, number, group, name, serial)
        _lists(draft, number, [each for each in group.members if each != name], [*group.standby, name])
        return
    _free(draft.settings, name)
    _lists(draft, number, list(group.members), [*group.standby, name])
    _note_new(draft, group, name)


def remove(draft: Draft, label: str, name: str, serial: str) -> None:
    """An active member leaves the group."""
    number, group = group_of(draft.settings, label)
    if name in group.standby:
        raise EditError(f"{name} is a standby: p11ha group remove-standby {label} {name}")
    if name not in group.members:
        raise EditError(f"{name} is not in group {label!r}: there is {', '.join(group.members)}")
    _leave_active(draft, number, group, name, serial)
    _lists(draft, number, [each for each in group.members if each != name], list(group.standby))
    _note_gone(draft, group, name)


def remove_standby(draft: Draft, label: str, name: str) -> None:
    """A standby leaves the group."""
    number, group = group_of(draft.settings, label)
    if name in group.members:
        raise EditError(f"{name} is an active member: p11ha group remove-member {label} {name}")
    if name not in group.standby:
        known = ", ".join(group.standby) or "none"
        raise EditError(f"{name} is no standby of group {label!r}: there is {known}")
    _lists(draft, number, list(group.members), [each for each in group.standby if each != name])
    draft.note(f"to have it as an active member instead: p11ha group add-member {label} {name}")
    _note_gone(draft, group, name)


def rename(draft: Draft, label: str, new: str) -> None:
    """Another label, and the same serial."""
    number, _ = group_of(draft.settings, label)
    if new != label and any(group.label == new for group in draft.settings.groups):
        raise EditError(f"group {new!r} is there already: p11ha group show {new}")
    draft.document.set("group", {"label": new}, number)
    draft.note(f"applications that look for the token {label!r} must look for {new!r} from now on")


def _lists(draft: Draft, number: int, members: list[str], standby: list[str]) -> None:
    was = draft.settings.groups[number]
    lists = {"members": (was.members, members), "standby": (was.standby, standby)}
    changed = {key: new for key, (old, new) in lists.items() if list(old) != new}
    draft.document.set("group", changed, number)


def _note_new(draft: Draft, group: GroupConfig, name: str) -> None:
    if group.replication == "domain":
        draft.note(f"it takes part once it has the domain key: p11ha domain admit {name}")
    else:
        draft.note(f"{name} must have the group's keys already, as replication is {group.replication!r}")


def _note_gone(draft: Draft, group: GroupConfig, name: str) -> None:
    draft.note(f"all objects stay on {name}")
    if group.replication == "domain":
        draft.note(f"if it will not come back: p11ha domain dismiss {name} {group.label}")


def _leave_active(draft: Draft, number: int, group: GroupConfig, name: str, serial: str) -> None:
    """What must hold when a member stops being an active one: another is left, and the serial stays."""
    if len(group.members) == 1:
        raise EditError(
            f"{name} is the last active member of {group.label!r}: add another first, "
            f"or p11ha group delete {group.label}"
        )
    derived = group.serial is None and name == group.members[0]
    if serial and not derived:
        raise EditError(f"the serial of {group.label!r} stays as it is: leave --serial out")
    if derived:
        kept = serial or derived_serial(draft, group)
        draft.document.set("group", {"serial": kept}, number)
        draft.note(f"serial {kept} is written, as applications store it and it came from {name}")


def derived_serial(draft: Draft, group: GroupConfig) -> str:
    """The serial that applications have seen of a group that is given none; raises EditError if nobody knows it."""
    _, first = member_of(draft.settings, group.members[0])
    said = first.token.serial
    if said:
        return f"1{said}"[:SERIAL_SIZE]
    table = tokens.table_of(draft.document.text, draft.path, first.name)
    try:
        answer = tokens.ask(tokens.Question(table, "", draft.settings.recovery.connect_timeout_s))
        why = answer.problem
        if answer.tokens and not why:
            return f"1{answer.tokens[0].serial}"[:SERIAL_SIZE]
    except OperatorError as error:
        why = str(error)
    known = remembered(config.state_dir(os.environ)).get(group.label)
    if known:
        return known
    raise EditError(
        f"{group.label}: its serial comes from {first.name}, which cannot be asked ({why}): "
        "say it with --serial, as applications know it"
    )


# ---- commands

_Members = Annotated[
    list[str],
    typer.Argument(
        metavar="MEMBER...", help="Its active members, the primary first.", autocompletion=complete.members
    ),
]
_Serial = Annotated[
    str,
    typer.Option("--serial", metavar="SERIAL", help="The group's serial, as applications know it."),
]


def _checked(name: str, text: str, hint: str) -> str:
    return str(value("group", name, text, hint))


@app.command("list")
def list_groups(path: ConfigPath = "", as_json: Json = False) -> None:
    """List the groups, as they are configured."""
    settings = load(path)
    if as_json:
        typer.echo(json.dumps({"groups": [asdict(group) for group in settings.groups]}, indent=2))
        return
    table = Table(
        "group", "serial", "members", "standby", "balance", "replication", box=None, header_style="bold"
    )
    for group in settings.groups:
        table.add_row(
            group.label,
            group.serial or "-",
            ", ".join(group.members),
            ", ".join(group.standby) or "-",
            group.balance,
            group.replication,
        )
    Console().print(table)


@app.command()
def show(label: Group, path: ConfigPath = "", as_json: Json = False) -> None:
    """Show a group: what is configured, and what holds by default."""
    settings = load(path)
    _, group = group_of(settings, label)
    members = [member_of(settings, name)[1] for name in (*group.members, *group.standby)]
    if as_json:
        listed = [
            {"name": m.name, "module": m.module, "token": str(m.token), "host": m.host} for m in members
        ]
        typer.echo(json.dumps(asdict(group) | {"member": listed}, indent=2))
        return
    for key, said in asdict(group).items():
        text = ", ".join(said) if isinstance(said, tuple) else said
        default = option("group", key).default
        if said is None:
            text = f'"1" and the serial of {group.members[0]}'
        typer.echo(f"{key:24}{text}{'  (default)' if said == default and said != () else ''}")
    for member in members:
        typer.echo(f"\n{member.name}: {'standby' if member.name in group.standby else 'active'}")
        typer.echo(f"  {member.module}\n  {member.token}")


@app.command("create")
def create_group(
    label: Annotated[
        str, typer.Argument(metavar="GROUP", help="Its label: the token that applications see.")
    ],
    members: _Members,
    standby: Annotated[
        list[str] | None,
        typer.Option(
            "--standby", metavar="MEMBER", help="A standby; may be repeated.", autocompletion=complete.members
        ),
    ] = None,
    serial: _Serial = "",
    balance: Annotated[str, typer.Option(metavar="HOW", help=option("group", "balance").form.words)] = "",
    replication: Annotated[
        str, typer.Option(metavar="HOW", help=option("group", "replication").form.words)
    ] = "",
    path: ConfigPath = "",
    dry_run: DryRun = False,
) -> None:
    """Make a group of members that are configured (p11ha member add)."""
    _checked("label", label, "GROUP")
    said = {"serial": serial, "balance": balance, "replication": replication}
    more: dict[str, object] = {key: _checked(key, text, f"--{key}") for key, text in said.items() if text}
    with edited(path, dry_run) as draft:
        create(draft, label, members, standby or [], more)


@app.command("delete")
def delete_group(label: Group, path: ConfigPath = "", dry_run: DryRun = False) -> None:
    """Delete a group; its members stay configured, and all objects stay on them."""
    with edited(path, dry_run) as draft:
        delete(draft, label)


@app.command()
def add_member(label: Group, name: MemberName, path: ConfigPath = "", dry_run: DryRun = False) -> None:
    """Add an active member to a group; a standby of it becomes active."""
    with edited(path, dry_run) as draft:
        add(draft, label, name)


@app.command()
def remove_member(
    label: Group, name: MemberName, serial: _Serial = "", path: ConfigPath = "", dry_run: DryRun = False
) -> None:
    """Take an active member out of a group; its objects stay on it."""
    serial = serial and _checked("serial", serial, "--serial")
    with edited(path, dry_run) as draft:
        remove(draft, label, name, serial)


@app.command("add-standby")
def add_standby_member(
    label: Group, name: MemberName, serial: _Serial = "", path: ConfigPath = "", dry_run: DryRun = False
) -> None:
    """Add a standby to a group: it serves when no active member is left.  An active member becomes one."""
    serial = serial and _checked("serial", serial, "--serial")
    with edited(path, dry_run) as draft:
        add_standby(draft, label, name, serial)


@app.command("remove-standby")
def remove_standby_member(
    label: Group, name: MemberName, path: ConfigPath = "", dry_run: DryRun = False
) -> None:
    """Take a standby out of a group; its objects stay on it."""
    with edited(path, dry_run) as draft:
        remove_standby(draft, label, name)


@app.command("rename")
def rename_group(
    label: Group,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The label that it is to have.")],
    path: ConfigPath = "",
    dry_run: DryRun = False,
) -> None:
    """Give a group another label; its serial stays."""
    _checked("label", new, "NEW")
    with edited(path, dry_run) as draft:
        rename(draft, label, new)
