"""C_GetOperationState and C_SetOperationState: a saved operation goes on in any session, on any member."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_ulong, create_string_buffer

import pytest

from tests import p11
from tests.ha.app import code
from tests.replay.cases import CASES, Case
from tests.replay.conftest import Start
from tests.replay.killable import Killable
from tests.replay.scripts import ROOM, Use, output, run

SAVED = {
    "digest in parts": ["CKM_SHA256", "CKM_MD5"],
    "digest with a key": ["CKM_SHA256"],
    "sign in parts": ["CKM_SHA256_HMAC", "CKM_SHA256_RSA_PKCS", "CKM_AES_CMAC"],
    "verify in parts": ["CKM_SHA256_HMAC", "CKM_SHA512_RSA_PKCS_PSS", "CKM_DSA_SHA256"],
    "encrypt in parts": ["CKM_AES_CBC_PAD", "CKM_AES_CTR", "CKM_AES_GCM"],
    "decrypt in parts": ["CKM_AES_CBC", "CKM_AES_GCM"],
}
EACH = pytest.mark.parametrize(
    "case", [case for case in CASES if case.mechanism.name in SAVED.get(case.operation.name, ())], ids=str
)
PARTS = b"first part, ", b"second part"


def saved(use: Use) -> bytes:
    return use.session.output("C_GetOperationState")


def restore(use: Use, state: bytes, encryption: int = 0, authentication: int = 0) -> str:
    given = (state, len(state), encryption, authentication)
    return code(lambda: use.session.call("C_SetOperationState", *given))


def begin_digest(use: Use) -> None:
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    use.session.feed("C_DigestUpdate", PARTS[0])


def end_digest(use: Use) -> bytes:
    use.session.feed("C_DigestUpdate", PARTS[1])
    return use.session.output("C_DigestFinal")


@pytest.fixture
def mortal(start: Start) -> Killable:
    return start()


# ---- it goes on


@EACH
def test_saved_operation_goes_on_in_another_session(mortal: Killable, undisturbed: Use, case: Case) -> None:
    """Before each call its state is carried to a new session, and the member that had it dies."""
    taken = run(case.takes.script(undisturbed)) if case.takes else b""
    right = run(case.script(undisturbed, taken))
    use = mortal.use()
    operation = case.operation.does
    key = use.key(case.key) if case.key else 0
    keys = (key, 0) if operation in ("encrypt", "decrypt") else (0, key)
    sessions = [use.session]

    def move(_number: int, _name: str) -> None:
        state = saved(use)
        mortal.wait_for_all()
        mortal.kill_serving(use)
        use.session = mortal.app.open()
        sessions.append(use.session)
        assert restore(use, state, *keys) == "CKR_OK"

    out = run(case.script(use, taken), move)
    if case.proof is None:
        assert out == right
    else:
        assert run(case.proof.script(undisturbed, out)) == b"CKR_OK"
    assert len(sessions) > 3


def test_saved_operation_and_its_first_session_go_their_own_ways(mortal: Killable, undisturbed: Use) -> None:
    use, other = mortal.use(), mortal.use()
    begin_digest(use)
    state = saved(use)
    assert restore(other, state) == "CKR_OK"
    mortal.kill_serving(use)
    use.session.feed("C_DigestUpdate", b"more of its own")
    begin_digest(undisturbed)
    assert end_digest(other) == end_digest(undisturbed)
    assert restore(other, state) == "CKR_OK"
    begin_digest(undisturbed)
    assert end_digest(other) == end_digest(undisturbed)
    undisturbed.session.init("C_DigestInit", p11.CKM_SHA256)
    for part in (PARTS[0], b"more of its own", PARTS[1]):
        undisturbed.session.feed("C_DigestUpdate", part)
    assert end_digest(use) == undisturbed.session.output("C_DigestFinal")


def test_state_takes_the_place_of_what_was_under_way(mortal: Killable, undisturbed: Use) -> None:
    use = mortal.use()
    begin_digest(use)
    state = saved(use)
    use.session.output("C_DigestFinal")
    use.session.init("C_SignInit", p11.CKM_SHA256_HMAC, use.key("secret generic"))
    use.session.feed("C_SignUpdate", b"something else")
    assert restore(use, state) == "CKR_OK"
    assert code(lambda: use.session.output("C_SignFinal")) == "CKR_OPERATION_NOT_INITIALIZED"
    begin_digest(undisturbed)
    assert end_digest(use) == end_digest(undisturbed)


# ---- it does not


def is_refused(use: Use, state: bytes) -> None:
    """And changes nothing."""
    assert restore(use, state) == "CKR_SAVED_STATE_INVALID"
    assert code(lambda: use.session.output("C_DigestFinal")) == "CKR_OPERATION_NOT_INITIALIZED"


def test_state_that_was_corrupted_is_refused(mortal: Killable) -> None:
    use = mortal.use()
    begin_digest(use)
    state = saved(use)
    use.session.output("C_DigestFinal")
    for at in range(len(state)):
        is_refused(use, state[:at] + bytes([state[at] ^ 0x40]) + state[at + 1 :])


def test_state_of_another_length_is_refused(mortal: Killable) -> None:
    use = mortal.use()
    begin_digest(use)
    state = saved(use)
    use.session.output("C_DigestFinal")
    for size in range(1, len(state)):
        is_refused(use, state[:size])
    is_refused(use, state + b"\0")
    is_refused(use, state + state)
    assert restore(use, b"") in ("CKR_SAVED_STATE_INVALID", "CKR_ARGUMENTS_BAD")


@pytest.mark.parametrize("state", [b"\0" * 64, b"\xff" * 64, bytes(range(256)) * 16], ids=["0", "ff", "all"])
def test_foreign_state_is_refused(mortal: Killable, state: bytes) -> None:
    is_refused(mortal.use(), state)


def test_state_of_the_run_before_is_refused(mortal: Killable) -> None:
    use = mortal.use()
    begin_digest(use)
    state = saved(use)
    mortal.app.module.finalize()
    mortal.app.module.initialize()
    is_refused(mortal.use(), state)


def test_state_that_is_refused_leaves_the_session_alone(mortal: Killable, undisturbed: Use) -> None:
    use = mortal.use()
    begin_digest(use)
    assert restore(use, saved(use)[:-1]) == "CKR_SAVED_STATE_INVALID"
    begin_digest(undisturbed)
    assert end_digest(use) == end_digest(undisturbed)


def test_too_small_a_buffer_is_told_the_length(mortal: Killable, undisturbed: Use) -> None:
    use = mortal.use()
    begin_digest(use)
    right = len(saved(use))
    for room in (0, 1, right - 1):
        size, buffer = c_ulong(room), create_string_buffer(b"\xa5" * right, right)
        rv = use.session.module.rv("C_GetOperationState", use.session.handle, buffer, byref(size))
        assert (p11.rv_name(rv), size.value) == ("CKR_BUFFER_TOO_SMALL", right)
        assert buffer.raw == b"\xa5" * right
    assert len(output(use, right, "C_GetOperationState")) == right
    begin_digest(undisturbed)
    assert end_digest(use) == end_digest(undisturbed)


def test_nothing_active_has_no_state(mortal: Killable) -> None:
    use = mortal.use()
    assert code(lambda: saved(use)) == "CKR_OPERATION_NOT_INITIALIZED"
    begin_digest(use)
    end_digest(use)
    assert code(lambda: saved(use)) == "CKR_OPERATION_NOT_INITIALIZED"


def test_operation_beyond_the_limit_has_no_state_and_goes_on(start: Start, undisturbed: Use) -> None:
    mortal = start(replay_limit_bytes=len(PARTS[0]) - 1)
    use = mortal.use()
    begin_digest(use)
    assert code(lambda: saved(use)) == "CKR_STATE_UNSAVEABLE"
    begin_digest(undisturbed)
    assert end_digest(use) == end_digest(undisturbed)


Begin = Callable[[Use], int]


def encrypting(use: Use) -> int:
    key = use.key("secret aes")
    use.session.init("C_EncryptInit", p11.CKM_AES_ECB, key)
    return key


def signing(use: Use) -> int:
    key = use.key("secret generic")
    use.session.init("C_SignInit", p11.CKM_SHA256_HMAC, key)
    return key


@pytest.mark.parametrize("begin", [encrypting, signing])
def test_wrong_key_is_refused(mortal: Killable, begin: Begin) -> None:
    use, other = mortal.use(), mortal.use()
    wrong = use.key("secret des3")
    right = begin(use)
    state, is_cipher = saved(use), begin is encrypting
    assert restore(other, state, *((wrong, 0) if is_cipher else (0, wrong))) == "CKR_KEY_CHANGED"
    assert restore(other, state, right, right) == "CKR_KEY_NOT_NEEDED"
    assert restore(other, state, *((0, right) if is_cipher else (right, 0))) != "CKR_OK"
    assert code(lambda: saved(other)) == "CKR_OPERATION_NOT_INITIALIZED"
    assert restore(other, state, *((right, 0) if is_cipher else (0, right))) == "CKR_OK"


def test_key_for_a_digest_is_not_needed(mortal: Killable) -> None:
    use = mortal.use()
    key = use.key("secret aes")
    begin_digest(use)
    state = saved(use)
    assert restore(use, state, key, 0) == "CKR_KEY_NOT_NEEDED"
    assert restore(use, state, 0, key) == "CKR_KEY_NOT_NEEDED"


def test_state_whose_key_is_gone_needs_it(mortal: Killable) -> None:
    use = mortal.use()
    template: p11.Template = {
        p11.CKA_CLASS: p11.CKO_SECRET_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET,
        p11.CKA_TOKEN: False,
        p11.CKA_SIGN: True,
        p11.CKA_VALUE: b"k" * 32,
    }
    key = use.session.create(template)
    use.session.init("C_SignInit", p11.CKM_SHA256_HMAC, key)
    state = saved(use)
    use.session.output("C_SignFinal")
    use.session.destroy(key)
    assert restore(use, state) == "CKR_KEY_NEEDED"


def test_state_means_nothing_after_logout(mortal: Killable) -> None:
    """Private keys have no handle then."""
    use = mortal.use()
    signing(use)
    state = saved(use)
    use.session.output("C_SignFinal")
    use.session.logout()
    assert restore(use, state) == "CKR_KEY_NEEDED"
    assert code(lambda: use.session.output("C_SignFinal")) == "CKR_OPERATION_NOT_INITIALIZED"


def test_size_is_asked_with_room_to_spare(mortal: Killable) -> None:
    use = mortal.use()
    begin_digest(use)
    assert output(use, ROOM, "C_GetOperationState") == saved(use)
