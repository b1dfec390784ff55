"""The custodian: the one process that has the domain key in the clear, and ends when it has answered.

    python -m pkcs11_ha.cli.custodian --request FD --answer FD

It loads no vendor library.  FDs are inherited pipes: one JSON document in (`custody.Question`), one line of JSON
out, and behind the line the 32 bytes of the key if the question says `plain`.  Shares of words are shown on
standard output and asked for on standard input; prompts and warnings go to standard error.  Exit status 0, or 1
with `error` in the answer.  Python cannot wipe what it has computed with: the memory is closed, locked and soon
given back.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # ahead of the other imports: from here on no traceback

    def _name_only(kind: type[BaseException], *_: object) -> None:
        """Not the exception's text either: it could be about a word or a key."""
        os.write(2, f"custodian: internal error ({kind.__name__})\n".encode())

    sys.excepthook = _name_only
    sys.unraisablehook = lambda unraisable: _name_only(unraisable.exc_type)

import argparse
import ctypes
import hashlib
import json
import resource
import secrets
import signal
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.keywrap import aes_key_wrap, aes_key_wrap_with_padding
from shamir_mnemonic import Share

from pkcs11_ha.cli import shares
from pkcs11_ha.cli.custody import KEY_BYTES, Check, CustodyError, Question, Shares, Target

MIN_MODULUS_BITS = 2048
_HASHES: dict[str, type[hashes.HashAlgorithm]] = {"sha1": hashes.SHA1, "sha256": hashes.SHA256}

_CLEAR = b"\x1b[H\x1b[2J\x1b[3J"  # home, ED 2, and ED 3 of xterm
_LINE_LIMIT = 4096  # bytes; what a terminal gives at most

_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

# <sys/prctl.h>, <sys/mman.h>
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_MCL_CURRENT, _MCL_FUTURE = 1, 2

_SWAP_WARNING = (
    "custodian: memory cannot be locked, and this host swaps: the domain key may be left on a swap device. "
    "Turn swap off, or raise the limit of locked memory (ulimit -Hl, LimitMEMLOCK=) to unlimited.\n"
)


# ---- the process


def _stop(*_: object) -> None:
    """The first signal is enough: Ctrl-C comes here and, by way of the parent, a second time as SIGTERM."""
    for number in _SIGNALS:
        # Not SIG_IGN: Python would complain of a signal that is already on its way.
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def _close(libc: ctypes.CDLL) -> None:
    """No core dump and nobody of this user who reads the memory; a signal ends it with the screen cleared."""
    for number in _SIGNALS:
        signal.signal(number, _stop)
    # Words do not stay on the screen of a parent that was killed.
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise CustodyError("the custodian's process cannot be closed to debuggers")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _lock_memory(libc: ctypes.CDLL) -> None:
    """Keeps all memory, now and later, off swap devices; where that is refused and there are any, warns."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0 and _host_swaps():
        _write(2, _SWAP_WARNING)


def _host_swaps() -> bool:
    """Whether /proc/swaps (proc(5)) lists a device below its heading; yes where it cannot be read."""
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return True


# ---- the key


def check_of(key: bytes) -> Check:
    """The check values of a key; see `custody.Check`."""
    known = bytes(16)
    wrapped = aes_key_wrap_with_padding(key, known), aes_key_wrap(key, known)
    return Check(*(hashlib.sha256(each).digest()[:4].hex() for each in wrapped))


def _public_key(target: Target) -> rsa.RSAPublicKey:
    if target.modulus.bit_length() < MIN_MODULUS_BITS:
        size = target.modulus.bit_length()
        raise CustodyError(f"{target.name}: its wrapping key has {size} bits, not {MIN_MODULUS_BITS} or more")
    try:
        return rsa.RSAPublicNumbers(target.exponent, target.modulus).public_key()
    except ValueError:
        raise CustodyError(f"{target.name}: its wrapping key is not an RSA public key") from None


def _seal(key: bytes, target: Target, public: rsa.RSAPublicKey) -> bytes:
    digest = _HASHES[target.hash]
    try:
        return public.encrypt(key, padding.OAEP(padding.MGF1(digest()), digest(), None))
    except (ValueError, UnsupportedAlgorithm):  # no RSA modulus, or OpenSSL in FIPS mode
        raise CustodyError(f"{target.name}: its wrapping key does no OAEP with {target.hash}") from None


def _answer(question: Question) -> bytes:
    """What the parent is given; raises CustodyError.  Words are shown last, when nothing can fail but the showing."""
    public = {target: _public_key(target) for target in question.targets}
    key = secrets.token_bytes(KEY_BYTES) if question.check is None else shares.combine(_ask())
    check = check_of(key)
    if question.check not in (None, check):
        raise CustodyError(f"these words give another key ({check}) than the group's ({question.check})")
    ciphertexts = {target.name: _seal(key, target, public[target]).hex() for target in question.targets}
    if question.shares is not None:
        _show(shares.split(key, question.shares), question.shares)
    line = json.dumps({"ciphertexts": ciphertexts, "check": asdict(check)}).encode() + b"\n"
    return line + key if question.plain else line


# ---- the custodians


def _write(fd: int, text: str | bytes) -> None:
    """All of it, past Python's buffers; raises CustodyError."""
    rest = text.encode() if isinstance(text, str) else text
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError as error:
        raise CustodyError(f"file descriptor {fd} cannot be written: {error.strerror}") from None


