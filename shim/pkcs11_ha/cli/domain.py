"""`p11ha domain`: the group's domain key made, shown, changed, and brought to members that are new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pkcs11_ha.cli import custody
from pkcs11_ha.cli.custody import Check, CustodyError, Sealed, Shares, Target
from pkcs11_ha.cli.operator import OperatorError, up
from pkcs11_ha.core import domain as domains
from pkcs11_ha.core.domain import Generation
from pkcs11_ha.runtime import bulk, domain, native
from pkcs11_ha.runtime.domain import DomainKey, Entrance
from pkcs11_ha.runtime.ledger import Busy
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.replication import Replication
from pkcs11_ha.runtime.service import MemberFault, Refused

_FAILURES = (MemberFault, Refused, CkError)


@dataclass(frozen=True)
class Holder:
    """What one member holds."""

    name: str
    keys: dict[int, DomainKey]


def holders(members: Sequence[Member]) -> list[Holder]:
    """The domain keys of each; raises OperatorError."""
    found = []
    for member in members:
        try:
            found.append(Holder(member.name, domain.keys_of(up(member))))
        except _FAILURES as error:
            raise OperatorError(f"{member.name}: {error}") from None
    return found


def agreed(found: Sequence[Holder]) -> tuple[Generation, dict[str, str]]:
    """The group's key, and who does not have it; raises OperatorError if nobody has one."""
    held = {h.name: {n: key.generation for n, key in h.keys.items()} for h in found}
    agreement = domains.agree(held)
    if agreement.generation is None:
        raise OperatorError("no member has a domain key: p11ha domain init")
    return agreement.generation, dict(agreement.refused)


def take_part(replication: Replication, members: Sequence[Member]) -> None:
    """These members with the domain key they have, if they have one; raises OperatorError."""
    try:
        generation, refused = agreed(holders(members))
    except OperatorError:
        generation, refused = None, {}
    if refused:
        raise OperatorError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    replication.party.take_part(members, generation)


def init(
    replication: Replication, members: Sequence[Member], shares: Shares | None, plain_import: bool
) -> Generation:
    """A new domain key on every member; raises OperatorError, and then no member has it."""
    for holder in holders(members):
        if holder.keys:
            key = holder.keys[max(holder.keys)].generation
            raise OperatorError(
                f"{holder.name} has a domain key already (generation {key.number}, check value {key.check}): "
                "p11ha domain admit brings it to others, p11ha domain rotate changes it"
            )
    generation = _bring(
        members, 1, plain_import, lambda *given: custody.make(given[0], shares, given[1], given[2])
    )
    _enrol(replication, frozenset(member.name for member in members), members)
    return generation


def _enrol(replication: Replication, names: frozenset[str], there: Sequence[Member]) -> None:
    """Writes who belongs to the group."""
    try:
        replication.party.ledger.set_roster(names, there)
    except _FAILURES as error:
        raise OperatorError(
            f"{error}: the members have the domain key, but not who belongs to the group"
        ) from None


def dismiss(replication: Replication, members: Sequence[Member], name: str) -> None:
    """A member belongs to the group no more: nobody keeps anything for it.  Raises OperatorError."""
    try:
        before = replication.party.ledger.roster(members)
        if before is None or name not in before:
            raise OperatorError(f"{name} does not belong to the group")
        _enrol(replication, before - {name}, members)
        replication.party.names = before - {name}
        replication.settling.settle()
    except _FAILURES as error:
        raise OperatorError(str(error)) from None


def admit(member: Member, others: Sequence[Member], plain_import: bool) -> Generation:
    """The group's domain key, from its custodians' words, to one more member; raises OperatorError.

    A member that has it already, as an admission was interrupted, needs no words.
    """
    generation, refused = agreed(holders(others))
    if refused:
        raise OperatorError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    (own,) = holders([member])
    held = {number: key.generation for number, key in own.keys.items()}
    if held and (why := domains.lacks(member.name, held, generation)):
        raise OperatorError(f"{member.name}: {why.rpartition(': ')[0]}: initialise its token first")
    if not held:
        check = Check(**generation.checks)
        _bring(
            [member],
            generation.number,
            plain_import,
            lambda *given: custody.restore(given[0], check, given[1], given[2]),
        )
    return generation


def bring_up(
    replication: Replication,
    members: Sequence[Member],
    member: Member,
    generation: Generation,
    report: Callable[[int, int], None],
) -> bulk.Outcome:
    """All objects to a member that is new; raises OperatorError."""
    try:
        replication.party.take_part(members, generation)
        outcome = bulk.bring_up(replication, member, report)
        names = replication.party.ledger.roster(members) or frozenset(m.name for m in members)
        _enrol(replication, names | {member.name}, members)
        return outcome
    except (*_FAILURES, Busy) as error:
        raise OperatorError(f"{error}: run it once more to go on") from None


