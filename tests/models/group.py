"""The reference of a group: the check of the reference page, who serves, and what the status says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Away:
    """A member that is disconnected."""

    last_recover_attempt: int
    recover_attempt_count: int = 0
    pin_refused: bool = False
    told: bool = False  # its CKR_DEVICE_ERROR was read


class Group:
    """Active members and standbys, X in nanoseconds and N (-1: unlimited)."""

    def __init__(self, names: Sequence[str], standby: Sequence[str], interval_ns: int, attempts: int) -> None:
        self.names, self.standby = names, standby
        self.interval_ns, self.attempts = interval_ns, attempts
        self.away: dict[str, Away] = {}

    def lose(self, name: str, now: int) -> None:
        self.away.setdefault(name, Away(now))

    def due(self, name: str, now: int) -> bool:
        away = self.away.get(name)
        return (
            away is not None
            and not away.pin_refused
            and (self.attempts == -1 or away.recover_attempt_count < self.attempts)
            and now - away.last_recover_attempt > self.interval_ns
        )

    def recovered(self, name: str) -> None:
        del self.away[name]

    def failed(self, name: str, now: int, pin_refused: bool = False) -> None:
        away = self.away[name]
        away.recover_attempt_count += 1
        away.last_recover_attempt, away.pin_refused = now, pin_refused

    def check(self, now: int, works: Callable[[str], bool]) -> list[str]:
        """What every call does first; the members that were tried, by an attempt that takes no time."""
        tried = [name for name in self.names if self.due(name, now)]
        for name in tried:
            if works(name):
                self.recovered(name)
            else:
                self.failed(name, now)
        return tried

    def serving(self) -> list[str]:
        up = [name for name in self.names if name not in self.away]
        return [name for name in up if name not in self.standby] or up

    def status(self) -> dict[str, str]:
        said = {}
        for name in self.names:
            away = self.away.get(name)
            said[name] = (
                "CKR_OK" if not away else "CKR_TOKEN_NOT_PRESENT" if away.told else "CKR_DEVICE_ERROR"
            )
            if away:
                away.told = True
        return said
