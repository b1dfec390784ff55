"""Replication: what is made, changed or destroyed in a group is so on every member, whoever dies in between.

A write is announced in the ledger of all members that are there, done on one member after the other, and marked
there as done (`placing`, `changing`); `core.ledger` says what follows from the marks.  What was begun and not ended is
brought to its end at the next login or when a member returns (`settling`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pkcs11_ha import ck
from pkcs11_ha.config import GroupConfig
from pkcs11_ha.core import domain as domains
from pkcs11_ha.runtime import domain
from pkcs11_ha.runtime.changing import Changing
from pkcs11_ha.runtime.copying import Copying
from pkcs11_ha.runtime.ledger import Busy
from pkcs11_ha.runtime.member import ConnectError, Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.party import Party
from pkcs11_ha.runtime.placing import Placing
from pkcs11_ha.runtime.service import MemberFault, Refused
from pkcs11_ha.runtime.settling import Settling
from pkcs11_ha.runtime.whereabouts import Unproven, Whereabouts


class Replication:
    """Of one group.  The only writer of token objects, ledger and domain keys there, besides the CLI's commands."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self.whereabouts = Whereabouts(self.party)
        self.copying = Copying(self.party, self.whereabouts)
        self.settling = Settling(self.party, self.whereabouts, self.copying)
        self.changing = Changing(self.party, self.whereabouts, self.settling)
        self.placing = Placing(self.party, self.whereabouts, self.copying, self.settling, self.changing)
        party.objects.is_one = self.whereabouts.is_one
        self.is_by_hand = False  # a command is at work, and decides itself who takes part

    @property
    def group(self) -> GroupConfig:
        """As it is configured now."""
        return self.party.group

    def begin(self, members: Sequence[Member]) -> None:
        """After the login: who has the group's domain key takes part, and all are brought up to date."""
        if self.is_by_hand:
            return
        with self.party.lock:
            held = {}
            for member in members:
                self.party.dismiss(member)  # what was known of it may be of a life before this
                keys = self.party.look(member)
                if keys is not None:
                    held[member.name] = {number: key.generation for number, key in keys.items()}
            agreement = domains.agree(held)
            self.party.generation = agreement.generation
            for member in members:
                if member.name not in held:
                    continue
                why = agreement.refused.get(member.name)
                if why:
                    self.party.refuse(member, why)
                else:
                    self.party.admit(member)
            self._settle_all()

    def _settle_all(self) -> None:
        while self.party.there():
            try:
                self._meet()
                self.settling.settle()
                return
            except MemberFault as fault:
                self.party.leave(fault)
            except Refused as error:  # of a search or a reading: that member cannot be worked with
                self.party.leave(MemberFault(error.member, error.rv, error.call))

    def tend(self) -> None:
        """Settles what other processes left open since, unless there is a write of our own to wait for."""
        if self.is_by_hand or not self.party.lock.acquire(blocking=False):
            return
        try:
            self._settle_all()
        finally:
            self.party.lock.release()

    def _meet(self) -> None:
        """Members that were never admitted, or were dismissed, are refused: what they hold may be long destroyed."""
        self.party.names = self.party.ledger.roster(self.party.there())
        for member in self.party.there():
            if why := self._stranger(member):
                self.party.refuse(member, why)

    def _stranger(self, member: Member) -> str:
        """Why it may not take part, empty if it may."""
        names = self.party.names
        known = names is None or member.name in names
        return "" if known else f"it was never admitted to the group: p11ha domain admit {member.name}"

    def admit_back(self, member: Member) -> None:
        """A member that returns, logged in: fit and up to date, or ConnectError says why not."""
        if self.is_by_hand:
            return
        with self.party.lock:
            self.party.dismiss(member)
            try:
                keys = self.party.keys[member.name] = domain.keys_of(member)
                if self.party.generation is not None:
                    own = {number: key.generation for number, key in keys.items()}
                    why = domains.lacks(member.name, own, self.party.generation)
                    if why:
                        raise ConnectError(ck.CKR_DEVICE_ERROR, why)
                elif keys:
                    self.party.generation = keys[max(keys)].generation
                self.party.admit(member)
                self.party.names = self.party.ledger.roster(self.party.there())
                if why := self._stranger(member):
                    raise ConnectError(ck.CKR_DEVICE_ERROR, why)
                self.settling.settle(member)
            except (MemberFault, Refused, CkError, Busy, Unproven) as error:
                self.party.dismiss(member)
                if isinstance(error, MemberFault) and error.member is not member:
                    self.party.leave(error)
                raise ConnectError(getattr(error, "rv", ck.CKR_DEVICE_ERROR), str(error)) from None
            except ConnectError:
                self.party.dismiss(member)
                raise

    def require(self, user: int, read_only: bool) -> list[Member]:
        """Who can be written to now.  Raises CkError where the group cannot take a token object."""
        if read_only:
            raise CkError(ck.CKR_SESSION_READ_ONLY)
        if user != ck.CKU_USER:
            raise CkError(ck.CKR_USER_NOT_LOGGED_IN)  # the ledger is private
        there = self.party.there()
        if not there:
            raise CkError(ck.CKR_DEVICE_ERROR)
        away = self.party.roster() - {member.name for member in there}
        if len(there) < self.party.group.min_copies:
            raise self.party.rejected(
                f"{len(there)} members are there, min_copies wants {self.party.group.min_copies}"
            )
        if away and not self.party.ledger.can_keep(there):
            raise self.party.rejected(f"{', '.join(sorted(away))} is away, and nobody keeps the ledger")
        return there
