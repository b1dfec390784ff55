"""OpenSSL 3 with its PKCS#11 engine: signatures, requests, and a TLS server whose HSM dies."""

from __future__ import annotations

import re
import socket
import ssl
from pathlib import Path

import pytest

from tests.clients.conftest import DATA, Keys, KillableFactory
from tests.clients.programs import Token

ENGINE = ("-engine", "pkcs11", "-keyform", "engine")


def engine(token: Token) -> dict[str, str]:
    """The environment in which the engine uses this token's module."""
    lines = [
        *("openssl_conf = init", "[init]", "engines = engines", "[engines]", "pkcs11 = pkcs11", "[pkcs11]"),
        *("engine_id = pkcs11", f"MODULE_PATH = {token.module}", "init = 0", ""),
    ]
    return {"OPENSSL_CONF": str(token.write("openssl.cnf", "\n".join(lines).encode()))}


def uri(token: Token, label: str, kind: str) -> str:
    return f"{token.uri};object={label};type={kind}?pin-value={token.pin}"


def sign(token: Token, label: str) -> bytes:
    token.write("data", DATA)
    key = uri(token, label, "private")
    token.run(
        "openssl", "dgst", "-sha256", *ENGINE, "-sign", key, "-out", "signature", "data", env=engine(token)
    )
    return token.read("signature")


@pytest.mark.parametrize("label", ["eckey", "rsakey"])
def test_a_signature_of_the_engine_verifies(prod: Token, keys: Keys, label: str) -> None:
    keys[label].verify(sign(prod, label))
    verify = ("openssl", "dgst", "-sha256", *ENGINE, "-verify", uri(prod, label, "public"))
    done = prod.run(*verify, "-signature", "signature", "data", env=engine(prod))
    assert "Verified OK" in done.stdout
    prod.write("data", b"other")
    assert prod.run(*verify, "-signature", "signature", "data", ok=False, env=engine(prod)).returncode == 1


def test_decryption(prod: Token, keys: Keys) -> None:
    prod.write("data", DATA)
    prod.write("public.pem", keys.rsa.public_pem)
    prod.run(*"openssl pkeyutl -encrypt -pubin -inkey public.pem -in data -out sealed".split())
    key = uri(prod, "rsakey", "private")
    decrypt = ("openssl", "pkeyutl", *ENGINE, "-decrypt", "-inkey", key, "-in", "sealed", "-out", "opened")
    prod.run(*decrypt, env=engine(prod))
    assert prod.read("opened") == DATA


def test_a_certificate_is_requested(prod: Token, keys: Keys) -> None:
    key = uri(prod, "eckey", "private")
    prod.run(
        "openssl", "req", "-new", *ENGINE, "-key", key, "-subj", "/CN=new", "-out", "csr", env=engine(prod)
    )
    prod.run(*"openssl req -in csr -noout -verify".split())
    shown = prod.run(*"openssl req -in csr -noout -pubkey".split()).stdout
    assert shown.encode() == keys.ec.public_pem


def test_a_wrong_pin_is_refused(prod: Token) -> None:
    prod.write("data", DATA)
    key = f"{prod.uri};object=eckey;type=private?pin-value=wrong"
    done = prod.run("openssl", "dgst", "-sha256", *ENGINE, "-sign", key, "data", ok=False, env=engine(prod))
    assert done.returncode != 0
    assert "incorrect" in done.stderr


@pytest.mark.parametrize("dead", ["east", "west"])
def test_with_a_dead_member_it_signs(killable: KillableFactory, keys: Keys, dead: str) -> None:
    made = killable()
    made[dead].kill()
    for key in keys:
        key.verify(sign(made.token, key.label))


def handshake(port: int, authority: Path) -> str:
    """A TLS handshake, in which the server signs with its key; the subject that it proved to be."""
    context = ssl.create_default_context(cafile=authority)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as channel,
    ):
        certificate = channel.getpeercert()
        assert certificate
        return str(certificate["subject"])


@pytest.mark.parametrize("label", ["eckey", "rsakey"])
@pytest.mark.parametrize("dead", ["east", "west"])
def test_a_tls_server_serves_on_when_a_member_dies(
    killable: KillableFactory, keys: Keys, label: str, dead: str
) -> None:
    made = killable()
    token = made.token
    certificate = token.write("certificate.pem", keys[label].certificate_pem)
    server = ("openssl", "s_server", *ENGINE, "-key", uri(token, label, "private"), "-cert", certificate)
    with token.talk(*server, "-accept", "127.0.0.1:0", "-naccept", "12", env=engine(token)) as program:
        said = program.hear()
        while not (port := re.fullmatch(r"ACCEPT .*:(\d+)", said)):
            said = program.hear()
        for number in range(12):
            if number == 6:
                made[dead].kill()
            assert label in handshake(int(port[1]), certificate)
        assert program.process.wait(10) == 0
    assert made.events("member.lost", dead) == 1
