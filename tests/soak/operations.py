"""What a client does, each thing once: it works through the module and compares what comes out with software.

An operation returns nothing, raises CkError if a call failed, or Wrong if it answered CKR_OK and something false.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_ubyte, c_ulong
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding
from cryptography.hazmat.primitives.padding import PKCS7

from tests import p11
from tests.chaos import objects
from tests.chaos.objects import Thing
from tests.ha.keys import Keys, private, public, secret, shared, verify_ec
from tests.ha.operations import PSS, gcm
from tests.soak.checker import uid_of
from tests.soak.history import Record, Seen, Wish, Wrote, now

OWN_AT_MOST = 3  # token objects of a thread
PIECES = (1, 16, 100, 256, 1000)


class Wrong(Exception):
    """A call answered CKR_OK, and what came out is not right; `str` says what."""


@dataclass
class Work:
    """One thread of a client: its session, the handles it has found, and the token objects it has made."""

    client: str
    thread: int
    module: p11.Module
    slot: int
    session: p11.Session
    keys: Keys
    other_ec: ec.EllipticCurvePublicKey
    chance: random.Random
    tell: Callable[[Record], None]
    uids: Iterator[str]
    handles: dict[str, int] = field(default_factory=dict)
    own: list[Thing] = field(default_factory=list)
    gone: list[Thing] = field(default_factory=list)
    points: dict[str, bytes] = field(default_factory=dict)

    def key(self, name: str) -> int:
        """The handle of a provisioned key, found once."""
        if name not in self.handles:
            self.handles[name] = self.session.find_one(_WANTED[name])
        return self.handles[name]

    def handle(self, thing: Thing) -> int:
        """That of a token object of ours."""
        name = f"{thing.kind} {thing.label}"
        if name not in self.handles:
            self.handles[name] = self.session.find_one(objects.search(thing))
        return self.handles[name]

    def data(self, most: int = 200) -> bytes:
        return self.chance.randbytes(self.chance.randint(1, most))

    def pieces(self) -> list[bytes]:
        """For several Updates."""
        return [self.chance.randbytes(self.chance.choice(PIECES)) for _ in range(self.chance.randint(2, 5))]


_WANTED: dict[str, p11.Template] = {
    "ec": private("ec"),
    "other ec": private("ec2"),
    "ec public": public("ec"),
    "rsa": private("rsa"),
    "rsa public": public("rsa"),
    "aes": shared("aes"),
    "hmac": shared("hmac"),
}


@dataclass(frozen=True)
class Operation:
    name: str
    work: Callable[[Work], None]
    weight: float
    writes: bool  # token objects: where they are replicated


OPERATIONS: list[Operation] = []

# p11-kit 0.24's client carries no parameters of these mechanisms, and takes them off its list.
NOT_THROUGH_P11_KIT = ("cbc", "cbc-in-parts", "seal-gcm", "ctr", "wrap")


def operation(
    weight: float, *, writes: bool = False
) -> Callable[[Callable[[Work], None]], Callable[[Work], None]]:
    """`weight` is how often it comes, against all the others."""

    def enter(work: Callable[[Work], None]) -> Callable[[Work], None]:
        OPERATIONS.append(Operation(work.__name__.replace("_", "-"), work, weight, writes))
        return work

    return enter


def same(found: object, right: object, what: str) -> None:
    if found != right:
        raise Wrong(f"{what}: {found!r:.80} instead of {right!r:.80}")


def refused(call: Callable[[], object], rv: int) -> None:
    """It must answer this code."""
    try:
        call()
    except p11.CkError as error:
        if error.rv == rv:
            return
        raise
    raise Wrong(f"CKR_OK instead of {p11.rv_name(rv)}")


@contextmanager
def verified() -> Iterator[None]:
    try:
        yield
    except InvalidSignature:
        raise Wrong("the signature does not verify") from None


# ---- signatures


@operation(110)
def sign_ecdsa(w: Work) -> None:
    name, key = w.chance.choice((("ec", w.keys.ec.public_key()), ("other ec", w.other_ec)))
    digest = w.chance.randbytes(32)
    signature = w.session.sign(p11.CKM_ECDSA, w.key(name), digest)
    with verified():
        verify_ec(key, signature, digest)


@operation(60)
def sign_rsa(w: Work) -> None:
    data = w.data()
    signature = w.session.sign(p11.CKM_SHA256_RSA_PKCS, w.key("rsa"), data)
    with verified():
        w.keys.rsa.public_key().verify(signature, data, padding.PKCS1v15(), hashes.SHA256())


@operation(40)
def sign_pss(w: Work) -> None:
    digest = w.chance.randbytes(32)
    signature = w.session.sign(PSS, w.key("rsa"), digest)
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    with verified():
        w.keys.rsa.public_key().verify(signature, digest, pss, Prehashed(hashes.SHA256()))


@operation(40)
def sign_in_parts(w: Work) -> None:
    pieces = w.pieces()
    w.session.init("C_SignInit", p11.CKM_SHA256_RSA_PKCS, w.key("rsa"))
    for piece in pieces:
        w.session.feed("C_SignUpdate", piece)
    signature = w.session.output("C_SignFinal")
    with verified():
        w.keys.rsa.public_key().verify(signature, b"".join(pieces), padding.PKCS1v15(), hashes.SHA256())


@operation(60)
def verify_rsa(w: Work) -> None:
    data = w.data()
    signature = (
        w.keys.rsa.sign(data, padding.PKCS1v15(), hashes.SHA256()) if w.chance.random() < 0.1 else None
    )
    if signature is None:
        signature = w.session.sign(p11.CKM_SHA256_RSA_PKCS, w.key("rsa"), data)
    w.session.verify(p11.CKM_SHA256_RSA_PKCS, w.key("rsa public"), data, signature)


@operation(30)
def refuse_forged(w: Work) -> None:
    digest = w.chance.randbytes(32)
    signature = w.session.sign(p11.CKM_ECDSA, w.key("ec"), digest)
    forged = digest[:-1] + bytes([digest[-1] ^ 1])
    refused(
        lambda: w.session.verify(p11.CKM_ECDSA, w.key("ec public"), forged, signature),
        p11.CKR_SIGNATURE_INVALID,
    )
    w.session.verify(p11.CKM_ECDSA, w.key("ec public"), digest, signature)


def _hmac(w: Work, data: bytes) -> bytes:
    tag = hmac.HMAC(w.keys.hmac, hashes.SHA256())
    tag.update(data)
    return tag.finalize()


@operation(80)
def sign_hmac(w: Work) -> None:
    data = w.data()
    same(w.session.sign(p11.CKM_SHA256_HMAC, w.key("hmac"), data), _hmac(w, data), "HMAC")


@operation(40)
def sign_hmac_in_parts(w: Work) -> None:
    pieces = w.pieces()
    w.session.init("C_SignInit", p11.CKM_SHA256_HMAC, w.key("hmac"))
    for piece in pieces:
        w.session.feed("C_SignUpdate", piece)
    same(w.session.output("C_SignFinal"), _hmac(w, b"".join(pieces)), "HMAC in parts")


# ---- digests and ciphers


@operation(70)
def digest(w: Work) -> None:
    data = w.data()
    same(w.session.digest(p11.CKM_SHA256, data), sha256(data).digest(), "digest")


@operation(60)
def digest_in_parts(w: Work) -> None:
    pieces = w.pieces()
    w.session.init("C_DigestInit", p11.CKM_SHA256)
    for piece in pieces:
        w.session.feed("C_DigestUpdate", piece)
    same(w.session.output("C_DigestFinal"), sha256(b"".join(pieces)).digest(), "digest in parts")


def _cbc(w: Work, iv: bytes, data: bytes) -> bytes:
    padder, encryptor = PKCS7(128).padder(), Cipher(algorithms.AES(w.keys.aes), modes.CBC(iv)).encryptor()
    return encryptor.update(padder.update(data) + padder.finalize()) + encryptor.finalize()


@operation(80)
def cbc(w: Work) -> None:
    data, iv = w.data(), w.chance.randbytes(16)
    mechanism = p11.CKM_AES_CBC_PAD, iv
    sealed = w.session.encrypt(mechanism, w.key("aes"), data)
    same(sealed, _cbc(w, iv, data), "AES-CBC")
    same(w.session.decrypt(mechanism, w.key("aes"), sealed), data, "AES-CBC back")


def _update(w: Work, name: str, piece: bytes) -> bytes:
    buffer, size = ctypes.create_string_buffer(len(piece) + 32), c_ulong(len(piece) + 32)
    w.session.call(name, piece, len(piece), buffer, ctypes.byref(size))
    return buffer.raw[: size.value]


@operation(50)
def cbc_in_parts(w: Work) -> None:
    pieces, iv = w.pieces(), w.chance.randbytes(16)
    w.session.init("C_EncryptInit", (p11.CKM_AES_CBC_PAD, iv), w.key("aes"))
    sealed = b"".join(_update(w, "C_EncryptUpdate", piece) for piece in pieces) + w.session.output(
        "C_EncryptFinal"
    )
    same(sealed, _cbc(w, iv, b"".join(pieces)), "AES-CBC in parts")
    w.session.init("C_DecryptInit", (p11.CKM_AES_CBC_PAD, iv), w.key("aes"))
    halves = sealed[: len(sealed) // 2], sealed[len(sealed) // 2 :]
    back = b"".join(_update(w, "C_DecryptUpdate", half) for half in halves) + w.session.output(
        "C_DecryptFinal"
    )
    same(back, b"".join(pieces), "AES-CBC in parts, back")


@operation(60)
def seal_gcm(w: Work) -> None:
    data, iv = w.data(), w.chance.randbytes(12)
    sealed = w.session.encrypt(gcm(iv), w.key("aes"), data)
    same(sealed, AESGCM(w.keys.aes).encrypt(iv, data, b"aad"), "AES-GCM")
    same(w.session.decrypt(gcm(iv), w.key("aes"), sealed), data, "AES-GCM back")


class _CtrParams(ctypes.Structure):
    _fields_ = (("bits", c_ulong), ("block", c_ubyte * 16))


@operation(50)
def ctr(w: Work) -> None:
    data, block = w.data(), w.chance.randbytes(16)
    parameters = _CtrParams(128, (c_ubyte * 16).from_buffer_copy(block))
    encryptor = Cipher(algorithms.AES(w.keys.aes), modes.CTR(block)).encryptor()
    sealed = w.session.encrypt((p11.CKM_AES_CTR, parameters), w.key("aes"), data)
    same(sealed, encryptor.update(data) + encryptor.finalize(), "AES-CTR")


@operation(20)
def decrypt_rsa(w: Work) -> None:
    data = w.data(100)
    sealed = w.keys.rsa.public_key().encrypt(data, padding.PKCS1v15())
    same(w.session.decrypt(p11.CKM_RSA_PKCS, w.key("rsa"), sealed), data, "RSA")


@operation(50)
def random_bytes(w: Work) -> None:
    if w.session.random(16) == w.session.random(16):
        raise Wrong("twice the same random bytes")


# ---- objects and sessions


@operation(20)
def find(w: Work) -> None:
    """A handle is its object's for ever."""
    name = w.chance.choice(list(_WANTED))
    same(w.session.find(_WANTED[name]), [w.key(name)], f"finding a key: {name}")


