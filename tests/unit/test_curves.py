"""The curves are the ones their names promise, and every spelling of a point is the same point."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_ha.core import curves, der
from pkcs11_ha.core.curves import Curve
from tests.der import tlv

# Name in CKA_EC_PARAMS, its OID, and who else knows the curve.
NAMED = {
    "secp224r1": (ec.EllipticCurveOID.SECP224R1, ec.SECP224R1()),
    "secp256r1": (ec.EllipticCurveOID.SECP256R1, ec.SECP256R1()),
    "secp384r1": (ec.EllipticCurveOID.SECP384R1, ec.SECP384R1()),
    "secp521r1": (ec.EllipticCurveOID.SECP521R1, ec.SECP521R1()),
    "secp256k1": (ec.EllipticCurveOID.SECP256K1, ec.SECP256K1()),
    "brainpoolP256r1": (ec.EllipticCurveOID.BRAINPOOLP256R1, ec.BrainpoolP256R1()),
    "brainpoolP384r1": (ec.EllipticCurveOID.BRAINPOOLP384R1, ec.BrainpoolP384R1()),
    "brainpoolP512r1": (ec.EllipticCurveOID.BRAINPOOLP512R1, ec.BrainpoolP512R1()),
}
every_curve = pytest.mark.parametrize("name", NAMED)


def printable(name: str) -> bytes:
    return tlv(der.PRINTABLE_STRING, name.encode())


def known(name: str) -> Curve:
    curve = curves.find(printable(name))
    assert curve is not None
    return curve


def oid(dotted: str) -> bytes:
    """X.690 section 8.19."""
    first, second, *rest = map(int, dotted.split("."))
    content = b""
    for arc in (40 * first + second, *rest):
        septets = [arc & 0x7F]
        while arc := arc >> 7:
            septets.append(0x80 | arc & 0x7F)
        content += bytes(reversed(septets))
    return tlv(der.OID, content)


def point_of(key: ec.EllipticCurvePrivateKey) -> curves.Point:
    numbers = key.public_key().public_numbers()
    return numbers.x, numbers.y


def public_point(name: str, scalar: int) -> curves.Point:
    return point_of(ec.derive_private_key(scalar, NAMED[name][1]))


@every_curve
def test_curve_is_what_openssl_takes_it_for(name: str) -> None:
    curve = known(name)
    assert curve.oid == oid(NAMED[name][0].dotted_string)
    assert public_point(name, 1) == curve.g
    assert public_point(name, curve.n - 1) == curve.negate(curve.g)
    with pytest.raises(ValueError):  # noqa: PT011 - it says different things for different curves
        public_point(name, curve.n)
    assert curve.multiply(curve.n, curve.g) is None
    assert curve.size == (NAMED[name][1].key_size + 7) // 8 == curve.order_size


@every_curve
def test_adding_agrees_with_openssl(name: str) -> None:
    curve = known(name)
    for k, m in ((2, 3), (5, 5), (2**200 + 77, curve.n - 1), (curve.n // 3, 12345)):
        left, right = curve.multiply(k, curve.g), curve.multiply(m, curve.g)
        assert left == public_point(name, k)
        assert curve.add(left, right) == public_point(name, (k + m) % curve.n)
        assert curve.add(left, curve.negate(left)) is None
        assert curve.add(left, None) == left == curve.add(None, left)
        assert curve.add(None, None) is curve.negate(None) is None
    assert curve.multiply(-1, curve.g) == curve.negate(curve.g)


@every_curve
def test_every_spelling_of_a_point_is_one(name: str) -> None:
    curve = known(name)
    for _ in range(4):  # even and odd y
        key = ec.generate_private_key(NAMED[name][1])
        plain = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        compressed = key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        hybrid = bytes([6 | plain[-1] & 1]) + plain[1:]
        assert curve.decode(plain) == curve.decode(compressed) == curve.decode(hybrid) == point_of(key)
        for form in (plain, compressed, hybrid):
            for spelling in (form, tlv(der.OCTET_STRING, form), tlv(der.BIT_STRING, b"\0" + form)):
                assert curves.canonical_point(curve.oid, spelling) == plain


@every_curve
def test_what_is_no_point_is_none(name: str) -> None:
    curve = known(name)
    plain = curve.encode(curve.g)
    wrong = bytes([plain[-1] ^ 1])
    beyond = (curve.g[0] + curve.p).to_bytes(curve.size + 1, "big")[-curve.size :]
    for data in (
        b"",
        b"\0",
        b"\4",
        plain[:-1],
        plain + b"\0",
        plain[:-1] + wrong,  # not on the curve
        b"\5" + plain[1:],
        b"\5" + plain[1 : curve.size + 1],
        bytes([7 - (plain[-1] & 1)]) + plain[1:],  # hybrid, with the sign of the other point
        b"\2" + b"\xff" * curve.size,  # x is not below p
        b"\4" + b"\xff" * 2 * curve.size,
        b"\4" + plain[1 : curve.size + 1] + beyond,
    ):
        assert curve.decode(data) is None, data.hex()
        assert curves.canonical_point(curve.oid, data) is None
        assert curves.canonical_point(curve.oid, tlv(der.OCTET_STRING, data)) is None
    for y in (curve.lift(0, odd=True), curve.lift(0, odd=False)):
        if y is not None:  # then p in the place of 0 would do as well
            at_p = curve.p.to_bytes(curve.size, "big")
            assert curve.decode(bytes([2 | y[1] & 1]) + at_p) is None
            assert curve.decode(b"\4" + at_p + y[1].to_bytes(curve.size, "big")) is None
    barren = next(x for x in range(100) if not _is_square(x**3 + curve.a * x + curve.b, curve.p))
    assert curve.lift(barren, odd=False) is curve.lift(barren, odd=True) is None


def test_a_coordinate_has_all_its_bytes() -> None:
    curve = known("secp521r1")
    point = curve.negate(curve.g)
    assert point is not None
    plain = curve.encode(point)
    assert plain[curve.size + 1] == 0
    assert curve.decode(plain[: curve.size + 1] + plain[curve.size + 2 :]) is None


def _is_square(value: int, p: int) -> bool:
    return pow(value, (p - 1) // 2, p) in (0, 1)


def test_coordinate_is_below_the_prime() -> None:
    curve = known("brainpoolP256r1")  # its p leaves room above it in 32 bytes
    x = next(x for x in range(1, 100) if curve.lift(x, odd=True))
    assert (x + curve.p).bit_length() <= 256
    assert curve.decode(b"\3" + (x + curve.p).to_bytes(32, "big")) is None
    y = curve.lift(x, odd=True)
    assert y is not None
    above = b"\4" + (x + curve.p).to_bytes(32, "big") + y[1].to_bytes(32, "big")
    assert curve.decode(above) is None


@pytest.mark.parametrize(
    ("spellings", "one"),
    [
        *(([printable(name)], oid(NAMED[name][0].dotted_string)) for name in NAMED),
        ([printable("P-224")], oid("1.3.132.0.33")),
        ([printable("prime256v1"), printable("P-256")], oid("1.2.840.10045.3.1.7")),
        ([printable("P-384")], oid("1.3.132.0.34")),
        ([printable("P-521")], oid("1.3.132.0.35")),
        ([printable("edwards25519"), oid("1.3.6.1.4.1.11591.15.1")], curves.ED25519),
        ([printable("edwards448")], curves.ED448),
        ([printable("curve25519"), oid("1.3.6.1.4.1.3029.1.5.1")], curves.X25519),
        ([printable("curve448")], curves.X448),
        ([oid("1.3.132.0.1")], oid("1.3.132.0.1")),  # sect163k1: not known here, still itself
        ([tlv(der.SEQUENCE, tlv(der.INTEGER, b"\1"))], tlv(der.SEQUENCE, tlv(der.INTEGER, b"\1"))),
    ],
)
def test_spellings_of_a_curve(spellings: list[bytes], one: bytes) -> None:
    for spelling in (*spellings, one):
        assert curves.canonical(spelling) == one


def test_edwards_and_montgomery_names() -> None:
    assert [oid("1.3.101.112"), oid("1.3.101.113")] == [curves.ED25519, curves.ED448]
    assert [oid("1.3.101.110"), oid("1.3.101.111")] == [curves.X25519, curves.X448]


@pytest.mark.parametrize(
    "params", [b"", b"\5\0", b"\6", b"\6\3\1\2", oid("1.3.132.0.34") + b"\0", 2 * oid("1.3.132.0.34")]
)
def test_what_names_no_curve(params: bytes) -> None:
    assert curves.canonical(params) is None
    assert curves.find(params) is None
    assert curves.canonical_point(params, b"\4" + bytes(64)) is None


@pytest.mark.parametrize(
    ("params", "size"), [(curves.ED25519, 32), (curves.ED448, 57), (curves.X25519, 32), (curves.X448, 56)]
)
def test_spellings_of_an_edwards_point(params: bytes, size: int) -> None:
    key = bytes(range(size))
    for spelling in (key, tlv(der.OCTET_STRING, key), tlv(der.BIT_STRING, b"\0" + key)):
        assert curves.canonical_point(params, spelling) == key
    assert curves.canonical_point(params, key + b"\0") is None
    assert curves.canonical_point(params, tlv(der.BIT_STRING, b"\1" + key)) is None


def test_point_of_an_unknown_curve_keeps_its_form() -> None:
    params = oid("1.3.132.0.1")
    for point in (b"\4" + bytes(range(42)), b"\2" + bytes(range(21)), b"\3" + bytes(range(21))):
        for spelling in (point, tlv(der.OCTET_STRING, point), tlv(der.BIT_STRING, b"\0" + point)):
            assert curves.canonical_point(params, spelling) == point
    assert curves.canonical_point(params, b"\4" + bytes(41)) is None
    assert curves.canonical_point(params, b"\0") is None


@given(st.lists(st.tuples(st.sampled_from([2, 3, 4, 6, 0x30, 0xA0]), st.binary(max_size=300)), max_size=4))
def test_row_of_elements_is_read_back(elements: list[tuple[int, bytes]]) -> None:
    data = b"".join(tlv(tag, content) for tag, content in elements)
    row = der.row(data)
    assert row is not None
    assert [(e.tag, e.content) for e in row] == elements
    assert b"".join(e.raw for e in row) == data
    if data:
        assert der.row(data[:-1]) != row
        assert der.sequence(tlv(der.SEQUENCE, data)) == row
        assert der.sequence(tlv(der.SEQUENCE, data) + b"\0") is None


@given(st.binary(max_size=60))
def test_any_bytes_are_a_row_or_none(data: bytes) -> None:
    row = der.row(data)
    assert row is None or b"".join(e.raw for e in row) == data


@pytest.mark.parametrize(
    "data", ["04", "0401", "0480", "04ff", "1f0100", "0481", "04820001", "0484ffffffff00"]
)
def test_broken_elements(data: str) -> None:
    assert der.row(bytes.fromhex(data)) is None


@pytest.mark.parametrize("length", ["80", "ff"])
def test_open_and_reserved_lengths(length: str) -> None:
    """X.690, sections 8.1.3.5 and 8.1.3.6: no number, however many bytes follow."""
    assert der.row(bytes.fromhex("04" + length) + bytes(127)) is None
    assert der.row(bytes.fromhex("04" + length) + bytes(128)) is None


def test_element_is_the_one_asked_for() -> None:
    one = tlv(der.OCTET_STRING, b"x")
    assert der.element(one, der.OCTET_STRING) == b"x"
    assert der.element(one, der.BIT_STRING) is None
    assert der.element(one + one, der.OCTET_STRING) is None
    assert der.element(b"", der.OCTET_STRING) is None
