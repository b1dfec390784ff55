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
from pkcs11_ha.core.identity import Name
from pkcs11_ha.core.ledger import Entry, Stage, assess, tombstone
from pkcs11_ha.core.template import (
    Template,
)
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import attributes
from pkcs11_ha.runtime.attributes import Filled
from pkcs11_ha.runtime.ledger import me
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.objects import VirtualObject
from pkcs11_ha.runtime.party import Party
from pkcs11_ha.runtime.service import MemberFault, Refused, destroy, do, on
from pkcs11_ha.runtime.settling import Settling
from pkcs11_ha.runtime.whereabouts import Whereabouts

_PATIENCE_S = 3.0  # with another process at work on the same object


class Changing:
    """Changes objects everywhere, or nowhere as far as members can go back."""

    def __init__(self, party: Party, whereabouts: Whereabouts, settling: Settling) -> None:
        self.party = party
        self.whereabouts = whereabouts
        self.settling = settling

    def change(self, known: VirtualObject, array: Any, count: int) -> None:
        """C_SetAttributeValue on every member.  Raises CkError; then nothing was changed, as far as can be."""
        said = attributes.said(array, count)
        with self.party.lock:
            holders = self._holders(known)
            entry, owner = self.entry_of(known), me()
            renamed = _renamed(known.identity.name, said)
            if entry is None:
                entry = self._foreign(known)
            new = replace(
                entry,
                version=entry.version + 1,
                name=renamed,
                change={**entry.change, **said},
                owner=owner,
                owed=self.party.away() if entry.foreign else entry.owed,
                together=(),
            )
            before = self._values(holders[0], known, said)
            done: list[Member] = []

            def act(member: Member, handle: int) -> None:
                with on(member):
                    do(member, "C_SetAttributeValue", member.session, handle, array, count)
                done.append(member)

            def revert() -> None:
                filled = Filled(before)
                for member in done:
                    handle = self.party.objects.handle_at(known, self.party.members.index(member))
                    with on(member):
                        templates = (filled.array, filled.count)
                        rv = member.call("C_SetAttributeValue", member.session, handle, *templates)
                    if rv != ck.CKR_OK:
                        self._partial(member, "C_SetAttributeValue", rv)

            changed = self._on_all(known, new, holders, act, revert)
            first = changed[0]
            self.party.objects.renew(known, self.party.members.index(first), first.session)
            known.uid = new.uid

    def destroy(self, known: VirtualObject) -> None:
        """C_DestroyObject on every member, those that are away included.  Raises CkError."""
        with self.party.lock:
            holders = self._holders(known)
            entry = self.entry_of(known) or self._foreign(known)
            grave = tombstone(entry, me(), self.party.away())

            def act(member: Member, handle: int) -> None:
                with on(member):
                    destroy(member, handle)

            self._on_all(known, grave, holders, act, lambda: None)
            self.party.objects.drop(known)

    def _holders(self, known: VirtualObject) -> list[Member]:
        """Members that are there and have the object; raises CkError if none has."""
        holders = []
        for member in self.party.there():
            try:
                if self.party.objects.handle_at(known, self.party.members.index(member)):
                    holders.append(member)
            except CkError as error:
                self.party.leave(MemberFault(member, error.rv, "C_FindObjects"))
        if not self.party.there():
            raise CkError(ck.CKR_DEVICE_ERROR)
        if not holders:
            raise CkError(ck.CKR_DEVICE_ERROR if self.party.away() else ck.CKR_OBJECT_HANDLE_INVALID)
        return holders

    def _on_all(
        self,
        known: VirtualObject,
        new: Entry,
        holders: Sequence[Member],
        act: Callable[[Member, int], None],
        revert: Callable[[], None],
    ) -> list[Member]:
        """Announces a new version of an entry and acts on each member that has the object; who did it."""
        self._claim(new)
        refused: CkError | None = None
        did: list[Member] = []
        for member in holders:
            if not self.party.takes_part(member):
                continue
            try:
                act(member, self.party.objects.handle_at(known, self.party.members.index(member)))
                did.append(member)
                self.settling.mark(member, new, Stage.PLACED)
            except MemberFault as fault:
                self.party.leave(fault)
            except (Refused, CkError) as error:
                revert()
                if not did or new.alive:
                    self._withdraw(new)
                    raise CkError(error.rv, str(error), member) from None
                refused = CkError(error.rv, str(error), member)  # the tombstone stays: it is tried again
        if not did:
            raise CkError(ck.CKR_DEVICE_ERROR)
        with suppress(MemberFault, CkError):  # those that seem not to have it, and those that were clumsy
            self.settling.settle_one(new.uid)
        if refused and self._is_owed(new.uid):
            raise refused
        return did

    def _is_owed(self, uid: str) -> bool:
        """Whether somebody who is there has yet to do it."""
        there, replicas = self.party.there(), self.party.replicas(uid)
        return bool(replicas and assess(replicas, [m.name for m in there], self.party.roster()).behind)

    def _claim(self, new: Entry) -> None:
        """Announces a version; of two processes that do so at once for one object, none or one goes on."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            for member in self.party.there():
                try:
                    if self.party.ledger.can_keep(self.party.there()):
                        self.party.ledger.write(member, new, Stage.ANNOUNCED, self.party.there())
                except MemberFault as fault:
                    self.party.leave(fault)
                except Refused as error:
                    self._withdraw(new)
                    raise CkError(error.rv, str(error), member) from None
            others = [
                r.entry.owner
                for r in self.party.replicas(new.uid)
                if r.stage is Stage.ANNOUNCED and r.entry.owner and r.entry.owner != new.owner
            ]
            if self.party.ledger.quiet(others):
                return
            self._withdraw(new)
            if time.monotonic() > deadline:
                raise self.party.rejected("another process is at work on the object", ck.CKR_FUNCTION_FAILED)
            time.sleep(0.05 * (1 + random.random()))  # noqa: S311 (no secret)

    def _withdraw(self, entry: Entry) -> None:
        for replica in self.party.replicas(entry.uid):
            if replica.entry.weight == entry.weight and replica.entry.owner == entry.owner:
                with suppress(MemberFault, Refused):
                    self.party.ledger.erase(replica)

    def _values(self, member: Member, known: VirtualObject, said: Template) -> dict[int, bytes]:
        handle = self.party.objects.handle_at(known, self.party.members.index(member))
        with on(member):
            try:
                return attributes.read(member, member.session, handle, tuple(said))
            except CkError:
                return {}

    def _partial(self, member: Member, call: str, rv: int) -> None:
        details: dict[str, str | int] = {"call": call, "code": ck.rv_name(rv)}
        self.party.log(Event("write.partial", self.party.group.label, member.name, details))

    def _foreign(self, known: VirtualObject) -> Entry:
        """An entry for an object that was provisioned outside, so that members that are away learn of its end."""
        identity = known.identity
        fingerprint = None if identity.borrowed else identity.fingerprint
        index = next(iter(known.at))
        evidence = self.whereabouts.shows(self.party.members[index], known.at[index].handle, identity)
        uid = secrets.token_hex(16)
        return Entry(uid, 0, True, identity.name, fingerprint, evidence, foreign=True)

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
            and entry.name == known.identity.name
            and (shown is None or entry.fingerprint is None or entry.fingerprint == shown)
        ]
        if len(fitting) > 1 and shown is None:
            index = next(iter(known.at))
            evidence = self.whereabouts.shows(
                self.party.members[index], known.at[index].handle, known.identity
            )
            fitting = [e for e in fitting if evidence is not None and e.evidence == evidence]
            if len(fitting) != 1:
                raise self.party.rejected(
                    "several keys of that name cannot be told apart", ck.CKR_FUNCTION_FAILED
                )
        if not fitting:
            return None
        known.uid = fitting[0].uid
        return fitting[0]


def _renamed(name: Name, said: Mapping[int, bytes]) -> Name:
    """What an object is called after these attributes were set."""
    return name._replace(
        id=said.get(ck.CKA_ID, name.id),
        label=said.get(ck.CKA_LABEL, name.label),
        application=said.get(ck.CKA_APPLICATION, name.application),
        object_id=said.get(ck.CKA_OBJECT_ID, name.object_id),
    )
