"""Sessions of a group against their reference: handles, logins, operations and finds, over deaths of members.

The rules are those of PKCS#11 5.2 (operations), 5.6 (sessions), 5.11 (the size of what is put out).
"""

from __future__ import annotations

import ctypes
import hmac
from collections.abc import Callable, Mapping
from ctypes import byref, c_ulong
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from demo.members import Worker
from tests import p11
from tests.conftest import GroupFactory
from tests.ha.app import Application, bare, code, working_until
from tests.models import seconds, tell
from tests.models.members import Members

NAMES = ("east", "west")
STORIES, STEPS = 60, 50
PIN, SO_PIN = "123456", "12345678"
SECRET, LABEL = b"k" * 32, "model"
KEY: p11.Template = {p11.CKA_CLASS: p11.CKO_SECRET_KEY, p11.CKA_LABEL: LABEL}
SIZE = 32

MECHANISM: dict[str, int] = {
    "Digest": p11.CKM_SHA256,
    "Sign": p11.CKM_SHA256_HMAC,
    "Verify": p11.CKM_SHA256_HMAC,
}
STATES = {
    (False, None): "CKS_RO_PUBLIC_SESSION",
    (True, None): "CKS_RW_PUBLIC_SESSION",
    (False, p11.CKU_USER): "CKS_RO_USER_FUNCTIONS",
    (True, p11.CKU_USER): "CKS_RW_USER_FUNCTIONS",
    (True, p11.CKU_SO): "CKS_RW_SO_FUNCTIONS",
}

kinds = st.sampled_from(sorted(MECHANISM))
pieces = st.binary(min_size=1, max_size=4)
which = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3])
strays = st.sampled_from([False, False, False, True])  # whether it is of another kind than the one under way


@dataclass
class Operation:
    """One that is under way: what it has taken, and the member that has taken it, in which life."""

    kind: str
    at: tuple[str, int]
    taken: bytes = b""

    def result(self, more: bytes = b"") -> bytes:
        data = self.taken + more
        return sha256(data).digest() if self.kind == "Digest" else hmac.digest(SECRET, data, "sha256")


@dataclass
class Session:
    """A session of the reference."""

    real: p11.Session
    rw: bool
    operation: Operation | None = None
    found: list[int] | None = None  # what a search has yet to say


