"""Proves by an operation that two members hold one key, where attributes do not: what to run and compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256

from pkcs11_ha import ck
from pkcs11_ha.core import curves
from pkcs11_ha.core.curves import Curve, Point
from pkcs11_ha.core.public_key import Attributes, digest


class Operation(Enum):
    """Single-part: C_EncryptInit and C_Encrypt, or C_SignInit and C_Sign."""

    ENCRYPT = ck.CKA_ENCRYPT
    SIGN = ck.CKA_SIGN


@dataclass(frozen=True, slots=True)
class Proof:
    """What to run on both members, once for each input; equal `evidence` of the outputs is one key.

    They are made with a key of the application: they go nowhere else, in particular into no log.
    """

    operation: Operation
    mechanism: int
    parameter: bytes
    """The mechanism's parameter as it stands in memory; empty: none."""
    inputs: tuple[bytes, ...]
    least: int
    """Bytes that an output has at least."""
    curve: Curve | None = None
    """Set where the outputs are ECDSA signatures; those are compared by the keys that they verify under."""


# No protocol asks for these, so what a key makes of them is of no use to anybody. Blocks are digests too: one
# with a meaning of its own must not be encrypted (that of zeros is the check value, and the hash key of GCM).
#
# There are two, as a member that answers everything alike must not pass, and as two ECDSA signatures leave no
# doubt where one does (see `evidence`).
_TEXTS = (b"pkcs11-ha: do two members hold this key? First text.", b"pkcs11-ha: and this is the second text.")
_DIGESTS = tuple(sha256(text).digest() for text in _TEXTS)
_BLOCKS = tuple(value[:16] for value in _DIGESTS)
_DIGEST_INFOS = tuple(bytes.fromhex("3031300d060960864801650304020105000420") + value for value in _DIGESTS)

_EDWARDS = {
    # CK_EDDSA_PARAMS: none for Ed25519; Ed448 wants one, here of zeros: phFlag CK_FALSE and no context
    curves.ED25519: (b"", 64),
    curves.ED448: (bytes(24), 114),
}

_HMACS = {
    ck.CKK_GENERIC_SECRET: (ck.CKM_SHA256_HMAC, 32),
    ck.CKK_SHA_1_HMAC: (ck.CKM_SHA_1_HMAC, 20),
    ck.CKK_SHA224_HMAC: (ck.CKM_SHA224_HMAC, 28),
    ck.CKK_SHA256_HMAC: (ck.CKM_SHA256_HMAC, 32),
    ck.CKK_SHA384_HMAC: (ck.CKM_SHA384_HMAC, 48),
    ck.CKK_SHA512_HMAC: (ck.CKM_SHA512_HMAC, 64),
}

USAGE_ATTRIBUTES = (ck.CKA_ENCRYPT, ck.CKA_SIGN, ck.CKA_ALWAYS_AUTHENTICATE)
"""What `shared_usage` wants to know of a key on each member."""


def shared_usage(one: Attributes, other: Attributes) -> frozenset[int]:
    """The usage under which both members can run a proof: what both permit and what either demands."""

    def true(attributes: Mapping[int, bytes]) -> set[int]:
        return {number for number in USAGE_ATTRIBUTES if any(attributes.get(number, b""))}

    demands = {ck.CKA_ALWAYS_AUTHENTICATE}
    return frozenset(((true(one) & true(other)) - demands) | ((true(one) | true(other)) & demands))


def plan_proof(
    object_class: int | None,
    key_type: int | None,
    *,
    ec_params: bytes | None,
    mechanisms: frozenset[int],
    usage: frozenset[int],
) -> Proof | None:
    """How two members can prove that they hold the same key; None where they cannot: the key stays pinned.

    `ec_params` (any spelling) is what both members show, `mechanisms` what both
    tokens offer and both keys allow, `usage` comes from `shared_usage`.

    None for what is not secret (attributes are all there is to it), for keys whose use is random or used up
    (ML-DSA, HSS, one-time passwords), for keys whose use wants a second key (wrapping, deriving), and for
    keys that want the PIN for each use.
    """
    if ck.CKA_ALWAYS_AUTHENTICATE in usage:
        return None
    if object_class == ck.CKO_SECRET_KEY:
        proofs = _secret_proofs(key_type)
    elif object_class == ck.CKO_PRIVATE_KEY:
        proofs = _private_proofs(key_type, ec_params or b"")
    else:
        return None
    return next((p for p in proofs if p.operation.value in usage and p.mechanism in mechanisms), None)


