"""Many objects at once: looking at all of a member, bringing a member up, changing the key under all blobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from pkcs11_ha import ck
from pkcs11_ha.core.domain import KEY_ID, Generation
from pkcs11_ha.core.identity import Identity, Name
from pkcs11_ha.core.ledger import Entry, Replica, Stage, Wrapped
from pkcs11_ha.core.template import FALSE, RESERVED, TRUE, has_id, ulong
from pkcs11_ha.runtime import attributes
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.party import Party
from pkcs11_ha.runtime.replication import Replication
from pkcs11_ha.runtime.service import Refused, destroy, mechanism, on, unwrap, wrap

_PATIENCE_S = 30.0  # with another process that brings the same member up
Report = Callable[[int, int], None]
"""(done, of how many)."""


@dataclass
class Outcome:
    """What was done to one member; `failed` has a line for each object that could not be made."""

    made: int = 0
    there: int = 0
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"objects: {self.made} made, {self.there} there already, {len(self.failed)} not made"]
        return "\n".join([*lines, *self.failed])


class Census:
    """All token objects of one member that are not the group's own, looked at once."""

    def __init__(self, member: Member) -> None:
        self.by_name: dict[Name, list[tuple[int, Identity]]] = {}
        self.tagged: dict[str, int] = {}  # uid -> handle of what the ledger does not know yet
        with on(member):
            data = {ck.CKA_CLASS: ulong(ck.CKO_DATA), ck.CKA_TOKEN: TRUE}
            own: set[int] = set()
            for stage in Stage:
                label = {ck.CKA_LABEL: RESERVED + stage.value.encode()}
                own.update(attributes.find(member, data | label))
            for handle in attributes.find(member, {ck.CKA_TOKEN: TRUE}):
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

    def of(self, entry: Entry, shows: Callable[[int, Identity], bytes | None]) -> int | None:
        """The one object that an entry can mean; None if there is none, or none in particular.

        `shows(handle, identity)` is what a key shows in an operation, for namesakes.
        """
        alike = [(h, None if i.borrowed else i.fingerprint) for h, i in self.by_name.get(entry.name, [])]
        same = [h for h, shown in alike if shown is not None and shown == entry.fingerprint]
        if same:
            return same[0]
        possible = [
            (h, i)
            for h, i in self.by_name.get(entry.name, [])
            if entry.fingerprint is None or i.fingerprint is None
        ]
        if len(possible) > 1 and entry.evidence is not None:
            possible = [(h, i) for h, i in possible if shows(h, i) == entry.evidence][:1]  # alike is as good
        return possible[0][0] if len(possible) == 1 else None


@dataclass(frozen=True)
class Shortfall:
    """What the ledger says that a member should have."""

    missing: list[Entry]
    there: int
    has: dict[str, Replica]  # what it says itself, by uid


def newest(party: Party, members: Sequence[Member]) -> dict[str, Entry]:
    """What the ledger of these members says, by uid.  Raises MemberFault, Refused."""
    found: dict[str, Entry] = {}
    for member in members:
        for uid, replica in party.ledger.held(member, party.there()).items():
            if uid not in found or found[uid].weight < replica.entry.weight:
                found[uid] = replica.entry
    return found


def shortfall(party: Party, member: Member) -> Shortfall:
    """What a member lacks by its ledger: of what it has the entry, it has the object.  Raises MemberFault, Refused."""
    wanted = newest(party, party.there())
    has = party.ledger.held(member, party.there())
    alive = [entry for entry in wanted.values() if entry.alive and not entry.foreign]
    missing = [entry for entry in alive if not _is_placed(has.get(entry.uid), entry)]
    return Shortfall(missing, len(alive) - len(missing), has)


def _is_placed(replica: Replica | None, entry: Entry) -> bool:
    return (
        replica is not None and replica.stage is not Stage.ANNOUNCED and replica.entry.weight == entry.weight
    )


