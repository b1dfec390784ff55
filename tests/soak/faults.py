"""The members of a soak, and what is done to them: each kind of the plan as a beginning and an end."""

from __future__ import annotations

import copy
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from demo.members import Server, SoftToken, Table, Toml, Worker, p11_kit_client, softhsm
from tests.ha.app import bare
from tests.soak.between import Orders
from tests.soak.plan import Form, Seat
from tests.soak.relay import Relay

STORE_BYTES = 24 << 20  # of a token's file system, where we may mount one
SLOW_S = 0.02
OTHER_PIN = "654321"
_PIECE = 1 << 16
_WRITTEN_S = 0.05  # SoftHSM needs less for a file


def mount(directory: Path) -> bool:
    """A small file system of its own for a token, so that its disk can be full; whether we may."""
    directory.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={STORE_BYTES}", "p11ha-soak", str(directory)]
    with suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def unmount(directory: Path) -> None:
    subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False)


def processes(token: SoftToken) -> list[int]:
    """All that have the token's library: workers, servers and their children; zombies have no environment."""
    wanted, found = f"SOFTHSM2_CONF={token.conf}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@dataclass
class Member:
    """A token, the processes and the relay in front of it."""

    seat: Seat
    token: SoftToken
    between: Path  # the library between a member's process and SoftHSM
    history: Path
    call_timeout_s: float
    own_disk: bool
    stack: ExitStack = field(default_factory=ExitStack)
    server: Server | None = None
    relay: Relay | None = None
    _signalled: list[int] = field(default_factory=list)
    _own_data: bytes = b""

    def __post_init__(self) -> None:
        self.orders = Orders(self.token.directory / "orders", self.history, self.seat.name)
        self.stack.callback(self.orders.close)
        self.env = self.token.env | self.orders.env(softhsm())
        self.heal()

    def start(self) -> None:
        watched = copy.copy(self.token)
        watched.env = self.env
        if self.seat.form is Form.WORKER:
            self.server = self.stack.enter_context(Worker(watched, provider=self.between))
        elif self.seat.form is Form.SERVER:
            self.server = self.stack.enter_context(Server(watched, provider=self.between))
            path = self.token.directory / "relay.sock"
            self.relay = self.stack.enter_context(Relay(path, self.server.socket))

    def close(self) -> None:
        self._continue()
        self.stack.close()

    def table(self, client: str) -> Table:
        """As a `[[member]]` of a client."""
        limits = dict.fromkeys(("information", "cryptography", "generation"), self.call_timeout_s)
        options: dict[str, Toml] = {"profile": "softhsm", "call_timeout_s": limits}
        if self.seat.form is Form.WORKER:
            assert self.server
            return self.server.member(**options)
        options |= {"host": "worker", "instance": "shared"}
        if self.relay:
            address = {"P11_KIT_SERVER_ADDRESS": f"unix:path={self.relay.path}"}
            options |= {"module": str(p11_kit_client()), "env": address, "profile": "p11-kit"}
            return self.token.member(**options)
        own = self.env | {"BETWEEN_CLIENT": client}
        return self.token.member(**options | {"module": str(self.between), "env": own})

    def plain(self) -> Table:
        """As a `[[member]]` without anything in between."""
        return self.token.member()

    # ---- processes

    def kill(self) -> None:
        if self.server:
            self.server.kill()
        else:
            self._signal(signal.SIGKILL)

    def revive(self) -> None:
        """An own worker is started by who needs it."""
        if self.server:
            self.server.kill()  # what a crash has left of it
            self.server.start()

    def crash(self) -> None:
        self._signal(signal.SIGSEGV)

    def exit(self) -> None:
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        self._signalled = self._signal(signal.SIGSTOP)

    def _continue(self) -> None:
        for pid in self._signalled:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._signalled = []

    def _signal(self, number: signal.Signals) -> list[int]:
        found = processes(self.token)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return found

    # ---- the link

    def slow(self) -> None:
        self._link.delay_s = SLOW_S

    def quick(self) -> None:
        self._link.delay_s = 0.0

    @property
    def _link(self) -> Relay:
        assert self.relay
        return self.relay

    # ---- the store

    @property
    def _filler(self) -> Path:
        return self.token.directory / "filler"

    def fill(self) -> None:
        """No block is left; or, where we may mount nothing, no file of its processes may grow."""
        if not self.own_disk:
            for pid in processes(self.token):
                _limit_files(pid, 0)
            return
        with suppress(OSError), self._filler.open("wb", buffering=0) as filler:
            while filler.write(bytes(_PIECE)):
                continue
        with suppress(OSError), self._filler.open("ab", buffering=0) as filler:
            while filler.write(b"\0"):
                continue

    def empty(self) -> None:
        if not self.own_disk:
            for pid in processes(self.token):
                _limit_files(pid, resource.RLIM_INFINITY)
        self._filler.unlink(missing_ok=True)

    @property
    def _store(self) -> Path:
        return self.token.directory / "tokens"

    def move_away(self) -> None:
        self._store.rename(self._store.with_name("away"))

    def move_back(self) -> None:
        if self._store.exists():
            shutil.rmtree(self._store)
        self._store.with_name("away").rename(self._store)

    def heal(self) -> None:
        """SoftHSM empties the file with the token's own data before it writes it, at each login: who dies then, or has
        no room, has lost the token, as no HSM would."""
        file = next(self._store.glob("*/token.object"), None)
        if file is None:
            return
        self._own_data = self._own_data or file.read_bytes()
        if file.stat().st_size == len(self._own_data):
            return
        time.sleep(_WRITTEN_S)
        if file.stat().st_size != len(self._own_data):
            whole = file.with_name("token.whole")
            whole.write_bytes(self._own_data)
            whole.rename(file)

    # ---- the token

    def lose_sessions(self) -> None:
        self.orders.lose(sessions=4)

    def lose_login(self) -> None:
        self.orders.lose(logins=1)

    def change_pin(self) -> None:
        self._set_pin(self.token.pin, OTHER_PIN)
        self.kill()

    def change_pin_back(self) -> None:
        self._set_pin(OTHER_PIN, self.token.pin)

    def _set_pin(self, old: str, new: str) -> None:
        with bare(self.token, login=False) as session:
            session.login(old)
            session.call("C_SetPIN", old.encode(), len(old), new.encode(), len(new))

    # ---- all of it

    def vanish(self) -> None:
        """Also an own worker that is started again finds nothing."""
        self.kill()
        if not self.server:
            self.move_away()

    def appear(self) -> None:
        if not self.server:
            self.move_back()
        self.revive()


