"""Every command's wrong use is one line that says what to type instead, exit status 2, and nothing is changed.

Commands are found in the command line itself, so that one that is new is tested too.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
from rich.markup import render
from typer.main import get_command

from pkcs11_ha.cli import main, run
from tests.cli.p11ha import P11HA, Done, run_here
from tests.cli.test_ha import TEXT


def commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, *path, name)


ALL = dict(commands(get_command(main.app)))
GROUPS = [path for path, command in ALL.items() if hasattr(command, "commands")]
LUNA = ("luna",)  # its line is understood by Luna's grammar, which has tests of its own
LEAVES = [path for path in ALL if path not in GROUPS and path != LUNA]


def arguments_of(path: tuple[str, ...]) -> list[Any]:
    return [each for each in ALL[path].params if each.param_type_name == "argument"]


@pytest.fixture(autouse=True)
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration that no wrong command line touches."""
    path = tmp_path / "pkcs11-ha.toml"
    path.write_text(TEXT)
    monkeypatch.setenv("PKCS11_HA_CONF", str(path))
    monkeypatch.setenv("PKCS11_HA_STATE", str(tmp_path / "state"))
    yield path
    assert path.read_text() == TEXT
    assert list(tmp_path.iterdir()) == [path]


def misused(*line: str) -> str:
    done = run_here(*line)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    (said,) = done.stderr.splitlines()
    assert "Traceback" not in said
    return said


COUNTING = [path for path in LEAVES if all(each.nargs != -1 for each in arguments_of(path))]
NEEDING = [path for path in LEAVES if any(each.required for each in arguments_of(path))]
TAKING_A_PIN = [path for path in LEAVES if any("--pin-source" in each.opts for each in ALL[path].params)]


def test_there_are_commands() -> None:
    assert {("status",), ("check",), ("group", "create"), ("member", "test"), ("ha", "retry")} <= set(LEAVES)
    assert {("check",), ("member", "test"), ("sync",)} <= set(TAKING_A_PIN)
    assert {("status",), ("group", "delete")} <= set(COUNTING)
    assert ("group", "create") in NEEDING


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_a_wrong_option(path: tuple[str, ...]) -> None:
    line = misused(*path, *("x" for _ in arguments_of(path)), "--no-such-option")
    assert line.startswith(f"p11ha {' '.join(path)}: ")
    assert "--no-such-option" in line
    assert f"type p11ha {' '.join(path)} [OPTIONS]" in line


@pytest.mark.parametrize("path", COUNTING, ids=" ".join)
def test_an_argument_too_many(path: tuple[str, ...]) -> None:
    line = misused(*path, *("x" for _ in arguments_of(path)), "one-more")
    assert "one-more" in line
    assert f"type p11ha {' '.join(path)} [OPTIONS]" in line


@pytest.mark.parametrize("path", NEEDING, ids=" ".join)
def test_an_argument_too_few(path: tuple[str, ...]) -> None:
    needed = [each for each in arguments_of(path) if each.required]
    line = misused(*path, *("x" for _ in needed[1:]))
    assert "Missing argument" in line
    assert all(str(each.metavar or each.name.upper()) in line for each in needed)


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_an_option_without_its_value(path: tuple[str, ...]) -> None:
    options = [each for each in ALL[path].params if each.param_type_name == "option"]
    for each in (option for option in options if not option.is_flag):
        said = misused(*path, *("x" for _ in arguments_of(path)), each.opts[0])
        assert each.opts[0] in said
        assert f"type p11ha {' '.join(path)} [OPTIONS]" in said


@pytest.mark.parametrize("path", TAKING_A_PIN, ids=" ".join)
def test_a_pin_where_its_file_is_asked_for(path: tuple[str, ...]) -> None:
    said = misused(*path, *("x" for _ in arguments_of(path)), "--pin-source", "987654")
    assert "'--pin-source': expected file:/PATH" in said
    assert "987654" not in said


@pytest.mark.parametrize("path", GROUPS, ids=" ".join)
def test_a_command_that_does_not_exist(path: tuple[str, ...]) -> None:
    names = list(ALL[path].commands)
    assert names[0] in misused(*path, "zzz")  # all that there are
    typo = names[-1][:-1] + "x" + names[-1][-1]
    assert f"Did you mean '{names[-1]}'" in misused(*path, typo)
    assert "--no-such-option" in misused(*path, "--no-such-option")


@pytest.mark.parametrize("path", GROUPS, ids=" ".join)
def test_no_command_at_all_is_helped(path: tuple[str, ...]) -> None:
    done = run_here(*path)
    assert (done.returncode, done.stderr) == (2, "")
    assert all(name in done.stdout for name in ALL[path].commands)


