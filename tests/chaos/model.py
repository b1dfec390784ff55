"""What every member must hold in the end: a reference model without members, faults or time.

A write that was answered CKR_OK has happened.  One whose client crashed has happened or has not, and so has a change
or a destruction that was answered an error: the model keeps every outcome, and one of them must be found, the same
on each member.  A creation that was answered an error has not happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tests.chaos.objects import Thing

World = frozenset[Thing]  # objects that are there together


@dataclass(frozen=True)
class Make:
    """One object, or the two of a pair; `source` is what it is a copy of."""

    things: tuple[Thing, ...]
    source: Thing | None = None


@dataclass(frozen=True)
class Change:
    """Another name; `None` destroys."""

    thing: Thing
    new: Thing | None


Write = Make | Change


@dataclass(frozen=True)
class Outcome:
    """A write and what its client heard of it: the name of a code, or nothing."""

    write: Write
    rv: str

    @property
    def ok(self) -> bool:
        return self.rv == "CKR_OK"

    @property
    def crashed(self) -> bool:
        return not self.rv


class Model:
    """Objects that belong together are a patch; a patch has one world if it is certain, several if it is not."""

    def __init__(self) -> None:
        self.patches: list[set[World]] = []

    def happened(self, *outcomes: Outcome) -> None:
        """Several outcomes are of writes made at the same time: they came in some order."""
        for outcome in outcomes:
            if isinstance(outcome.write, Make):
                self._made(outcome.write, outcome)
        changes = [outcome for outcome in outcomes if isinstance(outcome.write, Change)]
        if not changes:
            return
        self.patches = [_changed(patch, changes) for patch in self.patches]
        assert all(self.patches), f"nothing explains {changes}"

    def _made(self, make: Make, outcome: Outcome) -> None:
        if outcome.ok:
            self.patches.append({frozenset(make.things)})
        elif outcome.crashed:
            self.patches.append({frozenset(make.things), frozenset()})

    def certain(self) -> set[Thing]:
        return {thing for patch in self.patches for thing in frozenset.intersection(*patch)}

    def possible(self) -> list[Thing]:
        """Every object that may be there, in the order of their making."""
        return [
            thing
            for patch in self.patches
            for thing in sorted(frozenset.union(*patch), key=lambda t: t.label)
        ]

    def settle(self, held: Iterable[Thing]) -> list[str]:
        """Take what was found for what has happened; complaints, none if it is one of the outcomes."""
        left, complaints = set(held), []
        for number, patch in enumerate(self.patches):
            found = left & frozenset.union(*patch)
            left -= found
            world = next((world for world in patch if world == found), None)
            if world is None:
                complaints.append(f"found {_named(found)}, not {' nor '.join(map(_named, patch))}")
            else:
                self.patches[number] = {world}
        return complaints + [f"found what nobody has made: {thing}" for thing in left]


def _changed(patch: set[World], changes: Sequence[Outcome]) -> set[World]:
    """The worlds after changes that came in any order; none if an answer tells of what cannot have been."""
    touched = {thing.uid for world in patch for thing in world}
    changes = [change for change in changes if _uid(change) in touched]
    orders = [changes, changes[::-1]] if len(changes) > 1 else [changes]
    worlds: set[World] = set()
    for order in orders:
        after = set(patch)
        for outcome in order:
            after = {new for world in after for new in _after(world, outcome)}
        worlds |= after
    return worlds


def _uid(outcome: Outcome) -> str:
    assert isinstance(outcome.write, Change)
    return outcome.write.thing.uid


def _after(world: World, outcome: Outcome) -> set[World]:
    assert isinstance(outcome.write, Change)
    new = outcome.write.new
    now = next((each for each in world if each.uid == _uid(outcome)), None)
    if now is None:  # two may destroy an object at the same time, and both are right
        return {world} if new is None or not outcome.ok else set()
    rest = world - {now}
    changed = rest if new is None else rest | {replace(new, uid=now.uid)}
    return {changed} if outcome.ok else {world, changed}


def _named(things: Iterable[Thing]) -> str:
    return "{" + ", ".join(sorted(f"{thing.kind} {thing.label}" for thing in things)) + "}"
