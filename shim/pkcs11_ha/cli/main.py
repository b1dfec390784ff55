"""`p11ha`: the commands.  Exit status 0 good, 1 something is wrong, 2 the command line is."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.console import Console

from pkcs11_ha import __version__, config
from pkcs11_ha.cli import check as checks
from pkcs11_ha.cli import module
from pkcs11_ha.cli import status as statuses

app = typer.Typer(no_args_is_help=True, add_completion=True, help=__doc__, pretty_exceptions_enable=False)

_Config = Annotated[
    str,
    typer.Option("--config", metavar="FILE", help="The configuration; else where the library looks for it."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
def status(path: _Config = "", as_json: _Json = False) -> None:
    """Show the groups and their members, as this host sees them now."""
    _use(path)
    try:
        with module.initialised() as library:
            groups = statuses.read(library)
    except module.ModuleError as error:
        raise _fail(str(error)) from None
    if as_json:
        typer.echo(json.dumps(statuses.as_json(groups), indent=2))
    else:
        statuses.show(groups, Console())


@app.command()
def check(path: _Config = "", as_json: _Json = False) -> None:
    """Load the configuration and every member, and say what is wrong with each in one line."""
    _use(path)
    try:
        with module.initialised() as library:
            found = checks.findings(library)
    except module.ModuleError as error:
        raise _fail(str(error)) from None
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in found], indent=2))
    else:
        for finding in found:
            typer.echo(f"{finding.subject}: {finding.text}")
    raise typer.Exit(0 if all(finding.good for finding in found) else 1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """The entry point of the console script."""
    app()
