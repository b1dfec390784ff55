"""The same done by the bare module and in a group: what their tokens hold is compared, attribute by attribute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tests import p11
from tests.replication.contents import Contents, Held

ON_THE_ORIGIN = frozenset({"CKA_NEVER_EXTRACTABLE"})
"""What may be otherwise on the member that generated a key: it was extractable, until it was copied."""
ON_COPIES = ON_THE_ORIGIN | {
    *("CKA_LOCAL", "CKA_ALWAYS_SENSITIVE", "CKA_KEY_GEN_MECHANISM"),
    *("CKA_VALUE_LEN", "CKA_CHECK_VALUE"),  # of secret keys: C_UnwrapKey of SoftHSM leaves them 0 and empty
    "CKA_VALUE_BITS",  # of DH private keys: likewise
}
"""What may be otherwise on the others: their key came in by C_UnwrapKey."""
UNCOPIED = ("not copyable", "for the trusted", "for the trusted and extractable")
"""SoftHSM refuses C_CopyObject with these attributes, so that the origin's own key comes in by C_UnwrapKey as well."""

MATERIAL = frozenset(
    {
        *("CKA_VALUE", "CKA_MODULUS", "CKA_PRIVATE_EXPONENT", "CKA_PRIME_1", "CKA_PRIME_2"),
        *("CKA_EXPONENT_1", "CKA_EXPONENT_2", "CKA_COEFFICIENT", "CKA_EC_POINT", "CKA_CHECK_VALUE"),
        "CKA_VALUE_BITS",  # of DH: as long as the number happens to be
    }
)
"""What differs between two keys that were generated alike."""

SUBJECT = bytes.fromhex("3013 3111 300f 0603 5504 03 0c08 7265706c69636173")
Step = Callable[[p11.Session], object]
Do = Callable[[Mapping[str, Step]], "Made"]


@dataclass(frozen=True)
class Made:
    """What three tokens hold after the same was done on each: by the bare module, and twice by the group."""

    bare: Contents
    origin: Contents
    copy: Contents
    answers: Mapping[str, tuple[str, str]]  # step -> codes of the bare module and of the group

    def differences(self, *, generated: bool = True) -> dict[str, list[str]]:
        """Copies that are not as the bare module's: object -> what is otherwise where."""
        found: dict[str, list[str]] = {}
        for held, origin, copy in self.matched(found):
            wrong = [
                *_unlike("origin", held, origin, _allowed_on_the_origin(held), generated=generated),
                *_unlike("copy", held, copy, ON_COPIES, generated=generated),
                *_unlike("copy and origin", origin, copy, ON_COPIES, generated=False),
            ]
            if wrong:
                found[_name(held)] = wrong
        return found

    def matched(self, complaints: dict[str, list[str]]) -> Iterator[tuple[Held, Held, Held]]:
        known = [_by_name(each) for each in (self.bare, self.origin, self.copy)]
        for name in sorted(set().union(*known)):
            there = [each.get(name, []) for each in known]
            if len({len(each) for each in there}) == 1:
                yield from zip(*there, strict=True)
            else:
                complaints[name] = [f"bare {len(there[0])}, origin {len(there[1])}, copy {len(there[2])}"]

    def refusals(self) -> dict[str, tuple[str, str]]:
        """Steps that the group answered otherwise than the bare module."""
        return {step: codes for step, codes in self.answers.items() if codes[0] != codes[1]}


def _allowed_on_the_origin(held: Held) -> frozenset[str]:
    return ON_COPIES if held.label.decode() in UNCOPIED else ON_THE_ORIGIN


def _name(held: Held) -> str:
    kinds = {p11.value_bytes(number): name for name, number in CLASSES.items()}
    return f"{kinds[held.shown['CKA_CLASS']]} {held.label.decode()}"  # type: ignore[index]


CLASSES = {
    "data": p11.CKO_DATA,
    "certificate": p11.CKO_CERTIFICATE,
    "public": p11.CKO_PUBLIC_KEY,
    "private": p11.CKO_PRIVATE_KEY,
    "secret": p11.CKO_SECRET_KEY,
    "parameters": p11.CKO_DOMAIN_PARAMETERS,
}


def _by_name(held: Contents) -> dict[str, list[Held]]:
    found: dict[str, list[Held]] = {}
    for each in held.seen:
        found.setdefault(_name(each), []).append(each)
    return found


def _unlike(where: str, one: Held, other: Held, allowed: frozenset[str], *, generated: bool) -> list[str]:
    names = otherwise(one, other, generated=generated) - allowed
    return [f"{where}: {n} {one.shown.get(n)!r} became {other.shown.get(n)!r}" for n in sorted(names)]


def otherwise(one: Held, other: Held, *, generated: bool) -> set[str]:
    """Names of the attributes in which two objects differ; two generated keys do so anyway in MATERIAL."""
    values = {
        name: (one.shown.get(name), other.shown.get(name)) for name in set(one.shown) | set(other.shown)
    }
    sorts = {
        name: tuple(map(_sort, pair)) if generated and name in MATERIAL else pair
        for name, pair in values.items()
    }
    return {name for name, (here, there) in sorts.items() if here != there}


def _sort(value: object) -> object:
    """Of the value of a generated key: whether there is one."""
    return any(value) if isinstance(value, bytes) else value
