"""Peers that answer garbage, and clients that ask for it: the other side ends the connection and is none the worse."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self

import pytest

from demo.members import SoftToken, Worker
from pkcs11_ha.runtime import native
from pkcs11_ha.spec import wire
from pkcs11_ha.spec.functions import FUNCTIONS, INDEX, Deadline, deadline_class
from pkcs11_ha.spec.wire import Item
from tests.ha.app import until
from tests.spec import golden
from tests.worker import line as lines
from tests.worker.line import Line
from tests.worker.processes import processes
from tests.worker.remote import ROOM, Arguments, Refused, Remote

FRAME = struct.Struct("=IIQ")
ANSWERING = (Item.ROOM, Item.FILL, Item.RESULT, Item.LIST, Item.FOUND, Item.MECHANISM, Item.ANSWERS)
NAMES = [row.name for row in wire.CARRIED]

Answer = Callable[[bytes], bytes]


def words(*values: int) -> bytes:
    return struct.pack(f"={len(values)}Q", *values)


def frame(request: bytes, payload: bytes, row: int = 0, turn: int = 0, size: int | None = None) -> bytes:
    its_row, its_turn, _ = FRAME.unpack(request[: FRAME.size])
    return FRAME.pack(its_row + row, its_turn + turn, len(payload) if size is None else size) + payload


def noise(request: bytes) -> bytes:
    return frame(request, words(0) + random.Random(len(request)).randbytes(64))


# What no worker says, whatever was asked.
LIES: dict[str, Answer] = {
    "nothing": lambda _request: b"",
    "half a frame": lambda request: request[:7],
    "a frame alone": lambda request: frame(request, b"", size=64),
    "no return value": lambda request: frame(request, b""),
    "half a word": lambda request: frame(request, b"\0" * 9),
    "another row": lambda request: frame(request, words(0), row=1),
    "another turn": lambda request: frame(request, words(0), turn=1),
    "too much": lambda request: frame(request, words(0) + bytes(1 << 20)),
    "more than there is": lambda request: frame(request, words(0), size=1 << 62),
    "a size that wraps": lambda request: frame(request, words(0), size=2**64 - 8),
    "an error with a tail": lambda request: frame(request, words(0x30) + words(*[7] * 9)),
    "an error with words too many": lambda request: frame(request, words(0x30, *[0] * 8)),
    "ones": lambda request: frame(request, words(0) + b"\xff" * 256),
    "noise": noise,
    "a sender that does not stop": lambda request: frame(request, words(0)) + bytes(4 << 20),
}
# What a worker says where nothing is to be answered but the code.
SHORT: dict[str, Answer] = {
    "the code alone": lambda request: frame(request, words(0)),
    "a word": lambda request: frame(request, words(0, 0)),
    "no bytes where some were asked for": lambda request: frame(request, words(0, 0, 0)),
    "a length, and no bytes": lambda request: frame(request, words(0, 0, 0, 0)),
    "too few bytes": lambda request: frame(request, words(0, 1, 16, 0, 0)),
    "lengths beyond the buffers": lambda request: frame(request, words(0, *[1, 41] * 4) + bytes(48)),
    "small lengths and large ones": lambda request: frame(request, words(0, 8, 1, 2**63) + bytes(8)),
    "a length that wraps": lambda request: frame(request, words(0, 2**64 - 1, 1, 2**64 - 1)),
    "a length that is not that of the bytes": lambda request: frame(request, words(0, 7, 1, 8) + bytes(8)),
}


class Peer:
    """A server that greets like a worker and then says what it is told to."""

    def __init__(self, path: Path, hello: bytes) -> None:
        self.path, self.hello = path, hello
        self.answer: Answer = lambda _request: b""
        self.over_socket = False  # also what a box has room for
        self.act: Callable[[Line, bytes], bool] = self._answer
        self.requests: list[bytes] = []
        self.hangs_up = False
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                control, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(control,), daemon=True).start()

    def _serve(self, control: socket.socket) -> None:
        with closing(control), suppress(OSError):
            control.recv(1)
            control.sendall(self.hello, socket.MSG_NOSIGNAL)  # whose SIGPIPE would be taken for the module's
            while not self.hangs_up:
                data, fds, _, _ = socket.recv_fds(control, 1, 8)
                if not data:
                    return
                threading.Thread(target=self._talk, args=(Line.of(fds),), daemon=True).start()

    def _talk(self, line: Line) -> None:
        with closing(line.socket), suppress(OSError):
            while request := line.receive(line.request, FRAME.size):
                self.requests.append(request)
                if not self.act(line, request):
                    return

    def _answer(self, line: Line, request: bytes) -> bool:
        """False: it ends the channel, as who waits for more should not wait for ever."""
        answer = self.answer(request)
        whole = len(answer) >= FRAME.size and len(answer) >= FRAME.size + FRAME.unpack_from(answer)[2]
        return line.send(line.answer, answer, self.over_socket) and (whole or not self.over_socket)


def hello_of(path: Path) -> bytes:
    """What a worker says first, with all functions said to be there."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"g")
        head = connection.recv(FRAME.size, socket.MSG_WAITALL)
        functions, _, size = FRAME.unpack(head)
        body = connection.recv(size, socket.MSG_WAITALL)
    padded = (len(FUNCTIONS) + 7) // 8 * 8
    assert functions == len(FUNCTIONS)
    return head + body[:-padded] + b"\1" * len(FUNCTIONS) + bytes(padded - len(FUNCTIONS))


