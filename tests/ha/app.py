"""An application on a group: what a test asks of the module, of its log and of the tokens behind it."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_ulong
from dataclasses import dataclass
from typing import TYPE_CHECKING

from demo.members import Server, SoftToken, softhsm
from tests import p11
from tests.conftest import Group

if TYPE_CHECKING:
    from pkcs11_ha.runtime.core import Core

PATIENCE_S = 20.0
FAR = {"interval_s": 3600}  # no member comes back by itself
SOON = {"interval_s": 0.05}


def until(holds: Callable[[], object], what: str) -> None:
    """Wait for a fact."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE_S:.0f} s until {what}")
        time.sleep(0.005)


def working_until(work: Callable[[], object], holds: Callable[[], object], what: str) -> None:
    """Do some work again and again until a fact holds."""

    def did() -> object:
        work()
        return holds()

    until(did, what)


@dataclass
class Application:
    """The module, initialised with one group."""

    module: p11.Module
    group: Group

    @property
    def slot(self) -> int:
        """The group's slot, present or not."""
        slots = self.module.slots(present=False)
        return slots[-1]

    def open(self, *, rw: bool = True) -> p11.Session:
        return self.module.open(self.slot, rw=rw)

    def login(self, pin: str, *, rw: bool = True) -> p11.Session:
        session = self.open(rw=rw)
        session.login(pin)
        return session

    @property
    def core(self) -> Core:
        """The core of this run: the module shares our interpreter."""
        from pkcs11_ha.entry import life

        return life.current()

    def status(self) -> dict[str, str]:
        """Member serial -> name of its status code; the first reading after a loss is another than the next."""
        return self.module.ha_status(self.slot).members

    def states(self) -> dict[str, str]:
        """Member name -> up or away, without the reading being an event."""
        return {name: member.state.value for name, member in self.core.members.items()}

    def away(self) -> set[str]:
        return {name for name, state in self.states().items() if state == "away"}

    def served(self, session: p11.Session) -> str:
        """Name of the member that served the session's last call."""
        return self.module.session_member(session)[0]

    def lines(self) -> list[str]:
        return self.group.log.read_text().splitlines() if self.group.log.exists() else []

    def events(self, name: str, member: str = "") -> list[str]:
        """The lines of one event, of one member if it is named."""
        wanted = re.compile(rf"\b{re.escape(name)}\b")
        lines = [line for line in self.lines() if wanted.search(line.split("] ", 1)[1])]
        return [line for line in lines if not member or f"member={member} " in f"{line} "]

    def wait_for_event(self, name: str, member: str = "", count: int = 1) -> None:
        until(
            lambda: len(self.events(name, member)) >= count,
            f"{count} {name} of {member or 'anybody'} is logged",
        )

    def slot_event(self, *, block: bool = False) -> int | None:
        """C_WaitForSlotEvent: the slot, None for CKR_NO_EVENT."""
        slot = c_ulong()
        rv = self.module.rv("C_WaitForSlotEvent", 0 if block else p11.CKF_DONT_BLOCK, byref(slot), None)
        if rv == p11.CKR_NO_EVENT:
            return None
        if rv != p11.CKR_OK:
            raise p11.CkError("C_WaitForSlotEvent", rv)
        return slot.value

    def is_present(self) -> bool:
        return self.slot in self.module.slots(present=True)


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """The server is stopped.  Should a broken module wait for it for ever, it dies and lets go of us."""
    server.stop()
    end = threading.Timer(PATIENCE_S, server.kill)
    end.start()
    try:
        yield
    finally:
        end.cancel()


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def bare(token: SoftToken, *, login: bool = True) -> Iterator[p11.Session]:
    """The token itself, by the vendor's module without us."""
    with environment(token.env), p11.Module(softhsm()) as module:
        session = module.open(module.slot(token.label), rw=True)
        if login:
            session.login(token.pin)
        yield session


def code(call: Callable[[], object]) -> str:
    """Name of the code that a call ends with."""
    try:
        call()
    except p11.CkError as error:
        return error.name
    return "CKR_OK"
