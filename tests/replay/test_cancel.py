"""Operations that are given up: by an Init without a mechanism, by C_SessionCancel, on members that know neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import p11
from tests.ha.app import code
from tests.replay.conftest import Start
from tests.replay.killable import Killable
from tests.replay.scripts import Use

DATA = b"what an operation took"
VERBS = {
    "Digest": (p11.CKM_SHA256, "", p11.CKF_DIGEST),
    "Sign": (p11.CKM_SHA256_HMAC, "secret generic", p11.CKF_SIGN),
    "Verify": (p11.CKM_SHA256_HMAC, "secret generic", p11.CKF_VERIFY),
    "Encrypt": (p11.CKM_AES_ECB, "secret aes", p11.CKF_ENCRYPT),
    "Decrypt": (p11.CKM_AES_ECB, "secret aes", p11.CKF_DECRYPT),
}
EACH = pytest.mark.parametrize("verb", VERBS)


@pytest.fixture
def mortal(start: Start) -> Killable:
    return start()


def keys(use: Use, verb: str) -> list[int]:
    name = VERBS[verb][1]
    return [use.key(name)] if name else []


def begin(use: Use, verb: str, *, feed: bool = True) -> None:
    use.session.init(f"C_{verb}Init", VERBS[verb][0], *keys(use, verb))
    if feed and verb in ("Digest", "Sign", "Verify"):
        use.session.feed(f"C_{verb}Update", DATA)


def end(use: Use, verb: str) -> str:
    if verb == "Verify":
        return code(lambda: use.session.feed("C_VerifyFinal", bytes(32)))
    return code(lambda: use.session.output(f"C_{verb}Final"))


def by_init(use: Use, verb: str) -> str:
    return code(lambda: use.session.call(f"C_{verb}Init", None, *keys(use, verb)))


def by_cancel(use: Use, verb: str) -> str:
    return code(lambda: use.session.call("C_SessionCancel", VERBS[verb][2]))


Cancel = Callable[[Use, str], str]


def is_free(use: Use, verb: str) -> None:
    """Nothing is left of it, here or on the member: the next one is its own."""
    assert end(use, verb) == "CKR_OPERATION_NOT_INITIALIZED"
    data = b"0123456789abcdef"
    tag = use.session.sign(p11.CKM_SHA256_HMAC, use.key("secret generic"), data)
    use.session.verify(p11.CKM_SHA256_HMAC, use.key("secret generic"), data, tag)


@EACH
@pytest.mark.parametrize("cancel", [by_init, by_cancel])
@pytest.mark.parametrize("feed", [False, True])
def test_cancelled(mortal: Killable, undisturbed: Use, verb: str, cancel: Cancel, feed: bool) -> None:
    use = mortal.use()
    begin(use, verb, feed=feed)
    assert cancel(use, verb) == "CKR_OK"
    is_free(use, verb)
    begin(use, verb)
    begin(undisturbed, verb)
    assert end(use, verb) == end(undisturbed, verb)


@EACH
@pytest.mark.parametrize("cancel", [by_init, by_cancel])
def test_cancelled_after_its_member_died(mortal: Killable, verb: str, cancel: Cancel) -> None:
    use = mortal.use()
    begin(use, verb)
    mortal.kill_serving(use)
    assert cancel(use, verb) == "CKR_OK"
    is_free(use, verb)


@EACH
@pytest.mark.parametrize("cancel", [by_init, by_cancel])
def test_cancelled_beside_a_key_that_only_this_session_has(
    mortal: Killable, verb: str, cancel: Cancel
) -> None:
    """Its member has PKCS#11 2.40, where nothing but the session's end would cancel: the key must not end with it."""
    use = mortal.use()
    template = {p11.CKA_TOKEN: False, p11.CKA_SIGN: True, p11.CKA_VALUE_LEN: 32}
    secret = use.session.generate_key(p11.CKM_GENERIC_SECRET_KEY_GEN, template)
    right = use.session.sign(p11.CKM_SHA256_HMAC, secret, DATA)
    for _ in range(4):  # both members have their turn
        begin(use, verb)
        assert cancel(use, verb) == "CKR_OK"
        is_free(use, verb)
        assert use.session.sign(p11.CKM_SHA256_HMAC, secret, DATA) == right


@pytest.mark.parametrize("cancel", [by_init, by_cancel])
def test_cancelled_beside_a_key_that_died_with_its_member(mortal: Killable, cancel: Cancel) -> None:
    """Its end is noticed here: what was to be cancelled has died with it, and it is lost as by any other call."""
    use = mortal.use()
    template = {p11.CKA_TOKEN: False, p11.CKA_SIGN: True, p11.CKA_VALUE_LEN: 32}
    secret = use.session.generate_key(p11.CKM_GENERIC_SECRET_KEY_GEN, template)
    use.session.init("C_SignInit", p11.CKM_SHA256_HMAC, secret)
    use.session.feed("C_SignUpdate", DATA)
    dead = mortal.kill_serving(use)
    assert cancel(use, "Sign") == "CKR_OK"
    assert len(mortal.app.events("member.lost", dead)) == 1
    is_free(use, "Sign")


@EACH
def test_init_without_a_mechanism_and_nothing_to_cancel(mortal: Killable, verb: str) -> None:
    assert by_init(mortal.use(), verb) in ("CKR_OPERATION_NOT_INITIALIZED", "CKR_ARGUMENTS_BAD")


def test_cancelling_what_is_not_under_way_leaves_what_is(mortal: Killable, undisturbed: Use) -> None:
    use = mortal.use()
    begin(use, "Digest")
    assert by_cancel(use, "Sign") == "CKR_OK"
    mortal.kill_serving(use)
    begin(undisturbed, "Digest")
    assert use.session.output("C_DigestFinal") == undisturbed.session.output("C_DigestFinal")


def test_cancelling_a_search(mortal: Killable) -> None:
    use = mortal.use()
    use.session.call("C_FindObjectsInit", None, 0)
    use.session.call("C_SessionCancel", p11.CKF_FIND_OBJECTS)
    assert code(lambda: use.session.call("C_FindObjectsFinal")) == "CKR_OPERATION_NOT_INITIALIZED"
