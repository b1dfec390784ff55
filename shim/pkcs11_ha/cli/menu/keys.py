"""Numbers 45 and 60 to 66: keys are made, wrapped, unwrapped and derived; random numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pkcs11_ha import ck
from pkcs11_ha.cli.menu import attributes, known
from pkcs11_ha.cli.menu.client import Mechanism, Template, Value, buffer
from pkcs11_ha.cli.menu.desk import Desk, Session, at_most, choice
from pkcs11_ha.cli.menu.parameters import Asking, Pbkd2

KNOWN_LABEL = "KNOWN-TEST-KEY-"
_RANDOM_AT_MOST = 1 << 20
_KEY_BYTES_AT_MOST = 1 << 16

_SECRET_USES = (ck.CKA_SIGN, ck.CKA_VERIFY, ck.CKA_DERIVE)


@dataclass(frozen=True)
class _Kind:
    """A kind of key that is generated; `public` is empty for a secret key."""

    words: str
    mechanism: int
    public: Template
    private: Template


def _aes(bits: int) -> _Kind:
    template: Template = {ck.CKA_VALUE_LEN: bits // 8} | dict.fromkeys(known.AES_USES, True)
    return _Kind(f"AES, {bits} bits", ck.CKM_AES_KEY_GEN, {}, template)


def _rsa(bits: int) -> _Kind:
    size: dict[int, Value] = {ck.CKA_MODULUS_BITS: bits, ck.CKA_PUBLIC_EXPONENT: b"\1\0\1"}
    public = size | dict.fromkeys((ck.CKA_VERIFY, ck.CKA_ENCRYPT, ck.CKA_WRAP), True)
    private = dict.fromkeys((ck.CKA_SIGN, ck.CKA_DECRYPT, ck.CKA_UNWRAP), True)
    return _Kind(f"RSA, {bits} bits", ck.CKM_RSA_PKCS_KEY_PAIR_GEN, public, private)


def _curve(words: str, mechanism: int, params: str, *uses: int) -> _Kind:
    public: Template = {ck.CKA_EC_PARAMS: bytes.fromhex(params)}
    if ck.CKA_SIGN in uses:
        public = {**public, ck.CKA_VERIFY: True}
    return _Kind(words, mechanism, public, dict.fromkeys(uses, True))


_BOTH = (ck.CKA_SIGN, ck.CKA_DERIVE)
_EC, _EDWARDS = ck.CKM_EC_KEY_PAIR_GEN, ck.CKM_EC_EDWARDS_KEY_PAIR_GEN
_KINDS: dict[str, _Kind] = {
    "aes128": _aes(128),
    "aes192": _aes(192),
    "aes256": _aes(256),
    "secret": _Kind(
        "generic secret, 256 bits",
        ck.CKM_GENERIC_SECRET_KEY_GEN,
        {},
        {ck.CKA_VALUE_LEN: 32} | dict.fromkeys(_SECRET_USES, True),
    ),
    "des3": _Kind("triple DES", ck.CKM_DES3_KEY_GEN, {}, dict.fromkeys(known.AES_USES, True)),
    "rsa2048": _rsa(2048),
    "rsa3072": _rsa(3072),
    "rsa4096": _rsa(4096),
    "p256": _curve("EC, P-256", _EC, "06082a8648ce3d030107", *_BOTH),
    "p384": _curve("EC, P-384", _EC, "06052b81040022", *_BOTH),
    "p521": _curve("EC, P-521", _EC, "06052b81040023", *_BOTH),
    "secp256k1": _curve("EC, secp256k1", _EC, "06052b8104000a", *_BOTH),
    "ed25519": _curve("Ed25519 by its name", _EDWARDS, known.ED25519.hex(), ck.CKA_SIGN),
    "ed25519oid": _curve("Ed25519 by its OID", _EDWARDS, "06032b6570", ck.CKA_SIGN),
    "x25519": _curve("X25519", ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN, "130a63757276653235353139", ck.CKA_DERIVE),
}

# What C_UnwrapKey and C_DeriveKey are told of the key that comes out.
_MADE: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "aes": (ck.CKO_SECRET_KEY, ck.CKK_AES, known.AES_USES),
    "secret": (ck.CKO_SECRET_KEY, ck.CKK_GENERIC_SECRET, _SECRET_USES),
    "des3": (ck.CKO_SECRET_KEY, ck.CKK_DES3, known.AES_USES),
    "rsa": (ck.CKO_PRIVATE_KEY, ck.CKK_RSA, (ck.CKA_SIGN, ck.CKA_DECRYPT, ck.CKA_UNWRAP)),
    "ec": (ck.CKO_PRIVATE_KEY, ck.CKK_EC, _BOTH),
    "ed25519": (ck.CKO_PRIVATE_KEY, ck.CKK_EC_EDWARDS, (ck.CKA_SIGN,)),
}
_SECRETS = tuple(name for name, (made, _, _) in _MADE.items() if made == ck.CKO_SECRET_KEY)

_PRFS = {
    "sha1": ck.CKP_PKCS5_PBKD2_HMAC_SHA1,
    "sha256": ck.CKP_PKCS5_PBKD2_HMAC_SHA256,
    "sha384": ck.CKP_PKCS5_PBKD2_HMAC_SHA384,
    "sha512": ck.CKP_PKCS5_PBKD2_HMAC_SHA512,
}


def _named(desk: Desk, session: Session) -> dict[int, Value]:
    """Label and place of what is made; a pair has one CKA_ID."""
    label = desk.dialogue.text("Label")
    on_token = desk.dialogue.yes("On the token, not of the session alone", default=session.writes)
    return {ck.CKA_LABEL: label, ck.CKA_TOKEN: on_token, ck.CKA_ID: os.urandom(8)}


def _guarded(desk: Desk) -> dict[int, Value]:
    """How a key is kept."""
    extractable = desk.dialogue.yes("May it be wrapped (CKA_EXTRACTABLE)", default=False)
    return {ck.CKA_PRIVATE: True, ck.CKA_SENSITIVE: True, ck.CKA_EXTRACTABLE: extractable}


def generate(desk: Desk) -> None:
    """45"""
    session = desk.session()
    for name, kind in _KINDS.items():
        desk.say(f"  {name:<12}{kind.words}")
    kind = _KINDS[desk.dialogue.ask("Kind of key", choice(_KINDS))]
    template = _named(desk, session)
    kept = template | _guarded(desk)
    mechanism = Mechanism(kind.mechanism)
    if not kind.public:
        key = desk.client.generate_key(session.handle, mechanism, {**kind.private, **kept})
        desk.keep(session, key)
        return
    public = {**kind.public, **template, ck.CKA_PRIVATE: False}
    desk.keep(
        session, *desk.client.generate_pair(session.handle, mechanism, public, {**kind.private, **kept})
    )


def wrap(desk: Desk) -> None:
    """60"""
    session = desk.session()
    wrapping = desk.object(session, "Wrapping key", {ck.CKA_WRAP: True})
    number = desk.mechanism(session.slot, ck.CKF_WRAP, desk.key_type(session, wrapping))
    mechanism = Asking(desk, session, number, fresh=True).mechanism()
    key = desk.object(session, "Key to be wrapped", {ck.CKA_EXTRACTABLE: True})
    desk.put("Wrapped key", desk.client.wrap(session.handle, mechanism, wrapping, key))


def unwrap(desk: Desk) -> None:
    """61"""
    session = desk.session()
    unwrapping = desk.object(session, "Unwrapping key", {ck.CKA_UNWRAP: True})
    number = desk.mechanism(session.slot, ck.CKF_UNWRAP, desk.key_type(session, unwrapping))
    mechanism = Asking(desk, session, number, fresh=False).mechanism()
    wrapped = desk.data("Wrapped key", last=True)
    template = _made(desk, session, tuple(_MADE), with_size=False)
    desk.keep(session, desk.client.unwrap(session.handle, mechanism, unwrapping, wrapped, template))


def derive(desk: Desk) -> None:
    """63"""
    session = desk.session()
    base = desk.object(session, "Base key", {ck.CKA_DERIVE: True})
    number = desk.mechanism(session.slot, ck.CKF_DERIVE, desk.key_type(session, base))
    mechanism = Asking(desk, session, number, fresh=True).mechanism()
    template = _made(desk, session, _SECRETS, with_size=True)
    desk.keep(session, desk.client.derive(session.handle, mechanism, base, template))


def _made(desk: Desk, session: Session, kinds: tuple[str, ...], *, with_size: bool) -> dict[int, Value]:
    """The template of a key that comes out of another; its size may follow from the mechanism."""
    name = desk.dialogue.ask(f"Kind of the new key ({', '.join(kinds)})", choice(kinds), kinds[0])
    size = 0
    if with_size:
        size = desk.dialogue.ask("Its bytes, 0: as the mechanism gives", at_most(_KEY_BYTES_AT_MOST), "32")
    made, key_type, uses = _MADE[name]
    template: dict[int, Value] = {ck.CKA_CLASS: made, ck.CKA_KEY_TYPE: key_type}
    if size:
        template[ck.CKA_VALUE_LEN] = size
    return template | _named(desk, session) | _guarded(desk) | dict.fromkeys(uses, True)


def generate_from_password(desk: Desk) -> None:
    """64"""
    session = desk.session()
    password = desk.dialogue.new_pin("Password")
    salt = desk.dialogue.ask("Salt (hexadecimal)", attributes.octets, os.urandom(16).hex())
    rounds = desk.dialogue.ask("Rounds", at_most(1 << 31, 1), "100000")
    prf = desk.dialogue.ask(f"Hash ({', '.join(_PRFS)})", choice(_PRFS), "sha256")
    parameter = Pbkd2(
        *(ck.CKZ_SALT_SPECIFIED, buffer(salt), len(salt), rounds, _PRFS[prf], None, 0),
        *(buffer(password), len(password)),
    )
    template = _made(desk, session, _SECRETS, with_size=True)
    mechanism = Mechanism(ck.CKM_PKCS5_PBKD2, parameter)
    desk.keep(session, desk.client.generate_key(session.handle, mechanism, template))


def create_known(desk: Desk) -> None:
    """65"""
    session = desk.session()
    desk.say("Keys that everybody knows: to be tried, never to be used")
    for name, key in known.KEYS.items():
        desk.say(f"  {name:<12}{key.source}")
    wanted = desk.dialogue.ask("Which (or all)", choice((*known.KEYS, "all")), "all")
    on_token = desk.dialogue.yes("On the token, not of the session alone", default=False)
    made = []
    for name in known.KEYS if wanted == "all" else (wanted,):
        label: Template = {ck.CKA_LABEL: KNOWN_LABEL + name, ck.CKA_ID: name.encode(), ck.CKA_TOKEN: on_token}
        for template in known.KEYS[name].objects:
            made.append(desk.client.create(session.handle, {**template, **label}))
            desk.say(desk.row(session, made[-1]))
    desk.made = made


def random(desk: Desk) -> None:
    """62"""
    session = desk.session()
    size = desk.dialogue.ask("Bytes", at_most(_RANDOM_AT_MOST, 1), "16")
    desk.put("Random", desk.client.random(session.handle, size))


def seed(desk: Desk) -> None:
    """66"""
    session = desk.session()
    desk.client.seed(session.handle, desk.data("Seed"))
