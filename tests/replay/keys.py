"""A key of each kind that operations want, the same on several tokens."""

from __future__ import annotations

from dataclasses import dataclass
from os import urandom

from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests import p11
from tests.der import tlv
from tests.ha import keys as ha

Template = dict[int, p11.Value]
ED25519 = bytes.fromhex("130c656477617264733235353139")  # PrintableString "edwards25519"

SIGN, CIPHER = (p11.CKA_SIGN, p11.CKA_VERIFY), (p11.CKA_ENCRYPT, p11.CKA_DECRYPT)
CLASSES = {"public": p11.CKO_PUBLIC_KEY, "private": p11.CKO_PRIVATE_KEY, "secret": p11.CKO_SECRET_KEY}


def wanted(name: str) -> Template:
    """What to look for, for a name such as "private rsa"."""
    kind, label = name.split(" ", 1)
    return {p11.CKA_CLASS: CLASSES[kind], p11.CKA_LABEL: label}


def _half(kind: str, key_type: int, label: str, more: Template, *usage: int) -> Template:
    """One key of a pair."""
    common: Template = {
        p11.CKA_KEY_TYPE: key_type,
        p11.CKA_TOKEN: True,
        p11.CKA_PRIVATE: kind == "private",
        p11.CKA_ID: label.encode(),
    }
    return wanted(f"{kind} {label}") | common | more | dict.fromkeys(usage, True)


def _number(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def _dsa(key: dsa.DSAPrivateKey) -> list[Template]:
    private = key.private_numbers()
    public = private.public_numbers
    domain: Template = {
        p11.CKA_PRIME: _number(public.parameter_numbers.p),
        p11.CKA_SUBPRIME: _number(public.parameter_numbers.q),
        p11.CKA_BASE: _number(public.parameter_numbers.g),
    }
    x, y = {p11.CKA_VALUE: _number(private.x)}, {p11.CKA_VALUE: _number(public.y)}
    return [
        _half("private", p11.CKK_DSA, "dsa", domain | x, p11.CKA_SIGN),
        _half("public", p11.CKK_DSA, "dsa", domain | y, p11.CKA_VERIFY),
    ]


def _ed25519(key: ed25519.Ed25519PrivateKey) -> list[Template]:
    point = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    curve: Template = {p11.CKA_EC_PARAMS: ED25519}
    value = {p11.CKA_VALUE: key.private_bytes_raw()}
    return [
        _half("private", p11.CKK_EC_EDWARDS, "ed25519", curve | value, p11.CKA_SIGN),
        _half(
            "public",
            p11.CKK_EC_EDWARDS,
            "ed25519",
            curve | {p11.CKA_EC_POINT: tlv(0x04, point)},
            p11.CKA_VERIFY,
        ),
    ]


def _secret(key_type: int, label: str, size: int, *usage: int) -> Template:
    return ha.secret(key_type, urandom(size), label, label.encode(), *usage)


def _odd(value: bytes) -> bytes:
    """Bytes of odd parity, as DES keys are."""
    return bytes(each & 0xFE | ((each >> 1).bit_count() + 1) % 2 for each in value)


@dataclass(frozen=True)
class Keys:
    """The templates of all of them."""

    templates: tuple[Template, ...]

    @classmethod
    def generate(cls) -> Keys:
        rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        ec_key = ec.generate_private_key(ec.SECP256R1())
        return cls(
            (
                ha.rsa_private(rsa_key),
                ha.rsa_public(rsa_key.public_key()),
                ha.ec_private(ec_key),
                ha.ec_public(ec_key.public_key()),
                *_dsa(dsa.generate_private_key(1024)),
                *_ed25519(ed25519.Ed25519PrivateKey.generate()),
                _secret(p11.CKK_AES, "aes", 32, *CIPHER, *SIGN),
                _secret(p11.CKK_GENERIC_SECRET, "generic", 64, *SIGN),
                _secret(p11.CKK_GENERIC_SECRET, "plain", 48, *SIGN) | {p11.CKA_SENSITIVE: False},
                _secret(p11.CKK_DES3, "des3", 24, *CIPHER, *SIGN) | {p11.CKA_VALUE: _odd(urandom(24))},
            )
        )

    def value(self, label: str) -> bytes:
        """Of a secret key."""
        (value,) = (each[p11.CKA_VALUE] for each in self.templates if each[p11.CKA_LABEL] == label)
        assert isinstance(value, bytes)
        return value

    def put_on(self, session: p11.Session, *but: str) -> None:
        """All of them, but for those with some labels."""
        for template in self.templates:
            if template[p11.CKA_LABEL] not in but:
                session.create(template)
