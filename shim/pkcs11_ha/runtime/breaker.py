"""A group's circuit breaker: the data plane's counters in, each member's share of the load out."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pkcs11_ha.config import GroupConfig
from pkcs11_ha.core import outlier
from pkcs11_ha.core.codes import Code
from pkcs11_ha.core.outlier import LEFT_OUT, Course, Kind, Move, Phase, Rule, Seat, Stage, Trial, Window
from pkcs11_ha.core.recovery import NEVER_NS
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.member import Member

_CLASSES = tuple(Code)
_COUNT_BYTES, _COUNT_MASK = 4, 0xFFFFFFFF  # the counters go round
_AUTO_FROM = 3
"""In a group of two, one ejected member is half of all there is: only who asks for it gets it."""


def rule_of(group: GroupConfig) -> Rule | None:
    """The group's rule; None where there is no breaker."""
    on = group.outlier == "on" or (group.outlier == "auto" and len(group.members) >= _AUTO_FROM)
    if not on:
        return None
    return Rule(
        interval_ns=int(group.outlier_interval_s * 1e9),
        min_calls=group.outlier_min_calls,
        latency_factor=group.outlier_latency_factor,
        ratio=group.outlier_ratio,
        base_ns=int(group.eject_base_s * 1e9),
        max_ns=int(group.eject_max_s * 1e9),
        slow_start_ns=int(group.slow_start_s * 1e9),
    )


def count_fault(member: Member, code: Code) -> None:
    """One more answer of that class."""
    native.lib.ha_member_fault(member.native, _CLASSES.index(code))


class _Counters:
    """What a member's counters said at one moment."""

    def __init__(self, member: Member) -> None:
        self.calls = int(native.lib.ha_member_calls(member.native))
        self.faults = sum(
            int(native.lib.ha_member_faults(member.native, number))
            for number, code in enumerate(_CLASSES)
            if code in outlier.FAULTS
        )
        counts = native.ffi.new("unsigned[]", native.lib.HA_WORKS * native.lib.HA_BUCKETS)
        native.lib.ha_member_latency(member.native, counts)
        self.latency = bytes(native.ffi.buffer(counts))

    def since(self, before: _Counters) -> Window:
        """What was done in between."""
        row = native.lib.HA_BUCKETS * _COUNT_BYTES
        work = {}
        for kind in range(native.lib.HA_WORK_COMPARED, native.lib.HA_WORKS):
            place = slice(kind * row, (kind + 1) * row)
            now, then = self.latency[place], before.latency[place]
            if now != then:
                pairs = zip(array("I", now), array("I", then), strict=True)
                number, stage = divmod(kind - native.lib.HA_WORK_COMPARED, native.lib.HA_STAGES)
                work[Kind(Stage(stage), number)] = [(a - b) & _COUNT_MASK for a, b in pairs]
        return Window(self.calls - before.calls, self.faults - before.faults, work)


_Moment = Mapping[int, _Counters]
"""What the counters of each member said."""


class _Record:
    """One member: where it stands, and all members' counters when its own window and that for trials began."""

    own: _Moment
    reference: _Moment

    def __init__(self, member: Member) -> None:
        self.member = member
        self.course = Course()
        self.there = False
        self.begin({})

    def begin(self, now: _Moment) -> None:
        """Nothing of before counts any more."""
        self.own = self.reference = now


