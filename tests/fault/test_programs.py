"""Programs on a token behind the fault module, as docs/fault-injection.md shows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature

from tests.clients import conftest as clients
from tests.clients.conftest import DATA, Keys, SoftFactory
from tests.clients.programs import Done, Token
from tests.clients.test_openssl import sign as openssl_sign
from tests.conftest import ROOT
from tests.fault import Fault, library

keys = clients.keys
model = clients.model
soft = clients.soft


@pytest.fixture
def fault(soft: SoftFactory) -> Fault:
    return Fault(soft("bare"))


@pytest.fixture
def token(fault: Fault, directory: Path) -> Token:
    home = directory / "home"
    home.mkdir()
    return Token(library(), fault.token.label, fault.token.pin, home, fault.env)


def sign(token: Token, *, ok: bool = True) -> Done:
    token.write("data", DATA)
    return token.run(
        *("pkcs11-tool", "--module", token.module, "--token-label", token.label, "--pin", token.pin),
        *("--sign", "--mechanism", "SHA256-RSA-PKCS", "--id", "a2", "-i", "data", "-o", "signature"),
        ok=ok,
    )


def test_pkcs11_tool_signs_and_fails_as_told(token: Token, fault: Fault, keys: Keys) -> None:
    sign(token)
    keys.rsa.verify(token.read("signature"))
    fault.script("C_Sign* times 1 return CKR_DEVICE_ERROR")
    done = sign(token, ok=False)
    assert done.returncode != 0
    assert "CKR_DEVICE_ERROR" in done.stderr
    sign(token)  # the fault is spent, also for a program that was started again
    assert fault.injected() == 1


@pytest.mark.parametrize(
    ("rule", "status", "says"),
    [
        ("C_Login return CKR_PIN_LOCKED", 1, "CKR_PIN_LOCKED"),
        ("C_Login login lost", 1, "CKR_USER_NOT_LOGGED_IN"),
        ("C_SignInit session lost", 1, "CKR_SESSION_HANDLE_INVALID"),
        ("C_SignInit token lost", 1, "CKR_DEVICE_REMOVED"),
        ("C_SignInit crash", -11, ""),
        ("C_SignInit exit 9", 9, ""),
    ],
)
def test_pkcs11_tool_says_what_became_of_it(
    token: Token, fault: Fault, rule: str, status: int, says: str
) -> None:
    fault.script(rule)
    done = sign(token, ok=False)
    assert done.returncode == status
    assert says in done.stderr
    assert fault.injected() == 1


def test_openssl_meets_a_token_that_lies(token: Token, fault: Fault, keys: Keys) -> None:
    fault.script("C_Sign flip 10")
    signature = openssl_sign(token, "rsakey")
    with pytest.raises(InvalidSignature):
        keys.rsa.verify(signature)
    assert fault.injected() == 1


def test_the_program_of_the_documentation_survives(token: Token, fault: Fault) -> None:
    """The third example with its script, as they stand on the page."""
    page = (ROOT / "docs" / "fault-injection.md").read_text()
    source = re.search(r"```c\n(/\* retry\.c.*?)```", page, re.DOTALL)
    script = re.search(r'/script "(.*?)\\n"', page)
    assert source
    assert script
    token.write("retry.c", source[1].encode())
    token.run("cc", "-Wall", "-Werror", f"-I{ROOT / 'include'}", "-o", "retry", "retry.c", "-ldl")
    fault.script(script[1])
    token.run(token.path("retry"), library())
    assert fault.injected() == 2
