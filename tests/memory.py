"""What a process has in its memory, as others may see it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

# What is as large as all memory is a sanitizer's shadow: nobody's bytes.
_ALL_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def holds(pid: int, secret: bytes) -> bool:
    """Whether a process has these bytes anywhere in memory that can be read (proc(5), maps)."""
    process = Path(f"/proc/{pid}")
    with (process / "mem").open("rb", buffering=0) as memory:
        for mapping in (process / "maps").read_text(errors="replace").splitlines():
            where, flags = mapping.split()[:2]
            start, end = (int(each, 16) for each in where.split("-"))
            if "r" in flags and end - start < _ALL_MEMORY:
                with suppress(OSError, OverflowError):  # [vvar], [vsyscall]
                    memory.seek(start)
                    if secret in memory.read(end - start):
                        return True
    return False
