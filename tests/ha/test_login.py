"""Login: one PIN, several tokens, and no try too many on any of them."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.members import SoftToken
from tests import fake as fakes
from tests import p11
from tests.fake import PIN, SO_PIN, FakeToken
from tests.ha.app import SOON, Application, bare, code, until
from tests.ha.conftest import FakeFactory, Pair, StartFactory
from tests.ha.keys import DIGEST, Keys, ec_private, private

KEY: p11.Template = {p11.CKA_LABEL: "signing"}


def tries(*tokens: FakeToken) -> list[int]:
    return [int(token.shared.pin_tries) for token in tokens]


@pytest.fixture
def three(fake: FakeFactory) -> list[FakeToken]:
    return [fake(name, fakes.signing_key()) for name in ("east", "west", "north")]


def set_pin(session: p11.Session, old: str, new: str) -> str:
    return code(lambda: session.call("C_SetPIN", old.encode(), len(old), new.encode(), len(new)))


# ---- tries


def test_right_pin_is_tried_once_on_each_member(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three))
    session = app.login(PIN)
    assert tries(*three) == [1, 1, 1]
    assert session.info().state == p11.CKS_RW_USER_FUNCTIONS
    for _ in range(6):
        session.sign(p11.CKM_RSA_PKCS, session.find_one(KEY), DIGEST)
    assert tries(*three) == [1, 1, 1]


def test_wrong_pin_costs_one_try_on_one_token(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    assert code(lambda: session.login("wrong")) == "CKR_PIN_INCORRECT"
    assert sum(tries(*three)) == 1
    assert app.away() == set()
    assert session.info().state == p11.CKS_RW_PUBLIC_SESSION
    session.login(PIN)
    assert app.away() == set()


def test_wrong_pin_is_not_kept(three: list[FakeToken], start: StartFactory) -> None:
    """A member that returns must not be sent it."""
    app = start(*(token.member() for token in three), recovery=SOON)
    session = app.open()
    assert code(lambda: session.login("wrong")) == "CKR_PIN_INCORRECT"
    three[1].shared.absent = 1
    assert code(lambda: [session.random(8) for _ in range(6)]) == "CKR_OK"
    three[1].shared.absent = 0
    until(lambda: session.random(8) and not app.away(), "the member is back")
    assert sum(tries(*three)) == 1


@pytest.mark.parametrize(
    "refusal", ["CKR_PIN_INCORRECT", "CKR_PIN_LOCKED", "CKR_PIN_EXPIRED", "CKR_PIN_LEN_RANGE"]
)
def test_refusal_of_the_first_member_is_the_answer(
    three: list[FakeToken], start: StartFactory, refusal: str
) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    for token in three:
        token["C_Login"].answers(getattr(p11, refusal))
    assert code(lambda: session.login(PIN)) == refusal
    assert sum(token.calls("C_Login") for token in three) == 1
    assert len(app.events("login.refused")) == 1


def test_member_that_alone_refuses_the_pin_is_left_out_and_not_tried_again(
    three: list[FakeToken], start: StartFactory
) -> None:
    three[1].shared.pin = b"of its own"
    app = start(*(token.member() for token in three), recovery=SOON, balance="round-robin")
    session = app.login(PIN)
    assert app.away() == {"west"}
    assert len(app.events("login.member_refused", "west")) == 1
    key = session.find_one(KEY)
    for _ in range(30):
        session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    threading.Event().wait(0.3)  # six intervals in which nothing is to happen
    session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    assert tries(*three) == [1, 1, 1]
    session.logout()
    session.login(PIN)
    assert int(three[1].shared.pin_tries) == 1


def test_first_member_that_is_dead_passes_the_pin_on(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    three[0].dies()
    session.login(PIN)
    assert tries(*three) == [0, 1, 1]
    assert app.away() == {"east"}


def test_member_that_died_takes_no_try_of_a_wrong_pin_with_it(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    three[0].dies()
    assert code(lambda: session.login("wrong")) == "CKR_PIN_INCORRECT"
    assert tries(*three) == [0, 1, 0]


def test_login_that_a_member_stumbles_over_is_tried_again_there(
    three: list[FakeToken], start: StartFactory
) -> None:
    """SoftHSM does so when several processes log in at once; its answer says nothing about the PIN."""
    app = start(*(token.member() for token in three))
    session = app.open()
    three[1]["C_Login"].answers(p11.CKR_GENERAL_ERROR, times=1)
    session.login(PIN)
    assert app.away() == set()
    assert tries(*three) == [1, 1, 1]


def test_member_that_stumbles_over_every_login_is_left_out_for_another(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    three[0]["C_Login"].answers(p11.CKR_GENERAL_ERROR)
    session.login(PIN)
    assert app.away() == {"east"}
    assert tries(*three) == [0, 1, 1]


def test_wrong_pin_is_refused_by_the_member_that_looks_at_it(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    three[0]["C_Login"].answers(p11.CKR_GENERAL_ERROR)
    assert code(lambda: session.login("wrong")) == "CKR_PIN_INCORRECT"
    assert app.away() == set()
    assert tries(*three) == [0, 1, 0]


def test_what_all_members_stumble_over_is_the_answer_and_loses_none(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    for token in three:
        token["C_Login"].answers(p11.CKR_GENERAL_ERROR)
    assert code(lambda: session.login(PIN)) == "CKR_GENERAL_ERROR"
    assert app.away() == set()
    assert app.events("member.lost") == []
    for token in three:
        token["C_Login"].works()
    session.login(PIN)


def test_stumble_is_not_tried_again_where_a_pin_was_wrong(
    three: list[FakeToken], start: StartFactory
) -> None:
    """The answer may be that token's way of saying so: the next one may be its last, and costs the others one."""
    app = start(*(token.member() for token in three))
    session = app.open()
    for token in three:
        token["C_Login"].answers(p11.CKR_GENERAL_ERROR)
        token.shared.flags |= p11.CKF_USER_PIN_COUNT_LOW
    assert code(lambda: session.login(PIN)) == "CKR_GENERAL_ERROR"
    assert [token.calls("C_Login") for token in three] == [1, 0, 0]


