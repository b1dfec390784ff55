"""History -> violations: what must hold in a soak, whatever was done to its members.  Nothing is done here.

Records are looked at one by one and forgotten; what is kept are the faults, the token objects and the tries of a PIN.

* No call fails while a member lives: one that was settled before the call began, and not struck until it had ended.
* What comes out is right: signatures verify, ciphertexts decrypt, digests equal (clients do this in software).
* Sessions and handles outlive their members.
* No call takes longer than its bound.
* No key is lost, none comes back, none is another one: each member holds in the end what was written, and all the same.
* A PIN that was refused is not tried again, unless the application says it again.
* A member that is back is taken in again, and clients die only when they are killed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tests import p11
from tests.soak.history import (
    Client,
    Did,
    Fault,
    Given,
    Held,
    Left,
    NotTakenIn,
    Over,
    Pin,
    Record,
    Seen,
    Setting,
    Settled,
    Wish,
    Wrote,
)

SHOWN = 3  # violations of each sort that are kept; all are counted
SECOND = 1_000_000
LOGIN = "login"  # the name of the operation that is a C_Login of the application's
HANDLES = (
    "CKR_SESSION_HANDLE_INVALID",
    "CKR_SESSION_CLOSED",
    "CKR_OBJECT_HANDLE_INVALID",
    "CKR_KEY_HANDLE_INVALID",
)
REFUSED = frozenset(
    {
        p11.CKR_PIN_INCORRECT,
        p11.CKR_PIN_INVALID,
        p11.CKR_PIN_LEN_RANGE,
        p11.CKR_PIN_EXPIRED,
        p11.CKR_PIN_LOCKED,
    }
)


class Violation(NamedTuple):
    rule: str
    at: int  # microseconds; 0: it was found in the end
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.what}"


@dataclass
class Report:
    """What a soak has shown."""

    violations: list[Violation] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)  # violations by rule
    sorts: Counter[str] = field(default_factory=Counter)  # the same, by what failed and how
    operations: Counter[str] = field(default_factory=Counter)  # by name
    excused: Counter[str] = field(default_factory=Counter)  # failed while nobody lived, by code
    faults: Counter[str] = field(default_factory=Counter)  # by kind
    objects: Counter[str] = field(default_factory=Counter)  # in the end, and how many were written
    pins: Counter[str] = field(default_factory=Counter)  # tries of a PIN by their answers
    slowest: int = 0
    slowest_what: str = ""

    def violate(self, rule: str, at: int, what: str, sort: str = "") -> None:
        name = f"{rule}: {sort}" if sort else rule
        self.counted[rule] += 1
        self.sorts[name] += 1
        if self.sorts[name] <= SHOWN:
            self.violations.append(Violation(rule, at, what))


class Timeline:
    """When which member lived, as the driver saw it."""

    def __init__(self, members: Iterable[str]) -> None:
        self._changes: dict[str, list[tuple[int, bool]]] = {member: [] for member in members}
        self._open: dict[str, set[int]] = defaultdict(set)  # steps whose fault on the member is not over
        self.steps: list[tuple[int, str]] = []  # when, and what began

    def happened(self, record: Fault | Over | Settled) -> None:
        if isinstance(record, Settled):
            if not self._open[record.member]:
                self._changes[record.member].append((record.at, True))
            return
        if isinstance(record, Fault):
            self.steps.append((record.at, f"step {record.step}: {record.kind} {record.target}"))
        if record.target not in self._changes:
            return  # a client
        if isinstance(record, Fault):
            self._open[record.target].add(record.step)
            self._changes[record.target].append((record.at, False))
        else:
            self._open[record.target].discard(record.step)

    def lived(self, member: str, start: int, end: int) -> bool:
        """All the time."""
        changes = self._changes[member]
        before = bisect_right(changes, (start, True))
        if not before or not changes[before - 1][1]:
            return False
        return all(lives for at, lives in changes[before:] if at <= end)

    def living(self, start: int, end: int) -> list[str]:
        return [member for member in self._changes if self.lived(member, start, end)]

    def last_step(self, at: int) -> str:
        """What began last before that."""
        before = bisect_right(self.steps, (at, chr(0x10FFFF)))
        return self.steps[before - 1][1] if before else "no fault yet"


class Objects:
    """Token objects: what each may be now.  A label, None: it is not there."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._may: dict[tuple[str, str], set[str | None]] = {}
        self._wished: dict[tuple[str, str], tuple[set[str | None], str | None]] = {}
        self._proofs: dict[tuple[str, str], str] = {}
        self._held: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(dict)

    def given(self, record: Given) -> None:
        self._may[record.kind, record.label] = {record.label}
        self._proofs[record.kind, record.label] = record.proof

    def wish(self, record: Wish) -> None:
        """From now on it may be so, also if nobody lives to tell."""
        key = record.kind, record.uid
        before = self._may.get(key, {None})
        self._wished[key] = before, record.label
        self._may[key] = before | {record.label}

    def wrote(self, record: Wrote, anybody: bool) -> None:
        """`anybody`: a member lived through it.  A making that failed has then left nothing."""
        key = record.kind, record.uid
        before, label = self._wished.pop(key)
        self._report.objects["written"] += 1
        if record.rv == "CKR_OK":
            self._may[key] = {label}
        elif before == {None} and anybody:
            self._may[key] = {None}

    def seen(self, record: Seen) -> None:
        self._prove((record.kind, record.uid), record.proof, f"client {record.client}")

    def held(self, record: Held) -> None:
        key = record.kind, uid_of(record.label)
        self._held[record.member].setdefault(key, []).append(record.label)
        self._prove(key, record.proof, record.member)

    def _prove(self, key: tuple[str, str], proof: str, who: str) -> None:
        if self._proofs.setdefault(key, proof) != proof:
            self._report.violate(
                "another key", 0, f"{who}: {' '.join(key)} shows {proof}, was {self._proofs[key]}"
            )

    def judge(self) -> None:
        """What the tokens hold against what they may."""
        for member, held in self._held.items():
            for key in {**self._may, **held}:
                self._judge_one(member, key, held.get(key, []))
        self._report.objects["certain"] += sum(
            len(may) == 1 and None not in may for may in self._may.values()
        )
        self._report.objects["uncertain"] += sum(len(may) > 1 for may in self._may.values())
        self._compare()

    def _judge_one(self, member: str, key: tuple[str, str], labels: list[str]) -> None:
        may = self._may.get(key, {None})
        found = f"{member}: {' '.join(key)}: found {labels or 'nothing'}, may be {sorted(map(str, may))}"
        if not labels:
            if None not in may:
                self._report.violate("key lost", 0, found)
        elif may == {None}:
            self._report.violate("key resurrected", 0, found)
        elif len(labels) > 1 or labels[0] not in may:
            self._report.violate("object wrong", 0, found)

    def _compare(self) -> None:
        """Where two outcomes are right, all must have the same."""
        for key in {key: None for held in self._held.values() for key in held}:
            found = {member: sorted(held.get(key, [])) for member, held in self._held.items()}
            if len(set(map(tuple, found.values()))) > 1:
                self._report.violate("members differ", 0, f"{' '.join(key)}: {found}")


