"""The man pages and the shells' completion, as `make build` leaves them for `make install`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

import build
from demo.members import SoftToken
from pkcs11_ha.cli import manual
from pkcs11_ha.cli.main import app
from pkcs11_ha.config import OPTIONS
from tests.conftest import ROOT, GroupFactory, SoftTokenFactory

BUILT = ROOT / "build"
BIN = Path(sys.executable).parent


def commands(group: Any, path: str = "p11ha") -> Iterator[tuple[str, Any]]:
    for name, each in group.commands.items():
        yield f"{path} {name}", each
        if hasattr(each, "commands"):
            yield from commands(each, f"{path} {name}")


def bare(page: str) -> str:
    """The page's text without what roff makes of it."""
    return re.sub(r"\\f[BIR]|\\%|\\&", "", page).replace(r"\-", "-").replace(r"\e", "\\")


def test_pages_and_scripts_are_those_of_this_build(tmp_path: Path) -> None:
    build.write_manual(tmp_path)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(map(str, made)) == [
        *("completions/_p11ha", "completions/p11ha", "completions/p11ha.fish"),
        *("man/p11ha.1", "man/pkcs11-ha.toml.5"),
    ]
    assert all((BUILT / path).read_text() == text for path, text in made.items())
    assert 'label = "prod"' in made[Path("man/pkcs11-ha.toml.5")]


def test_every_command_and_option_is_in_the_page() -> None:
    page = bare(manual.command_page(app))
    for path, command in commands(typer.main.get_command(app)):
        assert f'.SS "{path} ' in page
        section = page.partition(f'.SS "{path} ')[2].partition("\n.SS ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert all(name in section for name in parameter.opts)
    assert '.SH "EXIT STATUS"' in page


def test_every_configured_option_is_in_the_page() -> None:
    page = bare(manual.configuration_page("[ha]\nonly = true  # " + "very " * 20 + "long"))
    assert all(f"{option.name} = {option.form.words}" in page for option in OPTIONS)
    assert "very long\nonly = true\n" in page


@pytest.mark.parametrize("page", ["p11ha.1", "pkcs11-ha.toml.5"])
def test_nothing_in_a_page_is_taken_for_a_request(page: str) -> None:
    text = (BUILT / "man" / page).read_text()
    requests = {line.split()[0] for line in text.splitlines() if line.startswith((".", "'"))}
    assert requests <= {r".\"", ".TH", ".SH", ".SS", ".TP", ".PP", ".br", ".nf", ".fi"}
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # by `make asan`
    for tool in (["groff", "-man", "-Tutf8", "-ww", "-k"], ["mandoc", "-T", "lint", "-W", "warning"]):
        if shutil.which(tool[0]):
            command = [*tool, str(BUILT / "man" / page)]
            said = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
            complaints = said.stderr if tool[0] == "groff" else said.stdout
            assert [line for line in complaints.splitlines() if "missing date" not in line] == []


def test_prose_becomes_roff() -> None:
    assert manual._text(".so `p11ha --json` [page](x.md), a\\b") == r"\&.so \fBp11ha \-\-json\fR page, a\eb"


@pytest.fixture
def east(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


def complete(shell: str, *words: str) -> list[str]:
    """What the shell offers for the last of the words."""
    with tempfile.TemporaryDirectory() as home:  # fish writes to it
        return _complete(shell, words, os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": home})


def _complete(shell: str, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    typed = " ".join(("p11ha", *words))
    if shell == "bash":
        quoted = " ".join(f"'{word}'" for word in ("p11ha", *words))
        script = f"source {BUILT}/completions/p11ha; COMP_WORDS=({quoted}) COMP_CWORD={len(words)}\n"
        script += '_p11ha_completion p11ha; printf "%s\\n" "${COMPREPLY[@]}"'
        command = ["bash", "--norc", "-c", script]
    else:
        command = [
            "fish",
            "--no-config",
            "-c",
            f"source {BUILT}/completions/p11ha.fish; complete -C '{typed}'",
        ]
    said = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=60)
    return [line.partition("\t")[0] for line in said.stdout.splitlines()]


def test_bash_completes_commands_and_names(east: SoftToken, group: GroupFactory) -> None:
    conf = group(east.member(), label="prod").conf
    assert complete("bash", "doc") == ["doctor"]
    assert complete("bash", "domain", "admit", "e") == ["east"]
    assert complete("bash", "explain", "CKR_PIN_L") == ["CKR_PIN_LEN_RANGE", "CKR_PIN_LOCKED"]
    for line in (("drain",), ("enable",), ("recover", "prod")):
        assert complete("bash", *line, "") == ["east"]
    assert complete("bash", "events", "pr") == ["prod"]
    other = conf.with_name("other.toml")
    other.write_text(conf.read_text().replace("prod", "test") + "[wrong]\n")
    assert complete("bash", "sync", "--config", str(other), "") == ["test"]
    conf.unlink()
    assert complete("bash", "sync", "") == [""]


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes_names(east: SoftToken, group: GroupFactory) -> None:
    group(east.member(), label="prod")
    assert complete("fish", "sync", "") == ["prod"]


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_completes_at_the_first_use(east: SoftToken, group: GroupFactory) -> None:
    """As `make install` has it: found in fpath, and loaded when it is first wanted."""
    group(east.member(), label="prod")
    script = f"""
        zmodload zsh/zpty
        zpty shell zsh -f -i
        zpty -w shell 'fpath=({BUILT}/completions $fpath); autoload -U compinit; compinit -u -D; PS1=READY'
        zpty -r shell seen '*READY*READY*'
        zpty -w -n shell $'p11ha sync \\t'
        zpty -r shell seen '*prod*' && print completed
    """
    said = subprocess.run(
        ["zsh", "-f", "-c", script],
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert said.stdout == "completed\n", said
