"""The command lines of `p11ha status`, `watch`, `metrics` and `events`: what applications show of themselves."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from pkcs11_ha import config
from pkcs11_ha.cli import complete, screen, segments
from pkcs11_ha.cli import status as statuses
from pkcs11_ha.cli.options import ConfigPath, Json, given, load
from pkcs11_ha.core.reload import names_of
from pkcs11_ha.log import EVENTS, IDENT, parse_target

app = typer.Typer()

T = TypeVar("T")


def fail(text: str) -> typer.Exit:
    """One line on stderr, exit status 1."""
    typer.echo(text, err=True)
    return typer.Exit(1)


def _say(skipped: tuple[segments.Skipped, ...]) -> None:
    for each in skipped:
        typer.echo(str(each), err=True)


def _look(path: str) -> Callable[[], segments.Found]:
    """What there is now, of this configuration alone if one is named."""
    directory = config.state_dir(os.environ)

    def look() -> segments.Found:
        found = segments.read_all(directory)
        return segments.Found(tuple(segments.of_configuration(found.processes, path)), found.skipped)

    return look


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
    found = _look(path)()
    if probe or not found.processes:
        _status_of_a_new_process(path, as_json, found.skipped)
    elif as_json:
        typer.echo(json.dumps(statuses.joined_json(found.processes, found.skipped), indent=2))
    else:
        screen.show(segments.join(found.processes), every, Console())
        _say(found.skipped)


def _status_of_a_new_process(path: str, as_json: bool, skipped: tuple[segments.Skipped, ...]) -> None:
    from pkcs11_ha.cli import module  # which brings the core with it

    if path:
        os.environ["PKCS11_HA_CONF"] = path
    try:
        settings = config.load(config.find_path(os.environ))
        with module.initialised() as library:
            groups = statuses.read(library)
    except (config.ConfigError, module.ModuleError) as error:
        raise fail(str(error)) from None
    if as_json:
        typer.echo(json.dumps(statuses.as_json(groups, settings.path, skipped), indent=2))
    else:
        statuses.show(groups, Console())
        _say(skipped)


@app.command()
def watch(
    interval: Annotated[
        str, typer.Option("--interval", metavar="SECONDS", help="Seconds between looks.")
    ] = "1",
    path: ConfigPath = "",
) -> None:
    """Show live what running processes show: q quits, s sorts, f filters."""
    from pkcs11_ha.cli import watch as watching

    every_s = float(given(watching.INTERVAL, interval, "--interval"))
    console = Console()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise fail("watch needs a terminal: p11ha status shows the same once")
    if console.is_dumb_terminal:
        term = os.environ.get("TERM", "")
        raise fail(f"watch cannot draw with TERM={term}: set another, or p11ha status shows the same once")
    with suppress(KeyboardInterrupt):
        watching.watch(_look(path), every_s, console)


@app.command()
def metrics(
    listen: Annotated[
        str, typer.Option("--listen", metavar="[ADDRESS:]PORT", help="Serve them there, on /metrics.")
    ] = "",
    public: Annotated[bool, typer.Option("--public", help="Let --listen be reached by other hosts.")] = False,
    path: ConfigPath = "",
) -> None:
    """Print what running processes show as OpenMetrics, or serve it to Prometheus."""
    from pkcs11_ha.cli import metrics as measured

    if not listen:
        typer.echo(measured.text(_look(path)), nl=False)
        return
    try:
        host, port = measured.address(listen, public)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--listen") from None
    try:
        server = measured.server(_look(path), host, port)
    except OSError as error:
        raise fail(f"{listen}: {error.strerror}") from None
    typer.echo(f"serving on {host} port {server.server_port}", err=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


@app.command()
def events(
    group: Annotated[
        str,
        typer.Argument(metavar="[GROUP]", help="Only of this group.", autocompletion=complete.groups),
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added.")] = False,
    member: Annotated[
        str,
        typer.Option(
            "--member", metavar="NAME", help="Only of this member.", autocompletion=complete.members
        ),
    ] = "",
    event: Annotated[
        str,
        typer.Option(
            "--event",
            metavar="NAME",
            help="Only this one; member.* for all such.",
            autocompletion=complete.events,
        ),
    ] = "",
    since: Annotated[
        str, typer.Option("--since", metavar="WHEN", help="From 10m, 2h, 3d ago, or a time in UTC.")
    ] = "",
    path: ConfigPath = "",
    as_json: Json = False,
) -> None:
    """Show the HA log, rotated files too: one line per event, or with --json one object."""
    from pkcs11_ha.cli import events as logged

    if event and not any(fnmatchcase(name, event) for name in EVENTS):
        like = " or ".join(get_close_matches(event, EVENTS, 3))
        raise typer.BadParameter(
            f"there is no event {event!r}: type {like or 'one of docs/log.md, or member.* for all such'}",
            param_hint="--event",
        )
    try:
        begin = logged.since(since, datetime.now(UTC)) if since else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--since") from None
    configuration = path or config.find_path(os.environ)
    log = _log_file(configuration)
    unknown = _unknown(configuration, group, member)
    if unknown and next(_readable(log, logged.read(log, logged.Wanted(group, member))), None) is None:
        raise fail(unknown)
    wanted = logged.Wanted(group, member, event, begin)
    with suppress(KeyboardInterrupt):
        for entry in _readable(log, logged.follow(log, wanted) if follow else logged.read(log, wanted)):
            typer.echo(json.dumps(entry.as_json()) if as_json else entry.text())


def _readable(log: Path, entries: Iterator[T]) -> Iterator[T]:
    """What is read, and in a line why no more can be; what goes wrong with printing it is no fault of the log."""
    try:
        yield from entries
    except OSError as error:
        raise fail(f"{log}: {error.strerror}") from None


def _unknown(configuration: str, group: str, member: str) -> str:
    """Which of the names the configuration does not have, in a line; empty also where that cannot be told."""
    try:
        settings = load(configuration)
    except config.ConfigError:
        return ""
    labels = [each.label for each in settings.groups]
    if group and group not in labels:
        return f"no group {group!r}: there is {', '.join(labels) or 'none'}"
    names = [n for each in settings.groups if group in ("", each.label) for n in names_of(each)]
    if member and member not in names:
        return f"no member {member!r}{f' in group {group}' if group else ''}: there is {', '.join(names) or 'none'}"
    return ""


def _log_file(configuration: str) -> Path:
    """Where a configuration has its log, though it may be wrong otherwise."""
    config.tables(config.read(configuration), configuration)  # raises ConfigError where it cannot be known
    target = parse_target(config.log_of(configuration)[0])
    if target == "syslog":
        raise fail(f"the HA log goes to syslog: journalctl -t {IDENT}, or grep {IDENT} in the system's log")
    if target in ("stderr", "off"):
        raise fail(
            f'the HA log is kept nowhere (log = "{target}"): set log = "file:/PATH" in {configuration}'
        )
    return Path(target)
