"""Two members that hold the same key can prove it; two that do not cannot, whatever they answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256, sha512
from secrets import randbelow, token_bytes

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC
from cryptography.hazmat.primitives.hmac import HMAC

from pkcs11_ha import ck
from pkcs11_ha.core import curves
from pkcs11_ha.core.curves import Curve, Point
from pkcs11_ha.core.proof import (
    USAGE_ATTRIBUTES,
    Operation,
    Proof,
    evidence,
    plan_proof,
    recover_public_keys,
    shared_usage,
)

CURVES = {
    "secp224r1": (ec.SECP224R1(), "06052b81040021"),
    "secp256r1": (ec.SECP256R1(), "06082a8648ce3d030107"),
    "secp384r1": (ec.SECP384R1(), "06052b81040022"),
    "secp521r1": (ec.SECP521R1(), "06052b81040023"),
    "secp256k1": (ec.SECP256K1(), "06052b8104000a"),
    "brainpoolP256r1": (ec.BrainpoolP256R1(), "06092b2403030208010107"),
    "brainpoolP384r1": (ec.BrainpoolP384R1(), "06092b240303020801010b"),
    "brainpoolP512r1": (ec.BrainpoolP512R1(), "06092b240303020801010d"),
}
every_curve = pytest.mark.parametrize("name", CURVES)
HASHES = {
    20: hashes.SHA1(),
    28: hashes.SHA224(),
    32: hashes.SHA256(),
    48: hashes.SHA384(),
    64: hashes.SHA512(),
}

ALL = frozenset(value for name, value in vars(ck).items() if name.startswith("CKM_"))
BOTH_WAYS = frozenset({ck.CKA_SIGN, ck.CKA_ENCRYPT})


def plan(
    object_class: int,
    key_type: int,
    *,
    ec_params: bytes | None = None,
    mechanisms: frozenset[int] = ALL,
    usage: frozenset[int] = BOTH_WAYS,
) -> Proof | None:
    return plan_proof(
        object_class,
        key_type,
        ec_params=ec_params,
        mechanisms=mechanisms,
        usage=usage,
    )


def find(name: str) -> Curve:
    curve = curves.find(bytes.fromhex(CURVES[name][1]))
    assert curve is not None
    return curve


def plain(curve: Curve, r: int, s: int) -> bytes:
    """A signature as CKM_ECDSA gives it."""
    return r.to_bytes(curve.order_size, "big") + s.to_bytes(curve.order_size, "big")


def sign(curve: Curve, key: ec.EllipticCurvePrivateKey, hashed: bytes) -> bytes:
    signature = key.sign(hashed, ec.ECDSA(utils.Prehashed(HASHES[len(hashed)])))
    return plain(curve, *utils.decode_dss_signature(signature))


def verifies(name: str, point: Point, hashed: bytes, r: int, s: int) -> bool:
    public = ec.EllipticCurvePublicNumbers(*point, CURVES[name][0]).public_key()
    try:
        public.verify(
            utils.encode_dss_signature(r, s), hashed, ec.ECDSA(utils.Prehashed(HASHES[len(hashed)]))
        )
    except InvalidSignature:
        return False
    return True


def point_of(key: ec.EllipticCurvePrivateKey) -> Point:
    numbers = key.public_key().public_numbers()
    return numbers.x, numbers.y


# ---- public keys from signatures


@every_curve
@pytest.mark.parametrize("size", HASHES)
def test_the_signer_is_among_the_recovered(name: str, size: int) -> None:
    curve, key, hashed = find(name), ec.generate_private_key(CURVES[name][0]), token_bytes(size)
    signature = sign(curve, key, hashed)
    found = recover_public_keys(curve, hashed, signature)
    assert point_of(key) in found
    assert len(found) == 2
    r, s = (
        int.from_bytes(half, "big")
        for half in (signature[: len(signature) // 2], signature[len(signature) // 2 :])
    )
    assert all(verifies(name, point, hashed, r, s) for point in found)
    assert point_of(key) not in recover_public_keys(curve, token_bytes(size), signature)


@every_curve
def test_a_point_beyond_the_order_is_not_forgotten(name: str) -> None:
    """Of r < p - n there are two points x, r and r + n: rare, and here made on purpose."""
    curve = find(name)
    x, start = next((x, p) for x in range(curve.n + 1, curve.p) if (p := curve.lift(x, odd=True)))
    hashed, s = token_bytes(28), randbelow(curve.n - 1) + 1
    r = x - curve.n
    e, inverse = int.from_bytes(hashed, "big"), pow(r, -1, curve.n)
    key = curve.add(curve.multiply(s * inverse, start), curve.multiply(-e * inverse, curve.g))
    assert key is not None
    assert verifies(name, key, hashed, r, s)
    found = recover_public_keys(curve, hashed, plain(curve, r, s))
    assert key in found
    assert all(verifies(name, point, hashed, r, s) for point in found)
    assert len(found) == (4 if curve.lift(r, odd=True) else 2)


@every_curve
def test_what_is_no_signature_recovers_nothing(name: str) -> None:
    curve, hashed = find(name), bytes(31) + b"\1"
    good = sign(curve, ec.generate_private_key(CURVES[name][0]), hashed)
    r, s = (int.from_bytes(good[at : at + curve.order_size], "big") for at in (0, curve.order_size))
    for signature in (
        b"",
        b"\1",
        good[:-1],
        good + b"\1",
        plain(curve, 0, s),
        plain(curve, r, 0),
        plain(curve, curve.n, s),
        plain(curve, r, curve.n),
        b"\0" + good[: curve.order_size] + b"\0" + good[curve.order_size :],
        utils.encode_dss_signature(r, s),
    ):
        assert recover_public_keys(curve, hashed, signature) == frozenset(), signature.hex()
    assert len(recover_public_keys(curve, hashed, good)) == 2


def test_infinity_is_no_key() -> None:
    curve, nonce, hashed = find("secp256r1"), 12345, sha256(b"x").digest()
    point = curve.multiply(nonce, curve.g)
    assert point is not None
    s = int.from_bytes(hashed, "big") * pow(nonce, -1, curve.n) % curve.n  # a signature by the secret 0
    found = recover_public_keys(curve, hashed, plain(curve, point[0] % curve.n, s))
    assert len(found) == 1
    assert None not in found


# ---- plans


def planned(proof: Proof | None) -> tuple[Operation, int] | None:
    return None if proof is None else (proof.operation, proof.mechanism)


ECDSA = (Operation.SIGN, ck.CKM_ECDSA)
P256 = bytes.fromhex(CURVES["secp256r1"][1])


@pytest.mark.parametrize(
    ("object_class", "key_type", "more", "expected"),
    [
        (ck.CKO_SECRET_KEY, ck.CKK_AES, {}, (Operation.ENCRYPT, ck.CKM_AES_ECB)),
        (
            ck.CKO_SECRET_KEY,
            ck.CKK_AES,
            {"usage": frozenset({ck.CKA_SIGN})},
            (Operation.SIGN, ck.CKM_AES_CMAC),
        ),
        (
            ck.CKO_SECRET_KEY,
            ck.CKK_AES,
            {"mechanisms": ALL - {ck.CKM_AES_ECB}},
            (Operation.SIGN, ck.CKM_AES_CMAC),
        ),
        (ck.CKO_SECRET_KEY, ck.CKK_AES, {"mechanisms": frozenset()}, None),
        (ck.CKO_SECRET_KEY, ck.CKK_AES, {"usage": frozenset()}, None),
        (ck.CKO_SECRET_KEY, ck.CKK_DES3, {}, (Operation.ENCRYPT, ck.CKM_DES3_ECB)),
        (ck.CKO_SECRET_KEY, ck.CKK_DES2, {}, (Operation.ENCRYPT, ck.CKM_DES3_ECB)),
        (ck.CKO_SECRET_KEY, ck.CKK_DES3, {"usage": frozenset({ck.CKA_SIGN})}, None),
        (ck.CKO_SECRET_KEY, ck.CKK_GENERIC_SECRET, {}, (Operation.SIGN, ck.CKM_SHA256_HMAC)),
        (ck.CKO_SECRET_KEY, ck.CKK_SHA512_HMAC, {}, (Operation.SIGN, ck.CKM_SHA512_HMAC)),
        (ck.CKO_SECRET_KEY, ck.CKK_SHA_1_HMAC, {}, (Operation.SIGN, ck.CKM_SHA_1_HMAC)),
        (ck.CKO_SECRET_KEY, ck.CKK_CHACHA20, {}, None),
        (ck.CKO_OTP_KEY, ck.CKK_HOTP, {}, None),
        (ck.CKO_OTP_KEY, ck.CKK_GENERIC_SECRET, {}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_RSA, {}, (Operation.SIGN, ck.CKM_RSA_PKCS)),
        (ck.CKO_PRIVATE_KEY, ck.CKK_RSA, {"usage": frozenset({ck.CKA_ENCRYPT})}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_RSA, {"usage": BOTH_WAYS | {ck.CKA_ALWAYS_AUTHENTICATE}}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_RSA, {"mechanisms": frozenset({ck.CKM_RSA_PKCS_PSS})}, None),
        *(
            (ck.CKO_PRIVATE_KEY, ck.CKK_EC, {"ec_params": bytes.fromhex(c[1])}, ECDSA)
            for c in CURVES.values()
        ),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC, {"ec_params": b"\x13\x0aprime256v1"}, ECDSA),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC, {"ec_params": bytes.fromhex("06082a8648ce3d030101")}, None),  # P-192
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC, {}, None),
        (
            ck.CKO_PRIVATE_KEY,
            ck.CKK_EC_EDWARDS,
            {"ec_params": curves.ED25519},
            (Operation.SIGN, ck.CKM_EDDSA),
        ),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC_EDWARDS, {"ec_params": curves.ED448}, (Operation.SIGN, ck.CKM_EDDSA)),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC_EDWARDS, {}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC_EDWARDS, {"ec_params": P256}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC_EDWARDS, {"ec_params": curves.X25519}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC_MONTGOMERY, {"ec_params": curves.ED25519}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC_MONTGOMERY, {"ec_params": P256}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC, {"ec_params": curves.ED25519}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_EC_MONTGOMERY, {"ec_params": curves.X25519}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_ML_DSA, {}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_DSA, {}, None),
        (ck.CKO_PRIVATE_KEY, ck.CKK_HSS, {}, None),  # its signatures are used up
        (ck.CKO_PUBLIC_KEY, ck.CKK_RSA, {}, None),
        (ck.CKO_CERTIFICATE, ck.CKK_RSA, {}, None),
        (ck.CKO_DATA, ck.CKK_AES, {}, None),
    ],
)
def test_plans(object_class: int, key_type: int, more: dict, expected: tuple[Operation, int] | None) -> None:  # type: ignore[type-arg]
    assert planned(plan(object_class, key_type, **more)) == expected


def every_plan() -> Iterator[Proof]:
    for key_type in (v for n, v in vars(ck).items() if n.startswith("CKK_")):
        for usage in (ck.CKA_SIGN, ck.CKA_ENCRYPT):
            for object_class in (ck.CKO_SECRET_KEY, ck.CKO_PRIVATE_KEY):
                for params in (*(bytes.fromhex(c[1]) for c in CURVES.values()), *curves.BYTES_OF_KEY):
                    found = plan(object_class, key_type, ec_params=params, usage=frozenset({usage}))
                    if found:
                        yield found


def test_inputs() -> None:
    plans = list(every_plan())
    assert {p.mechanism for p in plans} > {ck.CKM_AES_ECB, ck.CKM_ECDSA, ck.CKM_EDDSA, ck.CKM_RSA_PKCS}
    for proof in plans:
        assert len(set(proof.inputs)) == 2
        for data in proof.inputs:
            assert len(set(data)) > 8  # no block with a meaning, such as zeros
            if proof.operation is Operation.ENCRYPT:
                assert len(data) == 16
            if proof.curve:
                assert 8 * len(data) <= proof.curve.n.bit_length()
                assert len(data) in (28, 32)
        assert (proof.curve is not None) == (proof.mechanism == ck.CKM_ECDSA)


def test_usage_is_what_both_permit_and_either_demands() -> None:
    one = {ck.CKA_SIGN: b"\1", ck.CKA_ENCRYPT: b"\1", ck.CKA_ALWAYS_AUTHENTICATE: b"\0", ck.CKA_TOKEN: b"\1"}
    assert shared_usage(one, one) == {ck.CKA_SIGN, ck.CKA_ENCRYPT}
    assert shared_usage(one, {ck.CKA_SIGN: b"\1", ck.CKA_ENCRYPT: b"\0"}) == {ck.CKA_SIGN}
    demanding = one | {ck.CKA_ALWAYS_AUTHENTICATE: b"\1"}
    everything = {ck.CKA_SIGN, ck.CKA_ENCRYPT, ck.CKA_ALWAYS_AUTHENTICATE}
    assert shared_usage(one, demanding) == shared_usage(demanding, one) == everything
    assert shared_usage({}, {}) == frozenset()
    assert set(USAGE_ATTRIBUTES) == everything


# ---- members: what a token with this key would answer

Member = Callable[[Proof], list[bytes]]


def aes(key: bytes) -> Member:
    def answer(proof: Proof) -> list[bytes]:
        if proof.mechanism == ck.CKM_AES_CMAC:
            return [_final(CMAC(AES(key)), data) for data in proof.inputs]
        assert proof.mechanism == ck.CKM_AES_ECB
        return [Cipher(AES(key), modes.ECB()).encryptor().update(data) for data in proof.inputs]

    return answer


def _final(code: CMAC | HMAC, data: bytes) -> bytes:
    code.update(data)
    return code.finalize()


def des3(key: bytes) -> Member:
    return lambda proof: [
        Cipher(TripleDES(key), modes.ECB()).encryptor().update(data) for data in proof.inputs
    ]


def hmac(key: bytes, algorithm: hashes.HashAlgorithm) -> Member:
    return lambda proof: [_final(HMAC(key, algorithm), data) for data in proof.inputs]


def rsa_pkcs(key: rsa.RSAPrivateKey) -> Member:
    """CKM_RSA_PKCS signs a DigestInfo, here written by the plan and not by the token."""
    info = bytes.fromhex("3031300d060960864801650304020105000420")

    def answer(proof: Proof) -> list[bytes]:
        assert all(data.startswith(info) for data in proof.inputs)
        digests = [data[len(info) :] for data in proof.inputs]
        return [key.sign(d, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256())) for d in digests]

    return answer


def eddsa(key: ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey) -> Member:
    return lambda proof: [key.sign(data) for data in proof.inputs]


def ecdsa(key: ec.EllipticCurvePrivateKey) -> Member:
    """Random signatures: no two members answer alike."""

    def answer(proof: Proof) -> list[bytes]:
        assert proof.curve is not None
        return [sign(proof.curve, key, data) for data in proof.inputs]

    return answer


def ecdsa_member(name: str) -> Callable[[], Member]:
    return lambda: ecdsa(ec.generate_private_key(CURVES[name][0]))


def ec_plan(name: str) -> Proof:
    proof = plan(ck.CKO_PRIVATE_KEY, ck.CKK_EC, ec_params=bytes.fromhex(CURVES[name][1]))
    assert proof is not None
    return proof


SIGN_ONLY = frozenset({ck.CKA_SIGN})
KEYS: dict[str, tuple[Proof | None, Callable[[], Member]]] = {
    "AES ECB": (plan(ck.CKO_SECRET_KEY, ck.CKK_AES), lambda: aes(token_bytes(32))),
    "AES CMAC": (plan(ck.CKO_SECRET_KEY, ck.CKK_AES, usage=SIGN_ONLY), lambda: aes(token_bytes(16))),
    "DES3": (plan(ck.CKO_SECRET_KEY, ck.CKK_DES3), lambda: des3(token_bytes(24))),
    "HMAC SHA-1": (
        plan(ck.CKO_SECRET_KEY, ck.CKK_SHA_1_HMAC),
        lambda: hmac(token_bytes(20), hashes.SHA1()),
    ),
    "HMAC SHA-224": (
        plan(ck.CKO_SECRET_KEY, ck.CKK_SHA224_HMAC),
        lambda: hmac(token_bytes(20), hashes.SHA224()),
    ),
    "generic": (
        plan(ck.CKO_SECRET_KEY, ck.CKK_GENERIC_SECRET),
        lambda: hmac(token_bytes(20), hashes.SHA256()),
    ),
    "HMAC SHA-256": (
        plan(ck.CKO_SECRET_KEY, ck.CKK_SHA256_HMAC),
        lambda: hmac(token_bytes(20), hashes.SHA256()),
    ),
    "HMAC SHA-384": (
        plan(ck.CKO_SECRET_KEY, ck.CKK_SHA384_HMAC),
        lambda: hmac(token_bytes(20), hashes.SHA384()),
    ),
    "HMAC SHA-512": (
        plan(ck.CKO_SECRET_KEY, ck.CKK_SHA512_HMAC),
        lambda: hmac(token_bytes(20), hashes.SHA512()),
    ),
    "RSA": (plan(ck.CKO_PRIVATE_KEY, ck.CKK_RSA), lambda: rsa_pkcs(rsa.generate_private_key(65537, 1024))),
    "Ed25519": (
        plan(ck.CKO_PRIVATE_KEY, ck.CKK_EC_EDWARDS, ec_params=curves.ED25519),
        lambda: eddsa(ed25519.Ed25519PrivateKey.generate()),
    ),
    "Ed448": (
        plan(ck.CKO_PRIVATE_KEY, ck.CKK_EC_EDWARDS, ec_params=b"\x13\x0aedwards448"),
        lambda: eddsa(ed448.Ed448PrivateKey.generate()),
    ),
    **{name: (ec_plan(name), ecdsa_member(name)) for name in CURVES},
}


def same_key(proof: Proof, here: Sequence[bytes], there: Sequence[bytes]) -> bool:
    """Whether the outputs of two members prove that they hold one key."""
    one, other = evidence(proof, here), evidence(proof, there)
    return one is not None and one == other


@pytest.mark.parametrize("name", KEYS)
def test_the_same_key_proves_itself_and_another_does_not(name: str) -> None:
    proof, make = KEYS[name]
    assert proof is not None
    key, other = make(), make()
    assert same_key(proof, key(proof), key(proof))
    assert not same_key(proof, key(proof), other(proof))
    assert evidence(proof, key(proof)) == evidence(proof, key(proof)) != evidence(proof, other(proof))
    for output in key(proof):
        varies = proof.mechanism in (ck.CKM_RSA_PKCS, ck.CKM_ECDSA)
        assert len(output) >= proof.least if varies else len(output) == proof.least


@pytest.mark.parametrize("name", KEYS)
def test_answers_that_cannot_be_right_prove_nothing(name: str) -> None:
    proof, make = KEYS[name]
    assert proof is not None
    one, two = make()(proof)
    for wrong in (
        [],
        [one],
        [one, two, one],
        [b"", b""],
        [bytes(len(one)), bytes(len(one))],  # nothing done, CKR_OK
        [one, one],  # the buffer of the first call
        [one[: proof.least - 1], two[: proof.least - 1]],
        list(proof.inputs),  # a token that does nothing
        [one, proof.inputs[1]],
    ):
        assert evidence(proof, wrong) is None, wrong
        assert not same_key(proof, wrong, wrong)
        assert not same_key(proof, [one, two], wrong)
    if proof.curve is not None:
        assert evidence(proof, [two, one]) is None


def test_ed448_gets_its_parameter() -> None:
    (_, _), (ed25519_proof, _), (ed448_proof, _) = (KEYS[k] for k in ("RSA", "Ed25519", "Ed448"))
    assert ed25519_proof is not None
    assert ed448_proof is not None
    assert ed25519_proof.parameter == b""
    assert ed448_proof.parameter == bytes(24)  # phFlag, ulContextDataLen, pContextData on 64 bits


# ---- why ECDSA takes two signatures


def signature_with(curve: Curve, secret: int, nonce: int, hashed: bytes) -> bytes:
    point = curve.multiply(nonce, curve.g)
    assert point is not None
    r = point[0] % curve.n
    s = (int.from_bytes(hashed, "big") + r * secret) * pow(nonce, -1, curve.n) % curve.n
    return plain(curve, r, s)


@every_curve
def test_one_signature_can_mistake_a_key_and_two_cannot(name: str) -> None:
    """Another key, made so that its first signature verifies under ours as well."""
    curve, proof = find(name), ec_plan(name)
    ours, nonces = randbelow(curve.n - 1) + 1, [randbelow(curve.n - 1) + 1 for _ in range(4)]
    first, second = proof.inputs
    shared = curve.multiply(nonces[2], curve.g)
    assert shared is not None
    theirs = (-ours - 2 * int.from_bytes(first, "big") * pow(shared[0], -1, curve.n)) % curve.n
    here = [signature_with(curve, ours, nonces[0], first), signature_with(curve, ours, nonces[1], second)]
    there = [
        signature_with(curve, theirs, nonces[2], first),
        signature_with(curve, theirs, nonces[3], second),
    ]
    assert recover_public_keys(curve, first, here[0]) & recover_public_keys(curve, first, there[0])
    assert evidence(proof, here) is not None
    assert evidence(proof, there) is not None
    assert not same_key(proof, here, there)


def test_a_doubt_is_no_proof() -> None:
    """(r, s) and (r, -s) of one digest leave the same two keys: which of them it is nobody can say."""
    curve = find("secp256r1")
    hashed = sha256(b"x").digest()
    proof = replace(ec_plan("secp256r1"), inputs=(hashed, hashed))
    signature = sign(curve, ec.generate_private_key(ec.SECP256R1()), hashed)
    r, s = (int.from_bytes(signature[at : at + 32], "big") for at in (0, 32))
    twin = plain(curve, r, curve.n - s)
    assert len(recover_public_keys(curve, hashed, signature) & recover_public_keys(curve, hashed, twin)) == 2
    assert evidence(proof, [signature, twin]) is None
    assert not same_key(proof, [signature, twin], [signature, twin])


def test_signatures_of_two_keys_are_no_proof() -> None:
    proof = ec_plan("secp256k1")
    one, other = KEYS["secp256k1"][1](), KEYS["secp256k1"][1]()
    mixed = [one(proof)[0], other(proof)[1]]
    assert evidence(proof, mixed) is None
    assert not same_key(proof, mixed, mixed)


def test_long_hashes_are_cut_at_the_order() -> None:
    """SEC 1, section 4.1.3 step 5: bits, not bytes; no common hash is longer than the 521 bits of P-521."""
    curve = find("secp521r1")
    hashed = sha512(b"a").digest() + sha512(b"b").digest()
    e = int.from_bytes(hashed, "big") >> (1024 - 521)
    secret, nonce = 0x1234567, 0x7654321
    point = curve.multiply(nonce, curve.g)
    assert point is not None
    r = point[0] % curve.n
    s = (e + r * secret) * pow(nonce, -1, curve.n) % curve.n
    assert curve.multiply(secret, curve.g) in recover_public_keys(curve, hashed, plain(curve, r, s))
