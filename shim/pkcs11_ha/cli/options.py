"""Options and arguments of several commands, and how a text on the command line becomes a configured value."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Annotated, Any

import typer

from pkcs11_ha import config
from pkcs11_ha.cli import complete
from pkcs11_ha.config import OPTIONS, Config, Form, Option
from pkcs11_ha.uri import UriError, parse_pin_source


def pin_file(text: str) -> str:
    """The value of a --pin-source; raises BadParameter, which does not repeat what may be a PIN."""
    try:
        return text and parse_pin_source(text) and text
    except UriError:
        raise typer.BadParameter("expected file:/PATH, a file with the PIN in its first line") from None


ConfigPath = Annotated[
    str,
    typer.Option("--config", metavar="FILE", help="The configuration; else where the library looks for it."),
]
PinSource = Annotated[
    str,
    typer.Option(
        "--pin-source",
        metavar="file:/PATH",
        callback=pin_file,
        help="A file with the PIN; else it is asked for, or the first line of standard input.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be changed, and change nothing.")]


def load(path: str) -> Config:
    """The configuration, for commands that show it: one without a group, too.  Raises ConfigError."""
    found = path or config.find_path(os.environ)
    return config.parse(config.read(found), found, complete=False)


Group = Annotated[
    str, typer.Argument(metavar="GROUP", help="The group's label.", autocompletion=complete.groups)
]
MemberName = Annotated[
    str,
    typer.Argument(metavar="MEMBER", help="The member's name.", autocompletion=complete.members),
]


def option(section: str, name: str) -> Option:
    """The row of the table of options."""
    return next(option for option in OPTIONS if (option.section, option.name) == (section, name))


def value(section: str, name: str, text: str, hint: str) -> Any:
    """What is to be written for an option given as `text`; raises BadParameter, naming `hint`, if it cannot be that."""
    return given(option(section, name).form, text, hint)


def given(form: Form, text: str, hint: str) -> Any:
    """The text, or the number it is, whichever has the form; raises BadParameter, naming `hint`, if neither has."""
    problem = ""
    for candidate in _readings(text):
        try:
            form.read(candidate)
        except ValueError as error:
            problem = problem or str(error)
        else:
            return candidate
    raise typer.BadParameter(f"{text!r}: {problem or f'expected {form.words}'}", param_hint=hint)


def _readings(text: str) -> list[Any]:
    readings: list[Any] = [text]
    if re.fullmatch(r"[-+0-9.eE]+", text):
        for number in (int, float):
            with suppress(ValueError):
                readings.append(number(text))
    return readings
