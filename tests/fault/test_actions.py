"""Each fault against a bare token: what the program sees, what the token did, and that it was counted."""

from __future__ import annotations

import ctypes
import threading
import time
from ctypes import byref, c_ulong
from hashlib import sha256

import pytest
from cryptography.exceptions import InvalidSignature

from tests import p11
from tests.fault.conftest import Program, Use
from tests.ha.app import bare, code
from tests.ha.keys import DATA, DIGEST, private, public, shared

NOTE: p11.Template = {
    p11.CKA_CLASS: p11.CKO_DATA,
    p11.CKA_TOKEN: True,
    p11.CKA_PRIVATE: False,
    p11.CKA_LABEL: "note",
}


def notes(use: Use) -> list[int]:
    return use.session.find({p11.CKA_CLASS: p11.CKO_DATA})


# ---- answers


def test_a_code_is_returned_to_the_calls_that_were_asked_for(use: Use) -> None:
    use.fault.script("C_Sign after 3 times 2 return CKR_DEVICE_ERROR")
    assert [code(use.sign) for _ in range(7)] == ["CKR_OK"] * 3 + ["CKR_DEVICE_ERROR"] * 2 + ["CKR_OK"] * 2
    assert [(c.line, c.calls, c.injected) for c in use.fault.counts()] == [(1, 7, 2)]


def feed(use: Use) -> None:
    use.session.feed("C_SignUpdate", DATA)


def final(use: Use) -> None:
    use.session.output("C_SignFinal")


@pytest.mark.parametrize("rule", ["return CKR_DEVICE_ERROR", "late CKR_DEVICE_ERROR"])
@pytest.mark.parametrize("failing", ["C_SignInit", "C_SignUpdate", "C_SignFinal"])
def test_an_error_ends_the_operation_as_a_token_would(use: Use, failing: str, rule: str) -> None:
    """Else the next C_SignInit would be CKR_OPERATION_ACTIVE, which no token answers there."""
    key = use.session.find_one(shared("hmac"))

    def sign() -> None:
        use.session.init("C_SignInit", p11.CKM_SHA256_HMAC, key)
        feed(use)
        final(use)

    use.fault.script(f"{failing} times 1 {rule}")
    codes = [code(sign), code(sign)]
    if (
        rule.startswith("late") and failing == "C_SignInit"
    ):  # the work was done, which the program does not know
        assert codes == ["CKR_DEVICE_ERROR", "CKR_OPERATION_ACTIVE"]
    else:
        assert codes == ["CKR_DEVICE_ERROR", "CKR_OK"]
    assert use.fault.injected() == 1


def test_a_late_error_comes_after_the_work(use: Use) -> None:
    use.fault.script(
        "C_CreateObject times 1 return CKR_DEVICE_MEMORY", "C_CreateObject late CKR_DEVICE_ERROR"
    )
    assert code(lambda: use.session.create(NOTE)) == "CKR_DEVICE_MEMORY"
    assert len(notes(use)) == 0
    assert code(lambda: use.session.create(NOTE)) == "CKR_DEVICE_ERROR"
    assert len(notes(use)) == 1


def test_pretended_work_is_not_done(use: Use) -> None:
    made = use.session.create(NOTE)
    use.fault.script("C_DestroyObject pretend", "C_Sign times 1 pretend")
    use.session.destroy(made)
    assert notes(use) == [made]
    use.session.init("C_SignInit", p11.CKM_ECDSA, use.ec)
    assert use.session.output("C_Sign", DIGEST, len(DIGEST)) == bytes(64)  # the buffer as it was
    use.sign()  # and the operation is over, as after an OK


def test_a_buffer_is_too_small_without_reason(use: Use) -> None:
    use.fault.script("C_Sign times 1 small")
    use.session.init("C_SignInit", p11.CKM_ECDSA, use.ec)
    size, buffer = c_ulong(64), ctypes.create_string_buffer(80)
    sign = ("C_Sign", use.session.handle, DIGEST, len(DIGEST), buffer, byref(size))
    assert use.module.rv(*sign) == p11.CKR_BUFFER_TOO_SMALL
    assert size.value == 65
    assert use.module.rv(*sign) == p11.CKR_OK  # the operation has gone on
    use.keys.check_ec(buffer.raw[:64])


def test_queries_are_their_own_calls(use: Use) -> None:
    """A call that asks for a length alone is not hit, and not counted, unless the rule is about queries."""
    use.fault.script("C_Sign query times 1 length =17", "C_Sign times 1 return CKR_FUNCTION_FAILED")
    use.session.init("C_SignInit", p11.CKM_ECDSA, use.ec)
    size = c_ulong()
    use.session.call("C_Sign", DIGEST, len(DIGEST), None, byref(size))
    assert size.value == 17
    assert [count.calls for count in use.fault.counts()] == [1, 0]


# ---- time


