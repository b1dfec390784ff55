"""What the custodian's process is asked, and how: a key made or restored there arrives here only as ciphertexts.

The domain key (AES-256) is never in the memory of the process that loads vendor libraries.  That process starts
`pkcs11_ha.cli.custodian`, hands it public keys over one pipe and takes ciphertexts from another.  The custodian
shows and asks for share words on the standard input and output of this process, so nothing may have been read
ahead from standard input here; the custodian takes no byte beyond its last line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

KEY_BYTES = 32
MAX_SHARES = 16  # SLIP-39 has four bits for a share's index

_LINE_LIMIT = 1 << 20  # bytes of one answer; 32 members with keys of 4096 bits take 33 000
_NEEDED = ("pkcs11_ha", "shamir_mnemonic")  # by the custodian: ours, and what lies beside its other needs
_FAREWELL_S = 2.0  # the custodian clears the screen when it is terminated


class CustodyError(Exception):
    """The custodian could not do it, or refuses, and nothing is changed; `str` is one line without secrets."""


@dataclass(frozen=True)
class Target:
    """A member's RSA wrapping public key, and the hash its CKM_RSA_PKCS_OAEP takes, which MGF1 takes too."""

    name: str
    modulus: int
    exponent: int
    hash: Literal["sha1", "sha256"]


@dataclass(frozen=True)
class Shares:
    """How many shares of words there are, and how many of them give the key."""

    threshold: int
    count: int

    def __str__(self) -> str:
        return f"{self.threshold}of{self.count}"


@dataclass(frozen=True)
class Check:
    """What tells a key without showing it: 8 hex digits each, the first 4 bytes of a SHA-256.

    Hashed is the 16-byte all-zero key wrapped under the key by RFC 5649 (`kwp`) and by RFC 3394 (`kw`): a member
    can wrap a known key too, though its domain key does nothing but wrap and unwrap.
    """

    kwp: str
    kw: str

    def __str__(self) -> str:
        return f"kwp {self.kwp}, kw {self.kw}"


@dataclass(frozen=True)
class Sealed:
    """The domain key for each target by name: RSAES-OAEP (RFC 8017 7.1), empty label; and its check values."""

    ciphertexts: dict[str, bytes]
    check: Check


@dataclass(frozen=True)
class Question:
    """One document to the custodian; with `check` the key is restored from words, without it is made."""

    targets: tuple[Target, ...]
    shares: Shares | None
    check: Check | None
    plain: bool

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, document: bytes) -> Question:
        """Trusts its writer: what is malformed raises whatever comes."""
        said = json.loads(document)
        return cls(
            tuple(Target(**target) for target in said["targets"]),
            Shares(**said["shares"]) if said["shares"] else None,
            Check(**said["check"]) if said["check"] else None,
            said["plain"],
        )


@dataclass(frozen=True)
class _Reply:
    """The line, whether behind it came the key that was asked for and nothing else, and how the process ended."""

    line: bytes
    whole: bool
    status: int


Take = Callable[[str, bytearray], None]
"""Imports the key (32 bytes, zeroed afterwards, not to be copied) into the member of this name."""


def parse_shares(text: str) -> Shares | None:
    """`2of3` as two of three, `none` as no shares at all; raises ValueError, one line."""
    if text == "none":
        return None
    numbers = re.fullmatch(r"([0-9]{1,3})of([0-9]{1,3})", text)
    if numbers is None:
        raise ValueError(f"{text!r} is not like 2of3, and not none")
    shares = Shares(int(numbers[1]), int(numbers[2]))
    if not 1 <= shares.count <= MAX_SHARES:
        raise ValueError(f"{shares}: SLIP-39 makes 1 to {MAX_SHARES} shares")
    if not 1 <= shares.threshold <= shares.count:
        raise ValueError(f"{shares}: of {shares.count} shares, 1 to {shares.count} can be required")
    if shares.threshold == 1 and shares.count > 1:
        raise ValueError(
            f"{shares}: SLIP-39 has no copies of one share; say 1of1 and copy it, or 2of{shares.count}"
        )
    return shares


