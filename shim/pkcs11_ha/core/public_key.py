"""A public key, by whichever attributes a member shows it: its parts in one spelling, and their digest."""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple

from pkcs11_ha import ck
from pkcs11_ha.core import curves, der

Attributes = Mapping[int, bytes]
"""CKA number -> value as the member gave it (CK_ULONG: 8 bytes, native order); missing: not given."""

Hints = tuple[tuple[int, bytes], ...]
"""(CKA number, value in one spelling), sorted: equal values prove nothing, unequal ones a difference."""


class PublicKey(NamedTuple):
    """What is known of a public key."""

    key_type: int
    hints: Hints
    """What is shown, be it whole or not, such as an RSA private key's modulus without the exponent."""
    fingerprint: bytes | None
    """32 bytes, equal if and only if the keys are; None where the key is not shown whole."""


class Family(NamedTuple):
    """The attributes that make up a public key of one type (PKCS#11 3.2, section 6).

    A private key shows its public half by the same attributes, except CKA_VALUE: there that is the secret.
    """

    parameters: tuple[int, ...]
    """May be shared by many keys."""
    key: tuple[int, ...]
    """Make it this key."""
    are_numbers: bool = False
    """All of them are big integers, which some modules give with the sign byte of DER."""


_DSA = Family((ck.CKA_PRIME, ck.CKA_SUBPRIME, ck.CKA_BASE), (ck.CKA_VALUE,), are_numbers=True)
_CURVE = Family((ck.CKA_EC_PARAMS,), (ck.CKA_EC_POINT,))
_NAMED_SET = Family((ck.CKA_PARAMETER_SET,), (ck.CKA_VALUE,))
_UNKNOWN = Family((), ())

_FAMILIES: Mapping[int | None, Family] = {
    ck.CKK_RSA: Family((), (ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT), are_numbers=True),
    ck.CKK_DSA: _DSA,
    ck.CKK_X9_42_DH: _DSA,
    ck.CKK_DH: Family((ck.CKA_PRIME, ck.CKA_BASE), (ck.CKA_VALUE,), are_numbers=True),
    ck.CKK_EC: _CURVE,
    ck.CKK_EC_EDWARDS: _CURVE,
    ck.CKK_EC_MONTGOMERY: _CURVE,
    ck.CKK_ML_DSA: _NAMED_SET,
    ck.CKK_ML_KEM: _NAMED_SET,
    ck.CKK_SLH_DSA: _NAMED_SET,
}


def family(key_type: int | None) -> Family:
    """The public attributes of a key type; none for a type that is not known here."""
    return _FAMILIES.get(key_type, _UNKNOWN)


def digest(domain: bytes, *parts: bytes) -> bytes:
    """SHA-256 of the parts, each with its length before it, so that no two lists of parts run together."""
    return sha256(b"".join(len(part).to_bytes(8, "big") + part for part in (domain, *parts))).digest()


def contradict(one: Hints, other: Hints) -> bool:
    known = dict(other)
    return any(known.get(number, value) != value for number, value in one)


def normal(key_type: int | None, shown: Attributes, numbers: Iterable[int]) -> tuple[bytes, ...] | None:
    """The values of these attributes, in the one spelling in which equal is equal; None if one is missing."""
    parts = tuple(_normal(family(key_type), shown, number) for number in numbers)
    return None if b"" in parts or not parts else parts


def _normal(of: Family, shown: Attributes, number: int) -> bytes:
    value = shown.get(number, b"")
    if of.are_numbers:
        return value.lstrip(b"\0")
    if number == ck.CKA_EC_PARAMS:
        return curves.canonical(value) or b""
    if number == ck.CKA_EC_POINT:
        return curves.canonical_point(shown.get(ck.CKA_EC_PARAMS, b""), value) or b""
    return value


