"""Which faults come in which order: drawn from a seed, nothing is done here.

A step strikes one or two targets at once, and spares a member: it stays alive from before the step until after its
end, so that no call has a reason to fail.  A blackout spares nobody.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Form(Enum):
    """How a member is reached."""

    OWN = "own"  # in a worker that each client starts for itself
    WORKER = "worker"  # `pkcs11-ha-worker --listen`
    SERVER = "server"  # `p11-kit server`, through a relay of ours


@dataclass(frozen=True)
class Seat:
    """A member: its name, its form, and whether it carries every mechanism, so that it may be the last one."""

    name: str
    form: Form
    complete: bool = True


@dataclass(frozen=True)
class Arena:
    """A group as an operator would configure it."""

    name: str
    replication: str
    seats: tuple[Seat, ...]


ARENAS = (
    Arena(
        "domain",
        "domain",
        (Seat("east", Form.OWN), Seat("west", Form.WORKER), Seat("north", Form.WORKER)),
    ),
    Arena(
        "mixed",
        "none",  # p11-kit's client carries no wrapping of keys, and not every mechanism
        (Seat("east", Form.OWN), Seat("west", Form.WORKER), Seat("north", Form.SERVER, complete=False)),
    ),
)

CLIENT = None  # a kind that strikes a client instead of a member
BLACKOUT = "blackout"


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what it can strike, and between which seconds it lasts."""

    name: str
    about: str
    forms: frozenset[Form] | None
    least_s: float = 0.0
    most_s: float = 0.0


_ALL = frozenset(Form)
_APART = frozenset({Form.WORKER, Form.SERVER})
_LINK = frozenset({Form.SERVER})
_OWN = frozenset({Form.OWN})

KINDS = {
    kind.name: kind
    for kind in (
        Kind("slow", "each piece that the relay passes on is late", _LINK, 0.5, 2.0),
        Kind("stall", "the relay passes nothing on", _LINK, 0.5, 3.0),
        Kind("cut", "the relay closes every connection and takes none", _LINK, 0.0, 1.5),
        Kind("half-close", "the relay ends one direction of every connection", _LINK),
        Kind("kill", "SIGKILL; the server is started again at once", _ALL),
        Kind("restart", "SIGKILL; the server is down for a while", _APART, 0.5, 2.5),
        Kind("crash", "SIGSEGV in the process that has the library", _ALL),
        Kind("exit", "that process ends as if by exit()", _ALL),
        Kind("stop", "SIGSTOP, and SIGCONT after a while", _ALL, 0.3, 3.0),
        Kind("disk-full", "the token's store takes no more", _ALL, 0.5, 2.0),
        Kind("store-away", "the token's store is moved away, and back", _ALL, 0.5, 1.5),
        Kind("session-lost", "the token closes the next few sessions that are used", _ALL),
        Kind("login-lost", "the token logs the user out", _ALL),
        Kind("client-kill", "SIGKILL to the application; it is started again", CLIENT, 0.0, 0.5),
        Kind("pin-refused", "the token's PIN is another; put back, all clients start again", _OWN, 2.0, 3.0),
        Kind(BLACKOUT, "no member is left for a moment", _ALL, 0.3, 1.0),
    )
}


@dataclass(frozen=True)
class Strike:
    kind: str
    target: str


@dataclass(frozen=True)
class Step:
    """What comes next: after a pause, strikes that begin together and last as long."""

    number: int
    spare: str | None
    strikes: tuple[Strike, ...]
    pause_s: float
    hold_s: float


def kinds_for(arena: Arena) -> list[str]:
    forms = {seat.form for seat in arena.seats}
    return [kind.name for kind in KINDS.values() if kind.forms is CLIENT or kind.forms & forms]


def steps(arena: Arena, clients: Sequence[str], seed: int, kinds: Sequence[str] = ()) -> Iterator[Step]:
    """Without end; each kind (of `kinds`, if some are named) comes once before any comes again."""
    chance = random.Random(f"{seed} {arena.name}")
    possible = [kind for kind in kinds_for(arena) if not kinds or kind in kinds]
    number = 0
    while possible:
        for kind in chance.sample(possible, len(possible)):
            number += 1
            yield _step(number, arena, clients, kind, possible, chance)


def _step(
    number: int,
    arena: Arena,
    clients: Sequence[str],
    kind: str,
    possible: Sequence[str],
    chance: random.Random,
) -> Step:
    pause_s, hold_s = chance.uniform(0.1, 0.6), chance.uniform(KINDS[kind].least_s, KINDS[kind].most_s)
    if kind == BLACKOUT:
        everybody = tuple(Strike(BLACKOUT, seat.name) for seat in arena.seats)
        return Step(number, None, everybody, pause_s, hold_s)
    spare = chance.choice([seat for seat in arena.seats if seat.complete and _others(arena, seat, kind)])
    strikes = [Strike(kind, _target(arena, spare, kind, clients, chance))]
    if chance.random() < 0.3 and kind != "pin-refused":
        strikes += _second(arena, spare, strikes[0], possible, clients, chance)
    return Step(number, spare.name, tuple(strikes), pause_s, hold_s)


def _others(arena: Arena, spare: Seat, kind: str) -> list[Seat]:
    """Members besides the spare one that such a fault can strike."""
    forms = KINDS[kind].forms
    return [seat for seat in arena.seats if seat is not spare and (forms is CLIENT or seat.form in forms)]


def _target(arena: Arena, spare: Seat, kind: str, clients: Sequence[str], chance: random.Random) -> str:
    if KINDS[kind].forms is CLIENT:
        return chance.choice(clients)
    return chance.choice(_others(arena, spare, kind)).name


def _second(
    arena: Arena,
    spare: Seat,
    first: Strike,
    possible: Sequence[str],
    clients: Sequence[str],
    chance: random.Random,
) -> list[Strike]:
    """Something else that happens to somebody else at the same time."""
    alone = (first.kind, BLACKOUT, "pin-refused")
    kinds = [kind for kind in possible if kind not in alone and _others(arena, spare, kind)]
    if not kinds:
        return []
    kind = chance.choice(kinds)
    target = _target(arena, spare, kind, clients, chance)
    return [] if target == first.target else [Strike(kind, target)]
