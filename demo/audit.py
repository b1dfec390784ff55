"""What the signing program writes, checked: each signature verified in software, none missing or repeated."""

from __future__ import annotations

from collections import Counter

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature


class Broken(Exception):
    """A fact is not what it must be."""


class Audit:
    """Reads the lines of demo/client.c, whose first comment says what they mean."""

    def __init__(self, public_key: ec.EllipticCurvePublicKey) -> None:
        self.verified: Counter[str] = Counter()  # signatures by member
        self.newest_us: dict[str, int] = {}  # when the member's newest signature was begun
        self.failed = 0
        self.first_failure = ""
        self.statuses: list[list[str]] = []  # the answers to `status`
        self.done: tuple[int, int] | None = None  # signed and failed, as the program itself counts them
        self._public_key = public_key
        self._algorithm = ec.ECDSA(Prehashed(hashes.SHA256()))
        self._next_counter: Counter[str] = Counter()
        self._open_status: list[str] | None = None

    def read(self, line: str) -> None:
        if self._open_status is not None:
            self._continue_status(line)
            return
        match line.split(" "):
            case ["signed", thread, counter, began_us, _, member, data, signature]:
                self._count(thread, counter)
                self._verify(int(thread), int(counter), member, bytes.fromhex(data), bytes.fromhex(signature))
                self.newest_us[member] = max(int(began_us), self.newest_us.get(member, 0))
            case ["failed", thread, counter, _, _, call, code]:
                self._count(thread, counter)
                self.failed += 1
                self.first_failure = self.first_failure or f"{call} answered {code} in thread {thread}"
            case ["hung", thread]:
                raise Broken(f"a call of thread {thread} never returned")
            case ["done", signed, failed]:
                self.done = int(signed), int(failed)
            case ["HA", "group", _, "status:"]:
                self._open_status = [line]
            case _:
                raise Broken(f"the signing program said: {line}")

    def _continue_status(self, line: str) -> None:
        assert self._open_status is not None
        if line:
            self._open_status.append(line)
        else:
            self.statuses.append(self._open_status)
            self._open_status = None

    def _count(self, thread: str, counter: str) -> None:
        expected = self._next_counter[thread]
        if int(counter) != expected:
            raise Broken(f"thread {thread} went on with call {counter} instead of {expected}")
        self._next_counter[thread] += 1

    def _verify(self, thread: int, counter: int, member: str, data: bytes, signature: bytes) -> None:
        where = f"signature {counter} of thread {thread} by {member}"
        if data != thread.to_bytes(16) + counter.to_bytes(16):
            raise Broken(f"{where} is over other data")
        r, s = (int.from_bytes(half) for half in (signature[:32], signature[32:]))
        try:
            self._public_key.verify(encode_dss_signature(r, s), data, self._algorithm)
        except InvalidSignature:
            raise Broken(f"{where} does not verify") from None
        self.verified[member] += 1