@pytest.fixture
def worker(tokens: tuple[SoftToken, SoftToken]) -> Iterator[Worker]:
    with Worker(tokens[0]) as running:
        yield running


@pytest.fixture
def peer(worker: Worker, directory: Path) -> Iterator[Peer]:
    made = Peer(directory / "peer.sock", hello_of(worker.socket))
    with closing(made.listener):
        yield made


def answers_something(name: str) -> bool:
    row = next(row for row in wire.CARRIED if row.name == name)
    return any(carried.item in ANSWERING for carried in wire.items(row, golden.prototypes()[name]))


@pytest.mark.parametrize(
    ("lie", "over_socket"), [*((lie, False) for lie in (LIES | SHORT)), *((lie, True) for lie in LIES)]
)
def test_lies_are_found_out(peer: Peer, remote: Remote, lie: str, over_socket: bool) -> None:
    """For every function there is; and nothing is written that the caller has no room for."""
    peer.answer, peer.over_socket = (LIES | SHORT)[lie], over_socket
    for name in NAMES:
        remote.connect(peer.path)
        arguments = Arguments(name)
        said = remote.call(name, *arguments.given)
        arguments.check_guards()
        if lie == "the code alone" and not answers_something(name):
            assert said == "CKR_OK", name
        else:
            assert (said, remote.alive) == ("CKR_DEVICE_ERROR", False), name
            assert remote.call(name, *arguments.given) == "CKR_DEVICE_ERROR", name
    assert len({FRAME.unpack(request[: FRAME.size])[0] for request in peer.requests}) == len(NAMES)


def test_any_answer_at_all(peer: Peer, remote: Remote) -> None:
    """Answers that are nearly right: words that look like lengths and kinds, in any order."""
    dice = random.Random(7)
    likely = [0, 0, 0, 1, 1, 2, 3, 8, 12, 20, 39, 40, 41, 48, 56, 2**32, 2**63, 2**64 - 1, 2**64 - 8]

    def guess(request: bytes) -> bytes:
        count = dice.randrange(24)
        return frame(request, words(dice.choice([0, 0, 0, 0x12, 0x150]), *dice.choices(likely, k=count)))

    peer.answer = guess
    for name in NAMES * 3:
        remote.connect(peer.path)
        arguments = Arguments(name)
        remote.call(name, *arguments.given)
        arguments.check_guards()


def test_an_attribute_that_is_there_fits_into_its_room(peer: Peer, remote: Remote) -> None:
    """CKR_OK and a length beyond the buffer: the application would read on behind it."""
    peer.answer = lambda request: frame(request, words(0, 1, TEXT, 21, TEXT, 21, TEMPLATE, 49))
    remote.connect(peer.path)
    arguments = Arguments("C_GetAttributeValue")
    assert remote.call("C_GetAttributeValue", *arguments.given) == "CKR_DEVICE_ERROR"
    assert all(attribute.ulValueLen <= 48 for attribute in arguments.given[2][0:3])


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        (b"", "the worker ended before it answered"),
        (b"SSH-2.0-OpenSSH_9.2\r\n" * 20, "what answers is no worker"),
        (FRAME.pack(104, 0, 1 << 40), "what answers is no worker"),
        (FRAME.pack(3, 0, 8) + words(0), "what answers is no worker"),
        (FRAME.pack(104, 0, 32) + words(1, 14) + b"1-000000000000\0\0", "the worker is of another version"),
    ],
)
def test_what_greets_otherwise_is_no_worker(peer: Peer, remote: Remote, hello: bytes, says: str) -> None:
    peer.hello = hello
    if not hello:
        peer.hangs_up = True
    with pytest.raises(Refused, match=says):
        remote.connect(peer.path)
    assert not remote.alive


