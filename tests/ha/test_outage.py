"""All members die, or one stays away: what is answered, how it comes back, and what the status says meanwhile."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests import p11
from tests.conftest import SoftTokenFactory
from tests.ha import operations
from tests.ha.app import FAR, SOON, Application, code, until, working_until
from tests.ha.conftest import Pair, StartFactory
from tests.ha.keys import DIGEST, private
from tests.ha.operations import Use

PROMPT_S = 5.0  # an answer that waits for a dead member would take far longer


def promptly(call: Callable[[], object]) -> str:
    """The code of a call, which must not hang."""
    began = time.monotonic()
    answer = code(call)
    assert time.monotonic() - began < PROMPT_S
    return answer


def kill_all(pair: Pair) -> None:
    for server in pair.servers:
        server.kill()


# ---- total loss


SESSION_CALLS: dict[str, Callable[[Use], object]] = {
    "C_SignInit": operations.sign_ecdsa,
    "C_VerifyInit": operations.verify_ecdsa,
    "C_EncryptInit": operations.encrypt_aes,
    "C_DigestInit": operations.digest,
    "C_GenerateRandom": operations.random,
    "C_GetAttributeValue": operations.attributes,
    "C_FindObjectsInit": operations.find,
    "C_CreateObject": operations.create_session_object,
    "C_GenerateKey": operations.generate_session_key,
    "C_GetSessionInfo": operations.session_info,
    "C_Logout": lambda use: use.session.logout(),
    "C_SetPIN": lambda use: use.session.call("C_SetPIN", b"123456", 6, b"654321", 6),
}
SLOT_CALLS: dict[str, Callable[[Use], object]] = {
    "C_OpenSession": lambda use: use.app.open(),
    "C_GetTokenInfo": operations.token_info,
    "C_GetMechanismList": operations.mechanisms,
}


def test_every_call_after_a_total_loss_fails_at_once_as_it_should(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    operations.sign_ecdsa(use)
    kill_all(pair)
    assert promptly(lambda: operations.sign_ecdsa(use)) == "CKR_DEVICE_ERROR"
    for name, call in SESSION_CALLS.items():
        assert (name, promptly(partial(call, use))) == (name, "CKR_DEVICE_ERROR")
    for name, call in SLOT_CALLS.items():
        assert (name, promptly(partial(call, use))) == (name, "CKR_TOKEN_NOT_PRESENT")
    assert use.app.module.slots() == []
    assert use.app.module.slots(present=False) == [use.app.slot]
    assert use.app.away() == {"east", "west"}


@pytest.mark.parametrize(
    "name", [name for name in SESSION_CALLS if name not in ("C_GetSessionInfo", "C_SetPIN")]
)
def test_call_that_finds_out_about_a_total_loss_says_device_error(
    pair: Pair, start: StartFactory, name: str
) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    operations.EVERY["sign_ecdsa"](use)
    kill_all(pair)
    expected = "CKR_OK" if name == "C_Logout" else "CKR_DEVICE_ERROR"  # logging out needs no member
    assert promptly(lambda: SESSION_CALLS[name](use)) == expected


def test_token_query_that_finds_out_about_a_total_loss_says_token_not_present(
    pair: Pair, start: StartFactory
) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    kill_all(pair)
    assert promptly(lambda: operations.token_info(use)) == "CKR_TOKEN_NOT_PRESENT"
    assert use.app.away() == {"east", "west"}


@pytest.mark.parametrize("first", ["east", "west"])
def test_same_session_and_keys_work_again_when_one_is_back(
    pair: Pair, start: StartFactory, first: str
) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON), pair.keys, pair.pin)
    for name in ("sign_ecdsa", "sign_rsa", "sign_hmac", "encrypt_aes", "attributes"):
        operations.EVERY[name](use)
    kill_all(pair)
    assert code(lambda: operations.sign_ecdsa(use)) == "CKR_DEVICE_ERROR"
    pair.named(first).start()
    until(lambda: code(lambda: operations.sign_ecdsa(use)) == "CKR_OK", "the same key signs again")
    for name in ("sign_rsa", "sign_hmac", "encrypt_aes", "decrypt_aes", "attributes", "find", "session_info"):
        operations.EVERY[name](use)
    assert use.app.served(use.session) in ("", first)
    assert use.app.away() == {"east", "west"} - {first}
    pair.other(first).start()
    working_until(lambda: operations.sign_ecdsa(use), lambda: not use.app.away(), "the other is back, too")
    for _ in range(4):
        operations.find(use)
        operations.sign_ecdsa(use)


def test_group_of_one_comes_back_with_its_handles(pair: Pair, start: StartFactory) -> None:
    """There never was another member to compare its keys with."""
    use = Use.begin(start(pair.east.member(), recovery=SOON), pair.keys, pair.pin)
    for name in ("sign_ecdsa", "sign_hmac", "encrypt_aes"):
        operations.EVERY[name](use)
    pair.east.kill()
    assert code(lambda: operations.sign_ecdsa(use)) == "CKR_DEVICE_ERROR"
    pair.east.start()
    until(lambda: code(lambda: operations.sign_ecdsa(use)) == "CKR_OK", "the same key signs again")
    for name in ("sign_hmac", "encrypt_aes", "sign_rsa", "attributes", "find"):
        operations.EVERY[name](use)


def test_application_without_a_login_comes_back_without_one(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members(), recovery=SOON)
    session = app.open()
    kill_all(pair)
    assert code(lambda: session.random(8)) == "CKR_DEVICE_ERROR"
    pair.west.start()
    until(lambda: code(lambda: session.random(8)) == "CKR_OK", "random numbers come again")
    assert session.info().state == p11.CKS_RW_PUBLIC_SESSION
    assert session.find(private("ec")) == []
    session.login(pair.pin)
    pair.keys.check_ec(session.sign(p11.CKM_ECDSA, session.find_one(private("ec")), DIGEST))


# ---- coming back


def test_returned_member_serves_again_with_the_old_handles(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON, balance="round-robin"), pair.keys, pair.pin)
    for server in (pair.east, pair.west, pair.east):
        for name in ("sign_ecdsa", "sign_hmac", "encrypt_aes"):
            operations.EVERY[name](use)
        server.kill()
        working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
        server.start()
        working_until(lambda: operations.sign_ecdsa(use), lambda: not use.app.away(), "the member is back")
        served = set()
        for _ in range(4):
            operations.sign_ecdsa(use)
            served.add(use.app.served(use.session))
        assert served == {"east", "west"}
    assert len(use.app.events("member.recovered")) == 3


def test_member_comes_back_within_a_call_that_asks_for_the_slots(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON), pair.keys, pair.pin)
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    pair.east.start()
    until(lambda: use.app.module.slots() and not use.app.away(), "C_GetSlotList has brought it back")


def test_idle_application_gets_a_member_back_at_its_next_call_in_mode_call(
    pair: Pair, start: StartFactory
) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON), pair.keys, pair.pin)
    use.app.core  # noqa: B018 (imported before the silence)
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    pair.east.start()
    # Nothing can be waited for where nothing is to happen: six times what mode "background" takes.
    time.sleep(1.5)
    assert use.app.away() == {"east"}
    assert use.app.events("recovery.failed") == []
    operations.sign_ecdsa(use)
    assert use.app.away() == set()


def test_idle_application_gets_a_member_back_by_itself_in_mode_background(
    pair: Pair, start: StartFactory
) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON | {"mode": "background"}), pair.keys, pair.pin)
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    pair.east.start()
    use.app.wait_for_event("member.recovered", "east")
    assert use.app.away() == set()


def test_idle_application_gets_its_only_member_back_by_itself_in_mode_background(
    pair: Pair, start: StartFactory
) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON | {"mode": "background"}), pair.keys, pair.pin)
    operations.sign_ecdsa(use)
    kill_all(pair)
    assert code(lambda: operations.sign_ecdsa(use)) == "CKR_DEVICE_ERROR"
    pair.west.start()
    use.app.wait_for_event("group.returned")
    operations.sign_ecdsa(use)


def test_application_that_forbids_threads_gets_none(pair: Pair, start: StartFactory) -> None:
    """Not even with mode "background", and its members come back within its calls."""
    app = start(*pair.members(), recovery=SOON | {"mode": "background"})
    app.module.finalize()
    before = set(threading.enumerate())
    app.module.initialize(p11.CKF_OS_LOCKING_OK | p11.CKF_LIBRARY_CANT_CREATE_OS_THREADS)
    use = Use.begin(app, pair.keys, pair.pin)
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    pair.east.start()
    working_until(lambda: operations.sign_ecdsa(use), lambda: not use.app.away(), "the member is back")
    assert set(threading.enumerate()) <= before


def test_after_n_attempts_a_member_stays_out_until_the_next_run(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON | {"attempts": 2}), pair.keys, pair.pin)
    pair.east.kill()
    working_until(
        lambda: operations.sign_ecdsa(use),
        lambda: use.app.events("recovery.exhausted"),
        "both attempts have failed",
    )
    assert len(use.app.events("recovery.failed", "east")) == 2
    pair.east.start()
    deadline = time.monotonic() + 1  # twenty intervals
    while time.monotonic() < deadline:
        operations.sign_ecdsa(use)
    assert use.app.away() == {"east"}
    assert len(use.app.events("recovery.failed", "east")) == 2

    use.app.module.finalize()
    use.app.module.initialize()
    again = Use.begin(use.app, pair.keys, pair.pin)
    operations.sign_ecdsa(again)
    assert use.app.away() == set()


def test_zero_attempts_is_no_recovery(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON | {"attempts": 0}), pair.keys, pair.pin)
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    pair.east.start()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        operations.sign_ecdsa(use)
    assert use.app.away() == {"east"}
    assert use.app.events("recovery.failed") == []


@pytest.mark.parametrize("mode", ["call", "background"])
def test_member_absent_at_the_start_appears(pair: Pair, start: StartFactory, mode: str) -> None:
    pair.east.kill()
    app = start(*pair.members(), recovery=SOON | {"mode": mode})
    assert app.away() == {"east"}
    use = Use.begin(app, pair.keys, pair.pin)
    operations.sign_ecdsa(use)
    pair.east.start()
    if mode == "background":
        app.wait_for_event("member.recovered", "east")
    working_until(lambda: operations.sign_ecdsa(use), lambda: not app.away(), "the member has appeared")
    served = set()
    for _ in range(6):
        operations.sign_ecdsa(use)
        served.add(app.served(use.session))
    assert served == {"east", "west"}


def test_all_members_absent_at_the_start_appear(pair: Pair, start: StartFactory) -> None:
    kill_all(pair)
    app = start(*pair.members(), recovery=SOON)
    assert app.module.slots() == []
    assert code(app.open) == "CKR_TOKEN_NOT_PRESENT"
    pair.west.start()
    until(app.is_present, "the group is present")
    operations.sign_ecdsa(Use.begin(app, pair.keys, pair.pin))


# ---- the status


def test_status_tells_a_loss_once_and_then_that_the_token_is_missing(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON), pair.keys, pair.pin)
    east, west = (server.token.serial for server in pair.servers)
    assert use.app.status() == {east: "CKR_OK", west: "CKR_OK"}
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    assert use.app.status() == {east: "CKR_DEVICE_ERROR", west: "CKR_OK"}
    for _ in range(3):
        assert use.app.status() == {east: "CKR_TOKEN_NOT_PRESENT", west: "CKR_OK"}
    pair.east.start()
    working_until(lambda: operations.sign_ecdsa(use), lambda: not use.app.away(), "the member is back")
    assert use.app.status() == {east: "CKR_OK", west: "CKR_OK"}
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the second loss is noticed")
    assert use.app.status()[east] == "CKR_DEVICE_ERROR"  # a new loss is told anew
    assert use.app.status()[east] == "CKR_TOKEN_NOT_PRESENT"


def test_status_of_a_group_that_vanished_can_still_be_read(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    kill_all(pair)
    assert code(lambda: operations.sign_ecdsa(use)) == "CKR_DEVICE_ERROR"
    assert set(use.app.status().values()) == {"CKR_DEVICE_ERROR"}
    assert set(use.app.status().values()) == {"CKR_TOKEN_NOT_PRESENT"}
    assert use.app.module.ha_status(use.app.slot).group == "1599447001"


# ---- slot events


def test_group_that_vanishes_and_returns_is_an_event(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members(), recovery=SOON), pair.keys, pair.pin)
    assert use.app.slot_event() is None
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    assert use.app.slot_event() is None  # the token is still there
    pair.west.kill()
    assert code(lambda: operations.sign_ecdsa(use)) == "CKR_DEVICE_ERROR"
    assert use.app.slot_event() == use.app.slot
    assert use.app.slot_event() is None
    pair.west.start()
    until(lambda: code(lambda: operations.sign_ecdsa(use)) == "CKR_OK", "the group is back")
    assert use.app.slot_event() == use.app.slot
    assert use.app.slot_event() is None


class Waiter:
    """A thread in a blocking C_WaitForSlotEvent."""

    def __init__(self, app: Application) -> None:
        self.outcome: list[int | str | None] = []
        self.thread = threading.Thread(target=self._wait, args=(app,), daemon=True)
        self.thread.start()

    def _wait(self, app: Application) -> None:
        try:
            self.outcome.append(app.slot_event(block=True))
        except p11.CkError as error:
            self.outcome.append(error.name)

    def result(self) -> int | str | None:
        self.thread.join(PROMPT_S)
        assert not self.thread.is_alive()
        return self.outcome[0]


def test_blocking_wait_ends_when_the_group_vanishes(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    slot = use.app.slot
    waiter = Waiter(use.app)
    kill_all(pair)
    assert code(lambda: operations.sign_ecdsa(use)) == "CKR_DEVICE_ERROR"
    assert waiter.result() == slot


def test_blocking_wait_ends_at_finalize(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members())
    waiters = [Waiter(app) for _ in range(3)]
    app.open()
    assert promptly(app.module.finalize) == "CKR_OK"
    assert {waiter.result() for waiter in waiters} == {"CKR_CRYPTOKI_NOT_INITIALIZED"}


def test_event_of_a_run_before_is_not_told_in_the_next(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members(), recovery=FAR), pair.keys, pair.pin)
    kill_all(pair)
    assert code(lambda: operations.sign_ecdsa(use)) == "CKR_DEVICE_ERROR"
    use.app.module.finalize()
    pair.east.start()
    use.app.module.initialize()
    assert use.app.slot_event() is None


def test_library_that_two_members_share_is_restarted_when_both_are_away(
    directory: Path, soft_token: SoftTokenFactory, start: StartFactory
) -> None:
    """SoftHSM looks for its tokens when it is initialised, and never again."""
    east = soft_token("east")
    subprocess.run(
        "softhsm2-util --init-token --free --label west --so-pin 12345678 --pin 123456".split(),
        env=os.environ | east.env,
        check=True,
        capture_output=True,
    )
    shared = dict(east.member()) | {"instance": "shared"}
    west = shared | {"name": "west", "token": "pkcs11:token=west"}
    store, elsewhere = east.directory / "tokens", directory / "elsewhere"
    store.rename(elsewhere)
    store.mkdir()
    app = start(shared, west, recovery=SOON)
    assert app.away() == {"east", "west"}
    store.rmdir()
    elsewhere.rename(store)
    until(lambda: app.module.slots() and not app.away(), "both are back")
    app.login("123456").random(8)
