"""The fault module as tests hold it: a token behind it, the script it reads, and what it says it has injected."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo.members import SoftToken, Table, Toml, softhsm
from tests import p11
from tests.ha.app import environment

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 20.0
# `struct block` in script.c: what comes before its rules, and each of those.
_BLOCK, _HEADER, _RULE = 1 << 16, struct.Struct("8s4QQ16x"), struct.Struct("3Q")


def library() -> Path:
    """It is built beside the module under test."""
    built = os.environ.get("PKCS11_HA_MODULE") or ROOT / "build" / "libpkcs11-ha.so"
    return Path(built).with_name("libpkcs11-fault.so")


@dataclass(frozen=True)
class Count:
    """What a rule has seen and done, in all processes with this script."""

    line: int
    calls: int
    injected: int


class Fault:
    """A token behind the fault module: `fault.script("C_Sign after 3 return CKR_DEVICE_ERROR")`, `fault.injected()`.

    A script may be written anew at any time; its counts begin again.  It may be used in several processes at a time.
    """

    def __init__(self, token: SoftToken, wrapped: Path | None = None) -> None:
        self.token = token
        directory = token.directory / "fault"
        directory.mkdir()
        self._script, self._state = directory / "script", directory / "state"
        self._log = directory / "log"
        # A file of its own is a library of its own, also beside others in one process.
        self._wrapped = Path(shutil.copy(wrapped or softhsm(), directory))
        self.script()
        self.env = {
            **token.env,
            "PKCS11_FAULT_MODULE": str(self._wrapped),
            "PKCS11_FAULT_SCRIPT": str(self._script),
            "PKCS11_FAULT_STATE": str(self._state),
            "PKCS11_FAULT_LOG": str(self._log),
        }

    def member(self, **options: Toml) -> Table:
        """The token as a `[[member]]` that fails as the script says."""
        return self.token.member(module=str(library()), env=self.env, **options)

    @contextmanager
    def module(self) -> Iterator[p11.Module]:
        """The token in this process: a copy of the module, as a library reads its environment but once."""
        copy = self.token.directory / "fault" / library().name
        if not copy.exists():
            shutil.copy(library(), copy)
        with environment(self.env), p11.Module(copy) as module:
            yield module

    def script(self, *lines: str) -> None:
        """From the next call on these rules hold, and no others."""
        new = self._script.with_name("script.new")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.rename(self._script)  # nobody reads half of it

    def counts(self) -> list[Count]:
        """The rules of this script, in their order; none before the first call that knows of it."""
        status = self._script.stat()
        wanted = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        content = self._state.read_bytes() if self._state.exists() else b""
        for start in range(len(content) - _BLOCK, -1, -_BLOCK):
            magic, *version, rules = _HEADER.unpack_from(content, start)
            if magic == b"P11FAULT" and tuple(version) == wanted:
                at = start + _HEADER.size
                end = at + rules * _RULE.size
                return [Count(*each) for each in _RULE.iter_unpack(content[at:end])]
        return []

    def injected(self, line: int | None = None) -> int:
        """How many faults this script has brought about, those of one line if it is given."""
        return sum(count.injected for count in self.counts() if line in (None, count.line))

    def wait_injected(self, count: int = 1) -> None:
        """Until so many were."""
        deadline = time.monotonic() + PATIENCE_S
        while self.injected() < count:
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.injected()} faults were injected, not {count}: {self.counts()}")
            time.sleep(0.005)

    def log(self) -> list[str]:
        """Every call that reached the token, in the order of their ends."""
        return self._log.read_text().splitlines() if self._log.exists() else []