@dataclass(frozen=True)
class Line:
    """One member and the domain key."""

    member: str
    good: bool
    generation: int
    check: str
    why: str

    def __str__(self) -> str:
        if self.why:
            return f"{self.member}: {self.why}"
        return f"{self.member}: generation {self.generation}, check value {self.check}"


def overview(members: Sequence[Member], found: Sequence[Holder]) -> list[Line]:
    """A line for each member of the group; raises OperatorError if nobody has a domain key."""
    generation, refused = agreed(found)
    known = {h.name for h in found}
    return [
        Line(
            member.name,
            member.name in known and member.name not in refused,
            generation.number,
            generation.check,
            refused.get(member.name, "") if member.name in known else f"away: {member.why}",
        )
        for member in members
    ]


_Ask = Callable[[Sequence[Target], Sequence[str], Any], Sealed]


def _bring(members: Sequence[Member], number: int, plain_import: bool, ask: _Ask) -> Generation:
    """Opens an entrance on each member, has the custodian seal the key for it, and takes it in."""
    entrances: dict[str, Entrance] = {}
    plain: list[str] = []
    try:
        for member in members:
            try:
                entrances[member.name] = domain.open_entrance(member)
            except Refused as error:
                if not plain_import:
                    raise OperatorError(f"{error}: --plain-import would create it from the clear") from None
                plain.append(member.name)
            except _FAILURES as error:
                raise OperatorError(f"{member.name}: {error}") from None
        targets = [Target(n, e.modulus, e.exponent, e.hash) for n, e in entrances.items()]  # type: ignore[arg-type]
        values: dict[str, Any] = {}

        def take(name: str, key: bytearray) -> None:
            values[name] = native.lib.ha_secret_new(native.ffi.from_buffer(key), len(key))

        try:
            sealed = ask(targets, plain, take if plain else None)
        except CustodyError as error:
            raise OperatorError(str(error)) from None
        generation = Generation(number, {"kwp": sealed.check.kwp, "kw": sealed.check.kw})
        try:
            _take_in(members, entrances, sealed, values, generation)
        finally:
            for value in values.values():
                native.lib.ha_secret_wipe(value)
        return generation
    finally:
        for member in members:
            if member.name in entrances:
                domain.close_entrance(member, entrances[member.name])


def _take_in(
    members: Sequence[Member],
    entrances: dict[str, Entrance],
    sealed: Sealed,
    values: dict[str, Any],
    generation: Generation,
) -> None:
    """On all of these members or on none."""
    done: list[tuple[Member, DomainKey]] = []
    try:
        for member in members:
            if member.name in entrances:
                ciphertext = sealed.ciphertexts[member.name]
                key = domain.bring_in(member, entrances[member.name], ciphertext, generation)
            else:
                value = values[member.name]
                pointer, size = native.lib.ha_secret_bytes(value), native.lib.ha_secret_size(value)
                key = domain.bring_in_plain(member, pointer, size, generation)
            done.append((member, key))
    except _FAILURES as error:
        for member, key in done:
            member.call("C_DestroyObject", member.session, key.handle)
        raise OperatorError(f"{error}: no member has the new domain key, its words are void") from None


def rotate(
    members: Sequence[Member],
    replication: Replication,
    shares: Shares | None,
    plain_import: bool,
    progress: Callable[[int, int], None],
) -> Generation:
    """A new generation on every member, all blobs under it, and the old one destroyed; raises OperatorError.

    Interrupted, it goes on from where it was: then no new key is made.
    """
    found = holders(members)
    current, refused = agreed(found)
    newest = max((key.generation for h in found for key in h.keys.values()), key=lambda g: g.number)
    if refused:
        raise OperatorError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    if all(len(h.keys) == 1 for h in found):
        new = _bring(
            members,
            current.number + 1,
            plain_import,
            lambda *given: custody.make(given[0], shares, given[1], given[2]),
        )
    elif all(h.keys.get(newest.number) for h in found):
        new = newest
    else:  # it was interrupted before anything was under the new key
        for member in members:
            domain.drop_all_but(member, [current])
        raise OperatorError("an interrupted rotation was undone: run it once more")
    try:
        replication.party.take_part(members, new)
        bulk.rewrap(replication, new, progress)
        for member in members:
            domain.drop_all_but(member, [new])
    except _FAILURES as error:
        raise OperatorError(f"{error}: run it once more to go on") from None
    return new
