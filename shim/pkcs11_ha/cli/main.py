"""`p11ha`: operates groups of HSMs.

Exit status: 0 good; 1 something is wrong, said in a line; 2 the command line is, and nothing was done; 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from pkcs11_ha import __version__, config
from pkcs11_ha.cli import check as checks
from pkcs11_ha.cli import complete, facts, ha, member, module, objects, observe, operator, requests, run
from pkcs11_ha.cli import doctor as doctors
from pkcs11_ha.cli import domain as domains
from pkcs11_ha.cli import explain as explaining
from pkcs11_ha.cli import group as groups
from pkcs11_ha.cli.custody import Shares, parse_shares
from pkcs11_ha.cli.luna import commands as luna
from pkcs11_ha.cli.menu.command import demo_menu
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.cli.options import ConfigPath as _Config
from pkcs11_ha.cli.options import Json as _Json
from pkcs11_ha.cli.options import PinSource as _PinSource
from pkcs11_ha.cli.progress import progress
from pkcs11_ha.core.domain import Generation
from pkcs11_ha.runtime.member import MemberState

app = typer.Typer(no_args_is_help=True, add_completion=True, help=__doc__, pretty_exceptions_enable=False)
app.add_typer(observe.app)


def _fail(text: str) -> typer.Exit:
    typer.echo(text, err=True)
    return typer.Exit(1)


def _use(path: str) -> None:
    """Loads the configuration once to say in one line what is wrong with it, and has the library use it."""
    if path:
        os.environ["PKCS11_HA_CONF"] = path
    try:
        config.load(config.find_path(os.environ))
    except config.ConfigError as error:
        raise _fail(str(error)) from None


@app.command()
def check(pin_source: _PinSource = "", path: _Config = "", as_json: _Json = False) -> None:
    """Load the configuration and every member, and say what is wrong with each in one line."""
    _use(path)
    try:
        with module.initialised() as library:
            found = checks.findings(library, pin_source)
    except (module.ModuleError, OperatorError) as error:
        raise _fail(str(error)) from None
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in found], indent=2))
    else:
        for finding in found:
            typer.echo(f"{finding.subject}: {finding.text}")
    raise typer.Exit(0 if all(finding.good for finding in found) else 1)


app.add_typer(groups.app, name="group")
app.add_typer(member.app, name="member")
app.add_typer(ha.app, name="ha")
app.command()(requests.recover)
app.command()(requests.drain)
app.command()(requests.enable)

domain_app = typer.Typer(no_args_is_help=True, help="The key under which a group's keys travel.")
app.add_typer(domain_app, name="domain")

_Group = Annotated[
    str, typer.Argument(metavar="GROUP", help="The group's label.", autocompletion=complete.groups)
]
_Plain = Annotated[
    bool,
    typer.Option("--plain-import", help="Create the key from the clear on members without RSA-OAEP unwrap."),
]
_Shares = Annotated[
    str, typer.Option("--shares", metavar="KofN|none", help="How many words, of how many custodians.")
]


def _shares(text: str) -> Shares | None:
    try:
        return parse_shares(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@contextmanager
def _library(path: str) -> Iterator[module.Library]:
    """The library initialised; what goes wrong is one line on stderr and exit status 1."""
    _use(path)
    try:
        with module.initialised() as library:
            yield library
    except (module.ModuleError, OperatorError) as error:
        raise _fail(str(error)) from None


@domain_app.command("init")
def domain_init(
    group: _Group,
    shares: _Shares = "2of3",
    plain_import: _Plain = False,
    pin_source: _PinSource = "",
    path: _Config = "",
) -> None:
    """Make a domain key on every member, and show its custodians their words, once."""
    wanted = _shares(shares)
    with _library(path) as library:
        slot = operator.slot_of(library, group)
        members = list(slot.members)
        with operator.at_work(slot, members, pin_source) as replication:
            generation = domains.init(replication, members, wanted, plain_import)
    typer.echo(_line(generation, [member.name for member in members]))


@domain_app.command("admit")
def domain_admit(
    name: Annotated[
        str,
        typer.Argument(metavar="MEMBER", help="A new or replaced member.", autocompletion=complete.members),
    ],
    plain_import: _Plain = False,
    pin_source: _PinSource = "",
    path: _Config = "",
) -> None:
    """Bring the domain key, by its custodians' words, and all objects to a member."""
    with _library(path) as library:
        slot, member = operator.slot_with(library, name)
        others = [m for m in slot.members if m is not member and m.state is MemberState.UP]
        with operator.at_work(slot, [*others, member], pin_source) as replication:
            generation = domains.admit(member, others, plain_import)
            with progress(f"to {name}") as report:
                report_of = domains.bring_up(replication, [*others, member], member, generation, report)
    typer.echo(_line(generation, [member.name]))
    typer.echo(str(report_of))


@domain_app.command("rotate")
def domain_rotate(
    group: _Group,
    shares: _Shares = "2of3",
    plain_import: _Plain = False,
    pin_source: _PinSource = "",
    path: _Config = "",
) -> None:
    """Make a new generation of the domain key, put all blobs under it, and destroy the old one."""
    wanted = _shares(shares)
    with _library(path) as library:
        slot = operator.slot_of(library, group)
        members = list(slot.members)
        with operator.at_work(slot, members, pin_source) as replication, progress("rewrapped") as report:
            generation = domains.rotate(members, replication, wanted, plain_import, report)
    typer.echo(_line(generation, [member.name for member in members]))