def make(
    targets: Sequence[Target],
    shares: Shares | None,
    plain: Sequence[str] = (),
    take: Take | None = None,
) -> Sealed:
    """A new random key for the targets, its words shown once; raises CustodyError.

    The members named in `plain` have no RSA unwrap: for them alone the key itself comes, and `take` is called with it.
    """
    return _ask(Question(tuple(targets), shares, None, bool(plain)), plain, take)


def restore(
    targets: Sequence[Target],
    check: Check,
    plain: Sequence[str] = (),
    take: Take | None = None,
) -> Sealed:
    """The key from its custodians' words, for the targets; raises CustodyError, also if it has other check values.

    `plain` and `take`: as for `make`.
    """
    return _ask(Question(tuple(targets), None, check, bool(plain)), plain, take)


def _ask(question: Question, plain: Sequence[str], take: Take | None) -> Sealed:
    if plain and take is None:
        raise ValueError("plain needs take")
    key = bytearray(KEY_BYTES if plain else 0)
    try:
        sealed = _sealed(_converse(question.to_json(), key), question)
        if take is not None:
            for name in plain:
                take(name, key)
    finally:
        key[:] = bytes(len(key))  # in place
    return sealed


def _environment() -> dict[str, str]:
    """Little, so that neither LD_PRELOAD nor a provider in OpenSSL's configuration brings a vendor library along."""
    kept = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "TERM")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"OPENSSL_CONF": os.devnull}


def _start(request: int, answer: int) -> subprocess.Popen[bytes]:
    # An installed command has told its own interpreter alone where these are; nothing else of our path is passed on.
    places = [str(Path(spec.origin).parents[1]) for spec in map(find_spec, _NEEDED) if spec and spec.origin]
    start = f"import sys; sys.path[:0] = {places!r}; from pkcs11_ha.cli import custodian; sys.exit(custodian.main())"
    command = [sys.executable, "-E", "-P", "-c", start, "--request", str(request), "--answer", str(answer)]
    sys.stdout.flush()  # what was said before comes before the words
    try:
        return subprocess.Popen(command, pass_fds=(request, answer), env=_environment())
    except OSError as error:
        raise CustodyError(f"the custodian's process cannot be started: {error.strerror}") from None


def _converse(question: bytes, key: bytearray) -> _Reply:
    """One question to one process; what comes behind the line of its reply goes into `key`."""
    child_in, request = os.pipe()
    answer, child_out = os.pipe()
    # Unbuffered, so that no buffer of ours ever holds the key: readline() takes byte after byte.
    with os.fdopen(request, "wb", 0) as asking, os.fdopen(answer, "rb", 0) as answering:
        try:
            child = _start(child_in, child_out)
        finally:
            os.close(child_in)
            os.close(child_out)
        try:
            with suppress(BrokenPipeError):  # it has died: its reply tells
                while question:
                    question = question[asking.write(question) :]
            asking.close()
            line = answering.readline(_LINE_LIMIT)
            room = memoryview(key)
            while room and (got := answering.readinto(room)):
                room = room[got:]
            surplus = answering.read(1)
        except BaseException:
            child.terminate()
            raise
        finally:
            _end(child)
    return _Reply(line, not room and not surplus, child.returncode)


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_FAREWELL_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _sealed(reply: _Reply, question: Question) -> Sealed:
    """The reply, where it answers the question in every part; raises CustodyError."""
    ending = f"signal {-reply.status}" if reply.status < 0 else f"exit status {reply.status}"
    if not reply.line:
        raise CustodyError(f"the custodian's process ended without an answer ({ending})")
    unusable = CustodyError(f"the custodian's process gave no usable answer ({ending})")
    try:
        answer = json.loads(reply.line)
        refusal = answer.get("error")
        if refusal is None:
            ciphertexts = {name: bytes.fromhex(text) for name, text in answer["ciphertexts"].items()}
            check = Check(**answer["check"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise unusable from None
    if refusal is not None:
        raise CustodyError(str(refusal))
    lengths = {target.name: (target.modulus.bit_length() + 7) // 8 for target in question.targets}
    good = (
        reply.status == 0
        and reply.whole
        and {name: len(text) for name, text in ciphertexts.items()} == lengths
        and all(re.fullmatch("[0-9a-f]{8}", str(value)) for value in (check.kwp, check.kw))
        and question.check in (None, check)
    )
    if not good:
        raise unusable
    return Sealed(ciphertexts, check)
