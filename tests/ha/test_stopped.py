"""A member that neither answers nor dies (its server is stopped): what goes past it, and what does not wait for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from demo.members import Toml
from pkcs11_ha.runtime.member import Member
from tests import p11
from tests.conftest import GroupFactory
from tests.ha import operations
from tests.ha.app import SOON, stopped, until, working_until
from tests.ha.conftest import Pair, StartFactory
from tests.ha.keys import DIGEST
from tests.ha.operations import Use
from tests.ha.program import LIMIT_S, Program

CONNECT_S = 0.5
QUICK: dict[str, Toml] = {"interval_s": 3600, "connect_timeout_s": CONNECT_S}


def check_prompt(took: dict[str, float]) -> None:
    assert {name: seconds for name, seconds in took.items() if seconds > LIMIT_S} == {}


@pytest.mark.parametrize("stopped", [["east"], ["west"], ["east", "west"]])
def test_program_starts_works_and_ends_beside_a_stopped_member(
    pair: Pair, group: GroupFactory, module: Path, stopped: list[str]
) -> None:
    group(*pair.members(), recovery=QUICK)
    for name in stopped:
        pair.named(name).stop()
    program = Program(
        module,
        """
        timed("slots", module.slots)
        timed("token", lambda: module.token(0).serial)
        timed("open", lambda: module.open(0).handle > 0)
        session = answers["open"] is True and module.open(0)
        if session:
            timed("login", lambda: session.login("123456"))
            timed("find", lambda: len(session.find({})))
            timed("random", lambda: len(session.random(8)))
        """,
    )
    took, answers = program.end()
    check_prompt(took)
    assert answers["C_Initialize"] is None
    assert took["C_Initialize"] < CONNECT_S + 1
    assert answers["C_Finalize"] is None
    if len(stopped) == 2:
        assert (answers["slots"], answers["token"]) == ([], "CKR_TOKEN_NOT_PRESENT")
    else:
        assert (answers["slots"], answers["token"]) == ([0], "1599447001")
        assert (answers["login"], answers["find"], answers["random"]) == (None, 6, 8)


def test_member_that_stops_later_holds_up_neither_queries_nor_the_end(
    pair: Pair, group: GroupFactory, module: Path
) -> None:
    """The application is logged in, so there is a login to end on a member that does not answer."""
    group(*pair.members(), recovery=QUICK)
    program = Program(
        module,
        """
        session = module.open(0)
        session.login("123456")
        session.find({})
        print("ready", flush=True)
        sys.stdin.readline()
        timed("slots", module.slots)
        timed("token", lambda: module.token(0).serial)
        timed("mechanisms", lambda: len(module.mechanisms(0)) > 0)
        timed("info", lambda: session.info().state)
        timed("open", lambda: module.open(0).handle > 0)
        timed("status", lambda: len(module.ha_status(0).members))
        """,
    )
    program.wait_for("ready")
    pair.east.stop()
    program.go_on()
    took, answers = program.end()
    check_prompt(took)
    assert answers["slots"] == [0]
    assert answers["token"] == "1599447001"
    assert answers["C_Finalize"] is None


def test_calls_go_past_one_that_is_stuck(pair: Pair, start: StartFactory) -> None:
    """Least-busy sees that the member has a call inside; and when its server dies at last, that call is done, too."""
    use = Use.begin(start(*pair.members(), balance="least-busy"), pair.keys, pair.pin)
    other = use.app.open()
    for _ in range(4):
        use.keys.check_ec(other.sign(p11.CKM_ECDSA, use.ec, DIGEST))
        operations.sign_ecdsa(use)
    signatures: list[bytes] = []

    def sign() -> None:
        signatures.extend(other.sign(p11.CKM_ECDSA, use.ec, DIGEST) for _ in range(2))  # one of them on each

    with stopped(pair.east):
        stuck = threading.Thread(target=sign, daemon=True)
        stuck.start()
        until(lambda: _in_flight(use, "east") == 1, "the call is inside")
        for _ in range(20):
            operations.sign_ecdsa(use)
            assert use.app.served(use.session) == "west"
        pair.east.kill()
        stuck.join(20)
    assert not stuck.is_alive()
    assert len(signatures) == 2
    for signature in signatures:
        use.keys.check_ec(signature)
    assert use.app.away() == {"east"}


def _in_flight(use: Use, name: str) -> int:
    from pkcs11_ha.runtime import native

    return int(native.lib.ha_member_in_flight(use.app.core.members[name].native))


def test_attempt_at_a_stopped_member_costs_its_time_once(
    pair: Pair, start: StartFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = Use.begin(
        start(*pair.members(), recovery=dict(SOON) | {"connect_timeout_s": CONNECT_S}), pair.keys, pair.pin
    )
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    pair.east.start()
    with stopped(pair.east):
        working_until(
            lambda: operations.sign_ecdsa(use),
            lambda: use.app.events("recovery.failed"),
            "an attempt has failed",
        )
        attempts, attempt = [], use.app.core.attempt

        def count(member: Member) -> bool:
            attempts.append(member.name)
            return attempt(member)

        monkeypatch.setattr(use.app.core, "attempt", count)
        deadline = time.monotonic() + 1  # twenty intervals
        while time.monotonic() < deadline:
            operations.sign_ecdsa(use)
        assert attempts == []  # the one that is under way is the only one
        pair.east.cont()
    working_until(lambda: operations.sign_ecdsa(use), lambda: not use.app.away(), "the member is back")
    for _ in range(4):
        operations.sign_ecdsa(use)


def test_others_do_not_wait_for_an_attempt(pair: Pair, start: StartFactory) -> None:
    """One caller makes it, for as long as it may take; the other callers go on with the members that are there."""
    use = Use.begin(
        start(*pair.members(), recovery=dict(SOON) | {"connect_timeout_s": 3}), pair.keys, pair.pin
    )
    sessions = [use.app.open() for _ in range(4)]
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    pair.east.start()
    counts = [0] * len(sessions)
    attempt_over = threading.Event()

    def sign(number: int) -> None:
        while not attempt_over.is_set():
            use.keys.check_ec(sessions[number].sign(p11.CKM_ECDSA, use.ec, DIGEST))
            counts[number] += 1

    threads = [threading.Thread(target=sign, args=(n,), daemon=True) for n in range(len(sessions))]
    with stopped(pair.east):
        for thread in threads:
            thread.start()
        until(lambda: use.app.core.members["east"].connecting, "an attempt is under way")
        before = list(counts)
        until(lambda: sum(n > m + 20 for n, m in zip(counts, before, strict=True)) >= 3, "the others sign")
        assert use.app.events("recovery.failed") == []  # all that within the one attempt
        attempt_over.set()
        pair.east.cont()
    for thread in threads:
        thread.join(20)
    working_until(lambda: operations.sign_ecdsa(use), lambda: not use.app.away(), "the member is back")


@pytest.mark.parametrize("name", ["C_Finalize", "C_Logout", "C_CloseSession"])
def test_leaving_does_not_wait_for_a_stopped_member(
    pair: Pair, group: GroupFactory, module: Path, name: str
) -> None:
    group(*pair.members(), recovery=QUICK)
    leave = {
        "C_Finalize": "pass",
        "C_Logout": 'timed("C_Logout", session.logout)',
        "C_CloseSession": 'timed("C_CloseSession", session.close)',
    }[name]
    program = Program(
        module,
        f"""
        session = module.open(0)
        session.login("123456")
        key = session.find({{p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: "ec"}})[0]
        for _ in range(4):
            session.sign(p11.CKM_ECDSA, key, bytes(32))
        print("ready", flush=True)
        sys.stdin.readline()
        {leave}
        """,
    )
    program.wait_for("ready")
    pair.west.stop()
    program.go_on()
    took, _ = program.end()
    check_prompt(took)


def test_stopped_member_that_is_not_needed_is_not_noticed(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members(), balance="primary-first"), pair.keys, pair.pin)
    with stopped(pair.west):
        for each in (operations.sign_ecdsa, operations.encrypt_aes, operations.random, operations.token_info):
            each(use)
        assert use.app.away() == set()
        pair.west.cont()
    operations.find(use)
    assert use.app.away() == set()