def test_who_does_not_greet_is_not_waited_for_long(peer: Peer, remote: Remote) -> None:
    peer.hello = b""
    began = time.monotonic()
    with pytest.raises(Refused, match="the worker does not answer"):
        remote.connect(peer.path, connect=300)
    assert 0.25 < time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("C_Initialize", [None]),
        ("C_CloseSession", [1]),
        ("C_DigestUpdate", [1, b"data", 4]),
        ("C_Login", [1, 1, None, 0]),
        ("C_Login", [1, 1, b"1234", 4]),
    ],
)
def test_late_answer_is_none(peer: Peer, remote: Remote, name: str, arguments: list[Any]) -> None:
    """How late is late, the class of the function says; a PIN that is given waits for nobody at the device."""
    given_up = threading.Event()

    def later(request: bytes) -> bytes:
        given_up.wait(0.3)
        return frame(request, words(0))

    def much_later(request: bytes) -> bytes:
        given_up.wait(20)
        return later(request)

    own = Deadline.CRYPTOGRAPHY if b"1234" in arguments else deadline_class(FUNCTIONS[INDEX[name]])
    given = [native.ffi.NULL if each is None else each for each in arguments]
    peer.answer = later
    remote.connect(peer.path, **{each.value: 200 for each in Deadline if each not in (own, Deadline.CONNECT)})
    assert remote.call(name, *given) == "CKR_OK"
    peer.answer = much_later
    remote.connect(peer.path, **{own.value: 200})
    began = time.monotonic()
    assert remote.call(name, *given) == "CKR_DEVICE_ERROR"
    assert 0.15 < time.monotonic() - began < 2
    assert not remote.alive
    given_up.set()


def test_worker_that_hangs_up_raises_no_signal(peer: Peer, remote: Remote) -> None:
    """Its control socket is gone when a channel is wanted."""
    heard: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda number, _frame: heard.append(number))
    try:
        peer.hangs_up = True
        remote.connect(peer.path)
        time.sleep(0.1)
        assert remote.call("C_CloseSession", 1) == "CKR_DEVICE_ERROR"
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert heard == []


# ---- the memory that both ends write


def right(request: bytes) -> bytes:
    """What a worker answers to C_GenerateRandom of ROOM bytes."""
    return frame(request, words(0, 1, ROOM) + bytes(ROOM))


def random_bytes(remote: Remote) -> tuple[str, Arguments]:
    arguments = Arguments("C_GenerateRandom")
    said = remote.call("C_GenerateRandom", *arguments.given)
    arguments.check_guards()
    return said, arguments


def writes_state(state: int) -> Callable[[Line, bytes], bool]:
    def act(line: Line, request: bytes) -> bool:
        line.sleeps(line.answer)
        line.answer.write(right(request))
        line.answer.size = len(right(request))
        line.post(line.answer, state)
        return True

    return act


def writes_size(size: int) -> Callable[[Line, bytes], bool]:
    return lambda line, request: line.send(line.answer, right(request), size=size)


def wakes_for_nothing(line: Line, _request: bytes) -> bool:
    line.socket.sendall(b"\0")
    return True


def speaks_unasked(line: Line, request: bytes) -> bool:
    line.socket.sendall(bytes(4096))
    return line.send(line.answer, right(request), over_socket=True)


def hangs_up(_line: Line, _request: bytes) -> bool:
    return False


def closes_the_request(line: Line, request: bytes) -> bool:
    line.request.state = lines.CLOSED
    return line.send(line.answer, right(request))


def fills_the_request(line: Line, request: bytes) -> bool:
    line.request.state = lines.POSTED
    return line.send(line.answer, right(request))


SIZES = (0, 1, 15, 17, 24, lines.BOX - lines.HEAD + 1, lines.BOX, 2**31, lines.ELSEWHERE - 1)
STATES = (lines.EMPTY, lines.DOZING, lines.SLEEPING, lines.CLOSED, 5, 2**32 - 1)


