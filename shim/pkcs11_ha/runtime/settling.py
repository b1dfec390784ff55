"""Settling: whatever a write left open is brought to its end, on every member that is there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from pkcs11_ha import ck
from pkcs11_ha.core.ledger import Entry, Replica, Situation, Stage, assess, tombstone
from pkcs11_ha.core.template import (
    has_id,
    may_be_tagged,
    named,
)
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import attributes
from pkcs11_ha.runtime.attributes import Filled
from pkcs11_ha.runtime.copying import Copying
from pkcs11_ha.runtime.ledger import Busy, me
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.party import Party
from pkcs11_ha.runtime.service import MemberFault, Refused, destroy, do, on
from pkcs11_ha.runtime.whereabouts import Unproven, Whereabouts

_ROUNDS = 3  # of looking for what was announced while we were at it
_PATIENCE_S = 3.0  # with another process at work on the same object, or on the same member


class Settling:
    """Rolls announced writes forward, pays what members missed, and closes what is done everywhere."""

    def __init__(self, party: Party, whereabouts: Whereabouts, copying: Copying) -> None:
        self.party = party
        self.whereabouts = whereabouts
        self.copying = copying
        self._regrets: list[Entry] = []

    def finish(self, uids: Iterable[str]) -> None:
        """Once it is done everywhere: kept, or forgotten."""
        for uid in uids:
            with suppress(CkError, Refused):
                try:
                    self._close(uid)
                except MemberFault as fault:
                    self.party.leave(fault)

    def _close(self, uid: str) -> None:
        there = self.party.there()
        replicas = self.party.ledger.of(uid, there)
        if not replicas:
            self._owe(uid, frozenset())
            return
        situation = assess(replicas, [m.name for m in there], self.party.roster())
        self._owe(uid, situation.behind | situation.away)
        if situation.behind or situation.away:
            return
        at_target = [r for r in replicas if r.entry.weight == situation.target.weight]
        by_name = {member.name: member for member in self.party.members}
        if situation.target.alive and not situation.target.foreign:
            for replica in at_target:
                if replica.stage is not Stage.KEPT:
                    self.party.ledger.mark(by_name[replica.member], replica, Stage.KEPT, there)
            if self.party.group.escrow == "token":
                for replica in replicas:  # what was foretold, by who ended before it was taken back
                    if replica.entry.weight < situation.target.weight:
                        self.party.ledger.erase(replica)
                return
        # Those that were owed last: while one of theirs is left, nobody is owed again.
        for replica in sorted(
            self.party.ledger.of(uid, there), key=lambda r: r.member in situation.target.owed
        ):
            if (
                replica.entry.weight <= situation.target.weight
            ):  # else another process has announced more since
                self.party.ledger.erase(replica)

    def _owe(self, uid: str, names: frozenset[str]) -> None:
        """Who is owed what an entry says, as of now."""
        if self.party.owed is None:
            self.party.owed = {}
        if self.party.owed.get(uid, frozenset()) == names:
            return
        self.party.owed[uid] = names
        if not names:
            del self.party.owed[uid]
        self.party.told()

    def settle(self, returning: Member | None = None) -> None:
        """Brings whatever is open to its end, on all who are there.

        A member that cannot be brought up to date must not serve: one that returns is told so by Refused, Busy or
        Unproven, any other is left out.  Raises MemberFault.
        """
        with self.party.lock:
            self._settle_all(returning)

    def _settle_all(self, returning: Member | None) -> None:
        there = self.party.there()
        if not self.party.ledger.can_keep(there):
            return
        self._keep_regrets()
        self.party.owed = self.party.owed or {}
        seen: set[str] = set()
        for _ in range(_ROUNDS):
            uids = [uid for uid in self.party.ledger.open(there) if uid not in seen]
            if not uids:
                break
            seen.update(uids)
            self._settle(uids, returning)
        for uid in self.party.owed.keys() - seen:
            self._owe(uid, frozenset())  # others have seen to it
        self.party.told()
        for member in self.party.there():
            self._sweep(member)

    def _sweep(self, member: Member) -> None:
        """Objects that still bear the mark of what is new, as their writer ended before it took it off."""
        for uid, handle in self.whereabouts.marked(member):
            replicas = self.party.ledger.of(uid, self.party.there())
            newest = max((r.entry for r in replicas), key=lambda entry: entry.weight, default=None)
            own = [r.entry for r in replicas if r.member == member.name and r.stage is not Stage.ANNOUNCED]
            if (newest is None and not self.party.away()) or (newest is not None and not newest.alive):
                with on(member), suppress(Refused):
                    destroy(member, handle)
            elif own:
                with suppress(Refused):  # another process was quicker
                    self.untag(member, handle, max(own, key=lambda entry: entry.weight))

    def settle_one(self, uid: str) -> None:
        """As `settle`, for one entry."""
        self._settle([uid], None)

    def _settle(self, uids: Sequence[str], returning: Member | None) -> None:
        behind: dict[str, list[str]] = {}
        for uid in uids:
            situation, replicas = self._quiet_situation(uid)
            if situation is None:
                continue
            self._announce_together(situation.target, replicas)
            for name in situation.behind:
                behind.setdefault(name, []).append(uid)
        for member in [m for m in self.party.there() if m.name in behind]:
            try:
                self._bring_up(member, behind[member.name])
            except (Refused, Busy, Unproven) as error:
                if member is returning:
                    raise
                self._set_aside(member, error)
        for uid in uids:
            self._close(uid)

    def _bring_up(self, member: Member, uids: Sequence[str]) -> None:
        """Pays one member what it missed; the right to do so is one process's at a time."""
        with self.party.ledger.lease(member, self.party.there(), _PATIENCE_S) as alive:
            for uid in uids:
                alive()
                situation, replicas = self._quiet_situation(uid)
                if situation is not None and member.name in situation.behind:
                    self._bring(member, situation.target, replicas)

    def _set_aside(self, member: Member, error: Refused | Busy | Unproven) -> None:
        """Leaves out a member that is behind, unless nobody else is left."""
        self.party.log(Event("replication.owed", self.party.group.label, member.name, {"why": str(error)}))
        if self.party.takes_part(member) and len(self.party.there()) > 1:
            self.party.dismiss(member)
            self.party.leave_out(member, ck.CKR_DEVICE_ERROR, "settling", f"it is behind: {error}")

    def _announce_together(self, target: Entry, replicas: Sequence[Replica]) -> None:
        """What one call makes is announced for all its objects before any is made: if none is, some may be missing."""
        if any(replica.stage is not Stage.ANNOUNCED for replica in replicas):
            return
        for other in target.together:
            if not self.party.replicas(other.uid):
                for member in self.party.there():
                    self.party.ledger.write(member, other, Stage.ANNOUNCED, self.party.there())

    def situation(self, uid: str) -> Situation | None:
        """Where things stand with one entry; None if it is gone.  Raises MemberFault, Refused."""
        there = self.party.there()
        replicas = self.party.ledger.of(uid, there)
        return assess(replicas, [m.name for m in there], self.party.roster()) if replicas else None

    def regret(self, entry: Entry) -> None:
        """The application was told that an object was not made, but nobody was left to undo it."""
        self._regrets.append(entry)

    def _keep_regrets(self) -> None:
        """What was told to the application becomes true as soon as somebody is there."""
        while self._regrets:
            entry = self._regrets[-1]
            grave = tombstone(entry, me())
            if self.party.replicas(entry.uid):
                for member in self.party.there():
                    self.party.ledger.write(member, grave, Stage.ANNOUNCED, self.party.there())
            self._regrets.pop()

    def _quiet_situation(self, uid: str) -> tuple[Situation | None, list[Replica]]:
        """Where things stand when no living process is at work on the object; None if that does not come."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            there = self.party.there()
            replicas = self.party.ledger.of(uid, there)
            if not replicas:
                return None, []
            situation = assess(replicas, [m.name for m in there], self.party.roster())
            if self.party.ledger.quiet(situation.announced):
                return situation, replicas
            if time.monotonic() > deadline:
                return None, []
            time.sleep(0.05)

    def _bring(self, member: Member, target: Entry, replicas: Sequence[Replica]) -> None:
        """Makes one object on one member what its entry says."""
        own = max(
            (
                r.entry
                for r in replicas
                if r.member == member.name
                and r.entry.weight < target.weight
                and self._may_have(member, target, r)
            ),
            key=lambda entry: entry.weight,
            default=None,
        )
        if not target.alive:
            self._bury(member, target, own)
        elif target.foreign:
            self._catch_up(member, target, own)
        elif not (own and self._catch_up(member, target, own)) and not self._bring_new(
            member, target, replicas
        ):
            return
        self.mark(member, target, Stage.PLACED)
        self.drop_tag(member, target)

    def _may_have(self, member: Member, target: Entry, own: Replica) -> bool:
        """What was only announced there may never have been made: it is looked for, where it bears no mark."""
        if own.stage is not Stage.ANNOUNCED or not target.alive:
            return True
        is_older = own.entry.version < target.version  # else it bears the name that it is to have
        unmarked = not has_id(target.name.object_class)
        return is_older and unmarked and self.whereabouts.surplus(member, own.entry)

    def _bury(self, member: Member, target: Entry, own: Entry | None) -> None:
        for handle in self.whereabouts.tagged(member, target.uid):
            destroy(member, handle)
        left = self.whereabouts.locate(member, target, own)
        if left is not None:
            with on(member):
                destroy(member, left)
        self.party.log(
            Event("object.settled", self.party.group.label, member.name, _details(target, "destroyed"))
        )

    def _catch_up(self, member: Member, target: Entry, own: Entry | None) -> bool:
        """Whether the object is there, and is now what it was changed to."""
        handle = self.whereabouts.locate(member, target, own)
        if handle is None:
            return False
        before = own.change if own else {}
        missed = {n: v for n, v in target.change.items() if before.get(n) != v}
        filled = Filled(missed)
        with on(member):
            do(member, "C_SetAttributeValue", member.session, handle, filled.array, filled.count)
        self.party.log(
            Event("object.settled", self.party.group.label, member.name, _details(target, "changed"))
        )
        return True

    def _bring_new(self, member: Member, target: Entry, replicas: Sequence[Replica]) -> bool:
        """False if it cannot be made now."""
        if self.whereabouts.tagged(member, target.uid):
            return True
        if not has_id(target.name.object_class) and self.whereabouts.surplus(member, target):
            return True
        source = self.whereabouts.source(member, target, replicas)
        if source is None:
            if not self.party.away():  # all are there and nobody has it: it never came to be
                for replica in replicas:
                    self.party.ledger.erase(replica)
                for other in target.together:
                    self._undo(other.uid)
            return False
        is_key = target.name.object_class in (ck.CKO_SECRET_KEY, ck.CKO_PRIVATE_KEY)
        if is_key and (target.wrapped is None or not self.copying.keeps(member, target.wrapped)):
            return False  # it could not be wrapped: `p11ha check` says so
        self.foretell(member, target, replicas, *source)
        self.copying.copy_over(member, target, *source)
        self.party.log(Event("object.settled", self.party.group.label, member.name, _details(target, "made")))
        return True

    def foretell(
        self, member: Member, target: Entry, replicas: Sequence[Replica], reference: Member, handle: int
    ) -> Replica | None:
        """Says in the member's own ledger that a copy may be there, where no mark on the copy will; what it says.

        Else nothing would tell of it if the member died before the ledger knows, and it would outlive its destruction
        elsewhere.  The entry is nobody's, as the lease says who is at work: the one to come outweighs it.
        """
        if any(r.member == member.name and r.entry.version == target.version for r in replicas):
            return None
        with on(reference):
            shown = attributes.read(reference, reference.session, handle, (ck.CKA_MODIFIABLE,))
        if may_be_tagged(target.name.object_class, shown):
            return None
        nobodys = replace(target, owner=None)
        return self.party.ledger.write(member, nobodys, Stage.ANNOUNCED, self.party.there())

    def _undo(self, uid: str) -> None:
        """One half of a pair whose other half never came to be."""
        replicas = self.party.replicas(uid)
        newest = max((r.entry for r in replicas), key=lambda entry: entry.weight, default=None)
        if newest is not None and newest.alive:
            grave = tombstone(newest, me())
            for member in self.party.there():
                self.party.ledger.write(member, grave, Stage.ANNOUNCED, self.party.there())
            self._settle([uid], None)

    def drop_tag(self, member: Member, entry: Entry) -> None:
        for place, handle in enumerate(self.whereabouts.tagged(member, entry.uid)):
            if place == 0 and entry.alive:
                self.untag(member, handle, entry)
            else:
                with on(member):
                    destroy(member, handle)

    def untag(self, member: Member, handle: int, entry: Entry) -> None:
        filled = Filled(named(entry.name))
        with on(member):
            do(member, "C_SetAttributeValue", member.session, handle, filled.array, filled.count)

    def mark(self, member: Member, entry: Entry, stage: Stage) -> None:
        """Says it of the newest version of an entry that lies there for a member, and drops the older ones."""
        there = self.party.there()
        own = [r for r in self.party.ledger.of(entry.uid, there) if r.member == member.name]
        now = [r for r in own if r.entry.weight == entry.weight]
        if not now and self.party.ledger.can_keep(there):
            self.party.ledger.write(member, entry, stage, there)
        for replica in now:
            if replica.stage is not stage:
                self.party.ledger.mark(member, replica, stage, there)
        for replica in own:
            if replica.entry.weight < entry.weight:
                self.party.ledger.erase(replica)


def _details(entry: Entry, what: str) -> dict[str, str | int]:
    return {
        "done": what,
        "class": ck.CLASS_NAMES.get(entry.name.object_class or 0, "?"),
        "label": entry.name.label.decode("utf-8", "replace"),
    }
