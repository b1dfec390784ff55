"""What applications do, each thing as a function that does it once and checks the result in software."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_ulong, c_void_p
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from os import urandom

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from tests import p11
from tests.ha.app import Application, code
from tests.ha.keys import DATA, DIGEST, P256, Keys, private, public, secret, shared

BLOCKS = DATA[:32]


class PssParams(ctypes.Structure):
    _fields_ = (("hash", c_ulong), ("mgf", c_ulong), ("salt", c_ulong))


class OaepParams(ctypes.Structure):
    _fields_ = (
        ("hash", c_ulong),
        ("mgf", c_ulong),
        ("source", c_ulong),
        ("data", c_void_p),
        ("size", c_ulong),
    )


class GcmParams(ctypes.Structure):
    _fields_ = (
        ("iv", ctypes.c_char_p),
        ("iv_size", c_ulong),
        ("iv_bits", c_ulong),
        ("aad", ctypes.c_char_p),
        ("aad_size", c_ulong),
        ("tag_bits", c_ulong),
    )


def gcm(iv: bytes) -> p11.Mechanism:
    return p11.CKM_AES_GCM, GcmParams(iv, len(iv), 8 * len(iv), b"aad", 3, 128)


PSS: p11.Mechanism = p11.CKM_RSA_PKCS_PSS, PssParams(p11.CKM_SHA256, p11.CKG_MGF1_SHA256, 32)
OAEP: p11.Mechanism = (
    p11.CKM_RSA_PKCS_OAEP,
    OaepParams(p11.CKM_SHA_1, p11.CKG_MGF1_SHA1, p11.CKZ_DATA_SPECIFIED, None, 0),
)


@dataclass
class Use:
    """A session with its keys found."""

    app: Application
    session: p11.Session
    keys: Keys
    pin: str
    ec: int
    ec_public: int
    rsa: int
    rsa_public: int
    aes: int
    hmac: int

    @classmethod
    def begin(cls, app: Application, keys: Keys, pin: str) -> Use:
        session = app.login(pin)
        handles = [
            session.find_one(template)
            for template in (
                private("ec"),
                public("ec"),
                private("rsa"),
                public("rsa"),
                shared("aes"),
                shared("hmac"),
            )
        ]
        return cls(app, session, keys, pin, *handles)


def sign_ecdsa(use: Use) -> None:
    use.keys.check_ec(use.session.sign(p11.CKM_ECDSA, use.ec, DIGEST))


def sign_rsa(use: Use) -> None:
    use.keys.check_rsa(use.session.sign(p11.CKM_SHA256_RSA_PKCS, use.rsa, DATA))


def sign_pss(use: Use) -> None:
    use.keys.check_pss(use.session.sign(PSS, use.rsa, DIGEST))


def sign_hmac(use: Use) -> None:
    use.keys.check_hmac(use.session.sign(p11.CKM_SHA256_HMAC, use.hmac, DATA))


def verify_ecdsa(use: Use) -> None:
    signature = use.keys.sign_ec()
    use.session.verify(p11.CKM_ECDSA, use.ec_public, DIGEST, signature)
    forged = bytes([signature[0] ^ 1]) + signature[1:]
    verify = partial(use.session.verify, p11.CKM_ECDSA, use.ec_public, DIGEST)
    assert code(lambda: verify(forged)) == "CKR_SIGNATURE_INVALID"


def verify_hmac(use: Use) -> None:
    tag = use.session.sign(p11.CKM_SHA256_HMAC, use.hmac, DATA)
    use.session.verify(p11.CKM_SHA256_HMAC, use.hmac, DATA, tag)


def encrypt_aes(use: Use) -> None:
    assert use.session.encrypt(p11.CKM_AES_ECB, use.aes, BLOCKS) == use.keys.aes_ecb(BLOCKS)


def decrypt_aes(use: Use) -> None:
    assert use.session.decrypt(p11.CKM_AES_ECB, use.aes, use.keys.aes_ecb(BLOCKS)) == BLOCKS


def encrypt_oaep(use: Use) -> None:
    oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
    assert use.keys.rsa.decrypt(use.session.encrypt(OAEP, use.rsa_public, DATA), oaep) == DATA


def decrypt_rsa(use: Use) -> None:
    sealed = use.keys.rsa.public_key().encrypt(DATA, padding.PKCS1v15())
    assert use.session.decrypt(p11.CKM_RSA_PKCS, use.rsa, sealed) == DATA


def digest(use: Use) -> None:
    assert use.session.digest(p11.CKM_SHA256, DATA) == sha256(DATA).digest()


def random(use: Use) -> None:
    assert use.session.random(32) != use.session.random(32)


def seed(use: Use) -> None:
    use.session.call("C_SeedRandom", urandom(16), 16)


def find(use: Use) -> None:
    assert use.session.find(private("ec")) == [use.ec]
    assert use.session.find(shared("aes")) == [use.aes]
    everything = use.session.find({})
    assert len(everything) == len(set(everything)) == 6


def attributes(use: Use) -> None:
    label, ident = use.session.get(use.ec, p11.CKA_LABEL, p11.CKA_ID)
    assert (label, ident) == (b"ec", b"\xec")
    (modulus,) = use.session.get(use.rsa_public, p11.CKA_MODULUS)
    assert int.from_bytes(modulus, "big") == use.keys.rsa.private_numbers().public_numbers.n


def object_size(use: Use) -> None:
    size = c_ulong()
    use.session.call("C_GetObjectSize", use.aes, byref(size))


def session_info(use: Use) -> None:
    info = use.session.info()
    assert (info.slot, info.state) == (use.app.slot, p11.CKS_RW_USER_FUNCTIONS)


def new_session(use: Use) -> None:
    session = use.app.open(rw=False)
    assert session.info().state == p11.CKS_RO_USER_FUNCTIONS
    use.keys.check_ec(session.sign(p11.CKM_ECDSA, use.ec, DIGEST))
    session.close()


def logout_and_login(use: Use) -> None:
    use.session.logout()
    assert use.session.find(private("ec")) == []
    use.session.login(use.pin)
    found = Use(use.app, use.session, use.keys, use.pin, *(use.session.find_one(t) for t in _WANTED))
    vars(use).update(vars(found))  # the handles of private objects are new
    sign_ecdsa(use)


_WANTED = (private("ec"), public("ec"), private("rsa"), public("rsa"), shared("aes"), shared("hmac"))


def token_info(use: Use) -> None:
    token = use.app.module.token(use.app.slot)
    assert (token.label, token.serial) == ("prod", "1599447001")


def slot_list(use: Use) -> None:
    assert use.app.module.slots() == [use.app.slot]


def mechanisms(use: Use) -> None:
    offered = use.app.module.mechanisms(use.app.slot)
    assert p11.CKM_ECDSA in offered
    info = (c_ulong * 3)()
    use.app.module.call("C_GetMechanismInfo", use.app.slot, p11.CKM_AES_ECB, info)
    assert (info[0], info[1]) == (16, 32)


def wrap(use: Use) -> None:
    wrapped = use.session.wrap(p11.CKM_RSA_PKCS, use.rsa_public, use.aes)
    assert use.keys.rsa.decrypt(wrapped, padding.PKCS1v15()) == use.keys.aes


_SESSION_AES: p11.Template = {
    p11.CKA_CLASS: p11.CKO_SECRET_KEY,
    p11.CKA_KEY_TYPE: p11.CKK_AES,
    p11.CKA_TOKEN: False,
    p11.CKA_PRIVATE: True,
    p11.CKA_ENCRYPT: True,
    p11.CKA_DECRYPT: True,
    p11.CKA_SENSITIVE: False,
    p11.CKA_EXTRACTABLE: True,
}


def unwrap(use: Use) -> None:
    value = urandom(32)
    wrapped = use.keys.rsa.public_key().encrypt(value, padding.PKCS1v15())
    key = use.session.unwrap(p11.CKM_RSA_PKCS, use.rsa, wrapped, _SESSION_AES)
    assert use.session.get(key, p11.CKA_VALUE) == (value,)
    use.session.destroy(key)


def generate_session_key(use: Use) -> None:
    key = use.session.generate_key(
        p11.CKM_AES_KEY_GEN, dict(_SESSION_AES) | {p11.CKA_VALUE_LEN: 16, p11.CKA_LABEL: "of the session"}
    )
    sealed = use.session.encrypt(p11.CKM_AES_ECB, key, BLOCKS)
    assert use.session.decrypt(p11.CKM_AES_ECB, key, sealed) == BLOCKS
    use.session.destroy(key)


def generate_session_pair(use: Use) -> None:
    usage: dict[int, p11.Value] = {p11.CKA_TOKEN: False, p11.CKA_LABEL: "of the session"}
    public_key, private_key = use.session.generate_key_pair(
        p11.CKM_EC_KEY_PAIR_GEN,
        usage | {p11.CKA_EC_PARAMS: P256, p11.CKA_VERIFY: True},
        usage | {p11.CKA_SIGN: True},
    )
    signature = use.session.sign(p11.CKM_ECDSA, private_key, DIGEST)
    use.session.verify(p11.CKM_ECDSA, public_key, DIGEST, signature)
    use.session.destroy(public_key)
    use.session.destroy(private_key)


def create_session_object(use: Use) -> None:
    template = secret(p11.CKK_AES, b"v" * 16, "temporary", b"", p11.CKA_ENCRYPT, token=False)
    key = use.session.create(template)
    assert len(use.session.encrypt(p11.CKM_AES_ECB, key, BLOCKS)) == 32
    use.session.destroy(key)


def write_token_object(use: Use) -> None:
    """Create, copy, change, read and destroy."""
    data: p11.Template = {
        p11.CKA_CLASS: p11.CKO_DATA,
        p11.CKA_TOKEN: True,
        p11.CKA_LABEL: "note",
        p11.CKA_VALUE: b"what it says",
    }
    note = use.session.create(data)
    copy = use.session.copy(note, {p11.CKA_LABEL: "its copy"})
    use.session.set(copy, {p11.CKA_LABEL: "renamed"})
    assert use.session.get(copy, p11.CKA_LABEL, p11.CKA_VALUE) == (b"renamed", b"what it says")
    assert use.session.find({p11.CKA_LABEL: "renamed"}) == [copy]
    use.session.destroy(copy)
    use.session.destroy(note)
    assert use.session.find({p11.CKA_CLASS: p11.CKO_DATA}) == []


EVERY: dict[str, Callable[[Use], None]] = {
    each.__name__: each
    for each in (
        sign_ecdsa,
        sign_rsa,
        sign_pss,
        sign_hmac,
        verify_ecdsa,
        verify_hmac,
        encrypt_aes,
        decrypt_aes,
        encrypt_oaep,
        decrypt_rsa,
        digest,
        random,
        seed,
        find,
        attributes,
        object_size,
        session_info,
        new_session,
        logout_and_login,
        token_info,
        slot_list,
        mechanisms,
        wrap,
        unwrap,
        generate_session_key,
        generate_session_pair,
        create_session_object,
        write_token_object,
    )
}
