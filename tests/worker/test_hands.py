"""Calls with a limit in the application's own process: who is late is left behind, and the group goes on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.members import SoftToken, Table
from pkcs11_ha.runtime.library import HandedInstance
from tests import p11
from tests.fake import PIN, FakeToken, secret_key, signing_key
from tests.ha import operations
from tests.ha.app import FAR, SOON, Application, code, stopped, until, working_until
from tests.ha.conftest import FakeFactory, Pair, StartFactory
from tests.ha.operations import Use

LIMIT_S = 0.2


def instance(app: Application, name: str) -> HandedInstance:
    found = app.core.members[name].instance
    assert isinstance(found, HandedInstance)
    return found


def left_behind(app: Application, name: str) -> int:
    return instance(app, name).left_behind


def threads() -> set[str]:
    """Also those that Python knows nothing of."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


@pytest.fixture
def fakes(fake: FakeFactory) -> tuple[FakeToken, FakeToken]:
    return fake("east", signing_key()), fake("west", signing_key())


def limited(*tokens: FakeToken, limit_s: float = LIMIT_S, profile: str = "auto") -> list[Table]:
    return [token.member(call_timeout_s=limit_s, profile=profile) for token in tokens]


Fakes = tuple[FakeToken, FakeToken]


def random(session: p11.Session) -> Callable[[], object]:
    return lambda: session.random(8)


def test_late_call_is_done_elsewhere_and_its_member_returns_when_it_has(
    fakes: Fakes, start: StartFactory
) -> None:
    east, _ = fakes
    app = start(*limited(*fakes), recovery=SOON, balance="primary-first")
    session = app.login(PIN)
    with east["C_GenerateRandom"].holding():
        began = time.monotonic()
        session.random(8)
        assert LIMIT_S <= time.monotonic() - began < LIMIT_S + 2
        app.wait_for_event("member.lost", "east")
        assert left_behind(app, "east") == 1
        finalised = east.calls("C_Finalize")
        working_until(random(session), lambda: app.events("member.recovered", "east"), "it is back")
        assert east.calls("C_Finalize") == finalised
    until(lambda: left_behind(app, "east") == 0, "the late call has come back")


@pytest.mark.parametrize(
    "function",
    [
        *("C_Login", "C_FindObjectsInit", "C_GetSessionInfo", "C_GetAttributeValue", "C_SignInit", "C_Sign"),
        *("C_SetAttributeValue", "C_DestroyObject"),
    ],
)
def test_member_that_hangs_in_one_function_alone_is_lost_at_once(
    function: str, fake: FakeFactory, start: StartFactory
) -> None:
    """Though it answers a probe, and whoever made the call: the application, or the core for a proof or a login."""
    east, west = fake("east", secret_key()), fake("west", secret_key())
    app = start(*limited(east, west), recovery=FAR, balance="primary-first")
    with east[function].holding():
        began = time.monotonic()
        session = app.login(PIN)
        for _ in range(2):
            key = session.find_one({p11.CKA_LABEL: "secret"})
            session.sign(p11.CKM_SHA256_HMAC, key, b"data")
        session.set(key, {p11.CKA_ID: b"new"})
        session.destroy(key)
        assert LIMIT_S <= time.monotonic() - began < LIMIT_S + 2
        assert (len(app.events("member.lost", "east")), app.away()) == (1, {"east"})
        assert left_behind(app, "east") == 1
    assert west.shared.pin_tries == 1
    assert west.labels() == []
    until(lambda: left_behind(app, "east") == 0, "the late call has come back")
    assert east.shared.pin_tries == 1