def test_stumble_is_tried_again_only_when_the_token_can_say_that_no_pin_was_wrong(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(three[0].member())
    session = app.open()
    three[0]["C_Login"].answers(p11.CKR_GENERAL_ERROR, times=1)
    three[0]["C_GetTokenInfo"].answers(p11.CKR_GENERAL_ERROR, times=2)
    session.login(PIN)
    assert three[0].calls("C_Login") == 2
    assert three[0].calls("C_GetTokenInfo") >= 3


def test_library_that_denies_a_pin_which_its_token_shows_is_restarted(
    three: list[FakeToken], start: StartFactory
) -> None:
    """As SoftHSM does that read a file while another process wrote it, on every member at once."""
    app = start(*(token.member() for token in three), recovery={"interval_s": 3600})
    session = app.open()
    for token in three:
        token["C_Login"].answers(p11.CKR_USER_PIN_NOT_INITIALIZED, times=4)
    session.login(PIN)
    assert app.away() == set()
    assert len(app.events("member.recovered")) == 3
    assert tries(*three) == [1, 1, 1]


def test_login_on_a_member_without_a_session_left_says_so(
    three: list[FakeToken], start: StartFactory
) -> None:
    """It forgot the core's own session, and opens no other."""
    app = start(*(token.member() for token in three))
    session = app.open()
    three[0].shared.forget_sessions += 1
    three[0]["C_OpenSession"].answers(p11.CKR_SESSION_COUNT)
    assert code(lambda: session.login(PIN)) == "CKR_SESSION_COUNT"
    three[0]["C_OpenSession"].works()
    session.login(PIN)
    assert tries(*three) == [1, 1, 1]


def test_pin_that_was_changed_elsewhere_costs_a_returning_member_one_try(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three), recovery=SOON)
    session = app.login(PIN)
    key = session.find_one(KEY)
    three[1].shared.absent = 1
    until(lambda: session.sign(p11.CKM_RSA_PKCS, key, DIGEST) and app.away(), "the loss is noticed")
    three[1].shared.pin = b"another"
    three[1].shared.absent = 0
    until(
        lambda: session.sign(p11.CKM_RSA_PKCS, key, DIGEST) and app.events("recovery.stopped"), "it was tried"
    )
    threading.Event().wait(0.3)
    for _ in range(10):
        session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    assert int(three[1].shared.pin_failures) == 1
    assert app.away() == {"west"}