def _nothing(_member: Member) -> None:
    """The cause is gone at once."""


EFFECTS: dict[str, tuple[Callable[[Member], None], Callable[[Member], None]]] = {
    "slow": (Member.slow, Member.quick),
    "stall": (lambda m: m._link.stall(), lambda m: m._link.flow()),
    "cut": (lambda m: m._link.cut(), lambda m: m._link.mend()),
    "half-close": (lambda m: m._link.half_close(), _nothing),
    "kill": (Member.kill, Member.revive),
    "restart": (Member.kill, Member.revive),
    "crash": (Member.crash, Member.revive),
    "exit": (Member.exit, Member.revive),
    "stop": (Member.stop, Member._continue),
    "disk-full": (Member.fill, Member.empty),
    "store-away": (Member.move_away, Member.move_back),
    "session-lost": (Member.lose_sessions, _nothing),
    "login-lost": (Member.lose_login, _nothing),
    "pin-refused": (Member.change_pin, Member.change_pin_back),
    "blackout": (Member.vanish, Member.appear),
}
"""By kind; those that strike clients are the driver's."""


def _limit_files(pid: int, soft: int) -> None:
    """RLIMIT_FSIZE: who writes beyond it gets SIGXFSZ, or EFBIG where that is ignored."""
    with suppress(OSError, ProcessLookupError, PermissionError):
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        limit = hard if soft == resource.RLIM_INFINITY else soft
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))


def without_core_files() -> None:
    """For us and what we start: crashes are many."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
