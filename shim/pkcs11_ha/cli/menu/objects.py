"""Numbers 20 to 27: objects and their attributes."""

from __future__ import annotations

from pathlib import Path

from pkcs11_ha import ck
from pkcs11_ha.cli.menu import attributes, known
from pkcs11_ha.cli.menu.attributes import ValueForm, attribute_name
from pkcs11_ha.cli.menu.client import Value
from pkcs11_ha.cli.menu.desk import Desk, choice
from pkcs11_ha.cli.menu.dialogue import read_file

_KINDS = {
    "data": "a data object",
    "aes": "an AES key from its value",
    "secret": "a generic secret from its value",
    "cert": "an X.509 certificate from a DER file",
    "other": "attribute by attribute",
}
_CLASSES = {
    "any": None,
    "data": ck.CKO_DATA,
    "cert": ck.CKO_CERTIFICATE,
    "public": ck.CKO_PUBLIC_KEY,
    "private": ck.CKO_PRIVATE_KEY,
    "secret": ck.CKO_SECRET_KEY,
}
_SHOWN_AT_MOST = 200


def create_object(desk: Desk) -> None:
    """20"""
    session = desk.session()
    for kind, words in _KINDS.items():
        desk.say(f"  {kind:<8}{words}")
    kind = desk.dialogue.ask("Kind of object", choice(_KINDS), "data")
    template: dict[int, Value]
    if kind == "other":
        template = _typed(desk)
    else:
        template = {
            ck.CKA_LABEL: desk.dialogue.text("Label"),
            ck.CKA_TOKEN: desk.dialogue.yes("On the token, not of the session alone", default=session.writes),
            **_content(desk, kind),
        }
    desk.keep(session, desk.client.create(session.handle, template))


def _content(desk: Desk, kind: str) -> dict[int, Value]:
    """What only this kind of object has."""
    if kind == "data":
        return {ck.CKA_CLASS: ck.CKO_DATA, ck.CKA_VALUE: desk.data("Content")}
    if kind == "cert":
        value = desk.dialogue.ask("DER file", lambda text: read_file(Path(text)))
        subject = desk.dialogue.ask("Subject in DER (hexadecimal)", attributes.octets, "3000")
        return {
            ck.CKA_CLASS: ck.CKO_CERTIFICATE,
            ck.CKA_CERTIFICATE_TYPE: ck.CKC_X_509,
            ck.CKA_SUBJECT: subject,
            ck.CKA_VALUE: value,
        }
    value = desk.dialogue.ask("Value of the key (hexadecimal)", attributes.octets)
    template = known.aes(value) if kind == "aes" else known.generic(value)
    return {**template, ck.CKA_SENSITIVE: True, ck.CKA_EXTRACTABLE: False}


def _typed(desk: Desk) -> dict[int, Value]:
    """Attributes as ATTRIBUTE=VALUE until nothing is typed."""
    template: dict[int, Value] = {}

    def read(text: str) -> tuple[int, bytes] | None:
        if not text:
            return None
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueForm(f"{text!r} is not like CKA_LABEL=mine")
        kind = attributes.attribute_number(name)
        return kind, attributes.value_of(kind, value.strip())

    while (
        pair := desk.dialogue.ask("Attribute (like CKA_LABEL=mine, nothing: no more)", read, "")
    ) is not None:
        template[pair[0]] = pair[1]
    return template


def copy_object(desk: Desk) -> None:
    """21"""
    session = desk.session()
    source = desk.object(session, "Object")
    template: dict[int, Value] = {ck.CKA_LABEL: desk.dialogue.text("Label of the copy")}
    template[ck.CKA_TOKEN] = desk.dialogue.yes(
        "On the token, not of the session alone", default=session.writes
    )
    desk.keep(session, desk.client.copy(session.handle, source, template))


def destroy_object(desk: Desk) -> None:
    """22"""
    session = desk.session()
    handle = desk.object(session, "Object")
    desk.destroys(f"object {handle} ({desk.kind(session, handle)})")
    desk.client.destroy(session.handle, handle)
    desk.made = [each for each in desk.made if each != handle]


def show_size(desk: Desk) -> None:
    """23"""
    session = desk.session()
    handle = desk.object(session, "Object")
    size = desk.client.size(session.handle, handle)
    known_size = "its token does not tell" if size == ck.CK_UNAVAILABLE_INFORMATION else f"{size} bytes"
    desk.say(f"Size of object {handle}: {known_size}")


def get_attribute(desk: Desk) -> None:
    """24"""
    session = desk.session()
    handle = desk.object(session, "Object")
    kind = desk.dialogue.ask("Attribute (name, or 0xNUMBER)", attributes.attribute_number)
    value = desk.client.attribute(session.handle, handle, kind)
    desk.say(f"  {attribute_name(kind)}  {attributes.shown(kind, value, len(value))}")


def set_attribute(desk: Desk) -> None:
    """25"""
    session = desk.session()
    handle = desk.object(session, "Object")
    kind = desk.dialogue.ask("Attribute (name, or 0xNUMBER)", attributes.attribute_number)
    value = desk.dialogue.ask("New value", lambda text: attributes.value_of(kind, text), "")
    desk.client.set(session.handle, handle, {kind: value})


def find_objects(desk: Desk) -> None:
    """26"""
    session = desk.session()
    template: dict[int, Value] = {}
    wanted = desk.dialogue.ask(f"Class ({', '.join(_CLASSES)})", choice(_CLASSES), "any")
    number = _CLASSES[wanted]
    if number is not None:
        template[ck.CKA_CLASS] = number
    label = desk.dialogue.text("Label (nothing: any)", "")
    if label:
        template[ck.CKA_LABEL] = label
    identifier = desk.dialogue.ask("CKA_ID in hexadecimal (nothing: any)", attributes.octets, "")
    if identifier:
        template[ck.CKA_ID] = identifier
    template |= _typed(desk)
    found = desk.client.find(session.handle, template)
    desk.made = found
    for handle in found[:_SHOWN_AT_MOST]:
        desk.say(desk.row(session, handle))
    desk.say(
        f"{len(found)} objects"
        + (f", the first {_SHOWN_AT_MOST} shown" if len(found) > _SHOWN_AT_MOST else "")
    )


def display_object(desk: Desk) -> None:
    """27"""
    session = desk.session()
    handle = desk.object(session, "Object")
    values = desk.client.get(session.handle, handle, attributes.SHOWN)
    desk.say(f"Object {handle}")
    for kind in attributes.SHOWN:
        if kind in values:
            desk.say(
                f"  {attribute_name(kind):<26} {attributes.shown(kind, values[kind], desk.options.width)}"
            )
    if values.get(ck.CKA_SENSITIVE) == b"\1":
        desk.say("  What makes up the key is sensitive: it does not leave the token")