# ---- states and rules


def test_session_states_and_rules_of_the_user(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members())
    read_only, read_write = app.open(rw=False), app.open()
    assert read_only.info().state == p11.CKS_RO_PUBLIC_SESSION
    assert read_write.info().state == p11.CKS_RW_PUBLIC_SESSION
    assert code(read_only.logout) == "CKR_USER_NOT_LOGGED_IN"
    read_only.login(pair.pin)
    assert read_only.info().state == p11.CKS_RO_USER_FUNCTIONS
    assert read_write.info().state == p11.CKS_RW_USER_FUNCTIONS
    assert app.open(rw=False).info().state == p11.CKS_RO_USER_FUNCTIONS
    assert code(lambda: read_write.login(pair.pin)) == "CKR_USER_ALREADY_LOGGED_IN"
    assert code(lambda: read_write.login("12345678", p11.CKU_SO)) == "CKR_USER_ANOTHER_ALREADY_LOGGED_IN"
    assert code(lambda: read_write.login(pair.pin, 77)) == "CKR_USER_TYPE_INVALID"
    note: p11.Template = {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_LABEL: "note"}
    assert code(lambda: read_only.create(note)) == "CKR_SESSION_READ_ONLY"
    read_only.logout()
    assert read_write.info().state == p11.CKS_RW_PUBLIC_SESSION


def test_rules_of_the_security_officer(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members())
    read_only = app.open(rw=False)
    session = app.open()
    so_pin = pair.east.token.so_pin
    assert code(lambda: session.login(so_pin, p11.CKU_SO)) == "CKR_SESSION_READ_ONLY_EXISTS"
    read_only.random(8)
    read_only.close()
    session.login(so_pin, p11.CKU_SO)
    assert session.info().state == p11.CKS_RW_SO_FUNCTIONS
    assert code(lambda: app.open(rw=False)) == "CKR_SESSION_READ_WRITE_SO_EXISTS"
    assert app.open().info().state == p11.CKS_RW_SO_FUNCTIONS
    assert session.find(private("ec")) == []
    assert code(lambda: session.login(pair.pin)) == "CKR_USER_ANOTHER_ALREADY_LOGGED_IN"
    session.logout()
    session.login(pair.pin)


def test_wrong_pin_of_the_security_officer_costs_one_try(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    assert code(lambda: session.login("wrong", p11.CKU_SO)) == "CKR_PIN_INCORRECT"
    assert sum(tries(*three)) == 1


def test_closing_the_last_session_logs_out(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members())
    first, second = app.login(pair.pin), app.open()
    first.close()
    assert second.info().state == p11.CKS_RW_USER_FUNCTIONS
    second.close()
    assert app.open().info().state == p11.CKS_RW_PUBLIC_SESSION
    app.module.close_all(app.slot)
    session = app.login(pair.pin)
    app.module.close_all(app.slot)
    assert code(session.info) == "CKR_SESSION_HANDLE_INVALID"
    assert app.open().info().state == p11.CKS_RW_PUBLIC_SESSION


def test_logout_reaches_every_member(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three))
    session = app.login(PIN)
    session.logout()
    assert [token.calls("C_Logout") for token in three] == [1, 1, 1]


