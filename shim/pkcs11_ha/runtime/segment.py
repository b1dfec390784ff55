"""This process's status segment: its file from C_Initialize to C_Finalize, and the text in it.

Without a file everything works alike, and nobody sees it from outside.  This is done at each change of a member, for
years: no tuple is made of a generator here, as Python would keep some of each size (its free lists) for ever.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import replace

from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.process import is_alive, pid_namespace, start_of
from pkcs11_ha.spec import segment as layout
from pkcs11_ha.spec.segment import GroupText, MemberText, ProcessText

_SPARE = 8  # records for members that are added while the process runs
_TEXT_BYTES = 4096  # of a process, and of each member
_MOST = 10  # segments of one process: one program after another, by exec
_YOUNG_S = 60.0  # a file may stand without its header for a moment
_WHY = 200


class Unavailable(Exception):
    """There can be no file; `str` says why in one line."""


class Segment:
    """Written by `Core`, under its lock."""

    def __init__(self, directory: str, members: int) -> None:
        """Raises Unavailable."""
        self._text = b""
        self._since: dict[tuple[str, str], tuple[str, int, int]] = {}
        directory = os.path.abspath(directory)
        try:
            with suppress(FileExistsError):
                os.makedirs(directory, mode=0o755, exist_ok=True)
            folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                mode = _mode(os.fstat(folder))
                sweep(folder)
                self._path = os.path.join(directory, _make(folder, mode, members + _SPARE))
            finally:
                os.close(folder)
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"{directory}: {(isinstance(error, OSError) and error.strerror) or error}"
            ) from None

    def tell(self, process: ProcessText) -> None:
        """Writes the text if it has changed; the moments since when are filled in here."""
        process = self._dated(process)
        for most in (_WHY, 0):
            text = json.dumps(_plain(process, most), separators=(",", ":")).encode()
            if text == self._text:
                return
            if native.lib.ha_segment_tell(text, len(text)):
                self._text = text
                return

    def _dated(self, process: ProcessText) -> ProcessText:
        def dated(group: GroupText, member: MemberText) -> MemberText:
            state = "away" if member.state == "connecting" else member.state
            known = self._since.get((group.label, member.name))
            if known is None or known[0] != state:
                known = (state, time.time_ns(), time.monotonic_ns())
                self._since[(group.label, member.name)] = known
            return replace(member, since_ns=known[1], since_monotonic_ns=known[2])

        groups = [replace(g, members=tuple([dated(g, m) for m in g.members])) for g in process.groups]
        return replace(process, groups=tuple(groups))

    def close(self) -> None:
        """Removes the file."""
        native.lib.ha_segment_close()
        with suppress(OSError):
            os.unlink(self._path)


def _plain(process: ProcessText, most: int) -> dict[str, object]:
    """As JSON has it, with so much of the reasons."""
    groups = [
        {**vars(group), "members": [{**vars(m), "why": m.why[:most]} for m in group.members]}
        for group in process.groups
    ]
    return {**vars(process), "groups": groups}


def _mode(status: os.stat_result) -> int:
    """What mode a segment has in such a directory; raises ValueError if there may be none."""
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError("belongs to another user")
    if status.st_mode & stat.S_IWOTH:
        raise ValueError("everybody can write to it")
    return 0o640 if status.st_mode & stat.S_ISGID else 0o600


def _make(folder: int, mode: int, records: int) -> str:
    """The name of a new file, which is mapped; raises OSError, ValueError."""
    pid, started = os.getpid(), start_of(os.getpid())
    if started is None:
        raise ValueError("/proc does not tell when this process was started")
    for number in range(_MOST):
        name = f"{pid}-{started}{f'-{number}' if number else ''}.segment"
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, mode, dir_fd=folder)
        except FileExistsError:
            continue
        try:
            os.fchmod(file, mode)
            _fill(file, pid, started, records)
        except BaseException:
            os.unlink(name, dir_fd=folder)
            raise
        finally:
            os.close(file)
        return name
    raise ValueError("this process has too many segments")


def _fill(file: int, pid: int, started: int, records: int) -> None:
    text_at = layout.HEADER_SIZE + records * layout.RECORD_SIZE
    room = layout.aligned(_TEXT_BYTES + records * _TEXT_BYTES // 4)
    size = text_at + room
    os.posix_fallocate(file, 0, size)  # a disk that is full later would be a signal that kills the process
    where = {"text_at": text_at, "text_room": room, "records_at": layout.HEADER_SIZE, "records": records}
    who = {"pid": pid, "started": started, "pid_namespace": pid_namespace()}
    what = {"version": layout.VERSION, "size": size, "record_size": layout.RECORD_SIZE}
    os.pwrite(file, layout.header({**what, **who, **where}), 0)
    if not native.lib.ha_segment_open(file, size):
        raise ValueError("it cannot be mapped")


def sweep(folder: int) -> None:
    """Removes what was left.  What is not ours to judge, or to remove, stays."""
    for name in left(folder):
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)


def left(folder: int) -> list[str]:
    """The files of processes that are no more."""
    found = []
    with suppress(OSError):
        for name in os.listdir(folder):
            if match := re.fullmatch(layout.NAME, name):
                pid, started = int(match[1]), int(match[2])
                if not is_alive(pid, started) or (pid == os.getpid() and not _is_mapped(name)):
                    found += [name] if _is_segment(folder, name) else []
    return found


def _is_mapped(name: str) -> bool:
    """Whether this program has it; else it is of one that this process was before."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            return any(line.rstrip().endswith(f"/{name}") for line in file)
    except OSError:
        return True


def _is_segment(folder: int, name: str) -> bool:
    """Whether it is one, of this process namespace, or was never finished."""
    with suppress(OSError):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(name, flags, dir_fd=folder)
        try:
            status = os.fstat(file)
            data = os.read(file, layout.HEADER_SIZE) if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(file)
        ours = data[: len(layout.MAGIC)] == layout.MAGIC and len(data) == layout.HEADER_SIZE
        if ours and layout.unpack(layout.HEADER, data)["pid_namespace"] != pid_namespace():
            return False
        unfinished = stat.S_ISREG(status.st_mode) and not data.strip(b"\0")
        return ours or (unfinished and time.time() - status.st_mtime > _YOUNG_S)
    return False
