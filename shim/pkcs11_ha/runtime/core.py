"""The core of one run, from C_Initialize to C_Finalize: members, virtual slots, loss and recovery."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from hashlib import sha256

from pkcs11_ha import __version__, ck, config
from pkcs11_ha.core import recovery
from pkcs11_ha.core.recovery import NEVER_NS, Outage, Rule
from pkcs11_ha.log import Event, Log, open_log
from pkcs11_ha.runtime import breaker, identity_file, login, native, report, requests
from pkcs11_ha.runtime.changes import Changes
from pkcs11_ha.runtime.library import Libraries
from pkcs11_ha.runtime.member import ConnectError, Member, MemberState, PinRefused
from pkcs11_ha.runtime.native import CkError, OutOfTime
from pkcs11_ha.runtime.segment import Segment, Unavailable
from pkcs11_ha.runtime.slot import Face, VirtualSlot

SERIAL_SIZE = 16
_NO_ANSWER = "no answer in time"
_DRAINED = "it is drained: p11ha enable brings it back"
_MAY_JOIN = 4  # members that have room in the status segment beside those of the start
_AT_ONCE_NS = 250_000_000  # who fails so soon may be tried again before C_Initialize returns
_PAUSE_S = 0.05
_IDLE_STEP_S = 0.25  # how often the background thread looks whether an attempt is due


class Core:
    """Everything that lives from C_Initialize to C_Finalize.  The only writer of member states."""

    def __init__(
        self,
        settings: config.Config,
        state_dir: str,
        flags: int,
        clock: Callable[[], int] = time.monotonic_ns,
        read: requests.Stamp | None = None,
    ) -> None:
        """`read`: the stamp of the configuration's file, where it is to be read again when that changes."""
        self.settings = settings
        self.clock = clock
        self.may_use_threads = not flags & ck.CKF_LIBRARY_CANT_CREATE_OS_THREADS
        self.log_target: Log = _open_log(settings)
        self.rule = _rule(settings)
        self.lock = threading.RLock()  # of member states and what is published of them
        self.attempting = threading.Lock()  # one recovery attempt at a time
        self.changed = threading.Condition()  # a group vanished or returned, or the end has come
        self.stopping = False
        self.tending: threading.Thread | None = None
        self.libraries = Libraries(self.may_use_threads, settings.recovery.connect_timeout_s)
        used = {name for group in settings.groups for name in (*group.members, *group.standby)}
        configs = [c for c in settings.members if c.name in used or not settings.ha.only]
        self.segment = self._open_segment(
            state_dir, len(configs) + _MAY_JOIN
        )  # before the members, who count in it
        self.state_dir = state_dir
        known = identity_file.remembered(state_dir)
        self.members = {c.name: Member(c, clock(), self.lose, identity_file.seen(c, known)) for c in configs}
        self.former: dict[str, Member] = {}  # those that have left, or are about to
        self.leaving: list[threading.Thread] = []
        self.slots: dict[int, VirtualSlot] = {}
        self.changes = Changes(self, settings, state_dir, read)
        for name in self.changes.drained & self.members.keys():
            self.members[name].drained = True
        self._connect_all()
        self.slots = self._make_slots(known)
        for slot in self.slots.values():
            for member in slot.members:
                if member.state is MemberState.AWAY and not member.drained:
                    details: dict[str, str | int] = {"call": "C_Initialize", "why": member.why}
                    self.log(Event("member.lost", slot.face.label, member.name, details))
        for slot in self.slots.values():
            if slot.replication is not None:
                slot.replication.party.told = self.tell
        self._tell()
        # slot id -> present, as C_WaitForSlotEvent last reported it
        self.reported = {slot.id: slot.present for slot in self.slots.values() if slot.is_group}
        self.log(Event("core.started", details={"version": __version__, "configuration": settings.path}))
        self.thread: threading.Thread | None = None
        self._start_background()
        if self.may_use_threads:
            self.changes.start()

    def log(self, event: Event) -> None:
        """Writes one event; the log's own failures never reach a call."""
        self.log_target.write(event)

    # ---- what others see ----

    def _open_segment(self, state_dir: str, members: int) -> Segment | None:
        try:
            return Segment(state_dir, members)
        except Unavailable as error:
            self.log(Event("status.unavailable", details={"why": str(error)}))
            return None

    def _tell(self) -> None:
        """Brings the status segment up to date; under the lock, or while nobody else is there yet."""
        if self.segment is not None and self.slots:
            self.segment.tell(report.report(self.settings, self.rule, self.slots.values()))

    def tell(self) -> None:
        """As `_tell`, for who has changed something else than a member's state."""
        with self.lock:
            if not self.stopping:
                self._tell()

    # ---- start ----

    def _connect_all(self) -> None:
        """All members at once, so that one that does not answer costs `connect_timeout_s` and no more."""
        members = [member for member in self.members.values() if not member.drained]
        for member in self.members.values():
            if member.drained:  # it may be in pieces: nobody waits for it
                member.why, member.loss_was_read = _DRAINED, True
        began = self.clock()
        if self.may_use_threads:
            threads = [native.start_thread(partial(self._connect, m), "pkcs11-ha start") for m in members]
            for thread in threads:
                thread.join()
        else:
            for member in members:
                self._connect(member)
        if members and all(member.state is MemberState.AWAY for member in members):
            # Many applications that start at once can meet all tokens in pieces (SoftHSM's files).
            time.sleep(_PAUSE_S)
            for member in members:  # one by one: who shares a library with others may restart it
                if self.clock() - began < _AT_ONCE_NS and not member.connecting:
                    self._connect(member)

    def _connect(self, member: Member) -> None:
        try:
            self._in_time_to_connect(member, partial(self._reach, member))
            member.state = MemberState.UP
        except Exception as error:
            member.outage = Outage(self.clock())
            member.why = str(error) or _NO_ANSWER
            member.fault = _fault_of(error, "C_Initialize") or member.fault

    def _reach(self, member: Member) -> None:
        """Its library is restarted unless somebody else lives in it, or may yet."""
        others = member.instance.members - {member.name} if member.instance else frozenset[str]()
        known = self.former | self.members
        alone = not any(known[name].state is MemberState.UP or self._is_stuck(known[name]) for name in others)
        member.connect(self.libraries, self.settings.recovery.connect_timeout_s, alone)

    def _in_time_to_connect(self, member: Member, work: Callable[[], None]) -> None:
        def late(error: BaseException | None) -> None:
            with self.lock:
                member.connecting = False
                if error is not None:  # the attempt has ended now, and said why
                    stopped = member.outage.stopped or isinstance(error, PinRefused)
                    member.outage = replace(member.outage, last_ns=self.clock(), stopped=stopped)
                    member.why = str(error)
                    member.fault = _fault_of(error) or member.fault
                self._publish(self.slots_of(member))
            self.changes.notice()  # somebody may wait for the end of this

        member.connecting = True
        try:
            native.within(self.settings.recovery.connect_timeout_s, self.may_use_threads, work, late)
            member.connecting = False
        except OutOfTime:
            raise  # still under way: no other attempt until it ends
        except BaseException:
            member.connecting = False
            raise

    def _make_slots(self, known: Mapping[str, str]) -> dict[int, VirtualSlot]:
        """`known` is what is remembered of serials."""
        slots: list[VirtualSlot] = []
        learnt = identity_file.of_members(self.members.values())
        if not self.settings.ha.only:
            for member in self.members.values():
                face = Face(member.name, "", "", "", "")
                slot = VirtualSlot(len(slots), face, [member], 0, "primary-first", self.log)
                slot.is_group = False
                slots.append(slot)
        for group in self.settings.groups:
            members = [self.members[name] for name in (*group.members, *group.standby)]
            serial = group.serial
            if serial is None and members[0].facts is not None:
                serial = learnt[group.label] = ("1" + members[0].facts.serial)[:SERIAL_SIZE]
            elif serial is None:
                serial = self._serial_without_member(group.label, members[0], known)
            face = Face("HA Virtual Card Slot", group.label, serial, group.manufacturer, group.model)
            slot = VirtualSlot(
                len(slots),
                face,
                members,
                len(group.standby),
                group.balance,
                self.log,
                group,
                self.leave_out,
                self.state_dir,
            )
            slot.breaker = self._breaker(slot, group)
            slots.append(slot)
        identity_file.remember(self.state_dir, learnt)
        self._publish(slots)
        for slot in slots:
            slot.publish_login()
        return {slot.id: slot for slot in slots}

    def _breaker(self, slot: VirtualSlot, group: config.GroupConfig) -> breaker.Breaker | None:
        """The group's, as it goes on if it has one."""
        rule = breaker.rule_of(group)
        if rule is None:
            return None
        if slot.breaker is None:
            return breaker.Breaker(slot.native, group.label, slot.by_index, rule, self.log, self.clock())
        slot.breaker.rule = rule
        return slot.breaker

    def _serial_without_member(self, label: str, first: Member, known: Mapping[str, str]) -> str:
        if first.config.token.serial:
            return f"1{first.config.token.serial}"[:SERIAL_SIZE]
        if label in known:
            return known[label]
        details = {"why": f"member {first.name} was never seen: set the group's serial to keep it constant"}
        self.log(Event("config.warned", label, first.name, details))
        return ("1" + str(int(sha256(label.encode()).hexdigest(), 16)))[:SERIAL_SIZE]

    # ---- what is published ----

    def _publish(self, slots: Iterable[VirtualSlot]) -> None:
        with self.lock:
            if self.stopping:
                return  # what a thread of this run does late is not to reach the next
            for slot in slots:
                dues = [self._due_at(member) for member in slot.members]
                asked = 0 if self.changes.is_noticed else NEVER_NS
                slot.publish(min([*dues, slot.tend_at_ns, asked], default=NEVER_NS))
            self._tell()
        with self.changed:
            self.changed.notify_all()

    def publish_all(self) -> None:
        """Who serves, and when the next check is due, everywhere."""
        self._publish(list(self.slots.values()))

    def _due_at(self, member: Member) -> int:
        if member.state is MemberState.UP or member.connecting or member.drained:
            return NEVER_NS
        return recovery.due_at_ns(member.outage, self.rule)

    def slots_of(self, member: Member) -> list[VirtualSlot]:
        return [slot for slot in self.slots.values() if member in slot.members]

    # ---- loss ----

    def lose(self, member: Member, rv: int, call: str, epoch: int) -> None:
        """Leaves a member out, unless the fault is of a life before this one."""
        with self.lock:
            if member.state is not MemberState.UP or member.epoch != epoch:
                return
            member.state = MemberState.AWAY
            member.logins.clear()
            member.outage = Outage(self.clock())
            member.loss_was_read = False
            member.why = f"{call} answered {ck.rv_name(rv)}"
            member.fault = (ck.rv_name(rv), call)
            slots = self.slots_of(member)
            for slot in slots:
                details: dict[str, str | int] = {"code": ck.rv_name(rv), "call": call}
                self.log(Event("member.lost", slot.face.label, member.name, details))
            self._publish(slots)
            # After it: who sees the new epoch sees that nobody serves in it.
            native.lib.ha_member_new_epoch(member.native)
        for slot in slots:
            slot.objects.member_lost(slot.index(member))

    def leave_out(self, member: Member, rv: int, call: str, why: str) -> None:
        """Leaves a member out for what the group's own work met there."""
        self.lose(member, rv, call, member.epoch)
        if why:
            with self.lock:
                member.why = why

    def refuse(self, member: Member, rv: int) -> None:
        """Leaves out a member that refused the PIN; it is not tried again with it."""
        self.lose(member, rv, "C_Login", member.epoch)
        with self.lock:
            member.outage = recovery.after_failure(member.outage, self.clock(), pin_refused=True)
            self._publish(self.slots_of(member))

    # ---- outliers ----

    def look(self, slot: VirtualSlot) -> None:
        """Compares a group's members, if it is time to: who is ejected, tried, admitted."""
        with self.lock:
            if slot.breaker is not None and not self.stopping and self.clock() >= slot.breaker.due_ns:
                slot.breaker.step(self.clock())
                self._tell()

    # ---- recovery ----

    def check(self, slot: VirtualSlot) -> None:
        """The recovery check of every call: at most one attempt at a time, the other callers go on."""
        if not self.attempting.acquire(blocking=False):
            return
        try:
            self.changes.heed()
            for member in slot.members:
                started = self.clock()
                if self._is_due(member):
                    self.attempt(member)
                if self.clock() - started >= self.settings.recovery.connect_timeout_s * 1e9:
                    break  # one caller does not wait for all that hang
            self.changes.go_on()
            self._tend(slot)
        finally:
            self.attempting.release()

    def _tend(self, slot: VirtualSlot) -> None:
        """Now and then a look at what others have left open: who knows it may be gone."""
        if slot.replication is None or self.clock() <= slot.tend_at_ns:
            return
        if slot.user == ck.CKU_USER and self.may_use_threads and not self.is_tending():
            self.tending = native.start_thread(slot.replication.tend, "pkcs11-ha ledger")
        elif slot.user == ck.CKU_USER and not self.may_use_threads:
            slot.replication.tend()
        slot.tend_at_ns = self.clock() + self.rule.interval_ns
        self._publish([slot])

    def is_tending(self) -> bool:
        """Whether such a look is under way: no call waits for it."""
        return self.tending is not None and self.tending.is_alive()

    def _is_due(self, member: Member) -> bool:
        with self.lock:
            away = member.state is MemberState.AWAY and not member.connecting and not self.stopping
            return away and not member.drained and recovery.is_due(member.outage, self.rule, self.clock())

    def attempt(self, member: Member) -> bool:
        """One attempt to take a member in again: connected, logged in, its objects matched."""
        slots = self.slots_of(member)
        try:
            member.connecting = True
            self._publish(slots)  # others do not come here meanwhile
            self._in_time_to_connect(member, lambda: self._bring_back(member, slots))
        except Exception as error:  # whatever it was, the member is tried again
            self._failed(member, slots, error)
            return False
        return True

    def _bring_back(self, member: Member, slots: list[VirtualSlot]) -> None:
        """Also when the caller has given up waiting: a success that comes late is a success."""
        failed = member.outage.failed
        self._reach(member)
        for slot in slots:
            login.take_in(slot, member)
            slot.objects.reconcile(slot.index(member))
        with ExitStack() as stack:
            for slot in slots:
                stack.enter_context(slot.login_lock)
                if login.take_in(slot, member):  # the application has logged in or out meanwhile
                    slot.objects.reconcile(slot.index(member))
            stack.enter_context(self.lock)
            if self.stopping:
                raise ConnectError(ck.CKR_CRYPTOKI_NOT_INITIALIZED, "C_Finalize was quicker")
            member.connecting = False
            member.state = MemberState.UP
            member.outage = replace(member.outage, wanted=False)
            for slot in slots:
                self.log(Event("member.recovered", slot.face.label, member.name, {"attempt": failed + 1}))
            self._publish(slots)
            for slot in slots:
                slot.publish_login()
        identity_file.remember(self.state_dir, identity_file.of_members([member]))

    def _failed(self, member: Member, slots: list[VirtualSlot], error: Exception) -> None:
        with self.lock:
            refused = isinstance(error, PinRefused)
            member.outage = recovery.after_failure(member.outage, self.clock(), refused)
            member.why = str(error) or _NO_ANSWER
            member.fault = _fault_of(error) or member.fault
            limit = "unlimited" if self.rule.attempts < 0 else str(self.rule.attempts)
            details: dict[str, str | int] = {
                "attempt": f"{member.outage.failed} of {limit}",
                "why": member.why,
            }
            exhausted = recovery.is_exhausted(member.outage, self.rule)
            for slot in slots:
                self.log(Event("recovery.failed", slot.face.label, member.name, details))
                if refused:
                    self.log(Event("recovery.stopped", slot.face.label, member.name))
                elif exhausted:
                    self.log(Event("recovery.exhausted", slot.face.label, member.name))
            self._publish(slots)

    def reconnect_now(self, member: Member) -> bool:
        """At once: somebody finalised the library of a member that is well."""
        with self.attempting:
            if member.state is MemberState.UP:
                return True  # another caller has done it
            if member.connecting or member.drained or member.outage.stopped or member.outage.failed:
                return False  # or has tried: from here on by the rule
            return self.attempt(member)

    def _recover_in_background(self) -> None:
        while self.settings.recovery.mode == "background":
            with self.changed:
                if self.changed.wait_for(lambda: self.stopping, _IDLE_STEP_S):
                    return
            self.changes.heed_in_passing()
            for slot in self.slots.values():
                if self.changes.is_noticed or any(self._is_due(member) for member in slot.members):
                    self.check(slot)

    def _start_background(self) -> None:
        if self.settings.recovery.mode == "background" and self.may_use_threads:
            self.thread = native.start_thread(self._recover_in_background, "pkcs11-ha recovery")

    # ---- what operators change ----

    @property
    def is_by_hand(self) -> bool:
        """Whether a command decides by itself who takes part."""
        return any(
            slot.replication is not None and slot.replication.is_by_hand for slot in self.slots.values()
        )

    def configure(self, settings: config.Config) -> None:
        """What holds from here on; who is in which group comes next (`part`, `enlist`)."""
        before, self.settings = self.settings, settings
        if settings.ha != before.ha:
            ended, self.log_target = self.log_target, _open_log(settings)
            ended.close()
        with self.lock:
            self.rule = _rule(settings)
            self.libraries.connect_timeout_s = settings.recovery.connect_timeout_s
            groups = {group.label: group for group in settings.groups}
            for slot in self.slots.values():
                if slot.is_group and (group := groups.get(slot.face.label)):
                    slot.regulate(group, self._breaker(slot, group))
        if self.thread is None or not self.thread.is_alive():
            self._start_background()

    def enlist(
        self, slot: VirtualSlot, wanted: config.MemberConfig, drained: bool
    ) -> tuple[Member | None, str]:
        """A member joins a group, away and to be tried at once; None, and why, if it cannot now."""
        seen = identity_file.seen(wanted, identity_file.remembered(self.state_dir))
        with self.lock:
            member = self.members.get(wanted.name) or self.former.get(wanted.name)
            if member is None:
                member = Member(wanted, self.clock(), self.lose, seen)
            elif member.connecting or any(other.is_group for other in self.slots_of(member)):
                return None, "it has not quite left its place of before"
            is_new = member.config != wanted
            if is_new and member.name in self.members:  # it has a slot of its own
                self.part(member)
                return None, "it is met anew, and has not quite been left"
            if not slot.seat(member, is_new=is_new):
                return None, "the group can have no more members before the application's next start"
            if member.name in self.members:  # it has had a slot of its own, and may be up
                self._away_to_return(member, self.slots_of(member))
            else:
                member.renew(wanted, self.clock(), seen)
            member.outage = recovery.at_once(member.outage)
            member.drained, member.loss_was_read = drained, True
            member.why = _DRAINED if drained else "it is new"
            self.former.pop(member.name, None)
            self.members[member.name] = member
            for own in self.slots.values():
                if not own.is_group and own.face.description == member.name:
                    own.arrange([member], ())
            return member, ""

    def part(self, member: Member) -> None:
        """A member leaves: no new work, what it had under way goes on elsewhere; then its library is left, too."""
        with self.lock:
            slots = self.slots_of(member)
            member.state = MemberState.AWAY
            member.connecting = True  # nobody else is to touch it until it has been left
            for slot in slots:
                slot.arrange([m for m in slot.members if m is not member], slot.standbys - {member.name})
            self.former[member.name] = self.members.pop(member.name)
            self._publish(slots)
        if member.instance is None:
            member.connecting = False
        elif self.may_use_threads:
            self.leaving = [thread for thread in self.leaving if thread.is_alive()]
            self.leaving.append(native.start_thread(partial(self._leave, member, slots), "pkcs11-ha leave"))
        else:
            self._leave(member, slots)

    def _leave(self, member: Member, slots: list[VirtualSlot]) -> None:
        """Logged out, its sessions closed, its library finalised unless others use it: as far as it lets us."""
        instance = member.instance
        assert instance
        if instance.foreign:  # where not all sessions on the token are ours to close
            for slot in slots:
                native.lib.ha_slot_drain_pools_of(slot.native, slot.index(member))
        native.lib.ha_member_new_epoch(member.native)
        for slot in slots:
            slot.objects.member_lost(slot.index(member))
        try:
            if member.is_quiet(self.settings.recovery.connect_timeout_s):
                member.leave()
                member.instance = None
                self.libraries.release(member.name, instance)
            else:
                instance.abandon()
        except Exception as error:  # it is left all the same
            member.why = str(error)
        member.logins.clear()
        member.connecting = False
        self.changes.notice()

    def drain(self, member: Member, drained: bool) -> None:
        """By an operator: it takes no new work from here on, or does again."""
        missed = any(slot.has_missed(member) for slot in self.slots_of(member))
        with self.lock:
            slots, member.drained = self.slots_of(member), drained
            if not drained and (member.state is MemberState.AWAY or missed):
                self._away_to_return(member, slots)
            self._publish(slots)
            for slot in slots:
                name = "member.drained" if drained else "member.enabled"
                self.log(Event(name, slot.face.label, member.name))

    def _away_to_return(self, member: Member, slots: list[VirtualSlot]) -> None:
        """To be taken in as one that was lost: restarted, logged in, its objects matched."""
        was_up, member.state = member.state is MemberState.UP, MemberState.AWAY
        member.outage = recovery.at_once(Outage(self.clock()) if was_up else member.outage)
        member.why = "it was drained, and is tried again"
        if was_up:
            member.logins.clear()
            self._publish(slots)
            native.lib.ha_member_new_epoch(member.native)
            for slot in slots:
                slot.objects.member_lost(slot.index(member))

    def recover(self, member: Member) -> None:
        """An operator asks for an attempt at once."""
        with self.lock:
            member.outage = recovery.at_once(member.outage)
            why = ""
            if member.outage.stopped:
                why = "its PIN was refused: it is tried again after the application's next C_Initialize"
            elif member.drained:
                why = _DRAINED
            slots = self.slots_of(member)
            for slot in slots:
                details: dict[str, str | int] = {"not_tried": why} if why else {}
                self.log(Event("recovery.asked", slot.face.label, member.name, details))
            self._publish(slots)

    # ---- end ----

    def stop(self) -> None:
        """Wakes what waits: the background thread and a blocking C_WaitForSlotEvent."""
        with self.lock, self.changed:
            self.stopping = True
            self.changed.notify_all()

    def finalise(self) -> None:
        """Logs out, finalises the libraries that are ours and in which nothing is stuck."""
        self.stop()
        self.changes.watch.end(self.settings.recovery.connect_timeout_s)
        for thread in (self.thread, self.tending, *self.leaving):
            if thread is not None:
                thread.join(self.settings.recovery.connect_timeout_s)
        for slot in self.slots.values():
            login.forget(slot, self.settings.recovery.connect_timeout_s)
            slot.objects.forget_recipes()
        members = self.former | self.members
        for member in members.values():
            if not self._is_stuck(member) and member.instance is not None and member.instance.foreign:
                self.in_time(partial(self._depart, member))  # the host goes on with that library
            native.lib.ha_member_new_epoch(member.native)
        stuck = frozenset(name for name, member in members.items() if self._is_stuck(member))
        self.libraries.finalise(stuck, self.in_time)
        for name, member in members.items():
            if name not in stuck:
                native.lib.ha_member_free(member.native)
        if self.segment is not None:
            self.segment.close()
            self.segment = None
        self.log(Event("core.stopped"))
        self.log_target.close()
        if not stuck:
            self.slots.clear()  # who know this core: with them it would stay until a garbage collection
            for member in members.values():
                del member.gone

    def _is_stuck(self, member: Member) -> bool:
        """Whether somebody is inside its library, or may yet go there, perhaps for ever."""
        return (
            self.is_tending()
            or member.connecting
            or member.learning
            or bool(native.lib.ha_member_in_flight(member.native))
        )

    def _depart(self, member: Member) -> None:
        for slot in self.slots_of(member):
            native.lib.ha_slot_drain_pools_of(slot.native, slot.index(member))
        member.depart()

    def in_time(self, work: Callable[[], None]) -> bool:
        """Does the work, unless it hangs; whether it was done."""
        try:
            native.within(
                self.settings.recovery.connect_timeout_s, self.may_use_threads, work, lambda _error: None
            )
        except OutOfTime:
            return False
        return True


def _fault_of(error: BaseException, call: str = "recovery") -> tuple[str, str] | None:
    """The code that an attempt ended with, and what it was at; None where nothing was answered."""
    return (ck.rv_name(error.rv), call) if isinstance(error, ConnectError | CkError) else None


def start(flags: int) -> Core:
    """Reads the configuration and brings the core up; raises ConfigError."""
    environ = {name: value for name in config.ENVIRONMENT if (value := native.getenv(name)) is not None}
    path = config.find_path(environ)
    read = requests.stamp(path)
    return Core(config.load(path), config.state_dir(environ), flags, read=read)


def _open_log(settings: config.Config) -> Log:
    return open_log(settings.ha.log, settings.ha.log_format, settings.ha.log_max_bytes)


def _rule(settings: config.Config) -> Rule:
    return Rule(int(settings.recovery.interval_s * 1e9), settings.recovery.attempts)
