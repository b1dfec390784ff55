"""Calls that make objects: carried to one member, and from there to all that are to have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core.ledger import Wrapped
from pkcs11_ha.core.template import TRUE, Nested, Template, for_seed, is_reserved, is_stateful
from pkcs11_ha.entry.carry import Carried
from pkcs11_ha.entry.life import slot_of
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.attributes import SAID_MAX, Changed, Filled, said
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.objects import Recipe, VirtualObject
from pkcs11_ha.runtime.placing import Seed, SeedLost
from pkcs11_ha.runtime.replication import Replication
from pkcs11_ha.runtime.service import Refused, mechanism
from pkcs11_ha.runtime.slot import VirtualSlot

# What the core reads of a template before anything is made; nothing that is secret.
_DECIDING = frozenset(
    {
        *(ck.CKA_TOKEN, ck.CKA_CLASS, ck.CKA_KEY_TYPE, ck.CKA_ID, ck.CKA_LABEL, ck.CKA_APPLICATION),
        *(ck.CKA_MODIFIABLE, ck.CKA_COPYABLE, ck.CKA_DESTROYABLE),
        *(ck.CKA_SENSITIVE, ck.CKA_EXTRACTABLE, ck.CKA_WRAP_WITH_TRUSTED, ck.CKA_START_DATE, ck.CKA_END_DATE),
    }
)
_SECRETS = frozenset(
    {
        *(ck.CKA_VALUE, ck.CKA_PRIVATE_EXPONENT, ck.CKA_PRIME_1, ck.CKA_PRIME_2, ck.CKA_EXPONENT_1),
        *(ck.CKA_EXPONENT_2, ck.CKA_COEFFICIENT, ck.CKA_SEED),
    }
)


def wish(array: Any, count: int) -> Template:
    """What an application's template says that decides how its object is made.  Raises CkError for our own names."""
    known = said(array, count, _DECIDING)
    if is_reserved(known):
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "a name that the group keeps for itself")
    vendor = {int(array[i].type) for i in range(count) if array[i].type & ck.CKA_VENDOR_DEFINED}
    return {**known, **(said(array, count, vendor) if vendor else {})}


Forward = Callable[[Any, Any, Sequence[Filled], Any], int]
"""(vendor function, ha_call, templates, CK_OBJECT_HANDLE[] for what is made) -> return value."""


@dataclass(frozen=True)
class Making:
    """One call that makes objects: what it takes besides the templates, one of which stands for each object."""

    name: str
    objects: tuple[int, ...]
    mechanism: Any
    templates: tuple[tuple[Any, int], ...]
    forward: Forward

    def carried(self, slot: VirtualSlot, session: Any, member: int | None = None) -> Carried:
        """Ready to be run; on one member alone if that is named."""
        carried = Carried(self.name, slot, session, self.objects, self.mechanism)
        return carried if member is None else carried.only(slot.by_index[member])

    def make(
        self,
        carried: Carried,
        templates: Sequence[Filled],
        after: Callable[[Sequence[int]], None] | None = None,
    ) -> list[int]:
        """Handles of what was made on the member that `carried` came to; `after`, given them, as of `Carried.run`.

        Raises CkError.
        """
        made = native.ffi.new("CK_OBJECT_HANDLE[]", len(self.templates))
        rv = carried.run(
            lambda function, call: self.forward(function, call, templates, made),
            None if after is None else lambda: after([int(handle) for handle in made]),
            once=bool(carried.call.creates_token),
        )
        if rv != ck.CKR_OK:
            raise CkError(rv)
        return [int(handle) for handle in made]


def carry_out(handle: int, making: Making, results: Sequence[Any]) -> None:
    """Makes what the application asks for, in a group that keeps its objects everywhere.  Raises CkError."""
    session = native.lib.ha_session_find(handle)
    slot = slot_of(session)
    wishes = [wish(array, count) for array, count in making.templates]
    if any(each.get(ck.CKA_TOKEN) == TRUE for each in wishes):
        known = _on_all(slot, session, making, wishes)
    else:
        known = _in_session(slot, session, making, wishes)
    for result, each in zip(results, known, strict=True):
        result[0] = each.handle


