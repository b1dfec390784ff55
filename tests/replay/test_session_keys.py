"""Keys of the session in an operation that moves, and objects that were found before."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_ulong
from functools import partial
from hashlib import sha256

import pytest

from tests import p11
from tests.ha.app import code
from tests.replay.cases import IV, TEXT
from tests.replay.conftest import Start
from tests.replay.killable import Killable
from tests.replay.scripts import Use, Work, at, encrypt_parts, run, stops

VALUE = sha256(b"of the session").digest()
AES: dict[int, p11.Value] = {
    p11.CKA_CLASS: p11.CKO_SECRET_KEY,
    p11.CKA_KEY_TYPE: p11.CKK_AES,
    p11.CKA_TOKEN: False,
    p11.CKA_PRIVATE: True,
    p11.CKA_SENSITIVE: False,
    p11.CKA_EXTRACTABLE: True,
    p11.CKA_ENCRYPT: True,
    p11.CKA_DECRYPT: True,
    p11.CKA_LABEL: "of the session",
}
MECHANISM: p11.Mechanism = p11.CKM_AES_CBC_PAD, IV
PARTS = (TEXT[:16], TEXT[16:21], TEXT[21:])

Make = Callable[[p11.Session], int]


def created(session: p11.Session) -> int:
    return session.create(AES | {p11.CKA_VALUE: VALUE})


def copied(session: p11.Session) -> int:
    return session.copy(created(session), {p11.CKA_LABEL: "a copy"})


def said_twice(session: p11.Session) -> int:
    """A value that the template has twice; what the library makes of it is its own affair."""
    template, count = p11.attributes(AES | {p11.CKA_VALUE: VALUE})
    again, _ = p11.attributes({p11.CKA_VALUE: VALUE})
    both = (type(again[0]) * (count + 1))(*template, *again)
    key = c_ulong()
    session.call("C_CreateObject", both, count + 1, byref(key))
    return key.value


def large(session: p11.Session) -> int:
    """Beside a key, as large as a certificate with its names or a key of ML-DSA: more than a page of memory."""
    bulky: dict[int, p11.Value] = {
        p11.CKA_CLASS: p11.CKO_DATA,
        p11.CKA_TOKEN: False,
        p11.CKA_LABEL: "",
        p11.CKA_VALUE: TEXT * 2000,
    }
    assert session.get(session.create(bulky), p11.CKA_VALUE) == (TEXT * 2000,)
    return created(session)


def unwrapped(session: p11.Session) -> int:
    public, private = (
        session.find_one({p11.CKA_CLASS: kind, p11.CKA_LABEL: "rsa"})
        for kind in (p11.CKO_PUBLIC_KEY, p11.CKO_PRIVATE_KEY)
    )
    wrapped = session.wrap(p11.CKM_RSA_PKCS, public, created(session))
    return session.unwrap(p11.CKM_RSA_PKCS, private, wrapped, AES)


def generated(session: p11.Session) -> int:
    return session.generate_key(p11.CKM_AES_KEY_GEN, AES | {p11.CKA_VALUE_LEN: 32})


@pytest.fixture
def mortal(start: Start) -> Killable:
    return start()


class _Made(Use):
    """A session with one key, whatever its name."""

    def __init__(self, session: p11.Session, key: int) -> None:
        super().__init__(session)
        self.made = key

    def key(self, name: str) -> int:
        return self.made if name == "made" else super().key(name)


@pytest.mark.parametrize("make", [created, said_twice, large, copied, unwrapped])
def test_key_that_can_be_made_again_is(mortal: Killable, undisturbed: Use, make: Make) -> None:
    work = Work(MECHANISM, "made", PARTS)
    bare = _Made(undisturbed.session, created(undisturbed.session))
    right = run(encrypt_parts(bare, work))
    for moment in range(len(stops(encrypt_parts(bare, work)))):
        session = mortal.use().session
        use = _Made(session, make(session))
        out = run(encrypt_parts(use, work), at(moment, partial(mortal.kill_serving, use)))
        assert out == right
        mortal.wait_for_all()
        session.close()


def test_key_that_was_generated_dies_with_its_member(mortal: Killable) -> None:
    session = mortal.use().session
    use = _Made(session, generated(session))
    session.init("C_EncryptInit", MECHANISM, use.made)
    session.call("C_EncryptUpdate", PARTS[0], 16, (c_ulong * 4)(), byref(c_ulong(32)))
    mortal.kill_serving(use)
    assert code(lambda: session.output("C_EncryptFinal")) == "CKR_DEVICE_ERROR"
    assert code(lambda: session.output("C_EncryptFinal")) == "CKR_OPERATION_NOT_INITIALIZED"
    assert session.digest(p11.CKM_SHA256, TEXT) == sha256(TEXT).digest()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [created, unwrapped])
@pytest.mark.parametrize("moment", range(3))
def test_key_of_the_session_that_is_digested(mortal: Killable, moment: int, make: Make) -> None:
    """Before it, right after it, and after more."""
    session = mortal.use().session
    use = _Made(session, make(session))
    session.init("C_DigestInit", p11.CKM_SHA256)
    session.feed("C_DigestUpdate", PARTS[0])
    if moment == 0:
        mortal.kill_serving(use)
    session.call("C_DigestKey", use.made)
    if moment == 1:
        mortal.kill_serving(use)
    session.feed("C_DigestUpdate", PARTS[1])
    if moment == 2:
        mortal.kill_serving(use)
    assert session.output("C_DigestFinal") == sha256(PARTS[0] + VALUE + PARTS[1]).digest()


def test_generated_key_that_was_digested_is_lost_with_its_member(mortal: Killable) -> None:
    session = mortal.use().session
    use = _Made(session, generated(session))
    session.init("C_DigestInit", p11.CKM_SHA256)
    session.call("C_DigestKey", use.made)
    mortal.kill_serving(use)
    assert code(lambda: session.feed("C_DigestUpdate", TEXT)) == "CKR_DEVICE_ERROR"
    assert session.digest(p11.CKM_SHA256, TEXT) == sha256(TEXT).digest()


def test_key_that_is_destroyed_under_way(mortal: Killable) -> None:
    """No member has it any more: the operation cannot be begun again, and says so."""
    session = mortal.use().session
    use = _Made(session, created(session))
    session.init("C_EncryptInit", MECHANISM, use.made)
    session.call("C_EncryptUpdate", PARTS[0], 16, (c_ulong * 4)(), byref(c_ulong(32)))
    runs_on = mortal.app.served(session)
    session.destroy(use.made)
    mortal.kill(runs_on)
    assert code(lambda: session.output("C_EncryptFinal")) == "CKR_DEVICE_ERROR"
    assert code(lambda: session.output("C_EncryptFinal")) == "CKR_OPERATION_NOT_INITIALIZED"
    assert session.digest(p11.CKM_SHA256, TEXT) == sha256(TEXT).digest()


# ---- found


def find_one_by_one(session: p11.Session, before: Callable[[int], object]) -> list[int]:
    handle, count = c_ulong(), c_ulong()
    found: list[int] = []
    session.call("C_FindObjectsInit", None, 0)
    while True:
        before(len(found))
        session.call("C_FindObjects", byref(handle), 1, byref(count))
        if not count.value:
            break
        found.append(handle.value)
    session.call("C_FindObjectsFinal")
    return found


def test_what_was_found_is_told_whole_after_a_death(mortal: Killable) -> None:
    use = mortal.use()
    right = sorted(use.session.find({}))
    assert len(right) > 10
    for moment in (0, 1, len(right)):
        out = find_one_by_one(use.session, at(moment, partial(mortal.kill, "east")))
        assert sorted(out) == right
        mortal.wait_for_all()


def test_all_members_dead_what_was_found_is_told(start: Start) -> None:
    mortal = start(recovery={"interval_s": 3600})
    use = mortal.use()
    right = sorted(use.session.find({}))

    def die() -> None:
        for name in mortal.workers:
            mortal.kill(name)

    assert sorted(find_one_by_one(use.session, at(1, die))) == right


def test_search_during_an_operation_that_moves(mortal: Killable) -> None:
    """Both go on. In sessions of their own: SoftHSM has one at a time in each."""
    use = mortal.use()
    other = mortal.app.open()
    right = sorted(use.session.find({}))
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    use.session.feed("C_DigestUpdate", PARTS[0])
    found = find_one_by_one(other, at(2, partial(mortal.kill_serving, use)))
    assert sorted(found) == right
    use.session.feed("C_DigestUpdate", PARTS[1])
    assert use.session.output("C_DigestFinal") == sha256(PARTS[0] + PARTS[1]).digest()
