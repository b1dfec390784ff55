"""A client process of a soak: threads that work through the module, and write down what came of it.

Started as `python -m tests.soak.client TASK`, where TASK is a file of JSON (see Task).  It ends when its stop flag is
set, or is killed; then another one of the same name carries on, and takes over its token objects.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests import p11
from tests.chaos import objects
from tests.ha.keys import Keys
from tests.soak import plants
from tests.soak.checker import LOGIN
from tests.soak.history import Did, Record, Writer, now
from tests.soak.operations import OPERATIONS, OWN_AT_MOST, Operation, Work, Wrong, refused

BREATH_S = 0.01  # after a call that failed, so that a moment without members is not a million failures
LOGIN_EVERY_S = 8.0  # for each client, on the average
LOGINS, WRITES = 1, 2  # what the board can bar


@dataclass(frozen=True)
class Task:
    """Where a client works, and on what."""

    module: str
    name: str
    life: int  # how many there were before it of that name
    place: int  # in the board
    threads: int
    seed: int
    pin: str
    history: str
    board: str
    keys: str
    replicated: bool
    only: Sequence[str] = ()
    plant: str = ""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> Task:
        return Task(**json.loads(path.read_text()))


class Board:
    """Numbers in a file that the driver and its clients map: a stop flag, who is ready, and who has done how much."""

    _CELL = struct.Struct("Q")

    def __init__(self, path: Path, clients: int, threads: int) -> None:
        self._threads = threads
        size = self._CELL.size * (2 + clients * (1 + threads))
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)

    def _get(self, cell: int) -> int:
        return int(self._CELL.unpack_from(self._map, cell * self._CELL.size)[0])

    def _put(self, cell: int, value: int) -> None:
        self._CELL.pack_into(self._map, cell * self._CELL.size, value)

    def _cell(self, place: int, number: int) -> int:
        return 2 + place * (1 + self._threads) + number

    @property
    def stopped(self) -> bool:
        return self._get(0) != 0

    def stop(self) -> None:
        self._put(0, 1)

    @property
    def bars(self) -> int:
        """What clients are not to begin now."""
        return self._get(1)

    def bar(self, what: int) -> None:
        self._put(1, what)

    def is_ready(self, place: int, life: int) -> bool:
        return self._get(self._cell(place, 0)) == life + 1

    def ready(self, place: int, life: int) -> None:
        self._put(self._cell(place, 0), life + 1)

    def count(self, place: int, thread: int) -> None:
        """One more; each cell has one writer."""
        cell = self._cell(place, 1 + thread)
        self._put(cell, self._get(cell) + 1)

    def done(self, clients: int) -> int:
        return sum(self._get(self._cell(c, 1 + t)) for c in range(clients) for t in range(self._threads))

    def close(self) -> None:
        self._map.close()


class Watched(p11.Module):
    """Knows the slowest call since `watch`."""

    slowest_us, slowest = 0, ""

    def watch(self) -> None:
        self.slowest_us, self.slowest = 0, ""

    def rv(self, name: str, *arguments: object) -> int:
        start = now()
        rv = super().rv(name, *arguments)
        took = now() - start
        if took >= self.slowest_us:
            self.slowest_us, self.slowest = took, name
        return rv


class Gate:
    """Many pass at once, or one alone: a logout is everybody's."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside, self._waiting = 0, 0

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._waiting += 1
            self._condition.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._condition:
                self._waiting -= 1
                self._condition.notify_all()


