"""Fixtures of the fault module's tests: a token with keys behind it, in this process and in programs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.members import SoftToken
from tests import p11
from tests.conftest import ROOT
from tests.fault import Fault, library
from tests.ha import conftest as ha
from tests.ha.app import environment
from tests.ha.conftest import clone
from tests.ha.keys import DIGEST, Keys, private

keys = ha.keys
models = ha.models
tokens = ha.tokens
start = ha.start


@pytest.fixture
def fault(models: tuple[SoftToken, SoftToken], directory: Path) -> Fault:
    return Fault(clone(models[0], directory / "east"))


@dataclass
class Use:
    """A logged-in session of the token behind the fault module, in this process."""

    fault: Fault
    module: p11.Module
    session: p11.Session
    keys: Keys
    ec: int

    @property
    def slot(self) -> int:
        return self.module.slots(present=False)[0]

    def open(self) -> p11.Session:
        return self.module.open(self.slot, rw=True)

    def sign(self) -> None:
        """One C_SignInit, one C_Sign that asks for the length, one that signs."""
        self.keys.check_ec(self.session.sign(p11.CKM_ECDSA, self.ec, DIGEST))


@pytest.fixture
def use(fault: Fault, keys: Keys) -> Iterator[Use]:
    with fault.module() as module:
        session = module.open(module.slot("east"), rw=True)
        session.login(fault.token.pin)
        yield Use(fault, module, session, keys, session.find_one(private("ec")))
        fault.script()  # C_Finalize is not to fail


Program = Callable[..., subprocess.CompletedProcess[str]]

# Sanitizers tell of a crash and end otherwise.
UNTOLD = {name: f"{os.environ.get(name, '')}:handle_segv=0" for name in ("ASAN_OPTIONS", "TSAN_OPTIONS")}

_BEGIN = """
import sys
from tests import p11
module = p11.Module(sys.argv[1])
module.initialize()
session = module.open(module.slot("east"), rw=True)
session.login(sys.argv[2])
NOTE = {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_PRIVATE: False, p11.CKA_LABEL: "note"}
"""


@pytest.fixture
def program(fault: Fault) -> Program:
    """Runs Python with a session of the token to its end."""

    def run(text: str) -> subprocess.CompletedProcess[str]:
        with environment(fault.env | UNTOLD):
            return subprocess.run(
                [sys.executable, "-c", _BEGIN + text, str(library()), fault.token.pin],
                cwd=ROOT,
                check=False,
                capture_output=True,
                text=True,
                timeout=60,
            )

    return run
