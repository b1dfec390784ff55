"""between.c as a soak holds it: what it is told by its environment, and the orders to lose something."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from tests.chaos.crash import compiled

_ORDERS = struct.Struct("QQ")  # sessions and logins to be lost by each process so far
_SOURCE = Path(__file__).with_name("between.c")


def build(directory: Path) -> Path:
    return compiled(str(_SOURCE), directory / "libbetween.so")


def planted(module: Path, plant: str) -> dict[str, str]:
    """The environment of a client whose module has a bug."""
    return {"BETWEEN_MODULE": str(module), "BETWEEN_PLANT": plant}


class Orders:
    """Of one member: each process that has its library loses what it is told to."""

    def __init__(self, file: Path, history: Path, member: str) -> None:
        self.file, self._history, self._member = file, history, member
        file.write_bytes(bytes(_ORDERS.size))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), _ORDERS.size)

    def env(self, module: Path) -> dict[str, str]:
        return {
            "BETWEEN_MODULE": str(module),
            "BETWEEN_ORDERS": str(self.file),
            "BETWEEN_HISTORY": str(self._history),
            "BETWEEN_MEMBER": self._member,
        }

    def lose(self, sessions: int = 0, logins: int = 0) -> None:
        before = _ORDERS.unpack_from(self._map)
        _ORDERS.pack_into(self._map, 0, before[0] + sessions, before[1] + logins)

    def close(self) -> None:
        self._map.close()