def _on_all(
    slot: VirtualSlot, session: Any, making: Making, wishes: Sequence[Template]
) -> list[VirtualObject]:
    replication = slot.replication
    if replication is None:
        return pinned(slot, session, making)
    if not all(each.get(ck.CKA_TOKEN) == TRUE for each in wishes):
        raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, "one half of a key pair in the session, one on the token")
    read_only = bool(native.lib.ha_session_read_only(session))
    replication.require(slot.user, read_only)
    generated_by = int(making.mechanism.mechanism) if making.mechanism else None
    if any(is_stateful(generated_by, each) for each in wishes):
        return pinned(slot, session, making)
    unable: dict[Member, Refused] = {}
    while True:
        try:
            known = replication.placing.spread(seed(slot, session, making, wishes, unable), wishes)
            replication.party.leave_unable(unable.values())
            return known
        except SeedLost as lost:  # one on another member, if that one is not left out by now
            if lost.refused:
                unable[lost.refused.member] = lost.refused
            replication.require(slot.user, read_only)  # another thread may have logged out
            if unable and unable.keys() >= set(replication.party.there()):
                first = next(iter(unable.values()))
                raise CkError(first.rv, str(first), first.member) from None


def seed(
    slot: VirtualSlot, session: Any, making: Making, wishes: Sequence[Template], unable: Iterable[Member] = ()
) -> Seed:
    """The same as session objects, in a form that can be wrapped; what is public needs no such form."""
    keys = _are_keys(wishes)
    templates = [
        Changed(array, count, for_seed(each, is_key=is_key))
        for (array, count), each, is_key in zip(making.templates, wishes, keys, strict=True)
    ]
    carried = making.carried(slot, session).without(unable)
    if slot.replication:
        carried.without(m for m in slot.members if not slot.replication.party.takes_part(m))
    handles = making.make(carried, templates)
    return Seed(slot.by_index[carried.index], carried.epoch, tuple(handles))


def _are_keys(wishes: Sequence[Template]) -> list[bool]:
    """Whether each object is a secret or private key: of a pair the second is."""
    if len(wishes) == 2:
        return [False, True]
    return [True]


def pinned(slot: VirtualSlot, session: Any, making: Making) -> list[VirtualObject]:
    """On one member: nobody copies keys in this group, or of two copies of a stateful signature key each would sign
    with what the other has used up.  Raises CkError."""
    if slot.replication and slot.replication.group.min_copies > 1:
        raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, "a key that must not be copied, and min_copies above 1")
    carried = making.carried(slot, session)
    carried.call.creates_token = any(wish(*each).get(ck.CKA_TOKEN) == TRUE for each in making.templates)
    known = _made(slot, session, carried, making)
    for each in known:
        slot.objects.pinned(each)
    return known


def _made(
    slot: VirtualSlot, session: Any, carried: Carried, making: Making, again: Recipe | None = None
) -> list[VirtualObject]:
    known: list[VirtualObject] = []
    templates = [Changed(array, count, {}) for array, count in making.templates]
    making.make(
        carried, templates, lambda handles: known.extend(adopted(slot, session, carried, handles, again))
    )
    return known


def adopted(
    slot: VirtualSlot,
    session: Any,
    carried: Carried,
    handles: Sequence[int],
    again: Recipe | None = None,
) -> list[VirtualObject]:
    """What a call has made, as the application knows it: all or nothing.  Raises CkError."""
    owner = int(native.lib.ha_session_handle(session))
    known: list[VirtualObject] = []
    try:
        known.extend(
            slot.objects.adopt(carried.index, carried.epoch, carried.session, handle, owner, again)
            for handle in handles
        )
    except CkError:
        for each in known:
            slot.objects.drop(each)
        raise
    if not all(each.identity.token for each in known):
        native.lib.ha_session_own(session, carried.index)
    return known


# ---- session objects ----


class Again:
    """The recipe of a session object: its call once more, with copies of all that the call was given.

    What is secret in it lies in locked memory.
    """

    def __init__(self, making: Making, kept: Any, templates: Sequence[_Locked]) -> None:
        self._call: tuple[Making, Any, Sequence[_Locked]] | None = (making, kept, templates)
        self.wrapped: Wrapped | None = None
        self.steps = 1

    def run(self, slot: VirtualSlot, session: Any, index: int) -> Carried | None:
        """Makes the object on a member; None if that cannot be.  `made` of the result is its handle there."""
        call = self._call  # and all that it points to, though another thread forgets it now
        if call is None:
            return None
        making, _, templates = call
        try:
            carried = making.carried(slot, session, index)
            carried.made = making.make(carried, templates)[0]
        except CkError:
            return None
        return carried

    def shared(self) -> Again | None:
        """The same for another object, which outlives this one."""
        if self._call is None:
            return None
        again = Again(*self._call)
        again.wrapped = self.wrapped
        return again

    def forget(self) -> None:
        self._call = None


