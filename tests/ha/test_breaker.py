"""A member that is slow or faulty, and lives: it is ejected, does what no other can, and comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pkcs11_ha.core.outlier import edge_ns, until_ns
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.breaker import Breaker
from tests import fake as fakes
from tests import p11
from tests.conftest import ServerFactory, SoftTokenFactory
from tests.fake import FakeToken
from tests.ha.app import FAR, SOON, Application, until, working_until
from tests.ha.conftest import FakeFactory, StartFactory
from tests.ha.keys import DIGEST, Keys, provision
from tests.ha.relay import Relay
from tests.ha.test_balance import Signing, in_threads

LATE = 3600
QUICK: dict[str, Any] = {
    "outlier": "on",
    "outlier_interval_s": 0.1,
    "outlier_min_calls": 10,
    "outlier_ratio": 0.5,
    "eject_base_s": 0.2,
    "eject_max_s": 0.4,
    "slow_start_s": LATE,
}
REAL = QUICK | {"outlier_interval_s": 0.3, "outlier_min_calls": 12, "slow_start_s": 0.2}
AWAY = QUICK | {"eject_base_s": LATE, "eject_max_s": LATE}  # who is ejected stays so
SLOW_US = 10_000
NAMES = ("east", "west", "north")


@dataclass
class Trio:
    """Three members that sign, and an application on them."""

    tokens: list[FakeToken]
    use: Signing

    @property
    def app(self) -> Application:
        return self.use.app

    @property
    def north(self) -> FakeToken:
        return self.tokens[2]

    @property
    def breaker(self) -> Breaker:
        breaker = self.app.core.slots[self.app.slot].breaker
        assert breaker
        return breaker

    def ejected(self) -> set[str]:
        return set(self.breaker.ejected)

    def sign_until_compared(self) -> None:
        looked = self.breaker.due_ns
        working_until(self.use.sign, lambda: self.breaker.due_ns > looked, "the members are compared")

    def sign_until(self, event: str, member: str = "north", count: int = 1) -> None:
        working_until(
            self.use.sign,
            lambda: len(self.app.events(event, member)) >= count,
            f"{count} {event} of {member}",
        )

    def inits(self) -> int:
        """Operations that north was ever given."""
        return self.north.calls("C_SignInit")


class TrioFactory:
    def __init__(self, fake: FakeFactory, start: StartFactory) -> None:
        self.fake, self.start = fake, start

    def __call__(self, *more: p11.Template, recovery: Mapping[str, Any] = FAR, **options: Any) -> Trio:
        """North alone has `more` objects."""
        tokens = [self.fake(name, fakes.signing_key()) for name in NAMES]
        for template in more:
            tokens[2].add(template)
        app = self.start(*(token.member() for token in tokens), recovery=recovery, **options)
        return Trio(tokens, Signing(app, tokens))

    def without_north(self, *more: p11.Template, **options: Any) -> Trio:
        """North is slow, and ejected for good."""
        trio = self(*more, **(AWAY | options))
        slow(trio.north)
        trio.sign_until("member.ejected")
        trio.use.shares()
        return trio


@pytest.fixture
def trio(fake: FakeFactory, start: StartFactory) -> TrioFactory:
    return TrioFactory(fake, start)


def slow(token: FakeToken) -> None:
    token.every.sleep_us = SLOW_US


@contextmanager
def many(trio: Trio, count: int) -> Iterator[None]:
    """So many threads sign meanwhile; each of their calls must succeed."""
    done, failed = threading.Event(), list[Exception]()

    def work() -> None:
        try:
            session = trio.app.open()
            while not done.is_set():
                trio.use.sign(session)
        except p11.CkError as error:
            failed.append(error)

    threads = in_threads(count, work)
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(20)
    assert failed == []


# ---- ejection


def test_slow_member_is_ejected_and_gets_no_call(trio: TrioFactory) -> None:
    it = trio(**AWAY)
    slow(it.north)
    it.sign_until("member.ejected")
    it.use.shares()
    before = it.north.every.calls
    for _ in range(60):
        it.use.sign()
    assert it.use.shares() == [30, 30, 0]
    assert it.north.every.calls == before
    assert it.ejected() == {"north"}
    assert " why=slow slow=" in it.app.events("member.ejected")[0]
    assert it.app.away() == set()
    assert set(it.app.status().values()) == {"CKR_OK"}  # it is connected and logged in
    assert it.app.events("member.lost") == []


def test_quick_calls_do_not_hide_a_slow_end(trio: TrioFactory) -> None:
    """Twenty updates and a question for the length to one C_SignFinal, and all of them take the peers the same."""
    it = trio(**AWAY)
    for token in it.tokens:
        for name in ("C_SignInit", "C_SignUpdate", "C_SignFinal"):
            token[name].sleep_us = 50
    it.north["C_SignFinal"].sleep_us = SLOW_US

    def sign() -> None:
        it.use.session.init("C_SignInit", p11.CKM_RSA_PKCS, it.use.key)
        for _ in range(20):
            it.use.session.feed("C_SignUpdate", b"part")
        it.use.session.output("C_SignFinal")

    working_until(sign, lambda: it.app.events("member.ejected", "north"), "it is ejected")


def test_faulty_member_is_ejected(trio: TrioFactory) -> None:
    """It is full: what it refuses is done elsewhere, so the application sees nothing of it."""
    it = trio(**AWAY)
    it.north["C_SignInit"].answers(p11.CKR_DEVICE_MEMORY)
    it.sign_until("member.ejected")
    assert " why=faulty " in it.app.events("member.ejected")[0]
    before = it.inits()
    for _ in range(20):
        it.use.sign()
    assert it.inits() == before
    assert it.app.away() == set()


def test_forgeries_eject_nobody(trio: TrioFactory) -> None:
    """An answer that may be the request's fault is no fault of the member's, not even where one alone gives it; nor is
    an operation that it leaves behind (a scripted answer ends none)."""
    it = trio(**(AWAY | {"outlier_min_calls": 1, "outlier_ratio": 0.1}))
    it.north["C_Sign"].answers(p11.CKR_GENERAL_ERROR)
    for token in it.tokens[:2]:
        token["C_Sign"].answers(p11.CKR_DATA_INVALID)
    for _ in range(60):
        with pytest.raises(p11.CkError):
            it.use.sign()
    for token in it.tokens:
        token.is_well_again()
    it.sign_until_compared()
    assert it.app.events("member.ejected") == []


def test_of_two_slow_members_one_serves_on(trio: TrioFactory) -> None:
    it = trio(**AWAY)
    slow(it.north)
    slow(it.tokens[1])
    working_until(it.use.sign, it.ejected, "one is ejected")
    for _ in range(3):
        it.sign_until_compared()
    (out,) = it.ejected()
    it.use.shares()
    for _ in range(20):
        it.use.sign()
    assert it.use.shares() == [10, *([10, 0] if out == "north" else [0, 10])]
    assert len(it.app.events("member.ejected")) == 1


@pytest.mark.parametrize(
    ("count", "outlier", "on"),
    [(2, "auto", False), (2, "on", True), (3, "auto", True), (3, "off", False), (3, "on", True)],
)
def test_breaker_is_on_for_three_or_where_it_is_asked_for(
    fake: FakeFactory, start: StartFactory, count: int, outlier: str, on: bool
) -> None:
    app = start(*(fake(name).member() for name in NAMES[:count]), outlier=outlier)
    assert (app.core.slots[app.slot].breaker is not None) == on


def test_of_two_the_slow_one_is_ejected_where_it_is_asked_for(fake: FakeFactory, start: StartFactory) -> None:
    tokens = [fake(name, fakes.signing_key()) for name in ("east", "north")]
    it = Trio(tokens, Signing(start(*(token.member() for token in tokens), **AWAY), tokens))
    slow(tokens[1])
    it.sign_until("member.ejected")
    it.use.shares()
    for _ in range(20):
        it.use.sign()
    assert it.use.shares() == [20, 0]


# ---- what an ejected member still does


def test_key_that_only_the_ejected_member_has_still_signs(trio: TrioFactory) -> None:
    it = trio.without_north(fakes.signing_key("pinned", b"\xb1" * 128))
    pinned = it.use.session.find_one({p11.CKA_LABEL: "pinned"})
    for _ in range(3):
        assert it.use.session.sign(p11.CKM_RSA_PKCS, pinned, DIGEST)
        assert it.app.served(it.use.session) == "north"
    assert it.use.session.get(pinned, p11.CKA_LABEL) == (b"pinned",)
    it.use.sign()
    assert it.app.served(it.use.session) != "north"
    assert it.ejected() == {"north"}


def test_operation_ends_where_it_began(trio: TrioFactory) -> None:
    it = trio(**AWAY)
    session = it.app.open()
    while it.app.served(session) != "north":
        it.use.sign(session)
        session.init("C_SignInit", p11.CKM_RSA_PKCS, it.use.key)
        if it.app.served(session) != "north":
            session.feed("C_SignUpdate", b"part")
            session.output("C_SignFinal")
    slow(it.north)
    it.sign_until("member.ejected")
    session.feed("C_SignUpdate", b"part")
    assert session.output("C_SignFinal")
    assert it.app.served(session) == "north"


def test_what_a_session_made_on_it_stays_together(trio: TrioFactory) -> None:
    it = trio(**AWAY)
    session = it.app.open()
    template: p11.Template = {p11.CKA_TOKEN: False, p11.CKA_VALUE_LEN: 32, p11.CKA_SIGN: True}
    while it.app.served(session) != "north":
        session.close()
        session = it.app.open()
        session.generate_key(p11.CKM_GENERIC_SECRET_KEY_GEN, template)
    slow(it.north)
    it.sign_until("member.ejected")
    session.generate_key(p11.CKM_GENERIC_SECRET_KEY_GEN, template)
    assert it.app.served(session) == "north"
    it.app.open().generate_key(p11.CKM_GENERIC_SECRET_KEY_GEN, template)


def test_all_others_are_lost_and_the_ejected_member_serves(trio: TrioFactory) -> None:
    it = trio.without_north()
    right = it.use.sign()
    for token in it.tokens[:2]:
        token.dies()
    for _ in range(10):
        assert it.use.sign() == right
    assert it.app.served(it.use.session) == "north"
    assert it.app.away() == {"east", "west"}
    assert it.ejected() == set()
    assert ' why="too few are left"' in it.app.events("member.admitted", "north")[0]


def test_ejected_member_that_is_lost_comes_back_as_any_other(trio: TrioFactory) -> None:
    it = trio.without_north(fakes.signing_key("pinned", b"\xb1" * 128), recovery=SOON)
    pinned = it.use.session.find_one({p11.CKA_LABEL: "pinned"})
    it.north.dies()
    with pytest.raises(p11.CkError):
        it.use.session.sign(p11.CKM_RSA_PKCS, pinned, DIGEST)
    assert it.app.away() == {"north"}
    it.north.is_well_again()
    it.sign_until("member.recovered")
    it.use.shares()
    for _ in range(30):
        it.use.sign()
    assert min(it.use.shares()) >= 9


# ---- how it comes back


def test_one_operation_is_its_trial_and_while_it_is_slow_the_only_one(trio: TrioFactory) -> None:
    it = trio(**QUICK)
    slow(it.north)
    it.sign_until("member.ejected")
    before = it.inits()
    with many(it, 4):
        it.app.wait_for_event("member.ejected", "north", count=4)
        ended, trials = len(it.app.events("member.ejected")), len(it.app.events("member.trial"))
    assert it.inits() - before <= trials + 1
    assert trials >= ended - 1 >= 3
    waits = [line.split(" for_s=")[1] for line in it.app.events("member.ejected")]
    assert waits[:3] == ["0.2", "0.4", "0.4"]


def test_trial_is_one_operation_of_all_threads_and_others_do_not_wait_for_it(trio: TrioFactory) -> None:
    it = trio(**(QUICK | {"eject_base_s": 1.0, "eject_max_s": 60}))
    slow(it.north)
    it.sign_until("member.ejected")
    before = it.inits()
    it.north.is_well_again()  # but for the end of the operation
    it.north["C_Sign"].hold = 1
    with many(it, 16):
        it.north["C_Sign"].wait_held()
        done = sum(token.calls("C_Sign") for token in it.tokens)
        looked = it.breaker.due_ns
        working_until(
            lambda: None, lambda: sum(t.calls("C_Sign") for t in it.tokens) > done + 200, "others sign"
        )
        working_until(lambda: None, lambda: it.breaker.due_ns > looked, "the members are compared")
        held, inits = it.north["C_Sign"].held, it.inits() - before
        it.north.is_well_again()
    assert (held, inits) == (1, 1)


def test_member_that_hangs_in_its_trial_costs_one_thread(trio: TrioFactory) -> None:
    it = trio(**QUICK)
    slow(it.north)
    it.sign_until("member.ejected")
    before = it.inits()
    it.north["C_Sign"].hold = 1
    with many(it, 4):
        it.app.wait_for_event("member.ejected", "north", count=2)
        assert " why=hangs " in it.app.events("member.ejected")[1]
        over = until_ns(it.breaker.records[2].course, it.breaker.rule)
        until(lambda: it.breaker.due_ns > over + 3 * it.breaker.rule.interval_ns, "its time is long over")
        assert (it.north["C_Sign"].held, it.inits() - before) == (1, 1)
        it.north.is_well_again()
        it.app.wait_for_event("member.trial", "north", count=2)


def test_admitted_member_gets_a_tenth_of_its_share_at_first(trio: TrioFactory) -> None:
    it = trio(**QUICK)
    slow(it.north)
    it.sign_until("member.ejected")
    it.north.is_well_again()
    it.sign_until("member.admitted")
    assert it.app.events("member.trial", "north")
    it.use.shares()
    for _ in range(600):
        it.use.sign()
    east, west, north = it.use.shares()
    assert 0 < north <= 60  # 20 are its tenth
    assert abs(east - west) <= 60


def test_admitted_member_is_one_among_equals_in_the_end(trio: TrioFactory) -> None:
    it = trio(**(QUICK | {"slow_start_s": 0.2}))
    slow(it.north)
    it.sign_until("member.ejected")
    it.north.is_well_again()
    it.sign_until("member.admitted")

    def shares() -> list[int]:
        it.use.shares()
        for _ in range(60):
            it.use.sign()
        return it.use.shares()

    working_until(lambda: None, lambda: shares() == [20, 20, 20], "the shares are equal")


def test_application_that_reads_and_makes_only_has_its_member_back_too(trio: TrioFactory) -> None:
    """No call of it can be a trial: time alone admits the member, slowly."""
    it = trio.without_north(eject_base_s=0.2)
    it.north.is_well_again()
    working_until(
        lambda: it.use.session.get(it.use.key, p11.CKA_LABEL),
        lambda: it.app.events("member.admitted", "north"),
        "it is admitted",
    )
    assert ' why="nobody tried"' in it.app.events("member.admitted", "north")[0]


# ---- the counters


def test_both_planes_mean_the_same_buckets(trio: TrioFactory) -> None:
    trio()
    for ns in (0, 1, 255, 256, 383, 384, 511, 512, 10**6, 10**9, 10**12, 2**63):
        bucket = native.lib.ha_latency_bucket(ns)
        assert bucket == 0 or edge_ns(bucket) <= ns
        assert bucket == native.lib.HA_BUCKETS - 1 or ns < edge_ns(bucket + 1)


# ---- real members


def test_real_member_behind_a_slow_network(
    soft_token: SoftTokenFactory, server: ServerFactory, start: StartFactory, keys: Keys, directory: Path
) -> None:
    """Ejected, not used, tried, admitted; then the others are killed and it serves; and no call ever fails."""
    tokens = [soft_token(name) for name in NAMES]
    for token in tokens:
        provision(token, keys)
    east, west, north = (server(token) for token in tokens)
    with Relay(north, directory / "relay") as relay:
        app = start(east.member(), west.member(), relay.member(), **REAL)
        session = app.login(tokens[0].pin)
        key = session.find_one({p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_KEY_TYPE: p11.CKK_RSA})

        def sign() -> str:
            session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
            return app.served(session)

        def signing_until(holds: Callable[[], object], what: str) -> None:
            working_until(sign, holds, what)

        while sign() != "north":
            pass
        relay.delay_s = 0.03
        signing_until(lambda: app.events("member.ejected", "north"), "it is ejected")
        assert "north" not in [sign() for _ in range(10)]
        signing_until(lambda: len(app.events("member.ejected", "north")) > 1, "its trial was slow")
        relay.delay_s = 0
        signing_until(lambda: app.events("member.admitted", "north"), "it is admitted")
        working_until(lambda: None, lambda: sign() == "north", "it signs")
        relay.delay_s = 0.03
        ejections = len(app.events("member.ejected", "north"))
        signing_until(lambda: len(app.events("member.ejected", "north")) > ejections, "it is ejected again")
        east.kill()
        west.kill()
        relay.delay_s = 0
        assert [sign() for _ in range(5)] == ["north"] * 5
        assert app.away() == {"east", "west"}
