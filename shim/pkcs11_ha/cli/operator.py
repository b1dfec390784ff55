"""A group in an operator's hands: its members logged in one by one, and nothing done that was not asked for."""

from __future__ import annotations

import os
import select
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.cli.module import Library
from pkcs11_ha.cli.terminal import put_back
from pkcs11_ha.runtime import login, native
from pkcs11_ha.runtime.login import Pin
from pkcs11_ha.runtime.member import ConnectError, Member, MemberState
from pkcs11_ha.runtime.replication import Replication
from pkcs11_ha.runtime.slot import VirtualSlot
from pkcs11_ha.uri import parse_pin_source


class OperatorError(Exception):
    """It cannot be done; `str` is one line, and nothing was changed unless it says so."""


def slot_of(library: Library, label: str) -> VirtualSlot:
    """The group's slot; raises OperatorError."""
    for slot in library.core.slots.values():
        if slot.is_group and slot.face.label == label:
            return slot
    known = ", ".join(slot.face.label for slot in library.core.slots.values() if slot.is_group)
    raise OperatorError(f"no group {label!r}: there is {known or 'none'}")


def slot_with(library: Library, name: str) -> tuple[VirtualSlot, Member]:
    """The group of a member; raises OperatorError."""
    for slot in library.core.slots.values():
        for member in slot.members:
            if slot.is_group and member.name == name:
                return slot, member
    raise OperatorError(f"no member {name!r} in any group")


def replication_of(slot: VirtualSlot) -> Replication:
    """Raises OperatorError for a group without."""
    if slot.replication is None:
        raise OperatorError(f'group {slot.face.label}: replication = "domain" is not configured')
    return slot.replication


def up(member: Member) -> Member:
    """Raises OperatorError for a member that is away."""
    if member.state is not MemberState.UP:
        raise OperatorError(f"{member.name} is away: {member.why}")
    return member


@contextmanager
def pin(source: str) -> Iterator[Any]:
    """The PIN as ha_secret, in locked memory alone: from `file:/path`, else asked for; raises OperatorError.

    Without a terminal it is the first line of standard input.
    """
    secret = _read(parse_pin_source(source)) if source else _ask()
    try:
        yield secret
    finally:
        native.lib.ha_secret_wipe(secret)


def _read(path: str, *, a_line: bool = False) -> Any:
    error = native.ffi.new("char[512]")
    read = native.lib.ha_secret_read_line if a_line else native.lib.ha_secret_read
    secret = read(native.text(path), error, 512)
    if not secret:
        raise OperatorError(native.ffi.string(error).decode("utf-8", "replace"))
    return secret


def _ask() -> Any:
    """From the terminal without echo, else from standard input without reading ahead."""
    if not sys.stdin.isatty():
        return _read("/dev/stdin", a_line=True)
    before = termios.tcgetattr(sys.stdin)
    silent = termios.tcgetattr(sys.stdin)
    silent[3] &= ~termios.ECHO
    with put_back():
        try:
            termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, silent)
            with suppress(OSError):  # standard error may be closed
                os.write(2, b"PIN of the group: ")
            select.select([sys.stdin], [], [])  # not in C, where no signal is seen to, until a line is there
            return _read("/dev/tty", a_line=True)
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)
            with suppress(OSError):
                os.write(2, b"\n")


def log_in(slot: VirtualSlot, members: list[Member], secret: Any) -> None:
    """Logs in on each member: a PIN that one refuses is tried on no other.  Raises OperatorError."""
    for member in members:
        pin = Pin(native.lib.ha_secret_bytes(secret), native.lib.ha_secret_size(secret))
        try:
            rv = login.login_member(up(member), ck.CKU_USER, pin)
        except ConnectError as error:
            raise OperatorError(f"{member.name}: {error}") from None
        if rv not in (ck.CKR_OK, ck.CKR_USER_ALREADY_LOGGED_IN):
            raise OperatorError(f"{member.name}: C_Login answers {ck.rv_name(rv)}")
        member.logins.add(slot.id)


def log_out(slot: VirtualSlot) -> None:
    """As far as members are there."""
    for member in slot.members:
        with suppress(Exception):
            login.leave(slot, member)


@contextmanager
def at_work(slot: VirtualSlot, members: list[Member], pin_source: str) -> Iterator[Replication]:
    """The group with these members logged in, taking part by this command's decision alone."""
    replication = replication_of(slot)
    replication.is_by_hand = True
    needed = any(member.config.pin_source is None for member in members)
    try:
        if needed or pin_source:
            with pin(pin_source) as secret:
                log_in(slot, members, secret)
        else:
            nothing = native.lib.ha_secret_new(native.ffi.NULL, 0)
            try:
                log_in(slot, members, nothing)
            finally:
                native.lib.ha_secret_wipe(nothing)
        yield replication
    finally:
        log_out(slot)
