"""The core's losses and recoveries against the reference of a group, on a clock that hypothesis winds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pkcs11_ha import ck
from pkcs11_ha.core.recovery import NEVER_NS
from pkcs11_ha.runtime.member import ConnectError, PinRefused
from tests.models import tell
from tests.models.group import Group
from tests.models.world import World, check, lose, up

NAMES, STANDBY = ("east", "west", "north", "south"), ("north", "south")
S = 10**9
BUDGET = 5 * S

members = st.sampled_from(NAMES)


class Machine(RuleBasedStateMachine):
    """What a member does when it is tried is drawn: it works, fails, or refuses the PIN, and takes its time."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    @initialize(x=st.sampled_from([1, 60]), n=st.integers(-1, 3))
    def begin(self, x: int, n: int) -> None:
        self.world.events.clear()
        self.world.outcome.clear()
        self.core = self.world.core(*NAMES, interval_s=x, attempts=n, standby=STANDBY)
        self.group = Group(NAMES, STANDBY, x * S, n)
        self.outcome: dict[str, tuple[type[ConnectError] | None, int]] = {}

    @property
    def now(self) -> int:
        return self.world.clock.now_ns

    @rule(
        name=members,
        error=st.sampled_from([None, None, ConnectError, ConnectError, PinRefused]),
        takes=st.sampled_from([0, 0, 1, S, BUDGET]),
    )
    def behave(self, name: str, error: type[ConnectError] | None, takes: int) -> None:
        def connect() -> None:
            self.world.clock.now_ns += takes
            if error is not None:
                raise error(ck.CKR_DEVICE_ERROR, "not there")

        self.outcome[name] = error, takes
        self.world.outcome[name] = connect

    @rule(name=members)
    def lose(self, name: str) -> None:
        lose(self.core, name)
        self.group.lose(name, self.now)

    @rule(name=members)
    def lose_of_another_life(self, name: str) -> None:
        """A call that was stuck since before the member's last return."""
        member = self.core.members[name]
        self.core.lose(member, ck.CKR_DEVICE_ERROR, "C_Sign", member.epoch - 1)

    @rule(ns=st.sampled_from([1, S, S + 1, 59 * S, 60 * S, 61 * S, 1000 * S]))
    def time_passes(self, ns: int) -> None:
        self.world.clock.now_ns += ns

    @rule()
    def call(self) -> None:
        """One round tries all that are due, until one took the budget."""
        now, tried = self.now, []
        for name in NAMES:
            if not self.group.due(name, now):
                continue
            error, takes = self.outcome.get(name, (None, 0))
            now += takes
            tried.append(name)
            if error is None:
                self.group.recovered(name)
            else:
                self.group.failed(name, now, error is PinRefused)
            if takes >= BUDGET:
                break
        self.world.attempts.clear()
        check(self.core)
        assert (self.world.attempts, self.now) == (tried, now)

    @invariant()
    def both_say_the_same(self) -> None:
        if not hasattr(self, "core"):
            return  # it has not begun
        group, plane = self.group, self.world.plane
        assert up(self.core) == set(NAMES) - set(group.away)
        assert plane.serving[0] == sum(1 << NAMES.index(name) for name in group.serving())
        dues = [
            away.last_recover_attempt + group.interval_ns
            for name, away in group.away.items()
            if group.due(name, away.last_recover_attempt + group.interval_ns + 1)
        ]
        assert plane.check_at[0] == min(dues, default=NEVER_NS)
        counts = {name: away.recover_attempt_count for name, away in group.away.items()}
        assert counts == {name: self.core.members[name].outage.failed for name in counts}


def test_core_does_what_the_reference_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, monkeypatch)
    tell(lambda: Machine(world), 100, 40)