def test_sleeping_calls_do_their_work_all_the_same(use: Use) -> None:
    use.fault.script("C_Sign times 1 sleep 50ms", "C_Sign times 1 late sleep 60000us")
    began = time.monotonic()
    use.sign()
    assert time.monotonic() - began >= 0.110
    assert use.fault.injected() == 2


@pytest.mark.parametrize("late", ["", "late "])
def test_a_call_hangs_until_the_script_is_another(use: Use, late: str) -> None:
    use.fault.script(f"C_Sign times 1 {late}hang")
    thread = threading.Thread(target=use.sign)
    thread.start()
    use.fault.wait_injected()
    other = use.open()
    other.verify(p11.CKM_ECDSA, other.find_one(public("ec")), DIGEST, use.keys.sign_ec())  # nobody else waits
    assert thread.is_alive()
    use.fault.script()
    thread.join(20)
    assert not thread.is_alive()


# ---- the end


@pytest.mark.parametrize(("end", "status"), [("crash", -11), ("abort", -6), ("exit 7", 7), ("kill", -9)])
@pytest.mark.parametrize("late", ["", "late "])
def test_the_process_ends_before_or_after_the_work(
    program: Program, use: Use, end: str, status: int, late: str
) -> None:
    use.fault.script(f"C_CreateObject after 1 {late}{end}")
    done = program("[session.create(NOTE) for _ in range(3)]")
    assert done.returncode == status, done.stderr
    assert use.fault.injected() == 1
    assert use.fault.log()[-1].endswith(f"rv=- rule=1 {late}{end}")
    with bare(use.fault.token) as session:
        assert len(session.find({p11.CKA_CLASS: p11.CKO_DATA})) == (2 if late else 1)


# ---- outputs


@pytest.mark.parametrize(("change", "expected"), [("+1", 65), ("-3", 61), ("=1000000", 1000000), ("-100", 0)])
def test_a_length_is_another(use: Use, change: str, expected: int) -> None:
    use.session.init("C_SignInit", p11.CKM_ECDSA, use.ec)
    use.fault.script(f"C_Sign length {change}")
    size, buffer = c_ulong(64), ctypes.create_string_buffer(64)
    use.session.call("C_Sign", DIGEST, len(DIGEST), buffer, byref(size))
    assert size.value == expected
    use.keys.check_ec(buffer.raw)  # the bytes are what they were


def test_a_length_of_attributes_and_of_lists_is_another(use: Use) -> None:
    assert use.session.get(use.ec, p11.CKA_LABEL, p11.CKA_ID) == (b"ec", b"\xec")
    use.fault.script(
        "C_GetAttributeValue length -1", "C_FindObjects times 1 length -1", "C_GetSlotList length +1"
    )
    assert use.session.get(use.ec, p11.CKA_LABEL, p11.CKA_ID) == (b"e", b"")
    assert len(use.session.find({})) == 5  # of six
    count, slots = c_ulong(9), (c_ulong * 9)()
    use.module.call("C_GetSlotList", 0, slots, byref(count))
    assert count.value == 3
    assert use.fault.injected() == 3  # and not at the end of the search: there was nothing to change


def test_a_byte_is_flipped(use: Use) -> None:
    expected = bytearray(sha256(DATA).digest())
    use.fault.script("C_Digest times 1 flip 3", "C_Digest flip 33", "C_GetAttributeValue flip 0")
    expected[3] ^= 0xFF
    assert use.session.digest(p11.CKM_SHA256, DATA) == expected
    expected[3] ^= 0xFF
    expected[1] ^= 0xFF  # beyond the end it goes round
    assert use.session.digest(p11.CKM_SHA256, DATA) == expected
    assert use.session.get(use.ec, p11.CKA_LABEL) == (b"\x9ac",)
    use.fault.script("C_Sign flip 63", "C_GetTokenInfo flip 0")
    with pytest.raises(InvalidSignature):
        use.sign()
    with pytest.raises(UnicodeDecodeError):
        use.module.token(use.slot)


def test_an_output_is_zero(use: Use) -> None:
    use.fault.script("C_GenerateRandom after 1 zero")
    assert use.session.random(32) != bytes(32)
    assert use.session.random(32) == bytes(32)


def test_a_fault_that_could_not_be_is_owed_to_the_next_call(use: Use) -> None:
    use.fault.script("C_Digest times 1 flip 0")
    size, buffer = c_ulong(32), ctypes.create_string_buffer(32)
    rv = use.module.rv("C_Digest", use.session.handle, DATA, len(DATA), buffer, byref(size))
    assert rv == p11.CKR_OPERATION_NOT_INITIALIZED
    assert use.fault.injected() == 0
    assert use.session.digest(p11.CKM_SHA256, DATA) != sha256(DATA).digest()
    assert [(count.calls, count.injected) for count in use.fault.counts()] == [(2, 1)]


def test_a_key_is_taken_for_another(use: Use) -> None:
    rsa = use.session.find_one(private("rsa"))
    use.fault.script("C_SignInit times 1 swap")
    use.sign()  # it knows of no other yet
    assert use.fault.injected() == 0
    signature = use.session.sign(p11.CKM_ECDSA, rsa, DIGEST)
    use.keys.check_ec(signature)
    assert use.fault.injected() == 1
    use.keys.check_rsa(use.session.sign(p11.CKM_SHA256_RSA_PKCS, rsa, DATA))


