"""Who takes part in a group's replication: the members that are there and have the group's domain key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

from pkcs11_ha import ck
from pkcs11_ha.config import GroupConfig
from pkcs11_ha.core.domain import Generation
from pkcs11_ha.core.ledger import Replica
from pkcs11_ha.core.template import ulong
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import attributes, domain
from pkcs11_ha.runtime.domain import DomainKey
from pkcs11_ha.runtime.host_lock import HostLock
from pkcs11_ha.runtime.ledger import Ledger
from pkcs11_ha.runtime.member import Member, keep_to
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.objects import ObjectMap, VirtualObject
from pkcs11_ha.runtime.service import MemberFault, Refused, judged, on

_PATIENCE_S = 3.0  # with another process of this host that writes
T = TypeVar("T")
LeaveOut = Callable[[Member, int, str, str], None]
"""Leaves a member out: (member, return value, call, why in one line)."""


class Party:
    """The members of one group, and the only writer of which of them take part."""

    def __init__(
        self,
        group: GroupConfig,
        members: Sequence[Member],
        objects: ObjectMap,
        log: Callable[[Event], None],
        leave_out: LeaveOut,
        state_dir: str,
    ) -> None:
        self.group = group
        self.members = members  # by index, also those that have left the group
        self.order = tuple(members)  # those that are in it, as the configuration has them
        self.objects = objects
        self.log = log
        self.leave_out = leave_out
        self.ledger = Ledger(group.label, members, objects)
        # one write at a time, of this process and as far as can be of this host
        name = f"{group.label} {group.serial}"
        self.lock = HostLock(state_dir, name, _PATIENCE_S, self._taken, lambda: keep_to(None))
        self.generation: Generation | None = None
        self.attended: dict[str, int] = {}  # members that take part -> the epoch in which they were found fit
        self._lengths: dict[str, tuple[int, bool]] = {}  # member -> epoch, and what was found then
        self.names: frozenset[str] | None = None  # as the ledger has them; None: it has none
        self.keys: dict[str, dict[int, DomainKey]] = {}
        self.owed: dict[str, frozenset[str]] | None = (
            None  # uid -> who is to be given or to lose it; `Settling`'s
        )
        self.told: Callable[[], None] = lambda: None  # what is owed has changed

    def _taken(self) -> None:
        """What we know of handles is of the lives in which members were found fit.  And each takes notice of what
        other processes wrote, before we write: SoftHSM forgets to, else."""
        keep_to(self.attended)
        for member in self.there():
            with suppress(MemberFault, Refused), on(member):
                attributes.find(member, {ck.CKA_CLASS: ulong(ck.CK_UNAVAILABLE_INFORMATION)})

    def takes_part(self, member: Member) -> bool:
        """Whether it was found fit, in its present life."""
        return self.attended.get(member.name) == member.epoch

    def disband(self) -> None:
        """Nobody is logged in any more."""
        self.attended.clear()

    def admit(self, member: Member) -> None:
        """It is fit."""
        self.attended[member.name] = member.epoch

    def dismiss(self, member: Member) -> None:
        """It is not, after all."""
        self.attended.pop(member.name, None)

    def there(self) -> list[Member]:
        """Members that take part and are well, in the configuration's order."""
        return [member for member in self.order if self.takes_part(member)]

    def roster(self) -> frozenset[str]:
        """Names of all members that the group has: those admitted and not dismissed since; else those configured."""
        return frozenset(member.name for member in self.order) if self.names is None else self.names

    def take_part(self, members: Sequence[Member], generation: Generation | None) -> None:
        """By an operator's decision: these members, with this domain key.  Raises MemberFault, CkError."""
        for member in members:
            self.keys[member.name] = domain.keys_of(member)
            self.attended[member.name] = member.epoch
        self.generation = generation
        self.names = self.ledger.roster(members)

    def keeps_lengths(self, member: Member) -> bool:
        """Whether it unwraps keys of odd lengths as they are; tried once in its present life."""
        known = self._lengths.get(member.name)
        if known is None or known[0] != member.epoch:
            keys = self.keys.get(member.name, {})
            keeps = bool(keys) and domain.keeps_lengths(member, keys[max(keys)])
            known = self._lengths[member.name] = (member.epoch, keeps)
        return known[1]

    def look(self, member: Member) -> dict[int, DomainKey] | None:
        """The domain keys a member proves; None if it failed at that, and is left out."""
        try:
            self.keys[member.name] = domain.keys_of(member)
        except (MemberFault, Refused, CkError) as error:
            self.leave_out(member, error.rv, "the domain key", str(error))
            return None
        return self.keys[member.name]

    def refuse(self, member: Member, why: str) -> None:
        self.attended.pop(member.name, None)
        self.log(Event("domain.refused", self.group.label, member.name, {"why": why}))
        self.leave_out(member, ck.CKR_DEVICE_ERROR, "the domain key", why)

    def leave(self, fault: MemberFault) -> None:
        """Leaves out a member that failed.  Of one that takes no part any more, as it was lost, or as nobody is logged
        in and it shows nothing that is private, a failure says nothing."""
        if not self.takes_part(fault.member):
            return
        self.attended.pop(fault.member.name, None)
        self.leave_out(fault.member, fault.rv, fault.call, "")

    def rejected(self, why: str, rv: int = ck.CKR_DEVICE_ERROR) -> CkError:
        self.log(Event("replication.refused", self.group.label, "", {"why": why}))
        return CkError(rv, why)

    def away(self) -> frozenset[str]:
        there = self.there()
        return self.roster() - {member.name for member in there}

    def owed_to(self, name: str) -> int | None:
        """Objects that a member has yet to be given or to lose, as far as was seen; None: nobody has looked yet."""
        return None if self.owed is None else sum(name in names for names in list(self.owed.values()))

    def handle_at(self, known: VirtualObject, member: Member) -> int:
        """The object's handle on a member, 0 if it is not there; raises MemberFault, Refused."""
        try:
            return self.objects.handle_at(known, self.members.index(member))
        except CkError as error:
            failed = error.member if isinstance(error.member, Member) else member
            raise judged(failed, error.rv, "C_FindObjects") from None

    def steadily(self, look: Callable[[list[Member]], T]) -> T:
        """Looks at whoever is there, and once more without a member that fails at that; raises CkError.

        Only for what changes nothing.
        """
        while there := self.there():
            try:
                return look(there)
            except MemberFault as fault:
                self.leave(fault)
            except Refused as error:
                raise CkError(error.rv, str(error), error.member) from None
        raise CkError(ck.CKR_DEVICE_ERROR, "no member is left")

    def on_each(self, members: Iterable[Member], step: Callable[[Member], None]) -> None:
        """The same step of a write on one member after the other, once more on one if another failed at that, which
        may keep the ledger for it.

        Who cannot do what another one did is left out, as if it had died; what all say is the answer.  Raises
        Refused, CkError.
        """
        did, unable = False, []
        for member in members:
            while self.takes_part(member):
                try:
                    step(member)
                    did = True
                    break
                except MemberFault as fault:
                    self.leave(fault)
                except Refused as error:
                    if error.member is not member or not error.is_suspect:
                        raise
                    unable.append(error)
                    break
        if unable and not did:
            raise unable[0]
        self.leave_unable(unable)

    def on_one(self, step: Callable[[Member], T]) -> T:
        """A step that need be done on one member only: on the next, where one fails at it.  Raises CkError."""
        unable: list[Refused] = []
        for member in self.there():
            try:
                done = step(member)
            except MemberFault as fault:
                self.leave(fault)
            except Refused as error:
                if not error.is_suspect:
                    raise CkError(error.rv, str(error), error.member) from None
                unable.append(error)
            else:
                self.leave_unable(unable)
                return done
        if unable:
            raise CkError(unable[0].rv, str(unable[0]), unable[0].member)
        raise CkError(ck.CKR_DEVICE_ERROR, "no member is left")

    def leave_unable(self, refusals: Iterable[Refused]) -> None:
        """Others have done what these members refused: they are left out, and owed it."""
        for error in refusals:
            self.leave(MemberFault(error.member, error.rv, error.call))

    def replicas(self, uid: str) -> list[Replica]:
        """Of one entry, on whoever is there; raises CkError."""
        return self.steadily(lambda there: self.ledger.of(uid, there))
