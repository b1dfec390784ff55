"""`p11ha member`: the members of the configuration, listed, edited and tried; and the tokens that could be members."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pkcs11_ha import config
from pkcs11_ha.cli import tokens
from pkcs11_ha.cli.document import render
from pkcs11_ha.cli.edit import Draft, EditError, edited
from pkcs11_ha.cli.group import home_of, member_of
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.cli.options import ConfigPath, DryRun, Json, MemberName, load, option, pin_file, value
from pkcs11_ha.cli.run import one_line
from pkcs11_ha.cli.tokens import ANY, Question, Token
from pkcs11_ha.config import ConfigError
from pkcs11_ha.uri import TokenSelector

app = typer.Typer(no_args_is_help=True, help="The members: tokens of vendor libraries.")

_PATIENCE_S = 20.0  # for a library that nobody knows yet


# ---- changes


def add(draft: Draft, name: str, table: dict[str, object]) -> None:
    """A member that is in no group yet."""
    if any(member.name == name for member in draft.settings.members):
        raise EditError(f"member {name!r} is there already: p11ha member list")
    draft.document.add("member", {"name": name} | table)
    draft.note(f"it serves nobody yet: p11ha member test {name}, then p11ha group create or add-member")


def remove(draft: Draft, name: str) -> None:
    """A member that is in no group."""
    number, _ = member_of(draft.settings, name)
    home = home_of(draft.settings, name)
    if home is not None:
        verb = "remove-standby" if name in home.standby else "remove-member"
        raise EditError(f"{name} is in group {home.label!r}: first p11ha group {verb} {home.label} {name}")
    draft.document.remove("member", number)
    draft.note(f"all objects stay on {name}")


# ---- tokens as members


def entries(
    found: Sequence[Token], path: str, more: dict[str, object], taken: set[str]
) -> list[dict[str, object]]:
    """A [[member]] for each token that is initialised, under a name that is not `taken`."""
    made = []
    for token in found:
        if not token.initialised:
            continue
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", token.label).strip("-.") or "member"
        name = next(n for n in (base, *(f"{base}-{i}" for i in range(2, 1000))) if n not in taken)
        taken.add(name)
        made.append({"name": name, "module": path, "token": _selector(token, found)} | more)
    return made


def _selector(token: Token, found: Sequence[Token]) -> str:
    """The token by what stays with it, and by its slot only where that does not tell it from another."""
    alike = [other for other in found if (other.label, other.serial) == (token.label, token.serial)]
    wanted: list[tuple[str, str | int]] = [("token", token.label)]
    wanted += [("serial", token.serial)] if token.serial else []
    wanted += [("slot-id", token.slot)] if len(alike) > 1 else []
    return str(TokenSelector(tuple(wanted)))


# ---- commands

_Module = Annotated[str, typer.Argument(metavar="MODULE", help="The vendor's PKCS#11 library, a path.")]
_Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="Environment while it is loaded; may be repeated."),
]
_InitArgs = Annotated[
    str, typer.Option("--init-args", metavar="TEXT", help="What C_Initialize gets in pReserved (NSS).")
]


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    env = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{pair!r}: expected NAME=VALUE", param_hint="--env")
        env[name] = text
    return env


def _loading(env: Sequence[str], init_args: str) -> dict[str, object]:
    more: dict[str, object] = {}
    if env:
        more["env"] = _environment(env)
    if init_args:
        more["init_args"] = init_args
    return more


def _readable(path: str) -> str:
    """The absolute path of a library; raises OperatorError where there is none."""
    absolute = Path(path).absolute()
    if not absolute.is_file():
        raise OperatorError(f"{path}: {config.problem_with(str(absolute)) or 'not a regular file'}")
    return str(absolute)


@app.command("list")
def list_members(path: ConfigPath = "", as_json: Json = False) -> None:
    """List the members, as they are configured."""
    settings = load(path)
    rows = []
    for member in settings.members:
        home = home_of(settings, member.name)
        role = "" if home is None else "standby" if member.name in home.standby else "active"
        rows.append(
            {
                "name": member.name,
                "group": home and home.label,
                "role": role,
                "token": str(member.token),
                "module": member.module,
                "host": member.host,
            }
        )
    if as_json:
        typer.echo(json.dumps({"members": rows}, indent=2))
        return
    table = Table(box=None, header_style="bold")
    for name in ("member", "group", "role"):
        table.add_column(name, no_wrap=True)
    for name in ("token", "module", "host"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[key] or "-") for key in ("name", "group", "role", "token", "module", "host")))
    Console().print(table)


@app.command("add")
def add_member(
    name: Annotated[str, typer.Argument(metavar="MEMBER", help="What groups, log and tools call it.")],
    module: _Module,
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="Its token: pkcs11:token=LABEL;serial=…")],
    env: _Env = None,
    init_args: _InitArgs = "",
    pin_source: Annotated[
        str,
        typer.Option(
            "--pin-source",
            metavar="file:/PATH",
            callback=pin_file,
            help=option("member", "pin_source").doc,
        ),
    ] = "",
    instance: Annotated[str, typer.Option(metavar="HOW", help=option("member", "instance").form.words)] = "",
    host: Annotated[str, typer.Option(metavar="WHERE", help=option("member", "host").form.words)] = "",
    path: ConfigPath = "",
    dry_run: DryRun = False,
) -> None:
    """Add a member; p11ha member discover shows what could be one."""
    value("member", "name", name, "MEMBER")
    value("member", "token", token, "TOKEN")
    table: dict[str, object] = {"module": str(Path(module).absolute()), "token": token}
    table |= _loading(env or (), init_args)
    for key, text in (("pin_source", pin_source), ("instance", instance), ("host", host)):
        if text:
            table[key] = value("member", key, text, f"--{key.replace('_', '-')}")
    with edited(path, dry_run) as draft:
        add(draft, name, table)


@app.command("remove")
def remove_member(name: MemberName, path: ConfigPath = "", dry_run: DryRun = False) -> None:
    """Remove a member that is in no group; nothing on its token is touched."""
    with edited(path, dry_run) as draft:
        remove(draft, name)


@app.command("test")
def try_member(
    name: MemberName,
    pin_source: Annotated[
        str,
        typer.Option(
            "--pin-source",
            metavar="file:/PATH",
            callback=pin_file,
            help="A file with the PIN: log in with it, once.",
        ),
    ] = "",
    path: ConfigPath = "",
    as_json: Json = False,
) -> None:
    """Load a member as a new process would, and say what is found.  Without --pin-source nobody logs in."""
    settings = load(path)
    member_of(settings, name)
    table = tokens.table_of(config.read(settings.path), settings.path, name)
    answer = tokens.ask(Question(table, pin_source, settings.recovery.connect_timeout_s))
    if as_json:
        typer.echo(json.dumps({"member": name, "module": table["module"], **asdict(answer)}, indent=2))
    elif answer.tokens:
        (token, *_) = answer.tokens
        lines = {
            "module": table["module"],
            "library": answer.library,
            "token": f"{token.label!r}, serial {token.serial or 'none'}",
            "made by": f"{token.manufacturer}, {token.model}",
            "slot": f"{token.slot}, {token.description}",
            "flags": " ".join(token.flags),
            "mechanisms": token.mechanisms,
            "login": answer.login or "not tried: --pin-source file:/PATH",
        }
        for key, text in lines.items():
            typer.echo(f"{key:12}{one_line(str(text))}")
    if answer.problem and not as_json:
        raise OperatorError(f"{name}: {answer.problem}")
    raise typer.Exit(1 if answer.problem else 0)


@app.command()
def discover(
    module: _Module,
    env: _Env = None,
    init_args: _InitArgs = "",
    path: ConfigPath = "",
    as_json: Json = False,
) -> None:
    """List a library's tokens as members of the configuration, ready to be pasted."""
    where, more = _readable(module), _loading(env or (), init_args)
    answer = tokens.ask(Question({"name": "any", "module": where, "token": ANY} | more, "", _PATIENCE_S))
    if answer.problem and not answer.tokens:
        raise OperatorError(answer.problem)
    taken: set[str] = set()
    with suppress(ConfigError):
        taken = {member.name for member in load(path).members}
    made = entries(answer.tokens, where, more, taken)
    if as_json:
        typer.echo(json.dumps({"members": made, **asdict(answer)}, indent=2))
        return
    typer.echo("\n".join(_listing(answer.tokens, made, answer.library, where)))


def _listing(found: Sequence[Token], made: Sequence[dict[str, Any]], library: str, where: str) -> list[str]:
    lines = [f"# {library}: {len(found)} token{'' if len(found) == 1 else 's'}"]
    tables = iter(made)
    for token in found:
        what = f"{token.manufacturer}, {token.model}, slot {token.slot}, {token.mechanisms} mechanisms"
        if not token.initialised:
            lines += ["", f"# not initialised: {what}"]
            continue
        lines += ["", f"# {what}", *render("member", next(tables)).splitlines()]
    return [line if line.isprintable() else f"# {where}: a line that cannot be shown" for line in lines]