@pytest.mark.parametrize(
    "act",
    [
        *[pytest.param(writes_size(size), id=f"size {size}") for size in SIZES],
        *[pytest.param(writes_state(state), id=f"state {state}") for state in STATES],
        wakes_for_nothing,
        speaks_unasked,
        hangs_up,
    ],
)
def test_memory_that_cannot_be_so(peer: Peer, remote: Remote, act: Callable[[Line, bytes], bool]) -> None:
    peer.act = act
    remote.connect(peer.path)
    assert (random_bytes(remote)[0], remote.alive) == ("CKR_DEVICE_ERROR", False)


@pytest.mark.parametrize("act", [closes_the_request, fills_the_request])
def test_request_box_that_is_not_free(peer: Peer, remote: Remote, act: Callable[[Line, bytes], bool]) -> None:
    """The answer before was right."""
    peer.act = act
    remote.connect(peer.path)
    assert random_bytes(remote)[0] == "CKR_OK"
    assert (random_bytes(remote)[0], remote.alive) == ("CKR_DEVICE_ERROR", False)


class Scribbler:
    """A thread that writes into a box, as fast as it can, while another process or thread reads it."""

    def __init__(self, box: lines.Box, sizes: Sequence[int], messages: Sequence[bytes]) -> None:
        self._box, self._sizes, self._messages = box, sizes, messages
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._scribble, daemon=True)

    def _scribble(self) -> None:
        dice = random.Random(3)
        while not self._stop.is_set():
            self._box.size = dice.choice(self._sizes)
            self._box.write(dice.choice(self._messages))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def lengths_of(message: bytes, body: bytes) -> list[bytes]:
    """A message with other sizes in its frame, and other words behind it."""
    head = message[:8]
    sizes = (len(body), 0, 8, 1 << 14, 1 << 40, 2**64 - 8)
    return [head + struct.pack("=Q", size) + words(0, 1, length) + body for size in sizes for length in sizes]


def test_lengths_that_change_while_they_are_read(peer: Peer, remote: Remote) -> None:
    """Whatever of it was seen: it is well formed or refused, and nothing is written beyond the buffer."""

    def act(line: Line, request: bytes) -> bool:
        message = right(request)
        with Scribbler(line.answer, (len(message), 16, 1 << 13), lengths_of(message, bytes(ROOM))):
            line.send(line.answer, message)
            return bool(line.receive(line.request, FRAME.size)) and False

    peer.act = act
    said = set()
    for _ in range(60):
        remote.connect(peer.path)
        said.add(random_bytes(remote)[0])
        native.lib.ha_remote_kill(remote.number)
    assert said <= {"CKR_OK", "CKR_DEVICE_ERROR"}
    assert "CKR_DEVICE_ERROR" in said


# ---- clients


class Client:
    """A client that sends what it likes."""

    def __init__(self, path: Path) -> None:
        self.control = socket.socket(socket.AF_UNIX)
        self.control.connect(str(path))
        self.control.sendall(b"g")
        head = self.control.recv(FRAME.size, socket.MSG_WAITALL)
        self.control.recv(FRAME.unpack(head)[2], socket.MSG_WAITALL)

    def line(self, memory: int | None = None) -> Line:
        """A channel with memory as it is made, or with something else in its place."""
        channel, theirs = socket.socketpair()
        fd = lines.memory() if memory is None else memory
        with theirs:
            socket.send_fds(self.control, [b"c"], [theirs.fileno(), fd])
        try:
            return Line(channel, fd)
        finally:
            os.close(fd)

    def hangs_up_on(self, memory: list[int]) -> bool:
        """Whether the worker ends a channel at once that comes with such memory."""
        channel, theirs = socket.socketpair()
        with channel:
            with theirs:
                socket.send_fds(self.control, [b"c"], [theirs.fileno(), *memory])
            for fd in memory:
                os.close(fd)
            channel.settimeout(20)
            return channel.recv(1) == b""

    def say(self, request: bytes, over_socket: bool = False, size: int | None = None) -> bytes:
        """The answer; empty if the worker hangs up. `size` is what is said of it, if not its own."""
        line = self.line()
        with line.socket, suppress(OSError):
            line.send(line.request, request, over_socket, size)
            if over_socket:
                line.socket.shutdown(socket.SHUT_WR)
            return line.receive(line.answer, FRAME.size) or b""
        return b""

    def is_alive(self) -> bool:
        """Whether its process answers: C_GetInfo, with its result asked for."""
        return len(self.say(FRAME.pack(2, 1, 8) + words(1))) > FRAME.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()