def test_with_somebody_inside_nothing_is_finalised_nor_started(fakes: Fakes, start: StartFactory) -> None:
    """All its calls hang: each attempt is one more left behind, until there are too many."""
    east, _ = fakes
    app = start(*limited(*fakes), recovery=SOON, balance="primary-first")
    session = app.login(PIN)
    before = east.calls("C_Finalize"), east.calls("C_Initialize")
    for name in ("C_GenerateRandom", "C_GetSlotList"):
        east[name].hold = 1
    working_until(
        random(session),
        lambda: (
            "8 calls that were late are still inside it" in "".join(app.events("recovery.failed", "east"))
        ),
        "it is closed",
    )
    assert left_behind(app, "east") == 8
    calls = east.calls("C_GetSlotList")
    failed = len(app.events("recovery.failed", "east"))
    working_until(
        random(session), lambda: len(app.events("recovery.failed", "east")) > failed + 2, "it is tried on"
    )
    assert (east.calls("C_GetSlotList"), left_behind(app, "east")) == (calls, 8)
    assert (east.calls("C_Finalize"), east.calls("C_Initialize")) == before
    for name in ("C_GenerateRandom", "C_GetSlotList"):
        east[name].hold = 0
    working_until(random(session), lambda: app.events("member.recovered", "east"), "it is back")
    assert left_behind(app, "east") == 0
    assert east.calls("C_Initialize") == before[1] + 1


def test_start_that_is_late_is_not_begun_a_second_time(fakes: Fakes, start: StartFactory) -> None:
    """Once it has come back, the library is ours as if it had been in time."""
    east, _ = fakes
    recovery = SOON | {"connect_timeout_s": 0.5}
    with east["C_Initialize"].holding():
        app = start(*limited(*fakes), recovery=recovery)
        until(app.is_present, "the other one, whose start had to wait, is there")
        session = app.login(PIN)
        working_until(random(session), lambda: len(app.events("recovery.failed", "east")) > 2, "it is tried")
        assert east.calls("C_Initialize") == 1
        assert "a call that was late is still inside it" in app.events("recovery.failed", "east")[-1]
    working_until(random(session), lambda: app.events("member.recovered", "east"), "it is back")
    assert not instance(app, "east").foreign
    app.module.finalize()
    assert east.calls("C_Finalize") == 1


def test_end_does_not_wait_for_who_was_left_behind(fakes: Fakes, start: StartFactory) -> None:
    """Nor finalises the library under him; the next run has a copy of its own."""
    east, _ = fakes
    app = start(*limited(*fakes), recovery=FAR, balance="primary-first")
    session = app.login(PIN)
    with east["C_GenerateRandom"].holding():
        session.random(8)
        began = time.monotonic()
        app.module.finalize()
        assert time.monotonic() - began < 2
        assert east.calls("C_Finalize") == 0
    app.module.initialize()
    app.login(PIN).random(8)
    assert app.away() == set()
    app.module.finalize()
    assert east.calls("C_Finalize") == 1


def test_others_in_the_same_library_go_on(fakes: Fakes, start: StartFactory) -> None:
    """A member of which one call hangs is lost for that; calls that are under way in it come to their end."""
    east, _ = fakes
    app = start(*limited(*fakes, limit_s=1), recovery=FAR, balance="primary-first")
    first, second = app.login(PIN), app.open()
    slow = threading.Thread(target=second.random, args=(8,))
    with east["C_GenerateRandom"].holding():
        first_call = threading.Thread(target=first.random, args=(8,))
        first_call.start()
        east["C_GenerateRandom"].wait_held()
        time.sleep(0.5)
        slow.start()
        east["C_GenerateRandom"].wait_held(2)
        first_call.join()
        assert left_behind(app, "east") == 1
    slow.join()
    assert app.served(second) == "east"


def test_stopped_server_is_left_for_a_new_connection(pair: Pair, start: StartFactory) -> None:
    """p11-kit's client gives a new list, with a state of its own, while the calls on the old one hang."""
    members = [server.member(call_timeout_s=LIMIT_S) for server in pair.servers]
    use = Use.begin(start(*members, recovery=SOON | {"connect_timeout_s": 0.3}), pair.keys, pair.pin)
    with stopped(pair.east):
        working_until(
            lambda: operations.sign_ecdsa(use), lambda: use.app.away() == {"east"}, "its loss is noticed"
        )
        working_until(
            lambda: operations.sign_ecdsa(use), lambda: left_behind(use.app, "east") == 8, "it is closed"
        )
        operations.sign_ecdsa(use)
        pair.east.cont()
        working_until(lambda: operations.sign_ecdsa(use), lambda: not use.app.away(), "it is back")
    until(lambda: left_behind(use.app, "east") == 0, "who was left behind has come back")


