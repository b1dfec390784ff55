"""Which objects of two members are the same, over all their objects at once."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from pkcs11_ha.core.identity import Identity, Match, Name, compare

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Ambiguity(Generic[T, U]):
    """Objects of one name that nothing tells apart: at least two on one side and one on the other."""

    ours: tuple[T, ...]
    theirs: tuple[U, ...]


@dataclass(frozen=True, slots=True)
class Pairing(Generic[T, U]):
    """What two members have in common: every object exactly once, in the order they were given."""

    same: tuple[tuple[T, U], ...]
    unproven: tuple[tuple[T, U], ...]
    """Each is the other's only candidate; an operation must prove it."""
    ambiguous: tuple[Ambiguity[T, U], ...]
    only_ours: tuple[T, ...]
    only_theirs: tuple[U, ...]


class _Group(NamedTuple):
    """Objects of one name, ours and theirs: place in the list they came from, and identity."""

    ours: list[tuple[int, Identity]]
    theirs: list[tuple[int, Identity]]


class _Places(NamedTuple):
    ours: list[int]
    theirs: list[int]


def pair(ours: Sequence[tuple[T, Identity]], theirs: Sequence[tuple[U, Identity]]) -> Pairing[T, U]:
    """Match the objects of two members: whatever stands for an object, with its identity.

    Where a member has several objects of one name and one fingerprint, they hold the same key, so the first
    of ours goes with the first of theirs and so on; those that agree in CKA_PRIVATE find each other first.
    Apart from which of such twins is taken, the result does not depend on the order of the lists.
    """
    groups: dict[tuple[Name, bool], _Group] = {}
    for side, objects in enumerate((ours, theirs)):
        for place, (_, identity) in enumerate(objects):
            group = groups.setdefault((identity.name, identity.token), _Group([], []))
            group[side].append((place, identity))

    same: list[tuple[int, int]] = []
    parts: list[_Places] = []
    for group in groups.values():
        same += _take_same(group)
        parts += _connected(group)
    parts.sort()
    shared = [part for part in parts if part.ours and part.theirs]
    alone = [part for part in parts if not (part.ours and part.theirs)]
    return Pairing(
        same=tuple((ours[i][0], theirs[j][0]) for i, j in sorted(same)),
        unproven=tuple(
            (ours[part.ours[0]][0], theirs[part.theirs[0]][0])
            for part in shared
            if len(part.ours) == len(part.theirs) == 1
        ),
        ambiguous=tuple(
            Ambiguity(tuple(ours[i][0] for i in part.ours), tuple(theirs[j][0] for j in part.theirs))
            for part in shared
            if len(part.ours) + len(part.theirs) > 2
        ),
        only_ours=tuple(ours[i][0] for part in alone for i in part.ours),
        only_theirs=tuple(theirs[j][0] for part in alone for j in part.theirs),
    )


def _take_same(group: _Group) -> list[tuple[int, int]]:
    """Takes out of the group the pairs that `compare` calls SAME, as many as there are."""

    def proof(identity: Identity) -> bytes | None:
        return identity.fingerprint if identity.is_known and not identity.borrowed else None

    alike = _take_equal(group, lambda identity: proof(identity) and (proof(identity), identity.private))
    return alike + _take_equal(group, proof)


def _take_equal(group: _Group, key: Callable[[Identity], Hashable]) -> list[tuple[int, int]]:
    """Takes out of the group the pairs whose keys are equal and not None: first with first, and so on."""
    waiting: dict[Hashable, list[int]] = {}
    for place, identity in reversed(group.theirs):
        waiting.setdefault(key(identity), []).append(place)
    waiting.pop(None, None)
    pairs = [
        (place, partners.pop())
        for place, identity in group.ours
        if (partners := waiting.get(key(identity)))  # an empty list has given all it had
    ]
    for side, taken in zip(group, ({i for i, _ in pairs}, {j for _, j in pairs}), strict=True):
        side[:] = [(place, identity) for place, identity in side if place not in taken]
    return pairs


def _connected(group: _Group) -> list[_Places]:
    """Splits the group so that nothing in one part can be anything in another: all that UNPROVEN connects.

    Objects that show the same are looked at once, and check values lead to the candidates: a token can hold
    thousands of keys without a name.
    """
    sides: tuple[dict[Identity, list[int]], dict[Identity, list[int]]] = ({}, {})
    near: tuple[dict[bytes | None, list[Identity]], dict[bytes | None, list[Identity]]] = ({}, {})
    for objects, alike, by_check_value in zip(group, sides, near, strict=True):
        for place, identity in objects:
            alike.setdefault(replace(identity, private=False), []).append(place)
        for identity in alike:
            by_check_value.setdefault(identity.check_value, []).append(identity)

    def candidates(side: int, identity: Identity) -> set[tuple[int, Identity]]:
        value, other = identity.check_value, 1 - side
        close = sides[other] if value is None else near[other].get(value, []) + near[other].get(None, [])
        return {(other, them) for them in close if compare(identity, them) is Match.UNPROVEN}

    parts = []
    seen: set[tuple[int, Identity]] = set()
    for start in [(side, identity) for side, identities in enumerate(sides) for identity in identities]:
        if start in seen:
            continue
        seen.add(start)
        part, frontier = _Places([], []), [start]
        while frontier:
            side, identity = frontier.pop()
            part[side].extend(sides[side][identity])
            new = candidates(side, identity) - seen
            seen |= new
            frontier += new
        parts.append(_Places(sorted(part.ours), sorted(part.theirs)))
    return parts
