"""`p11ha ha`: what holds for the library as a whole, recovery above all."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pkcs11_ha import config
from pkcs11_ha.cli.edit import Draft, edited
from pkcs11_ha.cli.options import ConfigPath, DryRun, Json, load, option, value
from pkcs11_ha.config import OPTIONS
from pkcs11_ha.log import parse_target

app = typer.Typer(
    no_args_is_help=True, help="What holds for all groups: recovery, log, what slots are shown."
)

_USUAL_S = (60, 1200)
"""What operators of HSM groups are used to: an attempt can hold up a call, and is not made more often than that."""
_NUMBERS = {"ignore_unknown_options": True}  # -1 is a number


# ---- changes


def recovery(draft: Draft, values: dict[str, object]) -> None:
    """Sets keys of [recovery].  The section comes into being here, and then gives interval and attempts both."""
    if not draft.document.has("recovery"):
        said = asdict(draft.settings.recovery)
        values = {key: said[key] for key in ("interval_s", "attempts")} | values
    draft.document.set("recovery", values)


# ---- commands


@app.command()
def show(path: ConfigPath = "", as_json: Json = False) -> None:
    """Show the settings, and which of them the file gives."""
    settings = load(path)
    sections = {"ha": asdict(settings.ha), "recovery": asdict(settings.recovery)}
    if as_json:
        typer.echo(json.dumps({"configuration": settings.path, **sections}, indent=2))
        return
    typer.echo(f"configuration: {settings.path}")
    written = config.tables(config.read(settings.path), settings.path)
    for section, values in sections.items():
        typer.echo(f"\n[{section}]" if section in written else f"\n[{section}] is not in the file: defaults")
        for key, said in values.items():
            mark = "  (default)" if said == option(section, key).default else ""
            typer.echo(f"{key:20}{json.dumps(said)}{mark}")
    attempts = settings.recovery.attempts
    often = {-1: "without limit", 0: "never"}.get(attempts, f"{attempts} times")
    typer.echo(f"\na lost member is tried again after more than {settings.recovery.interval_s:g} s, {often}")


@app.command(context_settings=_NUMBERS)
def retry(
    count: Annotated[str, typer.Argument(metavar="COUNT", help="Attempts: -1 without limit, 0 none.")],
    path: ConfigPath = "",
    dry_run: DryRun = False,
) -> None:
    """Set how often a lost member is tried again (N)."""
    attempts = value("recovery", "attempts", count, "COUNT")
    with edited(path, dry_run) as draft:
        recovery(draft, {"attempts": attempts})
        if attempts == 0:
            draft.note("recovery is off: a lost member stays away until C_Initialize, or p11ha recover")


@app.command(context_settings=_NUMBERS)
def interval(
    seconds: Annotated[str, typer.Argument(metavar="SECONDS", help="Seconds between two attempts.")],
    path: ConfigPath = "",
    dry_run: DryRun = False,
) -> None:
    """Set how long to wait between two attempts (X)."""
    said = value("recovery", "interval_s", seconds, "SECONDS")
    least, most = _USUAL_S
    with edited(path, dry_run) as draft:
        recovery(draft, {"interval_s": said})
        if said < least:
            draft.note(f"usual are {least} s and more: an attempt may hold up the call that makes it")
        if said > most:
            draft.note(f"usual are {most} s at most: a member that is back waits so long to be taken in")


@app.command()
def recovery_mode(
    mode: Annotated[
        str,
        typer.Argument(
            metavar="call|background",
            help="Within the application's calls, or in a thread of ours too.",
            autocompletion=lambda: ["call", "background"],
        ),
    ],
    path: ConfigPath = "",
    dry_run: DryRun = False,
) -> None:
    """Set who makes the attempts."""
    said = value("recovery", "mode", mode, "MODE")
    with edited(path, dry_run) as draft:
        recovery(draft, {"mode": said})


@app.command()
def only(
    switch: Annotated[
        str,
        typer.Argument(
            metavar="on|off",
            help="on: the groups alone; off: the members' own slots come first.",
            autocompletion=lambda: ["on", "off"],
        ),
    ],
    path: ConfigPath = "",
    dry_run: DryRun = False,
) -> None:
    """Show applications the groups alone, or the members' slots too."""
    if switch not in ("on", "off"):
        raise typer.BadParameter(f"{switch!r}: expected on or off", param_hint="on|off")
    with edited(path, dry_run) as draft:
        draft.document.set("ha", {"only": switch == "on"})
        draft.note("the numbers of slots change: applications that keep them must look again")


def _log(target: str, path: str = "", dry_run: bool = False, **more: str) -> None:
    values = {"log": target} | {f"log_{key}": text for key, text in more.items()}
    said = {key: value("ha", key, text, key) for key, text in values.items() if text}
    if not said:
        raise typer.BadParameter(f"expected {option('ha', 'log').form.words}", param_hint="TARGET")
    with edited(path, dry_run) as draft:
        draft.document.set("ha", said)
        problem = _problem_of_log(Path(parse_target(target))) if target.startswith("file:") else ""
        if problem:
            draft.note(f"{problem}: no line can be written")


def _problem_of_log(file: Path) -> str:
    """Why no application could write there, as far as this one can see."""
    if file.is_dir():
        return f"{file} is a directory"
    return "" if file.parent.is_dir() else f"there is no directory {file.parent}"


def _log_signature() -> inspect.Signature:
    """TARGET, and an option for each option of [ha] whose name begins with log_."""
    target = Annotated[str, typer.Argument(metavar="TARGET", help=option("ha", "log").form.words)]
    parameters: dict[str, tuple[Any, object]] = {
        "target": (target, ""),
        "path": (ConfigPath, ""),
        "dry_run": (DryRun, False),
    }
    for each in OPTIONS:
        if each.section == "ha" and each.name.startswith("log_"):
            name = each.name.removeprefix("log_")
            flag: Any = typer.Option(f"--{name.replace('_', '-')}", metavar="VALUE", help=each.doc)
            parameters[name] = (Annotated[str, flag], "")
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in parameters.items()
        ]
    )


_log.__signature__ = _log_signature()  # type: ignore[attr-defined]
_log.__annotations__ = {name: each.annotation for name, each in _log_signature().parameters.items()}
app.command("log", help="Set where the HA log goes.")(_log)
