"""The table is whole, and the page that is drawn from it is the one in docs/."""

from __future__ import annotations

import importlib
from ctypes import c_ulong
from os import urandom

import pytest

from tests import p11
from tests.ha.app import code
from tests.ha.keys import secret
from tests.replay import table
from tests.replay.cases import CASES, IV, LOSSES, REFUSED, SOFTHSM
from tests.replay.scripts import Use

FLAGS = {
    "digest": p11.CKF_DIGEST,
    "sign": p11.CKF_SIGN,
    "verify": p11.CKF_VERIFY,
    "encrypt": p11.CKF_ENCRYPT,
    "decrypt": p11.CKF_DECRYPT,
}


def test_the_page_is_current() -> None:
    """`python -m tests.replay.table` writes it."""
    assert table.FILE.read_text() == table.text()


def test_the_table_has_all_that_the_token_does(undisturbed: Use) -> None:
    session, slot = undisturbed.session, undisturbed.session.info().slot
    names = {getattr(p11, case.mechanism.name): case.mechanism.name for case in CASES}
    names |= {getattr(p11, name): name for name in REFUSED}
    offered: set[tuple[str, str]] = set()
    for mechanism in session.module.mechanisms(slot):
        info = (c_ulong * 3)()
        session.module.call("C_GetMechanismInfo", slot, mechanism, info)
        name = names.get(mechanism, hex(mechanism))
        offered |= {(does, name) for does, flag in FLAGS.items() if info[2] & flag}
    held = {(case.operation.does, case.mechanism.name) for case in CASES if case.operation.member == SOFTHSM}
    assert {each for each in offered if each[1] not in REFUSED} == held


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_token_refuses_is_refused(undisturbed: Use, name: str) -> None:
    session = undisturbed.session
    key = session.create(
        secret(p11.CKK_DES, urandom(8), "des", b"\xde", p11.CKA_ENCRYPT, p11.CKA_DECRYPT, token=False)
    )
    number = getattr(p11, name)
    mechanism = number if name.endswith("ECB") else (number, IV[:8])
    assert code(lambda: session.encrypt(mechanism, key, bytes(8))) != "CKR_OK"


def test_each_loss_is_shown() -> None:
    for each in LOSSES:
        module, test = each.test.split(".")
        assert callable(getattr(importlib.import_module(f"tests.replay.{module}"), test))
