"""Number 90: what the token answers to questions whose answers everybody knows."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pkcs11_ha import ck
from pkcs11_ha.cli.meanings import meaning
from pkcs11_ha.cli.menu import known, parameters
from pkcs11_ha.cli.menu.attributes import mechanism_name
from pkcs11_ha.cli.menu.client import (
    DECRYPT,
    DIGEST,
    ENCRYPT,
    SIGN,
    CallError,
    Client,
    Mechanism,
    Operation,
    Template,
)
from pkcs11_ha.cli.menu.desk import Desk
from pkcs11_ha.cli.menu.dialogue import NotDone

_WHOLE = 1 << 20
_SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")  # RFC 8017, 9.2, note 1
# With these a token says that it does not do such a thing, or not now.
_CANNOT = (
    *(ck.CKR_MECHANISM_INVALID, ck.CKR_MECHANISM_PARAM_INVALID, ck.CKR_FUNCTION_NOT_SUPPORTED),
    *(
        ck.CKR_KEY_SIZE_RANGE,
        ck.CKR_KEY_FUNCTION_NOT_PERMITTED,
        ck.CKR_USER_NOT_LOGGED_IN,
        ck.CKR_RANDOM_NO_RNG,
    ),
)
_SESSION_ALONE = {ck.CKA_TOKEN: False, ck.CKA_PRIVATE: False}


class _Wrong(Exception):
    """An answer is not the known one."""


@dataclass(frozen=True)
class _Trial:
    """The token with the keys of one check."""

    client: Client
    session: int
    keys: tuple[int, ...]

    def operate(self, of: Operation, mechanism: Mechanism, key: int | None, data: bytes) -> bytes:
        """In one call."""
        return self.client.operate(of, self.session, mechanism, key, data, _WHOLE)

    def is_known(self, what: str, answer: bytes, expected: bytes) -> None:
        """Raises _Wrong."""
        if answer != expected:
            raise _Wrong(f"{what}: {answer[:8].hex()}…, not {expected[:8].hex()}…")

    def verifies(self, mechanism: Mechanism, key: int, data: bytes, signature: bytes) -> None:
        """A right signature passes and a wrong one does not, whatever it is called (NSS: CKR_DEVICE_ERROR)."""
        self.client.verify(self.session, mechanism, key, data, signature, _WHOLE)
        wrong = signature[:-1] + bytes([signature[-1] ^ 1])
        try:
            self.client.verify(self.session, mechanism, key, data, wrong, _WHOLE)
        except CallError:
            return
        raise _Wrong("a wrong signature passed")


@dataclass(frozen=True)
class _Check:
    """A question: what it needs, and how it is asked; `mechanism` None is for none."""

    mechanism: int | None
    words: str
    keys: tuple[Template, ...]
    ask: Callable[[_Trial], None]


_DIGESTS: dict[int, str] = {
    ck.CKM_MD5: "md5",
    ck.CKM_SHA_1: "sha1",
    ck.CKM_SHA224: "sha224",
    ck.CKM_SHA256: "sha256",
    ck.CKM_SHA384: "sha384",
    ck.CKM_SHA512: "sha512",
    ck.CKM_SHA3_224: "sha3_224",
    ck.CKM_SHA3_256: "sha3_256",
    ck.CKM_SHA3_384: "sha3_384",
    ck.CKM_SHA3_512: "sha3_512",
}
_HMACS: dict[int, str] = {
    ck.CKM_SHA_1_HMAC: "sha1",
    ck.CKM_SHA224_HMAC: "sha224",
    ck.CKM_SHA256_HMAC: "sha256",
    ck.CKM_SHA384_HMAC: "sha384",
    ck.CKM_SHA512_HMAC: "sha512",
    ck.CKM_SHA3_256_HMAC: "sha3_256",
    ck.CKM_SHA3_384_HMAC: "sha3_384",
    ck.CKM_SHA3_512_HMAC: "sha3_512",
}


def _digest(mechanism: int, name: str) -> _Check:
    def ask(trial: _Trial) -> None:
        data = bytes(range(256)) * 5
        expected = hashlib.new(name, data, usedforsecurity=False).digest()
        by = Mechanism(mechanism)
        trial.is_known("in one call", trial.operate(DIGEST, by, None, data), expected)
        parts = trial.client.operate(DIGEST, trial.session, by, None, data, 100)
        trial.is_known("in parts", parts, expected)

    return _Check(mechanism, "as hashlib has it", (), ask)


def _hmac(mechanism: int, name: str) -> _Check:
    def ask(trial: _Trial) -> None:
        expected = hmac.new(known.HMAC_KEY, known.HMAC_TEXT, name).digest()
        by, key = Mechanism(mechanism), trial.keys[0]
        trial.is_known("MAC", trial.operate(SIGN, by, key, known.HMAC_TEXT), expected)
        trial.verifies(by, key, known.HMAC_TEXT, expected)

    return _Check(mechanism, "sign, verify; RFC 4231", (known.generic(known.HMAC_KEY),), ask)


def _cipher(
    number: int,
    words: str,
    key: bytes,
    parameter: Callable[[], parameters.Made],
    text: bytes,
    expected: bytes,
) -> _Check:
    def ask(trial: _Trial) -> None:
        sealed = trial.operate(ENCRYPT, Mechanism(number, parameter()), trial.keys[0], text)
        trial.is_known("ciphertext", sealed, expected)
        opened = trial.operate(DECRYPT, Mechanism(number, parameter()), trial.keys[0], sealed)
        trial.is_known("plaintext", opened, text)

    return _Check(number, f"encrypt, decrypt; {words}", (known.aes(key),), ask)


def _round_trip(number: int, parameter: Callable[[], parameters.Made]) -> _Check:
    def ask(trial: _Trial) -> None:
        text = b"known to both"
        sealed = trial.operate(ENCRYPT, Mechanism(number, parameter()), trial.keys[0], text)
        opened = trial.operate(DECRYPT, Mechanism(number, parameter()), trial.keys[1], sealed)
        trial.is_known("plaintext", opened, text)

    return _Check(number, "encrypt, decrypt; RFC 9500", known.RSA, ask)


def _signs(number: int, words: str, keys: tuple[Template, ...], text: bytes, expected: bytes) -> _Check:
    """Signatures that are always the same."""

    def ask(trial: _Trial) -> None:
        by = Mechanism(number)
        trial.is_known("signature", trial.operate(SIGN, by, trial.keys[-1], text), expected)
        trial.verifies(by, trial.keys[0], text, expected)

    return _Check(number, f"sign, verify; {words}", keys, ask)


def _pss(trial: _Trial) -> None:
    text = hashlib.sha256(b"known to both").digest()
    by = Mechanism(ck.CKM_RSA_PKCS_PSS, parameters.pss("SHA256"))
    trial.verifies(by, trial.keys[0], text, trial.operate(SIGN, by, trial.keys[1], text))


def _ecdsa(trial: _Trial) -> None:
    by, text = Mechanism(ck.CKM_ECDSA), hashlib.sha256(known.P256_MESSAGE).digest()
    trial.verifies(by, trial.keys[0], text, known.P256_SIGNATURE)
    trial.verifies(by, trial.keys[0], text, trial.operate(SIGN, by, trial.keys[1], text))


def _ecdh(trial: _Trial) -> None:
    wanted = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_GENERIC_SECRET, ck.CKA_VALUE_LEN: 32}
    template = wanted | _SESSION_ALONE | {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True}
    by = Mechanism(ck.CKM_ECDH1_DERIVE, parameters.ecdh(known.ECDH_POINT))
    secret = trial.client.derive(trial.session, by, trial.keys[0], template)
    value = trial.client.attribute(trial.session, secret, ck.CKA_VALUE)
    trial.is_known("secret", value, known.ECDH_SECRET)


def _wrap(trial: _Trial) -> None:
    by = Mechanism(ck.CKM_AES_KEY_WRAP)
    wrapped = trial.client.wrap(trial.session, by, *trial.keys)
    trial.is_known("wrapped key", wrapped, known.WRAPPED)
    template = {k: v for k, v in known.aes(b"").items() if k != ck.CKA_VALUE} | _SESSION_ALONE
    made = trial.client.unwrap(trial.session, by, trial.keys[0], wrapped, template)
    trial.is_known("key", trial.client.attribute(trial.session, made, ck.CKA_VALUE), known.WRAP_CONTENT)


def _random(trial: _Trial) -> None:
    one, other = (trial.client.random(trial.session, 32) for _ in range(2))
    if one == other or bytes(32) in (one, other):
        raise _Wrong("the same twice, or nothing")


_SHA256_BLOCK = known.pkcs1(_SHA256_INFO + hashlib.sha256(known.HMAC_TEXT).digest())
_CHECKS: tuple[_Check, ...] = (
    _Check(None, "random numbers", (), _random),
    *(_digest(*each) for each in _DIGESTS.items()),
    *(_hmac(*each) for each in _HMACS.items()),
    _cipher(ck.CKM_AES_ECB, "SP 800-38A", known.AES_KEY, lambda: None, known.AES_TEXT, known.AES_ECB),
    _cipher(ck.CKM_AES_CBC, "SP 800-38A", known.AES_KEY, lambda: known.AES_IV, known.AES_TEXT, known.AES_CBC),
    _cipher(
        *(ck.CKM_AES_CTR, "SP 800-38A", known.AES_KEY, lambda: parameters.ctr(known.AES_COUNTER)),
        *(known.AES_TEXT, known.AES_CTR),
    ),
    _cipher(
        *(ck.CKM_AES_GCM, "GCM test case 2", known.GCM_KEY, lambda: parameters.gcm(known.GCM_IV, b"", 128)),
        *(known.GCM_TEXT, known.GCM_SEALED),
    ),
    _signs(ck.CKM_AES_CMAC, "RFC 4493", (known.aes(known.AES_KEY),), known.AES_TEXT[:16], known.AES_CMAC),
    _Check(
        ck.CKM_AES_KEY_WRAP,
        "wrap, unwrap; RFC 3394",
        (known.aes(known.WRAP_KEY), known.aes(known.WRAP_CONTENT)),
        _wrap,
    ),
    _signs(
        *(ck.CKM_RSA_PKCS, "RFC 9500", known.RSA, known.HMAC_TEXT[:20]),
        known.rsa_signature(known.pkcs1(known.HMAC_TEXT[:20])),
    ),
    _signs(
        ck.CKM_SHA256_RSA_PKCS, "RFC 9500", known.RSA, known.HMAC_TEXT, known.rsa_signature(_SHA256_BLOCK)
    ),
    _Check(ck.CKM_RSA_PKCS_PSS, "sign, verify; RFC 9500", known.RSA, _pss),
    _round_trip(ck.CKM_RSA_PKCS, lambda: None),
    _round_trip(ck.CKM_RSA_PKCS_OAEP, lambda: parameters.oaep("SHA1", b"")),
    _Check(ck.CKM_ECDSA, "sign, verify; RFC 6979", known.EC, _ecdsa),
    _Check(ck.CKM_ECDH1_DERIVE, "derive; RFC 5903", (known.ec_private(known.ECDH_VALUE),), _ecdh),
    _signs(
        *(ck.CKM_EDDSA, "RFC 8032", known.EDWARDS, known.ED25519_MESSAGE, known.ED25519_SIGNATURE),
    ),
)


def self_test(desk: Desk) -> None:
    """90: in a session of its own, with session objects alone; raises NotDone for a wrong answer."""
    slot = desk.slot()
    offered = set(desk.client.mechanisms(slot))
    session = desk.client.open(slot, writes=False)
    try:
        outcomes = list(_outcomes(desk, session, offered))
    finally:
        desk.client.rv("C_CloseSession", session)  # it may be gone with its token
    good, wrong = outcomes.count("good"), outcomes.count("WRONG")
    desk.say(f"{good} good, {wrong} wrong, {len(outcomes) - good - wrong} not tried")
    if wrong:
        raise NotDone(f"{wrong} of {good + wrong} answers of the token are wrong")


def _outcomes(desk: Desk, session: int, offered: set[int]) -> Iterator[str]:
    """Shows each check as it is made."""
    for check in _CHECKS:
        outcome, why = _outcome(desk.client, session, check, offered)
        name = "" if check.mechanism is None else f"{mechanism_name(check.mechanism)}: "
        desk.say(f"  {outcome:<10} {name}{check.words}" + (f"\n{'':13}{why}" if why else ""))
        yield outcome


def _outcome(client: Client, session: int, check: _Check, offered: set[int]) -> tuple[str, str]:
    """good, WRONG or not tried; and why."""
    if check.mechanism is not None and check.mechanism not in offered:
        return "not tried", "the token does not have the mechanism"
    try:
        keys = tuple(client.create(session, {**template, **_SESSION_ALONE}) for template in check.keys)
    except CallError as error:
        return "not tried", f"{error}: {meaning(error.rv)}"
    try:
        check.ask(_Trial(client, session, keys))
    except CallError as error:
        return "not tried" if error.rv in _CANNOT else "WRONG", f"{error}: {meaning(error.rv)}"
    except _Wrong as error:
        return "WRONG", str(error)
    return "good", ""
