"""`p11ha sync` and `p11ha diff`: what each member of a group holds, compared, and made up for where that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pkcs11_ha import ck
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.core.identity import Identity, Kind, Name
from pkcs11_ha.core.template import FALSE, Template, for_copy
from pkcs11_ha.runtime import attributes, bulk
from pkcs11_ha.runtime.bulk import Census, Outcome
from pkcs11_ha.runtime.ledger import Busy
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.replication import Replication
from pkcs11_ha.runtime.service import MemberFault, Refused, on
from pkcs11_ha.runtime.whereabouts import Unproven

FAILURES = (MemberFault, Refused, Busy, Unproven, CkError)


# ---- sync ----


@dataclass(frozen=True)
class Debt:
    """What one member is owed, by its name."""

    member: str
    open: tuple[str, ...]  # writes that are not done there: made, changed or destroyed
    missing: tuple[str, ...]  # other objects of the ledger that it has no entry of


def debts(replication: Replication) -> list[Debt]:
    """Without changing anything; raises OperatorError."""
    party = replication.party
    try:
        owed: dict[str, list[str]] = {member.name: [] for member in party.members}
        told = set()
        for uid in party.ledger.open(party.there()):
            situation = replication.settling.situation(uid)
            if situation is None:
                continue
            what = "make or change" if situation.target.alive else "destroy"
            for name in situation.behind | situation.away:
                owed.setdefault(name, []).append(f"{what} {bulk.describe(situation.target.name)}")
                told.add((name, uid))
        missing: dict[str, list[str]] = {}
        for member in party.there():
            short = bulk.shortfall(party, member).missing
            missing[member.name] = [
                bulk.describe(entry.name) for entry in short if (member.name, entry.uid) not in told
            ]
    except FAILURES as error:
        raise OperatorError(str(error)) from None
    return [Debt(name, tuple(each), tuple(missing.get(name, ()))) for name, each in owed.items()]


def sync(replication: Replication, report: Callable[[str], bulk.Report]) -> dict[str, Outcome]:
    """Settles what is open and brings every member what it lacks; raises OperatorError."""
    outcomes = {}
    try:
        replication.settling.settle()
        for member in replication.party.there():
            outcomes[member.name] = bulk.bring_up(replication, member, report(member.name))
    except FAILURES as error:
        raise OperatorError(f"{error}: run it once more to go on") from None
    return outcomes


# ---- diff ----

# What a token says of a key's past: a copy has another one (PKCS#11 3.2, section 4.9.1).
_OF_THE_PAST = (
    *(ck.CKA_LOCAL, ck.CKA_NEVER_EXTRACTABLE, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_KEY_GEN_MECHANISM),
    ck.CKA_UNIQUE_ID,
)


@dataclass(frozen=True)
class Row:
    """One object of the group: who has it, in which attributes they differ, and whether it is proven to be one."""

    object: str
    on: tuple[str, ...]
    lacking: tuple[str, ...]
    different: tuple[str, ...]  # attributes, by name or number
    proof: str  # "operation", "attributes", "none", "differs"
    in_ledger: bool

    @property
    def good(self) -> bool:
        """Whether all members hold the same."""
        return not self.lacking and not self.different and self.proof != "differs"


def diff(replication: Replication) -> list[Row]:
    """Every object of every member, compared; raises OperatorError."""
    party = replication.party
    try:
        members = party.there()
        known = {
            (entry.name, entry.fingerprint) for entry in bulk.newest(party, members).values() if entry.alive
        }
        censuses = {member.name: Census(member) for member in members}
        groups = _grouped(replication, members, censuses)
        return [_row(replication, members, name, held, known) for name, held in groups]
    except FAILURES as error:
        raise OperatorError(str(error)) from None


_Held = dict[str, tuple[int, Identity]]


def _grouped(
    replication: Replication, members: Sequence[Member], censuses: dict[str, Census]
) -> list[tuple[Name, _Held]]:
    """Objects that are meant to be one: of a name, and as far as they show it of one fingerprint or evidence."""
    groups: list[tuple[Name, _Held]] = []
    names = {name: None for census in censuses.values() for name in census.by_name}
    for name in sorted(names, key=lambda n: (n.label, n.id, n.object_class or 0)):
        several = max(len(census.by_name.get(name, ())) for census in censuses.values()) > 1
        keyed: dict[object, list[_Held]] = {}
        for member in members:
            for handle, identity in censuses[member.name].by_name.get(name, ()):
                key: object = None if identity.borrowed else identity.fingerprint
                if key is None and several:
                    key = replication.whereabouts.shows(member, handle, identity)
                places = keyed.setdefault(key, [])
                place = next((held for held in places if member.name not in held), None)
                if place is None:
                    place = {}
                    places.append(place)
                place[member.name] = (handle, identity)
        groups += [(name, held) for places in keyed.values() for held in places]
    return groups


def _row(
    replication: Replication,
    members: Sequence[Member],
    name: Name,
    held: _Held,
    known: set[tuple[Name, bytes | None]],
) -> Row:
    by_name = {member.name: member for member in members}
    identities = [identity for _, identity in held.values()]
    shown = {each: attributes_shown(by_name[each], handle) for each, (handle, _) in held.items()}
    fingerprints = {None if i.borrowed else i.fingerprint for i in identities}
    return Row(
        bulk.describe(name),
        tuple(held),
        tuple(member.name for member in members if member.name not in held),
        tuple(_differences(list(shown.values()))),
        _proof(replication, by_name, held),
        any(n == name and (f is None or f in fingerprints or None in fingerprints) for n, f in known),
    )


def attributes_shown(member: Member, handle: int) -> Template:
    """All that a copy of an object is made by, as a member shows it."""
    with on(member):
        return attributes.template_of(member, member.session, handle)


def _differences(shown: Sequence[Template]) -> list[str]:
    """What a vendor does not show is what it does by default."""
    said = [for_copy(each) for each in shown]
    numbers = sorted({number for each in said for number in each})
    return [
        ck.ATTRIBUTE_NAMES.get(number, hex(number))
        for number in numbers
        if number not in _OF_THE_PAST and len({each.get(number) or FALSE for each in said}) > 1
    ]


def _proof(replication: Replication, by_name: dict[str, Member], held: _Held) -> str:
    """How it is known that they are one: by what the keys do on each member, else by what they show."""
    if len(held) < 2:
        return "none"
    kinds = {identity.kind for _, identity in held.values()}
    if kinds <= {Kind.PRIVATE_KEY, Kind.SECRET_KEY}:
        shows = {
            replication.whereabouts.evidence(by_name[each], handle, identity)
            for each, (handle, identity) in held.items()
        }
        if None not in shows:
            return "operation" if len(shows) == 1 else "differs"
    fingerprints = {None if i.borrowed else i.fingerprint for _, i in held.values()}
    if None in fingerprints:
        return "none"
    return "attributes" if len(fingerprints) == 1 else "differs"


def show(rows: Sequence[Row], members: Sequence[str], console: Console) -> None:
    """A line for each object, and at the end how many are not as they should be."""
    table = Table("object", *members, "proven by", "differs in", box=None, header_style="bold")
    for row in rows:
        marks = ["yes" if name in row.on else "[red]no[/]" for name in members]
        proof = "[red]differs[/]" if row.proof == "differs" else row.proof
        outside = "" if row.in_ledger else " [dim](not in the ledger)[/]"
        table.add_row(escape(row.object) + outside, *marks, proof, ", ".join(row.different))
    console.print(table)
    bad = sum(not row.good for row in rows)
    console.print(f"{len(rows)} objects, {bad} not alike on all members", highlight=False)
