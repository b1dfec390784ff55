"""Which members are ejected for being slow or faulty beside their peers, and how they come back: values in, values out.

A member is compared on like with like alone: each kind of work (function, mechanism, key, size of the input) has a
histogram of its own, and a call is slow only beside what the peers needed for the same kind, at the same time.  Of two
halves of a group that differ, the better one is the measure.  Each stage of the operations is judged by itself.

    REGULAR ── outlier ──► EJECTED ── its time is up ──► TRIAL ── one operation, well done ──► WARMING ──► REGULAR
                              ▲                            │                                      │
                              └────── for longer ──────────┴────────────── outlier ───────────────┘
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from pkcs11_ha.core.codes import Code

N = TypeVar("N", int, float)

SLOW_NS = 1_000_000
"""By so much a call must be longer than its peers', too: what a worker's socket adds to a microsecond is no illness."""

REFERENCE_CALLS = 5
"""Calls of one kind that make a member a measure for others."""

WINDOW_INTERVALS = 12
"""A window that never gets full is given up after so many intervals."""

STEPS = 10
"""In so many steps a share grows from one tenth (Envoy's min_weight_percent) to the whole."""

FAULTS = frozenset({Code.BUSY, Code.SESSION, Code.LOGIN})
"""Answers that no request can provoke, and that are repaired or done elsewhere.  A dead member is lost, a suspect one
is judged by its peers' answer: who sends forgeries must not be able to have members ejected that are clumsy about them,
by their answer or by the operation that they leave behind."""


class Phase(enum.Enum):
    """Where a member stands."""

    REGULAR = "regular"
    EJECTED = "ejected"  # does what no other can, no more
    TRIAL = "trial"  # one operation is let through to it
    WARMING = "warming"  # its share of load grows


LEFT_OUT = (Phase.EJECTED, Phase.TRIAL)


class Stage(enum.IntEnum):
    """Where in an operation a call stands, as the data plane numbers it: the many quick calls of one do not water down
    the slow ones of another."""

    BEGIN = 0  # an Init, and whatever only asks for a length
    PART = 1  # an Update
    WORK = 2  # what ends the operation, or is all of it


class Kind(NamedTuple):
    """Calls that are like each other."""

    stage: Stage
    number: int


class Trial(enum.IntEnum):
    """What has become of the one operation, as the data plane numbers it."""

    OPEN = 0  # no call has come that could be it
    UNDER_WAY = 1
    ENDED = 2  # or never begun


@dataclass(frozen=True)
class Rule:
    """A group's settings; `ratio` is of calls, `latency_factor` of the peers' median."""

    interval_ns: int
    min_calls: int
    latency_factor: float
    ratio: float
    base_ns: int
    max_ns: int
    slow_start_ns: int


@dataclass(frozen=True)
class Course:
    """Where one member stands, since when, and how often in a row it was ejected."""

    phase: Phase = Phase.REGULAR
    since_ns: int = 0
    ejections: int = 0


Histogram = Sequence[int]
"""Calls by latency; see `edge_ns`."""


@dataclass(frozen=True)
class Window:
    """What one member did in a while: all its calls, the faults among them, and latencies by kind of work."""

    calls: int = 0
    faults: int = 0
    work: Mapping[Kind, Histogram] = field(default_factory=dict)

    @property
    def timed(self) -> int:
        """Calls of the stage that has fewest, of those that there are."""
        stages: Counter[Stage] = Counter()
        for kind, histogram in self.work.items():
            stages[kind.stage] += sum(histogram)
        return min(stages.values(), default=0)


@dataclass(frozen=True)
class Seat:
    """One member that is there: `own` is since it was last judged or admitted, `beside` what each did meanwhile.
    A trial is one call, often over before the others do the like: its peers' measure is their `reference`, a while."""

    course: Course
    own: Window = Window()
    beside: Mapping[int, Window] = field(default_factory=dict)
    reference: Window = Window()
    trial: Trial = Trial.ENDED
    stuck: bool = False  # the trial is still under way, and calls are inside the member


@dataclass(frozen=True)
class Excess:
    """By how much a member is worse than its peers: shares of its calls, 0 or less for one that is as they are."""

    slow: float = 0.0
    faulty: float = 0.0
    timed: int = 0  # calls that could be compared by their latency
    calls: int = 0  # all of them

    @property
    def worst(self) -> float:
        return max(self.slow, self.faulty)


@dataclass(frozen=True)
class Move:
    """What a step makes of one member, and why, if it changes."""

    course: Course
    why: str = ""
    excess: Excess = Excess()


def edge_ns(bucket: int) -> int:
    """The shortest latency in a bucket, but for the first, which has all below the second: two to an octave."""
    return (2 + bucket % 2) << (bucket // 2 + 7)


def _lower_median(values: Sequence[N]) -> N:
    """Of the better half, where there are two middles."""
    return sorted(values)[(len(values) - 1) // 2]


def _median_bucket(histogram: Histogram) -> int:
    left = (sum(histogram) + 1) // 2
    for bucket, count in enumerate(histogram):
        left -= count
        if left <= 0:
            return bucket
    raise ValueError("no calls")


def _slow_from(median: int, factor: float, buckets: int) -> int:
    """The first bucket all of which is slow beside peers whose median call is in bucket `median`."""
    usual = edge_ns(median + 1)
    limit = max(factor * usual, usual + SLOW_NS)
    return next((bucket for bucket in range(median, buckets) if edge_ns(bucket) >= limit), buckets)


def _slow(own: Window, peers: Sequence[Window], rule: Rule, stage: Stage) -> tuple[float, int]:
    """The share of calls of one stage that are slow beyond the peers', and how many could be compared.

    Slow calls weigh what such a call takes the peers: ten quick digests do not hide one signature.
    """
    weight, slow, compared = 0.0, 0.0, 0
    for kind, mine in own.work.items():
        if kind.stage is not stage:
            continue
        theirs = [h for peer in peers if sum(h := peer.work.get(kind, ())) >= REFERENCE_CALLS]
        calls = sum(mine)
        if not theirs or not calls:
            continue
        median = _lower_median([_median_bucket(h) for h in theirs])
        limit = _slow_from(median, rule.latency_factor, len(mine))
        usual = _lower_median([sum(h[limit:]) / sum(h) for h in theirs])
        weighs = calls * edge_ns(median)
        weight += weighs
        slow += weighs * (sum(mine[limit:]) / calls - usual)
        compared += calls
    return slow / weight if weight else 0.0, compared


def excess(own: Window, peers: Sequence[Window], rule: Rule, min_calls: int) -> Excess:
    """How much slower, in the stage where it is worst, and more faulty `own` is than its peers.

    A member that has less than `min_calls`, or no peers that did the same, shows nothing.
    """
    stages = [_slow(own, peers, rule, stage) for stage in Stage]
    slow = max((share for share, compared in stages if compared >= max(1, min_calls)), default=0.0)
    failing = [peer.faults / peer.calls for peer in peers if peer.calls >= max(1, rule.min_calls)]
    faulty = 0.0
    if own.calls >= max(1, min_calls) and failing:
        faulty = own.faults / own.calls - _lower_median(failing)
    return Excess(slow, faulty, sum(compared for _, compared in stages), own.calls)


def most_ejected(there: int) -> int:
    """Never more than half of the members that are there, so never the last."""
    return there // 2


def keep_floor(courses: Mapping[int, Course]) -> dict[int, Course]:
    """The courses of the members that are there, after some others were lost: who is one too many comes back at once,
    the first to be ejected first."""
    out = sorted((c.since_ns, i) for i, c in courses.items() if c.phase in LEFT_OUT)
    back = [index for _, index in out[: max(0, len(out) - most_ejected(len(courses)))]]
    return {i: replace(c, phase=Phase.REGULAR, ejections=0) if i in back else c for i, c in courses.items()}


def until_ns(course: Course, rule: Rule) -> int:
    """The end of an ejection: each in a row is longer than the one before."""
    return course.since_ns + min(rule.base_ns * course.ejections, rule.max_ns)


def share(course: Course, rule: Rule, now_ns: int) -> float:
    """The share of what would be its load that a member gets."""
    match course.phase:
        case Phase.REGULAR:
            return 1.0
        case Phase.WARMING:
            steps = (now_ns - course.since_ns) * STEPS // rule.slow_start_ns
            return min(max(1, steps), STEPS) / STEPS
        case _:
            return 0.0


def due_ns(courses: Sequence[Course], rule: Rule, now_ns: int) -> int:
    """When the next step is to be made."""
    due = now_ns + rule.interval_ns
    for course in courses:
        if course.phase is Phase.EJECTED and until_ns(course, rule) > now_ns:
            due = min(due, until_ns(course, rule))
        elif course.phase is Phase.WARMING:
            due = min(due, now_ns + rule.slow_start_ns // STEPS)
    return due


def is_full(windows: Sequence[Window], rule: Rule, age_ns: int) -> bool:
    """Whether the members' windows end here: they have shown enough, or have had time enough to."""
    enough = all(window.timed >= rule.min_calls for window in windows)
    return age_ns >= rule.interval_ns and (enough or age_ns >= WINDOW_INTERVALS * rule.interval_ns)


def step(seats: Mapping[int, Seat], rule: Rule, now_ns: int) -> dict[int, Move]:
    """One look at the members that are there: who is ejected, tried, admitted.  Every seat gets its move."""
    moves = {index: _go_on(index, seats, rule, now_ns) for index in seats}
    outliers = [
        (judged.worst, index, judged)
        for index, move in moves.items()
        if move.course.phase not in LEFT_OUT and move.course.phase is seats[index].course.phase
        if (judged := _judge(index, seats, rule)).worst >= rule.ratio
    ]
    left_out = sum(move.course.phase in LEFT_OUT for move in moves.values())
    room = max(0, most_ejected(len(seats)) - left_out)
    for _, index, judged in sorted(outliers, key=lambda outlier: (-outlier[0], outlier[1]))[:room]:
        moves[index] = _eject(moves[index].course, now_ns, _why(judged), judged)
    return moves


def _peers(index: int, seats: Mapping[int, Seat]) -> Iterable[int]:
    return (i for i, seat in seats.items() if i != index and seat.course.phase not in LEFT_OUT)


def _judge(index: int, seats: Mapping[int, Seat], rule: Rule) -> Excess:
    """Beside what its peers did at the same time: what slows all of them, the network or the host, is nobody's."""
    beside = seats[index].beside
    peers = [beside[i] for i in _peers(index, seats) if i in beside]
    return excess(seats[index].own, peers, rule, rule.min_calls)


def _why(judged: Excess) -> str:
    return "slow" if judged.slow >= judged.faulty else "faulty"


def _eject(course: Course, now_ns: int, why: str, judged: Excess) -> Move:
    return Move(Course(Phase.EJECTED, now_ns, course.ejections + 1), why, judged)


def _go_on(index: int, seats: Mapping[int, Seat], rule: Rule, now_ns: int) -> Move:
    """What time and the trial make of one member."""
    course = seats[index].course
    elapsed = now_ns - course.since_ns
    match course.phase:
        case Phase.REGULAR:
            return Move(replace(course, ejections=0) if elapsed >= rule.max_ns else course)
        case Phase.EJECTED if now_ns >= until_ns(course, rule) and not seats[index].stuck:
            return Move(replace(course, phase=Phase.TRIAL, since_ns=now_ns), "time is up")
        case Phase.TRIAL:
            return _after_trial(index, seats, rule, now_ns)
        case Phase.WARMING if elapsed >= rule.slow_start_ns:
            return Move(replace(course, phase=Phase.REGULAR, since_ns=now_ns))
    return Move(course)


def _after_trial(index: int, seats: Mapping[int, Seat], rule: Rule, now_ns: int) -> Move:
    """A trial that nobody takes up ends in a slow start, one that does not end in another ejection."""
    seat = seats[index]
    admitted = replace(seat.course, phase=Phase.WARMING, since_ns=now_ns)
    late = now_ns - seat.course.since_ns >= rule.base_ns
    if seat.trial is Trial.ENDED:
        judged = excess(seat.own, [seats[i].reference for i in _peers(index, seats)], rule, 1)
        if not seat.own.faults and judged.slow < rule.ratio:
            return Move(admitted, "tried", judged)
        return _eject(seat.course, now_ns, "faulty" if seat.own.faults else "slow", judged)
    if late and seat.trial is Trial.UNDER_WAY:
        return _eject(seat.course, now_ns, "hangs", Excess())
    return Move(admitted, "nobody tried") if late else Move(seat.course)
