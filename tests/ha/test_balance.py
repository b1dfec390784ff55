"""Who does the work: shares are counted where it arrives."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from tests import fake as fakes
from tests import p11
from tests.fake import PIN, FakeToken
from tests.ha.app import SOON, Application, code, until
from tests.ha.conftest import FakeFactory, StartFactory
from tests.ha.keys import DIGEST

KEY: p11.Template = {p11.CKA_LABEL: "signing"}


@pytest.fixture
def three(fake: FakeFactory) -> list[FakeToken]:
    return [fake(name, fakes.signing_key()) for name in ("east", "west", "north")]


def signed(tokens: list[FakeToken]) -> list[int]:
    return [token.calls("C_SignInit") for token in tokens]


class Signing:
    """An application that signs, its sessions open on every member."""

    def __init__(self, app: Application, tokens: list[FakeToken]) -> None:
        self.app, self.tokens = app, tokens
        self.session = app.login(PIN)
        self.key = self.session.find_one(KEY)
        for _ in range(2 * len(tokens)):
            self.sign()
        self.before = signed(tokens)

    def sign(self, session: p11.Session | None = None) -> bytes:
        return (session or self.session).sign(p11.CKM_RSA_PKCS, self.key, DIGEST)

    def shares(self) -> list[int]:
        """Operations that each member got since this was last asked."""
        now, before = signed(self.tokens), self.before
        self.before = now
        return [a - b for a, b in zip(now, before, strict=True)]


def in_threads(count: int, work: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("balance", ["least-busy", "round-robin"])
def test_idle_members_take_turns(three: list[FakeToken], start: StartFactory, balance: str) -> None:
    """Per operation, not per session; equal members get equal shares."""
    use = Signing(start(*(token.member() for token in three), balance=balance), three)
    for _ in range(30):
        use.sign()
    assert use.shares() == [10, 10, 10]


def test_sessions_used_once_spread_over_the_members(three: list[FakeToken], start: StartFactory) -> None:
    use = Signing(start(*(token.member() for token in three)), three)
    for _ in range(30):
        session = use.app.open()
        use.sign(session)
        session.close()
    assert use.shares() == [10, 10, 10]


def _held(tokens: list[FakeToken], count: int) -> bool:
    return sum(token["C_Sign"].held for token in tokens) == count


def test_calls_in_flight_are_levelled_by_least_busy(three: list[FakeToken], start: StartFactory) -> None:
    use = Signing(start(*(token.member() for token in three), balance="least-busy"), three)
    sessions = [use.app.open() for _ in range(9)]
    for session in sessions:
        for _ in range(3):
            use.sign(session)
    holding = [token["C_Sign"].holding() for token in three]
    for each in holding:
        each.__enter__()
    threads = []
    for number, session in enumerate(sessions, 1):
        threads += in_threads(1, partial(use.sign, session))
        until(partial(_held, three, number), "the call waits")
    shares = [token["C_Sign"].held for token in three]
    for each in holding:
        each.__exit__(None, None, None)
    for thread in threads:
        thread.join(20)
    assert shares == [3, 3, 3]


def test_slow_member_gets_its_share_and_no_more(three: list[FakeToken], start: StartFactory) -> None:
    """While a call is inside it, whoever has an idle member to go to goes there."""
    use = Signing(start(*(token.member() for token in three), balance="least-busy"), three)
    other = use.app.open()
    for _ in range(3):
        use.sign(other)
    slow = three[2]
    with slow["C_Sign"].holding():
        stuck = in_threads(1, lambda: [use.sign(other) for _ in range(3)])
        slow["C_Sign"].wait_held()
        use.shares()
        for _ in range(100):
            use.sign()
        assert use.shares() == [50, 50, 0]
    stuck[0].join(20)
    for _ in range(30):
        use.sign()
    assert use.shares()[2] >= 10  # and it is one among equals again


def test_slow_member_under_load_gets_less_than_the_others(
    three: list[FakeToken], start: StartFactory
) -> None:
    use = Signing(start(*(token.member() for token in three), balance="least-busy"), three)
    three[2]["C_Sign"].sleep_us = 20_000
    left = iter(range(600))
    lock = threading.Lock()

    def work() -> None:
        session = use.app.open()
        while True:
            with lock:
                if next(left, None) is None:
                    return
            use.sign(session)

    for thread in in_threads(3, work):
        thread.join(60)
    east, west, north = use.shares()
    assert east + west + north == 600
    assert 0 < north < min(east, west)


def test_round_robin_looks_at_nothing(three: list[FakeToken], start: StartFactory) -> None:
    use = Signing(start(*(token.member() for token in three), balance="round-robin"), three)
    three[2]["C_Sign"].sleep_us = 2_000
    for _ in range(30):
        use.sign()
    assert use.shares() == [10, 10, 10]


def test_primary_first_uses_the_first_that_is_there(three: list[FakeToken], start: StartFactory) -> None:
    app = start(*(token.member() for token in three), balance="primary-first", recovery=SOON)
    use = Signing(app, three)
    use.shares()
    for _ in range(10):
        use.sign()
    assert use.shares() == [10, 0, 0]
    three[0].shared.absent = 1
    use.sign()
    use.shares()
    for _ in range(10):
        use.sign()
    assert use.shares()[1:] == [10, 0]
    three[0].shared.absent = 0
    until(lambda: use.sign() and not app.away(), "the primary is back")
    use.shares()
    for _ in range(10):
        use.sign()
    assert use.shares() == [10, 0, 0]


def test_operation_stays_on_its_member_to_its_end(three: list[FakeToken], start: StartFactory) -> None:
    use = Signing(start(*(token.member() for token in three), balance="round-robin"), three)
    parts = Counter[str]()
    for _ in range(6):
        use.session.init("C_SignInit", p11.CKM_RSA_PKCS, use.key)
        member = use.app.served(use.session)
        for _ in range(3):
            use.session.feed("C_SignUpdate", b"part")
            assert use.app.served(use.session) == member
        use.session.output("C_SignFinal")
        assert use.app.served(use.session) == member
        parts[member] += 1
    assert parts == {"east": 2, "west": 2, "north": 2}


def test_attributes_are_read_where_they_do_not_vary(three: list[FakeToken], start: StartFactory) -> None:
    """Of the first member that has the object: CKA_UNIQUE_ID and the like differ from token to token."""
    use = Signing(start(*(token.member() for token in three), balance="round-robin"), three)
    for _ in range(6):
        use.session.get(use.key, p11.CKA_LABEL)
        assert use.app.served(use.session) == "east"


def test_member_without_the_key_gets_no_share_of_it(fake: FakeFactory, start: StartFactory) -> None:
    three = [fake("east", fakes.signing_key()), fake("west"), fake("north", fakes.signing_key())]
    app = start(*(token.member() for token in three), balance="round-robin")
    session = app.login(PIN)
    key = session.find_one(KEY)
    for _ in range(2):
        session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    before = signed(three)
    for _ in range(20):
        session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    east, west, north = (now - then for now, then in zip(signed(three), before, strict=True))
    assert west == 0
    assert east + north == 20
    assert min(east, north) >= 5
    assert session.random(8)
    assert app.away() == set()


# ---- standbys


@pytest.fixture
def guarded(three: list[FakeToken], start: StartFactory) -> Application:
    """East and west are active, north stands by."""
    return start(*(token.member() for token in three), standby=["north"], recovery=SOON)


def test_standby_does_nothing_while_an_active_member_is_left(
    three: list[FakeToken], guarded: Application
) -> None:
    use = Signing(guarded, three)
    for _ in range(20):
        use.sign()
    assert use.shares() == [10, 10, 0]
    three[0].dies()
    for _ in range(20):
        use.sign()
    assert signed(three)[2] == 0
    assert guarded.events("standby.promoted") == []


DEATHS: dict[str, Callable[[FakeToken], None]] = {
    "a dead connection": lambda token: token.dies(),
    "a token that is gone": lambda token: setattr(token.shared, "absent", 1),
    "a fault of the sessions": lambda token: token.every.answers(p11.CKR_SESSION_HANDLE_INVALID),
    "a general error": lambda token: token.every.answers(p11.CKR_GENERAL_ERROR),
}


def revive(token: FakeToken) -> None:
    token.shared.absent = 0
    token.is_well_again()


@pytest.mark.parametrize("how", DEATHS)
def test_standby_takes_over_without_an_error_and_steps_back(
    three: list[FakeToken], guarded: Application, how: str
) -> None:
    use = Signing(guarded, three)
    right = use.sign()
    for token in three[:2]:
        DEATHS[how](token)
    for _ in range(5):
        assert use.sign() == right
        assert guarded.served(use.session) == "north"
    assert guarded.away() == {"east", "west"}
    assert len(guarded.events("standby.promoted", "north")) == 1
    assert guarded.is_present()

    revive(three[0])
    until(lambda: use.sign() == right and "east" not in guarded.away(), "an active member is back")
    assert len(guarded.events("standby.released", "north")) == 1
    use.shares()
    for _ in range(10):
        use.sign()
    assert use.shares() == [10, 0, 0]


STANDBY_CALLS: dict[str, Callable[[Signing], object]] = {
    "C_SignInit": lambda use: use.sign(),
    "C_GenerateRandom": lambda use: use.session.random(8),
    "C_FindObjectsInit": lambda use: use.session.find_one(KEY),
    "C_GetAttributeValue": lambda use: use.session.get(use.key, p11.CKA_LABEL),
    "C_DigestInit": lambda use: use.session.digest(p11.CKM_SHA256, DIGEST),
    "C_CreateObject": lambda use: use.session.create({p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: False}),
    "C_GetTokenInfo": lambda use: use.app.module.token(use.app.slot),
    "C_Logout": lambda use: use.session.logout(),
}


@pytest.mark.parametrize("name", STANDBY_CALLS)
def test_call_that_finds_the_last_active_member_dead_is_done_by_the_standby(
    three: list[FakeToken], guarded: Application, name: str
) -> None:
    use = Signing(guarded, three)
    for token in three[:2]:
        token.dies()
    STANDBY_CALLS[name](use)
    if name == "C_Logout":
        use.session.login(PIN)
    key = use.session.find_one(KEY)
    use.session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    assert guarded.served(use.session) == "north"


def test_operation_on_a_standby_is_ended_there_after_it_has_stepped_back(
    three: list[FakeToken], guarded: Application
) -> None:
    use = Signing(guarded, three)
    right = use.sign()
    for token in three[:2]:
        token.dies()
    use.sign()
    use.session.init("C_SignInit", p11.CKM_RSA_PKCS, use.key)
    use.session.feed("C_SignUpdate", DIGEST)
    other = guarded.open()
    for token in three[:2]:
        revive(token)
    until(lambda: use.sign(other) == right and not guarded.away(), "the active members are back")
    assert use.session.output("C_SignFinal") == right
    assert guarded.served(use.session) == "north"
    use.sign()
    assert guarded.served(use.session) != "north"


def test_standby_serves_from_the_start_if_nobody_else_is_there(
    three: list[FakeToken], start: StartFactory
) -> None:
    for token in three[:2]:
        token.dies()
    app = start(*(token.member() for token in three), standby=["north"])
    assert app.is_present()
    session = app.login(PIN)
    session.sign(p11.CKM_RSA_PKCS, session.find_one(KEY), DIGEST)
    assert app.served(session) == "north"


def test_standby_that_was_lost_comes_back_as_one(three: list[FakeToken], guarded: Application) -> None:
    use = Signing(guarded, three)
    for token in three:
        token.dies()
    assert code(use.sign) == "CKR_DEVICE_ERROR"
    revive(three[2])
    until(lambda: code(use.sign) == "CKR_OK", "the standby serves")
    assert guarded.served(use.session) == "north"
    revive(three[1])
    until(lambda: use.sign() and "west" not in guarded.away(), "an active member is back")
    for _ in range(5):
        use.sign()
        assert guarded.served(use.session) == "west"


def test_standby_knows_the_keys_when_it_takes_over(three: list[FakeToken], guarded: Application) -> None:
    """It was never asked for them before."""
    for token in three:
        token.add(fakes.secret_key())
    session = guarded.login(PIN)
    key = session.find_one({p11.CKA_LABEL: "secret"})
    right = session.sign(p11.CKM_SHA256_HMAC, key, DIGEST)
    for token in three[:2]:
        token.dies()
    assert session.sign(p11.CKM_SHA256_HMAC, key, DIGEST) == right
    assert guarded.served(session) == "north"


def test_key_of_the_same_name_on_a_standby_is_not_taken_for_the_one(
    fake: FakeFactory, start: StartFactory
) -> None:
    east = fake("east", fakes.secret_key(value=b"1" * 32))
    north = fake("north", fakes.secret_key(value=b"2" * 32))
    app = start(east.member(), north.member(), standby=["north"])
    session = app.login(PIN)
    key = session.find_one({p11.CKA_LABEL: "secret"})
    session.sign(p11.CKM_SHA256_HMAC, key, DIGEST)
    east.dies()
    for _ in range(3):
        assert code(lambda: session.sign(p11.CKM_SHA256_HMAC, key, DIGEST)) == "CKR_DEVICE_ERROR"
