"""What can happen in a history, as values that hypothesis draws and prints.

A step picks its object, member or client by number, whatever there is; where it makes no sense nothing happens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from hypothesis import strategies as st

from tests.chaos import objects
from tests.chaos.history import ClientDies, Fault, History, MemberDies
from tests.chaos.model import Change, Make, Write
from tests.chaos.objects import Thing


class Step(Protocol):
    def go(self, history: History) -> None: ...


class What(Protocol):
    """A write that is not yet said of which object."""

    def of(self, history: History) -> Write | None: ...


@dataclass(frozen=True)
class New:
    recipe: str
    private: bool = True
    sensitive: bool = True
    extractable: bool = False

    def of(self, history: History) -> Write:
        flags = {"private": self.private, "sensitive": self.sensitive, "extractable": self.extractable}
        return Make(objects.new(self.recipe, history.name("o"), **flags))


@dataclass(frozen=True)
class Copy:
    pick: int

    def of(self, history: History) -> Write | None:
        thing = picked(history, self.pick)
        if thing is None:
            return None
        name = history.name("c")
        return Make((replace(objects.renamed(thing, name), uid=name),), source=thing)


@dataclass(frozen=True)
class Rename:
    pick: int

    def of(self, history: History) -> Write | None:
        thing = picked(history, self.pick)
        return Change(thing, objects.renamed(thing, history.name("n"))) if thing else None


@dataclass(frozen=True)
class Destroy:
    pick: int

    def of(self, history: History) -> Write | None:
        thing = picked(history, self.pick)
        return Change(thing, None) if thing else None


def picked(history: History, pick: int) -> Thing | None:
    things = history.model.possible()
    return things[pick % len(things)] if things else None


# ---- the steps


@dataclass(frozen=True)
class Do:
    client: int
    what: What
    fault: Fault = None

    def go(self, history: History) -> None:
        write = self.what.of(history)
        if write:
            history.write(self.client, write, self.fault)


@dataclass(frozen=True)
class DoBoth:
    """Client 0 does the one and client 1 the other, at the same time."""

    first: What
    second: What

    def go(self, history: History) -> None:
        first, second = self.first.of(history), self.second.of(history)
        if first and second:
            history.write_both(first, second)


@dataclass(frozen=True)
class Kill:
    member: int

    def go(self, history: History) -> None:
        history.kill(self.member % len(history.hsms))


@dataclass(frozen=True)
class GiveBack:
    member: int

    def go(self, history: History) -> None:
        history.give_back(self.member % len(history.hsms))


@dataclass(frozen=True)
class Enter:
    """A new process takes the place of the client, which dies if it was there."""

    client: int
    fault: Fault = None

    def go(self, history: History) -> None:
        history.enter(self.client, self.fault)


@dataclass(frozen=True)
class Leave:
    client: int

    def go(self, history: History) -> None:
        history.leave(self.client)


@dataclass(frozen=True)
class Wait:
    """The client works until it has all members that run."""

    client: int
    fault: Fault = None

    def go(self, history: History) -> None:
        history.wait(self.client, self.fault)


@dataclass(frozen=True)
class Look:
    client: int

    def go(self, history: History) -> None:
        history.look(self.client)


@dataclass(frozen=True)
class Use:
    client: int
    pick: int

    def go(self, history: History) -> None:
        thing = picked(history, self.pick)
        if thing:
            history.use(self.client, thing)


# ---- strategies

MOST_WRITES = 14  # of members, in one write of a client, about
numbers = st.integers(0, 7)
clients = st.integers(0, 1)
members = st.integers(0, 2)
deaths: st.SearchStrategy[Fault] = st.one_of(
    st.builds(ClientDies, st.integers(1, MOST_WRITES), st.booleans()),
    st.builds(MemberDies, members, st.integers(1, MOST_WRITES // 2), st.booleans()),
)
faults: st.SearchStrategy[Fault] = st.one_of(st.none(), deaths)
recipes = st.sampled_from(
    [recipe for recipe in objects.RECIPES if recipe != "rsa"] * 6 + ["rsa"]
)  # which is slow
new = st.builds(New, recipes, st.booleans(), st.booleans(), st.booleans())
whats: st.SearchStrategy[What] = st.one_of(
    new, st.builds(Copy, numbers), st.builds(Rename, numbers), st.builds(Destroy, numbers)
)
writes = st.one_of(st.builds(Do, clients, new, faults), st.builds(Do, clients, whats, faults))
steps: st.SearchStrategy[Step] = st.one_of(
    *[writes] * 5,
    st.builds(DoBoth, whats, whats),
    st.builds(Kill, members),
    st.builds(GiveBack, members),
    st.builds(Enter, clients, faults),
    st.builds(Leave, clients),
    st.builds(Wait, clients, faults),
    st.builds(Look, clients),
    st.builds(Use, clients, numbers),
)
# Short ones first: a failure is reported with the simplest history that shows it.
happenings = st.one_of(st.lists(steps, max_size=6), *[st.lists(steps, min_size=7, max_size=20)] * 3)
# Which members are behind servers; those that are not cannot be killed.
setups = st.sampled_from([(True, True), (True, True), (False, True), (True, True, True), (False, False)])