def _read_line() -> str | None:
    """The next line of standard input and no byte after it; None at its end; raises CustodyError."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            byte = os.read(0, 1)
        except OSError as error:
            raise CustodyError(f"standard input cannot be read: {error.strerror}") from None
        if not byte:
            break
        line += byte
        if len(line) > _LINE_LIMIT:
            raise CustodyError("a line of the input is longer than any share")
    return line.decode("ascii", "replace") if line else None


def _show(words: list[str], of: Shares) -> None:
    """Each share once: on a terminal one after the other, with the screen cleared behind it."""
    enough = f"any {of.threshold} {'is' if of.threshold == 1 else 'are'} enough"
    on_terminal = os.isatty(0) and os.isatty(1)
    for number, share in enumerate(words, 1):
        name = f"share {number} of {of.count}"
        if not on_terminal:
            _write(1, f"{name} ({enough}):\n{share}\n")
            continue
        try:
            _write(1, _CLEAR + f"{share}\n\n".encode())
            _write(2, f"{name}, {enough} - hand it to its custodian, then press Enter ")
            if _read_line() is None:
                raise CustodyError("input ended before all shares were shown")
        finally:
            _clear()


def _ask() -> list[Share]:
    """As many shares as the first one says; raises CustodyError."""
    given: list[Share] = []
    while shares.missing(given):
        number = len(given) + 1
        of = f" of {given[0].member_threshold}" if given else ""
        line = _asked(f"share {number}{of}: ")
        if line is None:
            needed = f"{given[0].member_threshold} are needed" if given else "none was given"
            raise CustodyError(f"input ended before share {number}: {needed}")
        if line.strip():
            given.append(shares.read(line, given))
    return given


def _asked(prompt: str) -> str | None:
    """A line as `_read_line`; on a terminal with a prompt, and what was typed cleared from the screen."""
    if not os.isatty(0):
        return _read_line()
    try:
        _write(2, prompt)
        return _read_line()
    finally:
        _clear()


def _clear() -> None:
    """Erases the screen and what was scrolled off it."""
    with suppress(CustodyError):  # the terminal has gone
        _write(next((fd for fd in (1, 2) if os.isatty(fd)), 0), _CLEAR)


def main() -> int:
    """Answers one question."""
    parser = argparse.ArgumentParser(prog="custodian", allow_abbrev=False)
    parser.add_argument("--request", type=int, required=True, metavar="FD")
    parser.add_argument("--answer", type=int, required=True, metavar="FD")
    arguments = parser.parse_args()
    libc = ctypes.CDLL(None, use_errno=True)
    status = 1
    try:
        _close(libc)
        _lock_memory(libc)
        with os.fdopen(arguments.request, "rb") as request:
            question = Question.from_json(request.read())
        answer = _answer(question)
        status = 0
    except CustodyError as error:
        answer = json.dumps({"error": str(error)}).encode() + b"\n"
    except KeyboardInterrupt:
        if os.isatty(0):
            _clear()  # it could have come on the way to the clearing that was due
        answer = json.dumps({"error": "interrupted"}).encode() + b"\n"
    try:
        _write(arguments.answer, answer)
    except CustodyError:  # nobody is there any more
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
