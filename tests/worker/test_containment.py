"""A vendor library that ends its process, or never comes back, does so to its worker: no call of ours fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import pytest

from tests import fake as fakes
from tests import p11
from tests.fake import PIN, FakeToken
from tests.ha.app import SOON, Application, working_until
from tests.ha.conftest import FakeFactory, StartFactory
from tests.ha.keys import DIGEST
from tests.worker.processes import processes

LIMIT_S = 0.3
LIMITS = {"information": LIMIT_S, "cryptography": LIMIT_S, "generation": LIMIT_S}


@dataclass
class Beside:
    """East's library is in a worker and is asked first; west's is here and well."""

    app: Application
    east: FakeToken
    west: FakeToken
    right: bytes = b""

    def sign(self) -> None:
        with closing(self.app.open()) as session:
            key = session.find_one({p11.CKA_LABEL: "signing"})
            assert session.sign(p11.CKM_RSA_PKCS, key, DIGEST) == self.right

    def sign_in_two(self) -> None:
        """Both with an operation under way, so that one session of the member is not enough."""
        with closing(self.app.open()) as other:
            key = other.find_one({p11.CKA_LABEL: "signing"})
            other.init("C_SignInit", p11.CKM_RSA_PKCS, key)
            self.sign()
            assert other.output("C_Sign", DIGEST, len(DIGEST)) == self.right

    def login(self) -> None:
        with closing(self.app.open()) as session:
            session.logout()
            session.login(PIN)

    def token(self) -> None:
        assert self.app.module.token(self.app.slot).label == "prod"

    def has_returned(self, times: int) -> bool:
        return len(self.app.events("member.recovered", "east")) >= times

    def restart(self) -> None:
        """Its library is initialised anew."""
        for pid in processes(str(self.east.file)):
            os.kill(pid, signal.SIGKILL)
        self.sign()


@pytest.fixture
def beside(fake: FakeFactory, start: StartFactory) -> Beside:
    east, west = (fake(name, fakes.signing_key()) for name in ("east", "west"))
    worker = east.member(host="worker", call_timeout_s=LIMITS, limits={"core": 0})
    recovery = dict(SOON) | {"connect_timeout_s": 2 * LIMIT_S}
    app = start(worker, west.member(), balance="primary-first", recovery=recovery)
    session = app.login(PIN)
    key = session.find_one({p11.CKA_LABEL: "signing"})
    return Beside(app, east, west, session.sign(p11.CKM_RSA_PKCS, key, DIGEST))


WAYS: dict[str, Callable[[Beside], None]] = {
    "C_Sign": Beside.sign,
    "C_SignInit": Beside.sign,
    "C_OpenSession": Beside.sign_in_two,
    "C_GetTokenInfo": Beside.token,
    "C_Login": Beside.login,
    "C_Initialize": Beside.restart,
}


@pytest.mark.parametrize("how", fakes.ENDS[1:])
def test_what_a_library_does_to_its_process_is_nothing_to_the_application(beside: Beside, how: str) -> None:
    """In each function once; every call here answers what it should."""
    for times, (name, use) in enumerate(WAYS.items(), 1):
        beside.east[name].ends(how)
        working_until(partial(use, beside), beside.east[name].is_over, f"{name} {how}")
        working_until(beside.sign, partial(beside.has_returned, times), "it is back")
        assert beside.app.away() == set()
    assert beside.app.events("member.lost", "west") == []
