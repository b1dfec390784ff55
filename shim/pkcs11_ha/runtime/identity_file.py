"""The serials of groups and members as they were last seen, so that they are the same while a token is away."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkcs11_ha.config import MemberConfig
    from pkcs11_ha.runtime.member import Member

_NAME = "serials.json"


def seen(config: MemberConfig, known: Mapping[str, str]) -> str:
    """The serial of the token that a member was; empty if that is not known."""
    return known.get(_key(config), "")


def of_members(members: Iterable[Member]) -> dict[str, str]:
    """What is to be remembered of members: the configuration names no serial, and the token was seen."""
    return {
        _key(member.config): member.facts.serial
        for member in members
        if member.facts is not None and member.facts.serial and not member.config.token.serial
    }


def _key(config: MemberConfig) -> str:
    """No label begins with a blank, so it is no group's.  Another token under the same name is another one."""
    return f" {config.name} {config.token}"


def remembered(directory: str) -> dict[str, str]:
    """Group label -> serial, and the same of members; an unreadable file is an empty one."""
    with suppress(OSError, ValueError):
        with open(os.path.join(directory, _NAME), encoding="utf-8") as file:
            serials = json.load(file)
        if isinstance(serials, dict):
            return {str(key): str(serial) for key, serial in serials.items()}
    return {}


def remember(directory: str, serials: dict[str, str]) -> None:
    """Adds to the file, by an atomic rename; without a writable directory nothing is remembered."""
    known = remembered(directory)
    if all(known.get(key) == serial for key, serial in serials.items()):
        return
    path = os.path.join(directory, _NAME)
    with suppress(OSError):
        os.makedirs(directory, mode=0o755, exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(known | serials, file)
        os.replace(temporary, path)
