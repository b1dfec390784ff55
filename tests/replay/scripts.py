"""Operations as scripts: each stops wherever a member may die, and says what it was about to call.

A script is a generator.  It yields the name of the next call, and returns what came out in the end; a code other
than CKR_OK that is an answer of its own (a signature that is wrong) is returned by its name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Sequence
from ctypes import byref, c_ulong
from dataclasses import dataclass, field
from typing import Protocol

from tests import p11
from tests.ha.app import code
from tests.replay.keys import wanted

Script = Generator[str, None, bytes]
ROOM = 1 << 10  # more than anything here puts out
SIZE, TOO_SMALL = "'s size", " into too little"
DIGESTED = "secret plain"


@dataclass
class Use:
    """A session that finds keys by their names."""

    session: p11.Session
    handles: dict[str, int] = field(default_factory=dict)

    def key(self, name: str) -> int:
        if name not in self.handles:
            self.handles[name] = self.session.find_one(wanted(name))
        return self.handles[name]


@dataclass(frozen=True)
class Work:
    """What an operation is about; `tag` is a signature that is to be verified."""

    mechanism: p11.Mechanism
    key: str
    parts: Sequence[bytes]
    tag: bytes = b""

    @property
    def data(self) -> bytes:
        return b"".join(self.parts)


Family = Callable[[Use, Work], Script]


def run(script: Script, stop: Callable[[int, str], object] = lambda _number, _name: None) -> bytes:
    """What comes out; `stop` is called at each stop.  CkError: a call failed."""
    number = 0
    try:
        while True:
            stop(number, next(script))
            number += 1
    except StopIteration as end:
        out: bytes = end.value
        return out


class Stop(Protocol):
    def __call__(self, number: int, _name: str = ..., /) -> None: ...


def at(moment: int, do: Callable[[], object]) -> Stop:
    """Does something at one of the stops."""

    def stop(number: int, _name: str = "", /) -> None:
        if number == moment:
            do()

    return stop


def stops(script: Script) -> list[str]:
    """The names of all stops of an undisturbed run."""
    names: list[str] = []
    run(script, lambda _number, name: names.append(name))
    assert names
    return names


# ---- calls


def asked(use: Use, name: str, *arguments: object) -> Script:
    """The output of a function by all three ways of asking for it: its size, with too little room, in full."""
    size = c_ulong()
    yield name + SIZE
    use.session.call(name, *arguments, None, byref(size))
    room = size.value
    if room:
        yield name + TOO_SMALL
        size.value = 0
        little = ctypes.create_string_buffer(1)
        rv = use.session.module.rv(name, use.session.handle, *arguments, little, byref(size))
        if rv != p11.CKR_OK:  # a part that has no output yet needs no room
            assert p11.rv_name(rv) == "CKR_BUFFER_TOO_SMALL", p11.rv_name(rv)
            room = max(room, size.value)
        else:
            return b""
    yield name
    return output(use, room, name, *arguments)


def output(use: Use, room: int, name: str, *arguments: object) -> bytes:
    """The output of a function that needs no more than so much room."""
    size = c_ulong(room)
    buffer = ctypes.create_string_buffer(max(room, 1))
    use.session.call(name, *arguments, buffer, byref(size))
    return buffer.raw[: size.value]


def _key(use: Use, work: Work) -> tuple[int, ...]:
    return (use.key(work.key),) if work.key else ()


# ---- digest, sign, verify


def _tag(verb: str) -> tuple[Family, Family]:
    def single(use: Use, work: Work) -> Script:
        use.session.init(f"C_{verb}Init", work.mechanism, *_key(use, work))
        return (yield from asked(use, f"C_{verb}", work.data, len(work.data)))

    def multi(use: Use, work: Work) -> Script:
        use.session.init(f"C_{verb}Init", work.mechanism, *_key(use, work))
        for part in work.parts:
            yield f"C_{verb}Update"
            use.session.feed(f"C_{verb}Update", part)
        return (yield from asked(use, f"C_{verb}Final"))

    return single, multi


digest, digest_parts = _tag("Digest")
sign, sign_parts = _tag("Sign")


def digest_key(use: Use, work: Work) -> Script:
    """A key between two parts."""
    key = use.key(DIGESTED)
    use.session.init("C_DigestInit", work.mechanism)
    yield "C_DigestUpdate"
    use.session.feed("C_DigestUpdate", work.parts[0])
    yield "C_DigestKey"
    use.session.call("C_DigestKey", key)
    yield "C_DigestUpdate"
    use.session.feed("C_DigestUpdate", work.parts[1])
    return (yield from asked(use, "C_DigestFinal"))


def verify(use: Use, work: Work) -> Script:
    use.session.init("C_VerifyInit", work.mechanism, *_key(use, work))
    yield "C_Verify"
    given = (work.data, len(work.data), work.tag, len(work.tag))
    return code(lambda: use.session.call("C_Verify", *given)).encode()


def verify_parts(use: Use, work: Work) -> Script:
    use.session.init("C_VerifyInit", work.mechanism, *_key(use, work))
    for part in work.parts:
        yield "C_VerifyUpdate"
        use.session.feed("C_VerifyUpdate", part)
    yield "C_VerifyFinal"
    return code(lambda: use.session.feed("C_VerifyFinal", work.tag)).encode()


# ---- encrypt, decrypt


def _cipher(verb: str) -> tuple[Family, Family]:
    def single(use: Use, work: Work) -> Script:
        use.session.init(f"C_{verb}Init", work.mechanism, *_key(use, work))
        return (yield from asked(use, f"C_{verb}", work.data, len(work.data)))

    def multi(use: Use, work: Work) -> Script:
        """One of the parts asks for its size first."""
        use.session.init(f"C_{verb}Init", work.mechanism, *_key(use, work))
        out = b""
        for number, part in enumerate(work.parts):
            name, given = f"C_{verb}Update", (part, len(part))
            if number == len(work.parts) - 1:
                out += yield from asked(use, name, *given)
            else:
                yield name
                out += output(use, ROOM, name, *given)
        return out + (yield from asked(use, f"C_{verb}Final"))

    return single, multi


encrypt, encrypt_parts = _cipher("Encrypt")
decrypt, decrypt_parts = _cipher("Decrypt")


# ---- two operations at once, asked for no sizes: NSS softokn digests what it is asked about, and may end there

HASHED: p11.Mechanism = p11.CKM_SHA256
SIGNED: p11.Mechanism = p11.CKM_SHA256_HMAC
SIGNING = "secret generic"


def told(use: Use, name: str, *arguments: object) -> Script:
    """The output of a function that is given enough room at once."""
    yield name
    return output(use, ROOM, name, *arguments)


def _each(use: Use, work: Work, name: str) -> Script:
    out = b""
    for part in work.parts:
        out += yield from told(use, name, part, len(part))
    return out


def digest_encrypt(use: Use, work: Work) -> Script:
    key = _key(use, work)
    use.session.init("C_DigestInit", HASHED)
    yield "C_EncryptInit"
    use.session.init("C_EncryptInit", work.mechanism, *key)
    out = yield from _each(use, work, "C_DigestEncryptUpdate")
    out += yield from told(use, "C_EncryptFinal")
    return out + (yield from told(use, "C_DigestFinal"))


def decrypt_digest(use: Use, work: Work) -> Script:
    use.session.init("C_DecryptInit", work.mechanism, *_key(use, work))
    yield "C_DigestInit"
    use.session.init("C_DigestInit", HASHED)
    out = yield from _each(use, work, "C_DecryptDigestUpdate")
    out += yield from told(use, "C_DecryptFinal")
    return out + (yield from told(use, "C_DigestFinal"))


def sign_encrypt(use: Use, work: Work) -> Script:
    key = _key(use, work)
    use.session.init("C_SignInit", SIGNED, use.key(SIGNING))
    yield "C_EncryptInit"
    use.session.init("C_EncryptInit", work.mechanism, *key)
    out = yield from _each(use, work, "C_SignEncryptUpdate")
    out += yield from told(use, "C_EncryptFinal")
    return out + (yield from told(use, "C_SignFinal"))


def decrypt_verify(use: Use, work: Work) -> Script:
    """`tag` is the signature of what is decrypted."""
    signing = use.key(SIGNING)
    use.session.init("C_DecryptInit", work.mechanism, *_key(use, work))
    yield "C_VerifyInit"
    use.session.init("C_VerifyInit", SIGNED, signing)
    out = yield from _each(use, work, "C_DecryptVerifyUpdate")
    out += yield from told(use, "C_DecryptFinal")
    yield "C_VerifyFinal"
    return out + code(lambda: use.session.feed("C_VerifyFinal", work.tag)).encode()


def side_by_side(use: Use, work: Work) -> Script:
    """A digest and an encryption in one session, each on its own."""
    key = _key(use, work)
    use.session.init("C_DigestInit", HASHED)
    yield "C_EncryptInit"
    use.session.init("C_EncryptInit", work.mechanism, *key)
    out = b""
    for part in work.parts:
        yield "C_DigestUpdate"
        use.session.feed("C_DigestUpdate", part)
        out += yield from told(use, "C_EncryptUpdate", part, len(part))
    out += yield from told(use, "C_DigestFinal")
    return out + (yield from told(use, "C_EncryptFinal"))


# ---- recover


def sign_recover(use: Use, work: Work) -> Script:
    use.session.init("C_SignRecoverInit", work.mechanism, *_key(use, work))
    return (yield from told(use, "C_SignRecover", work.data, len(work.data)))


def verify_recover(use: Use, work: Work) -> Script:
    use.session.init("C_VerifyRecoverInit", work.mechanism, *_key(use, work))
    return (yield from told(use, "C_VerifyRecover", work.data, len(work.data)))
