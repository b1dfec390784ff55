"""One history: clients and members of their own, what happens to them, and what must be left of it.

Faults are injected only where the outcome is defined: a member that has missed a write is never the only one there,
as a power failure of one HSM that takes over from the other with an old state is nothing a reference model can rule on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from tests.chaos import stores
from tests.chaos.crash import CrashPlan
from tests.chaos.members import PIN, Domain, Hsm, configure
from tests.chaos.model import Change, Make, Model, Outcome, Write
from tests.chaos.objects import Thing
from tests.chaos.remote import Answer, Client

PATIENCE_S = 20.0


@dataclass(frozen=True)
class ClientDies:
    """At its n-th call of a member that writes."""

    nth: int
    after: bool = False


@dataclass(frozen=True)
class MemberDies:
    """At the n-th call that writes which reaches it."""

    member: int
    nth: int
    after: bool = False


Fault = ClientDies | MemberDies | None


@dataclass
class Seat:
    """Where one client after the other sits; it has a configuration and a crash plan of its own."""

    number: int
    plan: CrashPlan
    env: dict[str, str]
    client: Client | None = None
    since: int = 0  # when the client that sits here was started
    lost: set[int] = field(default_factory=set)  # members it may have no connection to
    unnoticed: set[int] = field(default_factory=set)  # members that died without its knowledge


class History:
    """What has happened so far."""

    def __init__(
        self,
        domain: Domain,
        served: Sequence[bool],
        directory: Path,
        say: Callable[[str], None],
        seats: int = 2,
    ) -> None:
        self.domain, self.directory, self.say = domain, directory, say
        self.model = Model()
        self.tally: Counter[str] = Counter()  # of writes by their answers, and of deaths
        self.clock = 0
        self.things = 0
        self.signatures: dict[str, list[str]] = {}
        self.proofs: dict[str, str] = {}
        self.hsms = [Hsm(domain, number, directory, served=each) for number, each in enumerate(served)]
        # Member -> the clients that have written without it, and when.
        self.behind: dict[int, dict[int, int]] = {hsm.number: {} for hsm in self.hsms}
        self.seats = [self._seat(number) for number in range(seats)]

    def _seat(self, number: int) -> Seat:
        plan = CrashPlan(self.directory / f"plan-{number}")
        members = [hsm.crashing(plan) for hsm in self.hsms]
        env = configure(self.directory, f"client-{number}", members, self.domain.replication)
        return Seat(number, plan, env)

    def __enter__(self) -> History:
        self.stack = ExitStack()
        for hsm in self.hsms:
            self.stack.callback(hsm.close)
            hsm.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, *__: object) -> None:
        if error:
            error.add_note(self._logs())
        for seat in self.seats:
            self._end_client(seat)
            seat.plan.close()
        self.stack.close()

    def _logs(self) -> str:
        """The end of what each client has logged."""
        logs = sorted(self.directory.glob("*.log"))
        return "\n".join(
            line for log in logs for line in (f"{log.name}:", *log.read_text().splitlines()[-15:])
        )

    def name(self, first: str) -> str:
        """One that nothing has had before."""
        self.things += 1
        return f"{first}{self.things}"

    # ---- members

    def kill(self, number: int) -> None:
        hsm = self.hsms[number]
        if hsm.server and hsm.up and self._can_spare(number):
            hsm.kill()
            self._died(number)

    def give_back(self, number: int) -> None:
        hsm = self.hsms[number]
        if not hsm.up and (not self.behind[number] or self._has_current()):
            hsm.start()

    def _died(self, number: int) -> None:
        self.tally["member died"] += 1
        for seat in self.seats:
            if seat.client:
                seat.lost.add(number)
                seat.unnoticed.add(number)

    def _has_current(self, besides: int | None = None) -> bool:
        return any(hsm.up and not self.behind[hsm.number] for hsm in self.hsms if hsm.number != besides)

    def _can_spare(self, number: int) -> bool:
        """Without it nobody is left, or somebody who has everything."""
        others = [hsm for hsm in self.hsms if hsm.up and hsm.number != number]
        return not others or self._has_current(besides=number)

    @property
    def anybody(self) -> bool:
        return any(hsm.up for hsm in self.hsms)

    # ---- clients

    def _ready(self, seat: Seat) -> bool:
        """Somebody sits there, and sees a member that has everything."""
        if not self._has_current():
            return False
        if not seat.client and not self.enter(seat.number):
            return False
        if any(h.up and not self.behind[h.number] and h.number not in seat.lost for h in self.hsms):
            return True
        return self.wait(seat.number)

    def enter(self, number: int, fault: Fault = None) -> bool:
        """A new process initialises the module and logs in; whether it is there afterwards."""
        seat = self.seats[number]
        if not self.anybody:
            return False
        self._end_client(seat)
        self.clock += 1
        seat.since, seat.unnoticed = self.clock, set()
        seat.lost = {hsm.number for hsm in self.hsms if not hsm.up}
        seat.client = Client(self.domain.module, PIN, seat.env, self.directory / f"stderr-{number}")
        for command in ("initialise", "login"):
            answer, hit = self._ask(seat, fault, command)
            if answer.crashed:
                return False
            if not answer.ok:
                assert hit or not self.anybody, f"{command} answers {answer}"
                self._end_client(seat)
                return False
        return True

    def leave(self, number: int) -> None:
        """C_Finalize, and the end of the process."""
        seat = self.seats[number]
        if seat.client:
            answer = seat.client.ask("finalise")
            assert answer.ok, answer
            self._end_client(seat)

    def crash(self, number: int) -> None:
        """It dies between two calls."""
        self._end_client(self.seats[number])

    def _end_client(self, seat: Seat) -> None:
        if seat.client:
            seat.client.end()
            seat.client = None
            seat.plan.disarm()

    def wait(self, number: int, fault: Fault = None) -> bool:
        """Until the client has all members that run; whether it has."""
        seat = self.seats[number]
        if not self.anybody or not (seat.client or self.enter(number)):
            return False
        deadline = monotonic() + PATIENCE_S
        while True:
            answer, hit = self._ask(seat, fault, "members")
            if answer.crashed:
                return False
            fault = None if hit else fault
            up = {hsm.serial for hsm in self.hsms if hsm.up}
            if answer.ok and up <= set(answer.value):
                break
            if not up:
                return False
            assert monotonic() < deadline, f"members do not come back: {answer}"
            sleep(0.01)
        self._has_all(seat)
        return True

    def _has_all(self, seat: Seat) -> None:
        """What was written without them before this client came, or by itself, they have now."""
        up = {hsm.number for hsm in self.hsms if hsm.up}
        seat.lost -= up
        seat.unnoticed -= up
        for number in up:
            marks = self.behind[number]
            self.behind[number] = {
                who: when for who, when in marks.items() if who != seat.number and when > seat.since
            }

    # ---- asking

    def _ask(self, seat: Seat, fault: Fault, command: str, **arguments: object) -> tuple[Answer, bool]:
        """The answer, and whether the fault came: the client or a member has died of it."""
        assert seat.client
        plan, victim = self._arm(seat, fault)
        answer = seat.client.ask(command, **arguments)
        hit = plan is not None and not plan.disarm()
        self.say(
            f"    client {seat.number}: {command} {answer.rv or 'crashed'} {answer.value or ''}".rstrip()
        )
        if answer.crashed:
            assert hit, "nobody told it to die"
            seat.client = None
        if hit and victim:
            self.say(f"    {victim.name} has died in the middle of a call")
            self.tally["of these in a call"] += 1
            victim.kill()
            self._died(victim.number)
            seat.unnoticed.discard(victim.number)
        return answer, hit

    def _arm(self, seat: Seat, fault: Fault) -> tuple[CrashPlan | None, Hsm | None]:
        """The plan that may come true now, and the member that dies then."""
        if isinstance(fault, ClientDies):
            seat.plan.arm(fault.nth, after=fault.after)
            return seat.plan, None
        if isinstance(fault, MemberDies):
            hsm = self.hsms[fault.member % len(self.hsms)]
            if hsm.server and hsm.up and self._can_spare(hsm.number):
                hsm.plan.arm(fault.nth, after=fault.after)
                return hsm.plan, hsm
        return None, None

    # ---- writes

    def write(self, number: int, write: Write, fault: Fault = None) -> str:
        """The name of the code it was answered, nothing if the client crashed, "idle" if it was not tried."""
        seat = self.seats[number]
        if not self._ready(seat):
            self.tally["idle"] += 1
            return "idle"
        may_fail = self._may_fail(seat, write)
        answer, hit = self._ask(seat, fault, **_request(write))
        self.model.happened(self._outcome(seat, write, answer, may_fail or hit))
        return answer.rv

    def write_both(self, first: Write, second: Write) -> None:
        """Two clients at the same time."""
        seats, writes = self.seats[:2], (first, second)
        if not all(self._ready(seat) for seat in seats):
            return
        objects = [thing.uid for write in writes if (thing := _object(write))]
        same = len(objects) > len(set(objects))
        may_fail = [same or self._may_fail(seat, write) for seat, write in zip(seats, writes, strict=True)]
        for seat, write in zip(seats, writes, strict=True):
            assert seat.client
            seat.client.send(**_request(write))
        outcomes = []
        for seat, write, may in zip(seats, writes, may_fail, strict=True):
            assert seat.client
            answer = seat.client.receive()
            self.say(f"    client {seat.number}: {answer}")
            outcomes.append(self._outcome(seat, write, answer, may))
        self.model.happened(*outcomes)
        for hsm in self.hsms:
            stores.stir(hsm.token)

    def _may_fail(self, seat: Seat, write: Write) -> bool:
        """A member died unnoticed, or has missed what others wrote, or nobody knows whether the object is there."""
        return bool(seat.unnoticed) or not self._all_current(seat) or not self._is_certain(write)

    def _all_current(self, seat: Seat) -> bool:
        marks = [self.behind[hsm.number] for hsm in self.hsms if hsm.up]
        return not any(set(each) - {seat.number} for each in marks)

    def _is_certain(self, write: Write) -> bool:
        thing = _object(write)
        return thing is None or thing in self.model.certain()

    def _outcome(self, seat: Seat, write: Write, answer: Answer, may_fail: bool) -> Outcome:
        assert answer.ok or answer.crashed or may_fail, f"{answer}, and for no reason: {write}"
        self.clock += 1
        self.tally[answer.rv or "client crashed"] += 1
        if answer.ok and seat.client:
            seat.unnoticed.clear()  # it was with every member
            self._note_returned(seat)
        elif seat.unnoticed:
            seat.unnoticed.pop()
        for hsm in self.hsms:
            if not hsm.up or hsm.number in seat.lost:
                self.behind[hsm.number][seat.number] = self.clock
        # What the last member did before it died, nobody could undo.
        return Outcome(write, answer.rv if answer.ok or self.anybody else "")

    def _note_returned(self, seat: Seat) -> None:
        """A member may have come back to the client during its last call."""
        if any(self.hsms[number].up for number in seat.lost) and seat.client:
            answer = seat.client.ask("members")
            if answer.ok:
                seat.lost -= {h.number for h in self.hsms if h.up and h.serial in answer.value}

    # ---- reading

    def look(self, number: int) -> None:
        """What the client sees of all objects."""
        seat = self.seats[number]
        if not self._ready(seat):
            return
        answer, _ = self._ask(seat, None, "see")
        if not (self._all_current(seat) and not seat.lost):
            return
        assert answer.ok, answer
        seen = [Thing.from_json(thing) for thing in answer.value]
        certain, possible = self.model.certain(), set(self.model.possible())
        assert certain <= set(seen), f"not seen: {certain - set(seen)}"
        assert set(seen) <= possible, f"seen, but not there: {set(seen) - possible}"
        assert all(seen.count(thing) == 1 for thing in certain), "something is seen twice"

    def use(self, number: int, thing: Thing) -> None:
        """The object shows that it is what it has always been."""
        seat = self.seats[number]
        if not self._ready(seat):
            return
        sure = self._all_current(seat) and thing in self.model.certain()
        answer, _ = self._ask(seat, None, "use", thing=thing)
        assert answer.ok or not sure, answer
        if answer.ok and thing.kind == "ec":
            self.signatures.setdefault(thing.material.partition("/")[0], []).append(answer.value)
        elif answer.ok:
            before = self.proofs.setdefault(thing.material, answer.value)
            assert before == answer.value, f"another key: {thing}"

    # ---- the end

    def finish(self) -> None:
        """Everybody is given back, a last client comes and goes, and the tokens must hold what the model says."""
        for hsm in sorted(self.hsms, key=lambda hsm: len(self.behind[hsm.number])):
            if not hsm.up:
                hsm.start()
        for seat in self.seats:
            self.leave(seat.number)
        last = self._last_seat()
        assert self.enter(last.number)
        assert self.wait(last.number)
        self.leave(last.number)
        held = [stores.read(hsm.token) for hsm in self.hsms]
        wrong = stores.complaints(self.model, held, self.proofs, self.signatures)
        assert not wrong, "\n".join(wrong)

    def _last_seat(self) -> Seat:
        members = [hsm.member() for hsm in self.hsms]
        env = configure(self.directory, "last", members, self.domain.replication)
        seat = Seat(len(self.seats), CrashPlan(self.directory / "plan-last"), env)
        self.seats.append(seat)
        return seat


def _object(write: Write) -> Thing | None:
    """What must be there before."""
    return write.source if isinstance(write, Make) else write.thing


def _request(write: Write) -> dict[str, Any]:
    match write:
        case Make(source=None):
            return {"command": "make", "things": write.things}
        case Make():
            return {"command": "copy", "thing": write.source, "copy": write.things[0]}
        case Change(new=None):
            return {"command": "destroy", "thing": write.thing}
    return {"command": "change", "thing": write.thing, "new": write.new}