_STEPS = 16  # of one recipe: who changes a session object without end has it on its member alone


class Then:
    """The recipe of a session object that was copied from another, or changed: that of before, and this step."""

    def __init__(self, before: Recipe, name: str, template: _Locked) -> None:
        self.before, self.name, self.template = before, name, template
        self.wrapped = before.wrapped
        self.steps: int = before.steps + 1

    def run(self, slot: VirtualSlot, session: Any, index: int) -> Carried | None:
        """As that of `Again`."""
        first = self.before.run(slot, session, index)
        if first is None:
            return None
        member, array, count = slot.by_index[index], self.template.array, self.template.count
        copies = self.name == "C_CopyObject"
        made = native.ffi.new("CK_OBJECT_HANDLE *", first.made)
        carried = Carried(self.name, slot, session).only(member)
        rv = carried.run(
            lambda function, call: int(
                function(call.member_session, first.made, array, count, *([made] if copies else []))
            )
        )
        if copies or rv != ck.CKR_OK:
            member.call_in(first.epoch, "C_DestroyObject", first.session, first.made)
        carried.made = int(made[0])
        return carried if rv == ck.CKR_OK else None

    def shared(self) -> Then | None:
        """As that of `Again`."""
        before = self.before.shared()
        return Then(before, self.name, self.template) if before is not None else None

    def forget(self) -> None:
        self.before.forget()


def then(before: Recipe | None, name: str, array: Any, count: int) -> Then | None:
    """One more step of a recipe, `name` with this template; None where there is no recipe, or no end of them."""
    if before is None or before.steps >= _STEPS or not _can_be_kept(array, count):
        return None
    return Then(before, name, _Locked(array, count))


class _Locked(Filled):
    """A deep copy of an application's template that can be kept; secret values in locked memory, wiped with it."""

    def __init__(self, array: Any, count: int) -> None:
        kinds = {int(array[i].type) for i in range(count)}
        secret = {int(array[i].type) for i in range(count) if array[i].pValue != native.ffi.NULL} & _SECRETS
        super().__init__(dict.fromkeys(kinds - secret, b"") | said(array, count, kinds - secret))
        self._locked: list[Any] = []
        held = native.ffi.new("CK_ATTRIBUTE[]", count or 1)
        for place in range(self.count):
            held[place] = self.array[place]
        self._kept.append(self.array)
        for i in range(count):
            if int(array[i].type) in secret:
                copy = native.lib.ha_secret_new(array[i].pValue, array[i].ulValueLen)
                if not copy:
                    raise CkError(ck.CKR_HOST_MEMORY)
                self._locked.append(native.ffi.gc(copy, native.lib.ha_secret_wipe))
                held[self.count].type = array[i].type
                held[self.count].pValue = native.lib.ha_secret_bytes(copy)
                held[self.count].ulValueLen = array[i].ulValueLen
                self.count += 1
        self.array = held


def _can_be_kept(array: Any, count: int) -> bool:
    """Whether all of a template lies in itself: no templates in it, nothing too long, no length alone."""
    return all(
        not array[i].type & ck.CKF_ARRAY_ATTRIBUTE
        and array[i].ulValueLen < (SAID_MAX if array[i].pValue != native.ffi.NULL else 1)
        for i in range(count)
    )


def recipe(making: Making) -> Again | None:
    """How to make the object again; None where that cannot be known: a mechanism of unknown layout, or a template
    that cannot be kept."""
    ((array, count),) = making.templates
    if not _can_be_kept(array, count):
        return None
    kept = None
    if making.mechanism:
        kept = native.lib.ha_mechanism_copy(making.mechanism)
        if not kept:
            return None
        kept = native.ffi.gc(kept, native.lib.ha_mechanism_forget)
    copy = _Locked(array, count)
    taken = native.lib.ha_mechanism_kept(kept) if kept is not None else None
    again = Making(making.name, making.objects, taken, ((copy.array, copy.count),), making.forward)
    return Again(again, kept, [copy])


