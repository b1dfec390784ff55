"""Tokens with keys and certificates, alone and in groups, for programs that know nothing of groups."""

from __future__ import annotations

import copy
import datetime
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from demo.members import Server, SoftToken, scratch, softhsm
from tests.clients.programs import Token
from tests.conftest import Group, GroupFactory, ServerFactory

DATA = b"The quick brown fox jumps over the lazy dog"
DIGEST = sha256(DATA).digest()


@dataclass(frozen=True)
class Key:
    """A key pair that is on every token, with a certificate of it."""

    label: str
    id: str  # in hexadecimal
    private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    certificate: x509.Certificate

    @property
    def private_pem(self) -> bytes:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def public_pem(self) -> bytes:
        info = PublicFormat.SubjectPublicKeyInfo
        return self.private.public_key().public_bytes(Encoding.PEM, info)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def verify(self, signature: bytes, data: bytes = DATA) -> None:
        """A signature over the SHA-256 of the data: ECDSA as DER or r and s, or RSA PKCS #1."""
        public = self.private.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            public.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
            return
        if len(signature) == 64:
            r, s = (int.from_bytes(half) for half in (signature[:32], signature[32:]))
            signature = encode_dss_signature(r, s)
        public.verify(signature, data, ec.ECDSA(hashes.SHA256()))


def _make_key(
    label: str, id_hex: str, private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, serial: int
) -> Key:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, label)])
    today = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(serial)
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .sign(private, hashes.SHA256())
    )
    return Key(label, id_hex, private, certificate)


@dataclass(frozen=True)
class Keys:
    ec: Key
    rsa: Key

    def __iter__(self) -> Iterator[Key]:
        return iter((self.ec, self.rsa))

    def __getitem__(self, label: str) -> Key:
        return {key.label: key for key in self}[label]


@pytest.fixture(scope="session")
def keys() -> Keys:
    return Keys(
        _make_key("eckey", "a1", ec.generate_private_key(ec.SECP256R1()), 1001),
        _make_key("rsakey", "a2", rsa.generate_private_key(65537, 2048), 1002),
    )


@pytest.fixture(scope="session")
def model(keys: Keys) -> Iterator[dict[str, SoftToken]]:
    """Tokens to be copied: SoftHSM takes a tenth of a second to write a key."""
    with scratch() as path:
        home = Path(path)
        tokens = {label: SoftToken(home / label, label) for label in ("bare", "east", "west")}
        for token in tokens.values():
            program = Token(softhsm(), token.label, token.pin, home, token.env)
            for key in keys:
                token.import_key(key.private_pem, key.label, key.id)
                der = program.write("certificate.der", key.certificate.public_bytes(Encoding.DER))
                program.run(
                    *("pkcs11-tool", "--module", softhsm(), "--token-label", token.label, "--pin", token.pin),
                    *("--login", "--write-object", der, "--type", "cert", "--id", key.id),
                    *("--label", key.label),
                )
        yield tokens


class SoftFactory(Protocol):
    def __call__(self, label: str) -> SoftToken: ...


@pytest.fixture
def soft(model: dict[str, SoftToken], directory: Path) -> SoftFactory:
    """A token with the keys, the test's own: a copy of the model in a store of its own."""

    def make(label: str) -> SoftToken:
        original = model[label]
        shutil.copytree(original.directory, directory / label)
        token = copy.copy(original)
        token.directory = directory / label
        token.conf = token.directory / original.conf.name
        token.conf.write_text(
            original.conf.read_text().replace(str(original.directory), str(token.directory))
        )
        token.env = {"SOFTHSM2_CONF": str(token.conf)}
        return token

    return make


@pytest.fixture
def bare(soft: SoftFactory, directory: Path) -> Token:
    """The bare SoftHSM module on a token with the same keys: what programs do with it, the group must let them do."""
    token = soft("bare")
    home = directory / "bare-home"
    home.mkdir()
    return Token(softhsm(), token.label, token.pin, home, token.env)


@pytest.fixture
def prod(module: Path, soft: SoftFactory, group: GroupFactory, directory: Path) -> Iterator[Token]:
    """A group of two SoftHSM tokens, each in a private copy of the library."""
    east, west = soft("east"), soft("west")
    made = group(east.member(), west.member())
    yield in_group(module, made, east.pin, directory)
    must_be_quiet(made.log, "member.lost", *TROUBLE)


TROUBLE = ("core.failed", "object.ambiguous", "write.partial", "login.member_refused", "operation.lost")


def must_be_quiet(log: Path, *names: str) -> None:
    """A program that works may still have met a fault of ours: the log tells."""
    lines = log.read_text().splitlines()
    assert lines, "no program has used the group"
    assert [line for line in lines if any(f" {name}" in line for name in names)] == []


def in_group(module: Path, made: Group, pin: str, directory: Path) -> Token:
    home = directory / "home"
    home.mkdir()
    return Token(module, made.label, pin, home, made.env)


@dataclass(frozen=True)
class Killable:
    """A group of two tokens behind p11-kit servers."""

    token: Token
    east: Server
    west: Server
    log: Path

    def __getitem__(self, name: str) -> Server:
        return {"east": self.east, "west": self.west}[name]

    def events(self, name: str, member: str) -> int:
        """How often the log says this of a member."""
        lines = self.log.read_text().splitlines()
        return sum(f"member={member} {name}" in line for line in lines)


class KillableFactory(Protocol):
    def __call__(self, interval_s: float = ...) -> Killable: ...


@pytest.fixture
def killable(
    module: Path, soft: SoftFactory, server: ServerFactory, group: GroupFactory, directory: Path
) -> Iterator[KillableFactory]:
    """`interval_s`: of recovery; by default none comes within a test."""

    logs: list[Path] = []

    def make(interval_s: float = 600.0) -> Killable:
        east, west = server(soft("east")), server(soft("west"))
        made = group(east.member(), west.member(), recovery={"interval_s": interval_s})
        token = in_group(module, made, east.token.pin, directory)
        logs.append(made.log)
        return Killable(token, east, west, made.log)

    yield make
    for log in logs:
        must_be_quiet(log, *TROUBLE)


@pytest.fixture(autouse=True)
def _no_agent_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSH_AUTH_SOCK", "P11_KIT_SERVER_ADDRESS", "SOFTHSM2_CONF"):
        monkeypatch.delenv(name, raising=False)
