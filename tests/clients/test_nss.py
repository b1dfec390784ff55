"""NSS: the group as a module of a database; its keys and certificates are listed, made and used."""

from __future__ import annotations

import re

import pytest
from cryptography import x509

from tests.clients.conftest import DATA, Keys, KillableFactory
from tests.clients.programs import Done, Token


def database(token: Token) -> None:
    """A database of the test's own that knows the module."""
    token.path("nss").mkdir()
    token.write("pin", token.pin.encode())
    token.write("noise", bytes(range(256)))
    token.run(*"certutil -N -d sql:nss --empty-password".split())
    token.run("modutil", "-dbdir", "sql:nss", "-add", "card", "-libfile", token.module, "-force")


def certutil(token: Token, *arguments: str) -> Done:
    return token.run("certutil", "-d", "sql:nss", "-h", token.label, "-f", "pin", *arguments)


def listed(token: Token, what: str) -> list[str]:
    """Lines of certutil -L or -K, without their numbers and the token's name."""
    lines = certutil(token, what).stdout.splitlines()
    wanted = [
        line.replace(f"{token.label}:", "") for line in lines if re.search(r"<|[uCTPc]*,[uCTPc]*,", line)
    ]
    return sorted(" ".join(re.sub(r"< *\d+>", "", line).split()) for line in wanted)


def test_the_module_and_its_token_are_listed(prod: Token) -> None:
    database(prod)
    listing = prod.run(*"modutil -dbdir sql:nss -list card".split()).stdout
    assert re.search(r"Token Name: prod +\n", listing)
    assert "PKCS #11 Version 3.2" in listing
    assert re.search(r"Token Serial Number: 1599447001 +\n", listing)


def test_keys_and_certificates_are_listed_as_with_the_bare_module(bare: Token, prod: Token) -> None:
    for token in (bare, prod):
        database(token)
    assert listed(prod, "-L") == listed(bare, "-L") == ["eckey u,u,u", "rsakey u,u,u"]
    assert listed(prod, "-K") == listed(bare, "-K") == ["ec a1 eckey", "rsa a2 rsakey"]


@pytest.mark.parametrize(
    "kind", [("-k", "rsa", "-g", "2048"), ("-k", "ec", "-q", "nistp256")], ids=["rsa", "ec"]
)
def test_a_key_is_generated_and_certifies_itself(bare: Token, prod: Token, kind: tuple[str, ...]) -> None:
    make = ("-S", "-n", "new", *kind, "-s", "CN=new", "-x", "-t", ",,", "-z", "noise")
    for token in (bare, prod):
        database(token)
        certutil(token, *make)
        pem = certutil(token, "-L", "-n", f"{token.label}:new", "-a").stdout
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.verify_directly_issued_by(certificate)
    assert len(listed(prod, "-K")) == 3
    assert listed(prod, "-L") == listed(bare, "-L")
    for token in (bare, prod):
        certutil(token, "-F", "-n", f"{token.label}:new")
    assert listed(prod, "-K") == listed(bare, "-K")
    assert len(listed(prod, "-K")) == 2


@pytest.mark.parametrize("dead", ["", "east", "west"])
def test_a_message_is_signed(killable: KillableFactory, keys: Keys, dead: str) -> None:
    made = killable()
    token = made.token
    database(token)
    certutil(token, "-M", "-n", f"{token.label}:rsakey", "-t", "CTu,CTu,CTu")
    if dead:
        made[dead].kill()
    data = token.write("data", DATA)
    token.run(
        *("cmsutil", "-S", "-d", "sql:nss", "-N", f"{token.label}:rsakey", "-f", "pin", "-H", "SHA256"),
        *("-i", data, "-o", "signed.der"),
    )
    token.write("authority.pem", keys.rsa.certificate_pem)
    verify = "openssl cms -verify -inform DER -in signed.der -CAfile authority.pem -purpose any -out opened"
    token.run(*verify.split())
    assert token.read("opened") == DATA
