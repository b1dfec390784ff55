"""THE TABLE: which operation, by which mechanism, is repeated on another member when its own dies.

docs/replay.md is rendered from it (table.py).  The tests prove every line: `CASES` in test_matrix.py, each at every
moment, and `LOSSES` in the tests that they name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_ubyte, c_ulong
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from tests import p11
from tests.ha.operations import OaepParams, PssParams, gcm
from tests.replay import scripts
from tests.replay.scripts import Script, Use, Work

SOFTHSM, NSS = "SoftHSM", "NSS softokn"
PIECES = "a library of the tests that puts messages on SoftHSM"

TEXT = sha256(b"what operations are about").digest() + b"is of 48 bytes.."
HASH = sha256(TEXT).digest()
IV = bytes(range(16))


# ---- mechanisms and their parameters


class CtrParams(ctypes.Structure):
    """CK_AES_CTR_PARAMS."""

    _fields_ = (("bits", c_ulong), ("block", c_ubyte * 16))


def _number(name: str) -> int:
    return int(getattr(p11, name))


def _pss(digest: str) -> PssParams:
    of_mask = "SHA1" if digest == "SHA_1" else digest
    size = 20 if digest == "SHA_1" else int(digest.removeprefix("SHA")) // 8
    return PssParams(_number(f"CKM_{digest}"), _number(f"CKG_MGF1_{of_mask}"), size)


def _oaep() -> OaepParams:
    return OaepParams(p11.CKM_SHA_1, p11.CKG_MGF1_SHA1, p11.CKZ_DATA_SPECIFIED, None, 0)


def _ctr() -> CtrParams:
    return CtrParams(128, (c_ubyte * 16)(*IV))


def _gcm() -> ctypes.Structure:
    mechanism = gcm(IV[:12])
    assert isinstance(mechanism, tuple)
    assert isinstance(mechanism[1], ctypes.Structure)
    return mechanism[1]


def _iv(size: int) -> bytes:
    return IV[:size]


@dataclass(frozen=True)
class Mechanism:
    """A mechanism and what tests give it.

    `does` names its operations: digest, sign, verify, encrypt, decrypt, recover.  Input is cut at `cuts`; who takes
    a single part alone has `parts` False, and often `data` of a certain size.  Of a `random` one no two outputs are
    alike.
    """

    name: str
    does: str
    key: str = ""
    parameter: Callable[[], bytes | ctypes.Structure] | None = None
    parts: bool = True
    data: bytes = TEXT
    random: bool = False
    cuts: tuple[int, int] = (16, 21)

    def given(self) -> p11.Mechanism:
        return (_number(self.name), self.parameter()) if self.parameter else _number(self.name)


PAIRS = ("rsa", "ec", "dsa", "ed25519")
_TAG, _CIPHER, _BOTH = "sign verify", "encrypt decrypt", "sign verify encrypt decrypt"
_HASHES = "MD5 SHA_1 SHA224 SHA256 SHA384 SHA512".split()


def _joined(digest: str) -> str:
    """As it stands within names: CKM_SHA_1, but CKM_SHA1_RSA_PKCS."""
    return digest.replace("SHA_1", "SHA1")


SOFTHSM_MECHANISMS: tuple[Mechanism, ...] = (
    *(Mechanism(f"CKM_{each}", "digest") for each in _HASHES),
    *(Mechanism(f"CKM_{each}_HMAC", _TAG, "generic") for each in _HASHES),
    Mechanism("CKM_AES_CMAC", _TAG, "aes"),
    Mechanism("CKM_DES3_CMAC", _TAG, "des3"),
    Mechanism("CKM_RSA_PKCS", _TAG, "rsa", parts=False),
    Mechanism("CKM_RSA_PKCS", _CIPHER, "rsa", parts=False, random=True),
    Mechanism("CKM_RSA_X_509", _BOTH, "rsa", parts=False, data=b"\0" * 208 + TEXT),
    Mechanism("CKM_RSA_PKCS_OAEP", _CIPHER, "rsa", _oaep, parts=False, random=True),
    Mechanism("CKM_RSA_PKCS_PSS", _TAG, "rsa", partial(_pss, "SHA256"), parts=False, data=HASH, random=True),
    *(Mechanism(f"CKM_{_joined(each)}_RSA_PKCS", _TAG, "rsa") for each in _HASHES),
    *(
        Mechanism(f"CKM_{_joined(each)}_RSA_PKCS_PSS", _TAG, "rsa", partial(_pss, each), random=True)
        for each in _HASHES[1:]
    ),
    Mechanism("CKM_DSA", _TAG, "dsa", parts=False, data=HASH[:20], random=True),
    *(Mechanism(f"CKM_DSA_{_joined(each)}", _TAG, "dsa", random=True) for each in _HASHES[1:]),
    Mechanism("CKM_ECDSA", _TAG, "ec", parts=False, data=HASH, random=True),
    Mechanism("CKM_EDDSA", _TAG, "ed25519", parts=False),
    Mechanism("CKM_AES_ECB", _CIPHER, "aes"),
    Mechanism("CKM_AES_CBC", _CIPHER, "aes", partial(_iv, 16)),
    Mechanism("CKM_AES_CBC_PAD", _CIPHER, "aes", partial(_iv, 16)),
    Mechanism("CKM_AES_CTR", _CIPHER, "aes", _ctr),
    Mechanism("CKM_AES_GCM", _CIPHER, "aes", _gcm),
    Mechanism("CKM_DES3_ECB", _CIPHER, "des3"),
    Mechanism("CKM_DES3_CBC", _CIPHER, "des3", partial(_iv, 8)),
    Mechanism("CKM_DES3_CBC_PAD", _CIPHER, "des3", partial(_iv, 8)),
)
"""All that it has operations for, but for single DES, which its OpenSSL refuses."""

NSS_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism("CKM_AES_CBC_PAD", "two", "aes", partial(_iv, 16), cuts=(16, 32)),
    Mechanism("CKM_RSA_PKCS", "recover", "rsa", parts=False),
    Mechanism("CKM_RSA_X_509", "recover", "rsa", parts=False, data=b"\0" * 208 + TEXT),
)
"""For functions that SoftHSM does not have; CKM_SHA256 and CKM_SHA256_HMAC beside the ciphers."""


# ---- operations


Input = Callable[[bytes, bytes], tuple[bytes, bytes]]


def _own(data: bytes, _given: bytes) -> tuple[bytes, bytes]:
    return data, b""


def _tagged(data: bytes, given: bytes) -> tuple[bytes, bytes]:
    return data, given


def _taken(_data: bytes, given: bytes) -> tuple[bytes, bytes]:
    return given, b""


def _both(_data: bytes, given: bytes) -> tuple[bytes, bytes]:
    """A ciphertext and the tag of its text, of CKM_SHA256 or its HMAC."""
    return given[:-32], given[-32:]


@dataclass(frozen=True)
class Operation:
    """A way of calling.

    `does` is what its mechanism must do.  `takes` is the operation whose output it is given, and `input` what becomes
    of the mechanism's data and of that: the data and the tag of `Work`.  `key` is the half of a pair it needs.
    """

    name: str
    functions: str
    does: str
    script: Callable[[Use, Work], Script]
    key: str = "public"
    takes: str = ""
    input: Input = _own
    parts: bool = False
    member: str = SOFTHSM


def _family(
    does: str, noun: str, key: str = "public", takes: str = "", given: Input = _own
) -> tuple[Operation, Operation]:
    init = f"C_{noun}Init"
    single = Operation(does, f"{init}, C_{noun}", does, getattr(scripts, does), key, takes, given)
    functions = f"{init}, C_{noun}Update, C_{noun}Final"
    in_parts = takes and f"{takes} in parts"
    multi = getattr(scripts, f"{does}_parts")
    return single, Operation(f"{does} in parts", functions, does, multi, key, in_parts, given, parts=True)


def _dual(name: str, noun: str, inits: str, takes: str = "", given: Input = _own) -> Operation:
    script = getattr(scripts, name.replace(" ", "_"))
    first, second = inits.split()
    functions = f"C_{first}Init, C_{second}Init, C_{noun}Update, C_{second}Final, C_{first}Final"
    return Operation(name, functions, "two", script, "", takes, given, parts=True, member=NSS)


OPERATIONS: tuple[Operation, ...] = (
    *_family("digest", "Digest"),
    Operation(
        "digest with a key",
        "C_DigestInit, C_DigestUpdate, C_DigestKey, C_DigestFinal",
        "digest",
        scripts.digest_key,
        parts=True,
    ),
    *_family("sign", "Sign", "private"),
    *_family("verify", "Verify", takes="sign", given=_tagged),
    *_family("encrypt", "Encrypt"),
    *_family("decrypt", "Decrypt", "private", "encrypt", _taken),
    _dual("digest encrypt", "DigestEncrypt", "Digest Encrypt"),
    _dual("decrypt digest", "DecryptDigest", "Digest Decrypt", "digest encrypt", _both),
    _dual("sign encrypt", "SignEncrypt", "Sign Encrypt"),
    _dual("decrypt verify", "DecryptVerify", "Verify Decrypt", "sign encrypt", _both),
    Operation(
        "side by side",
        "C_DigestInit and C_EncryptInit, each with its own C_*Update and C_*Final",
        "two",
        scripts.side_by_side,
        parts=True,
        member=NSS,
    ),
    Operation(
        "sign recover",
        "C_SignRecoverInit, C_SignRecover",
        "recover",
        scripts.sign_recover,
        "private",
        member=NSS,
    ),
    Operation(
        "verify recover",
        "C_VerifyRecoverInit, C_VerifyRecover",
        "recover",
        scripts.verify_recover,
        takes="sign recover",
        input=_taken,
        member=NSS,
    ),
)
_NAMED = {each.name: each for each in OPERATIONS}
_MECHANISMS = {SOFTHSM: SOFTHSM_MECHANISMS, NSS: NSS_MECHANISMS}


@dataclass(frozen=True)
class Case:
    """An operation by a mechanism, which is repeated whenever its member dies."""

    operation: Operation
    mechanism: Mechanism

    def __str__(self) -> str:
        return f"{self.operation.name} {self.mechanism.name}".replace(" ", "-")

    def script(self, use: Use, given: bytes = b"") -> Script:
        """`given` is the output of the case that `takes` names."""
        data, tag = self.operation.input(self.mechanism.data, given)
        first, second = self.mechanism.cuts
        parts = (data[:first], data[first:second], data[second:])
        return self.operation.script(use, Work(self.mechanism.given(), self.key, parts, tag))

    @property
    def key(self) -> str:
        """The name of its key, empty if it has none."""
        half = self.operation.key if self.mechanism.key in PAIRS else "secret"
        return self.mechanism.key and f"{half} {self.mechanism.key}"

    @property
    def takes(self) -> Case | None:
        """The case whose output this one is given."""
        return Case(_NAMED[self.operation.takes], self.mechanism) if self.operation.takes else None

    @property
    def proof(self) -> Case | None:
        """The case that tells whether the output is right, where no two of them are alike."""
        undone = {"sign": "verify", "encrypt": "decrypt"}.get(self.operation.does)
        return Case(_NAMED[undone], self.mechanism) if undone and self.mechanism.random else None


CASES: tuple[Case, ...] = tuple(
    Case(operation, mechanism)
    for operation in OPERATIONS
    for mechanism in _MECHANISMS[operation.member]
    if operation.does in mechanism.does.split() and (mechanism.parts or not operation.parts)
)


# ---- what is not repeated

LOST = "CKR_DEVICE_ERROR, once"


@dataclass(frozen=True)
class Loss:
    """Circumstances in which an operation is lost with its member; `test` shows what the application gets then."""

    what: str
    why: str
    answer: str
    test: str


LOSSES: tuple[Loss, ...] = (
    Loss(
        "it took more than `replay_limit_bytes`",
        "no more is kept; 0 keeps nothing. Small parts of which nothing came out are kept as one; others have an entry "
        "each, and what is kept of an operation is three times the limit and 16 KiB at most. "
        "What a call has in its hands needs no keeping: one part can be of any size",
        LOST,
        "test_limits.test_input_up_to_the_limit",
    ),
    Loss(
        "it is inside a message that took more than that",
        "the same; the next message is kept again",
        LOST,
        "test_message_parts.test_too_much_of_one_message",
    ),
    Loss(
        "its output so far does not come out again",
        "the application has it already; wrong data would follow",
        LOST,
        "test_limits.test_output_that_is_another_one_is_an_error_once",
    ),
    Loss(
        "its mechanism has a parameter of a layout that is not in `spec/mechanisms.py`",
        "it cannot be kept: it may point anywhere",
        LOST,
        "test_limits.test_parameter_of_unknown_layout_is_not_repeated",
    ),
    Loss(
        "it encrypts messages with IVs that the member counts",
        "another one would count from the start, and use an IV twice",
        LOST,
        "test_messages.test_ivs_that_a_member_makes_are_not_made_again",
    ),
    Loss(
        "its key was generated in a session",
        "no other member has it, nor can make it again",
        LOST,
        "test_session_keys.test_key_that_was_generated_dies_with_its_member",
    ),
    Loss(
        "it digested a key that was generated in a session",
        "the same",
        LOST,
        "test_session_keys.test_generated_key_that_was_digested_is_lost_with_its_member",
    ),
    Loss(
        "its key was destroyed meanwhile",
        "no member has it",
        LOST,
        "test_session_keys.test_key_that_is_destroyed_under_way",
    ),
    Loss(
        "its key wants the PIN for each use (CKA_ALWAYS_AUTHENTICATE), and had it",
        "a PIN is never sent twice, nor kept for this",
        LOST,
        "test_limits.test_pin_for_one_operation_is_sent_once",
    ),
    Loss(
        "its key wants the PIN for each use, and the member dies in C_Login with CKU_CONTEXT_SPECIFIC",
        "the same: whether the PIN was looked at is not known",
        "CKR_DEVICE_ERROR from C_Login, CKR_USER_NOT_LOGGED_IN from the next call",
        "test_limits.test_pin_for_one_operation_is_sent_once",
    ),
)


@dataclass(frozen=True)
class Messages:
    """A way of calling for operations by messages (PKCS#11 3.0)."""

    functions: str
    mechanisms: str
    member: str


def _messages(verb: str, mechanisms: str, whole: str) -> tuple[Messages, Messages]:
    """Messages as a whole, on the member that is named, and in parts."""
    init, final = f"C_Message{verb}Init", f"C_Message{verb}Final"
    parts = f"{init}, C_{verb}MessageBegin, C_{verb}MessageNext, {final}"
    return Messages(f"{init}, C_{verb}Message, {final}", mechanisms, whole), Messages(
        parts, mechanisms, PIECES
    )


MESSAGES: tuple[Messages, ...] = (
    *_messages("Encrypt", "CKM_AES_GCM", NSS),
    *_messages("Decrypt", "CKM_AES_GCM", NSS),
    *_messages("Sign", "CKM_SHA256_HMAC, CKM_SHA256_RSA_PKCS", PIECES),
    *_messages("Verify", "CKM_SHA256_HMAC, CKM_SHA256_RSA_PKCS", PIECES),
)
"""On NSS softokn test_messages.py: members that fail, as their calls do not cross to a worker.  The others in
test_message_parts.py."""

FOUND = ("C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal")
"""Taken whole by the Init, so that nothing is to be repeated: test_session_keys.py."""

REFUSED = "CKM_DES_ECB CKM_DES_CBC CKM_DES_CBC_PAD".split()
"""In SoftHSM's list, and refused by it: its OpenSSL has no single DES any more."""
