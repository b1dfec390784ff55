"""Numbers 40 to 44 and 46: what keys do to data."""

from __future__ import annotations

from pkcs11_ha import ck
from pkcs11_ha.cli.menu.client import DECRYPT, DIGEST, ENCRYPT, SIGN, Mechanism, Operation
from pkcs11_ha.cli.menu.desk import Desk, Session
from pkcs11_ha.cli.menu.parameters import Asking


def _with_key(
    desk: Desk, session: Session, use: int, flag: int, *, fresh: bool
) -> tuple[int, Mechanism, bytes | None]:
    """Asks for a key, a mechanism that goes with it, and its PIN if it wants one at each use."""
    key = desk.object(session, "Key", {use: True})
    number = desk.mechanism(session.slot, flag, desk.key_type(session, key))
    return key, Asking(desk, session, number, fresh=fresh).mechanism(), desk.pin_for_use(session, key)


def _cipher(desk: Desk, of: Operation, use: int, flag: int, title: str) -> None:
    session = desk.session()
    encrypts = of is ENCRYPT
    key, mechanism, pin = _with_key(desk, session, use, flag, fresh=encrypts)
    data = desk.data("Plaintext" if encrypts else "Ciphertext", last=not encrypts)
    result = desk.client.operate(of, session.handle, mechanism, key, data, desk.options.part, pin)
    desk.put(title, result, readable=not encrypts)


def encrypt(desk: Desk) -> None:
    """40"""
    _cipher(desk, ENCRYPT, ck.CKA_ENCRYPT, ck.CKF_ENCRYPT, "Ciphertext")


def decrypt(desk: Desk) -> None:
    """41"""
    _cipher(desk, DECRYPT, ck.CKA_DECRYPT, ck.CKF_DECRYPT, "Plaintext")


def sign(desk: Desk) -> None:
    """42"""
    session = desk.session()
    key, mechanism, pin = _with_key(desk, session, ck.CKA_SIGN, ck.CKF_SIGN, fresh=True)
    data = desk.data("Data to sign")
    result = desk.client.operate(SIGN, session.handle, mechanism, key, data, desk.options.part, pin)
    desk.put("Signature", result)


def verify(desk: Desk) -> None:
    """43"""
    session = desk.session()
    key, mechanism, _ = _with_key(desk, session, ck.CKA_VERIFY, ck.CKF_VERIFY, fresh=False)
    data = desk.data("Data that was signed")
    signature = desk.data("Signature", last=True)
    desk.client.verify(session.handle, mechanism, key, data, signature, desk.options.part)
    desk.say("The signature is good")


def digest(desk: Desk) -> None:
    """44"""
    session = desk.session()
    number = desk.mechanism(session.slot, ck.CKF_DIGEST)
    data = desk.data("Data to hash")
    result = desk.client.operate(DIGEST, session.handle, Mechanism(number), None, data, desk.options.part)
    desk.put("Digest", result)


def digest_key(desk: Desk) -> None:
    """46"""
    session = desk.session()
    key = desk.object(session, "Secret key", {ck.CKA_CLASS: ck.CKO_SECRET_KEY})
    number = desk.mechanism(session.slot, ck.CKF_DIGEST)
    desk.put("Digest", desk.client.digest_key(session.handle, Mechanism(number), key))
