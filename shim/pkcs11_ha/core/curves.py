"""The elliptic curves whose points are read here: their names in CKA_EC_PARAMS, their points, adding on them.

Everything here is public (curve constants, public keys, signatures), so nothing is done in constant time.
Never give it a private key.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pkcs11_ha.core import der

Point = tuple[int, int]
"""Affine coordinates of a point that is not the point at infinity."""

_Jacobian = tuple[int, int, int]
"""X, Y, Z with x = X/Z², y = Y/Z³; Z = 0 is the point at infinity."""

_INFINITY: _Jacobian = (1, 1, 0)


@dataclass(frozen=True, slots=True)
class Curve:
    """y² = x³ + ax + b over the integers modulo the prime p; g generates all of it; its order n is prime."""

    oid: bytes
    """DER of the OBJECT IDENTIFIER, as in CKA_EC_PARAMS."""
    p: int
    a: int
    b: int
    g: Point
    n: int

    @property
    def size(self) -> int:
        """Bytes of a coordinate."""
        return (self.p.bit_length() + 7) // 8

    @property
    def order_size(self) -> int:
        """Bytes of r and of s in a signature (PKCS#11 3.0 mechanisms, section 2.3.1)."""
        return (self.n.bit_length() + 7) // 8

    def encode(self, point: Point) -> bytes:
        """The uncompressed form (SEC 1, section 2.3.3)."""
        return b"\4" + point[0].to_bytes(self.size, "big") + point[1].to_bytes(self.size, "big")

    def decode(self, data: bytes) -> Point | None:
        """A point, uncompressed, compressed (SEC 1, section 2.3.4) or hybrid (X9.62); None if it is none."""
        form, body = data[:1], data[1:]
        x, y = int.from_bytes(body[: self.size], "big"), int.from_bytes(body[self.size :], "big")
        if form in (b"\2", b"\3") and len(body) == self.size:
            return self.lift(x, odd=form == b"\3")
        if form not in (b"\4", b"\6", b"\7") or len(body) != 2 * self.size:
            return None
        if form != b"\4" and y % 2 != form[0] % 2:
            return None
        on_curve = max(x, y) < self.p and (y * y - self._right(x)) % self.p == 0
        return (x, y) if on_curve else None

    def lift(self, x: int, *, odd: bool) -> Point | None:
        """The point with this x whose y is odd or even; None where the curve has no point at x."""
        y = _square_root(self._right(x), self.p) if x < self.p else None
        if y is None:
            return None
        return (x, y) if y % 2 == odd else (x, self.p - y)

    def _right(self, x: int) -> int:
        return ((x * x + self.a) * x + self.b) % self.p

    def multiply(self, k: int, point: Point) -> Point | None:
        """k times a point, for any integer k; None is the point at infinity."""
        return self._affine(self._multiply(k % self.n, (*point, 1)))

    def add(self, one: Point | None, other: Point | None) -> Point | None:
        """The sum of two points; None is the point at infinity."""
        left, right = ((*point, 1) if point else _INFINITY for point in (one, other))
        return self._affine(self._add(left, right))

    def negate(self, point: Point | None) -> Point | None:
        return point and (point[0], -point[1] % self.p)

    def _affine(self, point: _Jacobian) -> Point | None:
        x, y, z = point
        if z == 0:
            return None
        inverse = pow(z, -1, self.p)
        square = inverse * inverse % self.p
        return x * square % self.p, y * square * inverse % self.p

    def _multiply(self, k: int, point: _Jacobian) -> _Jacobian:
        result = _INFINITY
        for bit in f"{k:b}":
            result = self._double(result)
            if bit == "1":
                result = self._add(result, point)
        return result

    def _double(self, point: _Jacobian) -> _Jacobian:
        x, y, z = point
        p = self.p
        square = y * y % p
        s = 4 * x * square % p
        z2 = z * z % p
        m = (3 * x * x + self.a * z2 * z2) % p
        x3 = (m * m - 2 * s) % p
        return x3, (m * (s - x3) - 8 * square * square) % p, 2 * y * z % p

    def _add(self, one: _Jacobian, other: _Jacobian) -> _Jacobian:
        (x1, y1, z1), (x2, y2, z2) = one, other
        if z1 == 0 or z2 == 0:
            return other if z1 == 0 else one
        p = self.p
        z1z1, z2z2 = z1 * z1 % p, z2 * z2 % p
        u1, s1 = x1 * z2z2 % p, y1 * z2z2 * z2 % p
        h, r = (x2 * z1z1 - u1) % p, (y2 * z1z1 * z1 - s1) % p
        if h == 0:  # the same x: the same point, or its negative
            return self._double(one) if r == 0 else _INFINITY
        hh = h * h % p
        hhh, v = h * hh % p, u1 * hh % p
        x3 = (r * r - hhh - 2 * v) % p
        return x3, (r * (v - x3) - s1 * hhh) % p, h * z1 * z2 % p


def _square_root(square: int, p: int) -> int | None:
    """A root other than 0 modulo the odd prime p, None where there is none (Tonelli and Shanks).

    A curve of odd order has no point whose y is 0.

    The loop is there for P-224, whose p is 1 modulo 2⁹⁶. The other curves have a p that is 3 modulo 4, and it
    never runs.
    """
    if pow(square, (p - 1) // 2, p) != 1:
        return None
    odd, twos = p - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    non_residue = next(z for z in range(2, p) if pow(z, (p - 1) // 2, p) == p - 1)
    c, root, t = pow(non_residue, odd, p), pow(square, (odd + 1) // 2, p), pow(square, odd, p)
    while t != 1:
        order, power = 0, t
        while power != 1:
            order, power = order + 1, power * power % p
        b = pow(c, 1 << (twos - order - 1), p)
        root, c, twos = root * b % p, b * b % p, order
        t = t * c % p
    return root


def _curve(oid: str, p: str, a: str, b: str, x: str, y: str, n: str) -> Curve:
    return Curve(bytes.fromhex(oid), int(p, 16), int(a, 16), int(b, 16), (int(x, 16), int(y, 16)), int(n, 16))


# SEC 2 version 2 and RFC 5639 section 3; brainpool's twisted siblings (t1) are other curves.
_P224 = _curve(
    "06052b81040021",
    "ffffffffffffffffffffffffffffffff000000000000000000000001",
    "fffffffffffffffffffffffffffffffefffffffffffffffffffffffe",
    "b4050a850c04b3abf54132565044b0b7d7bfd8ba270b39432355ffb4",
    "b70e0cbd6bb4bf7f321390b94a03c1d356c21122343280d6115c1d21",
    "bd376388b5f723fb4c22dfe6cd4375a05a07476444d5819985007e34",
    "ffffffffffffffffffffffffffff16a2e0b8f03e13dd29455c5c2a3d",
)
_P256 = _curve(
    "06082a8648ce3d030107",
    "ffffffff00000001000000000000000000000000ffffffffffffffffffffffff",
    "ffffffff00000001000000000000000000000000fffffffffffffffffffffffc",
    "5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b",
    "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296",
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5",
    "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551",
)
_P384 = _curve(
    "06052b81040022",
    "fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffeffffffff0000000000000000ffffffff",
    "fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffeffffffff0000000000000000fffffffc",
    "b3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aef",
    "aa87ca22be8b05378eb1c71ef320ad746e1d3b628ba79b9859f741e082542a385502f25dbf55296c3a545e3872760ab7",
    "3617de4a96262c6f5d9e98bf9292dc29f8f41dbd289a147ce9da3113b5f0b8c00a60b1ce1d7e819d7a431d7c90ea0e5f",
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
)
_P521 = _curve(
    "06052b81040023",
    "1fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
    "fffffffffffffffffffffffffffffffffff",
    "1fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
    "ffffffffffffffffffffffffffffffffffc",
    "51953eb9618e1c9a1f929a21a0b68540eea2da725b99b315f3b8b489918ef109e156193951ec7e937b1652c0bd3bb1bf"
    "073573df883d2c34f1ef451fd46b503f00",
    "c6858e06b70404e9cd9e3ecb662395b4429c648139053fb521f828af606b4d3dbaa14b5e77efe75928fe1dc127a2ffa8"
    "de3348b3c1856a429bf97e7e31c2e5bd66",
    "11839296a789a3bc0045c8a5fb42c7d1bd998f54449579b446817afbd17273e662c97ee72995ef42640c550b9013fad0"
    "761353c7086a272c24088be94769fd16650",
    "1fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffa51868783bf2f966b7fcc0148f709a"
    "5d03bb5c9b8899c47aebb6fb71e91386409",
)
_K256 = _curve(
    "06052b8104000a",
    "fffffffffffffffffffffffffffffffffffffffffffffffffffffffefffffc2f",
    "0",
    "7",
    "79be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798",
    "483ada7726a3c4655da4fbfc0e1108a8fd17b448a68554199c47d08ffb10d4b8",
    "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141",
)
_BP256 = _curve(
    "06092b2403030208010107",
    "a9fb57dba1eea9bc3e660a909d838d726e3bf623d52620282013481d1f6e5377",
    "7d5a0975fc2c3057eef67530417affe7fb8055c126dc5c6ce94a4b44f330b5d9",
    "26dc5c6ce94a4b44f330b5d9bbd77cbf958416295cf7e1ce6bccdc18ff8c07b6",
    "8bd2aeb9cb7e57cb2c4b482ffc81b7afb9de27e1e3bd23c23a4453bd9ace3262",
    "547ef835c3dac4fd97f8461a14611dc9c27745132ded8e545c1d54c72f046997",
    "a9fb57dba1eea9bc3e660a909d838d718c397aa3b561a6f7901e0e82974856a7",
)
_BP384 = _curve(
    "06092b240303020801010b",
    "8cb91e82a3386d280f5d6f7e50e641df152f7109ed5456b412b1da197fb71123acd3a729901d1a71874700133107ec53",
    "7bc382c63d8c150c3c72080ace05afa0c2bea28e4fb22787139165efba91f90f8aa5814a503ad4eb04a8c7dd22ce2826",
    "4a8c7dd22ce28268b39b55416f0447c2fb77de107dcd2a62e880ea53eeb62d57cb4390295dbc9943ab78696fa504c11",
    "1d1c64f068cf45ffa2a63a81b7c13f6b8847a3e77ef14fe3db7fcafe0cbd10e8e826e03436d646aaef87b2e247d4af1e",
    "8abe1d7520f9c2a45cb1eb8e95cfd55262b70b29feec5864e19c054ff99129280e4646217791811142820341263c5315",
    "8cb91e82a3386d280f5d6f7e50e641df152f7109ed5456b31f166e6cac0425a7cf3ab6af6b7fc3103b883202e9046565",
)
_BP512 = _curve(
    "06092b240303020801010d",
    "aadd9db8dbe9c48b3fd4e6ae33c9fc07cb308db3b3c9d20ed6639cca703308717d4d9b009bc66842aecda12ae6a380e6"
    "2881ff2f2d82c68528aa6056583a48f3",
    "7830a3318b603b89e2327145ac234cc594cbdd8d3df91610a83441caea9863bc2ded5d5aa8253aa10a2ef1c98b9ac8b5"
    "7f1117a72bf2c7b9e7c1ac4d77fc94ca",
    "3df91610a83441caea9863bc2ded5d5aa8253aa10a2ef1c98b9ac8b57f1117a72bf2c7b9e7c1ac4d77fc94cadc083e67"
    "984050b75ebae5dd2809bd638016f723",
    "81aee4bdd82ed9645a21322e9c4c6a9385ed9f70b5d916c1b43b62eef4d0098eff3b1f78e2d0d48d50d1687b93b97d5f"
    "7c6d5047406a5e688b352209bcb9f822",
    "7dde385d566332ecc0eabfa9cf7822fdf209f70024a57b1aa000c55b881f8111b2dcde494a5f485e5bca4bd88a2763ae"
    "d1ca2b2fa8f0540678cd1e0f3ad80892",
    "aadd9db8dbe9c48b3fd4e6ae33c9fc07cb308db3b3c9d20ed6639cca70330870553e5c414ca92619418661197fac1047"
    "1db1d381085ddaddb58796829ca90069",
)

_CURVES = {
    name: curve
    for curve, names in (
        (_P224, ("secp224r1", "P-224")),
        (_P256, ("secp256r1", "prime256v1", "P-256")),
        (_P384, ("secp384r1", "P-384")),
        (_P521, ("secp521r1", "P-521")),
        (_K256, ("secp256k1",)),
        (_BP256, ("brainpoolP256r1",)),
        (_BP384, ("brainpoolP384r1",)),
        (_BP512, ("brainpoolP512r1",)),
    )
    for name in names
}

# RFC 8410 section 3. PKCS#11 3.0 (mechanisms, 2.3.5 to 2.3.8) has them as an OID or as a PrintableString;
# older modules use OIDs from before the RFC.
ED25519, ED448 = bytes.fromhex("06032b6570"), bytes.fromhex("06032b6571")
X25519, X448 = bytes.fromhex("06032b656e"), bytes.fromhex("06032b656f")

BYTES_OF_KEY = {ED25519: 32, ED448: 57, X25519: 32, X448: 56}
"""Bytes of a public key on the curves whose points are plain strings of bytes (RFC 8032, RFC 7748)."""

_BY_OID: Mapping[bytes | None, Curve] = {curve.oid: curve for curve in _CURVES.values()}

_SPELLINGS = {
    **{bytes([der.PRINTABLE_STRING, len(name), *name.encode()]): c.oid for name, c in _CURVES.items()},
    b"\x13\x0cedwards25519": ED25519,
    b"\x13\x0aedwards448": ED448,
    b"\x13\x0acurve25519": X25519,
    b"\x13\x08curve448": X448,
    bytes.fromhex("06092b06010401da470f01"): ED25519,  # 1.3.6.1.4.1.11591.15.1, GnuPG
    bytes.fromhex("060a2b060104019755010501"): X25519,  # 1.3.6.1.4.1.3029.1.5.1, cryptlib
}


def canonical(ec_params: bytes) -> bytes | None:
    """CKA_EC_PARAMS in the one spelling in which equal is equal; None where it names no curve.

    Named curves are their OID, explicit parameters stay as they are. `implicitlyCA` (NULL) means whatever the
    token thinks, and another token may think otherwise.
    """
    elements = der.row(ec_params)
    if not elements or len(elements) != 1 or elements[0].tag == der.NULL:
        return None
    return _SPELLINGS.get(ec_params, ec_params)


def find(ec_params: bytes) -> Curve | None:
    """The curve that CKA_EC_PARAMS names, in any spelling; None where its points cannot be added here."""
    return _BY_OID.get(canonical(ec_params))


def canonical_point(ec_params: bytes, point: bytes) -> bytes | None:
    """CKA_EC_POINT in the one spelling in which equal is equal; None where it is no point of the curve.

    PKCS#11 wants the point in a DER OCTET STRING; modules also give it bare, in a BIT STRING, or compressed.
    On a curve that is not known here a compressed point stays so: there one point can have two spellings, but
    two points never share one.
    """
    params = canonical(ec_params)
    if params is None:
        return None
    inner, bit_string = der.element(point, der.OCTET_STRING), der.element(point, der.BIT_STRING)
    spellings = [s for s in (point, inner, bit_string and der.bits(bit_string)) if s]
    curve, size = find(params), BYTES_OF_KEY.get(params)
    if curve is not None:
        # Within a curve no two spellings have a length in common, so at most one of them is a point.
        return next((curve.encode(found) for s in spellings if (found := curve.decode(s))), None)
    if size is not None:
        return next((s for s in spellings if len(s) == size), None)
    return next((s for s in reversed(spellings) if _looks_like_point(s)), None)


def _looks_like_point(data: bytes) -> bool:
    return data[0] in (2, 3) or (data[0] == 4 and len(data) % 2 == 1)