@operation(40)
def attributes(w: Work) -> None:
    same(w.session.get(w.key("ec"), p11.CKA_LABEL, p11.CKA_ID), (b"ec", b"\xec"), "attributes")
    (modulus,) = w.session.get(w.key("rsa public"), p11.CKA_MODULUS)
    same(int.from_bytes(modulus, "big"), w.keys.rsa.private_numbers().public_numbers.n, "modulus")


@operation(15)
def new_session(w: Work) -> None:
    session = w.module.open(w.slot, rw=w.chance.random() < 0.5)
    try:
        states = (p11.CKS_RO_USER_FUNCTIONS, p11.CKS_RW_USER_FUNCTIONS)
        same(session.info().state in states, True, "logged in")
        digest = w.chance.randbytes(32)
        signature = session.sign(p11.CKM_ECDSA, w.key("ec"), digest)
    finally:
        session.close()
    with verified():
        verify_ec(w.keys.ec.public_key(), signature, digest)


def _ecb(value: bytes, data: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(value), modes.ECB()).encryptor()
    return encryptor.update(data) + encryptor.finalize()


@operation(20)
def session_object(w: Work) -> None:
    """Made of a known value, used, copied, used again."""
    value, block = w.chance.randbytes(16), w.chance.randbytes(32)
    template = secret(p11.CKK_AES, value, "of a session", b"", p11.CKA_ENCRYPT, token=False)
    key = w.session.create(template)
    same(w.session.encrypt(p11.CKM_AES_ECB, key, block), _ecb(value, block), "session key")
    copy = w.session.copy(key, {p11.CKA_LABEL: "its copy"})
    w.session.destroy(key)
    same(w.session.encrypt(p11.CKM_AES_ECB, copy, block), _ecb(value, block), "copy of a session key")
    w.session.destroy(copy)


