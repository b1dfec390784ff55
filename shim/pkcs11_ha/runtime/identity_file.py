"""What a group's identity was when its first member was last seen, so that it is the same while that one is away."""

from __future__ import annotations

import json
import os
from contextlib import suppress

_NAME = "serials.json"


def remembered(directory: str) -> dict[str, str]:
    """Group label -> serial, as far as known; an unreadable file is an empty one."""
    with suppress(OSError, ValueError):
        with open(os.path.join(directory, _NAME), encoding="utf-8") as file:
            serials = json.load(file)
        if isinstance(serials, dict):
            return {str(label): str(serial) for label, serial in serials.items()}
    return {}


def remember(directory: str, serials: dict[str, str]) -> None:
    """Adds to the file, by an atomic rename; without a writable directory nothing is remembered."""
    known = remembered(directory)
    if all(known.get(label) == serial for label, serial in serials.items()):
        return
    path = os.path.join(directory, _NAME)
    with suppress(OSError):
        os.makedirs(directory, mode=0o755, exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(known | serials, file)
        os.replace(temporary, path)
