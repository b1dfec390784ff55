"""GnuTLS: p11tool does with a group what it does with the bare module, and certtool signs with its keys."""

from __future__ import annotations

import re

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from tests.clients.conftest import Keys, KillableFactory
from tests.clients.programs import Done, Token
from tests.conftest import P11_KIT_DOES_NOT_END

pytestmark = pytest.mark.not_sanitized(P11_KIT_DOES_NOT_END)


def tool(token: Token, *arguments: str) -> Done:
    return token.run(
        *("p11tool", "--provider", token.module, "--login", "--batch"),
        *arguments,
        env={"GNUTLS_PIN": token.pin},
    )


def objects(token: Token) -> list[str]:
    """What --list-all says of each object, without what the token is called."""
    listed = tool(token, "--list-all", token.uri).stdout
    listed = re.sub(r"URL: pkcs11:model=.*?;token=\w+;", "", listed)
    return sorted(re.split(r"Object \d+:\s+", listed)[1:])


def test_the_token_is_listed(prod: Token) -> None:
    listed = prod.run("p11tool", "--provider", prod.module, "--list-token-urls").stdout
    assert listed.split() == ["pkcs11:model=HA%20group;manufacturer=pkcs11-ha;serial=1599447001;token=prod"]


def test_objects_are_listed_as_with_the_bare_module(bare: Token, prod: Token) -> None:
    listed = objects(prod)
    assert len(listed) == 6
    assert listed == objects(bare)


def test_keys_sign(prod: Token) -> None:
    for label in ("eckey", "rsakey"):
        done = tool(prod, "--test-sign", f"{prod.uri};object={label};type=private")
        assert "Verifying against public key in the token... ok" in done.stdout + done.stderr


def test_a_generated_key_signs_and_is_deleted(bare: Token, prod: Token) -> None:
    for token in (bare, prod):
        generate = ("--generate-privkey", "ecdsa", "--curve", "secp256r1", "--label", "new", "--id", "0b")
        tool(token, *generate, "--outfile", "new.pem", token.uri)
        load_pem_public_key(token.read("new.pem"))
        tool(token, "--test-sign", f"{token.uri};object=new;type=private")
    assert len(objects(prod)) == 8
    assert objects(prod) == objects(bare)
    for token in (bare, prod):
        tool(token, "--delete", f"{token.uri};object=new;type=private")
        tool(token, "--delete", f"{token.uri};object=new;type=public")
    assert len(objects(prod)) == 6
    assert objects(prod) == objects(bare)


def test_a_certificate_is_written_exported_and_deleted(prod: Token, keys: Keys) -> None:
    path = prod.write("own.pem", keys.ec.certificate_pem)
    tool(prod, "--write", "--load-certificate", str(path), "--label", "own", prod.uri)
    exported = tool(prod, "--export", f"{prod.uri};object=own;type=cert").stdout
    assert x509.load_pem_x509_certificate(exported.encode()) == keys.ec.certificate
    tool(prod, "--delete", f"{prod.uri};object=own;type=cert")
    assert "object=own" not in tool(prod, "--list-all", prod.uri).stdout


@pytest.mark.parametrize("dead", ["", "east", "west"])
def test_certtool_issues_a_certificate(killable: KillableFactory, keys: Keys, dead: str) -> None:
    made = killable()
    if dead:
        made[dead].kill()
    token = made.token
    template = token.write("template", b'cn = "issued"\nca\nexpiration_days = 2\n')
    token.run(
        *("certtool", "--provider", token.module, "--generate-self-signed", "--template", template),
        *("--load-privkey", f"{token.uri};object=rsakey;type=private", "--outfile", "issued.pem"),
        *("--load-pubkey", f"{token.uri};object=rsakey;type=public"),
        env={"GNUTLS_PIN": token.pin},
    )
    issued = x509.load_pem_x509_certificate(token.read("issued.pem"))
    issued.verify_directly_issued_by(issued)
    assert issued.public_key() == keys.rsa.private.public_key()
