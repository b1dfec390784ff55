"""Runs the command line: whatever goes wrong is one line on stderr and an exit status, never a traceback."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import typer
from typer.main import get_command

from pkcs11_ha.cli.edit import EditError
from pkcs11_ha.cli.module import ModuleError
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.config import ConfigError

GOOD, WRONG, MISUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses: done; it is wrong, or could not be done; the command line is wrong; Ctrl-C."""

NAME = "p11ha"
_SAID = (ConfigError, EditError, ModuleError, OperatorError)  # their text is the line
# Newer typers bring click along under a name of their own: both have these classes in common.
_UsageError: Any = typer.BadParameter.__base__
_ClickException: Any = _UsageError.__base__


def run(app: typer.Typer) -> int:
    """One command of the process's own command line; what its exit status is to be."""
    _have_streams()
    odd = next((word for word in sys.argv[1:] if not _is_text(word)), "")
    if odd:
        shown = os.fsencode(odd).decode("utf-8", "backslashreplace")
        return _say(f"{NAME}: '{shown}' is not UTF-8 text: names and paths must be", MISUSED)
    status = GOOD
    try:
        status = _run(app)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads on
        return _let_go(WRONG)
    except OSError as error:
        return _let_go(status or _say(f"{NAME}: standard output: {error.strerror or error}", WRONG))


def _have_streams() -> None:
    """A stream that was closed reads and writes nothing, and one that has not every letter shows the others escaped."""
    # No file of ours may get the number of a closed stream.  It cannot be written to: who shows a domain key's words
    # there must find that nobody sees them.
    while (taken := os.open(os.devnull, os.O_RDONLY)) <= 2:
        os.set_inheritable(taken, True)
    os.close(taken)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 (stays open)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is


def _let_go(status: int) -> int:
    """What Python flushes at its end goes nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _run(app: typer.Typer) -> int:
    try:
        return int(_strict(app).main(prog_name=NAME, standalone_mode=False) or GOOD)
    except typer.Exit as error:
        return error.exit_code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else GOOD
    except KeyboardInterrupt:
        return INTERRUPTED
    except typer.Abort as error:
        ended = isinstance(error.__cause__ or error.__context__, EOFError)
        return _say("input ended", WRONG) if ended else INTERRUPTED
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # with rich the help has been printed already
            typer.echo(error.format_message() or "", nl=bool(error.format_message()))
            return MISUSED
        return _say(misuse(error), MISUSED)
    except (*_SAID, _ClickException) as error:
        return _say(str(error), WRONG)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 (the last resort: no traceback reaches a user)
        if os.environ.get("P11HA_DEBUG"):
            traceback.print_exc()
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _say(f"{NAME}: {why} (set P11HA_DEBUG=1 for the traceback)", WRONG)


def _is_text(word: str) -> bool:
    """Bytes that are none come as halves of surrogate pairs."""
    return not any("\ud800" <= c <= "\udfff" for c in word)


def _strict(app: typer.Typer) -> Any:
    """The commands, all of which refuse an empty value."""
    command = get_command(app)
    for each in _commands(command):
        _tell_whose(each)
        for parameter in each.params:
            _refuse_empty(parameter)
    return command


def _commands(command: Any) -> Iterator[Any]:
    """The command, and all below it."""
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from _commands(each)


def _tell_whose(command: Any) -> None:
    """Of an option without its value click does not say which command it was given to."""
    parse_args = command.parse_args

    def parsed(context: Any, words: list[str]) -> Any:
        try:
            return parse_args(context, words)
        except _UsageError as error:
            error.ctx = error.ctx or context
            raise

    command.parse_args = parsed


def _refuse_empty(parameter: Any) -> None:
    """Nothing is no value: an unset variable in a script must not count as an option that is left out."""
    process = parameter.process_value

    def checked(context: Any, value: Any) -> Any:
        given = context.get_parameter_source(parameter.name)
        values = value if isinstance(value, list | tuple) else [value]
        if given is not None and given.name == "COMMANDLINE" and "" in values:
            why = "it is empty"
            if parameter.param_type_name == "option":
                why += f": leave it out, or say {parameter.metavar}"
            raise typer.BadParameter(why, ctx=context, param=parameter)
        return process(context, value)

    parameter.process_value = checked


def _say(line: str, status: int) -> int:
    with suppress(OSError):
        typer.echo(one_line(line), err=True)
    return status


def one_line(text: str) -> str:
    """The text as one line that a terminal takes literally."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


def misuse(error: Any) -> str:
    """What is wrong with the command line, and what to type instead."""
    context = error.ctx
    text = str(error.format_message()).rstrip(".")
    option = getattr(error, "option_name", None) or ""
    if option[1:2].isdigit():
        text = f"a number below 0 ({option}) means nothing here"
    if context is None:
        return f"{NAME}: {text}: see {NAME} --help"
    command = context.command
    commands = getattr(command, "commands", None)
    if commands is None:
        arguments = [_argument(each) for each in command.params if each.param_type_name == "argument"]
        usage = " ".join([context.command_path, "[OPTIONS]", *arguments])
        return f"{context.command_path}: {text}: type {usage}"
    if "Did you mean" not in text:
        known = [name for name, each in commands.items() if not each.hidden]
        text += f": there are {', '.join(known)}"
    return f"{context.command_path}: {text}"


def _argument(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name.upper())
    return name if parameter.required else f"[{name}]"