def _secret_proofs(key_type: int | None) -> list[Proof]:
    """The best first. Different keys agree on 32 bytes of output once in 2²⁵⁶."""
    if key_type == ck.CKK_AES:
        return [
            Proof(Operation.ENCRYPT, ck.CKM_AES_ECB, b"", _BLOCKS, 16),
            Proof(Operation.SIGN, ck.CKM_AES_CMAC, b"", _TEXTS, 16),
        ]
    if key_type in (ck.CKK_DES2, ck.CKK_DES3):
        # Each input is two blocks. Keys that differ in parity bits alone are the same key (FIPS 46-3).
        return [Proof(Operation.ENCRYPT, ck.CKM_DES3_ECB, b"", _BLOCKS, 16)]
    if key_type in _HMACS:
        # HMAC fills a short key with zeros (RFC 2104, section 2): keys that differ in zeros at their end alone make
        # the same. Where both members tell their lengths, these are compared before; SoftHSM does not tell that of a
        # key it has unwrapped, and for HMAC such keys are one.
        mechanism, length = _HMACS[key_type]
        return [Proof(Operation.SIGN, mechanism, b"", _TEXTS, length)]
    return []


def _private_proofs(key_type: int | None, ec_params: bytes) -> list[Proof]:
    curve = curves.find(ec_params)
    if key_type == ck.CKK_RSA:
        # PKCS #1 v1.5 signatures are a function of the key (RFC 8017, section 8.2)
        return [Proof(Operation.SIGN, ck.CKM_RSA_PKCS, b"", _DIGEST_INFOS, 64)]
    if key_type == ck.CKK_EC and curve is not None:
        # As long as the order at most: some tokens refuse what others cut (SEC 1, section 4.1.3)
        inputs = tuple(value[: curve.order_size] for value in _DIGESTS)
        return [Proof(Operation.SIGN, ck.CKM_ECDSA, b"", inputs, 2, curve)]
    if key_type == ck.CKK_EC_EDWARDS and (spelling := curves.canonical(ec_params)) in _EDWARDS:
        # Deterministic as well (RFC 8032, section 5.1.6). A token that adds chance fails: pinned, not
        # mistaken.
        parameter, length = _EDWARDS[spelling]
        return [Proof(Operation.SIGN, ck.CKM_EDDSA, parameter, _TEXTS, length)]
    return []


def evidence(proof: Proof, outputs: Sequence[bytes]) -> bytes | None:
    """What one member's outputs, one for each input, say of its key: 32 bytes, equal if and only if keys are.

    So n candidates on one member and m on another are matched by n + m runs. None where the outputs cannot be
    right or leave a doubt.

    ECDSA signatures are random, but (r, s) of the digest e verifies under the public keys (sR - eG)/r and no
    others, where R is a point whose x is r modulo n: under the signer's Q and under -Q - (2e/r)G (and under
    two more in the rare case that r < p - n). One signature on each member would compare these sets, and the
    wrong one of one member may be the right one of another. So each member signs two digests. Q is in both
    sets, by what a signature is. When it alone is in both, the member's key is known for certain, and equal
    points are equal keys with no probability about it. When something else is in both, too (e1/r1 = e2/r2
    modulo n, once in 2²²³), it is seen and nothing is proven. The digests differ since a token that draws its
    random numbers from digest and key (RFC 6979) gives one signature for one digest.
    """
    right = len(outputs) == len(proof.inputs) and all(len(output) >= proof.least for output in outputs)
    if not right or len(set(outputs)) != len(outputs) or not set(outputs).isdisjoint(proof.inputs):
        return None
    if proof.curve is None:
        return digest(b"outputs", *outputs)
    candidates = [
        recover_public_keys(proof.curve, value, signature)
        for value, signature in zip(proof.inputs, outputs, strict=True)
    ]
    common = frozenset.intersection(*candidates)
    return digest(b"point", *(proof.curve.encode(point) for point in common)) if len(common) == 1 else None


def recover_public_keys(curve: Curve, hashed: bytes, signature: bytes) -> frozenset[Point]:
    """The public keys under which an ECDSA signature verifies (SEC 1, section 4.1.6); none for what is none.

    `hashed` is what was signed, of which the leftmost bits count where it is longer than the order;
    `signature` is r and s, equally long (PKCS#11 3.0 mechanisms, section 2.3.1). The curves have cofactor 1,
    so that every point is in the group.
    """
    half = len(signature) // 2
    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    if len(signature) % 2 or half > curve.order_size or not (0 < r < curve.n and 0 < s < curve.n):
        return frozenset()
    e = int.from_bytes(hashed, "big") >> max(0, 8 * len(hashed) - curve.n.bit_length())
    inverse = pow(r, -1, curve.n)
    base = curve.multiply(-e * inverse, curve.g)
    keys: set[Point | None] = set()
    for x in range(r, curve.p, curve.n):
        if (point := curve.lift(x, odd=False)) is not None:
            summand = curve.multiply(s * inverse, point)
            keys |= {curve.add(base, summand), curve.add(base, curve.negate(summand))}
    return frozenset(key for key in keys if key is not None)
