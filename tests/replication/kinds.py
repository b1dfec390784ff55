"""The key types that SoftHSM has: how keys of them are made, and by what a copy shows that it is the same key."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from cryptography.hazmat.primitives.asymmetric import dsa, ec

from tests import p11
from tests.der import tlv
from tests.ha.keys import DATA, DIGEST, ec_point
from tests.replication.contents import Attribute

Template = dict[int, p11.Value]
BLOCK = bytes(range(16))

P256 = bytes.fromhex("06082a8648ce3d030107")
P384 = bytes.fromhex("06052b81040022")
SECP256K1 = bytes.fromhex("06052b8104000a")
ED25519 = bytes.fromhex("06032b6570")
X25519 = bytes.fromhex("06032b656e")

# RFC 3526, group 14.
MODP_2048 = bytes.fromhex(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD"
    "EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED"
    "EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F"
    "83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B"
    "E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510"
    "15728E5A8AACAA68FFFFFFFFFFFFFFFF"
)


@dataclass(frozen=True)
class Keys:
    """Handles of what was made; a secret key stands for both."""

    public: int
    private: int


Proof = Callable[[p11.Session, Keys], bytes]
Check = Callable[[p11.Session, Keys, bytes], None]


@dataclass(frozen=True)
class Kind:
    """A key type: how it is generated; `prove` is what one copy does and `check` what another one makes of it."""

    name: str
    mechanism: int
    prove: Proof
    check: Check
    public: Callable[[], Template] = dict
    private: Callable[[], Template] = dict
    is_pair: bool = True
    is_wrappable: bool = True
    usage: tuple[int, ...] = ()  # of the private or secret key

    @property
    def object_class(self) -> int:
        """Of the key that is guarded."""
        return p11.CKO_PRIVATE_KEY if self.is_pair else p11.CKO_SECRET_KEY

    def generate(
        self,
        session: p11.Session,
        label: str,
        public: Mapping[int, p11.Value] | None = None,
        private: Mapping[int, p11.Value] | None = None,
        ident: bytes = b"\1",
    ) -> Keys:
        """On the token, with further attributes; of a secret key `private` are those."""
        common: Template = {p11.CKA_TOKEN: True, p11.CKA_LABEL: label, p11.CKA_ID: ident}
        use: Template = dict.fromkeys(self.usage, True)
        guarded: Template = common | {p11.CKA_PRIVATE: True} | use | self.private() | dict(private or {})
        if not self.is_pair:
            key = session.generate_key(self.mechanism, guarded)
            return Keys(key, key)
        shown: Template = common | {p11.CKA_PRIVATE: False} | self.public() | dict(public or {})
        return Keys(*session.generate_key_pair(self.mechanism, shown, guarded))

    def found(self, session: p11.Session, label: str) -> Keys:
        private = session.find_one({p11.CKA_CLASS: self.object_class, p11.CKA_LABEL: label})
        if not self.is_pair:
            return Keys(private, private)
        return Keys(session.find_one({p11.CKA_CLASS: p11.CKO_PUBLIC_KEY, p11.CKA_LABEL: label}), private)


def signing(mechanism: int, data: bytes) -> tuple[Proof, Check]:
    def prove(session: p11.Session, keys: Keys) -> bytes:
        return session.sign(mechanism, keys.private, data)

    def check(session: p11.Session, keys: Keys, signature: bytes) -> None:
        session.verify(mechanism, keys.public, data, signature)

    return prove, check


def encrypting(mechanism: int) -> tuple[Proof, Check]:
    def prove(session: p11.Session, keys: Keys) -> bytes:
        return session.encrypt(mechanism, keys.private, BLOCK)

    def check(session: p11.Session, keys: Keys, text: bytes) -> None:
        assert session.decrypt(mechanism, keys.private, text) == BLOCK

    return prove, check


def deriving(mechanism: Callable[[], p11.Mechanism], size: int = 32) -> tuple[Proof, Check]:
    """By what comes of the private key and a public one that is always the same."""

    def prove(session: p11.Session, keys: Keys) -> bytes:
        template: Template = {
            p11.CKA_CLASS: p11.CKO_SECRET_KEY,
            p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET,
            p11.CKA_VALUE_LEN: size,
            p11.CKA_TOKEN: False,
            p11.CKA_SENSITIVE: False,
            p11.CKA_EXTRACTABLE: True,
        }
        derived = session.derive(mechanism(), keys.private, template)
        (value,) = session.get(derived, p11.CKA_VALUE)
        session.destroy(derived)
        return value

    def check(session: p11.Session, keys: Keys, value: bytes) -> None:
        assert prove(session, keys) == value

    return prove, check


class EcdhParams(ctypes.Structure):
    """CK_ECDH1_DERIVE_PARAMS."""

    _fields_ = (
        ("kdf", ctypes.c_ulong),
        ("shared_size", ctypes.c_ulong),
        ("shared", ctypes.c_char_p),
        ("public_size", ctypes.c_ulong),
        ("public", ctypes.c_char_p),
    )


def ecdh(point: bytes) -> p11.Mechanism:
    parameter = EcdhParams(p11.CKD_NULL, 0, None, len(point), point)
    return p11.CKM_ECDH1_DERIVE, parameter


@cache
def peer() -> bytes:
    """A public point on P-256."""
    return ec_point(ec.generate_private_key(ec.SECP256R1()).public_key())


@cache
def dsa_parameters() -> Template:
    numbers = dsa.generate_parameters(key_size=1024).parameter_numbers()
    names = {p11.CKA_PRIME: numbers.p, p11.CKA_SUBPRIME: numbers.q, p11.CKA_BASE: numbers.g}
    return {n: value.to_bytes((value.bit_length() + 7) // 8, "big") for n, value in names.items()}


def rsa_public(bits: int = 1024) -> Template:
    return {
        p11.CKA_MODULUS_BITS: bits,
        p11.CKA_PUBLIC_EXPONENT: b"\1\0\1",
        p11.CKA_VERIFY: True,
        p11.CKA_ENCRYPT: True,
    }


def on_curve(params: bytes) -> Callable[[], Template]:
    return lambda: {p11.CKA_EC_PARAMS: params, p11.CKA_VERIFY: True}


def dh_public() -> Template:
    return {p11.CKA_PRIME: MODP_2048, p11.CKA_BASE: b"\2", p11.CKA_DERIVE: True}


def of_length(size: int) -> Callable[[], Template]:
    return lambda: {p11.CKA_VALUE_LEN: size}


_ECDSA = signing(p11.CKM_ECDSA, DIGEST)
_SIGN = (p11.CKA_SIGN,)
_CIPHER = (p11.CKA_ENCRYPT, p11.CKA_DECRYPT)

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "rsa",
            p11.CKM_RSA_PKCS_KEY_PAIR_GEN,
            *signing(p11.CKM_SHA256_RSA_PKCS, DATA),
            rsa_public,
            usage=(p11.CKA_SIGN, p11.CKA_DECRYPT),
        ),
        Kind("p256", p11.CKM_EC_KEY_PAIR_GEN, *_ECDSA, on_curve(P256), usage=(p11.CKA_SIGN, p11.CKA_DERIVE)),
        Kind("p384", p11.CKM_EC_KEY_PAIR_GEN, *_ECDSA, on_curve(P384), usage=_SIGN),
        Kind("secp256k1", p11.CKM_EC_KEY_PAIR_GEN, *_ECDSA, on_curve(SECP256K1), usage=_SIGN),
        Kind(
            "ed25519",
            p11.CKM_EC_EDWARDS_KEY_PAIR_GEN,
            *signing(p11.CKM_EDDSA, DATA),
            on_curve(ED25519),
            is_wrappable=False,
            usage=_SIGN,
        ),
        Kind(
            "x25519",
            p11.CKM_EC_EDWARDS_KEY_PAIR_GEN,
            *deriving(lambda: ecdh(tlv(0x04, bytes([9]) + bytes(31)))),
            on_curve(X25519),
            is_wrappable=False,
            usage=(p11.CKA_DERIVE,),
        ),
        Kind(
            "dsa",
            p11.CKM_DSA_KEY_PAIR_GEN,
            *signing(p11.CKM_DSA, DIGEST[:20]),
            lambda: dsa_parameters() | {p11.CKA_VERIFY: True},
            usage=_SIGN,
        ),
        Kind(
            "dh",
            p11.CKM_DH_PKCS_KEY_PAIR_GEN,
            *deriving(lambda: (p11.CKM_DH_PKCS_DERIVE, b"\4" + bytes(255)), 256),
            dh_public,
            usage=(p11.CKA_DERIVE,),
        ),
        Kind(
            "aes-128",
            p11.CKM_AES_KEY_GEN,
            *encrypting(p11.CKM_AES_ECB),
            private=of_length(16),
            is_pair=False,
            usage=_CIPHER,
        ),
        Kind(
            "aes-256",
            p11.CKM_AES_KEY_GEN,
            *encrypting(p11.CKM_AES_ECB),
            private=of_length(32),
            is_pair=False,
            usage=_CIPHER,
        ),
        Kind(
            "generic",
            p11.CKM_GENERIC_SECRET_KEY_GEN,
            *signing(p11.CKM_SHA256_HMAC, DATA),
            private=of_length(40),
            is_pair=False,
            usage=(p11.CKA_SIGN, p11.CKA_VERIFY),
        ),
        Kind(
            "long",  # longer than a block of its hash, so that each of its bytes counts
            p11.CKM_GENERIC_SECRET_KEY_GEN,
            *signing(p11.CKM_SHA256_HMAC, DATA),
            private=of_length(72),
            is_pair=False,
            usage=(p11.CKA_SIGN, p11.CKA_VERIFY),
        ),
        Kind(
            "odd",  # SoftHSM fills its copy with zeros
            p11.CKM_GENERIC_SECRET_KEY_GEN,
            *signing(p11.CKM_SHA256_HMAC, DATA),
            private=of_length(37),
            is_pair=False,
            usage=(p11.CKA_SIGN, p11.CKA_VERIFY),
            is_wrappable=False,
        ),
        Kind(
            "odd and long",
            p11.CKM_GENERIC_SECRET_KEY_GEN,
            *signing(p11.CKM_SHA256_HMAC, DATA),
            private=of_length(67),
            is_pair=False,
            usage=(p11.CKA_SIGN, p11.CKA_VERIFY),
            is_wrappable=False,
        ),
        Kind(
            "des3",
            p11.CKM_DES3_KEY_GEN,
            *encrypting(p11.CKM_DES3_ECB),
            is_pair=False,
            usage=_CIPHER,
        ),
    )
}
WRAPPABLE = [name for name, kind in KINDS.items() if kind.is_wrappable]
PINNED = [name for name, kind in KINDS.items() if not kind.is_wrappable]


_alive: list[object] = []  # what the pointers in templates point to


def inside(template: Mapping[int, p11.Value]) -> bytes:
    """The value of an attribute that is a list of attributes."""
    held = [ctypes.create_string_buffer(p11.value_bytes(value)) for value in template.values()]
    array = (Attribute * len(template))()
    for attribute, number, buffer in zip(array, template, held, strict=True):
        attribute.type, attribute.value = number, ctypes.addressof(buffer)
        attribute.size = len(p11.value_bytes(template[number]))
    _alive.append(held)
    return bytes(array)


def mechanisms(*numbers: int) -> bytes:
    """The value of CKA_ALLOWED_MECHANISMS."""
    return b"".join(map(p11.value_bytes, numbers))
