"""The text that is drawn for both ends of a call, and that the table says how every argument travels."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkcs11_ha.spec import signature, wire
from pkcs11_ha.spec.functions import FUNCTIONS, INDEX, Function
from pkcs11_ha.spec.wire import CARRIED, Item, items
from tests.spec import golden

FILE = Path(__file__).parent / "golden.c.txt"

# Each takes another way through the generator.
NAMES = (
    "C_Initialize",  # text that lies behind a structure
    "C_GetSlotList",  # a list with its count
    "C_InitToken",  # a label
    "C_OpenSession",  # callbacks
    "C_GetAttributeValue",  # attributes that are filled in
    "C_FindObjects",  # a list with a capacity
    "C_GenerateRandom",  # an output that is filled whole
    "C_MessageSignInit",  # a mechanism whose parameter is not carried
    "C_SignMessageNext",  # a message's parameter, and an output that need not be
    "C_WrapKey",  # a mechanism, and an output
    "C_GenerateKeyPair",  # templates, and new objects
)


def text() -> str:
    """What the generator makes of them now."""
    rows = [(FUNCTIONS[INDEX[name]], golden.prototypes()[name]) for name in NAMES]
    return "\n".join(wire.stub(*row) + "\n" + wire.serve(*row) for row in rows)


def test_both_ends_are_as_they_were_looked_at() -> None:
    """A difference is to be read; if it is meant, `python -m tests.worker.test_wire` makes it the rule."""
    assert text() == FILE.read_text()


def test_the_golden_text_takes_every_way() -> None:
    taken = {
        carried.item for name in NAMES for carried in items(FUNCTIONS[INDEX[name]], golden.prototypes()[name])
    }
    assert taken == set(Item)


def test_every_argument_of_every_function_travels() -> None:
    for row in CARRIED:
        arguments = [a for carried in items(row, golden.prototypes()[row.name]) for a in carried.arguments]
        assert arguments == list(golden.prototypes()[row.name]), row.name


def test_argument_that_nobody_knows_how_to_send_is_refused() -> None:
    row = FUNCTIONS[INDEX["C_WaitForSlotEvent"]]
    with pytest.raises(ValueError, match="C_WaitForSlotEvent: how does pReserved travel"):
        list(items(row, golden.prototypes()[row.name]))


def test_version_is_that_of_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = signature.constants(str(golden.ROOT / "include" / "pkcs11.h"))

    def version() -> str:
        return wire.common(golden.prototypes(), constants).split('ha_wire_version[] = "')[1].split('"')[0]

    before = version()
    assert before == version()
    fewer: tuple[Function, ...] = CARRIED[:-1]
    monkeypatch.setattr(wire, "CARRIED", fewer)
    assert version() != before


if __name__ == "__main__":
    FILE.write_text(text())
