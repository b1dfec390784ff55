"""An object is recognised however a member shows it, and what could be another is never taken for it."""

import datetime
import sys
from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x448, x25519
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_ha import ck
from pkcs11_ha.core import curves, der
from pkcs11_ha.core.identity import (
    Identity,
    Kind,
    Match,
    attributes_to_read,
    compare,
    complete,
    identify,
    vouched,
)
from tests.der import tlv

Attributes = dict[int, bytes]

CLASSES = {n: v for n, v in vars(ck).items() if n.startswith("CKO_")}
KEY_TYPES = {n: v for n, v in vars(ck).items() if n.startswith("CKK_")}
SECRETS = {
    ck.CKA_VALUE,
    ck.CKA_PRIVATE_EXPONENT,
    ck.CKA_PRIME_1,
    ck.CKA_PRIME_2,
    ck.CKA_EXPONENT_1,
    ck.CKA_EXPONENT_2,
    ck.CKA_COEFFICIENT,
}


def ulong(value: int) -> bytes:
    return value.to_bytes(8, sys.byteorder)


def number(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def an_object(object_class: int, key_type: int | None = None, **more: bytes) -> Attributes:
    """A token object "k" with id 01, and with what `more` says of it, by names of attributes without CKA_."""
    attributes = {
        ck.CKA_CLASS: ulong(object_class),
        ck.CKA_TOKEN: b"\1",
        ck.CKA_PRIVATE: b"\0",
        ck.CKA_LABEL: b"k",
        ck.CKA_ID: b"\1",
        **({} if key_type is None else {ck.CKA_KEY_TYPE: ulong(key_type)}),
    }
    return attributes | {getattr(ck, f"CKA_{name}"): value for name, value in more.items()}


def private(key_type: int, **more: bytes) -> Identity:
    return identify(an_object(ck.CKO_PRIVATE_KEY, key_type, **more))


def public(key_type: int, **more: bytes) -> Identity:
    return identify(an_object(ck.CKO_PUBLIC_KEY, key_type, **more))


def secret(key_type: int = ck.CKK_AES, **more: bytes) -> Identity:
    return identify(an_object(ck.CKO_SECRET_KEY, key_type, **more))


def data(**more: bytes) -> Identity:
    return identify(an_object(ck.CKO_DATA, None, **more))


def certificate(**more: bytes) -> Identity:
    return identify(an_object(ck.CKO_CERTIFICATE, None, CERTIFICATE_TYPE=ulong(ck.CKC_X_509), **more))


def info(key: CertificateIssuerPrivateKeyTypes | x25519.X25519PrivateKey | x448.X448PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def signed(key: CertificateIssuerPrivateKeyTypes, version_1: bool = False) -> bytes:
    """A certificate; X.509 version 1 leaves the version out."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pkcs11-ha")])
    now = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
    edwards = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    value = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 7, now, now)
        .sign(key, None if edwards else hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    if not version_1:
        return value
    signed_part, *rest = der.sequence(value) or ()
    version, *fields = der.sequence(signed_part.raw) or ()
    assert version.raw == bytes.fromhex("a003020102")
    inner = tlv(der.SEQUENCE, b"".join(field.raw for field in fields))
    return tlv(der.SEQUENCE, inner + b"".join(element.raw for element in rest))


RSA = rsa.generate_private_key(65537, 2048)
RSA_N = number(RSA.public_key().public_numbers().n)
RSA_E = b"\1\0\1"
OTHER_RSA_N = number(rsa.generate_private_key(65537, 2048).public_key().public_numbers().n)
EC, OTHER_EC = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
P256 = bytes.fromhex("06082a8648ce3d030107")
P384 = bytes.fromhex("06052b81040022")


def raw_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return tlv(der.OCTET_STRING, raw_point(key))


EC_PUBLIC = public(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=point(EC))
OTHER_EC_PUBLIC = public(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=point(OTHER_EC))
EC_PRIVATE = private(ck.CKK_EC, EC_PARAMS=P256)

# ---- what is read


@pytest.mark.parametrize("object_class", [*CLASSES.values(), 0x80000001, 77])
def test_no_secret_is_asked_for(object_class: int) -> None:
    is_open = object_class in (ck.CKO_DATA, ck.CKO_CERTIFICATE, ck.CKO_PUBLIC_KEY)
    for key_type in (None, *KEY_TYPES.values(), 0x80000001):
        asked = attributes_to_read(object_class, key_type)
        assert len(set(asked)) == len(asked)
        assert SECRETS.isdisjoint(set(asked) - ({ck.CKA_VALUE} if is_open else set()))
        assert ck.CKA_UNIQUE_ID not in asked
        assert {ck.CKA_CLASS, ck.CKA_TOKEN, ck.CKA_PRIVATE, ck.CKA_LABEL} <= set(asked)


def test_what_is_asked_for() -> None:
    def more(object_class: int, key_type: int | None = None) -> set[int]:
        asked = set(attributes_to_read(object_class, key_type))
        common = {ck.CKA_CLASS, ck.CKA_TOKEN, ck.CKA_PRIVATE, ck.CKA_LABEL}
        common_to_keys = {ck.CKA_KEY_TYPE, ck.CKA_ID, ck.CKA_LOCAL} if key_type is not None else set()
        assert asked >= common | common_to_keys
        return asked - common - common_to_keys

    spki = ck.CKA_PUBLIC_KEY_INFO
    assert more(ck.CKO_PRIVATE_KEY, ck.CKK_RSA) == {spki, ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT}
    assert more(ck.CKO_PUBLIC_KEY, ck.CKK_RSA) == {spki, ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT}
    assert more(ck.CKO_PRIVATE_KEY, ck.CKK_EC) == {spki, ck.CKA_EC_PARAMS, ck.CKA_EC_POINT}
    dsa_group = {ck.CKA_PRIME, ck.CKA_SUBPRIME, ck.CKA_BASE}
    assert more(ck.CKO_PRIVATE_KEY, ck.CKK_DSA) == {spki} | dsa_group
    assert more(ck.CKO_PUBLIC_KEY, ck.CKK_DSA) == {spki, ck.CKA_VALUE} | dsa_group
    assert more(ck.CKO_PRIVATE_KEY, ck.CKK_ML_DSA) == {spki, ck.CKA_PARAMETER_SET}
    assert more(ck.CKO_SECRET_KEY, ck.CKK_AES) == {ck.CKA_CHECK_VALUE, ck.CKA_VALUE_LEN}
    assert more(ck.CKO_OTP_KEY, ck.CKK_HOTP) == {ck.CKA_CHECK_VALUE, ck.CKA_VALUE_LEN}
    assert more(ck.CKO_DATA) == {ck.CKA_APPLICATION, ck.CKA_OBJECT_ID, ck.CKA_VALUE}
    assert more(ck.CKO_CERTIFICATE) >= {
        ck.CKA_CERTIFICATE_TYPE,
        ck.CKA_ID,
        ck.CKA_VALUE,
        ck.CKA_SERIAL_NUMBER,
    }
    assert more(ck.CKO_PROFILE) == set()
    assert more(ck.CKO_PRIVATE_KEY) == {spki, ck.CKA_KEY_TYPE, ck.CKA_ID, ck.CKA_LOCAL}


@pytest.mark.parametrize("object_class", [ck.CKO_PRIVATE_KEY, ck.CKO_SECRET_KEY, ck.CKO_OTP_KEY])
@pytest.mark.parametrize("key_type", KEY_TYPES.values())
def test_a_secret_given_all_the_same_is_not_looked_at(object_class: int, key_type: int) -> None:
    shown = an_object(object_class, key_type, PRIME=b"\7", SUBPRIME=b"\3", BASE=b"\2", PARAMETER_SET=ulong(1))
    assert identify(shown | dict.fromkeys(SECRETS, b"\x55")) == identify(shown)


# ---- fingerprints

DSA_KEY = dsa.generate_private_key(1024)
DSA_NUMBERS = DSA_KEY.public_key().public_numbers()
DSA_SHOWN = {
    "PRIME": number(DSA_NUMBERS.parameter_numbers.p),
    "SUBPRIME": number(DSA_NUMBERS.parameter_numbers.q),
    "BASE": number(DSA_NUMBERS.parameter_numbers.g),
    "VALUE": number(DSA_NUMBERS.y),
}
ED25519 = ed25519.Ed25519PrivateKey.generate()
ED25519_RAW = ED25519.public_key().public_bytes_raw()
X448 = x448.X448PrivateKey.generate()
SPELLINGS: dict[str, tuple[int, list[dict[str, bytes]]]] = {
    "RSA": (
        ck.CKK_RSA,
        [
            {"MODULUS": RSA_N, "PUBLIC_EXPONENT": RSA_E},
            {"MODULUS": b"\0" + RSA_N, "PUBLIC_EXPONENT": b"\0\0\0\0" + RSA_E},
            {"PUBLIC_KEY_INFO": info(RSA)},
            {"MODULUS": RSA_N, "PUBLIC_KEY_INFO": info(RSA)},
            {"MODULUS": RSA_N, "PUBLIC_EXPONENT": RSA_E, "PUBLIC_KEY_INFO": b"garbage"},
        ],
    ),
    "EC": (
        ck.CKK_EC,
        [
            {"EC_PARAMS": P256, "EC_POINT": point(EC)},
            {"EC_PARAMS": P256, "EC_POINT": raw_point(EC)},
            {"EC_PARAMS": b"\x13\x0aprime256v1", "EC_POINT": raw_point(EC)},
            {"PUBLIC_KEY_INFO": info(EC)},
            {"EC_PARAMS": P256, "PUBLIC_KEY_INFO": info(EC)},
            {"EC_PARAMS": P256, "EC_POINT": point(EC), "PUBLIC_KEY_INFO": info(EC)},
        ],
    ),
    "Ed25519": (
        ck.CKK_EC_EDWARDS,
        [
            {"EC_PARAMS": curves.ED25519, "EC_POINT": ED25519_RAW},
            {"EC_PARAMS": b"\x13\x0cedwards25519", "EC_POINT": b"\4\x20" + ED25519_RAW},
            {"PUBLIC_KEY_INFO": info(ED25519)},
        ],
    ),
    "X448": (
        ck.CKK_EC_MONTGOMERY,
        [
            {"EC_PARAMS": curves.X448, "EC_POINT": X448.public_key().public_bytes_raw()},
            {"PUBLIC_KEY_INFO": info(X448)},
        ],
    ),
    "DSA": (
        ck.CKK_DSA,
        [
            DSA_SHOWN,
            DSA_SHOWN | {"VALUE": b"\0" + DSA_SHOWN["VALUE"], "PRIME": b"\0" + DSA_SHOWN["PRIME"]},
            {"PUBLIC_KEY_INFO": info(DSA_KEY)},
        ],
    ),
    "DH": (
        ck.CKK_DH,
        [
            {"PRIME": b"\7\7", "BASE": b"\2", "VALUE": b"\3"},
            {"PRIME": b"\0\7\7", "BASE": b"\0\2", "VALUE": b"\0\0\3"},
        ],
    ),
    "ML-DSA": (
        ck.CKK_ML_DSA,
        [
            {"PARAMETER_SET": ulong(1), "VALUE": b"public"},
            {"PARAMETER_SET": ulong(1), "VALUE": b"public", "PUBLIC_KEY_INFO": bytes(9)},
        ],
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_key_is_the_same_however_it_is_shown(name: str) -> None:
    key_type, spellings = SPELLINGS[name]
    identities = [public(key_type, **shown) for shown in spellings]
    assert identities[0].fingerprint
    for one in identities:
        assert one.fingerprint == identities[0].fingerprint
        assert one.hints == identities[0].hints
        assert one.public is not None
        assert one.public.fingerprint == one.fingerprint
        assert all(compare(one, other) is Match.SAME for other in identities)


@pytest.mark.parametrize("name", ["RSA", "EC", "Ed25519", "X448"])
def test_a_private_key_that_shows_its_public_half_has_its_fingerprint(name: str) -> None:
    key_type, spellings = SPELLINGS[name]
    for shown in spellings:
        identity = private(key_type, **shown)
        assert identity.fingerprint == public(key_type, **shown).fingerprint is not None
        assert not identity.borrowed
        assert identity.public is None


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_part_of_a_key_counts(name: str) -> None:
    key_type, (shown, *_) = SPELLINGS[name]
    whole = public(key_type, **shown)
    for part, value in shown.items():
        changed = public(key_type, **shown | {part: value[:-1] + bytes([value[-1] ^ 1])})
        assert changed.fingerprint != whole.fingerprint
        assert compare(whole, changed) is not Match.SAME
        missing = public(key_type, **{name: value for name, value in shown.items() if name != part})
        assert missing.fingerprint is None
        empty = public(key_type, **shown | {part: b""})
        assert empty.fingerprint is None


def test_a_key_of_unknown_type_has_no_fingerprint() -> None:
    shown = {"VALUE": b"v", "MODULUS": b"n", "EC_PARAMS": P256, "EC_POINT": point(EC)}
    for identity in (public(ck.CKK_KEA, **shown), private(0x80000001, **shown)):
        assert identity.fingerprint is None
        assert compare(identity, identity) is Match.UNPROVEN
    assert identify(an_object(ck.CKO_DOMAIN_PARAMETERS, ck.CKK_KEA, **shown)).fingerprint is None


@pytest.mark.parametrize("last", [7, 10])  # id-RSAES-OAEP and id-RSASSA-PSS, RFC 8017 appendix C
def test_an_rsa_key_for_one_use_is_an_rsa_key(last: int) -> None:
    plain = info(RSA)
    rsa_oid = bytes.fromhex("06092a864886f70d010101")
    assert plain.count(rsa_oid) == 1
    bound = plain.replace(rsa_oid, rsa_oid[:-1] + bytes([last]))
    assert public(ck.CKK_RSA, PUBLIC_KEY_INFO=bound).fingerprint == SHARED_ID_RSA.fingerprint


def _rsa_info(key: bytes, tag: int = der.BIT_STRING, after: bytes = b"") -> bytes:
    algorithm = tlv(der.SEQUENCE, bytes.fromhex("06092a864886f70d0101010500"))
    return tlv(der.SEQUENCE, algorithm + tlv(tag, b"\0" + key) + after)


def test_what_is_no_key_info_shows_no_key() -> None:
    n, e = tlv(der.INTEGER, RSA_N), tlv(der.INTEGER, RSA_E)
    key = tlv(der.SEQUENCE, n + e)
    assert public(ck.CKK_RSA, PUBLIC_KEY_INFO=_rsa_info(key)).fingerprint == SHARED_ID_RSA.fingerprint
    for broken in (
        _rsa_info(key, tag=der.OCTET_STRING),
        _rsa_info(key, after=e),
        _rsa_info(tlv(der.SEQUENCE, n)),
        _rsa_info(tlv(der.SEQUENCE, n + e + e)),
        _rsa_info(tlv(der.SEQUENCE, n + tlv(der.OCTET_STRING, RSA_E))),
        _rsa_info(n + e),
        _rsa_info(key)[:-1],
    ):
        assert public(ck.CKK_RSA, PUBLIC_KEY_INFO=broken).fingerprint is None
        assert (
            public(ck.CKK_RSA, MODULUS=RSA_N, PUBLIC_EXPONENT=RSA_E, PUBLIC_KEY_INFO=broken) == SHARED_ID_RSA
        )


def test_a_short_certificate_shows_no_key() -> None:
    fields = b"".join(tlv(der.INTEGER, b"\1") for _ in range(5))
    for inner in (b"", fields, tlv(der.CONTEXT_0, b"") + fields):
        identity = certificate(VALUE=tlv(der.SEQUENCE, tlv(der.SEQUENCE, inner)))
        assert identity.fingerprint is not None
        assert identity.public is None


def test_half_a_key_info_does_no_harm() -> None:
    bogus = info(EC)[:-1] + bytes([info(EC)[-1] ^ 1])  # the curve is right, the point is none
    assert public(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=point(EC), PUBLIC_KEY_INFO=bogus) == EC_PUBLIC
    assert public(ck.CKK_EC, PUBLIC_KEY_INFO=bogus).ec_params == P256


def test_the_key_type_counts() -> None:
    shown = {"PARAMETER_SET": ulong(1), "VALUE": b"public"}
    assert public(ck.CKK_ML_DSA, **shown).fingerprint != public(ck.CKK_ML_KEM, **shown).fingerprint
    group = DSA_SHOWN | {"PUBLIC_EXPONENT": b"\3", "MODULUS": b"\5"}
    assert len({public(t, **group).fingerprint for t in (ck.CKK_RSA, ck.CKK_DSA, ck.CKK_DH)}) == 3


def test_parts_do_not_run_together() -> None:
    one = public(ck.CKK_RSA, MODULUS=b"\1\2", PUBLIC_EXPONENT=b"\3")
    other = public(ck.CKK_RSA, MODULUS=b"\1", PUBLIC_EXPONENT=b"\2\3")
    assert one.fingerprint != other.fingerprint


def test_a_bogus_point_is_no_key() -> None:
    bogus = point(EC)[:-1] + bytes([point(EC)[-1] ^ 1])
    assert public(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=bogus).fingerprint is None
    assert public(ck.CKK_EC, EC_PARAMS=P384, EC_POINT=point(EC)).fingerprint is None
    assert public(ck.CKK_EC, EC_PARAMS=b"\5\0", EC_POINT=point(EC)).fingerprint is None


@pytest.mark.parametrize(
    ("key_type", "shown"),
    [
        (ck.CKK_RSA, {"MODULUS": OTHER_RSA_N, "PUBLIC_EXPONENT": RSA_E, "PUBLIC_KEY_INFO": info(RSA)}),
        (ck.CKK_RSA, {"MODULUS": RSA_N, "PUBLIC_EXPONENT": b"\3", "PUBLIC_KEY_INFO": info(RSA)}),
        (ck.CKK_RSA, {"MODULUS": OTHER_RSA_N, "PUBLIC_KEY_INFO": info(RSA)}),
        (ck.CKK_RSA, {"PUBLIC_KEY_INFO": info(EC)}),
        (ck.CKK_EC, {"EC_PARAMS": P256, "EC_POINT": point(EC), "PUBLIC_KEY_INFO": info(OTHER_EC)}),
        (ck.CKK_EC, {"EC_PARAMS": P384, "PUBLIC_KEY_INFO": info(EC)}),
    ],
)
def test_a_member_that_contradicts_itself_proves_nothing(key_type: int, shown: dict[str, bytes]) -> None:
    for identity in (public(key_type, **shown), private(key_type, **shown)):
        assert identity.fingerprint is None


def test_certificates() -> None:
    value = signed(EC)
    one = certificate(VALUE=value)
    assert one.kind is Kind.CERTIFICATE
    assert one.name.type == ck.CKC_X_509
    assert compare(one, certificate(VALUE=value, SUBJECT=b"s", CHECK_VALUE=b"abc")) is Match.SAME
    assert compare(one, certificate(VALUE=signed(EC))) is Match.DIFFERENT
    assert one.fingerprint != data(VALUE=value).fingerprint


@pytest.mark.parametrize("version_1", [True, False])
@pytest.mark.parametrize(
    ("key_type", "key"),
    [(ck.CKK_RSA, RSA), (ck.CKK_EC, EC), (ck.CKK_EC_EDWARDS, ED25519), (ck.CKK_DSA, DSA_KEY)],
)
def test_a_certificate_shows_its_key(
    key_type: int, key: CertificateIssuerPrivateKeyTypes, version_1: bool
) -> None:
    shown = certificate(VALUE=signed(key, version_1)).public
    assert shown is not None
    assert shown == public(key_type, PUBLIC_KEY_INFO=info(key)).public
    assert shown == certificate(PUBLIC_KEY_INFO=info(key)).public
    assert shown.fingerprint


def test_certificates_without_a_value() -> None:
    shown = {"VALUE": b"", "ISSUER": b"i", "SERIAL_NUMBER": b"\2\1\7", "CHECK_VALUE": b"abc"}
    one = certificate(**shown)
    assert one.fingerprint is None
    assert compare(one, certificate(**shown)) is Match.UNPROVEN
    for part in ("ISSUER", "SERIAL_NUMBER", "CHECK_VALUE"):
        assert compare(one, certificate(**shown | {part: b"xyz"})) is Match.DIFFERENT
    assert compare(one, certificate(**shown, SUBJECT=b"s")) is Match.UNPROVEN
    assert compare(certificate(SUBJECT=b"s"), certificate(SUBJECT=b"t")) is Match.DIFFERENT


def test_data_objects() -> None:
    assert compare(data(VALUE=b"x"), data(VALUE=b"x")) is Match.SAME
    assert compare(data(VALUE=b""), data(VALUE=b"")) is Match.SAME
    assert compare(data(VALUE=b"x"), data(VALUE=b"y")) is Match.DIFFERENT
    assert compare(data(VALUE=b"x"), data()) is Match.UNPROVEN


def test_domain_parameters() -> None:
    group = {name: value for name, value in DSA_SHOWN.items() if name != "VALUE"}
    one = identify(an_object(ck.CKO_DOMAIN_PARAMETERS, ck.CKK_DSA, **group))
    assert compare(one, one) is Match.SAME
    other = identify(an_object(ck.CKO_DOMAIN_PARAMETERS, ck.CKK_DSA, **group | {"BASE": b"\2"}))
    assert compare(one, other) is Match.DIFFERENT
    del group["BASE"]
    partial = identify(an_object(ck.CKO_DOMAIN_PARAMETERS, ck.CKK_DSA, **group))
    assert compare(one, partial) is Match.UNPROVEN
    assert identify(an_object(ck.CKO_DOMAIN_PARAMETERS)).fingerprint is None


def test_no_fingerprint_in_logs() -> None:
    identity = data(VALUE=b"1234")
    assert identity.fingerprint is not None
    assert identity.fingerprint.hex() not in repr(identity)
    assert repr(identity.fingerprint)[2:-1] not in repr(identity)
    assert repr(identity) == "<data id= label=b'k' fingerprint shown>"
    assert repr(EC_PRIVATE) == "<private key id=01 label=b'k' fingerprint not shown>"
    assert repr(complete([EC_PRIVATE, EC_PUBLIC])[0]) == "<private key id=01 label=b'k' fingerprint borrowed>"


# ---- names


def test_objects_of_different_names_are_different() -> None:
    base = an_object(ck.CKO_DATA, APPLICATION=b"a", OBJECT_ID=b"\6\1\1", VALUE=b"x")
    assert compare(identify(base), identify(base)) is Match.SAME
    for number_, value in (
        (ck.CKA_CLASS, ulong(ck.CKO_PROFILE)),
        (ck.CKA_LABEL, b"k "),
        (ck.CKA_APPLICATION, b"b"),
        (ck.CKA_OBJECT_ID, b""),
        (ck.CKA_TOKEN, b"\0"),
    ):
        assert compare(identify(base), identify(base | {number_: value})) is Match.DIFFERENT
        assert compare(identify(base | {number_: value}), identify(base)) is Match.DIFFERENT
    key = an_object(ck.CKO_SECRET_KEY, ck.CKK_AES)
    assert compare(identify(key), identify(key)) is Match.UNPROVEN
    for number_, value in ((ck.CKA_ID, b"\2"), (ck.CKA_KEY_TYPE, ulong(ck.CKK_DES3))):
        assert compare(identify(key), identify(key | {number_: value})) is Match.DIFFERENT
    value = signed(EC)
    for kind in (ck.CKC_X_509_ATTR_CERT, ck.CKC_WTLS):
        other = identify(an_object(ck.CKO_CERTIFICATE, VALUE=value, CERTIFICATE_TYPE=ulong(kind)))
        assert compare(certificate(VALUE=value), other) is Match.DIFFERENT


def test_private_is_no_part_of_the_name() -> None:
    one, other = secret(PRIVATE=b"\0"), secret(PRIVATE=b"\1")
    assert (one.private, other.private) == (False, True)
    assert compare(one, other) is Match.UNPROVEN


def test_defaults() -> None:
    bare = identify({ck.CKA_CLASS: ulong(ck.CKO_SECRET_KEY), ck.CKA_KEY_TYPE: ulong(ck.CKK_AES)})
    assert (bare.token, bare.private, bare.name.id, bare.name.label) == (False, True, b"", b"")
    hidden = {c for c in CLASSES.values() if identify({ck.CKA_CLASS: ulong(c)}).private}
    assert hidden == {ck.CKO_PRIVATE_KEY, ck.CKO_SECRET_KEY, ck.CKO_OTP_KEY}
    assert identify(an_object(ck.CKO_DATA, PRIVATE=b"\xff")).private


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {ck.CKA_CLASS: b""},
        {ck.CKA_CLASS: b"\4\0\0\0"},
        {ck.CKA_CLASS: ulong(ck.CKO_SECRET_KEY)},
        {ck.CKA_CLASS: ulong(ck.CKO_OTP_KEY)},
        {ck.CKA_CLASS: ulong(ck.CKO_PUBLIC_KEY), ck.CKA_KEY_TYPE: b"\0"},
    ],
)
def test_what_is_not_known_matches_nothing(attributes: Attributes) -> None:
    identity = identify(
        attributes | {ck.CKA_LABEL: b"k", ck.CKA_MODULUS: RSA_N, ck.CKA_PUBLIC_EXPONENT: RSA_E}
    )
    assert not identity.is_known
    assert compare(identity, identity) is Match.DIFFERENT


def test_kinds() -> None:
    kinds = {value: identify(an_object(value, ck.CKK_RSA)).kind for value in CLASSES.values()}
    assert kinds[ck.CKO_OTP_KEY] is Kind.OTP_KEY
    assert kinds[ck.CKO_PRIVATE_KEY] is Kind.PRIVATE_KEY
    assert kinds[ck.CKO_PROFILE] is Kind.OTHER
    assert identify({}).kind is Kind.OTHER


# ---- hints


def test_check_values() -> None:
    assert secret(CHECK_VALUE=b"abcdef").check_value == b"abc"
    assert secret(CHECK_VALUE=b"").check_value is None
    assert secret(CHECK_VALUE=b"ab").check_value is None
    assert secret().check_value is None
    assert secret(CHECK_VALUE=b"abc").fingerprint is None
    assert compare(secret(CHECK_VALUE=b"abcd"), secret(CHECK_VALUE=b"abc")) is Match.UNPROVEN
    assert compare(secret(CHECK_VALUE=b"abc"), secret(CHECK_VALUE=b"abd")) is Match.DIFFERENT
    assert compare(secret(CHECK_VALUE=b"abc"), secret()) is Match.UNPROVEN


def test_lengths() -> None:
    assert compare(secret(VALUE_LEN=ulong(32)), secret(VALUE_LEN=ulong(16))) is Match.DIFFERENT
    assert compare(secret(VALUE_LEN=ulong(32)), secret()) is Match.UNPROVEN


def test_curve_of_a_private_key() -> None:
    assert EC_PRIVATE.ec_params == private(ck.CKK_EC, EC_PARAMS=b"\x13\x05P-256").ec_params == P256
    assert private(ck.CKK_EC).ec_params is None
    assert compare(EC_PRIVATE, private(ck.CKK_EC, EC_PARAMS=P384)) is Match.DIFFERENT
    assert compare(EC_PRIVATE, private(ck.CKK_EC)) is Match.UNPROVEN


def test_a_modulus_tells_rsa_keys_apart_even_without_the_exponent() -> None:
    whole = private(ck.CKK_RSA, MODULUS=RSA_N, PUBLIC_EXPONENT=RSA_E)
    part = private(ck.CKK_RSA, MODULUS=b"\0" + RSA_N)
    assert part.fingerprint is None
    assert compare(whole, part) is compare(part, part) is Match.UNPROVEN
    assert compare(whole, private(ck.CKK_RSA, MODULUS=OTHER_RSA_N)) is Match.DIFFERENT


# ---- private keys that show nothing of their public half

SHARED_ID_RSA = public(ck.CKK_RSA, MODULUS=RSA_N, PUBLIC_EXPONENT=RSA_E)
EC_CERTIFICATE = certificate(VALUE=signed(EC))
ON_P384 = ec.generate_private_key(ec.SECP384R1())
PUBLIC_ON_P384 = public(ck.CKK_EC, EC_PARAMS=P384, EC_POINT=point(ON_P384))


@pytest.mark.parametrize(
    "others",
    [
        [EC_PUBLIC],
        [EC_CERTIFICATE],
        [EC_PUBLIC, EC_CERTIFICATE],
        [EC_PUBLIC, EC_PUBLIC],
        [EC_PUBLIC, SHARED_ID_RSA],
        [EC_PUBLIC, PUBLIC_ON_P384],
        [EC_PUBLIC, public(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=point(OTHER_EC), ID=b"\2")],
        [EC_PUBLIC, private(ck.CKK_EC, EC_PARAMS=P384)],
        [EC_PUBLIC, private(ck.CKK_RSA, MODULUS=RSA_N)],
        [EC_PUBLIC, private(ck.CKK_EC, EC_PARAMS=P256, ID=b"\2")],
        [EC_PUBLIC, secret()],
        [public(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=point(EC), LABEL=b"other", TOKEN=b"\0")],
    ],
)
def test_borrowed(others: list[Identity]) -> None:
    for objects in ([EC_PRIVATE, *others], [*others, EC_PRIVATE]):
        completed = complete(objects)
        (key,) = [c for o, c in zip(objects, completed, strict=True) if o is EC_PRIVATE]
        assert key.fingerprint == EC_PUBLIC.fingerprint is not None
        assert key.borrowed
        assert [c for o, c in zip(objects, completed, strict=True) if o is not EC_PRIVATE] == others


@pytest.mark.parametrize(
    "others",
    [
        [],
        [public(ck.CKK_EC, EC_PARAMS=P256)],
        [certificate(VALUE=b"not readable")],
        [OTHER_EC_PUBLIC, EC_PUBLIC],
        [OTHER_EC_PUBLIC, EC_CERTIFICATE],
        [SHARED_ID_RSA],
        [PUBLIC_ON_P384],
        [public(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=point(EC), ID=b"\2")],
        [EC_PUBLIC, public(ck.CKK_EC, EC_PARAMS=P256)],  # what this one is nobody knows
        [EC_PUBLIC, certificate(VALUE=b"not readable")],
        [EC_PUBLIC, public(ck.CKK_EC)],
        [EC_PUBLIC, EC_PRIVATE],  # whose half is it?
        [EC_PUBLIC, private(ck.CKK_EC, EC_PARAMS=P256, LABEL=b"other")],
        [EC_PUBLIC, private(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=point(EC), LABEL=b"other")],
        [EC_PUBLIC, private(ck.CKK_EC, LABEL=b"other")],
        [EC_PUBLIC, identify(an_object(ck.CKO_PRIVATE_KEY))],
    ],
)
def test_not_borrowed(others: list[Identity]) -> None:
    for objects in ([EC_PRIVATE, *others], [*others, EC_PRIVATE]):
        assert complete(objects) == objects


def test_only_private_keys_borrow() -> None:
    """The number of RSA as a key type is that of X.509 as a certificate type."""
    shown = {"MODULUS": RSA_N, "PUBLIC_EXPONENT": RSA_E}
    objects = [certificate(PUBLIC_KEY_INFO=info(RSA)), SHARED_ID_RSA, private(ck.CKK_RSA, **shown)]
    assert objects[0].fingerprint is None
    assert complete(objects) == objects


def test_no_id_links_nothing() -> None:
    shown = {"EC_PARAMS": P256, "ID": b""}
    objects = [private(ck.CKK_EC, **shown), public(ck.CKK_EC, **shown, EC_POINT=point(EC))]
    assert complete(objects) == objects


def test_own_fingerprints_are_kept() -> None:
    objects = [private(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=point(OTHER_EC)), EC_PUBLIC]
    assert complete(objects) == objects


def test_borrowed_for_dsa_and_rsa() -> None:
    group = {name: value for name, value in DSA_SHOWN.items() if name != "VALUE"}
    key, _ = complete([private(ck.CKK_DSA, **group), public(ck.CKK_DSA, **DSA_SHOWN)])
    assert key.borrowed
    key, _ = complete([private(ck.CKK_DSA, **group | {"BASE": b"\2"}), public(ck.CKK_DSA, **DSA_SHOWN)])
    assert not key.borrowed
    key, _ = complete([private(ck.CKK_RSA, MODULUS=RSA_N), SHARED_ID_RSA])
    assert key.borrowed
    key, _ = complete([private(ck.CKK_RSA, MODULUS=OTHER_RSA_N), SHARED_ID_RSA])
    assert not key.borrowed


def test_what_is_borrowed_is_no_proof() -> None:
    """A certificate stays when its key is replaced under the same id: then it speaks for the wrong key."""
    borrowed, _ = complete([EC_PRIVATE, EC_PUBLIC])
    other, _ = complete([EC_PRIVATE, OTHER_EC_PUBLIC])
    own = private(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=point(EC))
    for one in (borrowed, own):
        assert compare(one, borrowed) is compare(borrowed, one) is Match.UNPROVEN
        assert vouched(one, borrowed)
        assert vouched(borrowed, one)
        assert compare(one, other) is compare(other, one) is Match.DIFFERENT
        assert not vouched(one, other)
        assert compare(one, EC_PRIVATE) is Match.UNPROVEN
        assert not vouched(one, EC_PRIVATE)
        assert not vouched(EC_PRIVATE, one)
    assert compare(own, own) is Match.SAME
    assert not vouched(own, own)


# ---- whatever a member says


def _damaged() -> Iterator[bytes]:
    for value in (signed(EC), signed(RSA), info(RSA), info(EC), info(DSA_KEY), info(ED25519), point(EC)):
        for at in range(min(len(value), 330)):
            yield value[:at]
            yield value[:at] + bytes([value[at] ^ 0xFF]) + value[at + 1 :]
            yield value[:at] + b"\x84\xff\xff\xff\xff" + value[at + 1 :]


def test_damaged_values_are_not_given() -> None:
    for value in _damaged():
        certificate(VALUE=value)
        public(ck.CKK_RSA, PUBLIC_KEY_INFO=value)
        public(ck.CKK_EC, EC_PARAMS=P256, EC_POINT=value)
        public(ck.CKK_EC, EC_PARAMS=value, EC_POINT=point(EC))


READ = sorted({a for c in CLASSES.values() for k in KEY_TYPES.values() for a in attributes_to_read(c, k)})
shown_by_anybody = st.builds(
    lambda object_class, key_type, more: an_object(object_class, key_type) | more,
    st.sampled_from(sorted(CLASSES.values())),
    st.sampled_from(sorted(KEY_TYPES.values())),
    st.dictionaries(
        st.sampled_from(READ), st.binary(max_size=12) | st.sampled_from([P256, point(EC), info(EC)])
    ),
)


@given(shown_by_anybody, shown_by_anybody)
def test_anything_can_be_compared(one: Attributes, other: Attributes) -> None:
    left, right = identify(one), identify(other)
    assert compare(left, right) is compare(right, left)
    if compare(left, right) is Match.SAME:
        assert left.fingerprint == right.fingerprint is not None
        assert left.name == right.name
    again = compare(left, left)
    assert again is not Match.DIFFERENT or not left.is_known
    assert complete([left, right, left])[0].name == left.name
    assert repr(left)
