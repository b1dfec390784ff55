"""Who is ejected, tried and admitted: the rules as cases, and what must hold whatever the members do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pkcs11_ha.core.outlier import (
    LEFT_OUT,
    REFERENCE_CALLS,
    SLOW_NS,
    Course,
    Histogram,
    Kind,
    Move,
    Phase,
    Rule,
    Seat,
    Stage,
    Trial,
    Window,
    due_ns,
    edge_ns,
    excess,
    is_full,
    keep_floor,
    most_ejected,
    share,
    step,
    until_ns,
)

S = 10**9
RULE = Rule(
    interval_ns=10 * S,
    min_calls=20,
    latency_factor=5,
    ratio=0.2,
    base_ns=30 * S,
    max_ns=100 * S,
    slow_start_ns=20 * S,
)
BUCKETS = 64
NOW = 1000 * S
SIGN, DIGEST = Kind(Stage.WORK, 7), Kind(Stage.WORK, 8)
INIT, ASK, UPDATE = Kind(Stage.BEGIN, 7), Kind(Stage.BEGIN, 8), Kind(Stage.PART, 7)


def bucket(ns: int) -> int:
    return max(b for b in range(BUCKETS) if b == 0 or edge_ns(b) <= ns)


def took(**calls: int) -> Histogram:
    """`took(us_200=90, ms_30=10)`: so many calls of such a latency."""
    histogram = [0] * BUCKETS
    for name, count in calls.items():
        unit, number = name.split("_")
        histogram[bucket(int(number) * {"us": 1000, "ms": 10**6, "s": S}[unit])] += count
    return histogram


def window(work: Mapping[Kind, Histogram], faults: int = 0, calls: int | None = None) -> Window:
    timed = sum(sum(histogram) for histogram in work.values())
    return Window(timed if calls is None else calls, faults, work)


WELL = window({SIGN: took(us_500=100)})
SLOW = window({SIGN: took(ms_30=100)})
FAULTY = window({SIGN: took(us_500=60)}, faults=40, calls=100)


def seat(does: Window = WELL, course: Course | None = None, trial: Trial = Trial.OPEN) -> Seat:
    return Seat(course or Course(), does, {}, does, trial)


def together(seats: Mapping[int, Seat]) -> dict[int, Seat]:
    """Their windows began at the same time."""
    beside = {index: each.own for index, each in seats.items()}
    return {index: replace(each, beside=beside) for index, each in seats.items()}


def group(*does: Window) -> dict[int, Seat]:
    return together({index: seat(each) for index, each in enumerate(does)})


def left_out(moves: Mapping[int, Move]) -> set[int]:
    return {index for index, move in moves.items() if move.course.phase in LEFT_OUT}


def ejected(*does: Window) -> set[int]:
    return left_out(step(group(*does), RULE, NOW))


# ---- who is ejected


@pytest.mark.parametrize("bad", [SLOW, FAULTY])
@pytest.mark.parametrize("place", range(3))
def test_the_one_that_is_worse_is_ejected(bad: Window, place: int) -> None:
    does = [WELL] * 3
    does[place] = bad
    assert ejected(*does) == {place}


def test_an_ejection_says_why_and_how_long() -> None:
    move = step(group(WELL, WELL, SLOW), RULE, NOW)[2]
    assert (move.course, move.why) == (Course(Phase.EJECTED, NOW, 1), "slow")
    assert (move.excess.slow, move.excess.timed) == (1.0, 100)
    assert until_ns(move.course, RULE) == NOW + 30 * S
    assert step(group(WELL, WELL, FAULTY), RULE, NOW)[2].why == "faulty"


def test_of_several_the_worst_is_ejected_and_never_more_than_half() -> None:
    half = window({SIGN: took(us_500=50, ms_30=50)})
    assert ejected(WELL, half, SLOW) == {2}
    assert ejected(SLOW, WELL, half) == {0}
    assert ejected(WELL, SLOW, SLOW, half) == {1, 2}
    assert ejected(WELL, SLOW, SLOW, SLOW, half) == {1, 2}


def test_of_two_one_is_ejected_and_of_one_none() -> None:
    assert ejected(WELL, SLOW) == {1}
    assert ejected(SLOW) == set()


def test_slow_is_by_the_factor_and_by_a_millisecond() -> None:
    assert ejected(WELL, WELL, window({SIGN: took(ms_2=100)})) == set()
    assert ejected(WELL, WELL, window({SIGN: took(ms_4=100)})) == {2}
    quick = window({SIGN: took(us_2=100)})
    assert ejected(quick, quick, window({SIGN: took(us_500=100)})) == set()
    assert ejected(quick, quick, window({SIGN: took(ms_2=100)})) == {2}


def test_a_few_stalls_eject_nobody() -> None:
    assert ejected(WELL, WELL, window({SIGN: took(us_500=85, s_1=15)})) == set()
    assert ejected(WELL, WELL, window({SIGN: took(us_500=75, s_1=25)})) == {2}


def test_long_calls_that_are_usual_eject_nobody() -> None:
    """Key sizes, garbage collection: the same share of slow calls everywhere."""
    mixed = window({SIGN: took(us_500=60, ms_30=40)})
    assert ejected(mixed, mixed, mixed) == set()


def test_only_like_is_compared_with_like() -> None:
    """One signs with a long key that is its own, the others digest."""
    digests = window({DIGEST: took(us_5=100)})
    assert ejected(digests, digests, SLOW) == set()
    both = window({DIGEST: took(us_5=100), SIGN: took(us_500=10)})
    assert ejected(both, digests, window({DIGEST: took(us_5=100), SIGN: took(ms_30=10)})) == {2}


def test_quick_calls_do_not_hide_a_slow_one() -> None:
    """Twenty digests to a signature."""
    usual = window({DIGEST: took(us_5=200), SIGN: took(us_500=10)})
    assert ejected(usual, usual, window({DIGEST: took(us_5=200), SIGN: took(ms_30=10)})) == {2}


@pytest.mark.parametrize("slow", [INIT, UPDATE, SIGN])
def test_stages_of_an_operation_do_not_hide_each_other(slow: Kind) -> None:
    """All take the same; an Init and a question for the length together are no more than a half."""
    usual = {kind: took(us_50=20 if kind in (slow, INIT, ASK) else 400) for kind in (INIT, ASK, UPDATE, SIGN)}
    well = window(usual)
    assert ejected(well, well, window(usual | {slow: took(us_50=10, ms_20=10)})) == {2}
    assert ejected(well, well, window(usual | {slow: took(us_50=17, ms_20=3)})) == set()


def test_what_slows_all_at_once_ejects_nobody() -> None:
    """However quick they were before: what counts is the same time."""
    seats = {index: replace(seat(WELL), own=SLOW) for index in range(3)}
    assert left_out(step(together(seats), RULE, NOW)) == set()
    assert left_out(step(together(seats | {0: seat(WELL), 1: seat(WELL)}), RULE, NOW)) == {2}
    assert left_out(step(seats, RULE, NOW)) == set()


def test_little_proves_nothing() -> None:
    assert ejected(WELL, WELL, window({SIGN: took(ms_30=19)})) == set()
    assert ejected(WELL, WELL, window({SIGN: took(ms_30=20)})) == {2}
    few = window({SIGN: took(us_500=4)})
    assert ejected(few, few, SLOW) == set()
    assert ejected(Window(), Window(), FAULTY) == set()
    assert ejected(WELL, WELL, window({}, faults=19, calls=19)) == set()


def test_faults_of_all_are_nobody_s() -> None:
    assert ejected(FAULTY, FAULTY, FAULTY) == set()


def test_ejected_members_are_no_measure() -> None:
    seats = group(WELL, SLOW, SLOW) | {0: seat(WELL, Course(Phase.EJECTED, NOW, 1))}
    assert left_out(step(seats, RULE, NOW)) == {0}


# ---- how it comes back


def alone(
    course: Course, does: Window = WELL, trial: Trial = Trial.OPEN, after_s: float = 0, stuck: bool = False
) -> Move:
    """The move of one member among three, so long after its course began."""
    seats = group(WELL, WELL) | {2: replace(seat(does, course, trial), stuck=stuck)}
    return step(together(seats), RULE, course.since_ns + int(after_s * S))[2]


EJECTED = Course(Phase.EJECTED, NOW, 1)
TRIED = Course(Phase.TRIAL, NOW, 1)
WARMING = Course(Phase.WARMING, NOW, 1)


def test_an_ejection_ends_in_a_trial() -> None:
    assert alone(EJECTED, after_s=29).course == EJECTED
    assert alone(EJECTED, after_s=30).course == Course(Phase.TRIAL, NOW + 30 * S, 1)


def test_a_trial_that_ends_well_admits() -> None:
    one = window({SIGN: took(us_500=1)})
    assert alone(TRIED, one, Trial.UNDER_WAY, 1).course == TRIED
    admitted = alone(TRIED, one, Trial.ENDED, 1)
    assert (admitted.course, admitted.why) == (Course(Phase.WARMING, NOW + S, 1), "tried")


@pytest.mark.parametrize(
    ("does", "why"), [(window({SIGN: took(ms_30=1)}), "slow"), (window({}, faults=1, calls=1), "faulty")]
)
def test_a_trial_that_ends_badly_ejects_for_longer(does: Window, why: str) -> None:
    move = alone(TRIED, does, Trial.ENDED, 1)
    assert (move.course, move.why) == (Course(Phase.EJECTED, NOW + S, 2), why)
    assert until_ns(move.course, RULE) == NOW + S + 60 * S
    assert until_ns(replace(move.course, ejections=9), RULE) == NOW + S + 100 * S


def test_a_trial_that_does_not_end_has_failed() -> None:
    assert alone(TRIED, Window(), Trial.UNDER_WAY, 29).course == TRIED
    move = alone(TRIED, Window(), Trial.UNDER_WAY, 30)
    assert (move.course, move.why) == (Course(Phase.EJECTED, NOW + 30 * S, 2), "hangs")


def test_who_is_stuck_in_a_trial_is_not_tried_again() -> None:
    """A member that hangs for ever is to cost one thread, not one each time."""
    assert alone(EJECTED, Window(), Trial.UNDER_WAY, 99, stuck=True).course == EJECTED
    assert alone(EJECTED, Window(), Trial.UNDER_WAY, 99).course.phase is Phase.TRIAL


def test_a_trial_that_nobody_takes_up_admits() -> None:
    """An application that has no such operation would otherwise never have the member back."""
    assert alone(TRIED, Window(), Trial.OPEN, 29).course == TRIED
    assert alone(TRIED, Window(), Trial.OPEN, 30).course.phase is Phase.WARMING


def test_load_rises_in_tenths() -> None:
    shares = [share(WARMING, RULE, NOW + int(s * S)) for s in (0, 1, 3.9, 4, 10, 19.9, 20, 99)]
    assert shares == [0.1, 0.1, 0.1, 0.2, 0.5, 0.9, 1.0, 1.0]
    assert share(EJECTED, RULE, NOW) == share(TRIED, RULE, NOW) == 0
    assert share(Course(), RULE, NOW) == 1


def test_a_member_is_judged_while_it_warms_up() -> None:
    assert alone(WARMING, SLOW, after_s=5).course == Course(Phase.EJECTED, NOW + 5 * S, 2)
    assert alone(WARMING, WELL, after_s=19).course == WARMING
    assert alone(WARMING, WELL, after_s=20).course == Course(Phase.REGULAR, NOW + 20 * S, 1)


def test_ejections_of_long_ago_are_forgotten() -> None:
    regular = Course(Phase.REGULAR, NOW, 3)
    assert alone(regular, after_s=99).course.ejections == 3
    assert alone(regular, after_s=100).course.ejections == 0


def test_who_is_one_too_many_comes_back_at_once() -> None:
    """Two of four are ejected, and a third is lost."""
    first, second = Course(Phase.EJECTED, NOW, 1), Course(Phase.TRIAL, NOW + S, 1)
    both = {0: Course(), 1: second, 2: first}
    assert keep_floor({**both, 3: Course()}) == {**both, 3: Course()}
    assert keep_floor(both) == {0: Course(), 1: second, 2: Course(Phase.REGULAR, NOW, 0)}
    assert keep_floor({1: second})[1].phase is Phase.REGULAR


def test_the_next_look_is_in_time() -> None:
    assert due_ns([Course()], RULE, NOW) == NOW + 10 * S
    assert due_ns([Course(), EJECTED], RULE, NOW + 25 * S) == NOW + 30 * S
    assert due_ns([Course(), EJECTED], RULE, NOW + 30 * S) == NOW + 40 * S
    assert due_ns([WARMING], RULE, NOW) == NOW + 2 * S


def test_windows_end_when_all_have_shown_enough_or_had_the_time() -> None:
    few = window({SIGN: took(us_500=19)})
    assert not is_full([WELL, WELL], RULE, 9 * S)
    assert is_full([WELL, WELL], RULE, 10 * S)
    assert not is_full([WELL, few], RULE, 119 * S)
    assert is_full([WELL, few], RULE, 120 * S)


# ---- what always holds


def test_buckets_have_no_gaps() -> None:
    assert [edge_ns(b) for b in range(5)] == [256, 384, 512, 768, 1024]
    edges = [edge_ns(b) for b in range(BUCKETS)]
    assert edges == sorted(set(edges))


histograms = st.lists(st.integers(0, 50), min_size=6, max_size=6).map(
    lambda counts: [0] * 22 + [count for count in counts for _ in range(3)] + [0] * 24
)
windows = st.builds(
    lambda work, faults: window(work, faults, sum(map(sum, work.values())) + 2 * faults),
    st.dictionaries(st.sampled_from([INIT, SIGN, DIGEST]), histograms),
    st.integers(0, 60),
)
characters = st.sampled_from(
    [
        Window(),
        WELL,
        SLOW,
        FAULTY,
        window({SIGN: took(us_500=50, ms_30=50)}, 10),
        window({DIGEST: took(us_5=30)}),
    ]
)
courses = st.builds(Course, st.sampled_from(Phase), st.integers(NOW - 200 * S, NOW), st.integers(1, 5))


def groups(least: int = 1) -> st.SearchStrategy[dict[int, Seat]]:
    """Members as they may stand when a step is made: the floor has been kept until then."""

    def kept(seats: Sequence[Seat]) -> dict[int, Seat]:
        floor = keep_floor({i: s.course for i, s in enumerate(seats)})
        return together({i: replace(s, course=floor[i]) for i, s in enumerate(seats)})

    each = st.builds(Seat, courses, characters, st.just({}), characters, st.sampled_from(Trial))
    return st.lists(each, min_size=least, max_size=7).map(kept)


@given(groups())
def test_never_more_than_half_are_left_out_and_never_the_last(seats: dict[int, Seat]) -> None:
    out = left_out(step(seats, RULE, NOW))
    assert len(out) <= most_ejected(len(seats)) <= len(seats) / 2
    assert len(out) < len(seats)


@given(st.lists(courses, min_size=1, max_size=7))
def test_the_floor_admits_no_more_than_it_must(courses: list[Course]) -> None:
    before = dict(enumerate(courses))
    after = keep_floor(before)
    out = [c for c in after.values() if c.phase in LEFT_OUT]
    assert len(out) == min(sum(c.phase in LEFT_OUT for c in courses), most_ejected(len(courses)))
    assert all(after[i] == before[i] or before[i].phase in LEFT_OUT for i in before)


@settings(max_examples=50)
@given(windows, st.integers(2, 7))
def test_a_member_equal_to_its_peers_is_never_ejected(does: Window, count: int) -> None:
    assert ejected(*[does] * count) == set()


@settings(max_examples=50)
@given(windows, windows, st.integers(1, 3))
def test_a_member_equal_to_most_of_its_peers_is_never_ejected(
    does: Window, other: Window, count: int
) -> None:
    """Whatever the others do, better or worse."""
    assume(all(sum(histogram) >= REFERENCE_CALLS for histogram in does.work.values()))
    judged = excess(does, [does] * (count + 1) + [other] * count, RULE, RULE.min_calls)
    assert judged.worst <= 1e-9


@given(groups())
def test_time_only_passes(seats: dict[int, Seat]) -> None:
    moves = step(seats, RULE, NOW)
    for index, move in moves.items():
        assert seats[index].course.since_ns <= move.course.since_ns <= NOW
        assert move.course == seats[index].course or move.course.since_ns in (
            NOW,
            seats[index].course.since_ns,
        )
        if move.course.phase is Phase.EJECTED:
            assert until_ns(move.course, RULE) > NOW
    assert due_ns([move.course for move in moves.values()], RULE, NOW) > NOW


@settings(max_examples=30)
@given(groups(2), st.sampled_from([Trial.OPEN, Trial.ENDED]))
def test_whoever_is_ejected_is_tried_and_comes_back_once_it_is_well(
    seats: dict[int, Seat], trial: Trial
) -> None:
    now = NOW
    well = together({i: Seat(s.course, WELL, {}, WELL, trial) for i, s in seats.items()})
    tried: set[int] = set()
    out = left_out({i: Move(s.course) for i, s in well.items() if s.course.phase is Phase.EJECTED})
    for _ in range(40):
        moves = step(well, RULE, now)
        well = {i: replace(s, course=moves[i].course) for i, s in well.items()}
        tried |= {i for i, move in moves.items() if move.course.phase is Phase.TRIAL}
        now = due_ns([s.course for s in well.values()], RULE, now)
    assert out <= tried
    assert left_out({i: Move(s.course) for i, s in well.items()}) == set()


@pytest.mark.parametrize("median", [0, 1, 20, 21, 47])
def test_slow_means_at_least_the_factor(median: int) -> None:
    peers = [window({SIGN: [100 * (b == median) for b in range(BUCKETS)]})] * 2
    for b in range(BUCKETS):
        judged = excess(window({SIGN: [100 * (b == each) for each in range(BUCKETS)]}), peers, RULE, 20)
        longer = edge_ns(b) - edge_ns(median + 1)
        slow = longer >= SLOW_NS and edge_ns(b) >= RULE.latency_factor * edge_ns(median + 1)
        assert judged.slow == (1.0 if slow else 0.0)