class Breaker:
    """Of one group.  Written by `Core` and `VirtualSlot.publish`, under the core's lock."""

    def __init__(
        self,
        slot: Any,
        label: str,
        members: Sequence[Member],
        rule: Rule,
        log: Callable[[Event], None],
        now_ns: int,
    ) -> None:
        self.slot = slot
        self.label = label
        self.rule = rule
        self.log = log
        self.records = [_Record(member) for member in members]
        self.window_ns = now_ns  # when the windows of all began
        self.due_ns = now_ns + rule.interval_ns

    def seat(self, member: Member) -> None:
        """One more member."""
        self.records.append(_Record(member))

    def end(self) -> None:
        """Nobody is ejected, and calls are not timed any more."""
        for index in range(len(self.records)):
            self._share(index, 1.0)
        native.lib.ha_slot_look_at(self.slot, NEVER_NS)

    @property
    def ejected(self) -> frozenset[str]:
        """Names of the members that take only what no other can do, and their trial."""
        return frozenset(r.member.name for r in self.records if r.course.phase in LEFT_OUT)

    def publish(self, serving: int) -> None:
        """Who may serve has changed: who was lost begins anew, and never is more than half of the rest ejected."""
        now = self._moment()
        for index, record in enumerate(self.records):
            there = bool(serving >> index & 1)
            if there != record.there:
                record.there, record.course = there, Course()
                record.begin(now)
                self._share(index, 1.0)
        for index, course in outlier.keep_floor(self._there()).items():
            if course != self.records[index].course:
                self._enter(index, Move(course, "too few are left"), self.due_ns)
        native.lib.ha_slot_look_at(self.slot, self.due_ns)

    def step(self, now_ns: int) -> None:
        """One look at what the members have done since the last."""
        now = self._moment()
        seats = self._seats(now)
        for index, move in outlier.step(seats, self.rule, now_ns).items():
            if move.course != self.records[index].course:
                self._enter(index, move, now_ns)
            self._share(index, outlier.share(move.course, self.rule, now_ns))
        judged = [seat.own for i, seat in seats.items() if self.records[i].course.phase not in LEFT_OUT]
        if outlier.is_full(judged, self.rule, now_ns - self.window_ns):
            self.window_ns = now_ns
            for index in seats:
                if self.records[index].course.phase not in LEFT_OUT:
                    self.records[index].reference, self.records[index].own = self.records[index].own, now
        self.due_ns = outlier.due_ns(list(self._there().values()), self.rule, now_ns)
        native.lib.ha_slot_look_at(self.slot, self.due_ns)

    def _there(self) -> dict[int, Course]:
        return {i: record.course for i, record in enumerate(self.records) if record.there}

    def _moment(self) -> _Moment:
        return {index: _Counters(record.member) for index, record in enumerate(self.records)}

    def _seats(self, now: _Moment) -> dict[int, Seat]:
        there = {i: self.records[i] for i in self._there()}
        moments = {id(record.own): record.own for record in there.values()}  # mostly it is one
        since = {key: {i: now[i].since(then[i]) for i in there if i in then} for key, then in moments.items()}
        seats = {}
        for index, record in there.items():
            trial = Trial(native.lib.ha_slot_trial(self.slot, index))
            stuck = trial is Trial.UNDER_WAY and native.lib.ha_member_in_flight(record.member.native) > 0
            beside = since[id(record.own)]
            reference = now[index].since(record.reference[index])
            seats[index] = Seat(record.course, beside[index], beside, reference, trial, stuck)
        return seats

    def _share(self, index: int, share: float) -> None:
        native.lib.ha_slot_share(self.slot, index, round(share * native.lib.HA_WHOLE))

    def _enter(self, index: int, move: Move, now_ns: int) -> None:
        """A member's course changes, and with it what it is judged by."""
        record, before = self.records[index], self.records[index].course.phase
        record.course = move.course
        if move.course.phase is before:
            return
        record.begin(self._moment())
        if move.course.phase is Phase.TRIAL:
            native.lib.ha_slot_try(self.slot, index)
        self._share(index, outlier.share(move.course, self.rule, now_ns))
        self._tell(record, before, move)

    def _tell(self, record: _Record, before: Phase, move: Move) -> None:
        name, details = self._news(before, move)
        if name:
            self.log(Event(name, self.label, record.member.name, {"why": move.why, **details}))

    def _news(self, before: Phase, move: Move) -> tuple[str, dict[str, str | int]]:
        figures: dict[str, str | int] = {}
        if move.excess.calls:
            figures = {
                "slow": f"{max(0.0, move.excess.slow):.0%}",
                "faulty": f"{max(0.0, move.excess.faulty):.0%}",
                "calls": move.excess.calls,
                "timed": move.excess.timed,
            }
        match move.course.phase:
            case Phase.EJECTED:
                length_ns = outlier.until_ns(move.course, self.rule) - move.course.since_ns
                return "member.ejected", {
                    **figures,
                    "ejections": move.course.ejections,
                    "for_s": f"{length_ns / 1e9:g}",
                }
            case Phase.TRIAL:
                return "member.trial", {}
            case Phase.WARMING:
                return "member.admitted", {**figures, "slow_start_s": f"{self.rule.slow_start_ns / 1e9:g}"}
            case Phase.REGULAR if before in LEFT_OUT:
                return "member.admitted", {"slow_start_s": 0}
        return "", {}