_UNWRAPPED: p11.Template = {
    p11.CKA_CLASS: p11.CKO_SECRET_KEY,
    p11.CKA_KEY_TYPE: p11.CKK_AES,
    p11.CKA_TOKEN: False,
    p11.CKA_PRIVATE: True,
    p11.CKA_ENCRYPT: True,
    p11.CKA_DECRYPT: True,
    p11.CKA_SENSITIVE: False,
    p11.CKA_EXTRACTABLE: True,
}


@operation(15)
def unwrap(w: Work) -> None:
    value, block = w.chance.randbytes(32), w.chance.randbytes(16)
    wrapped = w.keys.rsa.public_key().encrypt(value, padding.PKCS1v15())
    key = w.session.unwrap(p11.CKM_RSA_PKCS, w.key("rsa"), wrapped, _UNWRAPPED)
    same(w.session.encrypt(p11.CKM_AES_ECB, key, block), _ecb(value, block), "unwrapped key")
    w.session.destroy(key)


@operation(15)
def wrap(w: Work) -> None:
    wrapped = w.session.wrap(p11.CKM_AES_KEY_WRAP_PAD, w.key("aes"), w.key("hmac"))
    same(wrapped, aes_key_wrap_with_padding(w.keys.aes, w.keys.hmac), "wrapped key")


