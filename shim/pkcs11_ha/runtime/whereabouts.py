"""Where the object of a ledger entry is on a member, if it is there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from pkcs11_ha import ck
from pkcs11_ha.core.identity import Identity, Kind, Name
from pkcs11_ha.core.ledger import Entry, Replica, Stage, is_uid
from pkcs11_ha.core.template import (
    NEW_ID,
    RESERVED,
    TRUE,
    has_id,
    tag,
    ulong,
)
from pkcs11_ha.runtime import attributes
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.party import Party
from pkcs11_ha.runtime.service import find, on

_KEYS = (Kind.PRIVATE_KEY, Kind.SECRET_KEY)


class Unproven(Exception):
    """Several objects of a member may be the one that is meant."""


class Whereabouts:
    """Looks, and changes nothing."""

    def __init__(self, party: Party) -> None:
        self.party = party

    def shows(self, member: Member, handle: int, identity: Identity) -> bytes | None:
        """What a key shows in an operation, where its attributes do not tell it from its namesakes."""
        if identity.fingerprint is not None and not identity.borrowed:
            return None
        return self.evidence(member, handle, identity)

    def evidence(self, member: Member, handle: int, identity: Identity) -> bytes | None:
        """What a key shows in an operation; None if it can show nothing."""
        if identity.kind not in _KEYS:
            return None
        with suppress(CkError):
            return self.party.objects.shows(self.party.members.index(member), handle, identity)
        return None

    def marked(self, member: Member) -> list[tuple[str, int]]:
        """(uid, handle) of all objects that bear the mark of what is new."""
        with on(member):
            found = find(member, {ck.CKA_ID: NEW_ID, ck.CKA_TOKEN: TRUE})
            labels = [
                attributes.read(member, member.session, handle, (ck.CKA_LABEL,)).get(ck.CKA_LABEL, b"")
                for handle in found
            ]
        uids = [label[len(RESERVED) :].decode("ascii", "replace") for label in labels]
        return [(uid, handle) for uid, handle in zip(uids, found, strict=True) if is_uid(uid)]

    def tagged(self, member: Member, uid: str) -> list[int]:
        wanted = {**tag(uid), ck.CKA_TOKEN: TRUE}
        return find(member, wanted)

    def source(self, member: Member, target: Entry, replicas: Sequence[Replica]) -> tuple[Member, int] | None:
        """A member that has the object, and its handle there."""
        has = {r.member for r in replicas if r.stage is not Stage.ANNOUNCED and r.entry.alive}
        for other in self.party.there():
            if other is member:
                continue
            tagged = self.tagged(other, target.uid)
            if tagged:
                return other, tagged[0]
            if other.name in has:
                own = next((r.entry for r in replicas if r.member == other.name), target)
                handle = self.locate(other, target, own)
                if handle is not None:
                    return other, handle
            elif not has_id(target.name.object_class) and self.surplus(other, target):
                handle = self.locate(other, target, target)  # made there, and not yet said so
                if handle is not None:
                    return other, handle
        return None

    def point_of(self, reference: Member, name: Name) -> bytes | None:
        """The public point of a private EC key, by the public key that bears its CKA_ID."""
        wanted = {ck.CKA_CLASS: ulong(ck.CKO_PUBLIC_KEY), ck.CKA_ID: name.id}
        with on(reference):
            for handle in find(reference, wanted):
                shown = attributes.read(reference, reference.session, handle, (ck.CKA_EC_POINT,))
                if ck.CKA_EC_POINT in shown:
                    return shown[ck.CKA_EC_POINT]
        return None

    def is_one(self, name: Name, members: Sequence[Member]) -> bool:
        """Whether by the ledger the one object of that name on each of these members is the same."""
        if any(len(self._alike(member, name, None)) != 1 for member in members):
            return False
        uids = [
            {r.entry.uid for r in self.party.ledger.called(name, [m]) if r.entry.alive and r.member == m.name}
            for m in members
        ]
        return all(len(each) == 1 for each in uids) and len(set.union(*uids)) == 1

    def is_on_any(self, identity: Identity, members: Sequence[Member]) -> bool:
        """Whether one of them has an object that it may be; raises MemberFault, Refused."""
        fingerprint = None if identity.borrowed else identity.fingerprint
        return any(self._alike(member, identity.name, fingerprint) for member in members)

    def is_gone(self, name: Name) -> bool:
        """Whether by the ledger no object of that name is to be there: all were destroyed, or are not made yet.

        One that is away may show it still.  False also where the ledger knows nothing of it.
        """
        newest: dict[str, Replica] = {}
        for replica in self.party.ledger.called(name, self.party.there()):
            uid = replica.entry.uid
            if uid not in newest or _standing(newest[uid]) < _standing(replica):
                newest[uid] = replica
        return bool(newest) and not any(
            r.entry.alive and r.stage is not Stage.ANNOUNCED for r in newest.values()
        )

    def surplus(self, member: Member, target: Entry) -> bool:
        """Whether the member has more objects that are just like this one than its entries account for."""
        alike = self._alike(member, target.name, target.fingerprint)
        accounted = {
            r.entry.uid
            for r in self.party.ledger.called(target.name, self.party.there())
            if r.member == member.name
            and r.stage is not Stage.ANNOUNCED
            and r.entry.alive
            and r.entry.fingerprint == target.fingerprint
        }
        return len(alike) > len(accounted)

    def locate(self, member: Member, target: Entry, own: Entry | None) -> int | None:
        """The object of an entry on a member, by what it is called there; None: it is not there.  Raises Unproven.

        `own` is the member's own entry of it, where it has one.
        """
        names = [own.name] if own else []
        for name in (*names, *target.former, target.name):
            found = self._meant(self._alike(member, name, target.fingerprint), member, target, own)
            if found is not None:
                return found
        return None

    def _meant(
        self, alike: Sequence[tuple[int, Identity]], member: Member, target: Entry, own: Entry | None
    ) -> int | None:
        """Which of the objects of a name an entry means; None if it is none of them."""
        same = [h for h, i in alike if target.fingerprint is not None and i.fingerprint == target.fingerprint]
        if same:
            return same[0]
        unknown = []
        for handle, identity in alike:
            shown = self.shows(member, handle, identity)
            if shown is None or target.evidence is None or shown[:8] != target.evidence[:8]:
                unknown.append(handle)
            elif shown == target.evidence:
                return handle
        if not unknown or (len(unknown) == 1 and own is not None):
            return unknown[0] if unknown else None
        raise Unproven(
            f"which of {len(unknown)} named {target.name.label!r} is meant cannot be proven: change it by hand"
        )

    def _alike(self, member: Member, name: Name, fingerprint: bytes | None) -> list[tuple[int, Identity]]:
        found: dict[int, Identity] = {}
        with on(member):
            wanted = {ck.CKA_TOKEN: TRUE, ck.CKA_CLASS: ulong(name.object_class or 0)}
            wanted |= {n: v for n, v in ((ck.CKA_ID, name.id), (ck.CKA_LABEL, name.label)) if v}
            for handle in find(member, wanted):
                identity = attributes.who(member, member.session, handle)
                if identity.name == name:
                    found[handle] = identity
        shown = {h: None if i.borrowed else i.fingerprint for h, i in found.items()}
        return [
            (h, i)
            for h, i in found.items()
            if fingerprint is None or shown[h] is None or shown[h] == fingerprint
        ]


def _standing(replica: Replica) -> tuple[tuple[int, bool, str], bool]:
    """Of two replicas of one entry, which says more."""
    return replica.entry.weight, replica.stage is not Stage.ANNOUNCED