class Machine(RuleBasedStateMachine):
    """Calls are drawn that go on with what is under way, and now and then one that does not belong there."""

    def __init__(self, start: Callable[[], Application], workers: Mapping[str, Worker]) -> None:
        super().__init__()
        self.start_application = start
        self.members = Members(workers)

    @initialize(kinds=st.lists(st.booleans(), max_size=3))
    def begin(self, kinds: list[bool]) -> None:
        self.app = self.start_application()
        self.slot = self.app.slot
        self.sessions: list[Session] = []
        self.handles: list[int] = [0, 1 << 20]  # never a session's, or not any more
        self.user: int | None = None
        session = self.app.open()
        self.key = session.find_one(KEY)
        session.close()
        self.handles.append(session.handle)
        for rw in [True, *kinds]:
            self.open(rw)

    def teardown(self) -> None:
        if hasattr(self, "app"):
            self.app.module.finalize()
        self.members.start_all()

    def pick(self, which: int) -> tuple[p11.Session, Session | None]:
        """One that is open, or a handle that is none."""
        if which < len(self.sessions):
            return self.sessions[which].real, self.sessions[which]
        return p11.Session(self.app.module, self.handles[which % len(self.handles)]), None

    def kind(self, session: Session | None, kind: str, stray: bool) -> str:
        return session.operation.kind if session and session.operation and not stray else kind

    def ended(self, session: Session) -> None:
        self.sessions.remove(session)
        self.handles.insert(0, session.real.handle)
        if not self.sessions:
            self.user = None

    # ---- members

    @precondition(lambda self: self.members.running == set(NAMES))  # one is always left
    @rule(name=st.sampled_from(NAMES))
    def kill(self, name: str) -> None:
        self.members.kill(name)

    @precondition(lambda self: self.members.running != set(NAMES))
    @rule()
    def start(self) -> None:
        """The death is noticed at the latest when all are asked, and the return waited for: so one is always there."""
        session = self.app.open()
        session.find({})
        session.close()
        self.handles.insert(0, session.handle)
        self.members.start_all()
        working_until(self.app.module.slots, lambda: not self.app.away(), "the member is back")

    @precondition(lambda self: self.members.running == set(NAMES))
    @rule(which=which)
    def kill_under(self, which: int) -> None:
        """The member that has taken the input of an operation."""
        _, session = self.pick(which)
        if session and session.operation and session.operation.taken:
            self.members.kill(session.operation.at[0])  # which lives, or the other one would not be alone

    # ---- sessions

    @rule(rw=st.booleans())
    def open(self, rw: bool) -> None:
        refused = not rw and self.user == p11.CKU_SO
        opened: list[p11.Session] = []
        said = code(lambda: opened.append(self.app.open(rw=rw)))
        assert said == ("CKR_SESSION_READ_WRITE_SO_EXISTS" if refused else "CKR_OK")
        for real in opened:
            assert real.handle not in {*self.handles, *(each.real.handle for each in self.sessions)}
            self.sessions.append(Session(real, rw))

    @precondition(lambda self: len(self.sessions) != 1)
    @rule(which=which)
    def close(self, which: int) -> None:
        real, session = self.pick(which)
        assert code(real.close) == ("CKR_OK" if session else "CKR_SESSION_HANDLE_INVALID")
        if session:
            self.ended(session)

    @rule()
    def close_all(self) -> None:
        self.app.module.close_all(self.slot)
        for session in list(self.sessions):
            self.ended(session)
        self.open(True)

    @rule(
        which=which,
        user=st.sampled_from([p11.CKU_USER, p11.CKU_SO]),
        right=st.sampled_from([True, True, False]),
    )
    def login(self, which: int, user: int, right: bool) -> None:
        real, session = self.pick(which)
        pin = (PIN if user == p11.CKU_USER else SO_PIN) if right else "000000000"
        if session is None:
            expected = "CKR_SESSION_HANDLE_INVALID"
        elif self.user is not None:
            same = self.user == user
            expected = "CKR_USER_ALREADY_LOGGED_IN" if same else "CKR_USER_ANOTHER_ALREADY_LOGGED_IN"
        elif user == p11.CKU_SO and not all(each.rw for each in self.sessions):
            expected = "CKR_SESSION_READ_ONLY_EXISTS"
        else:
            expected = "CKR_OK" if right else "CKR_PIN_INCORRECT"
        assert code(lambda: real.login(pin, user)) == expected
        if expected == "CKR_OK":
            self.user = user

    @rule(which=which)
    def logout(self, which: int) -> None:
        real, session = self.pick(which)
        expected = "CKR_OK" if self.user is not None else "CKR_USER_NOT_LOGGED_IN"
        assert code(real.logout) == (expected if session else "CKR_SESSION_HANDLE_INVALID")
        if session:
            self.user = None

    # ---- operations

    def told(self, session: Session | None, kind: str = "") -> str:
        """What a call has to say before it does anything: of the handle, of the operation, of its loss."""
        if session is None:
            return "CKR_SESSION_HANDLE_INVALID"
        operation = session.operation
        if kind and (operation is None or operation.kind != kind):
            return "CKR_OPERATION_NOT_INITIALIZED"
        if operation and operation.taken and operation.at != self.where(operation.at[0]):
            session.operation = None
            return "CKR_DEVICE_ERROR"
        return "CKR_OK"

    def goes_on(self, session: Session | None) -> None:
        """One that had taken nothing may have gone to another member."""
        if session and session.operation:
            session.operation.at = self.where(self.app.served(session.real))

    def where(self, name: str) -> tuple[str, int]:
        return name, self.members.life[name]

    @rule(which=which, kind=kinds)
    def init(self, which: int, kind: str) -> None:
        real, session = self.pick(which)
        key = () if kind == "Digest" else (self.key,)
        if session and session.operation and session.operation.kind == kind:
            expected = "CKR_OPERATION_ACTIVE"
        else:
            expected = self.told(session)
            if session and session.operation:
                expected = "CKR_OPERATION_ACTIVE"  # SoftHSM has one at a time
        assert code(lambda: real.init(f"C_{kind}Init", MECHANISM[kind], *key)) == expected
        if session and expected == "CKR_OK":
            session.operation = Operation(kind, self.where(self.app.served(real)))

    @rule(which=which, kind=kinds, stray=strays, data=pieces)
    def update(self, which: int, kind: str, stray: bool, data: bytes) -> None:
        real, session = self.pick(which)
        kind = self.kind(session, kind, stray)
        expected = self.told(session, kind)
        assert code(lambda: real.feed(f"C_{kind}Update", data)) == expected
        if session and session.operation and expected == "CKR_OK":
            session.operation.taken += data
            self.goes_on(session)

    @rule(
        which=which,
        kind=kinds,
        stray=strays,
        data=pieces,
        room=st.sampled_from([None, SIZE - 1, SIZE - 1, SIZE, SIZE + 8]),
    )
    def end(self, which: int, kind: str, stray: bool, data: bytes, room: int | None) -> None:
        """C_Sign or C_SignFinal, as it has taken input or not; `room` None asks for the size."""
        real, session = self.pick(which)
        kind = self.kind(session, kind, stray)
        operation = session.operation if session else None
        final = operation is not None and operation.taken != b""
        arguments: list[object] = [] if final else [data, len(data)]
        name = f"C_{kind}Final" if final else f"C_{kind}"
        expected = self.told(session, kind)
        if kind == "Verify":
            right = operation is not None and room is not None
            given = operation.result(b"" if final else data) if operation and right else bytes(SIZE)
            if expected == "CKR_OK" and not right:
                expected = "CKR_SIGNATURE_INVALID"
            assert code(lambda: real.call(name, *arguments, given, len(given))) == expected
        else:
            size = c_ulong(room or 0)
            buffer = None if room is None else ctypes.create_string_buffer(max(room, 1))
            if expected == "CKR_OK" and room is not None and room < SIZE:
                expected = "CKR_BUFFER_TOO_SMALL"
            assert code(lambda: real.call(name, *arguments, buffer, byref(size))) == expected
            if expected in ("CKR_OK", "CKR_BUFFER_TOO_SMALL"):
                assert size.value == SIZE
            if expected == "CKR_BUFFER_TOO_SMALL" or (expected == "CKR_OK" and room is None):
                self.goes_on(session)
                return
            if expected == "CKR_OK":
                assert operation
                assert buffer
                assert buffer.raw[:SIZE] == operation.result(b"" if final else data)
        if session and expected in ("CKR_OK", "CKR_SIGNATURE_INVALID"):
            session.operation = None

    @rule(which=which)
    def random(self, which: int) -> None:
        real, session = self.pick(which)
        expected = self.told(session)
        assert code(lambda: real.random(8)) == expected
        if expected == "CKR_OK":
            self.goes_on(session)

    # ---- finds

    @rule(which=which)
    def find_init(self, which: int) -> None:
        real, session = self.pick(which)
        expected = "CKR_SESSION_HANDLE_INVALID" if session is None else "CKR_OK"
        operation = session.operation if session else None
        if session and session.found is not None:
            expected = "CKR_OPERATION_ACTIVE"
        if operation and operation.at == self.where(operation.at[0]):
            expected = "CKR_OPERATION_ACTIVE"  # its member, a SoftHSM, allows no search beside it
        assert code(lambda: real.call("C_FindObjectsInit", None, 0)) == expected
        if session and expected == "CKR_OK":
            session.found = [self.key]

    @rule(which=which)
    def find(self, which: int) -> None:
        real, session = self.pick(which)
        found, count = (c_ulong * 8)(), c_ulong()
        expected = "CKR_OPERATION_NOT_INITIALIZED" if session else "CKR_SESSION_HANDLE_INVALID"
        if session and session.found is not None:
            expected = "CKR_OK"
        assert code(lambda: real.call("C_FindObjects", found, 8, byref(count))) == expected
        if session and session.found is not None:
            assert found[: count.value] == session.found
            session.found = []

    @rule(which=which)
    def find_final(self, which: int) -> None:
        real, session = self.pick(which)
        expected = "CKR_OPERATION_NOT_INITIALIZED" if session else "CKR_SESSION_HANDLE_INVALID"
        if session and session.found is not None:
            expected = "CKR_OK"
        assert code(lambda: real.call("C_FindObjectsFinal")) == expected
        if session:
            session.found = None

    # ---- always

    @invariant()
    def sessions_say_what_they_are(self) -> None:
        if not hasattr(self, "app"):
            return
        for session in self.sessions:
            info = session.real.info()
            assert info.state == getattr(p11, STATES[session.rw, self.user])
            assert bool(info.flags & p11.CKF_RW_SESSION) == session.rw
        for handle in self.handles:
            assert code(p11.Session(self.app.module, handle).info) == "CKR_SESSION_HANDLE_INVALID"
        token = p11._TokenInfo()
        self.app.module.call("C_GetTokenInfo", self.slot, byref(token))
        assert (token.sessions, token.rw_sessions) == (
            len(self.sessions),
            sum(each.rw for each in self.sessions),
        )


@pytest.fixture(scope="module")
def pair(workers: Mapping[str, Worker]) -> dict[str, Worker]:
    """Two members with one key that needs no login, so that no logout ends its operations."""
    template: dict[int, p11.Value] = {
        **KEY,
        p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET,
        p11.CKA_TOKEN: True,
        p11.CKA_PRIVATE: False,
        p11.CKA_VALUE: SECRET,
        p11.CKA_SIGN: True,
        p11.CKA_VERIFY: True,
    }
    made = {name: workers[name] for name in NAMES}
    for worker in made.values():
        with bare(worker.token) as session:
            session.create(template)
    return made


@pytest.mark.timeout(seconds(240))
def test_sessions_are_what_their_reference_says(
    module: Path, group: GroupFactory, pair: Mapping[str, Worker]
) -> None:
    where = group(
        *(worker.member() for worker in pair.values()),
        balance="round-robin",
        recovery={"interval_s": 1e-9},
    )

    def start() -> Application:
        app = Application(p11.Module(module), where)
        app.module.initialize()
        return app

    tell(lambda: Machine(start, pair), STORIES, STEPS)