def test_logout_while_a_member_is_on_its_way_back_leaves_nobody_logged_in(
    three: list[FakeToken], start: StartFactory
) -> None:
    """Else its private objects would be seen by who has logged out."""
    app = start(*(token.member() for token in three), recovery=SOON | {"mode": "background"})
    session = app.login(PIN)
    session.find(KEY)
    east = three[0]
    with east["C_Login"].holding():
        east.shared.absent = 1
        until(lambda: session.random(8) and app.away(), "the loss is noticed")
        east.shared.absent = 0
        east["C_Login"].wait_held()
        session.logout()
    until(lambda: not app.away(), "the member is back")
    for _ in range(6):
        assert session.find(KEY) == []
    assert session.info().state == p11.CKS_RW_PUBLIC_SESSION


def test_member_that_returns_is_logged_in_before_it_serves(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three), recovery=SOON, balance="round-robin")
    session = app.login(PIN)
    key = session.find_one(KEY)
    three[2].shared.absent = 1
    until(lambda: session.sign(p11.CKM_RSA_PKCS, key, DIGEST) and app.away(), "the loss is noticed")
    three[2].shared.absent = 0
    until(lambda: session.sign(p11.CKM_RSA_PKCS, key, DIGEST) and not app.away(), "the member is back")
    assert tries(*three) == [1, 1, 2]
    served = set()
    for _ in range(6):
        session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
        served.add(app.served(session))
    assert served == {"east", "west", "north"}


def test_pin_that_nobody_looks_at_is_not_believed(three: list[FakeToken], start: StartFactory) -> None:
    """The application is logged in on the tokens by itself; one that is not is enough."""
    app = start(*(token.member() for token in three))
    session = app.open()
    for token in three:
        token["C_Login"].answers(p11.CKR_USER_ALREADY_LOGGED_IN)
    assert code(lambda: session.login("wrong")) == "CKR_USER_ALREADY_LOGGED_IN"
    assert session.info().state == p11.CKS_RW_PUBLIC_SESSION
    (line,) = app.events("login.refused")
    assert ' why="each token is logged in already' in line
    three[2].is_well_again()
    assert code(lambda: session.login("wrong")) == "CKR_PIN_INCORRECT"
    session.login(PIN)
    assert session.info().state == p11.CKS_RW_USER_FUNCTIONS
    assert app.away() == set()


def test_thirty_two_logins_at_once_are_one_login(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three))
    sessions = [app.open() for _ in range(32)]
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda s=session: answers.append(code(lambda: s.login(PIN))))
        for session in sessions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == ["CKR_OK"] + ["CKR_USER_ALREADY_LOGGED_IN"] * 31
    assert tries(*three) == [1, 1, 1]


# ---- members with a PIN of their own


def test_member_with_a_pin_source_gets_its_own_pin(
    three: list[FakeToken], start: StartFactory, directory: Path
) -> None:
    (directory / "pin").write_text("its own\n")
    three[1].shared.pin = b"its own"
    own = three[1].member(pin_source=f"file:{directory}/pin")
    app = start(three[0].member(), own, three[2].member(), balance="round-robin")
    session = app.login(PIN)
    assert app.away() == set()
    assert [int(token.shared.pin_failures) for token in three] == [0, 0, 0]
    key = session.find_one(KEY)
    served = set()
    for _ in range(6):
        session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
        served.add(app.served(session))
    assert served == {"east", "west", "north"}


def test_a_pin_source_that_is_empty_costs_no_try(
    three: list[FakeToken], start: StartFactory, directory: Path
) -> None:
    (directory / "pin").write_text("\n1234")
    app = start(three[0].member(pin_source=f"file:{directory}/pin"), three[1].member(), three[2].member())
    app.login(PIN)
    assert app.away() == {"east"}
    assert tries(*three) == [0, 1, 1]
    (lost,) = app.events("member.lost", "east")
    assert "code=CKR_PIN_INVALID" in lost


