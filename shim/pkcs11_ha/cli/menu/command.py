"""`p11ha demo-menu`: the command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pkcs11_ha.cli import module
from pkcs11_ha.cli.meanings import meaning
from pkcs11_ha.cli.menu.client import CallError, Client
from pkcs11_ha.cli.menu.desk import Options
from pkcs11_ha.cli.menu.dialogue import Dialogue, NotDone, Script, Source, Terminal, numbered, script_of
from pkcs11_ha.cli.menu.loop import Menu
from pkcs11_ha.cli.options import given
from pkcs11_ha.config import Form, find_path, load


def _slot(given: object) -> object:
    if not isinstance(given, int) or not 0 <= given < 1 << 64:
        raise ValueError
    return given


_SLOT = Form("a slot number", _slot)


def demo_menu(
    path: Annotated[
        Path | None, typer.Option("--module", metavar="PATH", help="A PKCS#11 module; else the group's own.")
    ] = None,
    number: Annotated[str, typer.Option("--slot", metavar="N", help="The slot that Enter selects.")] = "",
    script: Annotated[
        Path | None,
        typer.Option(
            "--script", metavar="FILE", help="Numbers and answers, one a line; - is standard input."
        ),
    ] = None,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="A script goes on after an error; exit status 1 all the same."),
    ] = False,
    init_args: Annotated[
        str,
        typer.Option("--init-args", metavar="TEXT", help="For C_Initialize's pReserved, as NSS wants it."),
    ] = "",
    config: Annotated[
        str,
        typer.Option(
            "--config", metavar="FILE", help="The configuration; else where the library looks for it."
        ),
    ] = "",
) -> None:
    """Try a token by hand, by the numbers of CKDemo's menu."""
    slot = given(_SLOT, number, "--slot") if number else None
    if config:
        os.environ["PKCS11_HA_CONF"] = config
    # Whatever is typed, or called so on a token, can be shown; a byte order mark is nothing that was typed.
    for stream, encoding in ((sys.stdin, "utf-8-sig"), (sys.stdout, "utf-8")):
        stream.reconfigure(encoding=encoding, errors="surrogateescape")  # type: ignore[union-attr]
    failed = 0
    try:
        source = _source(script)
        if path is None:
            load(
                find_path(os.environ)
            )  # the module would say what is wrong with it, and C_Initialize that something is
        with _initialised(path or module.path(), init_args) as client:
            options = Options(slot=slot, keep_going=keep_going)
            menu = Menu(client, Dialogue(source), options, _again(client.path, slot, init_args))
            try:
                failed = menu.run(source)
            finally:
                failed += menu.wait_for_background()
    except (module.ModuleError, NotDone) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if failed and not source.interactive:
        typer.echo(f"{failed} failed", err=True)
        raise typer.Exit(1)


def _source(script: Path | None) -> Source:
    """Where numbers come from; raises NotDone."""
    if script is not None and str(script) != "-":
        return script_of(script, numbered(script), sys.stdout)
    if script is None and sys.stdin.isatty():
        return Terminal(sys.stdin, sys.stdout)
    # Line by line: what writes them may wait for the answer to the one before.
    return Script("standard input", enumerate(iter(sys.stdin.readline, ""), 1), sys.stdout)


def _again(path: Path, slot: int | None, init_args: str) -> tuple[str, ...]:
    """The same module for a menu in another process."""
    words = ["--module", str(path.absolute())]
    words += ["--init-args", init_args] if init_args else []
    return (*words, *(() if slot is None else ("--slot", str(slot))))


@contextmanager
def _initialised(path: Path, init_args: str) -> Iterator[Client]:
    """C_Initialize to C_Finalize; raises ModuleError."""
    client = Client(path)
    before = signal.signal(signal.SIGINT, lambda *_: client.interrupt())
    try:
        try:
            client.initialize(init_args)
        except CallError as error:
            raise module.ModuleError(f"{path}: {error}: {meaning(error.rv)}") from None
        try:
            yield client
        finally:
            client.finalize()
    finally:
        signal.signal(signal.SIGINT, before)