# ---- losses


def test_a_lost_session_is_lost_with_its_objects(use: Use) -> None:
    other = use.open()
    kept = other.create({**NOTE, p11.CKA_TOKEN: False})
    gone = use.session.create({**NOTE, p11.CKA_TOKEN: False})
    assert set(other.find({p11.CKA_CLASS: p11.CKO_DATA})) == {kept, gone}
    use.fault.script("C_SignInit times 1 session lost")
    assert code(use.sign) == "CKR_SESSION_HANDLE_INVALID"
    assert code(use.sign) == "CKR_SESSION_HANDLE_INVALID"
    assert code(use.session.info) == "CKR_SESSION_HANDLE_INVALID"
    assert other.find({p11.CKA_CLASS: p11.CKO_DATA}) == [kept]
    use.session = use.open()
    use.sign()


def test_with_all_sessions_the_login_is_lost(use: Use) -> None:
    other = use.open()
    use.fault.script("C_Sign times 1 sessions lost")
    assert code(use.sign) == "CKR_SESSION_HANDLE_INVALID"
    assert code(other.info) == "CKR_SESSION_HANDLE_INVALID"
    use.session = use.open()
    assert use.session.info().state == p11.CKS_RW_PUBLIC_SESSION
    use.session.login(use.fault.token.pin)
    use.ec = use.session.find_one(private("ec"))
    use.sign()


def test_a_lost_login_is_lost_until_the_next(use: Use) -> None:
    other = use.open()
    use.fault.script("C_Sign times 1 login lost")
    assert [code(use.sign) for _ in range(3)] == ["CKR_USER_NOT_LOGGED_IN"] * 3
    assert other.info().state == p11.CKS_RW_PUBLIC_SESSION
    assert other.find(private("ec")) == []
    assert other.find(public("ec")) != []  # what is public is so still
    other.login(use.fault.token.pin)
    use.ec = use.session.find_one(private("ec"))
    use.sign()
    assert (
        code(lambda: use.session.get(999, p11.CKA_ID)) == "CKR_OBJECT_HANDLE_INVALID"
    )  # no more taken for it


def test_a_token_is_gone_until_it_is_back(use: Use) -> None:
    use.fault.script("C_Sign times 1 token lost")
    slot = use.slot
    assert code(use.sign) == "CKR_DEVICE_REMOVED"
    assert code(use.sign) == "CKR_SESSION_HANDLE_INVALID"
    assert code(use.open) == code(lambda: use.module.token(slot)) == "CKR_TOKEN_NOT_PRESENT"
    assert slot in use.module.slots(present=False)
    assert slot not in use.module.slots(present=True)
    assert not flags_of_slot(use, slot) & p11.CKF_TOKEN_PRESENT
    use.fault.script("C_GetSlotInfo times 1 token back")
    assert flags_of_slot(use, slot) & p11.CKF_TOKEN_PRESENT
    assert slot in use.module.slots(present=True)
    use.session = use.open()
    use.session.login(use.fault.token.pin)
    use.ec = use.session.find_one(private("ec"))
    use.sign()


def flags_of_slot(use: Use, slot: int) -> int:
    info = (ctypes.c_ubyte * 128)()  # 64 and 32 characters, and then the flags
    use.module.call("C_GetSlotInfo", slot, info)
    return c_ulong.from_buffer(info, 96).value


def test_a_token_is_gone_until_c_initialize(use: Use) -> None:
    use.fault.script("C_GetTokenInfo times 1 token lost")
    slot = use.slot
    assert code(lambda: use.module.token(slot)) == "CKR_TOKEN_NOT_PRESENT"
    assert code(lambda: use.module.token(slot)) == "CKR_TOKEN_NOT_PRESENT"
    use.module.finalize()
    use.module.initialize()
    assert use.module.token(slot).label == "east"


def test_a_lost_object_is_not_found(use: Use) -> None:
    everything = use.session.find({})
    use.fault.script("C_SignInit times 1 object lost")
    assert code(use.sign) == "CKR_KEY_HANDLE_INVALID"
    assert code(use.sign) == "CKR_KEY_HANDLE_INVALID"
    assert code(lambda: use.session.get(use.ec, p11.CKA_ID)) == "CKR_OBJECT_HANDLE_INVALID"
    assert use.session.find({}) == [each for each in everything if each != use.ec]
    one_by_one: list[int] = []
    use.session.call("C_FindObjectsInit", None, 0)
    while True:
        handle, count = c_ulong(), c_ulong()
        use.session.call("C_FindObjects", byref(handle), 1, byref(count))
        if not count.value:
            break
        one_by_one.append(handle.value)
    use.session.call("C_FindObjectsFinal")
    assert sorted(one_by_one) == sorted(each for each in everything if each != use.ec)
