"""A virtual slot: a group, or a member's own slot, as the application sees it whatever member answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.config import MEMBERS_MAX, REPLAY_LIMIT, GroupConfig
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
    """`serving_mask` and `present` are written by `publish` alone, who is in it by `seat` and `arrange`, the login by
    `Login`.

    `by_index` are the members as the data plane numbers them: it only grows, and who leaves keeps the number.
    `members` are those that are in the group, in the configuration's order.
    """

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
        self.by_index = list(members)
        self.members = tuple(members)
        self.standbys = frozenset(member.name for member in members[len(members) - standbys :])
        replay_limit = REPLAY_LIMIT if group is None else group.replay_limit_bytes
        self.native: Any = native.lib.ha_slot_new(slot_id, _BALANCE[balance], replay_limit)
        for member in members:
            native.lib.ha_slot_add(self.native, member.native)
        self.flags = _slot_flags([m.slot_flags for m in members if m.slot_flags is not None])
        self.log = log
        self.objects = ObjectMap(self.native, face.label, self.by_index, log)
        self.group = group
        self.replication: Replication | None = None
        if group is not None and leave_out is not None and group.replication == "domain":
            self.replication = Replication(
                Party(group, self.by_index, self.objects, log, leave_out, state_dir)
            )
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
        return self.by_index.index(member)

    def is_standby(self, index: int) -> bool:
        return self.by_index[index].name in self.standbys

    def up(self) -> list[Member]:
        """Members that are there, active ones first."""
        return [member for member in self.members if member.state is MemberState.UP]

    def working(self) -> list[Member]:
        """Those of them that are not drained."""
        return [member for member in self.up() if not member.drained]

    def writable(self) -> list[Member]:
        """Those of them that token objects reach: not one that was drained before the application logged in."""
        return [m for m in self.up() if not m.drained or self.user == NOBODY or self.id in m.logins]

    def has_missed(self, member: Member) -> bool:
        """Whether a member that is there has missed a login, or what was made and destroyed since."""
        fresh = self.user == NOBODY or self.id in member.logins
        if self.replication is not None and self.user == ck.CKU_USER:
            fresh = fresh and self.replication.party.takes_part(member)
        return not fresh or self.objects.has_graves(self.index(member))

    def serving(self) -> list[Member]:
        return [member for member in self.members if self.serving_mask >> self.index(member) & 1]

    def seat(self, member: Member, *, is_new: bool) -> bool:
        """A number in the data plane for a member that joins, or comes again; False: there is none left.

        `is_new`: it may be another token than before, so that nothing is known of what it has.
        """
        if member in self.by_index:
            if is_new:
                self.objects.unseat(self.index(member))
        elif len(self.by_index) == MEMBERS_MAX:
            return False
        else:
            self.objects.seat()
            if self.breaker is not None:
                self.breaker.seat(member)
            self.by_index.append(member)
            native.lib.ha_slot_add(self.native, member.native)
        if self.replication is not None:
            self.replication.party.ledger.seat(member)
        return True

    def arrange(self, members: Sequence[Member], standbys: Iterable[str]) -> None:
        """Who is in it from here on; `publish` is to follow."""
        self.members = tuple(members)
        self.standbys = frozenset(standbys)
        if self.replication is not None:
            self.replication.party.order = self.members
        numbers = bytes(self.index(member) for member in self.members)
        native.lib.ha_slot_order(self.native, numbers, len(numbers))

    def regulate(self, group: GroupConfig, breaker: Breaker | None) -> None:
        """What else of a group can change while it works."""
        self.group = group
        if self.replication is not None:
            self.replication.party.group = group
        native.lib.ha_slot_balance_by(self.native, _BALANCE[group.balance])
        if self.breaker is not None and breaker is None:
            self.breaker.end()
        self.breaker = breaker

    def serving_if(self, up: Callable[[Member], bool]) -> int:
        """The members that would serve if those were there, as a mask."""
        return serving(
            [Standing(m in self.members and up(m), m.name in self.standbys, m.drained) for m in self.by_index]
        )

    def publish(self, check_at_ns: int) -> None:
        """Tells the data plane who serves and when the next recovery check is due; logs what that changes."""
        mask = self.serving_if(lambda member: member.state is MemberState.UP)
        before, self.serving_mask = self.serving_mask, mask
        self.present = mask != 0
        if not self.published:
            before, self.published = mask, True  # the start is no change
        there = sum(1 << self.index(member) for member in self.up())
        native.lib.ha_slot_serving(self.native, mask, there)
        native.lib.ha_slot_check_at(self.native, check_at_ns)
        if self.breaker is not None:
            self.breaker.publish(mask)
        for member in self.members:
            index = self.index(member)
            if member.name in self.standbys and (mask ^ before) >> index & 1:
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
