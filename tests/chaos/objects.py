"""Objects of an application: their templates, how they are read back, and what proves which key is behind them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_ulong
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tests import p11

HIDDEN = b"pkcs11-ha "  # what is ours alone on a token begins so: a CKA_ID, or the CKA_APPLICATION of a data object
P256 = bytes.fromhex("06082a8648ce3d030107")
BLOCK = b"sixteen bytes it"
DIGEST = BLOCK * 2
PEER = bytes.fromhex(  # the base point of P-256: with it everybody can agree on a secret
    "046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
)
_ABSENT = c_ulong(-1).value


@dataclass(frozen=True)
class Kind:
    """What objects of one kind have in common; `usage`, some of its `flags` in their order, is true of each."""

    object_class: int
    key_type: int | None = None
    flags: tuple[str, ...] = ()
    usage: tuple[str, ...] = ()
    secret: bool = False


_CIPHER = ("CKA_ENCRYPT", "CKA_DECRYPT", "CKA_SIGN", "CKA_VERIFY", "CKA_WRAP", "CKA_UNWRAP", "CKA_DERIVE")
_PRIVATE = ("CKA_DECRYPT", "CKA_SIGN", "CKA_UNWRAP", "CKA_DERIVE")
_PUBLIC = ("CKA_ENCRYPT", "CKA_VERIFY", "CKA_WRAP")

KINDS = {
    "data": Kind(p11.CKO_DATA),
    "certificate": Kind(p11.CKO_CERTIFICATE),
    "aes": Kind(p11.CKO_SECRET_KEY, p11.CKK_AES, _CIPHER, ("CKA_ENCRYPT", "CKA_DECRYPT"), secret=True),
    "hmac": Kind(
        p11.CKO_SECRET_KEY, p11.CKK_GENERIC_SECRET, _CIPHER, ("CKA_SIGN", "CKA_VERIFY"), secret=True
    ),
    "ec": Kind(p11.CKO_PRIVATE_KEY, p11.CKK_EC, _PRIVATE, ("CKA_SIGN", "CKA_DERIVE"), secret=True),
    "ec public": Kind(p11.CKO_PUBLIC_KEY, p11.CKK_EC, _PUBLIC, ("CKA_VERIFY",)),
    "rsa": Kind(p11.CKO_PRIVATE_KEY, p11.CKK_RSA, _PRIVATE, ("CKA_DECRYPT", "CKA_SIGN"), secret=True),
    "rsa public": Kind(p11.CKO_PUBLIC_KEY, p11.CKK_RSA, _PUBLIC, ("CKA_ENCRYPT", "CKA_VERIFY")),
}
_KIND_OF = {(kind.object_class, kind.key_type): name for name, kind in KINDS.items()}


@dataclass(frozen=True)
class Thing:
    """An object as an application asks for it and as a token holds it; two are equal if a token shows them so.

    `uid` is the same through all changes, `material` is common to all that hold the same key, and `content` is
    what the application gave (a hexadecimal number; empty: the token made it).
    """

    kind: str
    label: str
    ident: str = ""
    private: bool = True
    sensitive: bool = False
    extractable: bool = False
    usage: tuple[str, ...] = ()
    content: str = field(default="", compare=False)
    uid: str = field(default="", compare=False)
    material: str = field(default="", compare=False)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Thing:
        return Thing(**(values | {"usage": tuple(values["usage"])}))


RECIPES = ("data", "certificate", "aes given", "aes", "ec", "rsa")


def new(recipe: str, uid: str, *, private: bool, sensitive: bool, extractable: bool) -> tuple[Thing, ...]:
    """What `make` is to make: one object, or a pair with its public key first."""
    name, _, given = recipe.partition(" ")
    kind = KINDS[name]
    content = uid.encode().ljust(32, b".").hex() if given or kind.key_type is None else ""
    ident = "" if name == "data" else uid.encode().hex()
    if not kind.secret:
        return (Thing(name, uid, ident, private, content=content, uid=uid, material=uid),)
    key = Thing(name, uid, ident, True, sensitive, extractable, kind.usage, content, uid, uid)
    if name == "aes":
        return (key,)
    usage = KINDS[f"{name} public"].usage
    public = Thing(f"{name} public", uid, ident, False, usage=usage, uid=f"{uid}p", material=f"{uid}/public")
    return public, key


def renamed(thing: Thing, label: str) -> Thing:
    """The same object under another name."""
    return replace(thing, label=label, ident=label.encode().hex() if thing.ident else "")


def template(thing: Thing) -> dict[int, p11.Value]:
    """All that is said of it when it is made, but for what makes a key of its kind."""
    kind = KINDS[thing.kind]
    said: dict[int, p11.Value] = {
        p11.CKA_CLASS: kind.object_class,
        p11.CKA_TOKEN: True,
        p11.CKA_PRIVATE: thing.private,
        p11.CKA_LABEL: thing.label,
    }
    if thing.kind != "data":
        said[p11.CKA_ID] = bytes.fromhex(thing.ident)
    if kind.key_type is not None:
        said[p11.CKA_KEY_TYPE] = kind.key_type
    if kind.secret:
        said |= {p11.CKA_SENSITIVE: thing.sensitive, p11.CKA_EXTRACTABLE: thing.extractable}
    said |= {getattr(p11, flag): flag in thing.usage for flag in kind.flags}
    if thing.content:
        said[p11.CKA_VALUE] = bytes.fromhex(thing.content)
    if thing.kind == "certificate":
        said |= {p11.CKA_CERTIFICATE_TYPE: p11.CKC_X_509, p11.CKA_SUBJECT: thing.uid.encode()}
    return said


def changeable(thing: Thing) -> dict[int, p11.Value]:
    """What another name for it, or for its copy, consists of."""
    ident: p11.Template = {p11.CKA_ID: bytes.fromhex(thing.ident)} if thing.ident else {}
    return {p11.CKA_LABEL: thing.label} | dict(ident)


def search(thing: Thing) -> dict[int, p11.Value]:
    kind = KINDS[thing.kind]
    return {p11.CKA_CLASS: kind.object_class, p11.CKA_LABEL: thing.label}


def make(session: p11.Session, things: Sequence[Thing]) -> list[int]:
    """One object that is created or generated, or a key pair: first its public key."""
    first = things[0]
    if first.content:
        return [session.create(template(first))]
    if first.kind == "aes":
        return [session.generate_key(p11.CKM_AES_KEY_GEN, template(first) | {p11.CKA_VALUE_LEN: 32})]
    public, private = (template(thing) for thing in things)
    if first.kind == "ec public":
        public[p11.CKA_EC_PARAMS] = P256
        return [*session.generate_key_pair(p11.CKM_EC_KEY_PAIR_GEN, public, private)]
    public |= {p11.CKA_MODULUS_BITS: 2048, p11.CKA_PUBLIC_EXPONENT: b"\x01\x00\x01"}
    return [*session.generate_key_pair(p11.CKM_RSA_PKCS_KEY_PAIR_GEN, public, private)]


# ---- reading


@dataclass(frozen=True)
class Hidden:
    """An object that no application may see."""

    object_class: int
    label: str
    ident: bytes
    application: str
    value: bytes


def is_hidden(session: p11.Session, handle: int) -> bool:
    if number(session.get(handle, p11.CKA_CLASS)[0]) == p11.CKO_DATA:
        return session.get(handle, p11.CKA_APPLICATION)[0].startswith(HIDDEN)
    return session.get(handle, p11.CKA_ID)[0].startswith(HIDDEN)


def read_hidden(session: p11.Session, handle: int) -> Hidden:
    object_class, label = session.get(handle, p11.CKA_CLASS, p11.CKA_LABEL)
    if number(object_class) == p11.CKO_DATA:
        application, value = session.get(handle, p11.CKA_APPLICATION, p11.CKA_VALUE)
        return Hidden(number(object_class), label.decode(), b"", application.decode(), value)
    (ident,) = session.get(handle, p11.CKA_ID)
    return Hidden(number(object_class), label.decode(), ident, "", b"")


def read(session: p11.Session, handle: int) -> Thing:
    """An object that applications see, as it is now; its content is not looked at."""
    raw_class, label, private = session.get(handle, p11.CKA_CLASS, p11.CKA_LABEL, p11.CKA_PRIVATE)
    object_class = number(raw_class)
    if object_class == p11.CKO_DATA:
        return Thing("data", label.decode(), private=private == b"\x01")
    (ident,) = session.get(handle, p11.CKA_ID)
    if object_class == p11.CKO_CERTIFICATE:
        return Thing("certificate", label.decode(), ident.hex(), private == b"\x01")
    key_type = number(session.get(handle, p11.CKA_KEY_TYPE)[0])
    name = _KIND_OF[object_class, key_type]
    kind = KINDS[name]
    true = _true(session, handle, kind.flags)
    secret = _true(session, handle, ("CKA_SENSITIVE", "CKA_EXTRACTABLE") if kind.secret else ())
    return Thing(
        name,
        label.decode(),
        ident.hex(),
        private == b"\x01",
        "CKA_SENSITIVE" in secret,
        "CKA_EXTRACTABLE" in secret,
        true,
    )


def _true(session: p11.Session, handle: int, flags: Sequence[str]) -> tuple[str, ...]:
    values = session.get(handle, *(getattr(p11, flag) for flag in flags)) if flags else ()
    return tuple(flag for flag, value in zip(flags, values, strict=True) if value == b"\x01")


def number(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


# ---- proofs


class _EcdhParameters(ctypes.Structure):
    _fields_ = (
        ("kdf", c_ulong),
        ("shared_size", c_ulong),
        ("shared", ctypes.c_char_p),
        ("public_size", c_ulong),
        ("public", ctypes.c_char_p),
    )


def proof(session: p11.Session, handle: int, kind: str) -> bytes:
    """What only this content or this key can say, and says always."""
    match kind:
        case "data" | "certificate":
            return session.get(handle, p11.CKA_VALUE)[0]
        case "aes":
            return session.encrypt(p11.CKM_AES_ECB, handle, BLOCK)
        case "hmac":
            return session.sign(p11.CKM_SHA256_HMAC, handle, BLOCK)
        case "ec":
            return _agreed_secret(session, handle)
        case "ec public":
            return session.get(handle, p11.CKA_EC_POINT)[0]
        case "rsa":
            return session.sign(p11.CKM_SHA256_RSA_PKCS, handle, BLOCK)
        case _:
            return session.get(handle, p11.CKA_MODULUS)[0]


def _agreed_secret(session: p11.Session, handle: int) -> bytes:
    readable: p11.Template = {
        p11.CKA_CLASS: p11.CKO_SECRET_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET,
        p11.CKA_TOKEN: False,
        p11.CKA_SENSITIVE: False,
        p11.CKA_EXTRACTABLE: True,
        p11.CKA_VALUE_LEN: 32,
    }
    parameters = _EcdhParameters(kdf=p11.CKD_NULL, public=PEER, public_size=len(PEER))
    key = session.derive((p11.CKM_ECDH1_DERIVE, parameters), handle, readable)
    return session.get(key, p11.CKA_VALUE)[0]