@pytest.mark.parametrize("path", [path for path in ALL if path != LUNA], ids=" ".join)
def test_help_is_there_and_fits(path: tuple[str, ...]) -> None:
    done = run_here(*path, "--help", COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert ALL[path].help


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_nothing_is_no_value(path: tuple[str, ...]) -> None:
    """Also not of an option: an unset variable of a script must not mean all, or the usual."""
    given = ["x" for _ in arguments_of(path)]
    for number, each in enumerate(arguments_of(path)):
        line = misused(*path, *given[:number], "", *given[number + 1 :])
        assert f"'{each.metavar}': it is empty: " in line
    for option in ALL[path].params:
        if option.param_type_name == "option" and not option.is_flag:
            line = misused(*path, *given, option.opts[0], "")
            assert f"'{option.opts[0]}': it is empty: leave it out, or say {option.metavar}: " in line


def test_what_is_not_utf8_is_named() -> None:
    said = "p11ha: '\\xff\\xfe' is not UTF-8 text: names and paths must be"
    for line in (["demo-menu", "--module"], ["group", "rename", "prod"], ["luna", "hagroup"], []):
        assert misused(*line, "\udcff\udcfe") == said
    assert "'/tmp/ü\\xff'" in misused("ha", "log", "file:/tmp", "--config", "/tmp/ü\udcff")


def test_a_number_out_of_bounds_is_told_them() -> None:
    for wrong in ("nan", "0", "1e400", "3601", "1_0", "often"):
        assert "expected a number of seconds from 0.1 to 3600" in misused("watch", "--interval", wrong)
    for wrong in ("-1", "1.0", "18446744073709551616", "x"):
        assert "expected a slot number" in misused("demo-menu", "--slot", wrong)
    assert "a number below 0 (-1) means nothing here: type p11ha explain" in misused("explain", "-1")


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_no_help_is_taken_for_markup(path: tuple[str, ...]) -> None:
    """rich would leave out what stands in brackets."""
    for text in (ALL[path].help, *(getattr(each, "help", None) for each in ALL[path].params)):
        assert text is None or render(text).plain == text


def test_a_typo_in_an_option_is_recognised() -> None:
    assert "--config" in misused("status", "--cofig", "x")


@pytest.mark.parametrize("line", [["recover", "prod"], ["drain", "--force", "east"], ["enable", "east"]])
def test_a_state_directory_that_nobody_uses(conf: Path, line: list[str]) -> None:
    """It may be mistyped: it is not made."""
    done = run_here(*line)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{conf.parent}/state: there is no such state directory, so no application uses it:"
        " set PKCS11_HA_STATE to theirs, or make it\n"
    )


# ---- what else may happen


def ending(body: Callable[[], None]) -> Done:
    """How a command ends whose body does this."""
    app = typer.Typer()
    app.command()(body)
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["p11ha"]), redirect_stdout(out), redirect_stderr(err):
        status = run.run(app)
    return subprocess.CompletedProcess([], status, out.getvalue(), err.getvalue())


def test_what_nobody_foresaw_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("two\nlines \x1b[31m")

    ended = ending(fail)
    assert ended.returncode == 1
    assert ended.stderr.startswith("p11ha: KeyError: ")
    assert ended.stderr.endswith("(set P11HA_DEBUG=1 for the traceback)\n")
    assert len(ended.stderr.splitlines()) == 1
    assert "\x1b" not in ended.stderr

    monkeypatch.setenv("P11HA_DEBUG", "1")
    assert "Traceback" in ending(fail).stderr


def test_ctrl_c_and_the_end_of_input() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def ask() -> None:
        typer.prompt("really")

    assert (ending(interrupt).returncode, ending(interrupt).stderr) == (130, "")
    with patch.object(sys, "stdin", io.StringIO()):
        ended = ending(ask)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (1, "input ended")


def test_an_exit_status_is_kept() -> None:
    def leave() -> None:
        raise typer.Exit(7)

    assert ending(leave).returncode == 7


@pytest.mark.parametrize("line", [["ha", "show"], ["--help"], ["ha", "show", "--json"]])
def test_nobody_reads_on(line: list[str]) -> None:
    with subprocess.Popen([P11HA, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout
        assert done.stderr
        done.stdout.close()
        assert done.stderr.read() == b""
    assert done.returncode == 1


def shell(redirection: str, *line: str, **env: str) -> Done:
    """With streams as the shell makes them."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", str(P11HA), *line],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | env,
    )


@pytest.mark.parametrize(
    ("redirection", "line", "status"),
    [
        (">&-", ("version",), 0),
        ("<&- >&- 2>&-", ("ha", "show", "--json"), 0),
        (">&-", ("--help",), 0),
        ("2>&-", ("group", "show", "nope"), 1),
        (">&- 2>&-", ("ha", "retry"), 2),
        ("<&-", ("demo-menu", "--module", "/nonexistent"), 1),
    ],
)
def test_a_closed_stream_reads_and_writes_nothing(
    redirection: str, line: tuple[str, ...], status: int
) -> None:
    done = shell(redirection, *line)
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_a_key_whose_words_nobody_would_see_is_not_made() -> None:
    script = (
        "from pkcs11_ha.cli import custody, main, run\n"
        "def make():\n"
        "    try:\n"
        "        custody.make([], custody.Shares(1, 1))\n"
        "    except custody.CustodyError as error:\n"
        "        raise run.ModuleError(str(error))\n"
        "main.app.command('make')(make)\n"
        "main.main() == 1 or print('made')\n"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" make >&-', sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "file descriptor 1 cannot be written: Bad file descriptor\n"


def test_letters_that_the_output_does_not_have_are_escaped(tmp_path: Path) -> None:
    beside = tmp_path / "names"
    beside.mkdir()
    named = beside / "pkcs11-ha.toml"
    named.write_text(TEXT.replace('"prod"', '"prod é"'))
    try:
        done = shell("", "group", "list", "--config", str(named), PYTHONIOENCODING="ascii")
    finally:
        named.unlink()
        beside.rmdir()
    assert (done.returncode, done.stderr) == (0, "")
    assert "prod \\xe9" in done.stdout


@pytest.mark.parametrize("line", [("ha", "show"), ("ha", "retry", "77", "--dry-run")])
def test_a_full_disk_is_a_line(line: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([P11HA, *line], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert "pkcs11-ha.toml" not in done.stderr
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "No space left on device" in done.stderr
