"""Host programs in C as tests drive them: `Host` is tests/boundary/host.c, which calls the module as it is told."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests import p11

PATIENCE_S = 30.0
_PAGES, _PAGE = 64, 4096
_WORD = 8

# Where the variables of the interpreter and of our own configuration would come from: a host has what it is given.
_FOREIGN = ("PYTHON", "PKCS11_HA_", "XDG_")


class HostDied(Exception):
    """The host program ended, or had to be ended, in the middle of a command."""


@dataclass(frozen=True)
class Place:
    """Memory of the host."""

    page: int
    offset: int

    def __str__(self) -> str:
        return f"{self.page}:{self.offset}"


Word = int | bytes | Place | None


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The test's own environment, less what would steer a Python or our module, with `given`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    if "ASAN_OPTIONS" in own:
        own["ASAN_OPTIONS"] += ":allocator_may_return_null=1"  # as malloc does
    return own | dict(given or {})


def ulong(*values: int) -> bytes:
    """CK_ULONGs as they are in memory."""
    return b"".join((value & (1 << 64) - 1).to_bytes(_WORD, "little") for value in values)


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Waits for something that has no event of its own."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.005)


class Host:
    """A running host program that has loaded the module `how`: local, global, deepbind or preload."""

    def __init__(
        self,
        program: Path,
        module: Path,
        how: str = "local",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        preload: Sequence[Path] = (),
        deaf: bool = False,
    ) -> None:
        """`deaf`: its stderr is a pipe that nobody reads."""
        libraries = [*preload, *([module] if how == "preload" else [])]
        variables = environment(env)
        if libraries:
            # A sanitizer's runtime, if there is one already, must stay the first.
            before = [variables["LD_PRELOAD"]] if variables.get("LD_PRELOAD") else []
            variables["LD_PRELOAD"] = ":".join([*before, *map(str, libraries)])
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the host)
        self._process = subprocess.Popen(
            [program, how, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=_closed_pipe() if deaf else self._stderr,
            env=variables,
            cwd=cwd,
            bufsize=0,
            # The state that a shell gives its programs: Python's own is another (SIGPIPE is ignored).
            restore_signals=True,
        )
        self._output = b""
        self._next_page = 0
        self.greeting = self._read_line()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    # ---- commands

    def command(self, line: str) -> str:
        """One command, its answer; raises HostDied if there is none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise self._died(line) from None
        return self._read_line(line)

    def rv(self, name: str, *words: Word) -> str:
        """A call; the name of its return value. Bytes are put where the host can point to them."""
        arguments = [self._argument(word) for word in words]
        return p11.rv_name(int(self.command(" ".join(["call", name, *arguments])), 16))

    def spawn(self, name: str, *words: Word) -> None:
        """A call in a thread of the host; `spawned` tells of it."""
        assert self.command(" ".join(["spawn", name, *(self._argument(word) for word in words)])) == "ok"

    def spawned(self) -> str | None:
        """The name of its return value, None while it has none."""
        answer = self.command("spawned")
        return None if answer == "running" else p11.rv_name(int(answer, 16))

    def ok(self, name: str, *words: Word) -> None:
        """A call that must succeed."""
        rv = self.rv(name, *words)
        assert rv == "CKR_OK", f"{name}: {rv}"

    def memory(self, content: bytes) -> Place:
        """Memory of the host with that content, which ends where the page does."""
        place = self.room(len(content))
        # One line of the protocol holds so much.
        for at in range(0, len(content), 1024):
            part = content[at : at + 1024]
            self.command(f"put {place.page} {place.offset + at} {part.hex()}")
        return place

    def room(self, size: int) -> Place:
        """Memory of the host, which ends where the page does. The oldest of 64 is used again."""
        self._next_page = (self._next_page + 1) % _PAGES
        return Place(self._next_page, _PAGE - -(-size // _WORD) * _WORD)

    def read(self, place: Place, size: int) -> bytes:
        return bytes.fromhex(self.command(f"get {place.page} {place.offset} {size}"))

    def number(self, place: Place) -> int:
        """The CK_ULONG that is there."""
        return int.from_bytes(self.read(place, _WORD), "little")

    # ---- what an application does

    def new(self, name: str, *words: Word) -> int:
        """A call that must succeed and whose last argument takes a handle or a number: that."""
        place = self.room(_WORD)
        self.ok(name, *words, place)
        return self.number(place)

    def slots(self) -> list[int]:
        slots, count = self.room(16 * _WORD), self.memory(ulong(16))
        self.ok("C_GetSlotList", 1, slots, count)
        return [self.number(Place(slots.page, slots.offset + i * _WORD)) for i in range(self.number(count))]

    def open(self, slot: int = 0, rw: bool = True) -> int:
        flags = p11.CKF_SERIAL_SESSION | (p11.CKF_RW_SESSION if rw else 0)
        return self.new("C_OpenSession", slot, flags, None, None)

    def login(self, session: int, pin: str) -> None:
        self.ok("C_Login", session, p11.CKU_USER, pin.encode(), len(pin.encode()))

    def attributes(self, template: Mapping[int, p11.Value]) -> tuple[Place, int]:
        """A template and its length, as two arguments."""
        entries = []
        for kind, value in template.items():
            raw = _raw(value)
            entries.append((kind, self.memory(raw), len(raw)))
        base = self._address()
        return self.memory(
            b"".join(ulong(kind, _at(base, place), size) for kind, place, size in entries)
        ), len(template)

    def mechanism(self, kind: int, parameter: bytes = b"") -> Place:
        pointer = _at(self._address(), self.memory(parameter)) if parameter else 0
        return self.memory(ulong(kind, pointer, len(parameter)))

    def find(self, session: int, template: Mapping[int, p11.Value]) -> list[int]:
        self.ok("C_FindObjectsInit", session, *self.attributes(template))
        found, count = self.room(16 * _WORD), self.room(_WORD)
        self.ok("C_FindObjects", session, found, 16, count)
        self.ok("C_FindObjectsFinal", session)
        return [self.number(Place(found.page, found.offset + i * _WORD)) for i in range(self.number(count))]

    def sign(self, session: int, key: int, digest: bytes) -> bytes:
        """An ECDSA P-256 signature, r and s of 32 bytes each."""
        self.ok("C_SignInit", session, self.mechanism(p11.CKM_ECDSA), key)
        signature, size = self.room(64), self.memory(ulong(64))
        self.ok("C_Sign", session, digest, len(digest), signature, size)
        return self.read(signature, self.number(size))

    # ---- how it is, and its end

    def status(self, name: str, thread: int | None = None) -> str:
        """A line of /proc/PID/status, or of one of its threads."""
        for line in Path(f"/proc/{self.pid}/task/{thread or self.pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        raise LookupError(name)

    def threads(self) -> list[int]:
        return sorted(int(entry.name) for entry in Path(f"/proc/{self.pid}/task").iterdir())

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def mappings(self) -> int:
        return len(Path(f"/proc/{self.pid}/maps").read_text().splitlines())

    def exit(self) -> int:
        """Lets it end by itself; its exit status, negative the signal that ended it."""
        assert self._process.stdin is not None
        if self.alive:
            self._process.stdin.write(b"exit\n")
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise HostDied("the host does not end") from None

    def lines(self) -> list[str]:
        """What it has written to stderr."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").splitlines()

    def close(self) -> None:
        """Ends it, however it is."""
        if self.alive:
            self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            if file is not None:
                file.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    # ----

    def _argument(self, word: Word) -> str:
        if word is None:
            return "0"
        if isinstance(word, bytes):
            word = self.memory(word)
        return str(word)

    def _address(self) -> int:
        """Where page 0 is, for pointers inside structures."""
        return int(self.command("base"), 16)

    def _read_line(self, command: str = "start") -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + PATIENCE_S
        while b"\n" not in self._output:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                raise self._died(command, hangs=not ready)
            self._output += part
        line, _, self._output = self._output.partition(b"\n")
        return line.decode()

    def _died(self, command: str, hangs: bool = False) -> HostDied:
        if hangs:
            self._process.kill()
        status = self._process.wait(PATIENCE_S)
        end = "hangs" if hangs else f"exit status {status}"
        if not hangs and status < 0:
            end = signal.Signals(-status).name
        return HostDied(f"{command}: {end}; stderr: {self.lines()}")


def _closed_pipe() -> int:
    """The end to write to of a pipe whose other end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def _at(base: int, place: Place) -> int:
    return base + place.page * 2 * _PAGE + place.offset


def _raw(value: p11.Value) -> bytes:
    match value:
        case bool():
            return bytes([value])
        case int():
            return ulong(value)
        case str():
            return value.encode()
        case bytes():
            return value
