"""When a lost member is tried again, and how often: on a clock that the test winds, first the rule, then the core."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_ha import ck
from pkcs11_ha.core.recovery import (
    NEVER_NS,
    UNLIMITED,
    Outage,
    Rule,
    after_failure,
    due_at_ns,
    is_due,
    is_exhausted,
)
from pkcs11_ha.runtime.member import ConnectError, Member
from tests.models.world import World, check, lose, up

X = 60 * 10**9
PATIENCE_S = 20.0

# ---- the rule


def test_exactly_x_is_too_early_and_a_nanosecond_more_is_not() -> None:
    outage, rule = Outage(last_ns=1000), Rule(X, UNLIMITED)
    assert not is_due(outage, rule, 1000 + X)
    assert is_due(outage, rule, 1000 + X + 1)


def test_attempt_counts_from_when_the_last_one_ended() -> None:
    rule = Rule(X, UNLIMITED)
    tried = after_failure(Outage(0), now_ns=X + 20 * 10**9, pin_refused=False)
    assert due_at_ns(tried, rule) == X + 20 * 10**9 + X


@pytest.mark.parametrize("n", [1, 2, 7])
def test_there_are_n_attempts_and_no_more(n: int) -> None:
    outage, rule, now = Outage(0), Rule(X, n), 0
    for attempt in range(n):
        now += X + 1
        assert is_due(outage, rule, now), f"attempt {attempt + 1} of {n}"
        assert not is_exhausted(outage, rule)
        outage = after_failure(outage, now, pin_refused=False)
    assert is_exhausted(outage, rule)
    assert not is_due(outage, rule, now + 1000 * X)
    assert due_at_ns(outage, rule) == NEVER_NS


def test_zero_attempts_is_off() -> None:
    assert not is_due(Outage(0), Rule(X, 0), 10**6 * X)
    assert is_exhausted(Outage(0), Rule(X, 0))


def test_minus_one_has_no_limit() -> None:
    outage = Outage(0, failed=10**9)
    assert is_due(outage, Rule(X, UNLIMITED), X + 1)
    assert not is_exhausted(outage, Rule(X, UNLIMITED))


def test_refused_pin_ends_the_attempts_also_without_a_limit() -> None:
    outage = after_failure(Outage(0), X + 1, pin_refused=True)
    assert outage.stopped
    assert not is_due(outage, Rule(X, UNLIMITED), 10**6 * X)
    assert after_failure(outage, 2 * X, pin_refused=False).stopped  # and nothing lifts it


@given(
    interval=st.integers(0, 100),
    attempts=st.integers(-1, 5),
    steps=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 30)), max_size=40),
)
def test_it_is_the_pseudo_code_of_the_reference_page(
    interval: int, attempts: int, steps: list[tuple[int, int]]
) -> None:
    """Each step: so much time passes before a call, and an attempt, if one is made, takes so long and fails."""
    rule, outage, now = Rule(interval, attempts), Outage(0), 0
    recover_attempt_count, last_recover_attempt = 0, 0
    for passes, takes in steps:
        now += passes
        expected = (
            attempts == -1 or recover_attempt_count < attempts
        ) and now - last_recover_attempt > interval
        assert is_due(outage, rule, now) == expected
        if expected:
            now += takes
            recover_attempt_count += 1
            last_recover_attempt = now
            outage = after_failure(outage, now, pin_refused=False)


# ---- the core, with members that are no libraries


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_member_is_tried_strictly_later_than_x_after_its_loss(world: World) -> None:
    core = world.core("east", "west", interval_s=60)
    lose(core, "east")
    world.clock.pass_s(60)
    check(core)
    assert world.attempts == []
    world.clock.now_ns += 1
    check(core)
    assert world.attempts == ["east"]
    assert up(core) == {"east", "west"}


def test_data_plane_is_told_the_moment_after_which_the_check_is_due(world: World) -> None:
    core = world.core("east", "west", interval_s=60)
    assert world.plane.check_at[0] == NEVER_NS
    lose(core, "east")
    assert world.plane.check_at[0] == world.clock.now_ns + 60 * 10**9
    assert world.plane.serving[0] == 0b10
    world.clock.pass_s(61)
    check(core)
    assert world.plane.check_at[0] == NEVER_NS
    assert world.plane.serving[0] == 0b11


def test_each_failure_waits_x_again_and_the_nth_is_the_last(world: World) -> None:
    core = world.core("east", "west", interval_s=60, attempts=3)
    world.fails("east")
    lose(core, "east")
    for attempt in range(1, 6):
        world.clock.pass_s(60.5)
        check(core)
        check(core)  # not twice within X
        assert len(world.attempts) == min(attempt, 3)
    assert world.happened("recovery.failed", "east") == 3
    assert world.happened("recovery.exhausted", "east") == 1
    assert world.plane.check_at[0] == NEVER_NS


def test_zero_attempts_leaves_a_lost_member_out(world: World) -> None:
    core = world.core("east", "west", attempts=0)
    lose(core, "east")
    world.clock.pass_s(10**6)
    check(core)
    assert world.attempts == []
    assert world.plane.check_at[0] == NEVER_NS


def test_attempts_without_limit_go_on(world: World) -> None:
    core = world.core("east", "west", interval_s=1)
    world.fails("east")
    lose(core, "east")
    for _ in range(50):
        world.clock.pass_s(1.5)
        check(core)
    assert len(world.attempts) == 50


def test_two_members_down_have_counts_of_their_own(world: World) -> None:
    """With one count for both, the return of one would give the other its attempts again."""
    core = world.core("east", "west", "north", interval_s=60, attempts=2)
    world.fails("east")
    world.fails("west")
    lose(core, "east", "west")
    world.clock.pass_s(61)
    check(core)
    assert sorted(world.attempts) == ["east", "west"]  # one round tries all that are due
    world.works("west")
    world.clock.pass_s(61)
    check(core)
    assert up(core) == {"west", "north"}
    world.attempts.clear()
    for _ in range(5):
        world.clock.pass_s(61)
        check(core)
    assert world.attempts == []  # east has had its two


def test_return_gives_a_member_all_its_attempts_again(world: World) -> None:
    core = world.core("east", "west", interval_s=60, attempts=2)
    world.fails("east")
    lose(core, "east")
    world.clock.pass_s(61)
    check(core)
    world.works("east")
    world.clock.pass_s(61)
    check(core)
    assert up(core) == {"east", "west"}

    world.fails("east")
    lose(core, "east")
    world.attempts.clear()
    for _ in range(5):
        world.clock.pass_s(61)
        check(core)
    assert world.attempts == ["east", "east"]


def test_member_absent_at_the_start_is_tried_like_a_lost_one(world: World) -> None:
    world.fails("east")
    core = world.core("east", "west", interval_s=60)
    assert up(core) == {"west"}
    assert [(e.group, e.member) for e in world.events if e.name == "member.lost"] == [("prod", "east")]
    check(core)
    assert world.attempts == []  # the start was an attempt
    world.works("east")
    world.clock.pass_s(60.5)
    check(core)
    assert up(core) == {"east", "west"}


def fails_once(world: World, *members: str) -> None:
    for member in members:

        def connect(member: str = member) -> None:
            world.works(member)
            raise ConnectError(ck.CKR_TOKEN_NOT_PRESENT, "in pieces")

        world.outcome[member] = connect


def test_start_that_finds_nobody_looks_once_more(world: World) -> None:
    """Many applications that start at once can meet all of SoftHSM's files half written."""
    fails_once(world, "east", "west")
    assert up(world.core("east", "west")) == {"east", "west"}
    assert world.happened("member.lost") == 0