@domain_app.command("dismiss")
def domain_dismiss(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MEMBER", help="A member that will not come back.", autocompletion=complete.members
        ),
    ],
    group: Annotated[
        str, typer.Argument(metavar="GROUP", help="Its group's label.", autocompletion=complete.groups)
    ],
    pin_source: _PinSource = "",
    path: _Config = "",
) -> None:
    """Keep nothing more for a member; to come back it must be admitted anew."""
    with _library(path) as library:
        slot = operator.slot_of(library, group)
        members = [m for m in slot.members if m.state is MemberState.UP and m.name != name]
        with operator.at_work(slot, members, pin_source) as replication:
            generation, _ = domains.agreed(domains.holders(members))
            replication.party.take_part(members, generation)
            domains.dismiss(replication, members, name)
    typer.echo(f"{name} belongs to {group} no more")


@domain_app.command("show")
def domain_show(
    group: _Group, pin_source: _PinSource = "", path: _Config = "", as_json: _Json = False
) -> None:
    """Show generation and check value of the domain key, and which members hold it."""
    with _library(path) as library:
        slot = operator.slot_of(library, group)
        members = [member for member in slot.members if member.state is MemberState.UP]
        with operator.at_work(slot, members, pin_source):
            lines = domains.overview(slot.members, domains.holders(members))
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in lines], indent=2))
    else:
        for line in lines:
            typer.echo(str(line))
    raise typer.Exit(0 if all(line.good for line in lines) else 1)


def _line(generation: Generation, names: list[str]) -> str:
    return f"domain: generation {generation.number}, check value {generation.check}, on {', '.join(names)}"


@app.command()
def sync(
    group: _Group,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")
    ] = False,
    pin_source: _PinSource = "",
    path: _Config = "",
    as_json: _Json = False,
) -> None:
    """Bring every member what it has missed: objects made, changed and destroyed meanwhile."""
    with _library(path) as library:
        slot = operator.slot_of(library, group)
        members = [member for member in slot.members if member.state is MemberState.UP]
        with operator.at_work(slot, members, pin_source) as replication, ExitStack() as stack:
            domains.take_part(replication, members)
            if dry_run:
                _show_debts(objects.debts(replication), as_json)
                return
            bar = stack.enter_context(progress(group))
            outcomes = objects.sync(replication, lambda _name: bar)
    if as_json:
        done = [{"member": name, **asdict(outcome)} for name, outcome in outcomes.items()]
        typer.echo(json.dumps(done, indent=2))
    else:
        for name, outcome in outcomes.items():
            typer.echo(f"{name}: {outcome}")
    raise typer.Exit(1 if any(outcome.failed for outcome in outcomes.values()) else 0)


def _show_debts(debts: list[objects.Debt], as_json: bool) -> None:
    to_do = {debt.member: [*debt.open, *(f"make {each}" for each in debt.missing)] for debt in debts}
    if as_json:
        typer.echo(json.dumps([{"member": name, "to_do": lines} for name, lines in to_do.items()], indent=2))
        return
    for name, lines in to_do.items():
        typer.echo(f"{name}: {len(lines)} to do")
        for line in lines:
            typer.echo(f"  {line}")


@app.command()
def diff(group: _Group, pin_source: _PinSource = "", path: _Config = "", as_json: _Json = False) -> None:
    """Compare members object by object; keys by what they do on each."""
    with _library(path) as library:
        slot = operator.slot_of(library, group)
        members = [member for member in slot.members if member.state is MemberState.UP]
        with operator.at_work(slot, members, pin_source) as replication:
            domains.take_part(replication, members)
            rows = objects.diff(replication)
    if as_json:
        typer.echo(json.dumps([{**asdict(row), "good": row.good} for row in rows], indent=2))
    else:
        objects.show(rows, [member.name for member in members], Console())
    raise typer.Exit(0 if all(row.good for row in rows) else 1)


luna.register(app)


app.command()(demo_menu)


@app.command()
def doctor(
    user: Annotated[
        str, typer.Option("--user", metavar="NAME", help="Who runs the applications; else who runs this.")
    ] = "",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what is well too, and each mechanism.")
    ] = False,
    path: _Config = "",
    as_json: _Json = False,
) -> None:
    """Look for what is wrong with installation, permissions, members and clocks, and say how to cure it.

    Members are connected as applications do it; no PIN is tried. Notes leave the exit status 0.
    """
    if path:
        os.environ["PKCS11_HA_CONF"] = path
    try:
        whose = facts.user_of(user)
    except KeyError:
        raise typer.BadParameter(f"there is no user {user!r}", param_hint="--user") from None
    findings = doctors.examine(facts.gather(whose), verbose)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = min(shutil.get_terminal_size().columns, 100) if sys.stdout.isatty() else None
        for line in doctors.show(findings, width):
            typer.echo(line)
    raise typer.Exit(0 if doctors.is_good(findings) else 1)


@app.command()
def explain(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CODE|MESSAGE",
            help="A return value by name or number, an event, or a line of the HA log.",
            autocompletion=complete.codes_and_events,
        ),
    ],
    as_json: _Json = False,
) -> None:
    """Say what a return value or a message of the HA log means, and what to do about it."""
    try:
        found = explaining.explain(" ".join(words))
    except explaining.UnknownMessage as error:
        if as_json:
            typer.echo(json.dumps({"nearest": error.nearest}))
        raise _fail(str(error)) from None
    typer.echo(json.dumps(explaining.as_json(found), indent=2) if as_json else explaining.show(found))


@app.command()
def version(as_json: _Json = False) -> None:
    """Print the version."""
    typer.echo(json.dumps({"version": __version__}) if as_json else __version__)


def main() -> int:
    """The entry point of the console script; the exit status."""
    return run.run(app)
