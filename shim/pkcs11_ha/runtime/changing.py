"""Changing and destroying an object on every member that has it, those that are away included."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core.ledger import Entry, Replica, Stage, tombstone
from pkcs11_ha.core.template import renamed
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import attributes
from pkcs11_ha.runtime.attributes import Filled
from pkcs11_ha.runtime.ledger import me
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.objects import VirtualObject
from pkcs11_ha.runtime.party import Party
from pkcs11_ha.runtime.service import MemberFault, Refused, destroy, do, is_itself, on
from pkcs11_ha.runtime.settling import Settling
from pkcs11_ha.runtime.whereabouts import Whereabouts

_PATIENCE_S = 3.0  # with another process at work on the same object


class Claim:
    """A version of an entry, announced on all members that are there, and how far it has come on each."""

    def __init__(self, party: Party, new: Entry) -> None:
        self.party = party
        self.new = new
        self.written: dict[str, Replica] = {}  # member -> what its ledger says of the new version
        self.older: list[Replica] = []
        self.placed: set[str] = set()

    def stake(self) -> bool:
        """Announces it.  False: another process was quicker, or is at work; then nothing is left of the claim.

        Who announces looks afterwards: of two processes that do so at once for one object, none or one goes on.
        """
        try:
            self.party.on_each(self.party.there(), self._announce)
        except Refused as error:
            self.withdraw()
            raise CkError(error.rv, str(error), error.member) from None
        for replica in self.party.replicas(self.new.uid):
            entry = replica.entry
            if entry.owner == self.new.owner and entry.version == self.new.version:
                continue
            at_work = (
                replica.stage is Stage.ANNOUNCED and entry.owner and self.party.ledger.lives(entry.owner)
            )
            if at_work or entry.version >= self.new.version:
                self.withdraw()
                return False
            self.older.append(replica)
        return True

    def _announce(self, member: Member) -> None:
        there = self.party.there()
        if self.party.ledger.can_keep(there):
            self.written[member.name] = self.party.ledger.write(member, self.new, Stage.ANNOUNCED, there)

    def place(self, member: Member) -> None:
        """It is done there; raises MemberFault, Refused."""
        there = self.party.there()
        if member.name in self.written:
            replica = self.written[member.name]
            self.written[member.name] = self.party.ledger.mark(member, replica, Stage.PLACED, there)
        for replica in self.older:
            if replica.member == member.name:
                self.party.ledger.erase(replica)
        self.placed.add(member.name)

    def close(self) -> bool:
        """If it is done everywhere it is kept, or forgotten; raises MemberFault, Refused."""
        if not self.party.roster() <= self.placed:
            return False
        there = self.party.there()
        if self.new.alive and not self.new.foreign:
            for member in there:
                if member.name in self.written:
                    replica = self.written[member.name]
                    self.written[member.name] = self.party.ledger.mark(member, replica, Stage.KEPT, there)
            if self.party.group.escrow == "token":
                return True
        for replica in sorted(self.written.values(), key=lambda r: r.member in self.new.owed):
            self.party.ledger.erase(replica)
        return True

    def withdraw(self) -> None:
        """Nothing was done: nothing is left of it."""
        for replica in self.written.values():
            with suppress(MemberFault, Refused):
                self.party.ledger.erase(replica)
        self.written.clear()


class Changing:
    """Changes objects everywhere, or nowhere as far as members can go back."""

    def __init__(self, party: Party, whereabouts: Whereabouts, settling: Settling) -> None:
        self.party = party
        self.whereabouts = whereabouts
        self.settling = settling

    def change(self, known: VirtualObject, array: Any, count: int) -> None:
        """C_SetAttributeValue on every member.  Raises CkError; then nothing was changed, as far as can be."""
        said = attributes.said(array, count)
        owner = me()
        before: dict[int, bytes] = {}
        done: list[Member] = []

        def plan(entry: Entry) -> Entry:
            return replace(
                entry,
                version=entry.version + 1,
                name=renamed(entry.name, said),
                former=entry.former
                if renamed(entry.name, said) == entry.name
                else (*entry.former, entry.name),
                change={**entry.change, **said},
                owner=owner,
                owed=self.party.away() if entry.foreign else entry.owed,
                together=(),
            )

        def act(member: Member, handle: int) -> None:
            with on(member):
                if not done:
                    before.update(attributes.read(member, member.session, handle, tuple(said)))
                do(member, "C_SetAttributeValue", member.session, handle, array, count)
            done.append(member)

        def revert() -> None:
            filled = Filled(before)
            for member in done:
                templates = (filled.array, filled.count)
                try:
                    handle = self.party.handle_at(known, member)
                    with on(member):
                        do(member, "C_SetAttributeValue", member.session, handle, *templates)
                except (MemberFault, Refused) as error:
                    self._partial(member, "C_SetAttributeValue", error.rv)

        with self.party.lock:
            self._renew(known, self._on_all(known, plan, act, revert), said)

    def _renew(self, known: VirtualObject, did: Sequence[Member], said: Mapping[int, bytes]) -> None:
        """The object map learns what it is now, from who is left: it was changed, whoever has died since."""
        for member in did:
            try:
                with on(member):
                    self.party.objects.renew(known, self.party.members.index(member), member.session)
                return
            except MemberFault as fault:
                self.party.leave(fault)
            except Refused:
                break  # another process has destroyed it
        self.party.objects.rename(known, renamed(known.identity.name, said))

    def destroy(self, known: VirtualObject) -> None:
        """C_DestroyObject on every member, those that are away included.  Raises CkError."""
        owner = me()

        def act(member: Member, handle: int) -> None:
            with on(member):
                destroy(member, handle)

        with self.party.lock:
            self._on_all(
                known,
                lambda entry: tombstone(entry, owner, self.party.away() if entry.foreign else ()),
                act,
                lambda: None,
            )
            self.party.objects.drop(known)

    def _on_all(
        self,
        known: VirtualObject,
        plan: Callable[[Entry], Entry],
        act: Callable[[Member, int], None],
        revert: Callable[[], None],
    ) -> list[Member]:
        """Announces what `plan` makes of the object's entry and acts on each member that has it; who did it."""
        holders, new, claim = self._claimed(known, plan)
        refused: CkError | None = None
        unable: list[Refused] = []
        did: list[Member] = []
        for member in holders:
            if not self.party.takes_part(member):
                continue
            try:
                act(member, self.party.handle_at(known, member))
                did.append(member)
                claim.place(member)
            except MemberFault as fault:
                self.party.leave(fault)
            except Refused as error:
                if error.member is member and error.is_suspect:
                    unable.append(error)
                    continue
                revert()
                if not did or new.alive:
                    claim.withdraw()
                    raise CkError(error.rv, str(error), member) from None
                refused = CkError(error.rv, str(error), member)  # the tombstone stays: it is tried again
        if not did:
            if unable:
                claim.withdraw()
                raise CkError(unable[0].rv, str(unable[0]), unable[0].member)
            raise CkError(ck.CKR_DEVICE_ERROR)
        self.party.leave_unable(error for error in unable if error.member not in did)
        known.uid = new.uid
        if not self._is_settled(claim) and refused:
            raise refused
        return did

    def _is_settled(self, claim: Claim) -> bool:
        """Whether all who are there have done it, after those that seem not to have it, or were clumsy, were asked."""
        with suppress(MemberFault, Refused, CkError):
            if claim.close():
                return True
            self.settling.settle_one(claim.new.uid)
            situation = self.settling.situation(claim.new.uid)
            return situation is None or not situation.behind
        return False

    # ---- who may write ----

    def _claimed(
        self, known: VirtualObject, plan: Callable[[Entry], Entry]
    ) -> tuple[list[Member], Entry, Claim]:
        """The members that have the object, what its entry becomes, and the right to make it so; raises CkError."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            holders = self._holders(known)
            entry = self.entry_of(known) or self._foreign(known)
            new = plan(entry)
            claim = Claim(self.party, new)
            if claim.stake():
                return holders, new, claim
            if time.monotonic() > deadline:
                raise self.party.rejected("another process is at work on the object", ck.CKR_FUNCTION_FAILED)
            time.sleep(0.05 * (1 + random.random()))  # noqa: S311 (no secret)
            with suppress(MemberFault, Refused, CkError):
                self.settling.settle_one(new.uid)

    def _holders(self, known: VirtualObject) -> list[Member]:
        """Members that are there and have the object, whose identity is read anew; raises CkError if none has."""
        holders: list[Member] = []
        for member in self.party.there():
            index = self.party.members.index(member)
            try:
                if self.party.objects.handle_at(known, index):
                    if not holders:
                        self.party.objects.renew(known, index, member.session)
                    holders.append(member)
                elif not is_itself(member):
                    self.party.leave(MemberFault(member, ck.CKR_DEVICE_ERROR, "C_FindObjects"))
            except CkError as error:
                # Else another process has destroyed it.
                if error.rv != ck.CKR_OBJECT_HANDLE_INVALID or not is_itself(member):
                    self.party.leave(MemberFault(member, error.rv, "C_FindObjects"))
                else:
                    self.party.objects.forget(known.handle, index)
        if not self.party.there():
            raise CkError(ck.CKR_DEVICE_ERROR)
        if not holders:
            raise CkError(ck.CKR_DEVICE_ERROR if self.party.away() else ck.CKR_OBJECT_HANDLE_INVALID)
        return holders

    def _partial(self, member: Member, call: str, rv: int) -> None:
        details: dict[str, str | int] = {"call": call, "code": ck.rv_name(rv)}
        self.party.log(Event("write.partial", self.party.group.label, member.name, details))

    def _foreign(self, known: VirtualObject) -> Entry:
        """An entry for an object that was provisioned outside, so that members that are away learn of its end."""
        identity = known.identity
        fingerprint = None if identity.borrowed else identity.fingerprint
        evidence = self._shows(known)
        uid = secrets.token_hex(16)
        return Entry(uid, 0, True, identity.name, fingerprint=fingerprint, evidence=evidence, foreign=True)

    def _shows(self, known: VirtualObject) -> bytes | None:
        """What a key shows on a member that is there."""

        def look(there: list[Member]) -> bytes | None:
            for member in there:
                handle = self.party.handle_at(known, member)
                if handle:
                    return self.whereabouts.shows(member, handle, known.identity)
            return None

        return self.party.steadily(look)

    def entry_of(self, known: VirtualObject) -> Entry | None:
        """The entry of an object; None if it was made outside.  Raises CkError if that cannot be told."""
        if known.uid:
            replicas = self.party.replicas(known.uid)
        else:
            replicas = self.party.steadily(lambda there: self.party.ledger.called(known.identity.name, there))
        newest: dict[str, Entry] = {}
        for replica in replicas:
            entry = replica.entry
            if entry.uid not in newest or newest[entry.uid].weight < entry.weight:
                newest[entry.uid] = entry
        shown = None if known.identity.borrowed else known.identity.fingerprint
        fitting = [
            entry
            for entry in newest.values()
            if entry.alive
            and (entry.uid == known.uid or entry.name == known.identity.name)
            and (shown is None or entry.fingerprint is None or entry.fingerprint == shown)
        ]
        if len(fitting) > 1 and shown is None:
            evidence = self._shows(known)
            fitting = [e for e in fitting if evidence is not None and e.evidence == evidence]
            if len(fitting) != 1:
                raise self.party.rejected(
                    "several keys of that name cannot be told apart", ck.CKR_FUNCTION_FAILED
                )
        if not fitting:
            return None
        known.uid = fitting[0].uid
        return fitting[0]
