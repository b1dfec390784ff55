"""A terminal on which a PIN is asked for has its echo again, however that ends."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from tests.observe.terminal import Terminal

_MENU = """
import sys
from pkcs11_ha.cli.menu.dialogue import Terminal
Terminal(sys.stdin, sys.stdout).answer("PIN of the group: ", secret=True)
"""
_OPERATOR = """
from pkcs11_ha.cli import operator
with operator.pin(""):
    pass
"""


@pytest.mark.parametrize("program", [_MENU, _OPERATOR], ids=["demo-menu", "operator"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_at_the_prompt(program: str, number: signal.Signals) -> None:
    with Terminal([sys.executable, "-c", program]) as terminal:
        terminal.says("PIN of the group:")
        terminal.press("12")  # without Enter
        os.kill(terminal.process.pid, number)
        assert terminal.ends() == -number
    assert b"12" not in terminal.raw
