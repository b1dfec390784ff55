"""Bad input to every function of the table: the standard's CKR_*, never a crash, and nothing reaches a member.

The member says CKR_OK to everything (libyes.c), so what is let through shows.  A call is built from the roles of
its row, and spoilt in one place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.members import Table, write_config
from pkcs11_ha.spec import signature
from pkcs11_ha.spec.functions import FUNCTIONS, INDEX, Function, Op, Phase, Role
from tests import p11
from tests.boundary.conftest import DIGEST, PIN, PRIVATE, Pair, Program
from tests.boundary.hosts import Host, Word, ulong
from tests.conftest import ROOT

PROTOTYPES = signature.prototypes(signature.preprocess(str(ROOT / "include" / "pkcs11.h")))

# They have an answer of their own before C_Initialize.
ALWAYS = ("C_GetFunctionList", "C_GetInterfaceList", "C_GetInterface")
HUGE = (1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)

# What a number must be for the call to make sense.
VALUES = {
    ("C_OpenSession", "flags"): p11.CKF_SERIAL_SESSION | p11.CKF_RW_SESSION,
    ("C_WaitForSlotEvent", "flags"): p11.CKF_DONT_BLOCK,
    ("C_Login", "userType"): p11.CKU_USER,
    ("C_LoginUser", "userType"): p11.CKU_USER,
    ("C_GetMechanismInfo", "type"): p11.CKM_SHA256,
    ("C_FindObjects", "ulMaxObjectCount"): 1,
}

# What a group answers to a call with which nothing is wrong, where it is not CKR_OK.
ANSWERS = {
    "C_Initialize": "CKR_CRYPTOKI_ALREADY_INITIALIZED",
    "C_InitToken": "CKR_FUNCTION_NOT_SUPPORTED",
    "C_GetOperationState": "CKR_OPERATION_NOT_INITIALIZED",
    "C_SetOperationState": "CKR_SAVED_STATE_INVALID",
    "C_Logout": "CKR_USER_NOT_LOGGED_IN",
    "C_LoginUser": "CKR_FUNCTION_NOT_SUPPORTED",
    "C_GetFunctionStatus": "CKR_FUNCTION_NOT_PARALLEL",
    "C_CancelFunction": "CKR_FUNCTION_NOT_PARALLEL",
    "C_WaitForSlotEvent": "CKR_NO_EVENT",
    "C_AsyncComplete": "CKR_FUNCTION_NOT_SUPPORTED",
    "C_AsyncGetID": "CKR_FUNCTION_NOT_SUPPORTED",
    "C_AsyncJoin": "CKR_FUNCTION_NOT_SUPPORTED",
}

BAD_OBJECT = {
    "hObject": "CKR_OBJECT_HANDLE_INVALID",
    "hWrappingKey": "CKR_WRAPPING_KEY_HANDLE_INVALID",
    "hUnwrappingKey": "CKR_UNWRAPPING_KEY_HANDLE_INVALID",
}


@dataclass
class Application:
    """A host with a session and objects in the first of two groups."""

    host: Host
    slot: int
    other_slot: int
    session: int = 0
    object: int = 0
    dead_session: int = 0
    dead_object: int = 0
    other_object: int = 0

    def begin(self) -> None:
        self.dead_session = self.host.open(self.slot)
        self.host.ok("C_CloseSession", self.dead_session)
        self.session = self.host.open(self.slot)
        self.dead_object = self.create(self.session)
        self.host.ok("C_DestroyObject", self.session, self.dead_object)
        self.object = self.create(self.session)
        self.other_object = self.create(self.host.open(self.other_slot))

    def create(self, session: int) -> int:
        template: p11.Template = {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_PRIVATE: False, p11.CKA_LABEL: "x"}
        return self.host.new("C_CreateObject", session, *self.host.attributes(template))

    def end(self) -> None:
        for slot in (self.slot, self.other_slot):
            self.host.ok("C_CloseAllSessions", slot)

    def words(self, row: Function) -> list[Word]:
        """Arguments with which nothing is wrong."""
        return [
            self.word(row, role, argument.name)
            for role, argument in zip(row.roles, PROTOTYPES[row.name], strict=True)
        ]

    def word(self, row: Function, role: Role, name: str) -> Word:
        host = self.host
        make: dict[Role, Callable[[], Word]] = {
            Role.SESSION: lambda: self.session,
            Role.SLOT: lambda: self.slot,
            Role.OBJECT: lambda: self.object,
            Role.MECHANISM: lambda: host.mechanism(p11.CKM_SHA256),
            Role.TEMPLATE: lambda: host.attributes({p11.CKA_LABEL: "label"})[0],
            Role.ANSWERS: lambda: host.attributes({p11.CKA_LABEL: "label"})[0],
            Role.COUNT: lambda: 1,
            Role.IN: lambda: b"8 bytes ",
            Role.IN_LEN: lambda: 8,
            Role.OUT: lambda: host.room(8),
            Role.OUT_LEN: lambda: ulong(8),
            Role.LAST_OUT: lambda: None,
            Role.LAST_OUT_LEN: lambda: None,
            Role.FILL: lambda: host.room(8),
            Role.NEW_OBJECT: lambda: host.room(8),
            Role.NEW_OBJECT_OR_NULL: lambda: host.room(8),
            Role.RESULT: lambda: host.memory(ulong(*[16] * 32)),
            Role.RESULT_OR_NULL: lambda: host.memory(ulong(*[16] * 32)),
            Role.VALUE: lambda: VALUES.get((row.name, name), 0),
            Role.PARAMETER: lambda: None,
            Role.POINTER: lambda: None,
        }
        return make[role]()

    def start(self, ops: Op) -> None:
        """Begins operations."""
        for op in Op:
            if op & ops:
                init = next(row for row in FUNCTIONS if row.ops == op and row.phase is Phase.INIT)
                self.host.ok(init.name, *self.words(init))

    def call(self, row: Function, spoilt: dict[int, Word] | None = None) -> str:
        """The call with some of its arguments replaced."""
        words = self.words(row)
        for number, word in (spoilt or {}).items():
            words[number] = word
        return self.host.rv(row.name, *words)

    def call_in_order(self, row: Function, spoilt: dict[int, Word] | None = None) -> str:
        """The same, with the operation begun that it belongs to."""
        if row.phase is not Phase.INIT:
            self.start(row.ops)
        return self.call(row, spoilt)


def start(program: Program, module: Path, members: tuple[Table, Table], directory: Path) -> Application:
    """A host with a group for each member."""
    groups: list[Table] = [
        {"label": member["name"], "serial": str(number), "members": [member["name"]]}
        for number, member in enumerate(members)
    ]
    conf = write_config(directory / "pkcs11-ha.toml", members, groups, ha={"log": f"file:{directory}/ha.log"})
    env = {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": str(directory)}
    host = Host(program("host"), module, env=env)
    host.ok("C_Initialize", None)
    slot, other_slot = host.slots()
    return Application(host, slot, other_slot)


class Shared:
    """The application that many tests share, while it lives: a crash fails the test that caused it, and no other."""

    def __init__(self, make: Callable[[], Application]) -> None:
        self._make = make
        self._application: Application | None = None

    @contextmanager
    def lend(self) -> Iterator[Application]:
        if self._application is None or not self._application.host.alive:
            self.close()
            self._application = self._make()
        self._application.begin()
        yield self._application
        if self._application.host.alive:
            self._application.end()

    def close(self) -> None:
        if self._application is not None:
            self._application.host.close()


@pytest.fixture(scope="module")
def shared(program: Program, module: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    def member(name: str) -> Table:
        return {
            "name": name,
            "module": str(program("libyes")),
            "token": "pkcs11:token=yes",
            "instance": "own",
        }

    directory = tmp_path_factory.mktemp("yes")
    applications = Shared(lambda: start(program, module, (member("one"), member("two")), directory))
    yield applications
    applications.close()


@pytest.fixture(scope="module")
def shared_on_real_tokens(
    program: Program, module: Path, pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("real")
    applications = Shared(lambda: start(program, module, (pair.east.member(), pair.west.member()), directory))
    yield applications
    applications.close()


@pytest.fixture
def application(shared: Shared) -> Iterator[Application]:
    with shared.lend() as lent:
        yield lent


@pytest.fixture
def on_real_tokens(shared_on_real_tokens: Shared) -> Iterator[Application]:
    with shared_on_real_tokens.lend() as lent:
        yield lent


def rows(*, skip: tuple[str, ...] = ()) -> list[Function]:
    return [row for row in FUNCTIONS if row.name not in ("C_Finalize", *skip)]


def arguments(row: Function, *roles: Role) -> list[tuple[int, str]]:
    """Number and name of the arguments with one of these roles."""
    return [
        (number, argument.name)
        for number, (role, argument) in enumerate(zip(row.roles, PROTOTYPES[row.name], strict=True))
        if role in roles
    ]


def each(*roles: Role, without: tuple[str, ...] = ()) -> list[tuple[Function, int, str]]:
    """Every argument of every function that has one of these roles."""
    return [
        (row, number, name)
        for row in FUNCTIONS
        for number, name in arguments(row, *roles)
        if row.name not in without
    ]


def by_name(value: object) -> str | None:
    return value.name if isinstance(value, Function) else None


# ---- nothing wrong


@pytest.mark.parametrize("row", rows(), ids=by_name)
def test_a_call_that_is_in_order_is_carried_out(row: Function, application: Application) -> None:
    """So that the tests below fail for what they spoil and for nothing else."""
    assert application.call_in_order(row) == ANSWERS.get(row.name, "CKR_OK")


# ---- pointers


@pytest.mark.parametrize(
    ("row", "number", "name"), each(Role.OUT_LEN, Role.NEW_OBJECT, Role.RESULT, Role.MECHANISM), ids=by_name
)
def test_null_where_there_must_be_something(
    row: Function, number: int, name: str, application: Application
) -> None:
    assert application.call_in_order(row, {number: None}) == "CKR_ARGUMENTS_BAD", name


@pytest.mark.parametrize("length", [1, *HUGE], ids=hex)
@pytest.mark.parametrize(
    ("row", "number", "name"), each(Role.IN, Role.FILL, Role.TEMPLATE, Role.ANSWERS), ids=by_name
)
def test_null_with_a_length(
    row: Function, number: int, name: str, length: int, application: Application
) -> None:
    assert application.call_in_order(row, {number: None, number + 1: length}) == "CKR_ARGUMENTS_BAD", name


@pytest.mark.parametrize(("row", "number", "name"), each(Role.IN, Role.TEMPLATE, Role.ANSWERS), ids=by_name)
def test_null_without_a_length_is_nothing_to_read(
    row: Function, number: int, name: str, application: Application
) -> None:
    rv = application.call_in_order(row, {number: None, number + 1: 0})
    # Without a user name it is an ordinary login.
    assert rv in (ANSWERS.get(row.name, "CKR_OK"), "CKR_OK"), name


@pytest.mark.parametrize("capacity", [0, *HUGE], ids=hex)
@pytest.mark.parametrize(
    ("row", "number", "name"), each(Role.OUT, without=("C_GetOperationState",)), ids=by_name
)
def test_null_for_an_output_asks_for_its_length_whatever_the_capacity(
    row: Function, number: int, name: str, capacity: int, application: Application
) -> None:
    spoilt: dict[int, Word] = {number: None, number + 1: ulong(capacity)}
    assert application.call_in_order(row, spoilt) == "CKR_OK", name
    if row.phase in (Phase.SINGLE, Phase.FINAL):  # the operation waits for the real call
        assert application.call(row) == "CKR_OK"
        assert application.call(row) == "CKR_OPERATION_NOT_INITIALIZED"


@pytest.mark.parametrize("count", [1 << 60, 1 << 61 | 1, (1 << 64) - 1], ids=hex)
def test_more_attributes_than_memory_can_hold(count: int, application: Application) -> None:
    """Times the size of one it would come out small."""
    row = FUNCTIONS[INDEX["C_GetAttributeValue"]]
    assert application.call(row, {3: count}) == "CKR_HOST_MEMORY"


# ---- handles


def bad_sessions(application: Application) -> dict[str, int]:
    good = application.session
    return {
        "none": 0,
        "dead": application.dead_session,
        "of a member": 101,
        "an object": application.object,
        "generation before": good - (1 << 20),
        "generation to come": good + (1 << 20),
        "index only": good & (1 << 20) - 1,
        "no such index": good + 1000,
        "last index": good | (1 << 20) - 1,
        "lock bits": good | 1 << 62,
        "all ones": (1 << 64) - 1,
        "random": random.Random(1).getrandbits(64),
    }


@pytest.mark.parametrize(("row", "number", "name"), each(Role.SESSION), ids=by_name)
def test_a_bad_session_handle(row: Function, number: int, name: str, application: Application) -> None:
    found = {
        kind: application.call(row, {number: handle}) for kind, handle in bad_sessions(application).items()
    }
    assert found == dict.fromkeys(found, "CKR_SESSION_HANDLE_INVALID"), name
    application.host.ok("C_GetSessionInfo", application.session, application.host.room(32))


@pytest.mark.parametrize(("row", "number", "name"), each(Role.OBJECT), ids=by_name)
def test_a_bad_object_handle(row: Function, number: int, name: str, application: Application) -> None:
    good = application.object
    handles = {
        "none": 0,
        "dead": application.dead_object,
        "of a member": 102,
        "of another slot": application.other_object,
        "a session": application.session,
        "generation to come": good + (1 << 22),
        "index only": good & (1 << 22) - 1,
        "last index": good | (1 << 22) - 1,
        "all ones": (1 << 64) - 1,
        "random": random.Random(2).getrandbits(64),
    }
    if row.phase is not Phase.INIT:
        application.start(row.ops)
    found = {kind: application.call(row, {number: handle}) for kind, handle in handles.items()}
    assert found == dict.fromkeys(found, BAD_OBJECT.get(name, "CKR_KEY_HANDLE_INVALID"))


@pytest.mark.parametrize(("row", "number", "name"), each(Role.SLOT), ids=by_name)
def test_a_bad_slot(row: Function, number: int, name: str, application: Application) -> None:
    found = {slot: application.call(row, {number: slot}) for slot in (2, 7, 1 << 32, 1 << 63, (1 << 64) - 1)}
    assert found == dict.fromkeys(found, "CKR_SLOT_ID_INVALID"), name


# ---- order

BELONG = [row for row in FUNCTIONS if row.ops and row.phase is not Phase.INIT]
INITS = [row for row in FUNCTIONS if row.phase is Phase.INIT]
ENDS = [row for row in FUNCTIONS if row.phase in (Phase.SINGLE, Phase.FINAL)]


@pytest.mark.parametrize("row", BELONG, ids=by_name)
def test_without_its_init(row: Function, application: Application) -> None:
    assert application.call(row) == "CKR_OPERATION_NOT_INITIALIZED"


@pytest.mark.parametrize("row", BELONG, ids=by_name)
def test_with_the_init_of_everything_else(row: Function, application: Application) -> None:
    everything = Op(sum(init.ops for init in INITS))
    application.start(everything & ~row.ops)
    assert application.call(row) == "CKR_OPERATION_NOT_INITIALIZED"


@pytest.mark.parametrize("row", [row for row in BELONG if row.ops.bit_count() > 1], ids=by_name)
def test_with_one_of_its_two_inits(row: Function, application: Application) -> None:
    for op in Op:
        if op & row.ops:
            application.start(op)
            assert application.call(row) == "CKR_OPERATION_NOT_INITIALIZED"
            application.end()
            application.begin()


@pytest.mark.parametrize("row", INITS, ids=by_name)
def test_init_twice(row: Function, application: Application) -> None:
    assert application.call(row) == "CKR_OK"
    assert application.call(row) == "CKR_OPERATION_ACTIVE"
    other = application.host.open(application.slot)
    assert application.call(row, {0: other}) == "CKR_OK"  # a session's operations are its own


@pytest.mark.parametrize("row", ENDS, ids=by_name)
def test_after_its_end(row: Function, application: Application) -> None:
    assert application.call_in_order(row) == "CKR_OK"
    for other in BELONG:
        if other.ops == row.ops:
            assert (other.name, application.call(other)) == (other.name, "CKR_OPERATION_NOT_INITIALIZED")
    assert application.call_in_order(row) == "CKR_OK"


# ---- life


@pytest.fixture
def stopped(application: Application) -> Iterator[Application]:
    """After C_Finalize, with the handles of the run before."""
    application.host.ok("C_Finalize", None)
    yield application
    application.host.ok("C_Initialize", None)
    application.slot, application.other_slot = application.host.slots()
    application.begin()


@pytest.mark.parametrize("row", rows(skip=("C_Initialize", *ALWAYS)), ids=by_name)
def test_after_c_finalize(row: Function, stopped: Application) -> None:
    assert stopped.call(row) == "CKR_CRYPTOKI_NOT_INITIALIZED"
    assert stopped.host.rv(row.name) == "CKR_CRYPTOKI_NOT_INITIALIZED"


@pytest.mark.parametrize("name", ALWAYS)
def test_interfaces_after_c_finalize(name: str, stopped: Application) -> None:
    assert stopped.call(FUNCTIONS[INDEX[name]]) == "CKR_OK"


def test_handles_of_the_run_before_are_dead(application: Application) -> None:
    before = application.session, application.object
    application.host.ok("C_Finalize", None)
    application.host.ok("C_Initialize", None)
    application.begin()
    info = application.host.room(32)
    assert application.host.rv("C_GetSessionInfo", before[0], info) == "CKR_SESSION_HANDLE_INVALID"
    size = application.host.room(8)
    rv = application.host.rv("C_GetObjectSize", application.session, before[1], size)
    assert rv == "CKR_OBJECT_HANDLE_INVALID"


# ---- anything


def throw(row: Function, application: Application, times: int) -> None:
    """Zeros, ones, handles of every kind in every place, memory full of zeros. Only memory that there is."""
    dice = random.Random(row.name)
    host = application.host
    zeros = host.memory(bytes(512))
    numbers = (Role.SESSION, Role.SLOT, Role.OBJECT, Role.VALUE, Role.IN_LEN, Role.COUNT)
    for _ in range(times):
        if host.rv("C_GetSessionInfo", application.session, host.room(32)) != "CKR_OK":
            application.end()
            application.begin()
        handles = [application.session, application.object, application.dead_session, application.dead_object]
        words: list[Word] = []
        for role in row.roles:
            if role not in numbers:
                words.append(dice.choice([None, zeros]))
            elif role in (Role.IN_LEN, Role.COUNT):
                # More than the memory there is would be a lie that nobody could find out.
                words.append(dice.choice([0, 1, 8] if words[-1] else [0, 1, *HUGE]))
            else:
                words.append(dice.choice([0, 1, 7, *handles, (1 << 64) - 1, dice.getrandbits(64)]))
        rv = host.rv(row.name, *words)
        assert rv.startswith("CKR_"), (words, rv)


THROWN = rows(skip=("C_WaitForSlotEvent",))  # which waits, if it is told to


@pytest.mark.parametrize("row", THROWN, ids=by_name)
def test_any_mixture_of_wrong_arguments_comes_back(row: Function, application: Application) -> None:
    throw(row, application, 40)


@pytest.mark.parametrize("row", THROWN, ids=by_name)
def test_any_mixture_of_wrong_arguments_leaves_a_real_token_at_work(
    row: Function, on_real_tokens: Application, pair: Pair
) -> None:
    throw(row, on_real_tokens, 10)
    host = on_real_tokens.host
    on_real_tokens.end()
    session = host.open(on_real_tokens.slot)
    host.login(session, PIN)
    (key,) = host.find(session, PRIVATE)
    pair.verify(host.sign(session, key, DIGEST))
