"""A group of real members against its reference: who serves, what calls and the status say, when members return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from tests.ha.app import Application, code
from tests.models import seconds, tell
from tests.models.conftest import NAMES
from tests.models.group import Group
from tests.models.members import Members

STANDBY = ("north",)
X_NS, N = 1_000_000, 3
STORIES, STEPS = 60, 30

members = st.sampled_from(NAMES)


class Machine(RuleBasedStateMachine):
    """The core's clock is the story's. It is far behind the machine's, so that the data plane always asks the core.

    With "primary-first" it is known whom a call asks; who is asked while dead is found out.
    """

    def __init__(self, start: Callable[[], Application], workers: Mapping[str, Worker]) -> None:
        super().__init__()
        self.start_application = start
        self.members = Members(workers)

    @initialize()
    def begin(self) -> None:
        self.app = self.start_application()
        self.now = 0
        self.app.core.clock = lambda: self.now
        self.slot, self.session = self.app.slot, self.app.open()
        self.serials = {name: member.serial for name, member in self.app.core.members.items()}
        self.group = Group(NAMES, STANDBY, X_NS, N)
        self.connected = dict(self.members.life)  # in which life of each
        self.reported = True

    def teardown(self) -> None:
        if hasattr(self, "app"):
            self.app.module.finalize()
        self.members.start_all()

    # ---- what the reference says of a call

    def answers(self, name: str) -> bool:
        return name in self.members.running and self.connected[name] == self.members.life[name]

    def reconnects(self, name: str) -> bool:
        self.connected[name] = self.members.life[name]
        return name in self.members.running

    def check(self) -> None:
        self.group.check(self.now, self.reconnects)

    def ask_one(self) -> str:
        """Who does it, in a call that one member can serve; nobody: empty."""
        while serving := self.group.serving():
            if self.answers(serving[0]):
                return serving[0]
            self.group.lose(serving[0], self.now)
        return ""

    def ask_all(self) -> list[str]:
        """Who does it, in a call that every member serves."""
        while dead := [name for name in self.group.serving() if not self.answers(name)]:
            for name in dead:
                self.group.lose(name, self.now)
        return self.group.serving()

    # ---- what happens

    @precondition(lambda self: self.members.running)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.members.kill(data.draw(st.sampled_from(sorted(self.members.running))))

    @precondition(lambda self: len(self.members.running) < len(NAMES))
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.members.start(data.draw(st.sampled_from(sorted(set(NAMES) - self.members.running))))

    @rule()
    def all_return(self) -> None:
        self.members.start_all()
        self.time_passes(X_NS + 1)
        self.session_info()

    @rule(ns=st.sampled_from([1, X_NS, X_NS + 1]))
    def time_passes(self, ns: int) -> None:
        self.now += ns

    @rule()
    def random(self) -> None:
        self.check()
        who = self.ask_one()
        assert code(lambda: self.session.random(8)) == ("CKR_OK" if who else "CKR_DEVICE_ERROR")
        if who:
            assert self.app.served(self.session) == who

    @rule()
    def find(self) -> None:
        self.check()
        who = self.ask_all()
        assert code(lambda: self.session.find({})) == ("CKR_OK" if who else "CKR_DEVICE_ERROR")

    @rule()
    def token_info(self) -> None:
        self.check()
        who = self.ask_one()
        expected = "CKR_OK" if who else "CKR_TOKEN_NOT_PRESENT"
        assert code(lambda: self.app.module.token(self.slot)) == expected

    @rule()
    def session_info(self) -> None:
        self.check()
        assert code(self.session.info) == ("CKR_OK" if self.group.serving() else "CKR_DEVICE_ERROR")

    @rule()
    def open(self) -> None:
        self.check()
        expected = "CKR_OK" if self.group.serving() else "CKR_TOKEN_NOT_PRESENT"
        assert code(lambda: self.app.open().close()) == expected

    @rule()
    def slots(self) -> None:
        self.check()
        assert self.app.module.slots() == ([self.slot] if self.group.serving() else [])

    @rule()
    def status(self) -> None:
        self.check()
        said = {self.serials[name]: status for name, status in self.group.status().items()}
        assert self.app.status() == said

    @rule()
    def event(self) -> None:
        present = bool(self.group.serving())
        assert self.app.slot_event() == (self.slot if present != self.reported else None)
        self.reported = present

    @invariant()
    def same_are_away(self) -> None:
        if hasattr(self, "app"):
            counts = {name: away.recover_attempt_count for name, away in self.group.away.items()}
            assert counts == {name: self.app.core.members[name].outage.failed for name in self.app.away()}


@pytest.fixture
def start(module: Path, group: GroupFactory, workers: Mapping[str, Worker]) -> Callable[[], Application]:
    """Initialises the module on the three; a story finalises it."""
    where = group(
        *(worker.member() for worker in workers.values()),
        standby=list(STANDBY),
        balance="primary-first",
        recovery={"interval_s": X_NS / 1e9, "attempts": N},
        ha={"only": True},
    )

    def begin() -> Application:
        app = Application(p11.Module(module), where)
        app.module.initialize()
        return app

    return begin


@pytest.mark.timeout(seconds(240))
def test_group_is_what_its_reference_says(
    start: Callable[[], Application], workers: Mapping[str, Worker]
) -> None:
    tell(lambda: Machine(start, workers), STORIES, STEPS)
