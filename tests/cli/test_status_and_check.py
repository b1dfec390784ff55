"""`p11ha status` and `p11ha check` on real members, some of them killed."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command

from demo.members import SoftToken
from pkcs11_ha import __version__
from pkcs11_ha.cli import main
from pkcs11_ha.cli.status import GroupStatus, MemberStatus, show
from tests.cli.p11ha import good, refused
from tests.conftest import ROOT, GroupFactory, ServerFactory, SoftTokenFactory

P11HA = Path(sys.executable).parent / "p11ha"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([P11HA, *arguments], capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def east(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


@pytest.fixture
def west(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("west")


@pytest.mark.usefixtures("module")
def test_status_lists_members_as_luna_does(east: SoftToken, west: SoftToken, group: GroupFactory) -> None:
    group(east.member(), west.member())
    shown = run("status")
    assert shown.returncode == 0, shown.stderr
    listing = ["HA group 1599447001 status:", f"HSM {east.serial} - CKR_OK", f"HSM {west.serial} - CKR_OK"]
    assert shown.stdout.splitlines()[-3:] == listing


def test_a_narrow_terminal_folds_and_leaves_nothing_out() -> None:
    lost = MemberStatus("east-1", "aaaaaaaaaaaaaaaa", "standby", "CKR_TOKEN_NOT_PRESENT", "no [such] file")
    out = io.StringIO()
    show([GroupStatus("production-of-cards", "1a", 7, "", (lost,))], Console(file=out, width=40))
    table, _, _ = out.getvalue().partition("\n\n")
    assert max(map(len, table.splitlines())) <= 40
    for word in ("producti", "slot 7", "east-1", "standby", "CKR_TOKEN_", "[such]"):
        assert word in table
    assert out.getvalue().endswith("\nHSM aaaaaaaaaaaaaaaa - CKR_TOKEN_NOT_PRESENT\n")


@pytest.mark.usefixtures("module")
def test_status_of_a_dead_member(
    east: SoftToken, west: SoftToken, server: ServerFactory, group: GroupFactory
) -> None:
    dead = server(east)
    group(dead.member(), west.member())
    dead.kill()
    shown = run("status", "--json")
    assert shown.returncode == 0, shown.stderr
    (prod,) = json.loads(shown.stdout)["groups"]
    assert (prod["label"], prod["serial"]) == ("prod", "1599447001")
    assert [(m["name"], m["status"]) for m in prod["members"]] == [
        ("east", "CKR_DEVICE_ERROR"),
        ("west", "CKR_OK"),
    ]
    assert prod["members"][0]["why"]
    assert not prod["members"][1]["why"]


@pytest.mark.usefixtures("module")
def test_check_of_a_good_configuration(east: SoftToken, west: SoftToken, group: GroupFactory) -> None:
    group(east.member(), west.member())
    checked = run("check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert [line.partition(":")[0] for line in checked.stdout.splitlines()] == ["east", "west"]


@pytest.mark.usefixtures("module")
def test_check_says_what_is_wrong_with_each_member(
    east: SoftToken, west: SoftToken, server: ServerFactory, group: GroupFactory
) -> None:
    dead = server(west)
    group({**east.member(), "token": "pkcs11:token=nobody"}, dead.member())
    dead.kill()
    checked = run("check")
    assert checked.returncode == 1
    lines = checked.stdout.splitlines()
    assert lines[0] == "east: no token matches pkcs11:token=nobody"
    assert lines[1].startswith("west: ")
    assert len(lines) == 2


@pytest.mark.usefixtures("module")
def test_check_finds_one_token_configured_twice(east: SoftToken, group: GroupFactory) -> None:
    group(east.member(), {**east.member(), "name": "west"})
    checked = run("check")
    assert checked.returncode == 1
    assert checked.stdout.count("the same token as another member") == 2


@pytest.mark.usefixtures("module")
def test_check_finds_a_pin_file_that_others_can_read(
    east: SoftToken, directory: Path, group: GroupFactory
) -> None:
    pin = directory / "pin"
    pin.write_text(east.pin)
    pin.chmod(0o644)
    group(east.member(pin_source=f"file:{pin}"))
    assert run("check").returncode == 1
    pin.chmod(0o600)
    assert run("check").returncode == 0


@pytest.mark.usefixtures("module")
def test_check_says_that_a_pin_was_not_tried(east: SoftToken, directory: Path, group: GroupFactory) -> None:
    group(east.member())
    pin = directory / "pin"
    source = f"file:{pin}"
    for why in ("No such file or directory", "no PIN: its first line is empty"):
        checked = run("check", "--pin-source", source)
        assert (checked.returncode, checked.stderr) == (1, "")
        assert checked.stdout.splitlines()[-1] == f"--pin-source: {pin}: {why}"
        pin.write_text("\n")
    empty = refused("member", "test", "east", "--pin-source", source)
    assert empty == f"east: {pin}: no PIN: its first line is empty"
    pin.write_text("wrong")
    said = good("check", "--pin-source", source).splitlines()
    assert said[-1].startswith('--pin-source: not tried on any token, as no group has replication = "domain"')
    assert "USER_PIN_COUNT_LOW" not in good("member", "test", "east")


@pytest.mark.parametrize("command", ["status", "check"])
@pytest.mark.usefixtures("module")
def test_a_wrong_configuration_is_one_line(command: str, east: SoftToken, group: GroupFactory) -> None:
    conf = group(east.member()).conf
    conf.write_text(conf.read_text().replace("[ha]", "[ha]\nnonsense = 1"))
    line = next(n for n, text in enumerate(conf.read_text().splitlines(), 1) if "nonsense" in text)
    refused = run(command)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"{conf}:{line}: ha.nonsense: ")
    assert len(refused.stderr.splitlines()) == 1


def test_a_missing_configuration_is_one_line(directory: Path) -> None:
    refused = run("check", "--config", str(directory / "none.toml"))
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"{directory / 'none.toml'}: ")
    assert len(refused.stderr.splitlines()) == 1


def test_the_version_is_told_to_programs() -> None:
    assert json.loads(run("version", "--json").stdout) == {"version": __version__}


def test_the_page_has_every_command_that_tells_programs_nothing() -> None:
    page = (ROOT / "docs" / "cli.md").read_text().partition("These have not:")[2].partition("\n\n")[0]
    said = {
        f"{group}{name}"
        for group, names in re.findall(r"`p11ha ((?:[a-z]+ )?)([a-z|-]+)`", page)
        for name in names.split("|")
    }

    def leaves(command: Any, *path: str) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, each in command.commands.items():
                yield from leaves(each, *path, name)
        else:
            yield " ".join(path), command

    found = leaves(get_command(main.app))
    assert said == {path for path, each in found if not any("--json" in p.opts for p in each.params)}
