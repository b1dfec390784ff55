"""`p11ha recover`, `drain` and `enable`: what running applications are asked for, by files in the state directory."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, TypeVar

import typer

from pkcs11_ha import config
from pkcs11_ha.cli import complete, module
from pkcs11_ha.cli.options import ConfigPath, Group, Json, MemberName
from pkcs11_ha.cli.segments import read_all
from pkcs11_ha.config import Config, GroupConfig
from pkcs11_ha.core.reload import names_of
from pkcs11_ha.runtime import requests

T = TypeVar("T")


def recover(
    group: Group,
    member: Annotated[
        str,
        typer.Argument(
            metavar="[MEMBER]", help="One member alone; else all of them.", autocompletion=complete.members
        ),
    ] = "",
    path: ConfigPath = "",
    as_json: Json = False,
) -> None:
    """Have running applications try lost members at once, and give them all their attempts again."""
    settings = _settings(path)
    found = next((g for g in settings.groups if g.label == group), None)
    if found is None:
        raise _fail(f"no group {group!r}: there is {', '.join(g.label for g in settings.groups)}")
    if member and member not in names_of(found):
        raise _fail(f"no member {member!r} in group {group}: there is {', '.join(names_of(found))}")
    state_dir, where = config.state_dir(os.environ), directory()
    asked = _written(where, lambda: requests.ask_to_recover(where, group, member))
    drained = requests.read(where).drained & {member or name for name in names_of(found)}
    refused: dict[str, list[int]] = {}  # member -> the processes that do not try it
    users = 0
    for process in read_all(state_dir).processes:
        for using in process.text.groups if process.text else ():
            if using.label == group:
                users += 1
                for each in using.members:
                    if each.stopped and member in ("", each.name):
                        refused.setdefault(each.name, []).append(process.pid)
    users -= len(refused.get(member, ()))
    if as_json:
        said = {"group": group, "member": member, "serial": asked.serial, "processes": users}
        _print(said | {"pin_refused": refused})
        return
    who = (
        f"{users} process{'' if users == 1 else 'es'}"
        if users
        else f"whoever uses it, unseen in {state_dir},"
    )
    if users or member not in refused:
        typer.echo(f"{group}: {who} will try {member or 'lost members'} at the next call")
    for name in sorted(drained):
        typer.echo(f"{name} is drained and not tried: p11ha enable {name}")
    for name, pids in sorted(refused.items()):
        who = f"process{'' if len(pids) == 1 else 'es'} {', '.join(map(str, sorted(pids)))}"
        typer.echo(f"{name} refused its PIN and is not tried by {who}: correct the PIN, then restart")


def drain(
    member: MemberName,
    force: Annotated[bool, typer.Option("--force", help="Also the last that serves.")] = False,
    path: ConfigPath = "",
    as_json: Json = False,
) -> None:
    """Let a member take no new work, for maintenance, until it is enabled again."""
    settings = _settings(path)
    group = _group_of(settings, member)
    where = directory()
    if not force and member not in requests.read(where).drained and not _others_serve(path, group, member):
        raise _fail(f"no other member of group {group.label} serves: --force drains {member} all the same")
    _written(where, lambda: requests.drain(where, member))
    _said(
        as_json, group, member, f"{member} is drained: no new work until p11ha enable {member}", drained=True
    )


def enable(member: MemberName, path: ConfigPath = "", as_json: Json = False) -> None:
    """Let a drained member take work again."""
    group = _group_of(_settings(path), member)
    where = directory()
    was = _written(where, lambda: requests.enable(where, member))
    text = f"{member} is enabled" if was else f"{member} was not drained"
    _said(as_json, group, member, text, drained=False)


def _said(as_json: bool, group: GroupConfig, member: str, text: str, *, drained: bool) -> None:
    if as_json:
        _print({"group": group.label, "member": member, "drained": drained})
    else:
        typer.echo(text)


def _print(what: dict[str, object]) -> None:
    typer.echo(json.dumps(what, indent=2))


def _fail(text: str) -> typer.Exit:
    typer.echo(text, err=True)
    return typer.Exit(1)


def _settings(path: str) -> Config:
    if path:
        os.environ["PKCS11_HA_CONF"] = path
    try:
        return config.load(config.find_path(os.environ))
    except config.ConfigError as error:
        raise _fail(str(error)) from None


def directory() -> str:
    """Where requests are written.  Applications make it when they begin: what they have not made may be mistyped."""
    state_dir = config.state_dir(os.environ)
    if not os.path.isdir(state_dir):  # noqa: PTH112 (as it was given)
        raise _fail(
            f"{state_dir}: there is no such state directory, so no application uses it:"
            " set PKCS11_HA_STATE to theirs, or make it"
        )
    return requests.directory(state_dir)


def _group_of(settings: Config, member: str) -> GroupConfig:
    for group in settings.groups:
        if member in names_of(group):
            return group
    known = ", ".join(name for group in settings.groups for name in names_of(group))
    raise _fail(f"no member {member!r} in any group: there is {known}")


def _others_serve(path: str, group: GroupConfig, member: str) -> bool:
    """As this host sees it now."""
    if path:
        os.environ["PKCS11_HA_CONF"] = path
    try:
        with module.initialised() as library:
            slot = next(s for s in library.core.slots.values() if s.is_group and s.face.label == group.label)
            return any(other.name != member for other in slot.working())
    except module.ModuleError as error:
        raise _fail(str(error)) from None


def _written(where: str, write: Callable[[], T]) -> T:
    """What `write` answers; that the directory cannot be written is one line."""
    try:
        return write()
    except OSError as error:
        user = str(os.geteuid())
        with suppress(KeyError):
            user = pwd.getpwuid(os.geteuid()).pw_name
        raise _fail(f"user {user} cannot write to {where}: {error.strerror}") from None