@operation(4, writes=True)
def generated_session_key(w: Work) -> None:
    key = w.session.generate_key(p11.CKM_AES_KEY_GEN, {**_UNWRAPPED, p11.CKA_VALUE_LEN: 16})
    block = w.chance.randbytes(16)
    sealed = w.session.encrypt(p11.CKM_AES_ECB, key, block)
    same(w.session.decrypt(p11.CKM_AES_ECB, key, sealed), block, "generated session key")
    w.session.destroy(key)


# ---- token objects


@contextmanager
def _written(w: Work, *wishes: tuple[Thing, str | None]) -> Iterator[None]:
    """What is about to be, and what was answered."""
    start = now()
    for thing, label in wishes:
        w.tell(Wish(w.client, start, thing.kind, uid_of(thing.label), label))
    rv = "CKR_OK"
    try:
        yield
    except p11.CkError as error:
        rv = error.name
        raise
    finally:
        for thing, _ in wishes:
            w.tell(Wrote(w.client, start, now(), thing.kind, uid_of(thing.label), rv))


def _keep(w: Work, things: Sequence[Thing], handles: Sequence[int]) -> None:
    w.own += things
    w.handles |= {
        f"{thing.kind} {thing.label}": handle for thing, handle in zip(things, handles, strict=True)
    }


