"""What a token holds, every attribute of every object, as the vendor's own module shows it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from demo.members import SoftToken
from tests import p11
from tests.ha.app import bare

if TYPE_CHECKING:
    from collections.abc import Iterator

RESERVED = b"pkcs11-ha "
"""How the names of what the group keeps for itself begin."""
DOMAIN_KEY = RESERVED + b"domain key"
SECRET = "sensitive"
"""What stands for a value that the token does not give."""

Nested = tuple[tuple[int, bytes], ...]
Shown = Mapping[str, bytes | str | Nested]
"""Name of the attribute -> its value, SECRET, another code it is answered with, or the attributes inside."""


class Attribute(ctypes.Structure):
    """CK_ATTRIBUTE."""

    _fields_ = (("type", ctypes.c_ulong), ("value", ctypes.c_void_p), ("size", ctypes.c_ulong))


@cache
def names() -> dict[int, str]:
    """All attributes of the standard: number -> name."""
    from tests.p11 import _CONSTANTS

    return {n: name for name, n in reversed(_CONSTANTS.items()) if name.startswith("CKA_")}


def everything(session: p11.Session, handle: int) -> dict[str, bytes | str | Nested]:
    """Every attribute that the module shows of an object, or says is sensitive."""
    shown: dict[str, bytes | str | Nested] = {}
    for number, name in names().items():
        try:
            if number & p11.CKF_ARRAY_ATTRIBUTE and number != p11.CKA_ALLOWED_MECHANISMS:
                shown[name] = nested(session, handle, number)
            else:
                (shown[name],) = session.get(handle, number)
        except p11.CkError as error:
            if error.rv == p11.CKR_ATTRIBUTE_SENSITIVE:
                shown[name] = SECRET
            elif error.rv != p11.CKR_ATTRIBUTE_TYPE_INVALID:
                shown[name] = error.name
    return shown


def nested(session: p11.Session, handle: int, number: int) -> Nested:
    """The attributes inside an attribute."""
    outside = Attribute(type=number)
    session.call("C_GetAttributeValue", handle, ctypes.byref(outside), 1)
    inside = (Attribute * (outside.size // ctypes.sizeof(Attribute)))()
    outside.value = ctypes.addressof(inside)
    session.call("C_GetAttributeValue", handle, ctypes.byref(outside), 1)
    buffers = [ctypes.create_string_buffer(max(1, each.size)) for each in inside]
    for each, buffer in zip(inside, buffers, strict=True):
        each.value = ctypes.addressof(buffer)
    session.call("C_GetAttributeValue", handle, ctypes.byref(outside), 1)
    return tuple(
        sorted((each.type, buffer.raw[: each.size]) for each, buffer in zip(inside, buffers, strict=True))
    )


@dataclass(frozen=True)
class Held:
    """An object on a token."""

    handle: int
    shown: Shown

    @property
    def is_ours(self) -> bool:
        """Whether it is the group's own: ledger, domain key, what is half made."""
        values = [self.shown.get(name, b"") for name in ("CKA_ID", "CKA_LABEL", "CKA_APPLICATION")]
        return any(isinstance(value, bytes) and value.startswith(RESERVED) for value in values)

    @property
    def label(self) -> bytes:
        value = self.shown["CKA_LABEL"]
        assert isinstance(value, bytes)
        return value


@dataclass(frozen=True)
class Contents:
    """All token objects of a token."""

    token: str
    objects: tuple[Held, ...]

    @property
    def seen(self) -> list[Held]:
        """What applications see."""
        return [held for held in self.objects if not held.is_ours]

    @property
    def ledger(self) -> list[str]:
        """The stages of the ledger's entries, and whatever else it has, but for the names of the members."""
        data = [h for h in self.objects if h.is_ours and h.shown["CKA_CLASS"] == _ulong(p11.CKO_DATA)]
        labels = sorted(held.label.removeprefix(RESERVED).decode() for held in data)
        return [label for label in labels if label != "roster"]

    @property
    def others(self) -> list[Held]:
        """The group's own objects that are neither ledger nor domain key: half made."""
        keys = [h for h in self.objects if h.is_ours and h.shown["CKA_CLASS"] != _ulong(p11.CKO_DATA)]
        return [held for held in keys if held.shown.get("CKA_ID") != DOMAIN_KEY]

    def labelled(self, label: str) -> list[Held]:
        return [held for held in self.objects if held.label == label.encode()]


def _ulong(value: int) -> bytes:
    return p11.value_bytes(value)


def of(token: SoftToken) -> Contents:
    with bare(token) as session:
        handles = session.find({p11.CKA_TOKEN: True})
        held = tuple(Held(handle, everything(session, handle)) for handle in handles)
        return Contents(token.label, held)


@contextmanager
def opened(token: SoftToken, label: str) -> Iterator[tuple[p11.Session, list[int]]]:
    """The vendor's own module on the token, and its objects of that label."""
    with bare(token) as session:
        yield session, session.find({p11.CKA_LABEL: label})