def requests(peer: Peer, remote: Remote) -> dict[str, bytes]:
    """What the stubs say, by function."""
    said = {}
    for name in NAMES:
        remote.connect(peer.path)
        arguments = Arguments(name)
        peer.requests.clear()
        remote.call(name, *arguments.given)
        said[name] = peer.requests[-1]
    return said


def test_worker_is_none_the_worse_for_a_hostile_client(peer: Peer, remote: Remote, worker: Worker) -> None:
    """Requests cut short, with words changed: it hangs up or answers, and never falls."""
    said = requests(peer, remote)
    with Client(worker.socket) as client:
        client.say(said["C_Initialize"])
        pester(client, said)
        for row in (2**32 - 1, *range(len(FUNCTIONS), len(FUNCTIONS) + 8)):
            assert client.say(FRAME.pack(row, 1, 8) + words(1)) == b""
        for over_socket in (False, True):
            assert client.say(FRAME.pack(2, 1, 1 << 50), over_socket) == b""
        assert client.is_alive()


def pester(client: Client, said: dict[str, bytes]) -> None:
    dice = random.Random(11)
    likely = [0, 1, 2, 3, 7, 40, 2**31, 2**32, 2**63, 2**64 - 1, 2**64 - 8, 0x40000211, 0x1087]
    for name, request in said.items():
        if name in ("C_Finalize", "C_InitToken"):
            continue
        head, body = request[: FRAME.size], bytearray(request[FRAME.size :])
        client.say(request)
        for attempt in range(12):
            changed = bytearray(body)
            for _ in range(dice.randrange(1, 4)):
                if changed:
                    struct.pack_into(
                        "=Q", changed, dice.randrange(len(changed) // 8) * 8, dice.choice(likely)
                    )
            if dice.random() < 0.2:
                changed = changed[: dice.randrange(len(changed) + 1)]
            row, turn, _ = FRAME.unpack(head)
            client.say(FRAME.pack(row, turn, len(changed)) + bytes(changed), over_socket=attempt % 3 == 0)
        assert client.is_alive(), name


def write_sealed() -> int:
    return lines.memory(seals=lines.SEALS | fcntl.F_SEAL_WRITE)


def plain_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * lines.BOX)
        return os.dup(file.fileno())


