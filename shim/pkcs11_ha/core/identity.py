"""Who an object is, so that it is recognised on another member and never taken for another object."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from pkcs11_ha import ck
from pkcs11_ha.core import public_key
from pkcs11_ha.core.public_key import Attributes, Hints, PublicKey, contradict, digest


class Kind(Enum):
    """What an object is, as far as telling objects apart goes."""

    DATA = ck.CKO_DATA
    CERTIFICATE = ck.CKO_CERTIFICATE
    PUBLIC_KEY = ck.CKO_PUBLIC_KEY
    PRIVATE_KEY = ck.CKO_PRIVATE_KEY
    SECRET_KEY = ck.CKO_SECRET_KEY
    OTP_KEY = ck.CKO_OTP_KEY
    DOMAIN_PARAMETERS = ck.CKO_DOMAIN_PARAMETERS
    OTHER = None


_SECRET_KEYS = (Kind.SECRET_KEY, Kind.OTP_KEY)
_KEYS = (Kind.PUBLIC_KEY, Kind.PRIVATE_KEY, *_SECRET_KEYS)

_COMMON = (ck.CKA_CLASS, ck.CKA_TOKEN, ck.CKA_PRIVATE, ck.CKA_LABEL)
_KEY = (ck.CKA_KEY_TYPE, ck.CKA_ID, ck.CKA_LOCAL)
_CERTIFICATE_NAMES = (ck.CKA_SUBJECT, ck.CKA_ISSUER, ck.CKA_SERIAL_NUMBER)

_BY_KIND = {
    Kind.DATA: (ck.CKA_APPLICATION, ck.CKA_OBJECT_ID, ck.CKA_VALUE),
    Kind.CERTIFICATE: (
        ck.CKA_CERTIFICATE_TYPE,
        ck.CKA_ID,
        *_CERTIFICATE_NAMES,
        ck.CKA_VALUE,
        ck.CKA_CHECK_VALUE,
        ck.CKA_PUBLIC_KEY_INFO,
    ),
    Kind.PUBLIC_KEY: (*_KEY, ck.CKA_PUBLIC_KEY_INFO),
    Kind.PRIVATE_KEY: (*_KEY, ck.CKA_PUBLIC_KEY_INFO),
    Kind.SECRET_KEY: (*_KEY, ck.CKA_CHECK_VALUE, ck.CKA_VALUE_LEN),
    Kind.OTP_KEY: (*_KEY, ck.CKA_CHECK_VALUE, ck.CKA_VALUE_LEN),
    Kind.DOMAIN_PARAMETERS: (ck.CKA_KEY_TYPE,),
    Kind.OTHER: (),
}


_KINDS = {kind.value: kind for kind in Kind}


def _kind(object_class: int | None) -> Kind:
    return _KINDS.get(object_class, Kind.OTHER)


def attributes_to_read(object_class: int | None, key_type: int | None = None) -> tuple[int, ...]:
    """What to ask a member for, to tell an object of this class and key type (None: not known) from others.

    Never what can be secret: CKA_VALUE only of certificates and public keys, which are public, and of data
    objects, of which a digest alone is kept. No CKA_UNIQUE_ID: it is a token's own and means nothing to
    another. `identify` looks at these and at no others, whatever it is given.
    """
    kind, family = _kind(object_class), public_key.family(key_type)
    attributes = _COMMON + _BY_KIND[kind]
    if kind is Kind.PUBLIC_KEY:
        return attributes + family.parameters + family.key
    if kind is Kind.PRIVATE_KEY:
        return attributes + family.parameters + tuple(a for a in family.key if a != ck.CKA_VALUE)
    if kind is Kind.DOMAIN_PARAMETERS:
        return attributes + family.parameters
    return attributes


class Name(NamedTuple):
    """What an object is called: not unique on a token, but objects of different names are never the same."""

    object_class: int | None
    type: int | None
    """Key type or certificate type; None for classes that have none."""
    id: bytes
    label: bytes
    application: bytes
    object_id: bytes


@dataclass(frozen=True, slots=True)
class Identity:
    """One object as one member shows it."""

    name: Name
    kind: Kind
    token: bool
    """CKA_TOKEN: it outlives the session. What does and what does not are never the same object."""
    private: bool
    """CKA_PRIVATE. Members may differ in it about one and the same object."""
    local: bool = False
    """CKA_LOCAL: it was generated on this member, or is a copy of what was."""
    fingerprint: bytes | None = None
    """32 bytes, equal if and only if the key (or the content of a certificate or data object) is equal.

    For asymmetric keys it is that of the public key, so a private key and its public key have it in common.
    It is made of nothing secret, but who can guess a data object can check the guess by it: keep it out of
    logs.
    """
    borrowed: bool = False
    """The fingerprint is that of a public object with the same CKA_ID, and nobody checked that it fits."""
    hints: Hints = ()
    """What can still prove that two objects differ where one of them has no fingerprint."""
    public: PublicKey | None = None
    """The public key that a public key object or certificate shows; None where it cannot be read."""

    def __repr__(self) -> str:
        known = "not shown" if self.fingerprint is None else "borrowed" if self.borrowed else "shown"
        kind = self.kind.name.lower().replace("_", " ")
        return f"<{kind} id={self.name.id.hex()} label={self.name.label!r} fingerprint {known}>"

    @property
    def check_value(self) -> bytes | None:
        """CKA_CHECK_VALUE, 3 bytes (PKCS#11 3.0, section 4.10.2); None beside a fingerprint of its own."""
        return dict(self.hints).get(ck.CKA_CHECK_VALUE)

    @property
    def ec_params(self) -> bytes | None:
        """CKA_EC_PARAMS of a key; named curves by their OID, however the member spelt them."""
        return dict(self.hints).get(ck.CKA_EC_PARAMS)

    @property
    def is_known(self) -> bool:
        """Whether the member told its class, and of a key the type. What is not known matches nothing."""
        return self.name.object_class is not None and (self.name.type is not None or self.kind not in _KEYS)


def identify(attributes: Attributes) -> Identity:
    """Who this object is, by the attributes that one member gave. What is malformed counts as not given."""
    object_class = _ulong(attributes, ck.CKA_CLASS)
    kind = _kind(object_class)
    has_key_type = kind in (*_KEYS, Kind.DOMAIN_PARAMETERS)
    key_type = _ulong(attributes, ck.CKA_KEY_TYPE)
    readable = attributes_to_read(object_class, key_type)
    given = {number: attributes[number] for number in readable if number in attributes}
    nobody = Identity(
        name=Name(
            object_class=object_class,
            type=key_type if has_key_type else _ulong(given, ck.CKA_CERTIFICATE_TYPE),
            id=given.get(ck.CKA_ID, b""),
            label=given.get(ck.CKA_LABEL, b""),
            application=given.get(ck.CKA_APPLICATION, b""),
            object_id=given.get(ck.CKA_OBJECT_ID, b""),
        ),
        kind=kind,
        token=_flag(given, ck.CKA_TOKEN, default=False),
        # The default is the token's choice (PKCS#11 3.0, section 4.4); tokens hide these.
        local=_flag(given, ck.CKA_LOCAL, default=False),
        private=_flag(given, ck.CKA_PRIVATE, default=kind in (Kind.PRIVATE_KEY, *_SECRET_KEYS)),
    )
    match kind:
        case Kind.DATA:
            value = given.get(ck.CKA_VALUE)
            return replace(nobody, fingerprint=None if value is None else digest(b"data", value))
        case Kind.CERTIFICATE:
            return _certificate(nobody, given)
        case Kind.SECRET_KEY | Kind.OTP_KEY:
            return replace(nobody, hints=_secret_hints(given))
        case Kind.PUBLIC_KEY | Kind.PRIVATE_KEY if key_type is not None:
            key = public_key.by_attributes(key_type, given)
            shown = key if kind is Kind.PUBLIC_KEY else None
            return replace(nobody, fingerprint=key.fingerprint, hints=key.hints, public=shown)
        case Kind.DOMAIN_PARAMETERS:
            parts = public_key.normal(key_type, given, public_key.family(key_type).parameters)
            return replace(nobody, fingerprint=digest(b"parameters", *parts) if parts else None)
        case _:
            return nobody


def _ulong(attributes: Attributes, number: int) -> int | None:
    value = attributes.get(number, b"")
    return int.from_bytes(value, sys.byteorder) if len(value) == 8 else None


def _flag(attributes: Attributes, number: int, *, default: bool) -> bool:
    value = attributes.get(number, b"")
    return any(value) if len(value) == 1 else default


def _certificate(nobody: Identity, given: Attributes) -> Identity:
    """A certificate is its value; without one (a URL stands for it) its names can tell two apart."""
    if value := given.get(ck.CKA_VALUE):
        certified = public_key.by_certificate(value)
        return replace(nobody, fingerprint=digest(b"certificate", value), public=certified)
    names = {n: digest(b"name", given[n]) for n in _CERTIFICATE_NAMES if given.get(n)}
    hints = tuple(sorted({**names, **_check_value(given)}.items()))
    return replace(nobody, hints=hints, public=public_key.by_info(given.get(ck.CKA_PUBLIC_KEY_INFO, b"")))


def _check_value(given: Attributes) -> dict[int, bytes]:
    """Three bytes, even if a module gives more; an empty value says there is none (PKCS#11 3.0, 4.10.2)."""
    value = given.get(ck.CKA_CHECK_VALUE, b"")[:3]
    return {ck.CKA_CHECK_VALUE: value} if len(value) == 3 else {}


def _secret_hints(given: Attributes) -> Hints:
    hints = _check_value(given)
    if _ulong(given, ck.CKA_VALUE_LEN):  # 0: of a DES key, which has no such attribute
        hints[ck.CKA_VALUE_LEN] = given[ck.CKA_VALUE_LEN]
    return tuple(sorted(hints.items()))


def complete(objects: Sequence[Identity]) -> list[Identity]:
    """All objects of one member, in the same order, the private ones with what its public ones tell of them.

    A private key that does not show its public half borrows the fingerprint of the public key or certificate
    with the same CKA_ID, if it can be no other: the id is not empty, one private key alone could be meant,
    every public object of that id can be read, and those that fit the key's type and parameters all show one
    key.

    Borrowed is what somebody claims: the public object may be left from a key since replaced. So keys that
    agree in a borrowed fingerprint are UNPROVEN to `compare`, not SAME.
    """
    by_id: dict[bytes, list[Identity]] = {}
    for identity in objects:
        by_id.setdefault(identity.name.id, []).append(identity)
    return [_with_public(identity, by_id[identity.name.id]) for identity in objects]


def _with_public(key: Identity, namesakes: Sequence[Identity]) -> Identity:
    """`namesakes`: all objects with the key's CKA_ID, the key among them."""
    if key.kind is not Kind.PRIVATE_KEY or key.fingerprint is not None or not key.name.id:
        return key
    candidates = [
        other
        for other in namesakes
        if other.kind is Kind.PRIVATE_KEY
        and other.name.type in (key.name.type, None)
        and not contradict(other.hints, key.hints)
    ]
    fitting = {
        public and public.fingerprint
        for public in (n.public for n in namesakes if n.kind in (Kind.PUBLIC_KEY, Kind.CERTIFICATE))
        if public is None or (public.key_type == key.name.type and not contradict(public.hints, key.hints))
    }
    if len(candidates) != 1 or len(fitting) != 1 or None in fitting:
        return key
    return replace(key, fingerprint=fitting.pop(), borrowed=True)


class Match(Enum):
    """What their attributes say about two objects being the same."""

    SAME = "same"
    DIFFERENT = "different"
    UNPROVEN = "unproven"
    """Nothing speaks against it and nothing proves it: an operation must, see `core.proof`."""


def compare(one: Identity, other: Identity) -> Match:
    """Whether objects on two members are the same. Symmetric."""
    if one.name != other.name or one.token != other.token or not one.is_known:
        return Match.DIFFERENT
    if one.fingerprint is not None and other.fingerprint is not None:
        if one.fingerprint != other.fingerprint:
            return Match.DIFFERENT
        if not one.borrowed and not other.borrowed:
            return Match.SAME
    return Match.DIFFERENT if contradict(one.hints, other.hints) else Match.UNPROVEN


def vouched(one: Identity, other: Identity) -> bool:
    """Whether an UNPROVEN pair at least has public objects on its members that show the same key.

    For those who would rather trust their own provisioning than have a key sign, and for keys that can prove
    nothing by an operation.
    """
    return compare(one, other) is Match.UNPROVEN and None not in (one.fingerprint, other.fingerprint)
