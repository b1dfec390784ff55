"""Copies of a key or object on one member: under the domain key, or by what another member shows of it."""

from __future__ import annotations

from collections.abc import Mapping

from pkcs11_ha import ck
from pkcs11_ha.core import wrapping
from pkcs11_ha.core.ledger import Entry, Wrapped
from pkcs11_ha.core.template import (
    FALSE,
    USAGE,
    Nested,
    Template,
    contradictions,
    for_copy,
    may_be_tagged,
    named,
    tag,
    wished,
)
from pkcs11_ha.runtime import attributes, native
from pkcs11_ha.runtime.attributes import Filled
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.party import Party
from pkcs11_ha.runtime.service import MemberFault, Refused, create, destroy, do, mechanism, on, unwrap, wrap
from pkcs11_ha.runtime.whereabouts import Whereabouts


class Copying:
    """Makes objects; what the ledger says of them is for others to write."""

    def __init__(self, party: Party, whereabouts: Whereabouts) -> None:
        self.party = party
        self.whereabouts = whereabouts

    def wrap(self, member: Member, handle: int) -> Wrapped:
        """A key under the domain key, in a form that all who are there can read."""
        if self.party.generation is None:
            why = f"no domain key: p11ha domain init {self.party.group.label}"
            raise self.party.rejected(why, ck.CKR_FUNCTION_FAILED)
        number = self.party.generation.number
        spellings = [self.party.keys[m.name][number].spellings for m in self.party.there()]
        form = wrapping.form_for(spellings)
        if form is None:
            raise self.party.rejected("the members share no form of AES key wrap", ck.CKR_MECHANISM_INVALID)
        key = self.party.keys[member.name][number]
        with on(member):
            blob = wrap(member, mechanism(key.spellings[form]), key.handle, handle)
            shown = attributes.read(member, member.session, handle, (ck.CKA_CLASS, ck.CKA_VALUE_LEN))
        return Wrapped(number, form, blob, int.from_bytes(shown.get(ck.CKA_VALUE_LEN, b""), "little"))

    @staticmethod
    def copy_within(member: Member, handle: int, changes: Mapping[int, bytes]) -> int:
        filled, made = Filled(changes), native.ffi.new("CK_OBJECT_HANDLE *")
        do(member, "C_CopyObject", member.session, handle, filled.array, filled.count, made)
        return int(made[0])

    def make_on(self, member: Member, entry: Entry, template: Template, point: bytes | None) -> int:
        """Makes an object on a member by the blob of its entry, or by its attributes; the handle.

        Raises MemberFault, Refused.
        """
        wanted = for_copy(template)
        with on(member):
            if entry.wrapped is None:
                return create(member, wanted)
            key = self.party.keys[member.name].get(entry.wrapped.generation)
            if key is None or entry.wrapped.form not in key.spellings:
                raise Refused(member, ck.CKR_UNWRAPPING_KEY_HANDLE_INVALID, "C_UnwrapKey")
            wanted |= wrapping.extras(member.profile, entry.name.type, point)
            spelling = mechanism(key.spellings[entry.wrapped.form])
            made = unwrap(member, spelling, key.handle, entry.wrapped.blob, wanted)
            self._restrict(member, made, wanted)
            return made

    def _restrict(self, member: Member, handle: int, wanted: Template) -> None:
        """NSS permits a private key it has unwrapped what was not asked for; it takes that back when told.

        Raises MemberFault, Refused where it does not, and then the key is gone again.
        """
        usage = [number for number in USAGE if wanted.get(number) == FALSE]
        shown = attributes.read(member, member.session, handle, usage) if usage else {}
        beyond = {number: FALSE for number, value in shown.items() if any(value)}
        if beyond:
            try:
                filled = Filled(beyond)
                do(member, "C_SetAttributeValue", member.session, handle, filled.array, filled.count)
                shown = attributes.read(member, member.session, handle, list(beyond))
                if any(any(value) for value in shown.values()):
                    raise Refused(
                        member, ck.CKR_TEMPLATE_INCONSISTENT, "a copy that permits more; C_UnwrapKey"
                    )
            except Refused:
                destroy(member, handle)
                raise

    def keeps(self, member: Member, wrapped: Wrapped) -> bool:
        """Whether a key comes out there as it went in: SoftHSM fills secret keys of odd lengths with zeros, against
        RFC 5649."""
        return wrapped.size % 8 == 0 or self.party.keeps_lengths(member)

    def copy_over(self, member: Member, target: Entry, reference: Member, handle: int) -> tuple[int, bool]:
        """Makes an object on a member, as another one shows it there.  Raises MemberFault, Refused.

        Its handle, and whether it is marked as new.
        """
        if target.wrapped is None and target.name.object_class in (ck.CKO_SECRET_KEY, ck.CKO_PRIVATE_KEY):
            raise Refused(member, ck.CKR_KEY_UNEXTRACTABLE, "a key of which there is no blob; C_UnwrapKey")
        with on(reference):
            shown = attributes.template_of(reference, reference.session, handle)
        mark = tag(target.uid) if may_be_tagged(target.name.object_class, shown) else {}
        final = {n: v for n, v in shown.items() if isinstance(v, bytes)}
        point = self.whereabouts.point_of(reference, target.name) if member.profile == "nss" else None
        made = self.make_on(member, target, {**shown, **target.change, **named(target.name), **mark}, point)
        with on(member):
            now = attributes.read(member, member.session, made, tuple(final))
        if contradictions(final, now):
            destroy(member, made)
            raise Refused(member, ck.CKR_TEMPLATE_INCONSISTENT, "a copy that guards its key less")
        return made, bool(mark)

    def of_session(
        self, member: Member, handle: int, wish: Template
    ) -> tuple[Wrapped | None, dict[int, bytes | Nested], dict[int, bytes]]:
        """A generated session key's blob, the template of its copies, and what the key itself is to have yet.

        No blob: it cannot be wrapped.  Raises CkError.
        """
        final = wished(wish, is_key=True)
        try:
            wrapped = self.wrap(member, handle)
            with on(member):
                shown = attributes.template_of(member, member.session, handle)
        except MemberFault as fault:
            self.party.leave(fault)
            raise CkError(ck.CKR_DEVICE_ERROR, str(fault)) from None
        except Refused as error:
            if error.rv in wrapping.NOT_WRAPPABLE:
                return None, {}, final
            raise CkError(error.rv, str(error), error.member) from None
        keeps = all(self.keeps(other, wrapped) for other in self.party.there())
        return wrapped if keeps else None, {**for_copy({**shown, **final}), ck.CKA_TOKEN: FALSE}, final
