"""Bugs put into the module on purpose, in a client's process: the checker must find each.

`ok-without-work` and `wrong-key` are in between.c, between the client and the module.  Those here replace one
function of the core, which shares the interpreter of a client that is a Python program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkcs11_ha.core.ledger import Entry
    from pkcs11_ha.runtime.member import Member

BETWEEN = ("ok-without-work", "wrong-key")


def _lose_tombstones() -> None:
    """What was destroyed while a member was away is not destroyed on it when it returns."""
    from pkcs11_ha.runtime.settling import Settling

    def bury(_self: Settling, _member: Member, _target: Entry, _own: Entry | None) -> None:
        return

    Settling._bury = bury  # type: ignore[assignment, method-assign]


def _repeat_pins() -> None:
    """A PIN that was refused is taken for one that was not looked at."""
    from pkcs11_ha.runtime import login

    def may_not_have(_member: Member, _rv: int) -> bool:
        return False

    login._may_have_cost_a_try = may_not_have  # type: ignore[assignment]


_CORE: dict[str, Callable[[], None]] = {"lost-tombstone": _lose_tombstones, "double-pin": _repeat_pins}
PLANTS = (*BETWEEN, *_CORE)


def apply(plant: str) -> None:
    """Into this process, whose module is initialised."""
    if plant in _CORE:
        _CORE[plant]()