def bring_up(replication: Replication, member: Member, report: Report) -> Outcome:
    """Makes all that a member lacks.  Raises MemberFault, Refused, Busy.

    Interrupted, it goes on from there: an object and its entry come in one after the other, as in every write.
    """
    party = replication.party
    with party.ledger.lease(member, party.there(), _PATIENCE_S) as alive:
        short = shortfall(party, member)
        outcome = Outcome(there=short.there)
        if short.missing:
            sources = [(other, Census(other)) for other in party.there() if other is not member]
            here = Census(member)
            for number, entry in enumerate(short.missing):
                try:
                    _bring(replication, member, entry, short.has.get(entry.uid), sources, here)
                    outcome.made += 1
                except Refused as error:
                    outcome.failed.append(f"{describe(entry.name)}: {error}")
                alive()
                report(number + 1, len(short.missing))
    replication.settling.settle()
    return outcome


def _bring(
    replication: Replication,
    member: Member,
    entry: Entry,
    before: Replica | None,
    sources: Sequence[tuple[Member, Census]],
    here: Census,
) -> None:
    """One object and its entry, without a search: a token that is full takes its time for each."""
    party = replication.party
    handle, is_tagged = here.tagged.get(entry.uid, 0), True
    outweighed = [before] if before is not None else []
    if not handle and _is_made(replication, member, entry, before):
        is_tagged = False
    elif not handle:
        for other, census in sources:
            source = census.of(entry, partial(replication.whereabouts.shows, other))
            if source is not None:
                foretold = replication.settling.foretell(member, entry, outweighed, other, source)
                outweighed += [foretold] if foretold is not None else []
                handle, is_tagged = replication.copying.copy_over(member, entry, other, source)
                break
        else:
            why = "no other member shows which object it is: a find"
            raise Refused(member, ck.CKR_OBJECT_HANDLE_INVALID, why)
    written = party.ledger.write(member, entry, Stage.PLACED, party.there())
    if is_tagged:
        replication.settling.untag(member, handle, entry)
    party.ledger.mark(member, written, Stage.KEPT, party.there())
    for replica in outweighed:
        party.ledger.erase(replica)


def _is_made(replication: Replication, member: Member, entry: Entry, before: Replica | None) -> bool:
    """Whether what can bear no mark was announced and made, before somebody was interrupted."""
    announced = (
        before is not None and before.stage is Stage.ANNOUNCED and before.entry.version == entry.version
    )
    return (
        announced and not has_id(entry.name.object_class) and replication.whereabouts.surplus(member, entry)
    )


def rewrap(replication: Replication, new: Generation, report: Report) -> None:
    """Puts every blob under the new generation.  Raises MemberFault, Refused."""
    party = replication.party
    there = party.there()
    by_member = {member.name: party.ledger.held(member, there) for member in there}
    entries = {
        uid: entry
        for uid, entry in newest(party, there).items()
        if entry.wrapped and entry.wrapped.generation != new.number
    }
    for number, (uid, entry) in enumerate(entries.items()):
        again = replace(entry, version=entry.version + 1, wrapped=_rewrapped(party, there[0], entry, new))
        for member in there:
            before = by_member[member.name].get(uid)
            if before is not None:
                party.ledger.write(member, again, before.stage, there)
                party.ledger.erase(before)
        report(number + 1, len(entries))


def _rewrapped(party: Party, member: Member, entry: Entry, new: Generation) -> Wrapped:
    """From blob to blob inside the member; the key is there for a moment as a session object."""
    assert entry.wrapped
    keys, form = party.keys[member.name], entry.wrapped.form
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
    with on(member):
        spelling = mechanism(old.spellings[form])
        handle = unwrap(member, spelling, old.handle, entry.wrapped.blob, template)
        try:
            blob = wrap(member, mechanism(keys[new.number].spellings[form]), keys[new.number].handle, handle)
        finally:
            destroy(member, handle)
    return Wrapped(new.number, form, blob)


def describe(name: Name) -> str:
    """An object in words."""
    kind = ck.CLASS_NAMES.get(name.object_class or 0, "object")
    return f"{kind} {name.label.decode('utf-8', 'replace')!r} id {name.id.hex() or '-'}"
