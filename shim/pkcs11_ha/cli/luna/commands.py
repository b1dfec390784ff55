"""The two commands on p11ha's command line: `import-luna`, and `luna`, whose words Luna's grammar reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pkcs11_ha import config
from pkcs11_ha.cli.edit import path_to_edit
from pkcs11_ha.cli.luna import grammar, importing, verbs
from pkcs11_ha.cli.luna.grammar import UsageError
from pkcs11_ha.cli.module import ModuleError
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.config import ConfigError


def _said(command: str, work: Callable[[], None]) -> None:
    """Does it; what goes wrong is one line and the exit status."""
    try:
        work()
    except UsageError as error:
        typer.echo(f"p11ha {command}: {error}", err=True)
        raise typer.Exit(2) from None
    except (ConfigError, OperatorError, ModuleError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def luna(words: Annotated[list[str], typer.Argument(metavar="COMMAND...")] = []) -> None:  # noqa: B006
    """Take Luna's commands: hagroup, haAdmin, listSlots (p11ha luna help)."""
    if not words:
        typer.echo("\n".join(grammar.help_lines()))
        raise typer.Exit(2)
    _said("luna", lambda: typer.echo(verbs.run(words)))


def import_luna(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Chrystoki.conf, crystoki.ini, or its directory.")
    ],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="Where to write it; else where the library looks.")
    ] = "",
    module: Annotated[
        str, typer.Option("--module", metavar="PATH", help="A library instead of the file's.")
    ] = "",
    client_config: Annotated[
        str,
        typer.Option(
            "--client-config",
            metavar="DIR",
            help="Write Luna's library a file of its own there, without groups; members use it.",
        ),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a configuration that is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make our configuration of Luna's."""
    _said("import-luna", lambda: _import(file, output, module, client_config, force, dry_run, as_json))


def _import(
    file: str, output: str, module: str, client_config: str, force: bool, dry_run: bool, as_json: bool
) -> None:
    source = config.luna_file(file) if Path(file).is_dir() else file
    target = output or path_to_edit({k: v for k, v in os.environ.items() if k != config.LUNA_PATH})
    _check_paths(module, client_config, target)
    text, translation = importing.translate(source, module, client_config)
    if Path(target).exists() and not force and not dry_run:
        raise OperatorError(f"{target} is there already: --force replaces it, --output FILE writes another")
    own = ""
    if client_config and not dry_run:
        own = importing.write_client_config(source, text, client_config)
    make = importing.check if dry_run else importing.write
    try:
        settings = make(source, target, translation)
    except (ConfigError, OperatorError):
        if own:
            Path(own).unlink()  # nobody is to find it who was not told of it
        raise
    if as_json:
        typer.echo(importing.as_json(target, own, dry_run, translation, settings))
        return
    if dry_run:
        typer.echo(importing.render(source, translation))
    for remark in translation.remarks:
        typer.echo(f"{source}: {remark}" if remark.line is None else f"{source}:{remark.line}: {remark.text}")
    typer.echo("")
    typer.echo("\n".join(importing.side_by_side(translation, settings)))
    typer.echo("")
    typer.echo(f"would write {target}" if dry_run else f"wrote {target}")
    if own:
        typer.echo(f"wrote {own}")


def _check_paths(module: str, client_config: str, target: str) -> None:
    """Raises UsageError."""
    for name, path in (("--module", module), ("--client-config", client_config)):
        if path and not path.startswith("/"):
            raise UsageError(f"{name} {path!r}: type an absolute path")
    if module and not os.access(module, os.R_OK):
        raise UsageError(f"--module {module!r}: there is no such file: type the path of a PKCS#11 library")
    if config.is_luna(target):
        raise UsageError(
            f"--output {target!r}: type a name that ends in .toml, for .conf and .ini are Luna's"
        )


def register(app: typer.Typer) -> None:
    """The commands on the command line."""
    raw = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}
    app.command("luna", context_settings=raw)(luna)
    app.command("import-luna")(import_luna)