NO_MEMORY: dict[str, Callable[[], int]] = {
    "not sealed": lambda: lines.memory(seals=0),
    "sealed against growing": lambda: lines.memory(seals=fcntl.F_SEAL_GROW),
    "small": lambda: lines.memory(size=lines.BOX),
    "empty": lambda: lines.memory(size=0),
    "large": lambda: lines.memory(size=3 * lines.BOX),
    "cannot be written": write_sealed,
    "a file": plain_file,
    "a socket": lambda: socket.socket(socket.AF_UNIX).detach(),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_memory_that_can_be_pulled_away_is_refused(worker: Worker, kind: str) -> None:
    """A worker that reads behind the end of it gets SIGBUS."""
    with Client(worker.socket) as client:
        assert client.hangs_up_on([NO_MEMORY[kind]()])
        assert client.is_alive()


def test_channel_of_too_few_or_too_many_descriptors(worker: Worker) -> None:
    with Client(worker.socket) as client:
        assert client.hangs_up_on([])
        assert client.hangs_up_on([lines.memory(size=0), lines.memory()])
        assert client.is_alive()
        client.control.sendall(b"c")  # without any: that is no client
        client.control.settimeout(8)
        assert client.control.recv(1) == b""


@pytest.mark.parametrize("state", [state for state in STATES if state != lines.DOZING])
def test_worker_ends_a_channel_whose_state_cannot_be(worker: Worker, state: int) -> None:
    with Client(worker.socket) as client:
        line = client.line()
        with line.socket:
            until(lambda: line.request.state == lines.DOZING, "the worker waits")
            line.post(line.request, state)
            assert line.socket.recv(1) == b""
        assert client.is_alive()


@pytest.mark.parametrize("size", SIZES)
def test_worker_ends_a_channel_whose_size_cannot_be(worker: Worker, size: int) -> None:
    request = FRAME.pack(2, 1, 8) + words(1)
    if size == len(request):
        return
    with Client(worker.socket) as client:
        assert client.say(request, size=size) == b""
        assert client.is_alive()


def test_worker_reads_lengths_that_change(worker: Worker) -> None:
    seed = FRAME.pack(INDEX["C_SeedRandom"], 1, 32 + 24) + words(1, 1, 32) + bytes(32)
    wild = [
        seed[:8] + struct.pack("=Q", n) + words(1, 1, m) + bytes(32)
        for n in (56, 1 << 40)
        for m in (32, 1 << 40)
    ]
    with Client(worker.socket) as client:
        for _ in range(40):
            line = client.line()
            with line.socket, Scribbler(line.request, (len(seed), 16, 1 << 13), wild), suppress(OSError):
                line.send(line.request, seed)
                line.receive(line.answer, FRAME.size)
        assert client.is_alive()


TEXT = 0x3  # CKA_LABEL
TEMPLATE = 0x40000211  # CKA_WRAP_TEMPLATE


@pytest.mark.parametrize(
    ("name", "request_words"),
    [
        ("C_SeedRandom", (1, 1, 9, 0)),
        ("C_SeedRandom", (1, 1, 2**64 - 1)),
        ("C_SeedRandom", (1, 1, 2**64 - 8, 0)),
        ("C_SeedRandom", (1, 3, 8, 0)),
        ("C_SeedRandom", (1, 1, 8, 0, 0)),
        ("C_SeedRandom", (1,)),
        ("C_GenerateRandom", (1, 1, 1 << 40)),
        ("C_DigestFinal", (1, 1, 1, 2**64 - 1)),
        ("C_FindObjects", (1, 1, 2**61 + 1)),
        ("C_FindObjectsInit", (1, 1, 2**60)),
        ("C_FindObjectsInit", (1, 1, 1, TEXT, 2, 24, 1, 1, TEXT, 1, 0)),
        ("C_FindObjectsInit", (1, 1, 1, TEMPLATE, 1, 24, TEXT, 0, 8)),
        ("C_FindObjectsInit", (1, 1, 1, TEMPLATE, 2, 48, 1, 1, TEXT, 1, 0)),
        ("C_FindObjectsInit", (1, 1, 1, *[TEMPLATE, 2, 24, 1, 1] * 9, TEXT, 1, 0)),
        ("C_GetAttributeValue", (1, 1, 1, 1, TEMPLATE, 1, 24)),
        ("C_GetAttributeValue", (1, 1, 1, 1, TEXT, 1, 1 << 40)),
        ("C_DigestInit", (1, 1, 0x1087, 1, 48, *[0] * 6)),
        ("C_DigestInit", (1, 1, 0x1087, 2, 1, 40, *[0] * 5)),
        ("C_DigestInit", (1, 1, 0x220, 2, 1, 8, 0)),
        ("C_DigestInit", (1, 1, 0x80000001, 1, 8, 0)),
        ("C_Initialize", (2, 1, 8, 2**64 - 1)),
        ("C_InitToken", (0, 1, 8, 0, 1, 8, 0)),
    ],
)
def test_request_that_is_not_well_formed_is_not_carried_out(
    worker: Worker, name: str, request_words: tuple[int, ...]
) -> None:
    """The library never hears of it."""
    with Client(worker.socket) as client:
        payload = words(*request_words)
        assert client.say(FRAME.pack(INDEX[name], 1, len(payload)) + payload) == b""
        assert client.is_alive()


def test_clients_have_logins_of_their_own(worker: Worker, tokens: tuple[SoftToken, SoftToken]) -> None:
    """A process each: what one does to the library, another does not see."""
    initialise = words(2, 0, 0)
    request = FRAME.pack(0, 1, len(initialise)) + initialise
    with Client(worker.socket) as second:
        with Client(worker.socket) as first:
            assert first.say(request)[FRAME.size :] == words(0)
            code = second.say(FRAME.pack(2, 1, 8) + words(1))[FRAME.size : FRAME.size + 8]
            assert code == words(0x190)  # CKR_CRYPTOKI_NOT_INITIALIZED
        until(
            lambda: len(processes(str(tokens[0].conf))) == 2, "the process of the one that has gone is gone"
        )
        assert second.is_alive()


def test_socket_is_for_its_owner_alone(worker: Worker) -> None:
    assert worker.socket.stat().st_mode & 0o777 == 0o600