def test_member_with_a_pin_source_is_no_judge_of_the_application_s_pin(
    three: list[FakeToken], start: StartFactory, directory: Path
) -> None:
    (directory / "pin").write_text("its own")
    three[0].shared.pin = b"its own"
    own = three[0].member(pin_source=f"file:{directory}/pin")
    app = start(own, three[1].member(), three[2].member())
    session = app.open()
    assert code(lambda: session.login("wrong")) == "CKR_PIN_INCORRECT"
    assert tries(*three) == [0, 1, 0]
    session.login(PIN)
    assert tries(*three) == [1, 2, 1]


def test_application_must_know_a_pin_also_where_all_members_have_their_own(
    three: list[FakeToken], start: StartFactory, directory: Path
) -> None:
    for token in three:
        (directory / token.label).write_text(f"pin of {token.label}")
        token.shared.pin = f"pin of {token.label}".encode()
    app = start(*(token.member(pin_source=f"file:{directory}/{token.label}") for token in three))
    session = app.open()
    assert code(lambda: session.login("wrong")) == "CKR_PIN_INCORRECT"
    assert code(lambda: session.login("pin of west")) == "CKR_PIN_INCORRECT"
    assert tries(*three) == [0, 0, 0]
    session.login("pin of east")
    assert tries(*three) == [1, 1, 1]
    assert session.find_one(KEY)


# ---- where the PIN is and is not


def locked_pages() -> list[str]:
    """Flags of the mappings that core dumps leave out and children of a fork do not get."""
    flags = re.findall(r"^VmFlags: (.*)$", Path("/proc/self/smaps").read_text(), re.MULTILINE)
    return [each for each in flags if {"dd", "wf"} <= set(each.split())]


def test_pin_is_kept_in_memory_that_is_locked_and_not_dumped(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members())
    before = len(locked_pages())
    session = app.login(pair.pin)
    pages = locked_pages()
    assert len(pages) == before + 1
    if "san" not in os.environ.get("LD_PRELOAD", ""):  # under a sanitizer mlock does nothing
        assert any("lo" in page.split() for page in pages)
    session.logout()
    assert len(locked_pages()) == before
    session.login(pair.pin)
    app.module.finalize()
    assert len(locked_pages()) == before


def test_pin_is_in_no_log_line(three: list[FakeToken], start: StartFactory, directory: Path) -> None:
    secret, wrong, own = "S3cret-PIN", "Wr0ng-PIN", "0wn-PIN"
    (directory / "pin").write_text(own)
    for token in three:
        token.shared.pin = secret.encode()
    three[1].shared.pin = own.encode()
    members = three[0].member(), three[1].member(pin_source=f"file:{directory}/pin"), three[2].member()
    app = start(*members, recovery=SOON)
    session = app.open()
    assert code(lambda: session.login(wrong)) == "CKR_PIN_INCORRECT"
    three[2].shared.pin = b"elsewhere"
    session.login(secret)
    set_pin(session, secret, "N3w-PIN")
    three[0].dies()
    until(lambda: code(lambda: session.random(8)) and "east" in app.away(), "the loss is noticed")
    three[0].is_well_again()
    until(lambda: session.random(8) and "east" not in app.away(), "it is back")
    app.module.finalize()
    log = app.group.log.read_text()
    assert "login.succeeded" in log
    for pin in (secret, wrong, own, "N3w-PIN", "elsewhere"):
        assert pin not in log


# ---- changes of PINs: all or none


def test_changed_pin_is_changed_on_every_member(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three), recovery=SOON)
    session = app.login(PIN)
    assert set_pin(session, PIN, "new one") == "CKR_OK"
    assert {token.shared.pin for token in three} == {b"new one"}
    session.logout()
    session.login("new one")
    # and a member that returns is logged in with the new one
    three[0].shared.absent = 1
    until(lambda: session.random(8) and app.away(), "the loss is noticed")
    three[0].shared.absent = 0
    until(lambda: session.random(8) and not app.away(), "the member is back")
    assert [int(token.shared.pin_failures) for token in three] == [0, 0, 0]