class Unwrapped:
    """The recipe of a generated session key: to unwrap it once more under the domain key."""

    def __init__(
        self, replication: Replication, wrapped: Wrapped, template: Mapping[int, bytes | Nested]
    ) -> None:
        self.replication, self.template = replication, template
        self.wrapped: Wrapped | None = wrapped
        self.blob = wrapped
        self.steps = 1

    def run(self, slot: VirtualSlot, session: Any, index: int) -> Carried | None:
        """As that of `Again`."""
        keys = self.replication.party.keys.get(slot.by_index[index].name, {})
        key = keys.get(self.blob.generation)
        if key is None or self.blob.form not in key.spellings:
            return None
        spelling, filled = mechanism(key.spellings[self.blob.form]), Filled(self.template)
        made = native.ffi.new("CK_OBJECT_HANDLE *")
        blob = self.blob.blob
        carried = Carried("C_UnwrapKey", slot, session).only(slot.by_index[index])
        rv = carried.run(
            lambda function, call: int(
                function(
                    *(call.member_session, spelling, key.handle, blob, len(blob)),
                    *(filled.array, filled.count, made),
                )
            )
        )
        carried.made = int(made[0])
        return carried if rv == ck.CKR_OK else None

    def shared(self) -> Unwrapped:
        """As that of `Again`."""
        return self

    def forget(self) -> None:
        """It holds nothing that is secret."""


_MADE_BY_CHANCE = ("C_GenerateKey", "C_GenerateKeyPair", "C_EncapsulateKey")


def _in_session(
    slot: VirtualSlot, session: Any, making: Making, wishes: Sequence[Template]
) -> list[VirtualObject]:
    """On one member; on another when it is needed there, if its call tells all there is to it."""
    replication, by_chance = slot.replication, making.name in _MADE_BY_CHANCE
    can_change = replication is not None and replication.group.session_keys == "replicate"
    if replication and can_change and by_chance and len(wishes) == 1:
        return [_wrapped_in_session(slot, session, making, wishes[0], replication)]
    again = None if by_chance or is_stateful(None, wishes[0]) else recipe(making)
    return _made(slot, session, making.carried(slot, session), making, again)


def _wrapped_in_session(
    slot: VirtualSlot, session: Any, making: Making, wanted: Template, replication: Replication
) -> VirtualObject:
    """A generated session key that can change members: a copy, as wished, of one that could be wrapped."""
    ((array, count),) = making.templates
    carried = making.carried(slot, session)
    known: list[VirtualObject] = []

    def finish(handles: Sequence[int]) -> None:
        known.append(_as_wished(slot, session, carried, handles[0], wanted, replication))

    making.make(carried, [Changed(array, count, for_seed(wanted, is_key=True))], finish)
    return known[0]


def _as_wished(
    slot: VirtualSlot, session: Any, carried: Carried, first: int, wanted: Template, replication: Replication
) -> VirtualObject:
    member = slot.by_index[carried.index]
    try:
        wrapped, template, final = replication.copying.of_session(member, first, wanted)
        again = Unwrapped(replication, wrapped, template) if wrapped is not None else None
        copying = _copied(slot, session, member, first, final) or (
            again.run(slot, session, carried.index) if again else None
        )
        if copying is None and not (member.epoch == carried.epoch and member.probe()):
            raise CkError(ck.CKR_DEVICE_ERROR, "C_CopyObject", member)  # it has died: on another
        if copying is None:
            raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, "the key cannot be had as wished", member)
    finally:
        member.call_in(carried.epoch, "C_DestroyObject", carried.session, first)
    return adopted(slot, session, copying, [copying.made], again)[0]


def _copied(
    slot: VirtualSlot, session: Any, member: Member, handle: int, final: Mapping[int, bytes]
) -> Carried | None:
    """C_CopyObject in the application's own session; None if the member does not do it so."""
    filled, made = Filled(final), native.ffi.new("CK_OBJECT_HANDLE *")
    carried = Carried("C_CopyObject", slot, session).only(member)
    rv = carried.run(
        lambda function, call: int(function(call.member_session, handle, filled.array, filled.count, made))
    )
    carried.made = int(made[0])
    return carried if rv == ck.CKR_OK else None


# ---- the calls of the standard ----


def _generate_key(handle: int, mechanism_: Any, template: Any, count: int, key: Any) -> None:
    def forward(function: Any, call: Any, templates: Sequence[Filled], made: Any) -> int:
        (one,) = templates
        return int(function(call.member_session, call.member_mechanism, one.array, one.count, made))

    carry_out(handle, Making("C_GenerateKey", (), mechanism_, ((template, count),), forward), (key,))


