"""Requests of operators: small files in the state directory that running applications notice, written by `p11ha`.

requests/recover-….json    try the members of a group at once: {"group": …, "member": …, "serial": …}
requests/drained-NAME.json as long as it is there, the member takes no new work: {"member": …}
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256

VERSION = 1
_SIZE_MAX = 4096
_KEPT_S = 7 * 24 * 3600  # an application that was idle for longer does not learn of a request to recover
_DRAINED, _RECOVER, _END = "drained-", "recover-", ".json"

Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Recover:
    """One request to recover; a process heeds each `serial` once.  No member: all of the group."""

    serial: str
    group: str
    member: str


@dataclass(frozen=True)
class Requests:
    """What the directory holds; `odd` are files that are no requests, each with what is wrong with it."""

    recover: tuple[Recover, ...] = ()
    drained: frozenset[str] = frozenset()
    odd: tuple[tuple[str, str], ...] = ()


def directory(state_dir: str) -> str:
    """Where the requests are; it need not exist."""
    return os.path.join(os.path.abspath(state_dir), "requests")


def stamp(path: str) -> Stamp | None:
    """Another one after each change of a file, or of what a directory holds; None where there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read(where: str) -> Requests:
    """All that is there; what cannot be read is passed over, and named."""
    recover: list[Recover] = []
    drained: set[str] = set()
    odd: list[tuple[str, str]] = []
    try:
        names = sorted(os.listdir(where))
    except OSError:
        return Requests()
    for name in names:
        if not name.endswith(_END) or not name.startswith((_DRAINED, _RECOVER)):
            continue  # what is being written, or none of ours
        try:
            content = _content(os.path.join(where, name))
            if name.startswith(_RECOVER):
                serial, group = _text(content, "serial"), _text(content, "group")
                recover.append(Recover(serial, group, _text(content, "member", "")))
            elif _text(content, "member") == name[len(_DRAINED) : -len(_END)]:
                drained.add(_text(content, "member"))
            else:
                odd.append((name, "it names another member"))
        except FileNotFoundError:
            continue  # taken away meanwhile
        except (OSError, ValueError, RecursionError) as error:
            odd.append((name, str(error)))
    return Requests(tuple(recover), frozenset(drained), tuple(odd))


def _content(path: str) -> Mapping[str, object]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        data = file.read(_SIZE_MAX + 1)
    if len(data) > _SIZE_MAX:
        raise ValueError(f"longer than {_SIZE_MAX} bytes")
    content = json.loads(data.decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    if content.get("version") != VERSION:
        raise ValueError(f"not of version {VERSION}")
    return content


def _text(content: Mapping[str, object], key: str, default: str | None = None) -> str:
    value = content.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected a string")
    return value


def provide(where: str) -> None:
    """Sees to it that there is a directory to be watched, where this process may make one."""
    with suppress(OSError):
        os.makedirs(where, mode=0o755, exist_ok=True)


# ---- writing: the command's part; raises OSError


def ask_to_recover(where: str, group: str, member: str) -> Recover:
    """One file for each group and member: a new request takes the place of the one before."""
    _sweep(where)
    asked = Recover(f"{time.time_ns()}-{os.getpid()}", group, member)
    name = f"{_RECOVER}{sha256(f'{group} {member}'.encode()).hexdigest()[:16]}{_END}"
    _write(where, name, vars(asked))
    return asked


def drain(where: str, member: str) -> None:
    """Marks a member as drained, until `enable`."""
    _write(where, f"{_DRAINED}{member}{_END}", {"member": member})


def enable(where: str, member: str) -> bool:
    """Takes the mark away; whether there was one."""
    try:
        os.unlink(os.path.join(where, f"{_DRAINED}{member}{_END}"))
    except FileNotFoundError:
        return False
    return True


def _write(where: str, name: str, content: Mapping[str, object]) -> None:
    """The whole file or none: under another name first."""
    os.makedirs(where, mode=0o755, exist_ok=True)
    temporary = os.path.join(where, f".{name}.{os.getpid()}")
    try:
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, 0o644)  # applications run as other users
            json.dump({"version": VERSION, **content}, file)
            file.write("\n")
        os.replace(temporary, os.path.join(where, name))
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _sweep(where: str) -> None:
    """Requests to recover that are so old that nobody waits for them any more."""
    with suppress(OSError):
        for name in os.listdir(where):
            path = os.path.join(where, name)
            if name.startswith(_RECOVER) and os.lstat(path).st_mtime < time.time() - _KEPT_S:
                os.unlink(path)
