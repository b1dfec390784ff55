"""Objects of two members find each other, each at most once, and never one that could be another's."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_ha import ck
from pkcs11_ha.core import pairing
from pkcs11_ha.core.identity import Identity, Kind, Match, Name, compare
from pkcs11_ha.core.pairing import Ambiguity, Pairing, pair

KEY = Identity(Name(ck.CKO_SECRET_KEY, ck.CKK_AES, b"", b"", b"", b""), Kind.SECRET_KEY, True, True)
A = replace(KEY, fingerprint=b"a")
B = replace(KEY, fingerprint=b"b")
BORROWED_A = replace(A, borrowed=True)
UNKNOWN = replace(KEY, name=KEY.name._replace(type=None))
NOBODY_A = replace(UNKNOWN, fingerprint=b"a")


def checked(value: bytes) -> Identity:
    return replace(KEY, hints=((ck.CKA_CHECK_VALUE, value),))


X, Y = checked(b"xxx"), checked(b"yyy")


def run(ours: Sequence[Identity], theirs: Sequence[Identity]) -> Pairing[int, str]:
    """Ours are numbered from 0, theirs lettered from a."""
    return pair(list(enumerate(ours)), [(chr(ord("a") + i), t) for i, t in enumerate(theirs)])


def result(
    same: Sequence[tuple[int, str]] = (),
    unproven: Sequence[tuple[int, str]] = (),
    ambiguous: Sequence[tuple[Sequence[int], str]] = (),
    only_ours: Sequence[int] = (),
    only_theirs: str = "",
) -> Pairing[int, str]:
    return Pairing(
        tuple(same),
        tuple(unproven),
        tuple(Ambiguity(tuple(ours), tuple(theirs)) for ours, theirs in ambiguous),
        tuple(only_ours),
        tuple(only_theirs),
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([], [], result()),
        ([A], [], result(only_ours=[0])),
        ([], [A], result(only_theirs="a")),
        ([A, B], [B, A], result(same=[(0, "b"), (1, "a")])),
        ([A], [B], result(only_ours=[0], only_theirs="a")),
        ([A, A, A], [A, A], result(same=[(0, "a"), (1, "b")], only_ours=[2])),
        ([A, A], [A, A, A], result(same=[(0, "a"), (1, "b")], only_theirs="c")),
        # twins: who agrees in CKA_PRIVATE first, then whoever is left
        ([replace(A, private=False), A], [A], result(same=[(1, "a")], only_ours=[0])),
        ([replace(A, private=False), A], [A, A], result(same=[(0, "b"), (1, "a")])),
        ([KEY], [KEY], result(unproven=[(0, "a")])),
        ([KEY], [replace(KEY, private=False)], result(unproven=[(0, "a")])),
        ([KEY, KEY], [KEY], result(ambiguous=[([0, 1], "a")])),
        ([KEY], [KEY, KEY], result(ambiguous=[([0], "ab")])),
        ([KEY], [A, B], result(ambiguous=[([0], "ab")])),
        # what has found its like is no candidate any more
        ([A, KEY], [KEY, A], result(same=[(0, "b")], unproven=[(1, "a")])),
        ([A, KEY], [A], result(same=[(0, "a")], only_ours=[1])),
        ([A, A], [A, KEY], result(same=[(0, "a")], unproven=[(1, "b")])),
        ([A], [BORROWED_A], result(unproven=[(0, "a")])),
        ([A, B], [BORROWED_A], result(unproven=[(0, "a")], only_ours=[1])),
        ([BORROWED_A], [BORROWED_A, B], result(unproven=[(0, "a")], only_theirs="b")),
        ([X, Y], [Y, X], result(unproven=[(0, "b"), (1, "a")])),
        ([X], [Y], result(only_ours=[0], only_theirs="a")),
        ([X, Y], [X, KEY], result(ambiguous=[([0, 1], "ab")])),
        ([KEY, A], [X, Y], result(ambiguous=[([0, 1], "ab")])),
        ([X, KEY], [X], result(ambiguous=[([0, 1], "a")])),
        ([UNKNOWN], [UNKNOWN], result(only_ours=[0], only_theirs="a")),
        ([NOBODY_A], [NOBODY_A], result(only_ours=[0], only_theirs="a")),
        ([replace(A, token=False)], [A], result(only_ours=[0], only_theirs="a")),
        (
            [replace(KEY, name=KEY.name._replace(label=label)) for label in (b"2", b"1")],
            [replace(KEY, name=KEY.name._replace(label=label)) for label in (b"1", b"2")],
            result(unproven=[(0, "b"), (1, "a")]),
        ),
    ],
)
def test_pairs(ours: list[Identity], theirs: list[Identity], expected: Pairing[int, str]) -> None:
    assert run(ours, theirs) == expected


# Small alphabets, so that names, fingerprints and hints meet; no hints beside a fingerprint, as `identify` has it.
names = st.builds(
    lambda known, label: KEY.name._replace(type=ck.CKK_AES if known else None, label=label),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([b"1", b"2"]),
)
hinted = st.builds(
    lambda check, length: tuple((number, v) for number, v in ((1, check), (ck.CKA_CHECK_VALUE, length)) if v),
    st.sampled_from([None, b"x", b"y"]),
    st.sampled_from([None, b"l", b"m", b"n"]),
)
identities = st.one_of(
    st.builds(Identity, names, st.just(Kind.SECRET_KEY), st.booleans(), st.booleans(), hints=hinted),
    st.builds(
        Identity,
        names,
        st.just(Kind.SECRET_KEY),
        st.just(True),
        st.booleans(),
        st.sampled_from([b"f", b"g"]),
        st.booleans(),
    ),
)
members = st.lists(identities, max_size=8)


def at(theirs: list[Identity], letter: str) -> Identity:
    return theirs[ord(letter) - ord("a")]


@given(members, members)
def test_every_object_is_in_the_result_once(ours: list[Identity], theirs: list[Identity]) -> None:
    got = run(ours, theirs)
    our_places = [i for i, _ in got.same + got.unproven] + [i for a in got.ambiguous for i in a.ours]
    their_places = [j for _, j in got.same + got.unproven] + [j for a in got.ambiguous for j in a.theirs]
    assert sorted([*our_places, *got.only_ours]) == list(range(len(ours)))
    assert sorted([*their_places, *got.only_theirs]) == [chr(ord("a") + j) for j in range(len(theirs))]


@given(members, members)
def test_nothing_is_paired_against_the_evidence(ours: list[Identity], theirs: list[Identity]) -> None:
    got = run(ours, theirs)
    for i, them in got.same:
        one, other = ours[i], at(theirs, them)
        assert compare(one, other) is Match.SAME
        assert one.name == other.name
        assert one.fingerprint == other.fingerprint is not None
        assert not one.borrowed
        assert not other.borrowed
    for i, them in got.unproven:
        one, other = ours[i], at(theirs, them)
        assert compare(one, other) is Match.UNPROVEN
        assert None in (one.fingerprint, other.fingerprint) or one.fingerprint == other.fingerprint


@given(members, members)
def test_nothing_is_left_that_could_be_paired(ours: list[Identity], theirs: list[Identity]) -> None:
    """By the plain reading of the rules, over all pairs of what is not SAME."""
    got = run(ours, theirs)
    our_rest = set(range(len(ours))) - {i for i, _ in got.same}
    their_rest = {chr(ord("a") + j) for j in range(len(theirs))} - {j for _, j in got.same}
    matches = {(i, j): compare(ours[i], at(theirs, j)) for i in our_rest for j in their_rest}
    assert Match.SAME not in matches.values()
    edges = {places for places, match in matches.items() if match is Match.UNPROVEN}
    assert set(got.only_ours) == our_rest - {i for i, _ in edges}
    assert set(got.only_theirs) == their_rest - {j for _, j in edges}
    assert set(got.unproven) == {
        (i, j) for i, j in edges if not any((i == other_i) != (j == other_j) for other_i, other_j in edges)
    }
    for group in got.ambiguous:
        inside = {(i, j) for i, j in edges if i in group.ours}
        assert inside == {(i, j) for i, j in edges if j in group.theirs}
        assert _connected(inside)
        assert {i for i, _ in inside} == set(group.ours)
        assert {j for _, j in inside} == set(group.theirs)
        assert len(group.ours) + len(group.theirs) > 2


def _connected(edges: set[tuple[int, str]]) -> bool:
    reached: set[int | str] = set(next(iter(edges)))
    while new := {end for edge in edges if reached & set(edge) for end in edge} - reached:
        reached |= new
    return reached == {end for edge in edges for end in edge}


Identities = tuple[Identity, ...]


def _by_identity(
    got: Pairing[int, str], ours: list[Identity], theirs: list[Identity]
) -> tuple[list[Counter[tuple[Identities, Identities]]], Counter[Identity], Counter[Identity]]:
    """What is the same, unproven and ambiguous, and what is alone, with identities in the place of numbers."""

    def us(places: Sequence[int]) -> Identities:
        return tuple(sorted((ours[i] for i in places), key=_order))

    def them(places: Sequence[str]) -> Identities:
        return tuple(sorted((at(theirs, j) for j in places), key=_order))

    shared = [
        Counter((us([i]), them([j])) for i, j in got.same),
        Counter((us([i]), them([j])) for i, j in got.unproven),
        Counter((us(group.ours), them(group.theirs)) for group in got.ambiguous),
    ]
    return shared, Counter(us(got.only_ours)), Counter(them(got.only_theirs))


def _order(identity: Identity) -> str:
    return str(astuple(identity))


@given(members, members, st.randoms(use_true_random=False))
def test_order_says_nothing(ours: list[Identity], theirs: list[Identity], random: Random) -> None:
    before = _by_identity(run(ours, theirs), ours, theirs)
    random.shuffle(ours)
    random.shuffle(theirs)
    assert _by_identity(run(ours, theirs), ours, theirs) == before


@given(members, members)
def test_both_sides_see_the_same(ours: list[Identity], theirs: list[Identity]) -> None:
    shared, only_ours, only_theirs = _by_identity(run(ours, theirs), ours, theirs)
    mirrored, only_theirs_there, only_ours_there = _by_identity(run(theirs, ours), theirs, ours)
    assert shared == [Counter({(us, them): n for (them, us), n in c.items()}) for c in mirrored]
    assert (only_ours, only_theirs) == (only_ours_there, only_theirs_there)


def test_thousands_of_keys_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counting(one: Identity, other: Identity) -> Match:
        nonlocal calls
        calls += 1
        return compare(one, other)

    monkeypatch.setattr(pairing, "compare", counting)
    told = [checked(i.to_bytes(3, "big")) for i in range(3000)]
    got = run(told, told[::-1])
    assert len(got.unproven) == 3000
    got = run([KEY] * 3000, [KEY] * 3000)
    assert len(got.ambiguous) == 1
    assert calls < 10_000
