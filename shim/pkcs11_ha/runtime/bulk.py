"""Many objects at once: bringing a new member up, comparing members, changing the domain key under all blobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pkcs11_ha import ck
from pkcs11_ha.core.domain import KEY_ID, Generation
from pkcs11_ha.core.identity import Identity, Name
from pkcs11_ha.core.ledger import Entry, Stage, Wrapped
from pkcs11_ha.core.template import FALSE, RESERVED, TRUE, ulong
from pkcs11_ha.runtime import attributes
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.replication import Replication
from pkcs11_ha.runtime.service import Refused, destroy, mechanism, unwrap, wrap

Report = Callable[[int, int], None]
"""(done, of how many)."""


@dataclass
class Outcome:
    """What was done to one member, and what could not be: one line each."""

    made: int = 0
    there: int = 0
    failed: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"objects: {self.made} made, {self.there} there already, {len(self.failed)} not made"]
        return "\n".join([*lines, *self.failed])


class Census:
    """All token objects of one member that are not the group's own, looked at once."""

    def __init__(self, member: Member) -> None:
        self.by_name: dict[Name, list[tuple[int, Identity]]] = {}
        self.tagged: dict[str, int] = {}  # uid -> handle of what the ledger does not know yet
        with member.service:
            data = {ck.CKA_CLASS: ulong(ck.CKO_DATA), ck.CKA_TOKEN: TRUE}
            own: set[int] = set()
            for stage in Stage:
                label = {ck.CKA_LABEL: RESERVED + stage.value.encode()}
                own.update(attributes.find(member, member.session, data | label))
            for handle in attributes.find(member, member.session, {ck.CKA_TOKEN: TRUE}):
                if handle not in own:
                    self._count(handle, attributes.who(member, member.session, handle))

    def _count(self, handle: int, identity: Identity) -> None:
        name = identity.name
        if name.id == KEY_ID or name.application.startswith(RESERVED):
            return
        if name.id.startswith(RESERVED):
            self.tagged[name.label[len(RESERVED) :].decode("ascii", "replace")] = handle
            return
        self.by_name.setdefault(name, []).append((handle, identity))

    def objects(self) -> list[tuple[int, Identity]]:
        """All of them."""
        return [each for alike in self.by_name.values() for each in alike]

    def of(self, entry: Entry) -> int | None:
        """The one object that an entry can mean; None if there is none, or none in particular."""
        alike = self.by_name.get(entry.name, [])
        shown = [(h, None if i.borrowed else i.fingerprint) for h, i in alike]
        same = [h for h, fingerprint in shown if fingerprint is not None and fingerprint == entry.fingerprint]
        if same:
            return same[0]
        possible = [h for h, fingerprint in shown if fingerprint is None or entry.fingerprint is None]
        return possible[0] if len(possible) == 1 else None


def bring_up(replication: Replication, member: Member, report: Report) -> Outcome:
    """All objects of the ledger that a member lacks; what it has the entry of, it has.  Raises MemberFault, Busy.

    Interrupted, it goes on from there: an object and its entry come in one after the other, as in every write.
    """
    there = replication.party.there()
    others = [m for m in there if m is not member]
    wanted: dict[str, Entry] = {}
    for other in others:
        for uid, replica in replication.party.ledger.held(other, there).items():
            if uid not in wanted or wanted[uid].weight < replica.entry.weight:
                wanted[uid] = replica.entry
    has = {
        uid
        for uid, replica in replication.party.ledger.held(member, there).items()
        if replica.stage is not Stage.ANNOUNCED
        and uid in wanted
        and replica.entry.weight == wanted[uid].weight
    }
    alive = [entry for entry in wanted.values() if entry.alive and not entry.foreign]
    missing = [entry for entry in alive if entry.uid not in has]
    outcome = Outcome(there=len(alive) - len(missing))
    failed = []
    with replication.party.ledger.lease(member, there, 30.0):
        sources = [(other, Census(other)) for other in others] if missing else []
        here = Census(member) if missing else None
        for number, entry in enumerate(missing):
            try:
                assert here
                _bring(replication, member, entry, sources, here)
                outcome.made += 1
            except Refused as error:
                failed.append(f"{_describe(entry)}: {error}")
            report(number + 1, len(missing))
    replication.settling.settle()
    outcome.failed = tuple(failed)
    return outcome


def _bring(
    replication: Replication,
    member: Member,
    entry: Entry,
    sources: Sequence[tuple[Member, Census]],
    here: Census,
) -> None:
    if entry.uid not in here.tagged:
        source = next(((o, h) for o, census in sources if (h := census.of(entry)) is not None), None)
        if source is None:
            raise Refused(
                member, ck.CKR_OBJECT_HANDLE_INVALID, "no member shows which object it is; C_FindObjects"
            )
        replication.copying.copy_over(member, entry, *source)
    replication.settling.settled_on(member, entry, Stage.KEPT)


def rewrap(replication: Replication, new: Generation, report: Report) -> None:
    """Puts every blob under the new generation.  Raises MemberFault, Refused, CkError."""
    there = replication.party.there()
    by_member = {member.name: replication.party.ledger.held(member, there) for member in there}
    entries = {
        uid: replica.entry
        for held in by_member.values()
        for uid, replica in held.items()
        if replica.entry.wrapped and replica.entry.wrapped.generation != new.number
    }
    for number, (uid, entry) in enumerate(entries.items()):
        again = replace(
            entry, version=entry.version + 1, wrapped=_rewrapped(replication, there[0], entry, new)
        )
        for member in there:
            before = by_member[member.name].get(uid)
            if before is not None:
                replication.party.ledger.write(member, again, before.stage, there)
                replication.party.ledger.erase(before)
        report(number + 1, len(entries))


def _rewrapped(replication: Replication, member: Member, entry: Entry, new: Generation) -> Wrapped:
    """From blob to blob inside the member; the key is there for a moment as a session object."""
    assert entry.wrapped
    keys, form = replication.party.keys[member.name], entry.wrapped.form
    old = keys.get(entry.wrapped.generation)
    if old is None:
        raise Refused(member, ck.CKR_UNWRAPPING_KEY_HANDLE_INVALID, "C_UnwrapKey")
    template = {
        ck.CKA_CLASS: ulong(entry.name.object_class or 0),
        ck.CKA_KEY_TYPE: ulong(entry.name.type or 0),
        ck.CKA_TOKEN: FALSE,
        ck.CKA_SENSITIVE: TRUE,
        ck.CKA_EXTRACTABLE: TRUE,
    }
    with member.service:
        spelling = mechanism(old.spellings[form])
        handle = unwrap(member, spelling, old.handle, entry.wrapped.blob, template)
        try:
            blob = wrap(member, mechanism(keys[new.number].spellings[form]), keys[new.number].handle, handle)
        finally:
            destroy(member, handle)
    return Wrapped(new.number, form, blob)


def _describe(entry: Entry) -> str:
    kind = ck.CLASS_NAMES.get(entry.name.object_class or 0, "object")
    return f"{kind} {entry.name.label.decode('utf-8', 'replace')!r} id {entry.name.id.hex() or '-'}"
