"""Messages with parameters of their own (PKCS#11 3.0): NSS softokn in a worker does what it does in the process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_ulong, c_void_p, create_string_buffer
from functools import partial

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from demo.members import Table, library
from tests import p11
from tests.ha.app import code
from tests.ha.conftest import StartFactory

KEY, AAD, DATA = bytes(range(32)), b"with it", b"a message of some length, and then some"
TAG = 16


class GcmMessage(ctypes.Structure):
    _fields_ = (
        ("iv", c_void_p),
        ("iv_size", c_ulong),
        ("iv_fixed_bits", c_ulong),
        ("generator", c_ulong),
        ("tag", c_void_p),
        ("tag_bits", c_ulong),
    )


class PolyMessage(ctypes.Structure):
    _fields_ = (("nonce", c_void_p), ("nonce_size", c_ulong), ("tag", c_void_p))


class Parameter:
    """What a message is given besides its data; `iv` and `tag` are where the token writes."""

    def __init__(
        self, kind: int, iv: bytes, tag: bytes = bytes(TAG), generator: int = p11.CKG_NO_GENERATE
    ) -> None:
        self._iv, self._tag = create_string_buffer(iv, len(iv)), create_string_buffer(tag, len(tag))
        at = ctypes.addressof(self._iv), ctypes.addressof(self._tag)
        self.structure: ctypes.Structure
        if kind == p11.CKM_AES_GCM:
            self.structure = GcmMessage(at[0], len(iv), 0, generator, at[1], 8 * len(tag))
        else:
            self.structure = PolyMessage(at[0], len(iv), at[1])

    @property
    def arguments(self) -> tuple[object, int]:
        return byref(self.structure), ctypes.sizeof(self.structure)

    @property
    def iv(self) -> bytes:
        return self._iv.raw

    @property
    def tag(self) -> bytes:
        return self._tag.raw


def nss(**options: str) -> Table:
    """Softokn's token for session keys, which needs no database."""
    return {
        "name": "nss",
        "module": str(library("libsoftokn3.so")),
        "token": "pkcs11:token=NSS%20Generic%20Crypto%20Services",
        "init_args": "configdir='' certPrefix='' keyPrefix='' secmod='' flags=noCertDB,noModDB",
        **options,
    }


@pytest.fixture(params=["process", "worker"])
def session(request: pytest.FixtureRequest, start: StartFactory) -> p11.Session:
    return start(nss(host=request.param)).open(rw=False)


IN_A_WORKER = pytest.mark.parametrize("session", ["worker"], indirect=True)


def create(session: p11.Session, mechanism: int) -> int:
    return session.create(
        {
            p11.CKA_CLASS: p11.CKO_SECRET_KEY,
            p11.CKA_KEY_TYPE: p11.CKK_AES if mechanism == p11.CKM_AES_GCM else p11.CKK_CHACHA20,
            p11.CKA_VALUE: KEY,
            p11.CKA_ENCRYPT: True,
            p11.CKA_DECRYPT: True,
        }
    )


def message(session: p11.Session, name: str, parameter: Parameter, data: bytes) -> bytes:
    out, size = create_string_buffer(len(data)), c_ulong(len(data))
    session.call(name, *parameter.arguments, AAD, len(AAD), data, len(data), out, byref(size))
    return out.raw[: size.value]


MECHANISMS = pytest.mark.parametrize(
    ("mechanism", "software"),
    [(p11.CKM_AES_GCM, AESGCM), (p11.CKM_CHACHA20_POLY1305, ChaCha20Poly1305)],
    ids=["gcm", "poly1305"],
)


@MECHANISMS
def test_message_is_that_of_the_standard(
    session: p11.Session, mechanism: int, software: Callable[[bytes], AESGCM | ChaCha20Poly1305]
) -> None:
    """One after the other in one operation, each with an IV of its own, and back."""
    key = create(session, mechanism)
    sent = []
    session.init("C_MessageEncryptInit", mechanism, key)
    for number in range(3):
        parameter = Parameter(mechanism, bytes([number] * 12))
        encrypted = message(session, "C_EncryptMessage", parameter, DATA)
        assert encrypted + parameter.tag == software(KEY).encrypt(parameter.iv, DATA, AAD)
        sent.append((parameter, encrypted))
    session.call("C_MessageEncryptFinal")
    session.init("C_MessageDecryptInit", mechanism, key)
    for parameter, encrypted in sent:
        assert message(session, "C_DecryptMessage", parameter, encrypted) == DATA
    forged = Parameter(mechanism, sent[0][0].iv, b"!" * TAG)
    assert code(lambda: message(session, "C_DecryptMessage", forged, sent[0][1])) != "CKR_OK"
    session.call("C_MessageDecryptFinal")


def test_iv_that_the_token_makes_comes_back(session: p11.Session) -> None:
    mechanism = p11.CKM_AES_GCM
    session.init("C_MessageEncryptInit", mechanism, create(session, mechanism))
    parameters = [Parameter(mechanism, bytes(12), generator=p11.CKG_GENERATE_RANDOM) for _ in range(2)]
    for parameter in parameters:
        encrypted = message(session, "C_EncryptMessage", parameter, DATA)
        assert AESGCM(KEY).decrypt(parameter.iv, encrypted + parameter.tag, AAD) == DATA
    assert len({bytes(12), *(parameter.iv for parameter in parameters)}) == 3


@IN_A_WORKER
def test_parameter_of_another_kind_is_refused(session: p11.Session) -> None:
    """By its size, and without a look at where its pointers lead, where NSS itself would crash."""
    mechanism = p11.CKM_CHACHA20_POLY1305
    session.init("C_MessageEncryptInit", mechanism, create(session, mechanism))
    other = Parameter(p11.CKM_AES_GCM, bytes(12))
    assert code(lambda: message(session, "C_EncryptMessage", other, DATA)) == "CKR_MECHANISM_PARAM_INVALID"
    fitting = Parameter(mechanism, bytes(12))
    assert len(message(session, "C_EncryptMessage", fitting, DATA)) == len(DATA)


@IN_A_WORKER
def test_parameter_of_the_init_is_refused(session: p11.Session) -> None:
    """CK_GCM_PARAMS and CK_GCM_MESSAGE_PARAMS are of one size, with pointers in other places."""
    key = create(session, p11.CKM_AES_GCM)
    given = Parameter(p11.CKM_AES_GCM, bytes(12), generator=p11.CKG_GENERATE_RANDOM).structure
    begin = partial(session.init, "C_MessageEncryptInit", (p11.CKM_AES_GCM, given), key)
    assert code(begin) == "CKR_MECHANISM_PARAM_INVALID"


@IN_A_WORKER
def test_nonce_that_is_counted_in_bits_is_no_longer_than_it_is(session: p11.Session) -> None:
    """As the standard has it; NSS does not take it, and nobody reads behind its end."""
    mechanism = p11.CKM_CHACHA20_POLY1305
    session.init("C_MessageEncryptInit", mechanism, create(session, mechanism))
    in_bits = Parameter(mechanism, bytes(12))
    in_bits.structure.nonce_size = 96
    assert code(lambda: message(session, "C_EncryptMessage", in_bits, DATA)) != "CKR_OK"