def uid_of(label: str) -> str:
    """Labels of one object begin alike."""
    return label.partition("~")[0]


class Pins:
    """Tries of a PIN, as the tokens have seen them."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._tries: list[Pin] = []
        self._said: dict[str, list[int]] = defaultdict(list)  # client -> when its application logged in

    def tried(self, record: Pin) -> None:
        self._report.pins["refused" if record.rv in REFUSED else p11.rv_name(record.rv)] += 1
        self._tries.append(record)

    def said(self, client: str, at: int) -> None:
        self._said[client].append(at)

    def judge(self) -> None:
        for said in self._said.values():
            said.sort()
        right = {each.pin for each in self._tries if each.rv == p11.CKR_OK}
        self._judge_wrong([each for each in self._tries if each.pin not in right])
        refused: dict[tuple[str, str, str], int] = {}
        for each in sorted(self._tries):
            who = each.client, each.member, each.pin
            since = refused.get(who)
            if each.client and since is not None and not self._said_between(each.client, since, each.at):
                what = (
                    f"{each.member} was asked again by {each.client} after {(each.at - since) / SECOND:.3f} s"
                )
                self._report.violate("PIN tried twice", each.at, what)
            if each.rv in REFUSED:
                refused[who] = each.at
            else:
                refused.pop(who, None)

    def _judge_wrong(self, tries: list[Pin]) -> None:
        """A PIN that is nobody's is said once each time: it may cost one try on one member."""
        for pin, count in Counter(each.pin for each in tries if each.rv in REFUSED).items():
            if count > 1:
                where = ", ".join(f"{each.member} at {each.at}" for each in tries if each.pin == pin)
                self._report.violate("PIN tried twice", 0, f"a wrong PIN cost {count} tries: {where}")

    def _said_between(self, client: str, since: int, at: int) -> bool:
        return any(since < said <= at for said in self._said[client])


