"""A member that fails: what the group makes of each kind of fault. No call of the application may fail for it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_ulong

import pytest
from cryptography.exceptions import InvalidSignature

from demo.members import SoftToken, Table
from tests import p11
from tests.fault import Fault
from tests.ha import operations
from tests.ha.app import SOON, code, working_until
from tests.ha.conftest import StartFactory
from tests.ha.keys import DIGEST, Keys, secret
from tests.ha.operations import Use

Tokens = tuple[SoftToken, SoftToken]
Begin = Callable[..., tuple[Use, Fault]]


@pytest.fixture
def begin(tokens: Tokens, start: StartFactory, keys: Keys) -> Begin:
    """A logged-in application on a group of east, behind the fault module, and west, which has no faults."""

    def make(host: str, *script: str) -> tuple[Use, Fault]:
        fault = Fault(tokens[0])
        fault.script(*script)
        options: Table = {"host": "worker", "call_timeout_s": 1.0} if host == "worker" else {}
        members: tuple[Table, Table] = fault.member(**options), tokens[1].member()
        return Use.begin(start(*members, recovery=SOON), keys, fault.token.pin), fault

    return make


OPERATIONS = (operations.sign_ecdsa, operations.sign_hmac, operations.encrypt_aes, operations.digest)


def work(use: Use, rounds: int = 6) -> None:
    """Signatures and others that are all right; it raises with the first that is not."""
    for _ in range(rounds):
        for operation in OPERATIONS:
            operation(use)


ANSWERS = [
    "C_Sign after 1 times 1 return CKR_DEVICE_ERROR",
    "C_Sign after 1 times 1 return CKR_GENERAL_ERROR",
    "C_Sign after 1 times 1 return CKR_DEVICE_REMOVED",
    "C_Sign after 1 times 1 return CKR_FUNCTION_FAILED",
    "C_Sign after 1 times 1 return CKR_HOST_MEMORY",
    "C_Sign after 1 times 1 late CKR_DEVICE_ERROR",
    "C_SignInit after 1 times 1 return CKR_DEVICE_ERROR",
    "C_Sign every 2 return CKR_DEVICE_ERROR",
    "C_* probability 20% return CKR_DEVICE_ERROR",
]
LOSSES = [
    f"{function} after 1 times 1 {what} lost"
    for function in ("C_Sign", "C_SignInit")
    for what in ("session", "sessions", "login", "token")
]


@pytest.mark.parametrize("host", ["process", "worker"])
@pytest.mark.parametrize("rule", [*ANSWERS, *LOSSES, "C_SignInit after 1 times 1 object lost"])
def test_no_call_fails(begin: Begin, host: str, rule: str) -> None:
    use, fault = begin(host)
    fault.script(rule)
    working_until(lambda: work(use, 1), fault.injected, "the fault is injected")
    work(use)


def two_at_once(use: Use) -> None:
    """The token has one operation a session: the second is refused, the first goes on."""
    data = bytes(range(32))
    right = use.session.encrypt(p11.CKM_AES_ECB, use.aes, data)
    use.session.init("C_EncryptInit", p11.CKM_AES_ECB, use.aes)
    got = use.session.output("C_EncryptUpdate", data[:16], 16)
    refused = code(lambda: use.session.init("C_SignInit", p11.CKM_SHA256_HMAC, use.hmac))
    assert refused == "CKR_OPERATION_ACTIVE"
    got += use.session.output("C_EncryptUpdate", data[16:], 16)
    assert got + use.session.output("C_EncryptFinal") == right
    use.session.random(1)  # so that members take turns


@pytest.mark.parametrize("what", ["session", "sessions", "login"])
def test_second_operation_refused_while_its_member_forgets_the_first(begin: Begin, what: str) -> None:
    use, fault = begin("process")
    fault.script(f"C_SignInit times 1 {what} lost")
    working_until(lambda: two_at_once(use), fault.injected, "the fault is injected")
    two_at_once(use)
    assert use.app.events("operation.lost") == []


@pytest.mark.parametrize(
    "rule",
    [
        "C_Sign times 1 return CKR_DEVICE_ERROR",
        "C_Sign times 1 session lost",
        "C_Sign times 1 token lost",
        "C_Sign times 1 sessions lost",
        "C_Sign times 1 login lost",
    ],
)
def test_each_object_is_found_once_as_before(begin: Begin, rule: str) -> None:
    use, fault = begin("process")
    before = sorted(use.session.find({}))
    fault.script(rule)
    working_until(lambda: work(use, 1), fault.injected, "the fault is injected")
    working_until(lambda: work(use, 1), lambda: use.app.away() == set(), "all are there")
    assert sorted(use.session.find({})) == before


def session_objects(use: Use) -> None:
    """Made of a template, copied, unwrapped, used, and destroyed."""
    operations.unwrap(use)
    template = secret(p11.CKK_AES, bytes(16), "of a session", b"", p11.CKA_ENCRYPT, token=False)
    key = use.session.create(template)
    copy = use.session.copy(key, {p11.CKA_LABEL: "its copy"})
    for handle in (key, copy):
        assert use.session.encrypt(p11.CKM_AES_ECB, handle, bytes(16)) == AES_OF_ZEROS
        use.session.destroy(handle)
        with pytest.raises(p11.CkError, match="CKR_OBJECT_HANDLE_INVALID"):
            use.session.destroy(handle)


AES_OF_ZEROS = bytes.fromhex("66e94bd4ef8a2c3b884cfa59ca342b2e")  # FIPS 197's cipher, key and block zero


@pytest.mark.parametrize(
    "rule",
    [
        *(f"{name} times 1 session lost" for name in ("C_CreateObject", "C_CopyObject", "C_UnwrapKey")),
        *(f"C_GetAttributeValue after {after} times 1 session lost" for after in range(3)),
        "C_GetAttributeValue times 1 token lost",
        "C_DestroyObject times 1 session lost",
        "C_DestroyObject times 1 token lost",
    ],
)
def test_session_objects_are_made_and_destroyed_whatever_their_member_loses(begin: Begin, rule: str) -> None:
    """The answer is never about a session or an object of the member's own."""
    use, fault = begin("process")
    session_objects(use)
    fault.script(rule)
    working_until(lambda: session_objects(use), fault.injected, "the fault is injected")
    session_objects(use)
    assert use.session.find({p11.CKA_TOKEN: False}) == []