def test_member_that_returns_after_a_change_while_logged_in_gets_the_new_pin(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three), recovery=SOON)
    session = app.login(PIN)
    assert set_pin(session, PIN, "new one") == "CKR_OK"
    three[0].shared.absent = 1
    until(lambda: session.random(8) and app.away(), "the loss is noticed")
    three[0].shared.absent = 0
    until(lambda: session.random(8) and not app.away(), "the member is back")
    assert int(three[0].shared.pin_failures) == 0


def test_security_officer_s_changed_pin_brings_a_member_back(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three), recovery=SOON)
    session = app.open()
    session.login(SO_PIN, p11.CKU_SO)
    assert set_pin(session, SO_PIN, "new for the SO") == "CKR_OK"
    assert {token.shared.so_pin for token in three} == {b"new for the SO"}
    three[0].shared.absent = 1
    until(lambda: session.random(8) and app.away(), "the loss is noticed")
    three[0].shared.absent = 0
    until(lambda: session.random(8) and not app.away(), "the member is back")
    assert int(three[0].shared.pin_failures) == 0


def test_change_of_a_pin_is_refused_while_a_member_is_away(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three))
    session = app.login(PIN)
    three[1].shared.absent = 1
    until(lambda: session.random(8) and app.away(), "the loss is noticed")
    assert set_pin(session, PIN, "new one") == "CKR_DEVICE_ERROR"
    assert [token.calls("C_SetPIN") for token in three] == [0, 0, 0]
    assert {token.shared.pin for token in three} == {PIN.encode()}


@pytest.mark.parametrize("refuser", [1, 2])
def test_change_that_a_later_member_refuses_is_taken_back(
    three: list[FakeToken], start: StartFactory, refuser: int
) -> None:
    app = start(*(token.member() for token in three))
    session = app.login(PIN)
    three[refuser]["C_SetPIN"].answers(p11.CKR_PIN_TOO_WEAK)
    assert set_pin(session, PIN, "new one") == "CKR_PIN_TOO_WEAK"
    assert {token.shared.pin for token in three} == {PIN.encode()}
    assert app.away() == set()
    session.logout()
    session.login(PIN)


def test_wrong_old_pin_costs_one_try_on_one_token(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three))
    session = app.login(PIN)
    before = sum(tries(*three))
    assert set_pin(session, "wrong", "new one") == "CKR_PIN_INCORRECT"
    assert sum(tries(*three)) == before + 1
    assert {token.shared.pin for token in three} == {PIN.encode()}


def test_change_that_could_not_be_taken_back_is_in_the_log(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three))
    session = app.login(PIN)
    three[0]["C_SetPIN"].answers(p11.CKR_PIN_TOO_WEAK, skip=1)
    three[1]["C_SetPIN"].answers(p11.CKR_PIN_TOO_WEAK)
    assert set_pin(session, PIN, "new one") == "CKR_PIN_TOO_WEAK"
    assert len(app.events("write.partial", "east")) == 1


def test_pin_of_a_new_user_reaches_every_member(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    session.login(SO_PIN, p11.CKU_SO)
    session.call("C_InitPIN", b"first", 5)
    assert {token.shared.pin for token in three} == {b"first"}
    session.logout()
    session.login("first")


def test_pin_of_a_new_user_is_refused_while_a_member_is_away(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three))
    session = app.open()
    session.login(SO_PIN, p11.CKU_SO)
    three[1].shared.absent = 1
    until(lambda: session.random(8) and app.away(), "the loss is noticed")
    assert code(lambda: session.call("C_InitPIN", b"first", 5)) == "CKR_DEVICE_ERROR"
    assert [token.calls("C_InitPIN") for token in three] == [0, 0, 0]


def test_pins_are_changed_on_real_tokens(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members())
    session = app.login(pair.pin)
    assert set_pin(session, pair.pin, "654321") == "CKR_OK"
    app.module.finalize()
    for server in pair.servers:
        server.token.pin = "654321"
        with bare(server.token) as session:
            assert session.info().state == p11.CKS_RW_USER_FUNCTIONS


