"""Either end of a channel in Python, honest or not: the shared memory's boxes and the socket beside them."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import select
import socket
import struct
import time
from typing import Self

BOX = 1 << 14
HEAD = 64  # before the bytes of a box
EMPTY, DOZING, SLEEPING, POSTED, CLOSED = range(5)
ELSEWHERE = 2**32 - 1
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
PATIENCE_S = 20.0

_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
_FUTEX_WAKE = 1
_WORD = struct.Struct("=I")


class Box:
    """The half of the memory that one end writes and the other reads."""

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory, self._at = memory, at

    @property
    def state(self) -> int:
        return int(_WORD.unpack_from(self._memory, self._at)[0])

    @state.setter
    def state(self, value: int) -> None:
        _WORD.pack_into(self._memory, self._at, value)

    @property
    def size(self) -> int:
        return int(_WORD.unpack_from(self._memory, self._at + 4)[0])

    @size.setter
    def size(self, value: int) -> None:
        _WORD.pack_into(self._memory, self._at + 4, value)

    def write(self, message: bytes) -> None:
        """As much of it as there is room for."""
        start = self._at + HEAD
        self._memory[start : start + min(len(message), BOX - HEAD)] = message[: BOX - HEAD]

    def read(self, size: int) -> bytes:
        start = self._at + HEAD
        return self._memory[start : start + size]

    def wake(self) -> None:
        word = ctypes.c_uint32.from_buffer(self._memory, self._at)
        ctypes.CDLL(None).syscall(_FUTEX, ctypes.byref(word), _FUTEX_WAKE, 1, None, None, 0)


class Line:
    """A channel with its two boxes. A message that fits goes into one unless `over_socket` says otherwise."""

    def __init__(self, channel: socket.socket, memory: int) -> None:
        self.socket = channel
        self._map = mmap.mmap(memory, 2 * BOX)
        self.request, self.answer = Box(self._map, 0), Box(self._map, BOX)

    @classmethod
    def of(cls, fds: list[int]) -> Self:
        """The serving end, as it was handed over."""
        channel, memory = fds
        try:
            return cls(socket.socket(fileno=channel), memory)
        finally:
            os.close(memory)

    def _wait(self, box: Box, *states: int) -> bool:
        """Until the box is in one of the states; False: the other end has hung up."""
        deadline = time.monotonic() + PATIENCE_S
        while box.state not in states:
            assert time.monotonic() < deadline, f"state {box.state}, not one of {states}"
            if select.select([self.socket], [], [], 0.0002)[0]:
                return box.state in states
        return True

    def receive(self, box: Box, head: int) -> bytes | None:
        """A message whose last 8 of `head` bytes say how long its rest is; None: the other end has hung up."""
        if not self._wait(box, POSTED):
            return None
        size = box.size
        if size != ELSEWHERE:
            message = box.read(size)
            box.state = EMPTY
            return message
        box.state = EMPTY
        message = self.socket.recv(head, socket.MSG_WAITALL)
        (rest,) = struct.unpack("=Q", message[-8:])
        while len(message) < head + rest and (piece := self.socket.recv(head + rest - len(message))):
            message += piece
        return message

    def sleeps(self, box: Box) -> bool:
        """Until who reads a box sleeps; False: it has hung up."""
        return self._wait(box, DOZING if box is self.request else SLEEPING)

    def send(self, box: Box, message: bytes, over_socket: bool = False, size: int | None = None) -> bool:
        """To an end that sleeps: without atomics that is the one moment when it does nothing of its own.

        `size` is what the box says, if it is not the message's.
        """
        if not self.sleeps(box):
            return False
        over_socket = over_socket or len(message) > BOX - HEAD
        if not over_socket:
            box.write(message)
        box.size = size if size is not None else ELSEWHERE if over_socket else len(message)
        self.post(box)
        if over_socket:
            self.socket.sendall(message, socket.MSG_NOSIGNAL)
        return True

    def post(self, box: Box, state: int = POSTED) -> None:
        """A state, and whatever wakes who waits for it."""
        box.state = state
        if box is self.request:
            box.wake()
        else:
            self.socket.sendall(b"\0", socket.MSG_NOSIGNAL)


def memory(size: int = 2 * BOX, seals: int = SEALS) -> int:
    """A descriptor of what a client hands over, or of something else."""
    fd = os.memfd_create("line", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
