"""The processes of workers, as /proc shows them."""

from __future__ import annotations

from pathlib import Path


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _all() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def is_worker(pid: int) -> bool:
    """A zombie has no command line, so this is a live one."""
    return _read(pid, "cmdline").split("\0")[0].endswith("/pkcs11-ha-worker")


def started_by(application: int) -> list[int]:
    """Workers that were started for a process."""
    return [
        pid for pid in _all() if is_worker(pid) and f"\0--parent\0{application}\0" in _read(pid, "cmdline")
    ]


def processes(environment: str) -> list[int]:
    """Workers, started and listening, with a text in their environment."""
    return [pid for pid in _all() if is_worker(pid) and environment in _read(pid, "environ")]


def state(pid: int) -> str:
    """Its letter, Z for a zombie; empty if there is none."""
    return _read(pid, "stat").rpartition(")")[2].split()[:1][0] if _read(pid, "stat") else ""


def children(pid: int) -> list[int]:
    """Also those that have ended and were not waited for."""
    found = []
    for each in _all():
        fields = _read(each, "stat").rpartition(")")[2].split()
        if fields and int(fields[1]) == pid:
            found.append(each)
    return found
