"""`p11ha explain`, and the two tables it reads: no code and no event without a meaning, a cause and a cure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pkcs11_ha
from pkcs11_ha import ck
from pkcs11_ha.cli.explain import LogMessage, UnknownMessage, explain, nearest, show
from pkcs11_ha.cli.meanings import MEANINGS, ReturnValue
from pkcs11_ha.core.codes import Code
from pkcs11_ha.log import EVENTS, Event, describe, line, record
from pkcs11_ha.spec.messages import FOLLOWS, MESSAGES
from tests.cli.test_status_and_check import run

LOST = Event(
    "member.lost", "recovery.failed", "core.failed", {"code": "CKR_DEVICE_ERROR", "why": "group.vanished"}
)


def test_every_return_value_of_the_header_is_explained() -> None:
    assert set(MEANINGS) == set(ck.RV_NAMES) - {ck.CKR_VENDOR_DEFINED}
    assert all(text.endswith(".") for meaning in MEANINGS.values() for text in meaning)
    assert set(FOLLOWS) == set(Code)


def test_every_event_has_a_cause_and_a_cure() -> None:
    assert set(EVENTS) == set(MESSAGES)
    assert all(text.endswith(".") for name in EVENTS for text in MESSAGES[name])


def test_no_application_loads_the_words() -> None:
    script = "import sys, pkcs11_ha.entry; print(*(m for m in sys.modules if m.startswith('pkcs11_ha.')))"
    environ = os.environ | {"PYTHONPATH": str(Path(pkcs11_ha.__file__).parents[1])}
    loaded = subprocess.check_output([sys.executable, "-c", script], env=environ, text=True).split()
    assert "pkcs11_ha.log" in loaded
    assert "pkcs11_ha.spec.messages" not in loaded


@pytest.mark.parametrize(
    "text", ["CKR_DEVICE_ERROR", "device_error", "Device Error", "0x30", "0X30", "48", " 048 "]
)
def test_a_code_is_found_however_it_is_written(text: str) -> None:
    (found,) = explain(text)
    assert isinstance(found, ReturnValue)
    assert (found.name, found.number, found.kind) == ("CKR_DEVICE_ERROR", 0x30, "suspect")


def test_codes_that_no_standard_knows() -> None:
    (vendor,), (unknown,) = explain("0x80000005"), explain("0x999")
    assert isinstance(vendor, ReturnValue)
    assert isinstance(unknown, ReturnValue)
    assert (vendor.kind, unknown.kind) == ("suspect", "clean")
    assert "vendor" in vendor.meaning
    assert "no such code" in unknown.meaning


@pytest.mark.parametrize(
    "pasted",
    [
        line(describe(LOST), 1795367907123, 4711).decode(),
        describe(LOST),
        record(LOST, 1795367907123, 4711),
        f"Nov 23 10:15:30 host pkcs11-ha[4711]: {describe(LOST)}",
    ],
)
def test_a_pasted_line_is_its_event_and_its_codes(pasted: str) -> None:
    """Also where group, member and details have names of other events."""
    message, code = explain(pasted)
    assert isinstance(message, LogMessage)
    assert (message.name, code.name) == ("member.lost", "CKR_DEVICE_ERROR")
    assert message.cure == MESSAGES["member.lost"].cure


@pytest.mark.parametrize(
    ("text", "meant"),
    [("CKR_DEVICE_EROR", "CKR_DEVICE_ERROR"), ("member.lst", "member.lost"), ("pin", "CKR_PIN_LOCKED")],
)
def test_what_is_not_known_may_have_been_meant_otherwise(text: str, meant: str) -> None:
    assert meant in nearest(text)
    with pytest.raises(UnknownMessage, match=meant):
        explain(text)


def test_what_is_shown_fits_80_columns() -> None:
    shown = [show(explain(name)) for name in (*ck.RV_NAMES.values(), *EVENTS)]
    assert max(len(row) for text in shown for row in text.splitlines()) < 80


def test_the_command() -> None:
    good = run("explain", "group=prod", "group.vanished")
    assert good.returncode == 0
    assert good.stdout.startswith("group.vanished\n")
    (described,) = json.loads(run("explain", "--json", "pin_locked").stdout)
    assert (described["kind"], described["name"], described["class"]) == (
        "return value",
        "CKR_PIN_LOCKED",
        "clean",
    )
    bad = run("explain", "no such thing")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (1, "", 1)
    assert run("explain").returncode == 2
