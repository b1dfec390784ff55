"""What the signing program writes, checked: every signature verified in software, every key where it must be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature


class Broken(Exception):
    """A fact is not what it must be."""


@dataclass
class KeyPair:
    """A key pair that the program made in the group."""

    public: ec.EllipticCurvePublicKey
    maker: str  # the member that served the call
    destroyed: bool = False


class Audit:
    """Reads the lines of demo/client.c, whose first comment says what they mean.

    `where` is what the program looks at: the group, or one of its tokens by itself. A token must show the keys
    that were made in the group, each once, and must sign with them.
    """

    def __init__(self, where: str = "the group", keys: dict[str, KeyPair] | None = None) -> None:
        self.keys: dict[str, KeyPair] = {} if keys is None else keys  # by label
        self.answered = 0  # commands that name a key
        self.verified: Counter[str] = Counter()  # signatures by member
        self.signed_with: Counter[tuple[str, str]] = Counter()  # the same by label and member
        self.newest_us: dict[str, int] = {}  # when the member's newest signature was begun
        self.failed = 0
        self.first_failure = ""
        self.statuses: list[list[str]] = []  # the answers to `status`
        self.done: tuple[int, int] | None = None  # signed and failed, as the program itself counts them
        self._where = where
        self._algorithm = ec.ECDSA(Prehashed(hashes.SHA256()))
        self._next_counter: Counter[str] = Counter()
        self._open_status: list[str] | None = None

    def read(self, line: str) -> None:
        if self._open_status is not None:
            self._continue_status(line)
            return
        match line.split(" "):
            case ["signed", label, thread, counter, began_us, _, member, data, signature]:
                self._count(thread, counter)
                where = f"signature {counter} of thread {thread} with {label} by {member}"
                if bytes.fromhex(data) != int(thread).to_bytes(16) + int(counter).to_bytes(16):
                    raise Broken(f"{where} is over other data")
                self._verify(where, self._key(label), bytes.fromhex(data), bytes.fromhex(signature))
                self.verified[member] += 1
                self.signed_with[label, member] += 1
                self.newest_us[member] = max(int(began_us), self.newest_us.get(member, 0))
            case ["failed", _, thread, counter, _, _, call, code]:
                self._count(thread, counter)
                self.failed += 1
                self.first_failure = self.first_failure or f"{call} answered {code} in thread {thread}"
            case ["generated" | "destroyed" | "found" as verb, label, *rest]:
                self._answer(verb, label, rest)
            case ["refused", command, label, call, code]:
                raise Broken(f"{self._where} refused to {command} {label}: {call} answered {code}")
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

    def _answer(self, verb: str, label: str, rest: list[str]) -> None:
        self.answered += 1
        match verb, rest:
            case "generated", [member, point]:
                self._generated(label, member, bytes.fromhex(point))
            case "destroyed", [count]:
                self._destroyed(label, int(count))
            case "found", [private, public]:
                self._found(label, int(private), int(public))
            case _:
                raise Broken(f"the signing program said: {verb} {label} {' '.join(rest)}")

    def _generated(self, label: str, member: str, point: bytes) -> None:
        if label in self.keys:
            raise Broken(f"the key {label} was made twice")
        try:
            if point[:2] != b"\x04\x41":  # DER: an OCTET STRING of 65 bytes
                raise ValueError("not that of P-256")
            public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point[2:])
        except ValueError as error:
            raise Broken(f"the CKA_EC_POINT of {label}, {point.hex()}, is no point: {error}") from None
        self.keys[label] = KeyPair(public, member)

    def _destroyed(self, label: str, count: int) -> None:
        self._key(label).destroyed = True
        if count != 2:
            raise Broken(f"{count} keys named {label} were destroyed instead of a private and a public one")

    def _found(self, label: str, private: int, public: int) -> None:
        destroyed = self._key(label).destroyed
        shown = f"{self._where} shows {private} private and {public} public keys named {label}"
        if destroyed and private + public > 0:
            raise Broken(f"{shown}, which were destroyed")
        if not destroyed and (private, public) != (1, 1):
            raise Broken(f"{shown} instead of one of each")

    def _key(self, label: str) -> KeyPair:
        if label not in self.keys:
            raise Broken(f"{self._where} speaks of a key {label} that was never made")
        return self.keys[label]

    def _count(self, thread: str, counter: str) -> None:
        expected = self._next_counter[thread]
        if int(counter) != expected:
            raise Broken(f"thread {thread} went on with call {counter} instead of {expected}")
        self._next_counter[thread] += 1
        self.answered += thread == "0"  # the commands' number

    def _verify(self, where: str, key: KeyPair, data: bytes, signature: bytes) -> None:
        if key.destroyed:
            raise Broken(f"{where} is with a key that was destroyed")
        r, s = (int.from_bytes(half) for half in (signature[:32], signature[32:]))
        try:
            key.public.verify(encode_dss_signature(r, s), data, self._algorithm)
        except InvalidSignature:
            raise Broken(f"{where} does not verify") from None
