"""A member that neither answers nor dies, in the middle of calls: they are done elsewhere in time; it comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from demo.members import Server, SoftToken, Table, Toml
from tests import p11
from tests.conftest import ServerFactory
from tests.ha import operations
from tests.ha.app import Application, until, working_until
from tests.ha.conftest import StartFactory
from tests.ha.keys import DIGEST, Keys, private
from tests.ha.operations import Use
from tests.worker.processes import processes

Tokens = tuple[SoftToken, SoftToken]

LIMIT_S = 0.5
LIMITS = {"information": LIMIT_S, "cryptography": LIMIT_S, "generation": LIMIT_S}
# Not so soon that a killed worker could be started again inside the very call that lost it.
RECOVERY = {"interval_s": LIMIT_S, "connect_timeout_s": LIMIT_S}
THREADS = 8


@dataclass
class Stoppable:
    """Members in workers, of which the first can be stopped: itself, or the server behind its library."""

    members: list[Table]
    stop: Callable[[], None]
    cont: Callable[[], None]


def stop_worker(token: SoftToken) -> None:
    for pid in processes(str(token.conf)):
        os.kill(pid, signal.SIGSTOP)


@pytest.fixture(params=["worker", "server"])
def stoppable(request: pytest.FixtureRequest, tokens: Tokens, server: ServerFactory) -> Stoppable:
    options: dict[str, Toml] = {"host": "worker", "call_timeout_s": LIMITS}
    if request.param == "worker":
        members = [token.member(**options) for token in tokens]
        # It is killed, and another started.
        return Stoppable(members, lambda: stop_worker(tokens[0]), lambda: None)
    servers: list[Server] = [server(token) for token in tokens]
    return Stoppable([s.member(**options) for s in servers], servers[0].stop, servers[0].cont)


def test_call_is_done_elsewhere_in_time(stoppable: Stoppable, start: StartFactory, keys: Keys) -> None:
    app = start(*stoppable.members, balance="primary-first", recovery=RECOVERY)
    use = Use.begin(app, keys, "123456")
    operations.sign_ecdsa(use)
    assert app.served(use.session) == "east"
    stoppable.stop()
    began = time.monotonic()
    operations.sign_ecdsa(use)
    assert time.monotonic() - began < LIMIT_S + 1
    assert app.served(use.session) == "west"
    assert len(app.events("member.lost", "east")) == 1
    stoppable.cont()
    working_until(lambda: operations.sign_ecdsa(use), lambda: app.away() == set(), "it is back")


class Signers:
    """Threads, each with a session of its own: what they signed, how long the slowest call took, what failed."""

    def __init__(self, app: Application, keys: Keys) -> None:
        self.app, self.keys = app, keys
        self.counts = [0] * THREADS
        self.slowest_s = 0.0
        self.errors: list[BaseException] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def _work(self, number: int) -> None:
        try:
            session = self.app.open()
            key = session.find_one(private("ec"))
            while not self.over.is_set():
                began = time.monotonic()
                signature = session.sign(p11.CKM_ECDSA, key, DIGEST)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.keys.check_ec(signature)
                self.counts[number] += 1
        except BaseException as error:  # noqa: BLE001 (told at the end)
            self.errors.append(error)

    def all_go_on(self) -> None:
        before = list(self.counts)
        until(
            lambda: self.errors or all(now > then + 3 for now, then in zip(self.counts, before, strict=True)),
            "each has signed",
        )

    def end(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(LIMIT_S + 2)
        assert [thread for thread in self.threads if thread.is_alive()] == []
        assert self.errors == []


def test_no_thread_stays_stuck(stoppable: Stoppable, start: StartFactory, keys: Keys) -> None:
    """Nor does any wait longer than a call and the attempt in it may take; three calls make a signature."""
    app = start(*stoppable.members, recovery=RECOVERY)
    app.login("123456")
    signers = Signers(app, keys)
    signers.all_go_on()
    for times in (1, 2):
        stoppable.stop()
        app.wait_for_event("member.lost", "east", times)
        signers.all_go_on()
        stoppable.cont()
        app.wait_for_event("member.recovered", "east", times)
        signers.all_go_on()
    signers.end()
    assert signers.slowest_s < 3 * (LIMIT_S + 1)
    assert app.events("member.lost", "west") == []


@pytest.mark.parametrize("behind", ["p11-kit client", "p11-kit client in a worker"])
def test_start_beside_a_stopped_server_takes_its_time_and_no_more(
    tokens: Tokens, server: ServerFactory, start: StartFactory, keys: Keys, behind: str
) -> None:
    east = server(tokens[0])
    options: dict[str, Toml] = {"host": "worker"} if behind.endswith("worker") else {}
    with_east = east.member(**options)
    east.stop()
    began = time.monotonic()
    app = start(with_east, tokens[1].member(), recovery=RECOVERY)
    assert time.monotonic() - began < LIMIT_S + 1
    use = Use.begin(app, keys, "123456")
    operations.sign_ecdsa(use)
    assert app.away() == {"east"}
    east.cont()
    working_until(lambda: operations.sign_ecdsa(use), lambda: app.away() == set(), "it is there")
