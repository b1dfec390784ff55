"""The ledger on the members: entries as private data objects that no application sees, and leases."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from pkcs11_ha import ck
from pkcs11_ha.core import ledger
from pkcs11_ha.core.identity import Name
from pkcs11_ha.core.ledger import Entry, LedgerError, Owner, Replica, Stage
from pkcs11_ha.core.template import RESERVED, TRUE, ulong
from pkcs11_ha.runtime import attributes
from pkcs11_ha.runtime.attributes import Filled
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.objects import ObjectMap
from pkcs11_ha.runtime.process import start_of
from pkcs11_ha.runtime.service import MemberFault, Refused, create, destroy, do, find, on

_APPLICATION = RESERVED + b"ledger "
_NOBODY = Name(None, None, b"", b"", b"", b"")
_ROSTER = RESERVED + b"roster"
_STILL_S = 10.0  # after so long without a sign of life another host's process is taken for dead
_STEP_S = 0.05
# What a token says that does not keep data objects, or none that are private.
_NO_DATA = (
    ck.CKR_ATTRIBUTE_VALUE_INVALID,
    ck.CKR_ATTRIBUTE_TYPE_INVALID,
    ck.CKR_TEMPLATE_INCONSISTENT,
    ck.CKR_FUNCTION_NOT_SUPPORTED,
)


def me() -> Owner:
    """This process, as the owner of one write."""
    return Owner(_host(), os.getpid(), start_of(os.getpid()) or 0, secrets.token_hex(8))


@cache
def _host() -> str:
    """One start of one system, and the namespace that gives process ids their meaning."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return secrets.token_hex(16)  # nobody's: its processes are told dead by their silence