def test_library_that_is_gone_in_the_middle_of_a_pin_change_does_not_hang_it(
    three: list[FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in three))
    session = app.login(PIN)
    three[0].shared.forget_library += 1
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(set_pin(session, PIN, "new one")), daemon=True)
    thread.start()
    thread.join(3)  # less than an attempt may take
    assert not thread.is_alive()
    pins = {token.shared.pin for token in three}
    assert pins == ({b"new one"} if answers == ["CKR_OK"] else {PIN.encode()})


def test_token_of_a_group_cannot_be_initialised(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members())
    label = "new".ljust(32).encode()
    answer = code(lambda: app.module.call("C_InitToken", app.slot, b"12345678", 8, label))
    assert answer == "CKR_FUNCTION_NOT_SUPPORTED"
    app.login(pair.pin).find_one(private("ec"))


# ---- keys that want the PIN for each use


ALWAYS: p11.Template = {p11.CKA_LABEL: "always"}


@pytest.fixture
def always(tokens: tuple[SoftToken, SoftToken], keys: Keys) -> tuple[SoftToken, SoftToken]:
    """Two tokens with one key that wants the PIN each time."""
    for token in tokens:
        with bare(token) as session:
            session.create(ec_private(keys.ec, "always", b"\xa1") | {p11.CKA_ALWAYS_AUTHENTICATE: True})
    return tokens


@pytest.fixture
def careful(always: tuple[SoftToken, SoftToken], start: StartFactory) -> Application:
    return start(*(token.member() for token in always), balance="round-robin")


def test_key_that_always_wants_the_pin_signs_after_it(careful: Application, keys: Keys) -> None:
    session = careful.login("123456")
    found = session.find(ALWAYS)
    assert found  # two of which nothing can prove that they are one are served as two
    for key in found:
        for _ in range(3):
            session.init("C_SignInit", p11.CKM_ECDSA, key)
            session.login("123456", p11.CKU_CONTEXT_SPECIFIC)
            keys.check_ec(session.output("C_Sign", DIGEST, 32))
    assert careful.away() == set()


def test_key_that_always_wants_the_pin_does_not_sign_without_it(careful: Application, keys: Keys) -> None:
    session = careful.login("123456")
    key = session.find(ALWAYS)[0]
    session.init("C_SignInit", p11.CKM_ECDSA, key)
    assert code(lambda: session.output("C_Sign", DIGEST, 32)) == "CKR_USER_NOT_LOGGED_IN"
    assert careful.away() == set()
    session.init("C_SignInit", p11.CKM_ECDSA, key)
    assert code(lambda: session.login("wrong!", p11.CKU_CONTEXT_SPECIFIC)) == "CKR_PIN_INCORRECT"
    session.login("123456", p11.CKU_CONTEXT_SPECIFIC)
    keys.check_ec(session.output("C_Sign", DIGEST, 32))


def test_login_for_an_operation_needs_one(careful: Application) -> None:
    session = careful.login("123456")
    answer = code(lambda: session.login("123456", p11.CKU_CONTEXT_SPECIFIC))
    assert answer == "CKR_OPERATION_NOT_INITIALIZED"


def test_protected_path_passes(fake: FakeFactory, start: StartFactory) -> None:
    """A device with a PIN pad: the application gives no PIN, and each member asks at its own."""
    both = fake("east", fakes.signing_key()), fake("west", fakes.signing_key())
    for token in both:
        token.shared.flags = p11.CKF_PROTECTED_AUTHENTICATION_PATH
    app = start(*(token.member() for token in both))
    assert app.module.token(app.slot).flags & p11.CKF_PROTECTED_AUTHENTICATION_PATH
    session = app.open()
    login: Callable[[], object] = lambda: session.call("C_Login", p11.CKU_USER, None, 0)  # noqa: E731
    assert code(login) == "CKR_OK"
    session.sign(p11.CKM_RSA_PKCS, session.find_one(KEY), DIGEST)
    assert tries(*both) == [0, 0]
