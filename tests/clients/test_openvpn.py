"""openvpn --show-pkcs11-ids: an id that stands in configurations must be the same whatever member is there."""

from __future__ import annotations

import re

import pytest

from tests.clients.conftest import KillableFactory
from tests.clients.programs import Token


def ids(token: Token) -> list[str]:
    listed = token.run("openvpn", "--show-pkcs11-ids", token.module).stdout
    return sorted(re.findall(r"Serialized id: +(\S+)", listed))


def expected(identity: str) -> list[str]:
    return [rf"{identity}/A1", rf"{identity}/A2"]


def test_certificates_have_an_id(bare: Token, prod: Token) -> None:
    assert ids(prod) == expected(r"pkcs11\x2Dha/HA\x20group/1599447001/prod")
    assert [identity.rsplit("/", 1)[1] for identity in ids(bare)] == ["A1", "A2"]


@pytest.mark.parametrize("dead", ["", "east", "west"])
def test_the_id_does_not_depend_on_who_is_there(killable: KillableFactory, dead: str) -> None:
    made = killable()
    if dead:
        made[dead].kill()
    assert ids(made.token) == expected(r"pkcs11\x2Dha/HA\x20group/1599447001/prod")