def by_attributes(key_type: int, shown: Attributes) -> PublicKey:
    """The public key that these attributes of a public key, or the public ones of a private key, speak of.

    CKA_PUBLIC_KEY_INFO may be all there is; a member whose other attributes contradict it proves nothing.
    """
    key = _by_parts(key_type, shown)
    told = by_info(shown.get(ck.CKA_PUBLIC_KEY_INFO, b""))
    if told is None:
        return key
    if told.key_type != key_type or contradict(told.hints, key.hints):
        return PublicKey(key_type, key.hints, None)
    hints = {**dict(told.hints), **dict(key.hints)}
    return PublicKey(key_type, tuple(sorted(hints.items())), key.fingerprint or told.fingerprint)


def _by_parts(key_type: int, shown: Attributes) -> PublicKey:
    of = family(key_type)
    hints = {}
    for number in of.parameters + of.key:
        if value := _normal(of, shown, number):
            hints[number] = value if number == ck.CKA_EC_PARAMS else digest(b"part", value)
    whole = normal(key_type, shown, of.parameters + of.key)
    fingerprint = None if whole is None else digest(b"key", key_type.to_bytes(8, "big"), *whole)
    return PublicKey(key_type, tuple(sorted(hints.items())), fingerprint)


# Public keys in DER

_RSA_OIDS = tuple(
    bytes.fromhex("06092a864886f70d0101" + last)  # RFC 4055 section 1: any use, OAEP only, PSS only
    for last in ("01", "07", "0a")
)
_DSA_OID = bytes.fromhex("06072a8648ce380401")
_EC_OID = bytes.fromhex("06072a8648ce3d0201")
_EC_TYPES = {
    curves.ED25519: ck.CKK_EC_EDWARDS,
    curves.ED448: ck.CKK_EC_EDWARDS,
    curves.X25519: ck.CKK_EC_MONTGOMERY,
    curves.X448: ck.CKK_EC_MONTGOMERY,
}


def by_certificate(certificate: bytes) -> PublicKey | None:
    """The public key in an X.509 certificate (RFC 5280, section 4.1); None where it cannot be read."""
    outer = der.sequence(certificate)
    fields = der.sequence(outer[0].raw) if outer else None
    if not fields:
        return None
    start = 1 if fields[0].tag == der.CONTEXT_0 else 0  # version
    return by_info(fields[start + 5].raw) if len(fields) > start + 5 else None


def by_info(info: bytes) -> PublicKey | None:
    """The public key in a SubjectPublicKeyInfo (RFC 5280, section 4.1); None where it cannot be read."""
    outer = der.sequence(info)
    if outer is None or [e.tag for e in outer] != [der.SEQUENCE, der.BIT_STRING]:
        return None
    algorithm, key = der.row(outer[0].content), der.bits(outer[1].content)
    if not algorithm or key is None:
        return None
    oid, parameters = algorithm[0].raw, b"".join(e.raw for e in algorithm[1:])
    if oid in _RSA_OIDS:
        numbers = _integers(der.sequence(key), (ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT))
        return _by_parts(ck.CKK_RSA, numbers) if numbers else None
    if oid == _DSA_OID:
        group = _integers(der.sequence(parameters), _DSA.parameters)
        value = _integers(der.row(key), _DSA.key)
        return _by_parts(ck.CKK_DSA, {**group, **value}) if group and value else None
    if oid == _EC_OID:
        return _by_parts(ck.CKK_EC, {ck.CKA_EC_PARAMS: parameters, ck.CKA_EC_POINT: key})
    if oid in _EC_TYPES:
        return _by_parts(_EC_TYPES[oid], {ck.CKA_EC_PARAMS: oid, ck.CKA_EC_POINT: key})
    return None


def _integers(elements: Sequence[der.Element] | None, numbers: Sequence[int]) -> dict[int, bytes] | None:
    if elements is None or [e.tag for e in elements] != [der.INTEGER] * len(numbers):
        return None
    return {number: element.content for number, element in zip(numbers, elements, strict=True)}
