"""Status segments as bytes, laid out by the same table as real ones."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, replace
from pathlib import Path

from pkcs11_ha.runtime.process import pid_namespace, start_of
from pkcs11_ha.spec import segment as layout
from pkcs11_ha.spec.segment import GroupText, MemberText, ProcessText

EAST = MemberText(
    name="east",
    serial="1111",
    standby=False,
    state="up",
    up=True,
    since_ns=1_700_000_000_000_000_000,
    since_monotonic_ns=1_000_000_000,
    code="",
    call="",
    why="",
    loss_was_read=False,
    failed=0,
    next_monotonic_ns=None,
    stopped=False,
    owed=None,
    record=0,
)
WEST = replace(EAST, name="west", serial="2222", record=1)
AWAY = replace(
    WEST,
    state="away",
    up=False,
    code="CKR_DEVICE_ERROR",
    call="C_Sign",
    why="C_Sign answered CKR_DEVICE_ERROR",
    owed=3,
)
PROD = GroupText("prod", "1599447001", 0, "least-busy", (EAST, WEST))
APPLICATION = ProcessText("openssl", "1.0", "/etc/pkcs11-ha/pkcs11-ha.toml", 5, ("clean", "dead"), (PROD,))


def record(**values: int | tuple[int, ...]) -> bytes:
    """A member's record; what is not named is 0."""
    data = bytearray(layout.RECORD_SIZE)
    for each, at in layout.offsets(layout.COUNTERS):
        value = values.get(each.name, (0,) * each.count if each.shape else 0)
        numbers = value if isinstance(value, tuple) else (value,)
        struct.pack_into(f"={len(numbers)}Q", data, at, *numbers)
    return bytes(data)


def segment(
    text: ProcessText | None = APPLICATION, records: tuple[bytes, ...] = (record(), record()), **header: int
) -> bytes:
    """A whole segment, of this process unless `header` says otherwise."""
    plain = b"" if text is None else json.dumps(asdict(text)).encode()
    text_at = layout.HEADER_SIZE + len(records) * layout.RECORD_SIZE
    size = text_at + layout.aligned(len(plain))
    values = {
        "version": layout.VERSION,
        "pid": os.getpid(),
        "size": size,
        "started": start_of(os.getpid()) or 0,
        "pid_namespace": pid_namespace(),
        "text_at": text_at,
        "text_room": size - text_at,
        "records_at": layout.HEADER_SIZE,
        "records": len(records),
        "record_size": layout.RECORD_SIZE,
        "text_size": len(plain),
    }
    return (layout.header(values | header) + b"".join(records) + plain).ljust(size, b"\0")


def put(directory: Path, pid: int, data: bytes | None = None) -> Path:
    """A segment of a process that runs."""
    started = start_of(pid)
    assert started is not None
    path = directory / f"{pid}-{started}.segment"
    path.write_bytes(segment(pid=pid, started=started) if data is None else data)
    return path