class Program:
    """The process: its threads share the module, the login and the history."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.writer = Writer(Path(task.history))
        self.gate = Gate()
        self.chance = random.Random(f"{task.seed} {task.name} {task.life}")
        saved = json.loads(Path(task.keys).read_text())
        self.keys = Keys(
            _ec(saved["ec"]), _rsa(saved["rsa"]), bytes.fromhex(saved["aes"]), bytes.fromhex(saved["hmac"])
        )
        self.other_ec = _ec(saved["ec2"]).public_key()
        clients = int(saved["clients"])
        self.board = Board(Path(task.board), clients, task.threads)
        self.logins = 0  # so far: after another one, handles of private objects are new
        self.next_login = time.monotonic() + self.chance.expovariate(1 / LOGIN_EVERY_S)
        self.operations = [
            each
            for each in OPERATIONS
            if (task.replicated or not each.writes) and (not task.only or each.name in task.only)
        ]

    def run(self) -> None:
        module = Watched(self.task.module)
        module.initialize()
        if self.task.plant:
            plants.apply(self.task.plant)
        first = Worker(self, 0, module)
        anchor = module.open(first.work.slot)  # while it is open, no other that is closed is the last one
        while not first.login() and not self.board.stopped:
            time.sleep(BREATH_S)
        self.board.ready(self.task.place, self.task.life)
        workers = [first, *(Worker(self, k, Watched(self.task.module)) for k in range(1, self.task.threads))]
        if self.task.replicated and self.task.life:
            first.take_over(workers[::2])
        threads = [threading.Thread(target=worker.go) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first.did("anchor", lambda: _has_survived(anchor))
        module.finalize()


class Worker:
    """One thread."""

    def __init__(self, program: Program, number: int, module: Watched) -> None:
        task = program.task
        self.program, self.number, self.module = program, number, module
        module.watch()
        slot = module.slots(present=False)[-1]
        uids = (f"{task.name}.{task.life}.{number}.{k}" for k in itertools.count())
        self.work = Work(
            *(task.name, number, module, slot, module.open(slot, rw=True), program.keys, program.other_ec),
            *(random.Random(f"{task.seed} {task.name} {task.life} {number}"), self.tell, uids),
        )
        self.logins = program.logins
        # Every second thread writes: when a write takes its time, not all are waiting for it.
        self.operations = [each for each in program.operations if not each.writes or number % 2 == 0]
        self.weights = [each.weight for each in self.operations]

    def tell(self, record: Record) -> None:
        self.program.writer.write(record)

    def go(self) -> None:
        try:
            while not self.program.board.stopped:
                self.step()
        except BaseException:  # noqa: BLE001 (a client that has lost a thread is no client)
            traceback.print_exc()
            os._exit(70)

    def step(self) -> None:
        bars = self.program.board.bars
        if self.number == 0 and time.monotonic() > self.program.next_login and not bars & LOGINS:
            with self.program.gate.alone():
                self.log_in_anew()
            return
        with self.program.gate.together():
            if self.logins != self.program.logins:
                self.logins = self.program.logins
                self.work.handles.clear()
            (operation,) = self.work.chance.choices(self.operations, self.weights)
            if operation.writes and bars & WRITES:
                time.sleep(BREATH_S)
            elif not self.do(operation):
                self.begin_anew()

    def do(self, operation: Operation) -> bool:
        return self.did(operation.name, lambda: operation.work(self.work))

    def did(self, name: str, work: Callable[[], None]) -> bool:
        """Does it and writes down how it ended; whether it went well."""
        rv, why, failed = "CKR_OK", "", ""
        self.module.watch()
        start = now()
        try:
            work()
        except p11.CkError as error:
            rv, failed = error.name, error.call
        except (Wrong, LookupError) as error:
            why = str(error)
        end = now()
        slowest = self.module.slowest_us
        call = failed or self.module.slowest
        self.tell(Did(self.work.client, self.number, name, start, end, slowest, call, rv, why))
        self.program.board.count(self.program.task.place, self.number)
        return rv == "CKR_OK"

    def begin_anew(self) -> None:
        """A session without what the operation that failed has left in it."""
        time.sleep(BREATH_S)
        with suppress(p11.CkError):
            self.work.session.close()
        while not self.did("open", self.open) and not self.program.board.stopped:
            time.sleep(BREATH_S)

    def open(self) -> None:
        self.work.session = self.module.open(self.work.slot, rw=True)

    # Login

    def login(self) -> bool:
        return self.did(LOGIN, lambda: self.work.session.login(self.program.task.pin))

    def log_in_anew(self) -> None:
        """With a wrong PIN in between, each time another one; until it is done, or nobody wants it any more."""
        program, chance = self.program, self.work.chance
        program.next_login = time.monotonic() + chance.expovariate(1 / LOGIN_EVERY_S)
        program.logins += 1
        self.did("logout", self.work.session.logout)
        wrong = f"no{program.task.name}{program.task.life}x{program.logins}"
        if chance.random() < 0.5:
            self.did(
                "wrong-login", lambda: refused(lambda: self.work.session.login(wrong), p11.CKR_PIN_INCORRECT)
            )
        while not self.login() and not program.board.stopped:
            time.sleep(BREATH_S)

    def take_over(self, workers: Sequence[Worker]) -> None:
        """What those who had this name before have left, for each thread a few."""
        found: list[objects.Thing] = []
        self.did("inherit", lambda: found.extend(self._inheritance()))
        for place, thing in enumerate(found):
            own = workers[place % len(workers)].work.own
            if len(own) < OWN_AT_MOST:
                own.append(thing)

    def _inheritance(self) -> Iterator[objects.Thing]:
        session = self.work.session
        for handle in session.find({p11.CKA_TOKEN: True}):
            if self._label(handle).startswith(f"{self.work.client}.".encode()):
                yield objects.read(session, handle)

    def _label(self, handle: int) -> bytes:
        """Empty if another client has just destroyed it; perhaps not yet on a member that is struck meanwhile."""
        try:
            return self.work.session.get(handle, p11.CKA_LABEL)[0]
        except p11.CkError as error:
            gone = error.rv == p11.CKR_OBJECT_HANDLE_INVALID
            if not gone and handle in self.work.session.find({p11.CKA_TOKEN: True}):
                raise
            return b""


def _has_survived(anchor: p11.Session) -> None:
    """It has outlived all that has happened."""
    if len(anchor.random(8)) != 8:
        raise Wrong("no random bytes")


def _ec(pem: str) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _rsa(pem: str) -> rsa.RSAPrivateKey:
    key = load_pem_private_key(pem.encode(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)  # tells where its threads are
    Program(Task.load(Path(sys.argv[1]))).run()
