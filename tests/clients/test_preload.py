"""LD_PRELOAD: a program that is linked directly against the vendor's library gets a group in its place."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from demo.members import Table, softhsm
from tests.clients.conftest import SoftFactory, in_group
from tests.clients.programs import Token
from tests.conftest import ROOT, GroupFactory, ServerFactory

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("linked") / "linked"
    subprocess.run(
        [
            *("cc", "-std=c11", "-D_GNU_SOURCE", "-pthread", "-Wall", "-Wextra", "-Wconversion", "-Werror"),
            *(f"-I{ROOT / 'include'}", "-o", program, HERE / "linked.c", softhsm()),
            f"-Wl,-rpath,{softhsm().parent}",
        ],
        check=True,
    )
    return program


def preload(module: Path) -> dict[str, str]:
    """Behind what is there already: a sanitizer has to come first."""
    return {"LD_PRELOAD": ":".join([*filter(None, [os.environ.get("LD_PRELOAD")]), str(module)])}


def run(token: Token, linked: Path) -> list[str]:
    with token.talk(linked, token.pin, env=preload(token.module)) as program:
        said = [program.hear(), program.ask("sign"), program.ask("sign")]
        program.end()
    return said


def test_without_it_the_program_has_the_vendors_token(bare: Token, linked: Path) -> None:
    with bare.talk(linked, bare.pin) as program:
        assert [program.hear(), program.ask("sign")] == ["Implement", "8"]
        program.end()


def test_the_program_has_the_group(prod: Token, linked: Path) -> None:
    assert run(prod, linked) == ["pkcs11-ha", "8", "8"]


def test_with_members_in_the_very_library_the_program_is_linked_to(
    soft: SoftFactory, module: Path, group: GroupFactory, linked: Path, directory: Path
) -> None:
    """Not in a copy: its symbols are bound to ours, and its calls must not come back to us."""
    east = soft("east")
    made = group(east.member(instance="shared"), soft("west").member())
    token = in_group(module, made, east.pin, directory)
    assert run(token, linked) == ["pkcs11-ha", "8", "8"]
    assert "member.lost" not in made.log.read_text()


def test_the_program_signs_on_when_a_member_dies(
    soft: SoftFactory,
    server: ServerFactory,
    module: Path,
    group: GroupFactory,
    linked: Path,
    directory: Path,
) -> None:
    """One member in the library the program is linked to, one that dies."""
    east, west = soft("east"), server(soft("west"))
    members: tuple[Table, Table] = (east.member(instance="shared"), west.member())
    made = group(*members)
    token = in_group(module, made, east.pin, directory)
    with token.talk(linked, token.pin, env=preload(module)) as program:
        assert [program.hear(), program.ask("sign")] == ["pkcs11-ha", "8"]
        west.kill()
        assert [program.ask("sign"), program.ask("sign")] == ["8", "8"]
        program.end()
    assert made.log.read_text().count("member=west member.lost") == 1