def test_start_that_finds_somebody_goes_on(world: World) -> None:
    fails_once(world, "east")
    assert up(world.core("east", "west")) == {"west"}
    assert world.happened("member.lost", "east") == 1


def test_start_that_finds_nobody_twice_says_so_once(world: World) -> None:
    world.fails("east")
    world.fails("west")
    assert up(world.core("east", "west")) == set()
    assert world.happened("member.lost", "east") == 1


def test_all_members_down_are_tried_too(world: World) -> None:
    core = world.core("east", "west", interval_s=60)
    lose(core, "east", "west")
    assert world.plane.serving[0] == 0
    assert world.happened("group.vanished") == 1
    world.clock.pass_s(61)
    check(core)
    assert up(core) == {"east", "west"}


def test_loss_is_of_the_life_in_which_the_call_began(world: World) -> None:
    """A call that was stuck since before the member's return must not take it out again."""
    core = world.core("east", "west", interval_s=60)
    member = core.members["east"]
    before = member.epoch
    lose(core, "east")
    world.clock.pass_s(61)
    check(core)
    core.lose(member, ck.CKR_DEVICE_ERROR, "C_Sign", before)
    assert up(core) == {"east", "west"}


def test_wrong_pin_at_recovery_costs_one_try(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    core = world.core("east", "west", interval_s=60)
    slot = core.slots[0]
    slot.user, slot.secret = ck.CKU_USER, object()
    tries: list[str] = []

    def login(member: Member, _user: int, _pin: object, _size: int) -> int:
        tries.append(member.name)
        return ck.CKR_PIN_INCORRECT

    monkeypatch.setattr(Member, "login", login)
    lose(core, "east")
    for _ in range(10):
        world.clock.pass_s(61)
        check(core)
    assert tries == ["east"]
    assert up(core) == {"west"}
    assert world.happened("recovery.stopped", "east") == 1
    assert world.plane.check_at[0] == NEVER_NS


@pytest.mark.parametrize("refusal", ["CKR_PIN_INCORRECT", "CKR_PIN_LOCKED", "CKR_PIN_EXPIRED"])
def test_every_refusal_of_the_pin_is_final(
    world: World, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    core = world.core("east", "west", interval_s=60)
    core.slots[0].user, core.slots[0].secret = ck.CKU_USER, object()
    monkeypatch.setattr(Member, "login", lambda *_: getattr(ck, refusal))
    lose(core, "east")
    for _ in range(3):
        world.clock.pass_s(61)
        check(core)
    assert world.attempts == ["east"]


def test_login_that_stumbles_is_tried_again_but_not_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that say nothing about the PIN: SoftHSM gives such when several processes log in at once."""
    core = world.core("east", "west", interval_s=60)
    core.slots[0].user, core.slots[0].secret = ck.CKU_USER, object()
    answers = [ck.CKR_GENERAL_ERROR, ck.CKR_TOKEN_NOT_PRESENT, ck.CKR_OK]
    monkeypatch.setattr(Member, "login", lambda *_: answers.pop(0))
    monkeypatch.setattr(Member, "token_flags", lambda _: 0)
    lose(core, "east")
    world.clock.pass_s(61)
    check(core)
    assert answers == []
    assert up(core) == {"east", "west"}


def test_stumble_where_a_pin_was_wrong_stops_the_attempts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be that token's way of refusing the PIN: a try in each interval would lock it."""
    core = world.core("east", "west", interval_s=60)
    core.slots[0].user, core.slots[0].secret = ck.CKU_USER, object()
    tries: list[str] = []

    def login(member: Member, _user: int, _pin: object, _size: int) -> int:
        tries.append(member.name)
        return ck.CKR_GENERAL_ERROR

    monkeypatch.setattr(Member, "login", login)
    monkeypatch.setattr(Member, "token_flags", lambda _: ck.CKF_USER_PIN_COUNT_LOW)
    lose(core, "east")
    for _ in range(5):
        world.clock.pass_s(61)
        check(core)
    assert tries == ["east"]
    assert world.happened("recovery.stopped", "east") == 1


class Gate:
    """A connection that takes until it is let through."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.inside = self.most_inside = 0
        self.lock = threading.Lock()

    def __call__(self) -> None:
        with self.lock:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        self.entered.release()
        assert self.open.wait(PATIENCE_S)
        with self.lock:
            self.inside -= 1


def test_thirty_two_callers_make_one_attempt_and_none_waits_for_it(world: World) -> None:
    core = world.core("east", "west", interval_s=60, connect_timeout_s=PATIENCE_S, threads=True)
    lose(core, "east")
    gate = Gate()
    world.outcome["east"] = gate
    world.clock.pass_s(61)
    callers = [threading.Thread(target=check, args=(core,)) for _ in range(32)]
    for caller in callers:
        caller.start()
    assert gate.entered.acquire(timeout=PATIENCE_S)
    deadline = threading.Event()
    for _ in range(2000):
        if sum(caller.is_alive() for caller in callers) == 1:
            break
        deadline.wait(0.01)
    assert sum(caller.is_alive() for caller in callers) == 1  # the one that makes the attempt
    assert world.attempts == ["east"]
    gate.open.set()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert (gate.most_inside, world.attempts) == (1, ["east"])
    assert up(core) == {"east", "west"}


def test_attempt_that_does_not_end_costs_its_time_and_blocks_further_ones(world: World) -> None:
    core = world.core("east", "west", interval_s=60, connect_timeout_s=0.05, threads=True)
    lose(core, "east")
    gate = Gate()
    world.outcome["east"] = gate
    world.clock.pass_s(61)
    check(core)  # returns although the attempt is still under way
    assert world.happened("recovery.failed", "east") == 1
    assert up(core) == {"west"}
    for _ in range(3):
        world.clock.pass_s(61)
        check(core)
    assert world.attempts == ["east"]  # no second one beside the first

    gate.open.set()
    for _ in range(2000):
        if up(core) == {"east", "west"}:
            break
        threading.Event().wait(0.01)
    assert up(core) == {"east", "west"}  # a success that comes late is one


def test_member_that_failed_late_is_tried_again(world: World) -> None:
    core = world.core("east", "west", interval_s=60, connect_timeout_s=0.05, threads=True)
    lose(core, "east")
    gate = Gate()

    def connect() -> None:
        gate()
        raise ConnectError(ck.CKR_DEVICE_ERROR, "after all not")

    world.outcome["east"] = connect
    world.clock.pass_s(61)
    check(core)
    gate.open.set()
    world.works("east")
    for _ in range(2000):
        world.clock.pass_s(61)
        check(core)
        if up(core) == {"east", "west"}:
            break
        threading.Event().wait(0.01)
    assert up(core) == {"east", "west"}


def test_status_distinguishes_the_members_that_are_away(world: World) -> None:
    core = world.core("east", "west", "north")
    lose(core, "east", "north")
    assert up(core) == {"west"}
    assert world.happened("member.lost") == 2
    assert world.plane.serving[0] == 0b010
