"""What SoftHSM does, behind workers and threads: every kind of argument crosses, and means the same there."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_ulong, c_void_p
from hashlib import sha256
from os import urandom

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from demo.members import SoftToken, Toml
from tests import p11
from tests.der import tlv
from tests.ha import operations
from tests.ha.app import Application, code
from tests.ha.conftest import StartFactory
from tests.ha.keys import DATA, DIGEST, Keys, private, public, shared
from tests.ha.operations import GcmParams, OaepParams, Use
from tests.worker.conftest import WorkerFactory

ED25519 = bytes.fromhex("130c656477617264733235353139")  # PrintableString "edwards25519"
BIG = urandom(1 << 20)


class EcdhParams(ctypes.Structure):
    _fields_ = (
        ("kdf", c_ulong),
        ("shared_size", c_ulong),
        ("shared", c_void_p),
        ("public_size", c_ulong),
        ("public", ctypes.c_char_p),
    )


class Attribute(ctypes.Structure):
    _fields_ = (("type", c_ulong), ("value", c_void_p), ("size", c_ulong))


@pytest.fixture(params=["worker", "unix", "threads"])
def application(
    request: pytest.FixtureRequest,
    tokens: tuple[SoftToken, SoftToken],
    listening: WorkerFactory,
    start: StartFactory,
) -> Application:
    """A group of two tokens with the same keys, each in a worker or called by threads that have a limit."""
    if request.param == "unix":
        return start(*(listening(token).member() for token in tokens))
    how: dict[str, Toml] = {"host": "worker"} if request.param == "worker" else {"call_timeout_s": 20}
    return start(*(token.member(**how) for token in tokens))


@pytest.fixture
def use(application: Application, keys: Keys) -> Use:
    return Use.begin(application, keys, "123456")


def test_signatures_and_digests(use: Use) -> None:
    for each in (
        operations.sign_ecdsa,
        operations.sign_rsa,
        operations.sign_pss,
        operations.sign_hmac,
        operations.verify_ecdsa,
        operations.verify_hmac,
        operations.encrypt_oaep,
        operations.decrypt_rsa,
        operations.digest,
        operations.random,
        operations.seed,
    ):
        each(use)


def test_gcm_with_associated_data(use: Use) -> None:
    iv = urandom(12)
    sealed = use.session.encrypt((p11.CKM_AES_GCM, GcmParams(iv, 12, 96, b"header", 6, 128)), use.aes, DATA)
    assert AESGCM(use.keys.aes).decrypt(iv, sealed, b"header") == DATA
    assert (
        use.session.decrypt((p11.CKM_AES_GCM, GcmParams(iv, 12, 96, b"header", 6, 128)), use.aes, sealed)
        == DATA
    )
    other = p11.CKM_AES_GCM, GcmParams(iv, 12, 96, b"another", 7, 128)
    assert code(lambda: use.session.decrypt(other, use.aes, sealed)) != "CKR_OK"


def test_oaep(use: Use) -> None:
    oaep = (
        p11.CKM_RSA_PKCS_OAEP,
        OaepParams(p11.CKM_SHA_1, p11.CKG_MGF1_SHA1, p11.CKZ_DATA_SPECIFIED, None, 0),
    )
    sealed = use.keys.rsa.public_key().encrypt(
        DATA, padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
    )
    assert use.session.decrypt(oaep, use.rsa, sealed) == DATA


def test_ecdh(use: Use) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    point = other.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    parameter = EcdhParams(p11.CKD_NULL, 0, None, len(point), point)
    key = use.session.derive(
        (p11.CKM_ECDH1_DERIVE, parameter),
        use.ec,
        {
            p11.CKA_CLASS: p11.CKO_SECRET_KEY,
            p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET,
            p11.CKA_TOKEN: False,
            p11.CKA_SENSITIVE: False,
            p11.CKA_EXTRACTABLE: True,
            p11.CKA_VALUE_LEN: 32,
        },
    )
    assert use.session.get(key, p11.CKA_VALUE) == (other.exchange(ec.ECDH(), use.keys.ec.public_key()),)


def test_wrapping_with_padding(use: Use) -> None:
    assert use.session.wrap(p11.CKM_AES_KEY_WRAP_PAD, use.aes, use.hmac) == aes_key_wrap_with_padding(
        use.keys.aes, use.keys.hmac
    )
    value = urandom(24)
    key = use.session.unwrap(
        p11.CKM_AES_KEY_WRAP_PAD,
        use.aes,
        aes_key_wrap_with_padding(use.keys.aes, value),
        {
            p11.CKA_CLASS: p11.CKO_SECRET_KEY,
            p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET,
            p11.CKA_TOKEN: False,
            p11.CKA_SENSITIVE: False,
            p11.CKA_EXTRACTABLE: True,
        },
    )
    assert use.session.get(key, p11.CKA_VALUE) == (value,)


def test_eddsa(use: Use) -> None:
    public_key, private_key = use.session.generate_key_pair(
        p11.CKM_EC_EDWARDS_KEY_PAIR_GEN,
        {p11.CKA_EC_PARAMS: ED25519, p11.CKA_VERIFY: True, p11.CKA_TOKEN: False},
        {p11.CKA_SIGN: True, p11.CKA_TOKEN: False},
    )
    point = use.session.get(public_key, p11.CKA_EC_POINT)[0]
    raw = point[2:] if point[:2] == tlv(4, bytes(32))[:2] and len(point) == 34 else point
    signature = use.session.sign(p11.CKM_EDDSA, private_key, DATA)
    ed25519.Ed25519PublicKey.from_public_bytes(raw).verify(signature, DATA)
    use.session.verify(p11.CKM_EDDSA, public_key, DATA, signature)


def test_a_megabyte_in_one_call(use: Use) -> None:
    assert use.session.digest(p11.CKM_SHA256, BIG) == sha256(BIG).digest()
    assert (
        use.session.decrypt(p11.CKM_AES_ECB, use.aes, use.session.encrypt(p11.CKM_AES_ECB, use.aes, BIG))
        == BIG
    )
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    use.session.feed("C_DigestUpdate", BIG)
    use.session.feed("C_DigestUpdate", b"")
    assert use.session.output("C_DigestFinal") == sha256(BIG).digest()


def test_output_that_does_not_fit_says_its_length(use: Use) -> None:
    use.session.init("C_SignInit", p11.CKM_SHA256_RSA_PKCS, use.rsa)
    buffer, size = ctypes.create_string_buffer(b"\xa5" * 100, 100), c_ulong(99)
    given = (DATA, len(DATA), buffer, byref(size))
    assert p11.rv_name(use.app.module.rv("C_Sign", use.session.handle, *given)) == "CKR_BUFFER_TOO_SMALL"
    assert (size.value, buffer.raw) == (256, b"\xa5" * 100)
    use.keys.check_rsa(use.session.output("C_Sign", DATA, len(DATA)))


def query(use: Use, key: int, *attributes: Attribute) -> tuple[str, list[int]]:
    template = (Attribute * len(attributes))(*attributes)
    rv = use.app.module.rv("C_GetAttributeValue", use.session.handle, key, template, len(attributes))
    for given, answered in zip(attributes, template, strict=True):
        given.size = answered.size
    return p11.rv_name(rv), [each.size for each in template]


NONE = 2**64 - 1


def test_attributes_are_asked_in_every_way(use: Use) -> None:
    label, ident = ctypes.create_string_buffer(b"\xa5" * 8, 8), ctypes.create_string_buffer(1)
    # The length alone, a value, one that does not fit, one that is secret, one that there is not.
    asked = (
        Attribute(p11.CKA_MODULUS, None, 0),
        Attribute(p11.CKA_LABEL, ctypes.addressof(label), 8),
        Attribute(p11.CKA_ID, ctypes.addressof(ident), 1),
    )
    assert query(use, use.rsa, *asked) == ("CKR_OK", [256, 3, 1])
    assert (label.raw, ident.raw) == (b"rsa" + b"\xa5" * 5, b"\xa5")
    small = Attribute(p11.CKA_LABEL, ctypes.addressof(ident), 1)
    assert query(use, use.rsa, small, Attribute(p11.CKA_ID, None, 0)) == ("CKR_BUFFER_TOO_SMALL", [NONE, 1])
    secret = Attribute(p11.CKA_PRIVATE_EXPONENT, ctypes.addressof(label), 8)
    assert query(use, use.aes, Attribute(p11.CKA_VALUE, None, 0), Attribute(p11.CKA_ID, None, 0)) == (
        "CKR_ATTRIBUTE_SENSITIVE",
        [NONE, 1],
    )
    assert query(use, use.ec, secret, Attribute(p11.CKA_ID, None, 0)) == (
        "CKR_ATTRIBUTE_TYPE_INVALID",
        [NONE, 1],
    )
    assert query(use, use.ec) == ("CKR_OK", [])


def test_templates_in_templates(use: Use) -> None:
    """A key that wraps only what may be told: SoftHSM keeps the template, and shows it again."""
    true, sensitive = ctypes.create_string_buffer(b"\1", 1), ctypes.create_string_buffer(b"\0", 1)
    inner = (Attribute * 2)(
        Attribute(p11.CKA_EXTRACTABLE, ctypes.addressof(true), 1),
        Attribute(p11.CKA_SENSITIVE, ctypes.addressof(sensitive), 1),
    )
    value = ctypes.create_string_buffer(urandom(32), 32)
    kind, cls = c_ulong(p11.CKK_AES), c_ulong(p11.CKO_SECRET_KEY)
    outer = (Attribute * 5)(
        Attribute(p11.CKA_CLASS, ctypes.addressof(cls), 8),
        Attribute(p11.CKA_KEY_TYPE, ctypes.addressof(kind), 8),
        Attribute(p11.CKA_VALUE, ctypes.addressof(value), 32),
        Attribute(p11.CKA_WRAP, ctypes.addressof(true), 1),
        Attribute(p11.CKA_WRAP_TEMPLATE, ctypes.addressof(inner), ctypes.sizeof(inner)),
    )
    key = c_ulong()
    use.session.call("C_CreateObject", outer, 5, byref(key))
    assert query(use, key.value, Attribute(p11.CKA_WRAP_TEMPLATE, None, 0)) == ("CKR_OK", [48])
    shown = (Attribute * 2)()
    asked = Attribute(p11.CKA_WRAP_TEMPLATE, ctypes.addressof(shown), ctypes.sizeof(shown))
    assert query(use, key.value, asked) == ("CKR_OK", [48])
    assert {(each.type, each.size) for each in shown} == {(p11.CKA_EXTRACTABLE, 1), (p11.CKA_SENSITIVE, 1)}
    values = [ctypes.create_string_buffer(b"\xa5", 1) for _ in shown]
    for each, memory in zip(shown, values, strict=True):
        each.value = ctypes.addressof(memory)
    assert query(use, key.value, asked) == ("CKR_OK", [48])
    told = {each.type: memory.raw for each, memory in zip(shown, values, strict=True)}
    assert told == {p11.CKA_EXTRACTABLE: b"\1", p11.CKA_SENSITIVE: b"\0"}


def test_mechanisms_that_a_key_is_for(use: Use) -> None:
    """An array of numbers, not of attributes."""
    allowed = bytes(c_ulong(p11.CKM_AES_ECB)) + bytes(c_ulong(p11.CKM_AES_GCM))
    key = use.session.create(
        {
            p11.CKA_CLASS: p11.CKO_SECRET_KEY,
            p11.CKA_KEY_TYPE: p11.CKK_AES,
            p11.CKA_VALUE: bytes(32),
            p11.CKA_ALLOWED_MECHANISMS: allowed,
        }
    )
    assert set(_numbers(use.session.get(key, p11.CKA_ALLOWED_MECHANISMS)[0])) == set(_numbers(allowed))


def _numbers(array: bytes) -> list[int]:
    return [int.from_bytes(array[at : at + 8], "little") for at in range(0, len(array), 8)]


def test_parameter_that_cannot_cross_is_refused(use: Use) -> None:
    unknown = p11.CKM_VENDOR_DEFINED + 1, b"12345678"
    assert code(lambda: use.session.init("C_SignInit", unknown, use.rsa)) == "CKR_MECHANISM_PARAM_INVALID"
    assert code(lambda: use.session.init("C_SignInit", unknown[0], use.rsa)) == "CKR_MECHANISM_INVALID"
    cut = p11.CKM_AES_GCM, bytes(47)
    assert code(lambda: use.session.init("C_EncryptInit", cut, use.aes)) == "CKR_MECHANISM_PARAM_INVALID"
    operations.sign_ecdsa(use)
    assert use.app.away() == set()


def test_finding_and_copying(use: Use) -> None:
    operations.find(use)
    copy = use.session.copy(use.aes, {p11.CKA_LABEL: "copy", p11.CKA_TOKEN: False})
    assert use.session.find(shared("copy")) == [copy]
    use.session.set(copy, {p11.CKA_LABEL: "renamed"})
    assert use.session.get(copy, p11.CKA_LABEL) == (b"renamed",)
    use.session.destroy(copy)
    assert use.session.find(shared("renamed")) == []
    assert use.session.find(private("ec")) == [use.ec]
    assert use.session.find(public("ec")) == [use.ec_public]


def test_pins_cross(use: Use) -> None:
    use.session.call("C_SetPIN", b"123456", 6, b"654321", 6)
    use.session.logout()
    assert code(lambda: use.session.login("123456")) == "CKR_PIN_INCORRECT"
    use.session.login("654321")


def test_sixteen_threads(application: Application, keys: Keys) -> None:
    application.login("123456")
    errors: list[BaseException] = []

    def work() -> None:
        try:
            session = application.open()
            key = session.find_one(private("ec"))
            for _ in range(50):
                keys.check_ec(session.sign(p11.CKM_ECDSA, key, DIGEST))
                assert session.digest(p11.CKM_SHA256, BIG[:5000]) == sha256(BIG[:5000]).digest()
        except BaseException as error:  # noqa: BLE001 (told below)
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert application.away() == set()
