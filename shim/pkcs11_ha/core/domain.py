"""The domain key: which one a group has, and who does not have it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pkcs11_ha.core.template import RESERVED
from pkcs11_ha.core.wrapping import FORMS

KEY_ID = RESERVED + b"domain key"
"""CKA_ID of a domain key, on every member."""


@dataclass(frozen=True)
class Generation:
    """One domain key, as every member that has it says: when it came, and its check values by form."""

    number: int
    checks: Mapping[str, str]  # form -> 8 hexadecimal digits, see core.wrapping.CHECK_KEY

    @property
    def check(self) -> str:
        """The check value that people compare: that of RFC 5649."""
        return self.checks[FORMS[0]]


def label(generation: Generation) -> bytes:
    """CKA_LABEL of a domain key."""
    checks = " ".join(generation.checks[form] for form in FORMS)
    return RESERVED + f"domain key {generation.number} {checks}".encode()


def parse_label(value: bytes) -> Generation | None:
    """What a CKA_LABEL says; None if it is not a domain key's."""
    found = re.fullmatch(
        rb"domain key ([1-9]\d{0,8})((?: [0-9a-f]{8}){%d})" % len(FORMS), value[len(RESERVED) :]
    )
    if found is None or not value.startswith(RESERVED):
        return None
    return Generation(int(found[1]), dict(zip(FORMS, found[2].decode().split(), strict=True)))


@dataclass(frozen=True)
class Agreement:
    """The group's domain key, and why some members cannot take part: member -> one line."""

    generation: Generation | None
    refused: Mapping[str, str]


def agree(held: Mapping[str, Mapping[int, Generation]]) -> Agreement:
    """Which key the group has, by what each of its members holds (number -> generation).

    That which most of them hold; of several, the newest: while keys are being changed all have both, or some the new
    one already.  Members without it are refused: they could not read the group's keys, and the group not theirs.
    """
    everybody = [generation for keys in held.values() for generation in keys.values()]
    if not everybody:
        return Agreement(None, {})
    chosen = max(everybody, key=lambda g: (_holders(held, g), g.number, -everybody.index(g)))
    refused = {name: why for name, keys in held.items() if (why := lacks(name, keys, chosen))}
    return Agreement(chosen, refused)


def _holders(held: Mapping[str, Mapping[int, Generation]], generation: Generation) -> int:
    return sum(keys.get(generation.number) == generation for keys in held.values())


def lacks(name: str, keys: Mapping[int, Generation], wanted: Generation) -> str:
    """Why a member with these keys is refused; empty if it is not."""
    if keys.get(wanted.number) == wanted:
        return ""
    if not keys:
        return f"it has no domain key: p11ha domain admit {name}"
    own = keys[max(keys)]
    return (
        f"it has another domain key: its check value is {own.check} (generation {own.number}), the group's is "
        f"{wanted.check} (generation {wanted.number}): p11ha domain admit {name}"
    )
