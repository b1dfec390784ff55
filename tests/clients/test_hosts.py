"""Programs that run on and sign, in Python and in Java, while members die and come back under them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import DATA, Keys, Killable, KillableFactory
from tests.clients.programs import PATIENCE_S, Conversation, Token

HERE = Path(__file__).parent

Start = Callable[[Token], Conversation]


def python(script: str) -> Start:
    def start(token: Token) -> Conversation:
        arguments = (token.module, token.label, token.pin, DATA.decode())
        return token.talk(sys.executable, HERE / script, *arguments)

    return start


def java(token: Token) -> Conversation:
    lines = ("name = card", f"library = {token.module}", "slotListIndex = 0", "")
    configuration = token.write("card.cfg", "\n".join(lines).encode())
    return token.talk("java", HERE / "Signer.java", configuration, token.pin, DATA.decode())


HOSTS = {"PyKCS11": python("pykcs11_host.py"), "python-pkcs11": python("python_pkcs11_host.py"), "Java": java}


@pytest.fixture(params=HOSTS)
def start(request: pytest.FixtureRequest) -> Start:
    return HOSTS[str(request.param)]


def must_sign(program: Conversation, keys: Keys, line: str = "sign") -> None:
    """One signature of each key, which it has verified by the token and we verify without it."""
    signatures = dict(word.split("=") for word in program.ask(line).split())
    assert sorted(signatures) == ["eckey", "rsakey"]
    for label, signature in signatures.items():
        keys[label].verify(bytes.fromhex(signature))


def test_it_signs(prod: Token, keys: Keys, start: Start) -> None:
    with start(prod) as program:
        assert program.hear() == "eckey rsakey"
        for _ in range(4):
            must_sign(program, keys)
        program.end()


@pytest.mark.parametrize("dead", ["east", "west"])
def test_it_signs_when_a_member_was_dead_before(
    killable: KillableFactory, keys: Keys, start: Start, dead: str
) -> None:
    made = killable()
    made[dead].kill()
    with start(made.token) as program:
        assert program.hear() == "eckey rsakey"
        must_sign(program, keys)
        program.end()


def must_return(program: Conversation, keys: Keys, made: Killable, name: str) -> None:
    """A restarted member is taken in again, by the calls of a program that goes on signing."""
    made[name].start()
    deadline = time.monotonic() + PATIENCE_S
    while not made.events("member.recovered", name):
        assert time.monotonic() < deadline, made.log.read_text()
        must_sign(program, keys)


def test_it_signs_on_when_members_die_in_turn(killable: KillableFactory, keys: Keys, start: Start) -> None:
    made = killable(interval_s=0.2)
    with start(made.token) as program:
        assert program.hear() == "eckey rsakey"
        for _ in range(4):
            must_sign(program, keys)
        for name in ("east", "west"):
            made[name].kill()
            for _ in range(4):
                must_sign(program, keys)
            assert made.events("member.lost", name) == 1
            must_return(program, keys, made, name)
        program.end()


def test_java_uses_session_keys(prod: Token, keys: Keys) -> None:
    with java(prod) as program:
        program.hear()
        for _ in range(8):
            must_sign(program, keys, "session keys")
        program.end()