def feeding(app: Application, session: p11.Session) -> p11.Session:
    """It has taken a part of a signature."""
    key = session.find_one({p11.CKA_LABEL: "signing"})
    session.init("C_SignInit", p11.CKM_RSA_PKCS, key)
    session.feed("C_SignUpdate", b"abc")
    assert app.served(session) == "east"
    return session


def test_who_is_late_in_an_operation_is_not_asked_to_tidy_up(fakes: Fakes, start: StartFactory) -> None:
    """That would take the limit of another call: the session there ends with the member's life."""
    east, _ = fakes
    slow = {"cryptography": 0.5, "information": 10}
    members = [token.member(call_timeout_s=slow) for token in fakes]
    app = start(*members, recovery=FAR, balance="primary-first")
    session = feeding(app, app.login(PIN))
    with east["C_SignUpdate"].holding(), east["C_CloseSession"].holding():
        began = time.monotonic()
        session.feed("C_SignUpdate", b"def")
        assert time.monotonic() - began < 0.5 + 3
    assert app.away() == {"east"}
    tag = session.output("C_SignFinal")
    session.init("C_SignInit", p11.CKM_RSA_PKCS, session.find_one({p11.CKA_LABEL: "signing"}))
    session.feed("C_SignUpdate", b"abcdef")
    assert session.output("C_SignFinal") == tag


def test_who_is_late_in_a_cancellation_is_lost(fakes: Fakes, start: StartFactory) -> None:
    """What was to be cancelled ends with it."""
    east, _ = fakes
    app = start(*limited(*fakes), recovery=FAR, balance="primary-first")
    session = feeding(app, app.login(PIN))
    with east["C_CloseSession"].holding():
        session.call("C_SessionCancel", p11.CKF_SIGN)
        assert app.away() == {"east"}
    session.sign(p11.CKM_RSA_PKCS, session.find_one({p11.CKA_LABEL: "signing"}), b"abc")


def test_more_callers_than_threads(fakes: Fakes, start: StartFactory) -> None:
    east, _ = fakes
    before = threads()
    app = start(*limited(east, limit_s=20))
    app.login(PIN)
    sessions = [app.open() for _ in range(48)]
    with east["C_GenerateRandom"].holding():
        callers = [threading.Thread(target=session.random, args=(8,)) for session in sessions]
        for caller in callers:
            caller.start()
        east["C_GenerateRandom"].wait_held(32)
    for caller in callers:
        caller.join()
    assert (east.calls("C_GenerateRandom"), app.away()) == (48, set())
    until(lambda: len(threads() - before) <= 32 + 1, "there are no more than there may be, and the watch")
    app.module.finalize()
    until(lambda: threads() <= before, "the threads have gone")


def test_wait_for_ones_turn_counts_in_the_limit(fakes: Fakes, start: StartFactory) -> None:
    """Where calls take turns, one that is late is the end of all that wait behind it; nobody follows it inside."""
    east, _ = fakes
    app = start(*limited(*fakes, limit_s=1, profile="p11-kit"), recovery=SOON, balance="primary-first")
    app.login(PIN)
    sessions = [app.open() for _ in range(8)]
    took: list[float] = []

    def timed(session: p11.Session) -> None:
        began = time.monotonic()
        session.random(8)
        took.append(time.monotonic() - began)

    finalised, initialised = east.calls("C_Finalize"), east.calls("C_Initialize")
    with east["C_GenerateRandom"].holding():
        callers = [threading.Thread(target=timed, args=(session,)) for session in sessions]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(took) == 8
        assert max(took) < 1 + 2
        assert (east["C_GenerateRandom"].held, left_behind(app, "east")) == (1, 1)
        working_until(
            random(sessions[0]),
            lambda: "a call that was late is still inside it" in "".join(app.events("recovery.failed")),
            "it is tried",
        )
        assert (east.calls("C_Finalize"), east.calls("C_Initialize")) == (finalised, initialised)
    working_until(random(sessions[0]), lambda: app.events("member.recovered", "east"), "it is back")
    assert (east.calls("C_Finalize"), east.calls("C_Initialize")) == (finalised + 1, initialised + 1)
    assert not instance(app, "east").foreign


