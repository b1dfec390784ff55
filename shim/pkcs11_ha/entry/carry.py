"""Calls that the core carries to members itself, in the data plane's loop: route, call, judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.entry.questions import AGAIN, decide
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.native import CkError
from pkcs11_ha.runtime.slot import VirtualSlot
from pkcs11_ha.spec.functions import INDEX


class Carried:
    """One call on its way; `index` is the member that answered last, `session` its session there."""

    def __init__(
        self, name: str, slot: VirtualSlot, session: Any, objects: Sequence[int] = (), mechanism: Any = None
    ) -> None:
        self.name = name
        self.made = 0  # handle of an object that a recipe made
        self.slot = slot
        self.call = native.ffi.new("ha_call *")
        self.call.row = INDEX[name]
        self.call.member = -1
        self.call.session = session
        self.call.slot = slot.native
        self.call.objects = len(objects)
        for place, handle in enumerate(objects):
            self.call.object[place] = handle
        if mechanism:
            native.check(native.lib.ha_call_takes(self.call, mechanism))

    def only(self, member: Member) -> Carried:
        """For one member and no other."""
        self.call.alone = 1
        self.call.tried = 0xFFFFFFFF & ~(1 << self.slot.index(member))
        return self

    def without(self, members: Iterable[Member]) -> Carried:
        """For others than these."""
        for member in members:
            self.call.tried |= 1 << self.slot.index(member)
        return self

    def run(
        self,
        forward: Callable[[Any, Any], int],
        after: Callable[[], None] | None = None,
        *,
        once: bool = False,
    ) -> int:
        """`forward(function, call)` is the vendor's call; the return value is the application's.

        `after()` is what the core does on that member with what the call made there.  A member that fails at it, or is
        lost meanwhile, has not done the call: it is made again, unless `once` says that the first object may stay.
        """
        try:
            while True:
                self._forward(forward)
                if after is None or self.call.rv != ck.CKR_OK:
                    return int(self.call.rv)
                try:
                    after()
                    return ck.CKR_OK
                except CkError as error:
                    if once or not self._comes_again(error):
                        raise
        finally:
            native.lib.ha_call_free(self.call)

    def _forward(self, forward: Callable[[Any, Any], int]) -> None:
        call = self.call
        while native.lib.ha_call_next(call):
            function = native.ffi.cast(f"CK_{self.name}", call.function)
            rv = ck.CKR_FUNCTION_FAILED  # should Python not get to the end of it
            try:
                rv = forward(function, call)
            finally:
                native.lib.ha_call_answer(call, rv)

    def _comes_again(self, error: CkError) -> bool:
        call, member = self.call, self.slot.by_index[self.index]
        call.rv = error.rv
        if member.epoch == self.epoch and decide(call) != AGAIN:
            return False
        call.finished = 0
        return True

    @property
    def index(self) -> int:
        return int(self.call.member)

    @property
    def epoch(self) -> int:
        return int(self.call.epoch)

    @property
    def session(self) -> int:
        return int(self.call.member_session)
