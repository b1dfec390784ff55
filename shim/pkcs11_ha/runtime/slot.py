"""A virtual slot: a group, or a member's own slot, as the application sees it whatever member answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.config import REPLAY_LIMIT, GroupConfig
from pkcs11_ha.core.policy import Standing, serving
from pkcs11_ha.core.recovery import NEVER_NS
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.breaker import Breaker
from pkcs11_ha.runtime.member import Member, MemberState
from pkcs11_ha.runtime.objects import ObjectMap
from pkcs11_ha.runtime.party import LeaveOut, Party
from pkcs11_ha.runtime.replication import Replication

_BALANCE = {"least-busy": 0, "round-robin": 1, "primary-first": 2}
NOBODY = ck.CK_UNAVAILABLE_INFORMATION


@dataclass(frozen=True)
class Face:
    """How a slot presents itself: constant, whatever its members do."""

    description: str
    label: str
    serial: str
    manufacturer: str
    model: str


def _slot_flags(known: Sequence[int]) -> int:
    """Those that never change (PKCS#11 3.3): what the members seen at start say of their own slots."""
    every = ck.CKF_HW_SLOT if known and all(flags & ck.CKF_HW_SLOT for flags in known) else 0
    removable = not known or any(flags & ck.CKF_REMOVABLE_DEVICE for flags in known)
    return every | (ck.CKF_REMOVABLE_DEVICE if removable else 0)


class VirtualSlot:
    """`serving_mask` and `present` are written by `publish` alone, the login by `Login` alone."""

    def __init__(
        self,
        slot_id: int,
        face: Face,
        members: Sequence[Member],
        standbys: int,
        balance: str,
        log: Callable[[Event], None],
        group: GroupConfig | None = None,
        leave_out: LeaveOut | None = None,
        state_dir: str = "",
    ) -> None:
        self.id = slot_id
        self.face = face
        self.members = tuple(members)
        self.standbys = standbys  # the last so many of `members`
        replay_limit = REPLAY_LIMIT if group is None else group.replay_limit_bytes
        self.native: Any = native.lib.ha_slot_new(slot_id, _BALANCE[balance], replay_limit)
        for member in members:
            native.lib.ha_slot_add(self.native, member.native)
        self.flags = _slot_flags([m.slot_flags for m in members if m.slot_flags is not None])
        self.log = log
        self.objects = ObjectMap(self.native, face.label, members, log)
        self.group = group
        self.replication: Replication | None = None
        if group is not None and leave_out is not None and group.replication == "domain":
            self.replication = Replication(Party(group, members, self.objects, log, leave_out, state_dir))
        if group is not None:
            native.lib.ha_slot_replicates(self.native)
        self.tend_at_ns = (
            0 if self.replication else NEVER_NS
        )  # when to look for what other processes left open
        self.breaker: Breaker | None = None
        self.serving_mask = 0
        self.present = False
        self.published = False
        self.is_group = True
        self.login_lock = threading.RLock()  # held over a fan-out of C_Login and its kin
        self.user: int = NOBODY
        self.secret: Any = None  # ha_secret of the application's PIN, while it is logged in
        self.secret_lock = threading.Lock()  # of `secret`: a member that returns may be about to use it

    def keep_pin(self, pointer: Any, size: int) -> None:
        """Keeps a PIN for members that return, instead of the one before; NULL: none any more."""
        with self.secret_lock:
            if self.secret is not None:
                native.lib.ha_secret_wipe(self.secret)
            self.secret = (
                None if pointer == native.ffi.NULL else native.lib.ha_secret_new(pointer, size) or None
            )

    @contextmanager
    def pin_copy(self) -> Iterator[Any]:
        """The PIN that is kept, None without one: a copy, as a logout wipes the original whoever is using it."""
        with self.secret_lock:
            kept, copy = self.secret, None
            if kept is not None:
                copy = native.lib.ha_secret_new(
                    native.lib.ha_secret_bytes(kept), native.lib.ha_secret_size(kept)
                )
        try:
            yield copy or None
        finally:
            if copy:
                native.lib.ha_secret_wipe(copy)

    def index(self, member: Member) -> int:
        return self.members.index(member)

    def _is_standby(self, index: int) -> bool:
        return index >= len(self.members) - self.standbys

    def up(self) -> list[Member]:
        """Members that are there, active ones first."""
        return [member for member in self.members if member.state is MemberState.UP]

    def serving(self) -> list[Member]:
        return [member for i, member in enumerate(self.members) if self.serving_mask >> i & 1]

    def publish(self, check_at_ns: int) -> None:
        """Tells the data plane who serves and when the next recovery check is due; logs what that changes."""
        mask = serving(
            [Standing(m.state is MemberState.UP, self._is_standby(i)) for i, m in enumerate(self.members)]
        )
        before, self.serving_mask = self.serving_mask, mask
        self.present = mask != 0
        if not self.published:
            before, self.published = mask, True  # the start is no change
        there = sum(1 << i for i, m in enumerate(self.members) if m.state is MemberState.UP)
        native.lib.ha_slot_serving(self.native, mask, there)
        native.lib.ha_slot_check_at(self.native, check_at_ns)
        if self.breaker is not None:
            self.breaker.publish(mask)
        for index, member in enumerate(self.members):
            if self._is_standby(index) and (mask ^ before) >> index & 1:
                promoted = mask >> index & 1
                self.log(
                    Event(
                        "standby.promoted" if promoted else "standby.released", self.face.label, member.name
                    )
                )
        if before and not mask:
            self.log(Event("group.vanished", self.face.label))
        if mask and not before:
            self.log(Event("group.returned", self.face.label))

    def publish_login(self) -> None:
        write_protected = any(member.write_protected for member in self.serving())
        native.lib.ha_slot_login(self.native, self.user, write_protected)