def _generate_key_pair(
    handle: int,
    mechanism_: Any,
    public: Any,
    public_count: int,
    private: Any,
    private_count: int,
    public_key: Any,
    private_key: Any,
) -> None:
    def forward(function: Any, call: Any, templates: Sequence[Filled], made: Any) -> int:
        one, two = templates
        given = (one.array, one.count, two.array, two.count)
        return int(function(call.member_session, call.member_mechanism, *given, made, made + 1))

    templates = ((public, public_count), (private, private_count))
    making = Making("C_GenerateKeyPair", (), mechanism_, templates, forward)
    carry_out(handle, making, (public_key, private_key))


def _unwrap_key(
    handle: int, mechanism_: Any, key: int, wrapped: Any, size: int, template: Any, count: int, made_key: Any
) -> None:
    blob = _held(wrapped, size)

    def forward(function: Any, call: Any, templates: Sequence[Filled], made: Any) -> int:
        (one,) = templates
        given = (call.member_session, call.member_mechanism, call.member_object[0], blob, size)
        return int(function(*given, one.array, one.count, made))

    carry_out(handle, Making("C_UnwrapKey", (key,), mechanism_, ((template, count),), forward), (made_key,))


def _unwrap_key_authenticated(
    handle: int,
    mechanism_: Any,
    key: int,
    wrapped: Any,
    size: int,
    template: Any,
    count: int,
    data: Any,
    data_size: int,
    made_key: Any,
) -> None:
    blob, associated = _held(wrapped, size), _held(data, data_size)

    def forward(function: Any, call: Any, templates: Sequence[Filled], made: Any) -> int:
        (one,) = templates
        given = (call.member_session, call.member_mechanism, call.member_object[0], blob, size)
        return int(function(*given, one.array, one.count, associated, data_size, made))

    making = Making("C_UnwrapKeyAuthenticated", (key,), mechanism_, ((template, count),), forward)
    carry_out(handle, making, (made_key,))


def _derive_key(handle: int, mechanism_: Any, key: int, template: Any, count: int, made_key: Any) -> None:
    def forward(function: Any, call: Any, templates: Sequence[Filled], made: Any) -> int:
        (one,) = templates
        given = (call.member_session, call.member_mechanism, call.member_object[0])
        return int(function(*given, one.array, one.count, made))

    carry_out(handle, Making("C_DeriveKey", (key,), mechanism_, ((template, count),), forward), (made_key,))


def _encapsulate_key(
    handle: int, mechanism_: Any, key: int, template: Any, count: int, text: Any, size: Any, made_key: Any
) -> None:
    capacity = int(size[0])

    def forward(function: Any, call: Any, templates: Sequence[Filled], made: Any) -> int:
        (one,) = templates
        size[0] = capacity
        given = (call.member_session, call.member_mechanism, call.member_object[0])
        return int(function(*given, one.array, one.count, text, size, made))

    making = Making("C_EncapsulateKey", (key,), mechanism_, ((template, count),), forward)
    carry_out(handle, making, (made_key,))


def _decapsulate_key(
    handle: int, mechanism_: Any, key: int, template: Any, count: int, text: Any, size: int, made_key: Any
) -> None:
    ciphertext = _held(text, size)

    def forward(function: Any, call: Any, templates: Sequence[Filled], made: Any) -> int:
        (one,) = templates
        given = (call.member_session, call.member_mechanism, call.member_object[0])
        return int(function(*given, one.array, one.count, ciphertext, size, made))

    making = Making("C_DecapsulateKey", (key,), mechanism_, ((template, count),), forward)
    carry_out(handle, making, (made_key,))


def _held(pointer: Any, size: int) -> Any:
    """A copy of an input, as a recipe may outlive the call."""
    copy = native.ffi.new("CK_BYTE[]", max(1, size))
    if size:
        native.ffi.memmove(copy, pointer, size)
    return copy


HANDLERS: dict[str, Callable[..., int | None]] = {
    "C_GenerateKey": _generate_key,
    "C_GenerateKeyPair": _generate_key_pair,
    "C_UnwrapKey": _unwrap_key,
    "C_UnwrapKeyAuthenticated": _unwrap_key_authenticated,
    "C_DeriveKey": _derive_key,
    "C_EncapsulateKey": _encapsulate_key,
    "C_DecapsulateKey": _decapsulate_key,
}
