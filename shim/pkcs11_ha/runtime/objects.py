"""Virtual objects of one slot: which member object each stands for, proven before it is used in another's place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pkcs11_ha import ck
from pkcs11_ha.core.codes import Code
from pkcs11_ha.core.domain import KEY_ID
from pkcs11_ha.core.identity import Identity, Kind, Match, Name, compare, complete, vouched
from pkcs11_ha.core.ledger import Stage, Wrapped
from pkcs11_ha.core.proof import USAGE_ATTRIBUTES, Operation, Proof, evidence, plan_proof, shared_usage
from pkcs11_ha.core.template import RESERVED, ulong
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import attributes, native
from pkcs11_ha.runtime.member import ConnectError, Member, MemberState
from pkcs11_ha.runtime.native import CkError

_BULK = 16  # objects that are new to us: from here on a search for our own pays
_PROVEN_AT_ONCE = 32  # claims of one search that are proven before it answers; for EC keys that is some time


@dataclass
class Binding:
    """The object on one member; `epoch` dates the handle."""

    epoch: int
    handle: int
    proven: bool  # False: a claim by name alone, to be proven before use


@dataclass
class VirtualObject:
    """One object as the application knows it."""

    handle: int
    identity: Identity
    session: int = 0  # of a session object: the virtual session that made it
    recipe: Recipe | None = None  # of a session object: how to make it once more
    uid: str = ""  # of its entry in the ledger, where that is known
    at: dict[int, Binding] = field(default_factory=dict)  # by member index
    absent: int = 0  # members that are known not to have it, as a mask
    used: bool = False  # it was: before that, whichever key of its name is at hand is the one that is meant
    homes: int = 0  # members on which it was used or proven, as a mask
    proof: Proof | None = None  # how it was proven last, and
    evidence: bytes | None = None  # what it showed
    made_here: bool = False  # by a call of this process: no namesake elsewhere is it unless that is proven
    proving: threading.RLock = field(default_factory=threading.RLock)  # held over calls, before any `service`
    refuted: set[tuple[int, int, int]] = field(
        default_factory=set
    )  # (member, epoch, handle) that is another key


class NotItself(CkError):
    """A member shows none of the objects that it had, as one whose store was away for a while: it may find them again
    only after its library is restarted (SoftHSM)."""


class Recipe(Protocol):
    """How a session object is made again on another member."""

    wrapped: Wrapped | None  # a key's blob, where there is one
    steps: int  # calls that it takes

    def run(self, slot: Any, session: Any, index: int) -> Any:
        """Makes it; the call that did, with the handle in `made`, None if nothing did."""

    def shared(self) -> Recipe | None:
        """The same for another object, which outlives this one; None if it was forgotten meanwhile."""

    def forget(self) -> None:
        """Wipes what it holds, if nobody shares it."""


class ObjectMap:
    """All virtual objects of one slot.  The only writer of the data plane's object table."""

    def __init__(
        self, slot: Any, label: str, members: Sequence[Member], log: Callable[[Event], None]
    ) -> None:
        self.native = slot
        self.label = label
        self.members = members  # by index; the slot adds to them, after `seat`
        self.log = log
        self.lock = threading.RLock()  # of the tables below; never held over a call to a member
        # whether one object of a name on several members is the same, where somebody knows
        self.is_one: Callable[[Name, Sequence[Member]], bool] | None = None
        self.returning: set[int] = set()  # members whose objects are being matched
        self.objects: dict[int, VirtualObject] = {}
        self.died: dict[int, int] = {}  # session objects that went with their member: handle -> session
        self.by_name: dict[Name, list[VirtualObject]] = {}
        self.by_member: list[dict[tuple[int, int], VirtualObject]] = [{} for _ in members]
        self.tombstones: list[list[VirtualObject]] = [
            [] for _ in members
        ]  # destroyed while the member was away
        self.showed = [0] * len(members)  # the epoch in which a member showed an object last
        # (epoch, handle) of what the group keeps there for itself
        self.hidden: list[set[tuple[int, int]]] = [set() for _ in members]

    # ---- the tables ----

    def has_graves(self, index: int) -> bool:
        """Whether objects were destroyed that the member still has."""
        with self.lock:
            return bool(self.tombstones[index])

    def seat(self) -> None:
        """Room for one more member."""
        with self.lock:
            self.by_member.append({})
            self.tombstones.append([])
            self.showed.append(0)
            self.hidden.append(set())

    def unseat(self, index: int) -> None:
        """A member has left: what comes in its place may be another token."""
        with self.lock:
            self.tombstones[index].clear()
            for known in self.objects.values():
                self._unbind(known, index)
                known.homes &= ~(1 << index)

    def get(self, handle: int) -> VirtualObject:
        """Raises CkError(CKR_OBJECT_HANDLE_INVALID)."""
        with self.lock:
            found = self.objects.get(handle)
        if found is None:
            raise CkError(ck.CKR_OBJECT_HANDLE_INVALID)
        return found

    def _new(self, identity: Identity, session: int = 0) -> VirtualObject:
        handle = int(native.lib.ha_object_new(self.native))
        if not handle:
            raise CkError(ck.CKR_HOST_MEMORY)
        new = VirtualObject(handle, identity, session)
        self.objects[handle] = new
        self.by_name.setdefault(identity.name, []).append(new)
        return new

    def _bind(self, known: VirtualObject, member: int, epoch: int, handle: int, proven: bool) -> None:
        if self.objects.get(known.handle) is not known:
            return  # dropped meanwhile, by a logout: what it would hold could stand for no other object
        known.at[member] = Binding(epoch, handle, proven)
        known.absent &= ~(1 << member)
        self.showed[member] = epoch
        self.by_member[member][(epoch, handle)] = known
        self._publish(known)

    def _prefer(self, known: VirtualObject, member: int, identity: Identity) -> None:
        """Where it was generated, it knows more of itself than its copies do (CKA_LOCAL and its kin)."""
        if identity.local:
            native.lib.ha_object_prefer(known.handle, member)

    def _publish(self, known: VirtualObject) -> None:
        """What the data plane may use: nothing before the first use or while a claim is open: those come to us."""
        settled = known.used and all(binding.proven for binding in known.at.values())
        for member, binding in known.at.items():
            if settled:
                native.lib.ha_object_bind(known.handle, member, binding.epoch, binding.handle)
            else:
                native.lib.ha_object_unbind(known.handle, member)
        native.lib.ha_object_absent(known.handle, known.absent)

    def _unbind(self, known: VirtualObject, member: int) -> None:
        binding = known.at.pop(member, None)
        if binding:
            self.by_member[member].pop((binding.epoch, binding.handle), None)
            native.lib.ha_object_unbind(known.handle, member)

    def _is_current(self, member: int, binding: Binding | None) -> bool:
        """Whether the handle is of the member's present life; one that returns has it before it serves."""
        there = self.members[member].state is MemberState.UP or member in self.returning
        return there and binding is not None and binding.epoch == self.members[member].epoch

    def drop(self, known: VirtualObject) -> None:
        """The object is gone: its handle is dead."""
        with self.lock:
            for member in list(known.at):
                self._unbind(known, member)
            native.lib.ha_object_free(known.handle)
            if known.recipe is not None:
                known.recipe.forget()
            self.objects.pop(known.handle, None)
            namesakes = self.by_name.get(known.identity.name, [])
            if known in namesakes:
                namesakes.remove(known)
            if not namesakes:
                self.by_name.pop(known.identity.name, None)

    def forget(self, handle: int, index: int) -> None:
        """A member does not know its handle any more: it is to be looked for again."""
        with self.lock:
            known = self.objects.get(handle)
            if known is not None:
                self._unbind(known, index)

    def doubt(self, handle: int, members: int) -> int:
        """Takes back that these members have it not; which of them were thought so.  They are looked at anew."""
        with self.lock:
            known = self.objects.get(handle)
            if known is None or not (known.identity.token or known.recipe):
                return 0
            doubted = known.absent & members
            known.absent &= ~doubted
            self._publish(known)
            return doubted

    def gives_up_claims(self, known: VirtualObject, index: int) -> bool:
        """Drops what is unproven elsewhere; whether the object is proven on this member."""
        with self.lock:
            for other in [i for i, b in known.at.items() if not b.proven and i != index]:
                self._unbind(known, other)
            self._publish(known)
            return index in known.at and known.at[index].proven

    def hide(self, index: int, epoch: int, handle: int) -> None:
        """The group's own: no application sees it."""
        with self.lock:
            if (epoch, handle) not in self.hidden[index]:
                self.hidden[index].add((epoch, handle))
                self.showed[index] = epoch
                native.lib.ha_object_hide(self.native, index, epoch, handle)

    def unhide(self, index: int, epoch: int, handle: int) -> None:
        """It was destroyed: the library may give its number to another object."""
        with self.lock:
            if (epoch, handle) in self.hidden[index]:
                self.hidden[index].discard((epoch, handle))
                native.lib.ha_object_show(self.native, index, epoch, handle)

    def _hide_in_bulk(self, index: int, epoch: int) -> None:
        """One search instead of a look at each: a ledger can be long."""
        member = self.members[index]
        for stage in Stage:
            wanted = {ck.CKA_CLASS: ulong(ck.CKO_DATA), ck.CKA_LABEL: RESERVED + stage.value.encode()}
            for handle in attributes.find(member, wanted):
                self.hide(index, epoch, handle)

    def forget_recipes(self) -> None:
        """The end of a run: what is secret in them goes."""
        with self.lock:
            for known in self.objects.values():
                if known.recipe is not None:
                    known.recipe.forget()

    def drop_if(self, condition: Callable[[VirtualObject], bool]) -> None:
        """Drops what dies with a session, a login or a member."""
        with self.lock:
            for known in [known for known in self.objects.values() if condition(known)]:
                self.drop(known)

    def has_died(self, handle: int) -> bool:
        """Whether it was a session object that went with its last member; answered once, to who destroys it."""
        with self.lock:
            return self.died.pop(handle, None) is not None

    def session_closed(self, session: int) -> None:
        """Session objects die with the session that made them."""
        with self.lock:
            self.drop_if(lambda known: known.session == session)
            self.died = {handle: owner for handle, owner in self.died.items() if owner != session}

    def session_lost(self, session: int, index: int) -> None:
        """Session objects that a session made on a member die with its counterpart there."""
        with self.lock:
            for known in [k for k in self.objects.values() if k.session == session and index in k.at]:
                self._gone_from(known, index)

    def _gone_from(self, known: VirtualObject, index: int) -> None:
        self._unbind(known, index)
        known.absent |= 1 << index
        if known.recipe is not None and not known.at:
            known.absent = 0  # any member can make it again
        if known.at or known.recipe is not None:
            self._publish(known)
        else:
            self.drop(known)
            self.died[known.handle] = known.session

    def login_lost(self, index: int) -> None:
        """A member had forgotten the login: after the next, its private objects have other handles (PKCS#11 5.6.9)."""
        with self.lock:
            for known in [k for k in self.objects.values() if k.identity.token and index in k.at]:
                self._unbind(known, index)

    def member_lost(self, index: int) -> None:
        """Session objects die with the member's sessions, but live on where else they were made."""
        with self.lock:
            for known in [k for k in self.objects.values() if not k.identity.token and index in k.at]:
                self._gone_from(known, index)

    # ---- recognising ----

    def recognise(self, index: int, epoch: int, session: int, handles: Sequence[int]) -> list[int]:
        """Virtual handles for what a member found; 0 for what applications do not see.  Raises CkError.

        Claims are proven at once, while both members are there to ask, unless there are many of them: a member may
        be gone when the object is used first.
        """
        member = self.members[index]
        result = []
        claims = []
        with self.lock:
            news = sum(
                (epoch, h) not in self.by_member[index] and (epoch, h) not in self.hidden[index]
                for h in handles
            )
        if news > _BULK and member.service.acquire(blocking=False):
            try:
                self._hide_in_bulk(index, epoch)
            finally:
                member.service.release()
        for handle in handles:
            with self.lock:
                if (epoch, handle) in self.hidden[index]:
                    result.append(0)
                    continue
                known = self.by_member[index].get((epoch, handle))
            if known is None:
                try:
                    identity = attributes.who(member, session, handle)
                except CkError as error:
                    # Destroyed since it was found; or a wreck that a store was left with when it was killed.
                    if member.code(error.rv) in (Code.HANDLE, Code.CLEAN):
                        result.append(0)
                        continue
                    raise
                self._same_life(member, epoch)
                if self._is_ours(index, epoch, handle, identity):
                    result.append(0)
                    continue
                known = self._by_what_it_shows(index, epoch, handle, identity)
                known = known or self._place(index, epoch, handle, identity)
                if known:
                    self._prefer(known, index, identity)
                binding = known.at.get(index) if known else None
                if known and binding and not binding.proven:
                    claims.append(known)
            result.append(known.handle if known else 0)
        for known in claims[:_PROVEN_AT_ONCE]:
            self._try_to_prove(known, index)
            result = [self._now(index, epoch, handle, v) for handle, v in zip(handles, result, strict=True)]
        return result

    def _try_to_prove(self, known: VirtualObject, index: int) -> None:
        """Where another member, to compare with, fails at that, the claim stays open."""
        try:
            self.handle_at(known, index)
        except CkError as error:
            if error.member is self.members[index]:
                raise

    def _is_ours(self, index: int, epoch: int, handle: int, identity: Identity) -> bool:
        """Whether it is the group's own, or an object of which the ledger does not know yet that it is there."""
        name = identity.name
        if name.application.startswith(RESERVED) or name.id == KEY_ID:
            self.hide(index, epoch, handle)
            return True
        return name.id.startswith(RESERVED)

    def _by_what_it_shows(
        self, index: int, epoch: int, handle: int, identity: Identity
    ) -> VirtualObject | None:
        """Which of several objects of its name a key is; None where that does not tell."""
        with self.lock:
            _, several = self._candidates(index, epoch, handle, identity)
        if len(several) < 2 or self.tombstones[index]:
            return None
        for known in several:
            with known.proving:
                for other in list(known.at):
                    self._witness(known, other)
                if not (
                    known.proof and known.evidence and self._run(known.proof, index, handle) == known.evidence
                ):
                    continue
            with self.lock:
                if not self._is_current(index, known.at.get(index)):  # else another search has been quicker
                    self._bind(known, index, epoch, handle, proven=True)
                    return known
        return None

    def _now(self, index: int, epoch: int, handle: int, virtual: int) -> int:
        """What a member object stands for after claims were settled: one of its own if its claim was taken back."""
        with self.lock:
            known = self.by_member[index].get((epoch, handle))
            return known.handle if known else virtual

    def _place(self, index: int, epoch: int, handle: int, identity: Identity) -> VirtualObject | None:
        """The virtual object a new member object is, or a new one.  None: it was destroyed in the group."""
        with self.lock:
            known = self.by_member[index].get((epoch, handle))
            if known:
                return known
            for buried in self.tombstones[index]:
                refuted = (index, epoch, handle) in buried.refuted
                if not refuted and compare(buried.identity, identity) is not Match.DIFFERENT:
                    return None
            same, unproven = self._candidates(index, epoch, handle, identity)
            if same:
                self._bind(same[0], index, epoch, handle, proven=True)
                return same[0]
            if len(unproven) == 1:
                self._bind(unproven[0], index, epoch, handle, proven=False)
                return unproven[0]
            if unproven:
                self._event("object.ambiguous", index, identity)
            new = self._new(identity)
            self._bind(new, index, epoch, handle, proven=True)
            return new

    def _candidates(
        self, index: int, epoch: int, handle: int, identity: Identity
    ) -> tuple[list[VirtualObject], list[VirtualObject]]:
        """Objects without a counterpart on this member that are the same, and that may be."""
        free = [
            known
            for known in self.by_name.get(identity.name, [])
            if identity.token
            and not self._is_current(index, known.at.get(index))
            and (index, epoch, handle) not in known.refuted
        ]
        verdicts = [(known, compare(known.identity, identity)) for known in free]
        return (
            [known for known, match in verdicts if match is Match.SAME],
            [known for known, match in verdicts if match is Match.UNPROVEN],
        )

    def adopt(
        self,
        index: int,
        epoch: int,
        session: int,
        handle: int,
        owner: int,
        recipe: Recipe | None = None,
    ) -> VirtualObject:
        """A new object that a call made on one member, in that epoch of it.  Raises CkError."""
        member = self.members[index]
        identity = self._who_made(member, session, handle)
        self._same_life(member, epoch)
        with self.lock:
            self._unearth(index, identity)
            new = self._new(identity, 0 if identity.token else owner)
            new.recipe = recipe
            new.made_here, new.homes = True, 1 << index
            new.absent = ((1 << len(self.members)) - 1) & ~(1 << index)
            self._bind(new, index, epoch, handle, proven=True)
            self._prefer(new, index, identity)
        if identity.token:
            # It is made: what its member fails at now, the next call will see.
            with suppress(CkError), new.proving:
                self._witness(new, index)
        return new

    @staticmethod
    def _who_made(member: Member, session: int, handle: int) -> Identity:
        """Asked in the session that made it, or, where the member has closed that, in ours: a token object stays."""
        try:
            return attributes.who(member, session, handle)
        except CkError as error:
            if member.code(error.rv) is Code.SESSION:
                with suppress(CkError, ConnectError), member.service:
                    member.is_logged_in()  # which renews the service session
                    return attributes.who(member, member.session, handle)
            raise

    def also_at(self, known: VirtualObject, index: int, epoch: int, handle: int) -> None:
        """The same object, made on one more member by the same call, in that epoch of it."""
        with self.lock:
            self._unearth(index, known.identity)
            known.homes |= 1 << index
            self._bind(known, index, epoch, handle, proven=True)

    def _unearth(self, index: int, identity: Identity) -> None:
        """What is made again is not to be destroyed for the one before it."""
        self.tombstones[index] = [
            t for t in self.tombstones[index] if compare(t.identity, identity) is Match.DIFFERENT
        ]

    @staticmethod
    def _same_life(member: Member, epoch: int) -> None:
        """Numbers read meanwhile would be of another life of the member, and mean something else."""
        if member.epoch != epoch:
            raise CkError(ck.CKR_DEVICE_ERROR, f"member {member.name} changed meanwhile", member)

    def renew(self, known: VirtualObject, index: int, session: int) -> None:
        """Reads the identity again after its attributes were changed."""
        binding = known.at.get(index)
        if binding is None:
            raise CkError(ck.CKR_DEVICE_REMOVED, "its handle went with its member", self.members[index])
        self._is_now(known, attributes.who(self.members[index], session, binding.handle))

    def rename(self, known: VirtualObject, name: Name) -> None:
        """Where nobody can be asked what it is now."""
        self._is_now(known, replace(known.identity, name=name))

    def _is_now(self, known: VirtualObject, identity: Identity) -> None:
        with self.lock:
            namesakes = self.by_name.get(known.identity.name, [])
            if known in namesakes:
                namesakes.remove(known)
            known.identity = identity
            self.by_name.setdefault(identity.name, []).append(known)

    def pinned(self, known: VirtualObject) -> None:
        """Says that an object is served by one member only, if there are others."""
        if len(self.members) > 1 and known.identity.token:
            self._event("object.pinned", next(iter(known.at)), known.identity)

    def _event(self, name: str, index: int, identity: Identity) -> None:
        details = {
            "class": ck.CLASS_NAMES.get(identity.name.object_class or 0, "?"),
            "label": identity.name.label.decode("utf-8", "replace"),
            "id": identity.name.id.hex(),
        }
        self.log(Event(name, self.label, self.members[index].name, details))

    # ---- finding on a member ----

    def is_at(self, known: VirtualObject, index: int) -> bool:
        """Whether its handle there is known, and of the member's present life."""
        with self.lock:
            return self._is_current(index, known.at.get(index))

    def handle_at(self, known: VirtualObject, index: int) -> int:
        """The object's handle on a member, looked for and proven if need be; 0: it is not there.  Raises CkError."""
        with self.lock:
            binding = known.at.get(index)
            if self._is_current(index, binding) and known.used and all(b.proven for b in known.at.values()):
                self._publish(known)
                assert binding
                return binding.handle
        with known.proving:
            self._search(known, index)
            for other in [i for i, b in list(known.at.items()) if not b.proven]:
                if self._is_current(other, known.at.get(other)):
                    self._settle(known, other)
                else:
                    with self.lock:
                        self._unbind(known, other)
            self._witness(known, index)
        with self.lock:
            binding = known.at.get(index)
            if not self._is_current(index, binding):
                known.absent |= 1 << index
            else:
                known.used = True
                known.homes |= sum(1 << i for i in known.at)
            self._publish(known)
            return binding.handle if binding and self._is_current(index, binding) else 0

    def _search(self, known: VirtualObject, index: int) -> None:
        """Looks for the object on a member by its name, unless it is bound there."""
        if self._is_current(index, known.at.get(index)) or not known.identity.token:
            return
        member, name = self.members[index], known.identity.name
        if name.object_class is None:
            return
        template = {ck.CKA_CLASS: name.object_class.to_bytes(8, "little"), ck.CKA_TOKEN: b"\1"}
        if name.id:
            template[ck.CKA_ID] = name.id
        if name.label:
            template[ck.CKA_LABEL] = name.label
        with member.service:
            epoch = member.epoch
            found = attributes.find(member, template)
            if not found and known.homes >> index & 1:
                self._check_itself(index, epoch)
            identities = [(handle, attributes.who(member, member.session, handle)) for handle in found]
        with self.lock:
            free = [(h, i) for h, i in identities if (epoch, h) not in self.by_member[index]]
            same = [h for h, i in free if compare(known.identity, i) is Match.SAME]
            unproven = [h for h, i in free if compare(known.identity, i) is Match.UNPROVEN]
            if same or len(unproven) == 1:
                self._unbind(known, index)
                self._bind(known, index, epoch, (same or unproven)[0], proven=bool(same))
            elif unproven:
                self._event("object.ambiguous", index, known.identity)

    def _check_itself(self, index: int, epoch: int) -> None:
        """Raises NotItself, but not of the last member."""
        member = self.members[index]
        others = any(other.state is MemberState.UP for other in self.members if other is not member)
        if not others or self.showed[index] != epoch or member.state is not MemberState.UP:
            return
        if not attributes.find(member, {ck.CKA_TOKEN: b"\1"}):
            raise NotItself(ck.CKR_TOKEN_NOT_RECOGNIZED, "it shows none of its objects", member)

    # ---- proof ----

    def _settle(self, known: VirtualObject, index: int) -> None:
        """Turns a claim into a proven binding, or takes it back."""
        binding = known.at.get(index)
        if binding is None:
            return  # somebody else has taken it back
        same = self._prove(known, index, binding.handle)
        if same:
            with self.lock:
                binding.proven = True
            return
        with self.lock:
            self._unbind(known, index)
            known.absent |= 1 << index
        self._event("object.pinned", next(iter(known.at), index), known.identity)
        if same is None:
            return
        known.refuted.add((index, binding.epoch, binding.handle))
        member = self.members[index]
        with member.service:
            identity = attributes.who(member, member.session, binding.handle)
        self._place(index, binding.epoch, binding.handle, identity)  # it is an object of its own

    def _prove(self, known: VirtualObject, index: int, handle: int) -> bool | None:
        """Whether it is the same key; None if that cannot be told now."""
        if known.proof is not None and known.evidence is not None:
            shown = self._run(known.proof, index, handle)
            return None if shown is None else shown == known.evidence
        reference = next(
            (i for i, b in known.at.items() if b.proven and i != index and self._is_current(i, b)), None
        )
        if reference is None:
            return self._proves_itself(known, index, handle) or None
        own = known.at[reference].handle
        proof = self._plan(known, reference, own, index, handle)
        if proof is None:
            return self._vouched(known, reference, own, index, handle)
        shown, other = self._run(proof, reference, own), self._run(proof, index, handle)
        if shown is None or other is None:
            return None
        if shown != other:
            return False
        known.proof, known.evidence = proof, shown
        return True

    def _proves_itself(self, known: VirtualObject, index: int, handle: int) -> bool:
        """Without a member to compare with: it was not used yet, or it is back where it was and can show nothing."""
        if not known.used and not known.made_here:
            return True
        alone = known.evidence is None and known.homes == 1 << index
        return alone and self._plan(known, index, handle, index, handle) is None

    def _witness(self, known: VirtualObject, index: int) -> None:
        """What a key of the token shows before its first use, to be recognised by when its only member was away."""
        binding = known.at.get(index)
        if not known.identity.token or known.evidence is not None or not self._is_current(index, binding):
            return
        if known.identity.fingerprint is not None and not known.identity.borrowed:
            return
        assert binding
        proof = self._plan(known, index, binding.handle, index, binding.handle)
        if proof is not None:
            known.proof, known.evidence = proof, self._run(proof, index, binding.handle)

    def shows(self, index: int, handle: int, identity: Identity) -> bytes | None:
        """What a key shows on a member, whatever is known of it otherwise; None if it can show nothing.

        It begins with the mechanism, for only what the same operation shows can be compared.  Raises CkError.
        """
        unknown = VirtualObject(0, identity)
        proof = self._plan(unknown, index, handle, index, handle)
        shown = self._run(proof, index, handle) if proof else None
        return ulong(proof.mechanism) + shown if proof and shown else None

    def _usage(self, index: int, handle: int) -> dict[int, bytes]:
        member = self.members[index]
        return member.on_service_session(
            lambda: attributes.read(member, member.session, handle, USAGE_ATTRIBUTES)
        )

    def _plan(self, known: VirtualObject, one: int, own: int, other: int, handle: int) -> Proof | None:
        identity = known.identity
        return plan_proof(
            identity.name.object_class,
            identity.name.type,
            ec_params=identity.ec_params,
            mechanisms=frozenset(self.members[one].mechanisms) & frozenset(self.members[other].mechanisms),
            usage=shared_usage(self._usage(one, own), self._usage(other, handle)),
        )

    def _run(self, proof: Proof, index: int, handle: int) -> bytes | None:
        """What the key on one member shows; None if it cannot."""
        member = self.members[index]
        try:
            outputs = member.on_service_session(
                lambda: [self._output(proof, member, handle, data) for data in proof.inputs]
            )
        except CkError as error:
            # A member that fails says nothing of its key.
            if member.code(error.rv) in (Code.CLEAN, Code.CAPABILITY, Code.LOGIN, Code.HANDLE):
                return None
            raise
        return evidence(proof, outputs)

    @staticmethod
    def _output(proof: Proof, member: Member, handle: int, data: bytes) -> bytes:
        """What a key makes of `data`; raises CkError."""
        encrypt = proof.operation is Operation.ENCRYPT
        init, act = ("C_EncryptInit", "C_Encrypt") if encrypt else ("C_SignInit", "C_Sign")
        mechanism = native.ffi.new("CK_MECHANISM *")
        mechanism.mechanism = proof.mechanism
        parameter = native.ffi.new("CK_BYTE[]", proof.parameter or b"\0")
        if proof.parameter:
            mechanism.pParameter, mechanism.ulParameterLen = parameter, len(proof.parameter)
        native.check(member.call(init, member.session, mechanism, handle), "proving a key", member)
        output, size = native.ffi.new("CK_BYTE[]", 4096), native.ffi.new("CK_ULONG *", 4096)
        rv = member.call(act, member.session, data, len(data), output, size)
        native.check(rv, "proving a key", member)
        return bytes(native.ffi.buffer(output, size[0]))

    def _vouched(self, known: VirtualObject, one: int, own: int, other: int, handle: int) -> bool:
        """For keys that can prove nothing by an operation: the group's ledger says it of the one key of that name on
        each, or both members show one public key for this CKA_ID."""
        if self.is_one is not None:
            with suppress(Exception):  # a member that fails at that says nothing of its key
                if self.is_one(known.identity.name, (self.members[one], self.members[other])):
                    return True
        if known.identity.kind is not Kind.PRIVATE_KEY:
            return False
        return vouched(self._with_namesakes(one, own), self._with_namesakes(other, handle))

    def _with_namesakes(self, index: int, handle: int) -> Identity:
        member = self.members[index]
        with member.service:
            key = attributes.who(member, member.session, handle)
            namesakes = attributes.find(member, {ck.CKA_ID: key.name.id})
            others = [attributes.who(member, member.session, h) for h in namesakes if h != handle]
        return complete([key, *others])[0]

    # ---- a member returns ----

    def destroyed_while_away(self, known: VirtualObject, absent: int) -> None:
        """Remembers, for the life of the process, that members which are away must not bring it back."""
        with self.lock:
            for index in range(len(self.members)):
                if absent >> index & 1 and known.identity.token:
                    self.tombstones[index].append(known)

    def reconcile(self, index: int) -> None:
        """Matches all that a returned member has with what the application knows.  Raises CkError."""
        with self.lock:
            for known in self.objects.values():
                self._unbind(known, index)
                known.absent = 0  # with this member back, what could not be proven may be
            self.by_member[index].clear()
            nothing_known = not self.objects and not self.tombstones[index]
        if nothing_known:
            return
        member = self.members[index]
        self.returning.add(index)
        try:
            with member.service:
                found = attributes.find(member, {ck.CKA_TOKEN: b"\1"})
            self._bury(index, found)
            self.recognise(index, member.epoch, member.session, found)
        finally:
            self.returning.discard(index)
        with self.lock:
            for known in self.objects.values():
                if index not in known.at and known.recipe is None:
                    known.absent |= 1 << index
                self._publish(known)

    def _bury(self, index: int, found: Sequence[int]) -> None:
        """Destroys on a returned member what was destroyed while it was away, where that is proven."""
        member = self.members[index]
        for handle in found if self.tombstones[index] else ():
            with member.service:
                identity = attributes.who(member, member.session, handle)
            for known in list(self.tombstones[index]):
                match = compare(known.identity, identity)
                if match is Match.UNPROVEN and known.proof and known.evidence:
                    shown = self._run(known.proof, index, handle)
                    if shown is not None:
                        match = Match.SAME if shown == known.evidence else Match.DIFFERENT
                if match is Match.DIFFERENT:
                    known.refuted.add((index, member.epoch, handle))
                if match is Match.SAME:
                    if member.call("C_DestroyObject", member.session, handle) == ck.CKR_OK:
                        with self.lock:
                            self.tombstones[index].remove(known)
                    else:
                        self._event("object.ambiguous", index, identity)  # hidden: it cannot be destroyed
                    break
                if match is Match.UNPROVEN:
                    self._event("object.ambiguous", index, identity)  # hidden, and left to the operator
