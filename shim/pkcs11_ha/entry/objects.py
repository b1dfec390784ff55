"""Objects made from a template, copied, changed and destroyed: on every member that is there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core.template import FALSE, TRUE, Template, is_stateful, renamed, ulong
from pkcs11_ha.entry import making
from pkcs11_ha.entry.carry import Carried
from pkcs11_ha.entry.life import current, slot_of
from pkcs11_ha.entry.questions import blame
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.attributes import said
from pkcs11_ha.runtime.member import Member, MemberState
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.objects import Recipe, VirtualObject
from pkcs11_ha.runtime.placing import SeedLost
from pkcs11_ha.runtime.slot import VirtualSlot


def _create_object(handle: int, template: Any, count: int, result: Any) -> int | None:
    session = native.lib.ha_session_find(handle)
    slot = slot_of(session)
    wanted = making.wish(template, count)

    def forward(function: Any, call: Any, templates: Any, made: Any) -> int:
        return int(function(call.member_session, templates[0].array, templates[0].count, made))

    call = making.Making("C_CreateObject", (), None, ((template, count),), forward)
    if is_stateful(None, wanted) and wanted.get(ck.CKA_CLASS) == ulong(ck.CKO_PRIVATE_KEY):
        if slot.replication and wanted.get(ck.CKA_TOKEN) == TRUE:
            slot.replication.require(slot.user, bool(native.lib.ha_session_read_only(session)))
        result[0] = making.pinned(slot, session, call)[0].handle
        return None
    if slot.replication and wanted.get(ck.CKA_TOKEN) == TRUE:
        result[0] = _created_everywhere(slot, session, call, wanted).handle
        return None

    def make(function: Any, call: Any, made: Any) -> int:
        return int(function(call.member_session, template, count, made))

    token = wanted.get(ck.CKA_TOKEN) == TRUE
    again = None if token else making.recipe(call)
    return _make("C_CreateObject", slot, session, (), make, result, again, once=token)


def _created_everywhere(
    slot: VirtualSlot, session: Any, call: making.Making, wanted: Template
) -> VirtualObject:
    """A key is made once more as a session object, to be wrapped for members that are away."""
    assert slot.replication
    is_key = wanted.get(ck.CKA_CLASS) in (ulong(ck.CKO_SECRET_KEY), ulong(ck.CKO_PRIVATE_KEY))
    ((template, count),) = call.templates
    while True:  # and another thread may have logged out meanwhile
        slot.replication.require(slot.user, bool(native.lib.ha_session_read_only(session)))
        seed = making.seed(slot, session, call, [wanted]) if is_key else None
        try:
            return slot.replication.placing.create(template, count, seed)[0]
        except SeedLost:  # its member is left out by now: one on another
            continue


def _copy_object(handle: int, source: int, template: Any, count: int, result: Any) -> int | None:
    session = native.lib.ha_session_find(handle)
    slot = slot_of(session)
    known = slot.objects.get(source)  # it exists
    wanted = making.wish(template, count)
    token = wanted.get(ck.CKA_TOKEN, TRUE if known.identity.token else FALSE)
    if slot.replication and token == TRUE:
        slot.replication.require(slot.user, bool(native.lib.ha_session_read_only(session)))
        result[0] = slot.replication.placing.copy(known, template, count)[0].handle
        return None

    def make(function: Any, call: Any, made: Any) -> int:
        return int(function(call.member_session, call.member_object[0], template, count, made))

    again = None if token == TRUE else _recipe_of_copy(known, template, count)
    return _make("C_CopyObject", slot, session, (source,), make, result, again, once=token == TRUE)


def _recipe_of_copy(source: VirtualObject, template: Any, count: int) -> Recipe | None:
    """From the object of a session as that is made, which may be gone by then; from one of the token as it is."""
    if source.recipe is not None:
        return making.then(source.recipe.shared(), "C_CopyObject", template, count)
    if not source.identity.token:
        return None

    def forward(function: Any, call: Any, templates: Any, made: Any) -> int:
        given = (call.member_session, call.member_object[0], templates[0].array, templates[0].count)
        return int(function(*given, made))

    copying = making.Making("C_CopyObject", (source.handle,), None, ((template, count),), forward)
    return making.recipe(copying)


def _make(
    name: str,
    slot: VirtualSlot,
    session: Any,
    objects: tuple[int, ...],
    make: Callable[[Any, Any, Any], int],
    result: Any,
    again: Recipe | None = None,
    *,
    once: bool,
) -> int:
    """Makes an object on one member and on all others that are there.

    The template holds all there is to it, so a member that dies meanwhile is no obstacle: if it made the object
    before it died, that one is recognised when it returns.
    """
    made = native.ffi.new("CK_OBJECT_HANDLE *")
    adopted: list[VirtualObject] = []
    first = Carried(name, slot, session, objects)
    rv = first.run(
        lambda function, call: make(function, call, made),
        lambda: adopted.extend(making.adopted(slot, session, first, [int(made[0])], again)),
        once=once,
    )
    if rv != ck.CKR_OK:
        return rv
    known, token = adopted[0], adopted[0].identity.token
    for member in _others(slot, first.index):
        carried = Carried(name, slot, session, objects).only(member)
        rv = carried.run(lambda function, call: make(function, call, made))
        if rv == ck.CKR_OK:
            slot.objects.also_at(known, carried.index, carried.epoch, int(made[0]))
            if not token:
                native.lib.ha_session_own(session, carried.index)
        elif token and member.state is MemberState.UP:
            _partial(slot, member, name, rv)
    if len(known.at) == 1:
        slot.objects.pinned(known)
    result[0] = known.handle
    return ck.CKR_OK


def _others(slot: VirtualSlot, index: int) -> list[Member]:
    return [member for member in slot.writable() if slot.index(member) != index]


def _partial(slot: VirtualSlot, member: Member, name: str, rv: int) -> None:
    current().log(
        Event("write.partial", slot.face.label, member.name, {"call": name, "code": ck.rv_name(rv)})
    )


def _holders(slot: VirtualSlot, known: VirtualObject) -> list[Member]:
    """Members that are there and have the object, in the group's order; asked, where it is not known."""
    if not known.identity.token:
        return [member for member in slot.writable() if slot.objects.is_at(known, slot.index(member))]
    holders = []
    for member in slot.writable():
        try:
            if slot.objects.handle_at(known, slot.index(member)):
                holders.append(member)
        except CkError as error:
            blame(slot, error, "C_FindObjects")
            if member.state is MemberState.UP:
                raise
    return holders