class Ledger:
    """The entries of one group.  Nothing here decides; `members` are those of the slot, by index."""

    def __init__(self, label: str, members: Sequence[Member], objects: ObjectMap) -> None:
        self.label = label
        self.members = members
        self.objects = objects
        self.refuses: set[str] = set()  # they keep no data objects
        for member in members:
            self.seat(member)
        self._seen: dict[object, float] = {}  # when a sign of life of another host's owner was seen first

    def seat(self, member: Member) -> None:
        """A member that is new to the group, or comes again as another token."""
        self.refuses.discard(member.name)
        if member.profile == "nss":
            self.refuses.add(member.name)

    # ---- where entries lie ----

    def _hosts(self, member: Member, there: Sequence[Member]) -> list[Member]:
        """Where a member's entries lie: with itself, or with all that keep data objects."""
        return (
            [member] if member.name not in self.refuses else [m for m in there if m.name not in self.refuses]
        )

    def _label(self, stage: Stage | str, member: Member) -> bytes:
        of = f" of {member.name}" if member.name in self.refuses else ""
        return RESERVED + f"{stage.value if isinstance(stage, Stage) else stage}{of}".encode()

    def keeps(self, member: Member) -> bool:
        """Whether a member takes data objects; found out by giving it one."""
        if member.name not in self.refuses:
            try:
                self.erase(
                    self.write(member, Entry(secrets.token_hex(16), 0, False, _NOBODY), Stage.KEPT, [member])
                )
            except Refused:
                return False
        return member.name not in self.refuses

    def can_keep(self, there: Sequence[Member]) -> bool:
        """Whether any of these members keeps the ledger."""
        return any(member.name not in self.refuses for member in there)

    # ---- entries ----

    def write(self, member: Member, entry: Entry, stage: Stage, there: Sequence[Member]) -> Replica:
        """Puts an entry down for a member; raises MemberFault, Refused."""
        handles = []
        for host in self._hosts(member, there):
            try:
                handles.append((self.members.index(host), self._put(host, entry, self._label(stage, member))))
            except Refused as error:
                if host is not member or error.rv not in _NO_DATA:
                    raise
                self.refuses.add(member.name)
                return self.write(member, entry, stage, there)
        return Replica(member.name, stage, entry, tuple(handles))

    def _put(self, host: Member, entry: Entry, label: bytes) -> int:
        return self._create(
            host,
            {
                ck.CKA_APPLICATION: _APPLICATION + ledger.name_digest(entry.name).encode(),
                ck.CKA_LABEL: label,
                ck.CKA_OBJECT_ID: ledger.oid(entry.uid),
                ck.CKA_VALUE: ledger.encode(entry),
            },
        )

    def _create(self, host: Member, what: dict[int, bytes]) -> int:
        common = {ck.CKA_CLASS: ulong(ck.CKO_DATA), ck.CKA_TOKEN: TRUE, ck.CKA_PRIVATE: TRUE}
        with on(host):
            epoch = host.epoch
            handle = create(host, common | what)
        self.objects.hide(self.members.index(host), epoch, handle)
        return handle

    def mark(self, member: Member, replica: Replica, stage: Stage, there: Sequence[Member]) -> Replica:
        """Says how far a member is; raises MemberFault, Refused."""
        label = Filled({ck.CKA_LABEL: self._label(stage, member)})
        for index, handle in replica.handles:
            host = self.members[index]
            with on(host):
                try:
                    do(host, "C_SetAttributeValue", host.session, handle, label.array, label.count)
                except Refused as error:
                    if error.rv == ck.CKR_OBJECT_HANDLE_INVALID:
                        return replica  # another process has gone further with the entry meanwhile
                    # it changes no data objects: a new one, and then the old one away
                    new = self.write(member, replica.entry, stage, there)
                    self.erase(replica)
                    return new
        return Replica(replica.member, stage, replica.entry, replica.handles)

    def erase(self, replica: Replica) -> None:
        """Raises MemberFault; what is gone already is gone."""
        for index, handle in replica.handles:
            host = self.members[index]
            with on(host), suppress(Refused):
                destroy(host, handle)
            self.objects.unhide(index, host.epoch, handle)

    def of(self, uid: str, there: Sequence[Member]) -> list[Replica]:
        """All replicas of one entry; raises MemberFault, CkError."""
        return self._find(there, {ck.CKA_OBJECT_ID: ledger.oid(uid)})

    def called(self, name: Name, there: Sequence[Member]) -> list[Replica]:
        """All replicas of entries for objects of this name."""
        return self._find(there, {ck.CKA_APPLICATION: _APPLICATION + ledger.name_digest(name).encode()})

    def open(self, there: Sequence[Member]) -> list[str]:
        """uids of entries that are not done everywhere."""
        return self._uids(there, (Stage.ANNOUNCED, Stage.PLACED))

    def all(self, there: Sequence[Member]) -> list[str]:
        """uids of all entries."""
        return self._uids(there, tuple(Stage))

    def _uids(self, there: Sequence[Member], stages: Sequence[Stage]) -> list[str]:
        uids: dict[str, None] = {}
        for host, member in self._looks(there):
            for stage in stages:
                for handle in self._handles(host, {ck.CKA_LABEL: self._label(stage, member)}):
                    replica = self._read(host, member, stage, handle)
                    if replica:
                        uids[replica.entry.uid] = None
        return list(uids)

    # ---- who belongs to the group ----

    def roster(self, there: Sequence[Member]) -> frozenset[str] | None:
        """Names of the members that were admitted; None where that was never written.  Raises MemberFault, Refused."""
        written = self._rosters(there)
        return max(written, key=lambda r: r.entry.version).entry.owed if written else None

    def set_roster(self, names: frozenset[str], there: Sequence[Member]) -> None:
        """Raises MemberFault, Refused."""
        before = self._rosters(there)
        version = 1 + max((r.entry.version for r in before), default=0)
        entry = Entry(secrets.token_hex(16), version, True, _NOBODY, owed=names)
        for host in there:
            if host.name in self.refuses:
                continue
            try:
                self._put(host, entry, _ROSTER)
            except Refused as error:
                if error.rv not in _NO_DATA:
                    raise
                self.refuses.add(host.name)
        for replica in before:
            self.erase(replica)

    def _rosters(self, there: Sequence[Member]) -> list[Replica]:
        hosts = [host for host in there if host.name not in self.refuses]
        found = [(host, h) for host in hosts for h in self._handles(host, {ck.CKA_LABEL: _ROSTER})]
        read = [self._read(host, host, Stage.KEPT, handle) for host, handle in found]
        return [replica for replica in read if replica is not None]

    def held(self, member: Member, there: Sequence[Member]) -> dict[str, Replica]:
        """All entries that lie there for one member, by uid: the newest of each."""
        held: dict[str, Replica] = {}
        for host in self._hosts(member, there):
            for stage in Stage:
                for handle in self._handles(host, {ck.CKA_LABEL: self._label(stage, member)}):
                    replica = self._read(host, member, stage, handle)
                    if replica and (
                        replica.entry.uid not in held
                        or held[replica.entry.uid].entry.weight < replica.entry.weight
                    ):
                        held[replica.entry.uid] = replica
        return held

    def _looks(self, there: Sequence[Member]) -> Iterator[tuple[Member, Member]]:
        """(where to look, for whom)."""
        for host in there:
            if host.name in self.refuses:
                continue
            yield host, host
            for member in self.members:
                if member.name in self.refuses:
                    yield host, member

    def _find(self, there: Sequence[Member], wanted: dict[int, bytes]) -> list[Replica]:
        found: dict[tuple[str, Stage, tuple[int, bool, str], str], Replica] = {}
        for host in there:
            if host.name in self.refuses:
                continue
            for handle in self._handles(host, wanted):
                replica = self._identify(host, handle)
                if replica is None:
                    continue
                key = (replica.member, replica.stage, replica.entry.weight, replica.entry.uid)
                before = found[key].handles if key in found else ()
                found[key] = Replica(replica.member, replica.stage, replica.entry, before + replica.handles)
        return list(found.values())

    def _handles(self, host: Member, wanted: dict[int, bytes]) -> list[int]:
        common = {ck.CKA_CLASS: ulong(ck.CKO_DATA), ck.CKA_TOKEN: TRUE}
        return find(host, common | wanted)

    def _identify(self, host: Member, handle: int) -> Replica | None:
        """The replica that an object is, by its label: which stage, for whom."""
        shown = self._shown(host, handle, ck.CKA_LABEL)
        text = shown.get(ck.CKA_LABEL, b"")[len(RESERVED) :].decode("utf-8", "replace")
        stage, _, name = text.partition(" of ")
        member = next((m for m in self.members if m.name == name), None) if name else host
        known = {s.value: s for s in Stage}
        return self._read(host, member, known[stage], handle) if member and stage in known else None

    @staticmethod
    def _shown(host: Member, handle: int, number: int) -> dict[int, bytes]:
        """One attribute, if the object is still there; raises MemberFault, Refused."""
        try:
            with on(host):
                return attributes.read(host, host.session, handle, (number,))
        except Refused as error:
            if error.rv != ck.CKR_OBJECT_HANDLE_INVALID:
                raise
            return {}

    def _read(self, host: Member, member: Member, stage: Stage, handle: int) -> Replica | None:
        """None if it has gone since it was found; raises MemberFault for what cannot be read."""
        index, epoch = self.members.index(host), host.epoch
        shown = self._shown(host, handle, ck.CKA_VALUE)
        if ck.CKA_VALUE not in shown:
            return None
        self.objects.hide(index, epoch, handle)
        try:
            return Replica(member.name, stage, ledger.decode(shown[ck.CKA_VALUE]), ((index, handle),))
        except LedgerError as error:
            raise MemberFault(host, ck.CKR_DEVICE_ERROR, str(error)) from None

    # ---- who is at work ----

    def lives(self, owner: Owner) -> bool:
        """Whether the process may still be at work.

        On this host that is known.  On another one it is taken for dead when its sign has not changed for a while,
        by our clock: nothing is assumed of the clocks of others.
        """
        if owner.host == _host() and owner.pid == os.getpid():
            return False  # it would be us: one write of a process at a time
        if owner.host == _host():
            return start_of(owner.pid) == owner.start
        since = self._seen.setdefault(owner, time.monotonic())
        return time.monotonic() - since < _STILL_S

    @contextmanager
    def lease(
        self, member: Member, there: Sequence[Member], patience_s: float
    ) -> Iterator[Callable[[], None]]:
        """The right to bring a member up to date, for one process at a time; raises MemberFault, Refused, Busy.

        There is no compare-and-swap on a token.  So who wants it puts its lease down first and looks then: who sees
        another living one takes its own away and tries again.  Of two, at least one sees the other.  What is yielded
        is to be called now and then: the lease shows that its holder lives.
        """
        hosts = self._hosts(member, there)
        if not hosts:
            yield lambda: None
            return
        host, label = hosts[0], self._label("lease", member)
        deadline = time.monotonic() + patience_s
        while True:
            if not self._leases(host, label, None):
                owner = me()
                held = [self._put(host, Entry(secrets.token_hex(16), 1, True, _NOBODY, owner=owner), label)]
                if not self._leases(host, label, owner):
                    break
                self._give_back(host, held[0])
            if time.monotonic() > deadline:
                raise Busy(f"another process is bringing {member.name} up to date")
            time.sleep(_STEP_S * (1 + random.random()))  # noqa: S311 (no secret)
        shown = time.monotonic()

        def alive() -> None:
            nonlocal shown
            if time.monotonic() - shown > _STILL_S / 4:
                sign = replace(owner, nonce=secrets.token_hex(8))
                held.insert(
                    0, self._put(host, Entry(secrets.token_hex(16), 1, True, _NOBODY, owner=sign), label)
                )
                self._give_back(host, held.pop())
                shown = time.monotonic()

        try:
            yield alive
        finally:
            for handle in held:
                self._give_back(host, handle)

    def _give_back(self, host: Member, handle: int) -> None:
        with (
            suppress(MemberFault, Refused),
            on(host),
        ):  # a lease that stays is that of a dead process one day
            destroy(host, handle)
            self.objects.unhide(self.members.index(host), host.epoch, handle)

    def _leases(self, host: Member, label: bytes, mine: Owner | None) -> list[Owner]:
        """Living holders but me; what dead ones left is cleared away."""
        living = []
        for handle in self._handles(host, {ck.CKA_LABEL: label}):
            replica = self._read(host, host, Stage.ANNOUNCED, handle)
            owner = replica.entry.owner if replica else None
            if owner is None or owner == mine:
                continue
            if self.lives(owner):
                living.append(owner)
            else:
                self._give_back(host, handle)
        return living

    def quiet(self, owners: Iterable[Owner]) -> bool:
        """Whether no other process is at work."""
        return not any(self.lives(owner) for owner in owners)


class Busy(Exception):
    """Another process is at it, and takes its time."""
