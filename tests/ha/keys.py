"""The same keys for several tokens, and what they make, checked in software."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from os import urandom

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from demo.members import SoftToken
from tests import p11
from tests.der import tlv
from tests.ha.app import bare

P256 = bytes.fromhex("06082a8648ce3d030107")
DATA = b"what is to be signed, encrypted or hashed"
DIGEST = sha256(DATA).digest()


def ec_private(
    key: ec.EllipticCurvePrivateKey, label: str = "ec", ident: bytes = b"\xec"
) -> dict[int, p11.Value]:
    """As SoftHSM shows it afterwards: without its public point."""
    return {
        p11.CKA_CLASS: p11.CKO_PRIVATE_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_EC,
        p11.CKA_TOKEN: True,
        p11.CKA_PRIVATE: True,
        p11.CKA_LABEL: label,
        p11.CKA_ID: ident,
        p11.CKA_SIGN: True,
        p11.CKA_DERIVE: True,
        p11.CKA_EC_PARAMS: P256,
        p11.CKA_VALUE: key.private_numbers().private_value.to_bytes(32, "big"),
    }


def ec_point(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def ec_public(
    key: ec.EllipticCurvePublicKey, label: str = "ec", ident: bytes = b"\xec"
) -> dict[int, p11.Value]:
    return {
        p11.CKA_CLASS: p11.CKO_PUBLIC_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_EC,
        p11.CKA_TOKEN: True,
        p11.CKA_PRIVATE: False,
        p11.CKA_LABEL: label,
        p11.CKA_ID: ident,
        p11.CKA_VERIFY: True,
        p11.CKA_EC_PARAMS: P256,
        p11.CKA_EC_POINT: tlv(0x04, ec_point(key)),
    }


def _number(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def rsa_private(key: rsa.RSAPrivateKey, label: str = "rsa", ident: bytes = b"\xa5") -> dict[int, p11.Value]:
    private = key.private_numbers()
    return {
        p11.CKA_CLASS: p11.CKO_PRIVATE_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_RSA,
        p11.CKA_TOKEN: True,
        p11.CKA_PRIVATE: True,
        p11.CKA_LABEL: label,
        p11.CKA_ID: ident,
        p11.CKA_SIGN: True,
        p11.CKA_DECRYPT: True,
        p11.CKA_UNWRAP: True,
        p11.CKA_MODULUS: _number(private.public_numbers.n),
        p11.CKA_PUBLIC_EXPONENT: _number(private.public_numbers.e),
        p11.CKA_PRIVATE_EXPONENT: _number(private.d),
        p11.CKA_PRIME_1: _number(private.p),
        p11.CKA_PRIME_2: _number(private.q),
        p11.CKA_EXPONENT_1: _number(private.dmp1),
        p11.CKA_EXPONENT_2: _number(private.dmq1),
        p11.CKA_COEFFICIENT: _number(private.iqmp),
    }


def rsa_public(key: rsa.RSAPublicKey, label: str = "rsa", ident: bytes = b"\xa5") -> dict[int, p11.Value]:
    numbers = key.public_numbers()
    return {
        p11.CKA_CLASS: p11.CKO_PUBLIC_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_RSA,
        p11.CKA_TOKEN: True,
        p11.CKA_PRIVATE: False,
        p11.CKA_LABEL: label,
        p11.CKA_ID: ident,
        p11.CKA_VERIFY: True,
        p11.CKA_ENCRYPT: True,
        p11.CKA_WRAP: True,
        p11.CKA_MODULUS: _number(numbers.n),
        p11.CKA_PUBLIC_EXPONENT: _number(numbers.e),
    }


def secret(
    kind: int, value: bytes, label: str, ident: bytes, *usage: int, token: bool = True
) -> dict[int, p11.Value]:
    """A secret key that never shows its value."""
    template: dict[int, p11.Value] = {
        p11.CKA_CLASS: p11.CKO_SECRET_KEY,
        p11.CKA_KEY_TYPE: kind,
        p11.CKA_TOKEN: token,
        p11.CKA_PRIVATE: True,
        p11.CKA_SENSITIVE: True,
        p11.CKA_EXTRACTABLE: True,
        p11.CKA_LABEL: label,
        p11.CKA_ID: ident,
        p11.CKA_VALUE: value,
    }
    return template | dict.fromkeys(usage, True)


@dataclass(frozen=True)
class Keys:
    """One of each kind."""

    ec: ec.EllipticCurvePrivateKey
    rsa: rsa.RSAPrivateKey
    aes: bytes
    hmac: bytes

    @classmethod
    def generate(cls) -> Keys:
        return cls(
            ec.generate_private_key(ec.SECP256R1()),
            rsa.generate_private_key(public_exponent=65537, key_size=2048),
            urandom(32),
            urandom(32),
        )

    def templates(self) -> list[dict[int, p11.Value]]:
        ciphers = (p11.CKA_ENCRYPT, p11.CKA_DECRYPT, p11.CKA_WRAP, p11.CKA_UNWRAP)
        return [
            ec_private(self.ec),
            ec_public(self.ec.public_key()),
            rsa_private(self.rsa),
            rsa_public(self.rsa.public_key()),
            secret(p11.CKK_AES, self.aes, "aes", b"\xae", *ciphers),
            secret(p11.CKK_GENERIC_SECRET, self.hmac, "hmac", b"\x4c", p11.CKA_SIGN, p11.CKA_VERIFY),
        ]

    def check_ec(self, signature: bytes, digest: bytes = DIGEST) -> None:
        verify_ec(self.ec.public_key(), signature, digest)

    def check_rsa(self, signature: bytes) -> None:
        self.rsa.public_key().verify(signature, DATA, padding.PKCS1v15(), hashes.SHA256())

    def check_pss(self, signature: bytes) -> None:
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        self.rsa.public_key().verify(signature, DIGEST, pss, Prehashed(hashes.SHA256()))

    def check_hmac(self, tag: bytes) -> None:
        right = hmac.HMAC(self.hmac, hashes.SHA256())
        right.update(DATA)
        right.verify(tag)

    def sign_ec(self) -> bytes:
        """A signature as PKCS#11 spells it."""
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        r, s = decode_dss_signature(self.ec.sign(DIGEST, ec.ECDSA(Prehashed(hashes.SHA256()))))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def aes_ecb(self, data: bytes) -> bytes:
        """Data of whole blocks, encrypted."""
        encryptor = Cipher(algorithms.AES(self.aes), modes.ECB()).encryptor()
        return encryptor.update(data) + encryptor.finalize()


def verify_ec(public: ec.EllipticCurvePublicKey, signature: bytes, digest: bytes = DIGEST) -> None:
    """Raises InvalidSignature unless r and s are this key's."""
    half = len(signature) // 2
    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    public.verify(encode_dss_signature(r, s), digest, ec.ECDSA(Prehashed(hashes.SHA256())))


def provision(token: SoftToken, keys: Keys) -> None:
    with bare(token) as session:
        for template in keys.templates():
            session.create(template)


def private(label: str) -> dict[int, p11.Value]:
    """What to look for."""
    return {p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: label}


def public(label: str) -> dict[int, p11.Value]:
    return {p11.CKA_CLASS: p11.CKO_PUBLIC_KEY, p11.CKA_LABEL: label}


def shared(label: str) -> dict[int, p11.Value]:
    return {p11.CKA_CLASS: p11.CKO_SECRET_KEY, p11.CKA_LABEL: label}