def _on_every_holder(
    name: str, slot: VirtualSlot, session: Any, known: VirtualObject, act: Callable[[Any, Any], int]
) -> list[Carried]:
    """The same call on every member that has the object; raises CkError if nobody did it.

    The first answer decides: if it is an error nothing was changed anywhere.
    """
    done: list[Carried] = []
    failure = ck.CKR_OK
    holders = _holders(slot, known)
    for member in holders:
        carried = Carried(name, slot, session, (known.handle,)).only(member)
        rv = carried.run(act)
        if rv == ck.CKR_OK:
            done.append(carried)
        elif not known.identity.token and not slot.objects.is_at(known, slot.index(member)):
            continue  # it went with the session that made it there
        elif not done and member.state is MemberState.UP:
            raise CkError(rv)
        elif member.state is MemberState.UP:
            _partial(slot, member, name, rv)
            failure = rv
    if failure != ck.CKR_OK:
        for carried in done:  # what was destroyed there may give its number to another object
            slot.objects.forget(known.handle, carried.index)
        raise CkError(failure)
    if not done:
        raise CkError(
            ck.CKR_DEVICE_ERROR if slot.serving_mask == 0 or known.at else ck.CKR_OBJECT_HANDLE_INVALID
        )
    return done


def _set_attribute_value(handle: int, object_: int, template: Any, count: int) -> None:
    session = native.lib.ha_session_find(handle)
    slot = slot_of(session)
    known = slot.objects.get(object_)
    making.wish(template, count)  # none of our own names
    if slot.replication and known.identity.token:
        slot.replication.require(slot.user, bool(native.lib.ha_session_read_only(session)))
        slot.replication.changing.change(known, template, count)
        return
    done = _on_every_holder(
        "C_SetAttributeValue",
        slot,
        session,
        known,
        lambda function, call: int(function(call.member_session, call.member_object[0], template, count)),
    )
    for carried in done:
        with suppress(CkError):  # it has changed it, and died since
            slot.objects.renew(known, carried.index, carried.session)
            break
    else:
        slot.objects.rename(known, renamed(known.identity.name, said(template, count)))
    before, known.recipe = known.recipe, making.then(known.recipe, "C_SetAttributeValue", template, count)
    if before is not None and known.recipe is None:
        before.forget()


def _destroy_object(handle: int, object_: int) -> None:
    session = native.lib.ha_session_find(handle)
    slot = slot_of(session)
    if slot.objects.has_died(object_):
        return
    known = slot.objects.get(object_)
    if slot.replication and known.identity.token:
        slot.replication.require(slot.user, bool(native.lib.ha_session_read_only(session)))
        slot.replication.changing.destroy(known)
        return
    try:
        _on_every_holder(
            "C_DestroyObject",
            slot,
            session,
            known,
            lambda function, call: int(function(call.member_session, call.member_object[0])),
        )
    except CkError:
        if known.identity.token or any(slot.objects.is_at(known, i) for i in range(len(slot.by_index))):
            raise  # else it has died with the last that had it
    reached = slot.writable()
    away = sum(1 << slot.index(m) for m in slot.members if m not in reached)
    slot.objects.destroyed_while_away(known, away)
    slot.objects.drop(known)
    slot.objects.has_died(object_)  # meanwhile: that is over, too


HANDLERS: dict[str, Callable[..., int | None]] = {
    "C_CreateObject": _create_object,
    "C_CopyObject": _copy_object,
    "C_SetAttributeValue": _set_attribute_value,
    "C_DestroyObject": _destroy_object,
}