class Checker:
    """Takes the driver's records first, then those of the clients, each client's in their order."""

    def __init__(self, driver: Iterable[Record]) -> None:
        self.report = Report()
        self.objects, self.pins = Objects(self.report), Pins(self.report)
        self._held: list[Held] = []
        records = iter(driver)
        setting = next(records)
        assert isinstance(setting, Setting), "a driver's history begins with its setting"
        self.setting = setting
        self.timeline = Timeline(setting.members)
        for record in records:
            self._driver(record)

    def _driver(self, record: Record) -> None:
        match record:
            case Fault():
                self.report.faults[record.kind] += 1
                self.timeline.happened(record)
            case Over() | Settled():
                self.timeline.happened(record)
            case NotTakenIn():
                self.report.violate(
                    "not taken in", record.at, f"{record.client} has not got {record.member} back"
                )
            case Client():
                self._client(record)
            case Given():
                self.objects.given(record)
            case Held():
                self._held.append(record)
            case Left():
                self.report.violate("left over", 0, f"{record.member}: {record.what}")

    def _client(self, record: Client) -> None:
        if record.what == "began":
            self.pins.said(record.client, record.at)
        elif record.what not in ("killed", "left"):
            what = f"{record.client} {record.what}, after {self.timeline.last_step(record.at)}"
            self.report.violate("client died", record.at, what)

    def take(self, record: Record) -> None:
        match record:
            case Did():
                self._did(record)
            case Wish():
                self.objects.wish(record)
            case Wrote():
                self.objects.wrote(record, bool(self.timeline.living(record.start, record.end)))
            case Seen():
                self.objects.seen(record)
            case Pin():
                self.pins.tried(record)

    def _did(self, did: Did) -> None:
        self.report.operations[did.name] += 1
        if did.name == LOGIN:
            self.pins.said(did.client, did.start)
        if did.why:
            self.report.violate(
                "wrong result", did.start, self._tell(did), re.split("[:{,]", did.why)[0].strip()
            )
        living = self.timeline.living(did.start, did.end)
        able = [member for member in living if did.name not in self.setting.unable.get(member, ())]
        if did.rv != "CKR_OK":
            self._failed(did, able)
        self._took(did, len(self.setting.members) - len(living))

    def _failed(self, did: Did, living: list[str]) -> None:
        if not living:
            self.report.excused[did.rv] += 1
            return
        rule = "handle lost" if did.rv in HANDLES else "call failed"
        what = f"{self._tell(did)}, and there was {' and '.join(living)}"
        self.report.violate(rule, did.start, what, f"{did.name}: {did.call} {did.rv}")

    def _took(self, did: Did, impaired: int) -> None:
        if did.slowest > self.report.slowest:
            self.report.slowest, self.report.slowest_what = did.slowest, f"{did.name}: {did.call}"
        bound = self.bound(impaired) * (self.setting.clients if did.name in self.setting.writes else 1)
        if did.slowest > bound:
            what = f"{self._tell(did)} took {did.slowest / SECOND:.2f} s of {bound / SECOND:.1f}"
            self.report.violate("too slow", did.start, what)

    def bound(self, impaired: int) -> int:
        """How long a call may take: a member that hangs costs its limit, and one that is brought back its own.

        Writes of token objects wait for those of other clients besides.
        """
        each = self.setting.call_timeout_us + self.setting.connect_timeout_us
        return self.setting.call_timeout_us + SECOND + impaired * each

    def _tell(self, did: Did) -> str:
        how = did.why or f"{did.call} {did.rv}"
        where = f"{did.client}/{did.thread} at {did.start}, after {self.timeline.last_step(did.start)}"
        return f"{did.name}: {how} ({where})"

    def finish(self) -> Report:
        for record in self._held:
            self.objects.held(record)
        self.objects.judge()
        self.pins.judge()
        return self.report


def check(driver: Iterable[Record], clients: Iterable[Iterable[Record]]) -> Report:
    """All of it at once."""
    checker = Checker(driver)
    for records in clients:
        for record in records:
            checker.take(record)
    return checker.finish()


def summary(reports: Iterable[Report]) -> Report:
    """Of several soaks."""
    total = Report()
    for report in reports:
        for name in ("counted", "sorts", "operations", "excused", "faults", "objects", "pins"):
            getattr(total, name).update(getattr(report, name))
        total.violations += report.violations
        if report.slowest > total.slowest:
            total.slowest, total.slowest_what = report.slowest, report.slowest_what
    return total


def table(report: Report, seconds: float) -> Iterator[str]:
    """The figures of a run, as rows of docs/reliability.md."""
    operations = sum(report.operations.values())
    rows = {
        "operations": f"{operations:,}, {operations / max(seconds, 1):,.0f} a second",
        "duration": f"{seconds / 60:.1f} minutes",
        "faults": f"{report.faults.total():,}: "
        + ", ".join(f"{count} {kind}" for kind, count in report.faults.most_common()),
        "failed while nobody lived": f"{report.excused.total():,}",
        "slowest call": f"{report.slowest / SECOND:.2f} s ({report.slowest_what})",
        "writes of token objects": f"{report.objects['written']:,}, of unknown outcome {report.objects['uncertain']}",
        "token objects in the end": f"{report.objects['certain']:,}",
        "tries of a PIN": ", ".join(f"{count:,} {how}" for how, count in report.pins.most_common()),
        "violations": ", ".join(f"{count} {rule}" for rule, count in report.counted.most_common()) or "none",
    }
    yield "| what | how much |"
    yield "| --- | --- |"
    for name, value in rows.items():
        yield f"| {name} | {value} |"
