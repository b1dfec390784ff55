"""A core without libraries or a data plane, on a clock that the test winds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import cffi
import pytest

from pkcs11_ha import ck, config
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import core as runtime
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.core import Core
from pkcs11_ha.runtime.member import ConnectError, Member, MemberState


class Plane:
    """What the data plane does for the core, without one: epochs count, everything else is swallowed."""

    def __init__(self) -> None:
        self.epochs: dict[int, int] = {}
        self.numbers = count(1)
        self.check_at: dict[Any, int] = {}
        self.serving: dict[Any, int] = {}

    def ha_member_new(self) -> int:
        number = next(self.numbers)
        self.epochs[number] = 1
        return number

    def ha_member_epoch(self, member: int) -> int:
        return self.epochs[member]

    def ha_member_new_epoch(self, member: int) -> int:
        self.epochs[member] += 1
        return self.epochs[member]

    def ha_secret_new(self, *_pin: object) -> object:
        return object()

    def ha_slot_new(self, slot: int, _balance: int, _replay_limit: int) -> int:
        return slot

    def ha_slot_check_at(self, slot: int, at: int) -> None:
        self.check_at[slot] = at

    def ha_slot_serving(self, slot: int, mask: int, _there: int) -> None:
        self.serving[slot] = mask

    def __getattr__(self, _name: str) -> Callable[..., int]:
        return lambda *_arguments: 0


class Clock:
    def __init__(self) -> None:
        self.now_ns = 10**12

    def __call__(self) -> int:
        return self.now_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


class World:
    """A core, its clock, and what happens when a member is connected."""

    def __init__(self, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.plane = Plane()
        self.attempts: list[str] = []
        self.outcome: dict[str, Callable[[], None]] = {}
        self.events: list[Event] = []
        self.state_dir = state_dir
        monkeypatch.setattr(native, "lib", self.plane)
        monkeypatch.setattr(native, "ffi", cffi.FFI())
        monkeypatch.setattr(Member, "connect", lambda member, *_: self._connect(member))
        monkeypatch.setattr(runtime, "open_log", lambda *_how: self)

    def _connect(self, member: Member) -> None:
        self.attempts.append(member.name)
        member.logins.clear()
        self.outcome.get(member.name, lambda: None)()

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        """As a log."""

    def core(
        self,
        *members: str,
        interval_s: float = 60,
        attempts: int = -1,
        connect_timeout_s: float = 5,
        threads: bool = False,
        standby: Sequence[str] = (),
    ) -> Core:
        """`standby`: those of the members that are."""
        text = "\n".join(
            f'[[member]]\nname = "{name}"\nmodule = "/none"\ntoken = "pkcs11:token={name}"'
            for name in members
        )
        active = [name for name in members if name not in standby]
        text += f'\n[[group]]\nlabel = "prod"\nserial = "1"\nmembers = {active}\nstandby = {list(standby)}'
        text += '\noutlier = "off"'
        text += f"\n[recovery]\ninterval_s = {interval_s}\nattempts = {attempts}"
        text += f"\nconnect_timeout_s = {connect_timeout_s}"
        flags = 0 if threads else ck.CKF_LIBRARY_CANT_CREATE_OS_THREADS
        settings = config.parse(text, "test")
        made = Core(settings, str(self.state_dir), flags, self.clock)
        self.attempts.clear()
        return made

    def fails(self, member: str, rv: int = ck.CKR_DEVICE_ERROR) -> None:
        def connect() -> None:
            raise ConnectError(rv, "not there")

        self.outcome[member] = connect

    def works(self, member: str) -> None:
        self.outcome.pop(member, None)

    def happened(self, name: str, member: str = "") -> int:
        return sum(event.name == name and member in ("", event.member) for event in self.events)


def lose(core: Core, *names: str) -> None:
    for name in names:
        member = core.members[name]
        core.lose(member, ck.CKR_DEVICE_ERROR, "C_Sign", member.epoch)


def check(core: Core) -> None:
    """The recovery check that a call makes."""
    core.check(core.slots[0])


def up(core: Core) -> set[str]:
    return {name for name, member in core.members.items() if member.state is MemberState.UP}