def test_caller_for_whom_there_is_no_thread_has_a_limit_too(fakes: Fakes, start: StartFactory) -> None:
    east, _ = fakes
    app = start(*limited(east, limit_s=0.5), recovery=FAR)
    app.login(PIN)
    sessions = [app.open() for _ in range(40)]
    said: list[str] = []
    with east["C_GenerateRandom"].holding():
        callers = [
            threading.Thread(target=lambda each=session: said.append(code(random(each))))
            for session in sessions
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(10)
        assert said == ["CKR_DEVICE_ERROR"] * 40


def test_without_a_limit_there_is_no_thread(fakes: Fakes, start: StartFactory) -> None:
    app = start(*(token.member() for token in fakes))
    before = threads()
    app.login(PIN).random(8)
    assert threads() <= before  # of those that were there some may have ended


def test_application_that_forbids_threads_has_no_limits(fakes: Fakes, start: StartFactory) -> None:
    """A member that is to have one is refused."""
    east, west = fakes
    app = start(*limited(east), west.member())
    app.module.finalize()
    before = threads()
    app.module.initialize(p11.CKF_OS_LOCKING_OK | p11.CKF_LIBRARY_CANT_CREATE_OS_THREADS)
    assert app.away() == {"east"}
    assert (
        "call_timeout_s takes threads, and the application forbids them"
        in app.events("member.lost", "east")[-1]
    )
    app.login(PIN).random(8)
    assert threads() <= before  # of those that were there some may have ended


def test_no_signal_comes_to_a_thread_of_ours(
    tokens: tuple[SoftToken, SoftToken], start: StartFactory
) -> None:
    before = {path.name for path in Path("/proc/self/task").iterdir()}
    start(*(token.member(call_timeout_s=20) for token in tokens))
    python = {str(thread.native_id) for thread in threading.enumerate()}
    ours = {path.name for path in Path("/proc/self/task").iterdir()} - before - python
    assert ours
    for name in ours:
        status = Path(f"/proc/self/task/{name}/status").read_text()
        blocked = int(status.split("SigBlk:")[1].split()[0], 16)
        assert blocked & (1 << 12 | 1 << 1 | 1 << 14) == (1 << 12 | 1 << 1 | 1 << 14)  # PIPE, INT, TERM


def test_child_of_a_fork_has_hands_of_its_own(fakes: Fakes, start: StartFactory) -> None:
    """Also while a call of the parent's is late."""
    east, _ = fakes
    others = sockets()
    app = start(*limited(*fakes), recovery=FAR, balance="primary-first")
    session = app.login(PIN)
    with east["C_GenerateRandom"].holding():
        session.random(8)
        assert sockets() > others
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, in_child(app, others).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as said:
            assert said.read() == "CKR_CRYPTOKI_NOT_INITIALIZED set() west"
        os.waitpid(child, 0)
        assert left_behind(app, "east") == 1
    session.random(8)


def sockets() -> set[str]:
    links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)]
    return {link for link in links if link.startswith("socket:")}


def in_child(app: Application, others: set[str]) -> str:
    left = sockets() - others
    said = p11.rv_name(app.module.rv("C_GetInfo", None))
    app.module.initialize()
    session = app.login(PIN)
    session.random(8)
    served = app.served(session)
    app.module.finalize()
    return f"{said} {left} {served}"