@pytest.mark.parametrize(
    "rule",
    [
        *(f"{name} times 1 kill" for name in ("C_CreateObject", "C_CopyObject", "C_DestroyObject")),
        *(f"C_GetAttributeValue after {after} times 1 kill" for after in range(2)),
        "C_UnwrapKey times 1 late kill",
    ],
)
def test_session_objects_are_made_and_destroyed_whoever_dies(begin: Begin, rule: str) -> None:
    use, fault = begin("worker")
    session_objects(use)
    fault.script(rule)
    working_until(lambda: session_objects(use), fault.injected, "it has happened")
    working_until(lambda: session_objects(use), lambda: use.app.away() == set(), "it is back")
    assert use.session.find({p11.CKA_TOKEN: False}) == []


DEATHS = ["crash", "abort", "exit 3", "kill", "hang", "late crash", "late hang"]


@pytest.mark.parametrize("death", DEATHS)
def test_a_worker_that_dies_is_one_member_lost_and_found(begin: Begin, death: str) -> None:
    use, fault = begin("worker")
    fault.script(f"C_Sign after 1 times 1 {death}")
    working_until(lambda: work(use, 1), fault.injected, "it has happened")
    use.app.wait_for_event("member.lost", "east")
    working_until(lambda: work(use, 1), lambda: use.app.away() == set(), "it is back")
    assert fault.injected() == 1  # a new process goes on in the same script
    work(use)


def test_a_lie_is_believed(begin: Begin) -> None:
    """Nobody can see that a signature is wrong who does not verify it."""
    use, fault = begin("process")
    fault.script("C_Sign times 1 flip 3")
    with pytest.raises((InvalidSignature, AssertionError)):
        work(use)
    assert fault.injected() == 1


def sign_into(use: Use) -> tuple[int, int, int]:
    """The answer, and the length of a signature and of its buffer."""
    use.session.init("C_SignInit", p11.CKM_ECDSA, use.ec)
    size, buffer = c_ulong(64), ctypes.create_string_buffer(64)
    rv = use.app.module.rv("C_Sign", use.session.handle, DIGEST, len(DIGEST), buffer, byref(size))
    return rv, size.value, 64


def label_into(use: Use) -> tuple[int, int, int]:
    """The same of an attribute."""
    attribute = (c_ulong * 3)(p11.CKA_LABEL, 0, 2)
    buffer = ctypes.create_string_buffer(2)
    attribute[1] = ctypes.addressof(buffer)
    rv = use.app.module.rv("C_GetAttributeValue", use.session.handle, use.ec, attribute, 1)
    return rv, attribute[2], 2


@pytest.mark.parametrize("change", ["+1", "=100000000000"])
@pytest.mark.parametrize(
    ("host", "function", "into"),
    [
        ("worker", "C_Sign", sign_into),
        ("worker", "C_GetAttributeValue", label_into),
        ("process", "C_Sign", sign_into),
        ("process", "C_GetAttributeValue", label_into),
    ],
)
def test_a_length_beyond_the_buffer_is_not_passed_on(
    begin: Begin, host: str, change: str, function: str, into: Callable[[Use], tuple[int, int, int]]
) -> None:
    use, fault = begin(host)
    fault.script(f"{function} length {change}")
    answers = []
    while not fault.injected():
        answers.append(into(use))
    assert [(rv, size) for rv, size, room in answers if rv == p11.CKR_OK and size > room] == []
    assert {p11.rv_name(rv) for rv, *_ in answers} == {"CKR_OK"}  # the other member did it


@pytest.mark.parametrize("host", ["process", "worker"])
@pytest.mark.parametrize("function", ["C_GetSlotList", "C_GetMechanismList", "C_FindObjects"])
def test_a_list_is_not_read_beyond_its_end(begin: Begin, host: str, function: str) -> None:
    use, fault = begin(host, f"{function} length =100000000000")
    working_until(lambda: work(use, 1), fault.injected, "the fault is injected")
    fault.script()
    working_until(lambda: work(use, 1), lambda: use.app.away() == set(), "the member is taken in")
