"""Placing: what is made in the group is announced, put on one member after the other, and marked as there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core import wrapping
from pkcs11_ha.core.identity import Identity, Kind
from pkcs11_ha.core.ledger import Entry, Owner, Replica, Stage, Wrapped, tombstone
from pkcs11_ha.core.template import (
    FALSE,
    TRUE,
    Template,
    contradictions,
    is_stateful,
    may_be_tagged,
    named,
    renamed,
    tag,
    ulong,
    wished,
)
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import attributes, native
from pkcs11_ha.runtime.attributes import Changed
from pkcs11_ha.runtime.changing import Changing
from pkcs11_ha.runtime.copying import Copying
from pkcs11_ha.runtime.ledger import me
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.objects import VirtualObject
from pkcs11_ha.runtime.party import Party
from pkcs11_ha.runtime.service import MemberFault, Refused, do, look, on
from pkcs11_ha.runtime.settling import Settling
from pkcs11_ha.runtime.whereabouts import Whereabouts

_STALE_S = 8.0  # a writer that was held up so long may have been taken for dead: it stops

_KEYS = (Kind.PRIVATE_KEY, Kind.SECRET_KEY)
# What is read of a template that is created from, and has to come out as it was said.
_STAYING = (ck.CKA_MODIFIABLE, ck.CKA_COPYABLE, ck.CKA_DESTROYABLE)  # in the way of what goes again
_NAMING = frozenset({ck.CKA_ID, ck.CKA_LABEL, ck.CKA_APPLICATION, ck.CKA_OBJECT_ID})
_GUARDS = frozenset({ck.CKA_MODIFIABLE, ck.CKA_SENSITIVE, ck.CKA_EXTRACTABLE})


Put = Callable[[Member, Mapping[int, bytes | None]], int]
"""Makes an object on a member with some attributes otherwise, or left out; its handle."""


@dataclass(frozen=True)
class Seed:
    """What a call of the application made on one member as session objects, to be copied and destroyed."""

    member: Member
    epoch: int
    handles: tuple[int, ...]

    @property
    def is_there(self) -> bool:
        """Else its handles are of a life before this, and mean something else by now."""
        return self.member.epoch == self.epoch


class SeedLost(Exception):
    """A seed died with its member before anything came of it; or `refused`: its member cannot do what is to come."""

    def __init__(self, refused: Refused | None = None) -> None:
        super().__init__()
        self.refused = refused


@dataclass
class Part:
    """One object on its way to all members.  `put(member, changes)` makes it there and gives the handle."""

    entry: Entry
    final: Template  # what guards it, as it has to come out
    put: Put
    origin: str = ""  # the member that generated it
    at: dict[str, int] = field(default_factory=dict)  # member -> handle, where it was made
    placed: set[str] = field(default_factory=set)  # members that are through with it
    replicas: dict[str, Replica] = field(default_factory=dict)  # member -> what its ledger says

    @property
    def may_be_tagged(self) -> bool:
        return may_be_tagged(self.entry.name.object_class, self.final)


class Placing:
    """Makes objects everywhere, or nowhere."""

    def __init__(
        self, party: Party, whereabouts: Whereabouts, copying: Copying, settling: Settling, changing: Changing
    ) -> None:
        self.party = party
        self.whereabouts = whereabouts
        self.copying = copying
        self.settling = settling
        self.changing = changing

    def spread(self, seed: Seed, wishes: Sequence[Template]) -> list[VirtualObject]:
        """Puts what a seed is on every member, as wished (of each: what the application said).

        Raises CkError; SeedLost if another seed is needed.
        """
        with self.party.lock:
            if not seed.is_there:
                raise SeedLost
            try:
                try:
                    parts = self._parts_of(seed, wishes)
                except MemberFault as fault:  # nothing was written yet
                    self.party.leave(fault)
                    raise SeedLost from None
                return self._pin(seed, wishes) if parts is None else self._place(parts)
            except MemberFault as fault:
                self.party.leave(fault)
                raise CkError(ck.CKR_DEVICE_ERROR, str(fault)) from None
            except Refused as error:
                if error.is_suspect:  # of what comes before anything is announced, or is kept there alone
                    raise SeedLost(error) from None
                raise CkError(error.rv, str(error), error.member) from None
            finally:
                self.discard(seed)

    def discard(self, seed: Seed) -> None:
        """The seed has served; what a dead member keeps of it dies with its sessions."""
        for handle in seed.handles:
            if handle:
                seed.member.call_in(seed.epoch, "C_DestroyObject", seed.member.session, handle)

    def _parts_of(self, seed: Seed, wishes: Sequence[Template]) -> list[Part] | None:
        """None if a key among it cannot be wrapped: it is to stay where it is."""
        member = seed.member
        with on(member):
            shown = [attributes.template_of(member, member.session, handle) for handle in seed.handles]
            identities = [attributes.who(member, member.session, handle) for handle in seed.handles]
        points = [value for each in shown if (value := each.get(ck.CKA_EC_POINT))]
        parts = []
        for handle, each, identity, wish in zip(seed.handles, shown, identities, wishes, strict=True):
            wrapped = None
            is_key = identity.kind in _KEYS
            final = wished(wish, is_key=is_key)
            if is_key:
                try:
                    wrapped = self.copying.wrap(member, handle)
                except Refused as error:
                    if error.rv not in wrapping.NOT_WRAPPABLE:
                        raise
                    return None
                if not all(self.copying.keeps(other, wrapped) for other in self.party.there()):
                    return None
            entry = self._new_entry(identity, wrapped, self.whereabouts.shows(member, handle, identity))
            unshown = _unshown(wish, each)
            entry = replace(entry, change=unshown)
            template = {**each, **final, **unshown}
            point = points[0] if points and isinstance(points[0], bytes) else None
            put = self._putter(entry, template, final, point, seed, handle)
            parts.append(Part(entry, final, put, member.name))
        return _bundled(parts)

    def _new_entry(self, identity: Identity, wrapped: Wrapped | None, evidence: bytes | None) -> Entry:
        shown = None if identity.borrowed else identity.fingerprint
        return Entry(
            *(secrets.token_hex(16), 1, True, identity.name),
            fingerprint=shown,
            evidence=evidence,
            wrapped=wrapped,
            owner=me(),
        )

    def _putter(
        self,
        entry: Entry,
        template: Template,
        final: Mapping[int, bytes],
        point: bytes | None,
        seed: Seed,
        handle: int,
    ) -> Put:
        """On the seed's own member a copy of it, which keeps CKA_LOCAL; elsewhere from its blob or attributes."""

        def put(member: Member, changes: Mapping[int, bytes | None]) -> int:
            said = {n: v for n, v in changes.items() if v is not None}
            if member is seed.member:
                with suppress(Refused), on(member):
                    return self.copying.copy_within(member, handle, {**final, ck.CKA_TOKEN: TRUE, **said})
            return self.copying.make_on(member, entry, {**template, **said}, point)

        return put

    def _pin(self, seed: Seed, wishes: Sequence[Template]) -> list[VirtualObject]:
        """What cannot be wrapped stays on the member that made it, and is reported."""
        if self.party.group.min_copies > 1:
            raise self.party.rejected(
                "the key cannot be wrapped, min_copies wants it", ck.CKR_KEY_NOT_WRAPPABLE
            )
        member, made = seed.member, []
        index, epoch = self.party.members.index(member), member.epoch
        try:
            for handle, wish in zip(seed.handles, wishes, strict=True):
                with on(member):
                    shown = attributes.read(member, member.session, handle, (ck.CKA_CLASS,))
                    is_key = shown.get(ck.CKA_CLASS) in (ulong(ck.CKO_SECRET_KEY), ulong(ck.CKO_PRIVATE_KEY))
                    final = wished(wish, is_key=is_key)
                    made.append(self.copying.copy_within(member, handle, {**final, ck.CKA_TOKEN: TRUE}))
                    look(member, made[-1], (ck.CKA_CLASS,), "C_CopyObject")
        except (MemberFault, Refused):
            for handle in made:
                member.call("C_DestroyObject", member.session, handle)
            raise
        known = [self.party.objects.adopt(index, epoch, member.session, handle, 0) for handle in made]
        for each in known:
            self.party.objects.pinned(each)
        return known

    def create(self, array: Any, count: int, seed: Seed | None) -> list[VirtualObject]:
        """C_CreateObject on every member with the application's template; `seed`: the same as a session object, if
        it is a key, for its blob.  Raises CkError, SeedLost."""
        with self.party.lock:
            try:
                said = attributes.said(array, count, _GUARDS)
                wrapped = None
                if seed is not None:
                    if not seed.is_there:
                        raise SeedLost
                    try:
                        wrapped = self.copying.wrap(seed.member, seed.handles[0])
                    except MemberFault as fault:
                        self.party.leave(fault)
                        raise SeedLost from None
                    except Refused as error:
                        if error.rv not in wrapping.NOT_WRAPPABLE:
                            raise

                def put(member: Member, changes: Mapping[int, bytes | None]) -> int:
                    changed = Changed(array, count, dict(changes))
                    made = native.ffi.new("CK_OBJECT_HANDLE *")
                    with on(member):
                        templates = (changed.array, changed.count)
                        do(member, "C_CreateObject", member.session, *templates, made)
                    return int(made[0])

                return self._place([self._part_by_trial(put, said, wrapped)])
            except MemberFault as fault:
                self.party.leave(fault)
                raise CkError(ck.CKR_DEVICE_ERROR, str(fault)) from None
            except Refused as error:
                raise CkError(error.rv, str(error), error.member) from None
            finally:
                if seed is not None:
                    self.discard(seed)

    def _part_by_trial(
        self,
        put: Put,
        said: Mapping[int, bytes],
        wrapped: Wrapped | None,
    ) -> Part:
        """Who the object is, by making it once as a session object on one member; raises CkError."""
        entry = self.party.on_one(lambda member: self._tried_on(member, put, wrapped))
        return Part(entry, said, put)

    def _tried_on(self, member: Member, put: Put, wrapped: Wrapped | None) -> Entry:
        handle = put(member, {ck.CKA_TOKEN: FALSE, **dict.fromkeys(_STAYING)})
        look(member, handle, (ck.CKA_CLASS,), "C_CreateObject")
        with on(member):
            try:
                identity = replace(attributes.who(member, member.session, handle), token=True)
                return self._new_entry(identity, wrapped, self.whereabouts.shows(member, handle, identity))
            finally:
                member.call("C_DestroyObject", member.session, handle)

    def copy(self, source: VirtualObject, array: Any, count: int) -> list[VirtualObject]:
        """C_CopyObject to a token object, on every member.  Raises CkError.

        Where the source is, it is copied; where it is not, as it is a session object, the copy is unwrapped.
        """
        said = attributes.said(array, count, _GUARDS)
        first: list[tuple[Member, int]] = []

        def put(member: Member, changes: Mapping[int, bytes | None]) -> int:
            handle = self.party.handle_at(source, member)
            if handle:
                made = self._copied(member, handle, Changed(array, count, changes))
                first.append((member, made))
                return made
            if entry is None or entry.wrapped is None or not first:
                raise Refused(member, ck.CKR_OBJECT_HANDLE_INVALID, "C_CopyObject")
            reference, like = first[0]
            with on(reference):
                shown = attributes.template_of(reference, reference.session, like)
            said = {n: v for n, v in changes.items() if v is not None}
            return self.copying.make_on(member, entry, {**shown, **named(entry.name), **said}, None)

        entry: Entry | None = None
        with self.party.lock:
            while True:
                try:
                    where = self._where(source)
                    if source.identity.token:
                        # Another process may have renamed it: its entry is found by its name.
                        with on(where[0]):
                            index = self.party.members.index(where[0])
                            self.party.objects.renew(source, index, where[0].session)
                    known = self.changing.entry_of(source) if source.identity.token else None
                    wrapped = known.wrapped if known else self._wrapped_source(source, where[0])
                    if wrapped is None and len(where) < len(self.party.there()):
                        break
                    said_of_name = attributes.said(array, count, _NAMING)
                    entry = self._copied_entry(source, said_of_name, wrapped, where[0])
                    return self._place([Part(entry, said, put)], first=where[0])
                except MemberFault as fault:  # nothing was written yet: once more without it
                    self.party.leave(fault)
                except Refused as error:
                    raise CkError(error.rv, str(error), error.member) from None
            try:
                return self._pinned_copy(source, where[0], Changed(array, count, {}))
            except MemberFault as fault:
                self.party.leave(fault)
                raise CkError(ck.CKR_DEVICE_ERROR, str(fault)) from None
            except Refused as error:
                raise CkError(error.rv, str(error), error.member) from None

    def _copied_entry(
        self, source: VirtualObject, said: Mapping[int, bytes], wrapped: Wrapped | None, member: Member
    ) -> Entry:
        """Of a copy: the same, under the name that it is given."""
        handle = self.party.handle_at(source, member)
        identity = replace(source.identity, token=True, name=renamed(source.identity.name, said))
        return self._new_entry(identity, wrapped, self.whereabouts.shows(member, handle, identity))

    def _where(self, source: VirtualObject) -> list[Member]:
        """Members that have it; raises CkError if none has."""
        where = self.party.steadily(lambda there: [m for m in there if self.party.handle_at(source, m)])
        if not where:
            raise CkError(ck.CKR_DEVICE_ERROR if self.party.away() else ck.CKR_OBJECT_HANDLE_INVALID)
        return where

    def _wrapped_source(self, source: VirtualObject, member: Member) -> Wrapped | None:
        """The blob of a session key; None of what is no key, or cannot be wrapped."""
        key_type = source.identity.name.type
        if source.identity.kind not in _KEYS or is_stateful(None, {ck.CKA_KEY_TYPE: ulong(key_type or 0)}):
            return None
        if source.recipe is not None and source.recipe.wrapped is not None:
            return source.recipe.wrapped
        handle = self.party.handle_at(source, member)
        try:
            return self.copying.wrap(member, handle)
        except Refused as error:
            if error.rv not in wrapping.NOT_WRAPPABLE:
                raise
            return None

    def _copied(self, member: Member, handle: int, changed: Changed) -> int:
        made = native.ffi.new("CK_OBJECT_HANDLE *")
        with on(member):
            do(member, "C_CopyObject", member.session, handle, changed.array, changed.count, made)
        return int(made[0])

    def _pinned_copy(self, source: VirtualObject, member: Member, changed: Changed) -> list[VirtualObject]:
        """A copy that only the member can make that has the source."""
        if self.party.group.min_copies > 1:
            raise self.party.rejected(
                "the key cannot be wrapped, min_copies wants it", ck.CKR_KEY_NOT_WRAPPABLE
            )
        index = self.party.members.index(member)
        made = self._copied(member, self.party.handle_at(source, member), changed)
        known = self.party.objects.adopt(index, member.epoch, member.session, made, 0)
        self.party.objects.pinned(known)
        return [known]

    def _place(self, parts: Sequence[Part], first: Member | None = None) -> list[VirtualObject]:
        """Announces, puts in place on one member after the other, and tells the object map.  Raises CkError."""
        began = time.monotonic()
        members = self.party.there()

        def put(member: Member) -> None:
            if time.monotonic() - began > _STALE_S:
                raise CkError(ck.CKR_FUNCTION_FAILED, "a write that was held up too long", member)
            self._put(member, parts)

        try:
            self.party.on_each(members, partial(self._announce, parts))
            self.party.on_each(sorted(self.party.there(), key=lambda member: member is not first), put)
        except (Refused, CkError) as error:
            self._undo(parts, members)
            raise CkError(error.rv, str(error), error.member) from None
        there = [m for m in self.party.there() if all(m.name in part.placed for part in parts)]
        if len(there) < max(1, self.party.group.min_copies):
            self._undo(parts, members)
            raise self.party.rejected("too few members took it")
        known = [self._adopt(part, there) for part in parts]
        for part, each in zip(parts, known, strict=True):
            self._finish(part)
            if part.entry.wrapped is None and each.identity.kind in _KEYS and self.party.away():
                self.party.objects.pinned(
                    each
                )  # who is away cannot be given it: it is said, as for any such key
        return known

    def _announce(self, parts: Sequence[Part], member: Member) -> None:
        there = self.party.there()
        for part in parts:
            if member.name not in part.replicas and self.party.ledger.can_keep(there):
                written = self.party.ledger.write(member, part.entry, Stage.ANNOUNCED, there)
                part.replicas[member.name] = written

    def _put(self, member: Member, parts: Sequence[Part]) -> None:
        """Each object comes in with a mark of its own, which it loses when the ledger knows that it is there."""
        for part in parts:
            if member.name in part.placed:
                continue
            mark = tag(part.entry.uid) if part.may_be_tagged else {}
            if member.name not in part.at:
                part.at[member.name] = part.put(member, mark)
            handle = part.at[member.name]
            if not self._is_guarded(member, handle, part.final):
                raise Refused(member, ck.CKR_TEMPLATE_INCONSISTENT, "a copy that guards its key less")
            self._mark(member, part, Stage.PLACED)
            if mark:
                self.settling.untag(member, handle, part.entry)
            part.placed.add(member.name)

    @staticmethod
    def _is_guarded(member: Member, handle: int, final: Template) -> bool:
        """Whether it came out as it was said; SoftHSM may show half of an object that another process is just reading
        in, so it is looked at again."""
        for pause_s in (0.0, 0.01, 0.05):
            time.sleep(pause_s)
            if not contradictions(final, look(member, handle, tuple(final) or (ck.CKA_CLASS,), "a call")):
                return True
        return False

    def _mark(self, member: Member, part: Part, stage: Stage) -> None:
        replica = part.replicas.get(member.name)
        if replica is not None and replica.stage is not stage:
            part.replicas[member.name] = self.party.ledger.mark(member, replica, stage, self.party.there())

    def _finish(self, part: Part) -> None:
        """Nobody is owed: then the entry is kept, or forgotten.  Else it stays open."""
        with self._unless_lost():
            if self.party.roster() <= part.placed and self.party.group.escrow == "token":
                for member in self.party.there():
                    self._mark(member, part, Stage.KEPT)
            else:
                self.settling.finish([part.entry.uid])

    def _adopt(self, part: Part, there: Sequence[Member]) -> VirtualObject:
        """What the application is to know it by; a member that fails meanwhile was no worse than the others."""
        known: VirtualObject | None = None
        for member in sorted(there, key=lambda member: member.name != part.origin):  # it knows most of it
            index, handle = self.party.members.index(member), part.at[member.name]
            try:
                if known is None:
                    known = self.party.objects.adopt(index, member.epoch, member.session, handle, 0)
                else:
                    self.party.objects.also_at(known, index, member.epoch, handle)
            except CkError as error:
                self.party.leave(MemberFault(member, error.rv, "C_GetAttributeValue"))
        if known is None:
            raise CkError(ck.CKR_DEVICE_ERROR, "no member is left")
        known.uid = part.entry.uid
        return known

    def _undo(self, parts: Sequence[Part], members: Sequence[Member]) -> None:
        """The application is told that there is no object: there must be none, nor come back with a lost member."""
        owner = me()
        lost = not all(map(self.party.takes_part, members))
        for part in parts:
            grave = tombstone(part.entry, owner)
            told = False
            for member in self.party.there():
                with self._unless_lost():
                    if lost and self.party.ledger.can_keep(self.party.there()):
                        self.party.ledger.write(member, grave, Stage.ANNOUNCED, self.party.there())
                        told = True
            if lost and not told:
                self.settling.regret(part.entry)
            for member in self.party.there():
                with self._unless_lost():
                    if part.at.get(member.name):
                        member.call("C_DestroyObject", member.session, part.at[member.name])
                    for replica in self.party.ledger.of(part.entry.uid, [member]):
                        if replica.entry.alive:
                            self.party.ledger.erase(replica)
                        elif replica.stage is Stage.ANNOUNCED:
                            self.party.ledger.mark(member, replica, Stage.PLACED, self.party.there())

    @contextmanager
    def _unless_lost(self) -> Iterator[None]:
        try:
            yield
        except MemberFault as fault:
            self.party.leave(fault)
        except Refused as error:
            self.party.log(
                Event("replication.owed", self.party.group.label, error.member.name, {"why": str(error)})
            )


def _unshown(wish: Template, shown: Template) -> dict[int, bytes]:
    """What the application asked for and its member does not show, so that the ledger keeps it for the copies.

    Attributes of vendors, of which we know nothing; and dates, which SoftHSM takes and cannot read again.
    """
    known = (ck.CKA_START_DATE, ck.CKA_END_DATE)
    return {
        n: v
        for n, v in wish.items()
        if isinstance(v, bytes) and n not in shown and (n >= ck.CKA_VENDOR_DEFINED or n in known)
    }


def _bundled(parts: list[Part]) -> list[Part]:
    """Each entry of one call's objects announces the others, so that none comes without them."""
    owner: Owner = me()
    entries = [replace(part.entry, owner=owner) for part in parts]
    for part, entry in zip(parts, entries, strict=True):
        others = tuple(other for other in entries if other.uid != entry.uid)
        part.entry = replace(entry, together=others)
    return parts
