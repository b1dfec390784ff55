"""The reference model by itself: which outcomes it allows, and what it complains of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import p11
from tests.chaos import objects
from tests.chaos.model import Change, Make, Model, Outcome
from tests.chaos.objects import Hidden, Thing
from tests.chaos.stores import Store, complaints

OK, ERROR, CRASH = "CKR_OK", "CKR_DEVICE_ERROR", ""


def pair(uid: str = "o1") -> tuple[Thing, ...]:
    return objects.new("ec", uid, private=True, sensitive=True, extractable=False)


def note(uid: str = "o1") -> Thing:
    return objects.new("data", uid, private=True, sensitive=False, extractable=False)[0]


def after(*outcomes: Outcome) -> Model:
    model = Model()
    for outcome in outcomes:
        model.happened(outcome)
    return model


def fits(model: Model, *held: Thing) -> bool:
    return not model.settle(held)


def test_answered_creation_has_happened() -> None:
    made = Outcome(Make((note(),)), OK)
    assert fits(after(made), note())
    assert not fits(after(made))


def test_refused_creation_has_not_happened() -> None:
    made = Outcome(Make((note(),)), ERROR)
    assert fits(after(made))
    assert not fits(after(made), note())


def test_crashed_creation_has_happened_wholly_or_not_at_all() -> None:
    public, private = pair()
    made = Outcome(Make((public, private)), CRASH)
    assert fits(after(made))
    assert fits(after(made), public, private)
    assert not fits(after(made), public)


@pytest.mark.parametrize("rv", [ERROR, CRASH])
def test_doubtful_change_may_have_happened(rv: str) -> None:
    new = objects.renamed(note(), "n2")
    outcomes = Outcome(Make((note(),)), OK), Outcome(Change(note(), new), rv)
    assert fits(after(*outcomes), note())
    assert fits(after(*outcomes), new)
    assert not fits(after(*outcomes))
    assert not fits(after(*outcomes), note(), new)


def test_what_was_destroyed_is_gone_by_any_name() -> None:
    new = objects.renamed(note(), "n2")
    doubtful = Outcome(Make((note(),)), OK), Outcome(Change(note(), new), CRASH)
    assert fits(after(*doubtful, Outcome(Change(note(), None), OK)))


def test_changes_at_the_same_time_come_in_some_order() -> None:
    one, other = objects.renamed(note(), "n2"), objects.renamed(note(), "n3")
    for held in (one, other):
        model = after(Outcome(Make((note(),)), OK))
        model.happened(Outcome(Change(note(), one), OK), Outcome(Change(note(), other), OK))
        assert fits(model, held)
    for first in (one, None):
        model = after(Outcome(Make((note(),)), OK))
        model.happened(Outcome(Change(note(), first), OK), Outcome(Change(note(), None), OK))
        assert not fits(model, one)
        assert fits(model)


def test_what_nobody_has_made_is_complained_of() -> None:
    assert not fits(Model(), note())


# ---- tokens


def store(name: str, *held: Thing, proof: bytes = b"", hidden: tuple[Hidden, ...] = ()) -> Store:
    proofs = {thing: proof or bytes.fromhex(thing.content) for thing in held}
    return Store(name, list(held), proofs, {}, list(hidden))


def wrong(*stores: Store) -> list[str]:
    return complaints(after(Outcome(Make((note(),)), OK)), stores, {}, {})


def test_tokens_that_agree_are_right() -> None:
    assert wrong(store("east", note()), store("west", note())) == []


@pytest.mark.parametrize(
    "west",
    [
        store("west"),
        store("west", note(), note()),
        store("west", replace(note(), private=False)),
        store("west", note(), proof=b"something else"),
        store("west", note(), hidden=(Hidden(p11.CKO_SECRET_KEY, "", b"pkcs11-ha new", "", b""),)),
        store("west", note(), hidden=(Hidden(p11.CKO_DATA, "pkcs11-ha announced", b"", "", b""),)),
    ],
    ids=["missing", "twice", "another flag", "another content", "half made", "under way"],
)
def test_a_token_that_differs_is_complained_of(west: Store) -> None:
    assert wrong(store("east", note()), west) != []
