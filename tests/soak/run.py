"""A soak: clients that work over a group while its members are struck, and what the checker says of it.

`python -m tests.soak --operations N --seconds S --seed K`: ends when so much is done or so much time has passed, and
with status 1 if anything was violated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from demo.members import SoftToken, Table, Toml, write_config
from tests.chaos import stores
from tests.chaos.members import P11HA
from tests.conftest import ROOT
from tests.ha.app import bare
from tests.ha.keys import Keys, ec_private, ec_public, provision
from tests.soak import between, plan, plants
from tests.soak.checker import Checker, Report, summary, table
from tests.soak.client import LOGINS, WRITES, Board, Task
from tests.soak.faults import EFFECTS, Member, mount, unmount, without_core_files
from tests.soak.history import (
    Client,
    Fault,
    Given,
    Held,
    Left,
    NotTakenIn,
    Over,
    Record,
    Setting,
    Settled,
    Writer,
    now,
    read,
)
from tests.soak.operations import NOT_THROUGH_P11_KIT, OPERATIONS
from tests.soak.plan import ARENAS, BLACKOUT, Arena, Step, Strike

PIN = "123456"
LABEL = "prod"
MEMORY = Path("/dev/shm")
CALL_TIMEOUT_S = 2.0
RECOVERY: Table = {"interval_s": 0.3, "connect_timeout_s": 2.0}
NOTICE_S = 1.0  # in which clients at work meet every member, and see that it was away
PATIENCE_S = 40.0
POLL_S = 0.02
DEATHS_AT_MOST = 20
_LOST = re.compile(r" member=(\S+) (member\.lost|member\.recovered|recovery\.stopped) ")


@dataclass(frozen=True)
class Order:
    """What is asked of a run."""

    operations: int
    seconds: float
    seed: int
    clients: int = 3
    threads: int = 4
    kinds: tuple[str, ...] = ()  # of faults; none: all
    only: tuple[str, ...] = ()  # of operations; none: all
    plant: str = ""
    module: Path = ROOT / "build" / "libpkcs11-ha.so"


class Log:
    """The HA log of one client, read as it grows: which members it has lost and not got back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at, self._away, self.stopped = 0, Counter[str](), set[str]()

    def look(self) -> None:
        if not self.path.exists():
            return
        with self.path.open() as log:
            log.seek(self._at)
            for line in log:
                if not line.endswith("\n"):
                    break
                self._at += len(line.encode())
                if found := _LOST.search(line.rstrip("\n") + " "):
                    self._note(*found.groups())

    def _note(self, member: str, event: str) -> None:
        if event == "recovery.stopped":
            self.stopped.add(member)
        else:
            self._away[member] = int(event == "member.lost")

    def has(self, member: str) -> bool:
        return not self._away[member]


@dataclass
class Seated:
    """A client of the soak, one process after the other."""

    name: str
    place: int
    env: dict[str, str]
    log: Log
    life: int = -1
    process: subprocess.Popen[bytes] | None = None
    killed: bool = False


