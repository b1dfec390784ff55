"""Processes of this host: a process id comes again, together with the moment of its start it does not."""

from __future__ import annotations

import os
from contextlib import suppress

_STAT_BYTES = 4096


def start_of(pid: int) -> int | None:
    """When a process was started, in ticks since the system was; None if there is none."""
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fields = os.read(file, _STAT_BYTES).rpartition(b")")[2].split()
        finally:
            os.close(file)
    except OSError:  # also where it ended between the two
        return None
    return None if fields[0] in b"ZX" else int(fields[19])


def pid_namespace() -> int:
    """The namespace that gives process ids their meaning here; 0 if that is not to be known."""
    with suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def program() -> str:
    """The name of this process's executable: its arguments may hold secrets."""
    with suppress(OSError):
        return os.path.basename(os.readlink("/proc/self/exe"))
    return ""


def is_alive(pid: int, started: int) -> bool:
    """Whether that very process still runs; where /proc hides those of other users, one that may is taken for it."""
    start = start_of(pid)
    if start is None:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        except (OSError, OverflowError):
            return False
    return start == started
