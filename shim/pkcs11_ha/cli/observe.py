"""The command lines of `p11ha status`, `watch`, `metrics` and `events`: what applications show of themselves."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.console import Console

from pkcs11_ha import config
from pkcs11_ha.cli import screen, segments
from pkcs11_ha.cli import status as statuses
from pkcs11_ha.cli.options import ConfigPath, Json

app = typer.Typer()


def fail(text: str) -> typer.Exit:
    """One line on stderr, exit status 1."""
    typer.echo(text, err=True)
    return typer.Exit(1)


def _say(skipped: tuple[str, ...]) -> None:
    for line in skipped:
        typer.echo(line, err=True)


@app.command()
def status(
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the library and try every member, as a new process would.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Show every process, however many.")] = False,
    path: ConfigPath = "",
    as_json: Json = False,
) -> None:
    """Show the groups and their members, as running processes see them; without any, as a new one would."""
    found = segments.read_all(config.state_dir(os.environ))
    processes = segments.of_configuration(found.processes, path)
    if probe or not processes:
        _status_of_a_new_process(path, as_json, found.skipped)
    elif as_json:
        typer.echo(json.dumps(statuses.joined_json(processes, found.skipped), indent=2))
    else:
        screen.show(segments.join(processes), every, Console())
        _say(found.skipped)


def _status_of_a_new_process(path: str, as_json: bool, skipped: tuple[str, ...]) -> None:
    from pkcs11_ha.cli import module  # which brings the core with it

    if path:
        os.environ["PKCS11_HA_CONF"] = path
    try:
        config.load(config.find_path(os.environ))
        with module.initialised() as library:
            groups = statuses.read(library)
    except (config.ConfigError, module.ModuleError) as error:
        raise fail(str(error)) from None
    if as_json:
        typer.echo(json.dumps({**statuses.as_json(groups), "skipped": skipped}, indent=2))
    else:
        statuses.show(groups, Console())
        _say(skipped)
