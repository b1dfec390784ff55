"""Objects of a group against their reference: of the token and of sessions, over two sessions and deaths of members.

Without replication an object lives on the members that were there when it was made: while all of these are away it is
not found, and its handle says so; one of a session dies with them, unless it can be made again. With replication one of
the token lives as long as one member does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from demo.members import Worker
from tests import p11
from tests.conftest import GroupFactory
from tests.ha.app import Application, code, working_until
from tests.ha.conftest import clone
from tests.models import seconds, tell
from tests.models.members import Members
from tests.replication import domain
from tests.replication.conftest import models, scratch

PIN, NAMES = domain.PIN, domain.NAMES
domain_tokens = models
names = st.sampled_from("abc")
which = st.integers(0, 7)


@dataclass(frozen=True)
class Thing:
    """An object: the session that made it if it is that one's, the members that it lives on, and whether it is as the
    call that created it says: one of a session can then be made again."""

    label: str
    value: bytes
    session: int | None
    homes: frozenset[str]
    as_created: bool


class Machine(RuleBasedStateMachine):
    """One member at most is away, and what is away is known to be."""

    def __init__(
        self, start: Callable[[], Application], workers: Mapping[str, Worker], replicates: bool
    ) -> None:
        super().__init__()
        self.start_application, self.replicates = start, replicates
        self.members = Members(workers)

    @initialize()
    def begin(self) -> None:
        self.app = self.start_application()
        self.sessions = [self.app.login(PIN), self.app.open()]
        self.things: dict[int, Thing] = {}
        self.dead: list[int] = [0]

    def teardown(self) -> None:
        self.members.start_all()
        if hasattr(self, "app"):
            self.return_()
            for handle, thing in self.things.items():
                if thing.session is None:
                    self.sessions[0].destroy(handle)
            self.app.module.finalize()

    def gone(self, handle: int) -> None:
        del self.things[handle]
        self.dead.insert(0, handle)

    def is_here(self, thing: Thing) -> bool:
        return bool(thing.homes & self.members.running)

    def pick(self, which: int) -> tuple[int, Thing | None, str]:
        """A handle, its object, and what a call on it says."""
        if which >= len(self.things):
            return self.dead[which % len(self.dead)], None, "CKR_OBJECT_HANDLE_INVALID"
        handle, thing = list(self.things.items())[which]
        return handle, thing, "CKR_OK" if self.is_here(thing) else "CKR_DEVICE_ERROR"

    def made(self, handle: int, thing: Thing) -> None:
        assert handle not in {*self.things, *self.dead}
        self.things[handle] = thing

    # ---- members

    @precondition(lambda self: self.members.running == set(NAMES))
    @rule(name=st.sampled_from(NAMES))
    def kill(self, name: str) -> None:
        self.members.kill(name)
        working_until(lambda: self.sessions[0].find({}), lambda: self.app.away() == {name}, "it is lost")
        for handle, thing in list(self.things.items()):
            if thing.session is not None:
                self.things[handle] = replace(thing, homes=thing.homes - {name})
                self.left_without_home(handle)

    def left_without_home(self, handle: int) -> None:
        """A session object whose members have all died since: its first use makes it again, if that can be."""
        thing = self.things[handle]
        if thing.session is None or thing.homes:
            return
        if thing.as_created:
            label, value = self.sessions[thing.session].get(handle, p11.CKA_LABEL, p11.CKA_VALUE)
            assert (label, value) == (thing.label.encode(), thing.value)
            self.things[handle] = replace(thing, homes=frozenset(self.members.running))
        else:
            self.gone(handle)

    def return_(self) -> None:
        working_until(lambda: self.sessions[0].random(1), lambda: not self.app.away(), "the member is back")

    @precondition(lambda self: self.members.running != set(NAMES))
    @rule()
    def start(self) -> None:
        self.members.start_all()
        self.return_()

    # ---- objects

    def homes(self, session: int | None) -> frozenset[str]:
        """Of what is made now."""
        return frozenset(NAMES if self.replicates and session is None else self.members.running)

    @rule(by=st.integers(0, 1), token=st.booleans(), label=names, value=names)
    def create(self, by: int, token: bool, label: str, value: str) -> None:
        session = None if token else by
        thing = Thing(label, value.encode(), session, self.homes(session), as_created=True)
        template: p11.Template = {
            p11.CKA_CLASS: p11.CKO_DATA,
            p11.CKA_TOKEN: token,
            p11.CKA_PRIVATE: False,
            p11.CKA_LABEL: label,
            p11.CKA_VALUE: value,
            p11.CKA_APPLICATION: f"{len(self.things)} {len(self.dead)}",  # no two are the same
        }
        self.made(self.sessions[by].create(template), thing)

    @rule(by=st.integers(0, 1), which=which)
    def destroy(self, by: int, which: int) -> None:
        handle, thing, expected = self.pick(which)
        assert code(lambda: self.sessions[by].destroy(handle)) == expected
        if thing and expected == "CKR_OK":
            self.gone(handle)

    @rule(by=st.integers(0, 1), which=which, label=names)
    def set(self, by: int, which: int, label: str) -> None:
        handle, thing, expected = self.pick(which)
        if thing and not self.replicates and not thing.homes <= self.members.running:
            return  # those that are away would keep what it was
        assert code(lambda: self.sessions[by].set(handle, {p11.CKA_LABEL: label})) == expected
        if thing and expected == "CKR_OK":
            self.things[handle] = replace(thing, label=label, as_created=False)

    @rule(by=st.integers(0, 1), which=which)
    def get(self, by: int, which: int) -> None:
        handle, thing, expected = self.pick(which)
        read: list[tuple[bytes, ...]] = []
        said = code(lambda: read.append(self.sessions[by].get(handle, p11.CKA_LABEL, p11.CKA_VALUE)))
        assert said == expected
        if thing and expected == "CKR_OK":
            assert read == [(thing.label.encode(), thing.value)]

    @rule(by=st.integers(0, 1), which=which)
    def copy(self, by: int, which: int) -> None:
        handle, thing, expected = self.pick(which)
        copies: list[int] = []
        label = f"copy {len(self.things)} {len(self.dead)}"
        assert code(lambda: copies.append(self.sessions[by].copy(handle, {p11.CKA_LABEL: label}))) == expected
        for each in copies:
            assert thing
            session = None if thing.session is None else by
            homes = self.homes(session) & thing.homes  # a copy is made where its source is
            self.made(each, replace(thing, label=label, session=session, homes=homes, as_created=False))

    @rule(by=st.integers(0, 1))
    def close(self, by: int) -> None:
        """Its objects die; the login stays with the other session."""
        self.sessions[by].close()
        for handle in [handle for handle, thing in self.things.items() if thing.session == by]:
            self.gone(handle)
        self.sessions[by] = self.app.open()

    @rule(by=st.integers(0, 1), label=names)
    def find(self, by: int, label: str) -> None:
        self.finds(by, {p11.CKA_LABEL: label}, lambda thing: thing.label == label)

    @invariant()
    def all_are_found(self) -> None:
        if hasattr(self, "app"):
            self.finds(0, {p11.CKA_CLASS: p11.CKO_DATA}, lambda _thing: True)

    def finds(self, by: int, template: p11.Template, fits: Callable[[Thing], bool]) -> None:
        there = {
            handle: thing for handle, thing in self.things.items() if self.is_here(thing) and fits(thing)
        }
        found = self.sessions[by].find(template)
        assert len(found) == len(set(found))
        assert set(found) == set(there)


@pytest.fixture
def pair(models: object, directory: Path) -> Iterator[dict[str, Worker]]:
    """Two members with one domain key."""
    with ExitStack() as stack:
        tokens = [clone(token, directory / token.label) for token in models.pair]  # type: ignore[attr-defined]
        yield {token.label: stack.enter_context(Worker(token)) for token in tokens}


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield Path(path)


@pytest.mark.timeout(seconds(240))
@pytest.mark.parametrize("replication", ["none", "domain"])
def test_objects_are_what_their_reference_says(
    replication: str, module: Path, group: GroupFactory, pair: Mapping[str, Worker]
) -> None:
    where = group(
        *(worker.member() for worker in pair.values()),
        label=domain.LABEL,
        replication=replication,
        balance="round-robin",
        recovery={"interval_s": 1e-9},
    )

    def start() -> Application:
        app = Application(p11.Module(module), where)
        app.module.initialize()
        return app

    tell(lambda: Machine(start, pair, replication == "domain"), 15, 30)
