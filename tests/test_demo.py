"""The demo's parts that its own run does not doubt: its program, its look at a token, and what it keeps to itself."""

from __future__ import annotations

import os
import subprocess

import pytest

from demo.audit import Audit, Broken
from demo.members import SoftToken, softhsm
from demo.run import inspect
from tests.conftest import ROOT, SoftTokenFactory

CLIENT = ROOT / "build" / "demo-client"


@pytest.fixture
def token(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


def obey(token: SoftToken, commands: str, *options: str) -> list[str]:
    """What the program writes when it is given these commands for SoftHSM itself."""
    done = subprocess.run(
        [CLIENT, "--token", token.label, "--pin", token.pin, *options, softhsm()],
        input=commands.replace(", ", "\n") + "\nstop\n",
        env=os.environ | token.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def make_keys(token: SoftToken, commands: str) -> Audit:
    audit = Audit()
    for line in obey(token, commands, "--key", "signing"):
        audit.read(line)
    return audit


def test_the_program_makes_finds_uses_and_destroys_keys(token: SoftToken) -> None:
    commands = "generate second, sign second, find second, generate third, destroy third, find third"
    audit = make_keys(token, commands)
    assert {label: key.destroyed for label, key in audit.keys.items()} == {
        "signing": False,
        "second": False,
        "third": True,
    }
    assert audit.answered == 7
    assert audit.done == (audit.verified["-"], 0)
    inspect(CLIENT, token, audit)


def test_the_program_makes_nothing_without_a_key_of_its_own(token: SoftToken) -> None:
    make_keys(token, "generate second")
    lines = obey(token, "generate third, destroy second, find third, find second, sign third")
    assert lines[:-2] == [
        "refused generate third C_GenerateKeyPair CKR_SESSION_READ_ONLY",
        "refused destroy second C_DestroyObject CKR_SESSION_READ_ONLY",
        "found third 0 0",
        "found second 1 1",
    ]
    assert lines[-2].split()[:4] == ["failed", "third", "0", "0"]
    assert lines[-1] == "done 0 1"


def test_inspect_finds_a_key_that_came_back(token: SoftToken) -> None:
    audit = make_keys(token, "generate third")
    audit.read("destroyed third 2")
    with pytest.raises(
        Broken, match="the token east shows 1 private and 1 public keys named third, which were"
    ):
        inspect(CLIENT, token, audit)


def test_inspect_misses_a_key(token: SoftToken, soft_token: SoftTokenFactory) -> None:
    audit = make_keys(token, "generate second")
    with pytest.raises(Broken, match="the token west shows 0 private and 0 public keys named signing"):
        inspect(CLIENT, soft_token("west"), audit)


def test_inspect_finds_another_key_of_the_same_name(token: SoftToken, soft_token: SoftTokenFactory) -> None:
    audit = make_keys(token, "find signing")
    west = soft_token("west")
    make_keys(west, "find signing")
    with pytest.raises(Broken, match="signature 0 of thread 0 with signing by - does not verify"):
        inspect(CLIENT, west, audit)


def test_inspect_is_not_content_without_answers(token: SoftToken) -> None:
    audit = make_keys(token, "find signing")
    token.pin = "wrong1"
    with pytest.raises(
        Broken, match=r"east answered 0 of 2 commands: demo-client: C_Login: CKR_PIN_INCORRECT"
    ):
        inspect(CLIENT, token, audit)
