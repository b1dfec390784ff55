"""What operators change while the application runs, noticed and carried out: the configuration, drains, requests."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pkcs11_ha import config
from pkcs11_ha.config import Config, ConfigError, GroupConfig, MemberConfig
from pkcs11_ha.core import reload
from pkcs11_ha.log import Event
from pkcs11_ha.runtime import requests
from pkcs11_ha.runtime.member import Member, MemberState
from pkcs11_ha.runtime.requests import Stamp
from pkcs11_ha.runtime.slot import VirtualSlot
from pkcs11_ha.runtime.watch import Watch

if TYPE_CHECKING:
    from pkcs11_ha.runtime.core import Core


class Changes:
    """Of one run.  All but `notice` is called with `Core.attempting` held, so by one thread at a time."""

    def __init__(self, core: Core, settings: Config, state_dir: str, read: Stamp | None) -> None:
        """`read` is the stamp of the configuration as it was read."""
        self.core = weakref.proxy(core)  # else the two would stay until a garbage collection
        self.wanted = settings  # what is to be; a member that alone serves is waited for
        self.path = os.path.abspath(settings.path)
        self.requests = requests.directory(state_dir)
        self.is_noticed = False
        self._config_read = read
        self._requests_read = requests.stamp(self.requests)
        there = requests.read(self.requests)
        self.drained = there.drained
        self._heeded = {
            asked.serial for asked in there.recover
        }  # before our time: everybody is tried at the start
        self._odd = set(there.odd)
        self._waiting: dict[str, str] = {}  # member -> why it has not left yet
        self.watch = Watch(self._directories, self._something_changed)

    def start(self) -> None:
        """Begins to notice."""
        if self._config_read is not None:  # else it was not read from a file
            requests.provide(self.requests)
            self.watch.start()

    # ---- noticing

    def _directories(self) -> Iterable[str]:
        """That of the file and of what it is a link to, that of the requests, or where that one would appear."""
        files = {os.path.dirname(self.path), os.path.dirname(os.path.realpath(self.path))}
        above = os.path.dirname(self.requests)
        return files | {self.requests if os.path.isdir(self.requests) else above}

    def _something_changed(self) -> None:
        """In the watch's thread, which does no more than say so."""
        if self._config_changed() or requests.stamp(self.requests) != self._requests_read:
            self.notice()

    def _config_changed(self) -> bool:
        return self._config_read is not None and requests.stamp(self.path) != self._config_read

    def notice(self) -> None:
        """Makes the check due: the next call, or the background thread, does the rest."""
        self.is_noticed = True
        self.core.publish_all()

    def heed_in_passing(self) -> None:
        """At queries of slots and tokens, where no thread watches."""
        if not self.watch.is_there and self.core.attempting.acquire(blocking=False):
            try:
                self.heed()
            finally:
                self.core.attempting.release()

    # ---- carrying out

    def heed(self) -> None:
        """Does what was asked for since the last time, if anything was."""
        if not self.is_noticed and self.watch.is_there:
            return
        if self.core.is_by_hand:
            return  # a command is at work on the members that there were
        if self.is_noticed:
            self.is_noticed = False
            self.core.publish_all()  # others need not come here
        if requests.stamp(self.requests) != self._requests_read:
            self._heed_requests()
        if self._config_changed():
            self._reload()
        elif self._waiting:
            self._converge()

    def go_on(self) -> None:
        """A member has come up, or has left: somebody may be waiting for that."""
        if self._waiting:
            self._converge()

    # ---- requests

    def _heed_requests(self) -> None:
        self._requests_read = requests.stamp(self.requests)
        there = requests.read(self.requests)
        for name, why in there.odd:
            if (name, why) not in self._odd:
                self.core.log(
                    Event("request.refused", details={"file": f"{self.requests}/{name}", "why": why})
                )
        self._odd = set(there.odd)
        for name in sorted(there.drained ^ self.drained):
            if member := self.core.members.get(name):
                self.core.drain(member, drained=name in there.drained)
        self.drained = there.drained
        for asked in there.recover:
            if asked.serial not in self._heeded:
                self._heeded.add(asked.serial)
                self._recover(asked.group, asked.member)

    def _recover(self, group: str, name: str) -> None:
        for slot in self.core.slots.values():
            for member in slot.members if slot.is_group and slot.face.label == group else ():
                if name in ("", member.name) and member.state is MemberState.AWAY:
                    self.core.recover(member)

    # ---- the configuration

    def _reload(self) -> None:
        self._config_read = requests.stamp(self.path) or (0, 0, 0, 0, 0)  # gone: as good as any other change
        try:
            new = config.load(self.path)
        except ConfigError as error:
            self.core.log(Event("config.refused", details={"why": str(error)}))
            return
        plan = reload.plan(self.wanted, new)
        self.wanted = plan.settings
        self.core.configure(plan.settings)
        self._waiting.clear()
        self._converge()
        details = {
            key: "; ".join(lines)
            for key, lines in (
                ("done", plan.done),
                ("waits", [f"member {name}: {why}" for name, why in self._waiting.items()]),
                ("restart", plan.restart),
            )
            if lines
        }
        for warning in plan.warnings:
            self.core.log(Event("config.warned", details={"why": warning}))
        if details:
            self.core.log(Event("config.reloaded", details=details))

    def _converge(self) -> None:
        """Members come and go until all is as it is wanted, or somebody must be waited for."""
        before, self._waiting = self._waiting, {}
        configs = {member.name: member for member in self.wanted.members}
        groups = {group.label: group for group in self.wanted.groups}
        own = [slot for slot in self.core.slots.values() if slot.is_group and slot.face.label in groups]
        for slot in own:
            self._part(slot, groups[slot.face.label], configs)
        for slot in own:
            self._join(slot, groups[slot.face.label], configs)
        self.core.publish_all()
        for name in before:
            if name not in self._waiting:
                self.core.log(
                    Event("config.reloaded", "", name, {"done": "it need not be waited for any more"})
                )

    def _part(self, slot: VirtualSlot, group: GroupConfig, configs: dict[str, MemberConfig]) -> None:
        """Who is in the group no more, or is to be met anew, leaves it: but not before somebody else serves."""
        names = reload.names_of(group)
        for member in slot.members:
            if member.name in names and member.config == configs[member.name]:
                continue
            if why := self._needed(slot, member):
                self._waiting[member.name] = why
            else:
                self.core.part(member)

    @staticmethod
    def _needed(slot: VirtualSlot, member: Member) -> str:
        """Why it cannot leave now, empty if it can."""
        if member.connecting:
            return "an attempt to connect it is under way"
        if not slot.serving_mask >> slot.index(member) & 1:
            return ""
        others = slot.serving_if(lambda other: other is not member and other.state is MemberState.UP)
        return "" if others else "it alone serves, and goes on until another member does"

    def _join(self, slot: VirtualSlot, group: GroupConfig, configs: dict[str, MemberConfig]) -> None:
        names = reload.names_of(group)
        seated: dict[str, Member] = {member.name: member for member in slot.members}
        for name in names:
            if name in seated:
                continue
            member, why = self.core.enlist(slot, configs[name], drained=name in self.drained)
            if member is not None:
                seated[name] = member
            else:
                self._waiting[name] = why
        leaving = [member for member in slot.members if member.name not in names]
        order = [seated[name] for name in names if name in seated]
        slot.arrange([*order, *leaving], group.standby)