@dataclass
class Soak:
    """One arena, from its set-up to what its tokens hold in the end."""

    arena: Arena
    order: Order
    directory: Path
    say: Callable[[str], None]
    stack: ExitStack = field(default_factory=ExitStack)

    # ---- set-up

    def __enter__(self) -> Soak:
        with ExitStack() as stack:
            self.stack = stack
            self._set_up()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _set_up(self) -> None:
        library = between.build(self.directory)
        self.history = self.directory / "history"
        self.history.mkdir()
        self.writer = Writer(self.history / "driver")
        self.stack.callback(self.writer.close)
        keys, other = Keys.generate(), ec.generate_private_key(ec.SECP256R1())
        self._save_keys(keys, other)
        self.members = {seat.name: self._member(seat, library, keys, other) for seat in self.arena.seats}
        if self.arena.replication == "domain":
            self._p11ha("domain", "init", LABEL, "--shares", "none")
        self.writer.write(self._setting(), *self._given())
        for member in self.members.values():
            self.stack.callback(member.close)
            member.start()
        self.library = library
        self.board = Board(self.directory / "board", self.order.clients, self.order.threads)
        self.stack.callback(self.board.close)
        names = [f"c{number}" for number in range(self.order.clients)]
        self.clients = {name: self._seat(name, place) for place, name in enumerate(names)}
        self.stack.callback(self._end_clients)
        self.unsettled: dict[str, int] = {}  # member -> when its last fault was over
        self.deaths = 0  # of clients, by themselves
        self.struck: Counter[str] = Counter()  # faults on a member that are not over

    def _member(
        self, seat: plan.Seat, library: Path, keys: Keys, other: ec.EllipticCurvePrivateKey
    ) -> Member:
        directory = self.directory / seat.name
        own_disk = mount(directory)
        if own_disk:
            self.stack.callback(unmount, directory)
        token = SoftToken(directory, seat.name, PIN)
        provision(token, keys)
        with bare(token) as session:
            session.create(ec_private(other, "ec2", b"\xed"))
            session.create(ec_public(other.public_key(), "ec2", b"\xed"))
        return Member(seat, token, library, self.history / f"pins-{seat.name}", CALL_TIMEOUT_S, own_disk)

    def _save_keys(self, keys: Keys, other: ec.EllipticCurvePrivateKey) -> None:
        how = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        saved = {name: key.private_bytes(*how).decode() for name, key in (("ec", keys.ec), ("ec2", other))}
        saved |= {
            "rsa": keys.rsa.private_bytes(*how).decode(),
            "aes": keys.aes.hex(),
            "hmac": keys.hmac.hex(),
        }
        (self.directory / "keys").write_text(json.dumps(saved | {"clients": self.order.clients}))

    def _setting(self) -> Setting:
        connect_timeout_s = RECOVERY["connect_timeout_s"]
        assert isinstance(connect_timeout_s, float)
        times = round(CALL_TIMEOUT_S * 1e6), round(connect_timeout_s * 1e6)
        writes = [each.name for each in OPERATIONS if each.writes]
        unable = {seat.name: list(NOT_THROUGH_P11_KIT) for seat in self.arena.seats if not seat.complete}
        return Setting(
            self.arena.name, self.order.seed, list(self.members), *times, self.order.clients, writes, unable
        )

    def _given(self) -> Iterator[Record]:
        for held in self._held(next(iter(self.members.values())).token):
            yield Given(held.kind, held.label, held.proof)
        for name in self.members:
            yield Settled(now(), name)

    def _configure(self, name: str, tables: Sequence[Table]) -> dict[str, str]:
        state = self.directory / "state"
        state.mkdir(exist_ok=True, mode=0o700)
        group: dict[str, Toml] = {"label": LABEL, "serial": "1599447001", "members": list(self.members)}
        if self.arena.replication == "domain":
            group |= {"replication": "domain", "session_keys": "replicate"}
        conf = self.directory / f"{name}.toml"
        write_config(conf, tables, [group], RECOVERY, {"log": f"file:{self.directory / name}.log"})
        return {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": str(state)}

    def _p11ha(self, *words: str) -> None:
        """A command of the operator's, on tokens that nobody uses."""
        env = self._configure("operator", [member.plain() for member in self.members.values()])
        pin = self.directory / "pin"
        pin.touch(mode=0o600)
        pin.write_text(PIN)
        command = [str(P11HA), *words, "--pin-source", f"file:{pin}"]
        done = subprocess.run(
            command, env=os.environ | env, capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")

    # ---- clients

    def _seat(self, name: str, place: int) -> Seated:
        env = self._configure(name, [member.table(name) for member in self.members.values()])
        return Seated(name, place, env, Log(self.directory / f"{name}.log"))

    def _start(self, client: Seated) -> None:
        client.life += 1
        client.killed = False
        if client.log.path.exists():  # of the one before
            client.log.path.rename(client.log.path.with_suffix(f".{client.life}.log"))
        client.log = Log(client.log.path)
        plant = self.order.plant
        env, module = client.env, self.order.module
        if plant in plants.BETWEEN:
            env, module = env | between.planted(module, plant), self.library
        task = Task(
            str(module), client.name, client.life, client.place, self.order.threads, self.order.seed, PIN,
            str(self.history / client.name), str(self.directory / "board"), str(self.directory / "keys"),
            self.arena.replication == "domain", self.order.only, plant,
        )  # fmt: skip
        task.save(self.directory / f"{client.name}.json")
        self.writer.write(Client(now(), client.name, "began"))
        with (self.directory / f"{client.name}.stderr").open("ab") as stderr:
            client.process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.client", str(self.directory / f"{client.name}.json")],
                cwd=ROOT,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def _kill(self, client: Seated) -> None:
        client.killed = True
        if client.process:
            client.process.kill()
            client.process.wait()
        self.writer.write(Client(now(), client.name, "killed"))

    def _end_clients(self) -> None:
        for client in self.clients.values():
            if client.process:
                client.process.kill()
                client.process.wait()

    def _look_after(self) -> None:
        """Clients that ended by themselves are told of, and replaced."""
        for client in self.clients.values():
            if client.process and not client.killed and (status := client.process.poll()) is not None:
                self._told(client, f"ended with status {status}")
                self.deaths += 1
                if self.deaths > DEATHS_AT_MOST:
                    raise RuntimeError(f"clients do not live: {self._words(client)}")
                self._start(client)

    def _told(self, client: Seated, what: str) -> None:
        words = self._words(client)
        self.writer.write(Client(now(), client.name, f"{what}: {words}" if words else what))
        self.say(f"  {client.name} {what}")

    def _words(self, client: Seated) -> str:
        """The end of what its processes have said."""
        return (self.directory / f"{client.name}.stderr").read_text(errors="replace")[-1500:]

    def _lacking(self, member: str) -> list[Seated]:
        """Clients that are not at work with it."""
        lacking = []
        for client in self.clients.values():
            client.log.look()
            if not (self.board.is_ready(client.place, client.life) and client.log.has(member)):
                lacking.append(client)
        return lacking

    # ---- faults

    def _poll(self) -> None:
        self._look_after()
        for member, since in list(self.unsettled.items()):
            if not self.struck[member] and now() - since > NOTICE_S * 1e6 and not self._lacking(member):
                del self.unsettled[member]
                self.writer.write(Settled(now(), member))
        time.sleep(POLL_S)

    def _await(self, members: Sequence[str]) -> None:
        """Every client has them; one that does not get a member back is told of, and begins anew."""
        deadline = time.monotonic() + PATIENCE_S
        while any(member in self.unsettled or self._lacking(member) for member in members):
            self._poll()
            if time.monotonic() > deadline:
                for member in members:
                    for client in self._lacking(member):
                        self.writer.write(NotTakenIn(now(), member, client.name))
                        self.say(f"  {client.name} has not got {member} back")
                        self._kill(client)
                        self._start(client)
                deadline = time.monotonic() + PATIENCE_S

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._poll()

    def _strike(self, step: Step) -> None:
        self.say(f"  step {step.number}: {', '.join(f'{each.kind} {each.target}' for each in step.strikes)}")
        with self._barred(step):
            for strike in step.strikes:
                self._begin(step.number, strike)
            self._rest(step.hold_s)
            for strike in step.strikes:
                self._end(step.number, strike)

    @contextmanager
    def _barred(self, step: Step) -> Iterator[None]:
        """What clients do not begin meanwhile, as nobody could say what must come of it.

        A member that has another PIN rightly refuses the old one.  When all members are lost, the first to return
        shows what it has, whatever the others were told after it had died.
        """
        what = {"pin-refused": LOGINS, BLACKOUT: WRITES}.get(step.strikes[0].kind, 0)
        self.board.bar(what)
        if what:
            self._rest(NOTICE_S)  # what was begun comes to its end
        yield
        if what == WRITES:
            self._await(list(self.members))
        self.board.bar(0)

    def _begin(self, number: int, strike: Strike) -> None:
        self.writer.write(Fault(now(), number, strike.kind, strike.target))
        if strike.target in self.clients:
            self._kill(self.clients[strike.target])
            return
        self.struck[strike.target] += 1
        EFFECTS[strike.kind][0](self.members[strike.target])
        if strike.kind == "pin-refused":
            deadline = time.monotonic() + NOTICE_S * 3
            while time.monotonic() < deadline and not self._all_stopped(strike.target):
                self._poll()

    def _all_stopped(self, member: str) -> bool:
        self._lacking(member)
        return all(member in client.log.stopped for client in self.clients.values())

    def _end(self, number: int, strike: Strike) -> None:
        if strike.target in self.clients:
            self._start(self.clients[strike.target])
        else:
            EFFECTS[strike.kind][1](self.members[strike.target])
            self.members[strike.target].heal()
            self.struck[strike.target] -= 1
            self.unsettled[strike.target] = now()
        if strike.kind == "pin-refused":
            for client in self.clients.values():
                self._kill(client)
                self._start(client)
        self.writer.write(Over(now(), number, strike.kind, strike.target))

    # ---- the run

    def run(self, operations: int, seconds: float) -> None:
        """Until so much is done, or so much time has passed."""
        everybody = list(self.members)
        for client in self.clients.values():
            self._start(client)
        self._await(everybody)
        deadline = time.monotonic() + seconds
        for step in plan.steps(self.arena, list(self.clients), self.order.seed, self.order.kinds):
            if self._enough(operations, deadline):
                break
            self._await([step.spare] if step.spare else everybody)
            self._rest(step.pause_s)
            self._strike(step)
        while not self._enough(operations, deadline):
            self._poll()  # a run without faults
        self._await(everybody)
        self._leave()

    def _enough(self, operations: int, deadline: float) -> bool:
        return time.monotonic() > deadline or self.board.done(self.order.clients) >= operations

    def _leave(self) -> None:
        self.board.stop()
        deadline = time.monotonic() + PATIENCE_S
        for client in self.clients.values():
            assert client.process
            try:
                status = client.process.wait(max(0.1, deadline - time.monotonic()))
                client.killed = True
                if status:
                    self._told(client, f"ended with status {status}")
                else:
                    self.writer.write(Client(now(), client.name, "left"))
            except subprocess.TimeoutExpired:
                client.process.send_signal(signal.SIGUSR1)  # it says where its threads are
                with suppress(subprocess.TimeoutExpired):
                    client.process.wait(1)
                self._told(client, "does not end")
                self._kill(client)

    def judge(self) -> Report:
        """What the tokens hold, and what the checker says."""
        for member in self.members.values():
            member.close()
        if self.arena.replication == "domain":
            self._p11ha("sync", LABEL)
        for name, member in self.members.items():
            stores.stir(member.token)
            store = stores.read(member.token)
            self.writer.write(*(Left(name, each) for each in stores.half_done(store)))
            self.writer.write(*_shown(name, store))
        checker = Checker(read(self.history / "driver"))
        for path in sorted(self.history.iterdir()):
            if path.name != "driver":
                for record in read(path):
                    checker.take(record)
        return checker.finish()

    def _held(self, token: SoftToken) -> Iterator[Held]:
        return _shown(token.label, stores.read(token))


def _shown(name: str, store: stores.Store) -> Iterator[Held]:
    for thing in store.things:
        yield Held(name, thing.kind, thing.label, sha256(store.proofs[thing]).hexdigest()[:16])


@contextmanager
def scratch() -> Iterator[Path]:
    """In memory if possible: a token writes every object through to its disk."""
    with tempfile.TemporaryDirectory(prefix="p11ha-", dir=MEMORY if MEMORY.is_dir() else "/tmp") as path:
        yield Path(path)


def soak(
    arena: Arena,
    order: Order,
    operations: int,
    seconds: float,
    say: Callable[[str], None],
    keep: Path | None = None,
) -> Report:
    """One arena; `keep` gets its directory when something was violated."""
    with scratch() as directory:
        with Soak(arena, order, directory, say) as one:
            one.run(operations, seconds)
            report = one.judge()
        if keep and report.violations:
            shutil.copytree(
                directory, keep / arena.name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock")
            )
    return report


def run(
    order: Order, say: Callable[[str], None], keep: Path | None = None, arenas: Sequence[Arena] = ARENAS
) -> tuple[Report, float]:
    """Each arena for its share; the report of all, and how many seconds they took."""
    reports, start = [], time.monotonic()
    for arena in arenas:
        say(f"soak: {arena.name}, seed {order.seed}")
        reports.append(
            soak(arena, order, order.operations // len(arenas), order.seconds / len(arenas), say, keep)
        )
    return summary(reports), time.monotonic() - start


def _end(number: int, _frame: object) -> None:
    """SIGTERM, once: a run that is ended leaves nothing behind."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--operations", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4, help="of each client")
    parser.add_argument("--arena", choices=[arena.name for arena in ARENAS], help="one of them alone")
    parser.add_argument("--faults", default="", help="kinds of faults, with commas; none: all")
    parser.add_argument("--only", default="", help="names of operations, with commas; none: all")
    parser.add_argument("--plant", default="", help="a bug that must be found")
    parser.add_argument("--keep", type=Path, help="where histories and logs go when something was violated")
    given = parser.parse_args()
    without_core_files()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # it leaves nothing behind either
    order = Order(
        given.operations, given.seconds, given.seed, given.clients, given.threads,
        tuple(filter(None, given.faults.split(","))), tuple(filter(None, given.only.split(","))), given.plant,
    )  # fmt: skip
    arenas = [arena for arena in ARENAS if given.arena in (None, arena.name)]
    report, seconds = run(order, print, given.keep, arenas)
    print(*report.violations, sep="\n")
    for sort, count in report.sorts.most_common():
        print(f"{count:6} {sort}")
    print(*table(report, seconds), f"soak: seed {order.seed}", sep="\n")
    return 1 if report.counted else 0