def _lose_sight(w: Work, thing: Thing) -> None:
    """It is not used any more, as it is gone, or may be."""
    w.own.remove(thing)
    w.handles.pop(f"{thing.kind} {thing.label}", None)


@operation(2.4, writes=True)
def make(w: Work) -> None:
    recipe = w.chance.choice(("data", "certificate", "aes given", "aes", "ec"))
    sensitive, extractable = w.chance.random() < 0.5, w.chance.random() < 0.3
    things = objects.new(recipe, next(w.uids), private=True, sensitive=sensitive, extractable=extractable)
    if len(w.own) + len(things) > OWN_AT_MOST:
        destroy(w)
        return
    with _written(w, *((thing, thing.label) for thing in things)):
        handles = objects.make(w.session, things)
    _keep(w, things, handles)
    if recipe == "ec":
        w.points[things[1].label] = w.session.get(handles[0], p11.CKA_EC_POINT)[0][2:]


@operation(0.8, writes=True)
def copy(w: Work) -> None:
    sources = [thing for thing in w.own if thing.kind in ("aes", "data")]
    if not sources or len(w.own) >= OWN_AT_MOST:
        make(w)
        return
    source = w.chance.choice(sources)
    before = objects.proof(w.session, w.handle(source), source.kind)
    new = objects.renamed(source, next(w.uids))
    with _written(w, (new, new.label)):
        handle = w.session.copy(w.handle(source), objects.changeable(new))
    _keep(w, [new], [handle])
    same(objects.proof(w.session, handle, new.kind), before, "copy")


@operation(0.8, writes=True)
def change(w: Work) -> None:
    if not w.own:
        make(w)
        return
    thing = w.chance.choice(w.own)
    uid, _, count = thing.label.partition("~")
    new = objects.renamed(thing, f"{uid}~{int(count or 0) + 1}")
    handle = w.handle(thing)
    _lose_sight(w, thing)
    with _written(w, (thing, new.label)):
        w.session.set(handle, objects.changeable(new))
    _keep(w, [new], [handle])
    if thing.label in w.points:
        w.points[new.label] = w.points.pop(thing.label)


@operation(2, writes=True)
def destroy(w: Work) -> None:
    if not w.own:
        make(w)
        return
    thing = w.chance.choice(w.own)
    handle = w.handle(thing)
    _lose_sight(w, thing)
    with _written(w, (thing, None)):
        w.session.destroy(handle)
    w.gone.append(thing)
    w.gone = w.gone[-OWN_AT_MOST:]


@operation(12, writes=True)
def use(w: Work) -> None:
    """A key or an object of ours shows who it is."""
    if not w.own:
        make(w)
        return
    thing = w.chance.choice(w.own)
    if thing.kind != "ec":
        proof = objects.proof(w.session, w.handle(thing), thing.kind)
        w.tell(Seen(w.client, thing.kind, uid_of(thing.label), sha256(proof).hexdigest()[:16]))
    elif thing.label in w.points:
        digest = w.chance.randbytes(32)
        signature = w.session.sign(p11.CKM_ECDSA, w.handle(thing), digest)
        with verified():
            point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), w.points[thing.label])
            verify_ec(point, signature, digest)


@operation(3, writes=True)
def look(w: Work) -> None:
    """What is ours is found, and what was destroyed is not."""
    if w.own:
        thing = w.chance.choice(w.own)
        same(w.session.find(objects.search(thing)), [w.handle(thing)], f"finding an object: {thing.label}")
    if w.gone:
        thing = w.chance.choice(w.gone)
        same(w.session.find(objects.search(thing)), [], f"finding what was destroyed: {thing.label}")
