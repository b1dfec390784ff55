"""Messages of several parts (PKCS#11 3.0): a member dies before, inside and after them, and nobody notices.

No library at hand has them: `pieces.c` puts them on SoftHSM.  Its members are workers, which are killed, and in the
application's own process, where they fail as they are told; the one crosses the wire, the other hands pointers on.
"""

from __future__ import annotations

import copy
import ctypes
import hmac
import os
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_ulong
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from demo.members import SoftToken, Table, Worker, softhsm
from tests import p11
from tests.conftest import ROOT
from tests.ha.app import Application, code
from tests.replay.cases import TEXT
from tests.replay.keys import Keys
from tests.replay.killable import application, killable, reference
from tests.replay.scripts import ROOM, Use
from tests.replay.test_messages import AAD, Message, Switched
from tests.replication.conftest import scratch

Parts = tuple[bytes, ...]
Sealed = tuple[bytes, bytes, bytes]
"""IV, ciphertext, tag."""

Out = TypeVar("Out")
Story = Generator[str, None, Out]
"""Like a `Script`: it stops wherever a member may die, and says what comes next."""

MESSAGES: tuple[Parts, ...] = ((TEXT[:16], TEXT[16:21], TEXT[21:]), (TEXT[:5], b"", TEXT, TEXT[:33]))
NUMBERS = range(1, len(MESSAGES) + 1)
WHOLE = [b"".join(parts) for parts in MESSAGES]
LIMIT = 4096
KEYS = {
    "CKM_SHA256_HMAC": ("secret generic", "secret generic"),
    "CKM_SHA256_RSA_PKCS": ("private rsa", "public rsa"),
}
LOST = "CKR_DEVICE_ERROR"
WRONG_TAG, WRONG_SIGNATURE = "CKR_AEAD_DECRYPT_FAILED", "CKR_SIGNATURE_INVALID"
OVER = "CKR_OPERATION_NOT_INITIALIZED"


# ---- members


@dataclass
class Mortal:
    """An application whose members can die, and how they do."""

    app: Application
    pin: str
    die: Callable[[Use], str]
    wait_for_all: Callable[[], None]

    def use(self) -> Use:
        session = self.app.open()
        if session.info().state != p11.CKS_RW_USER_FUNCTIONS:
            session.login(self.pin)
        return Use(session)


@pytest.fixture(scope="module")
def pieces_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pieces") / "libpieces.so"
    flags = "-std=c11 -O1 -g -Wall -Wextra -Wconversion -Werror -shared -fPIC -pthread -Wl,-Bsymbolic".split()
    source = Path(__file__).with_name("pieces.c")
    subprocess.run(["cc", *flags, f"-I{ROOT / 'include'}", "-o", made, source, "-ldl"], check=True)
    return made


def worker(token: SoftToken, library: Path) -> Worker:
    """A listening worker with messages."""
    given = copy.copy(token)
    given.env = token.env | {"PIECES_MODULE": str(softhsm())}
    return Worker(given, provider=library)


@contextmanager
def killed(module: Path, library: Path, directory: Path, tokens: list[SoftToken]) -> Iterator[Mortal]:
    workers = [worker(token, library) for token in tokens]
    with killable(module, directory, workers, replay_limit_bytes=LIMIT, balance="primary-first") as made:
        yield Mortal(made.app, made.pin, made.kill_serving, made.wait_for_all)


@contextmanager
def failing(module: Path, library: Path, directory: Path, tokens: list[SoftToken]) -> Iterator[Mortal]:
    switches: dict[str, Path] = {}
    for token in tokens:
        switches[token.label] = directory / f"{token.label}.switch"
        switches[token.label].write_bytes(b"\0")

    def member(token: SoftToken) -> Table:
        own = shutil.copy(softhsm(), directory / f"{token.label}.so")  # state of its own
        env = {"PIECES_MODULE": str(own), "PIECES_FILE": str(switches[token.label])}
        return token.member(module=str(library), env=token.env | env)

    members = [member(token) for token in tokens]
    with application(module, directory, members, replay_limit_bytes=LIMIT, balance="primary-first") as app:
        made = Switched(app, switches)
        yield Mortal(app, tokens[0].pin, made.turn_off_serving, made.wait_for_all)


HOW = {"killed": killed, "failing": failing}


@pytest.fixture(scope="module", params=HOW)
def group(
    request: pytest.FixtureRequest, module: Path, pieces_library: Path, soft_models: list[SoftToken]
) -> Iterator[Mortal]:
    with scratch() as path, HOW[request.param](module, pieces_library, Path(path), soft_models[:2]) as made:
        yield made


@pytest.fixture
def mortal(group: Mortal) -> Iterator[Mortal]:
    """All members are there, and no session is left behind."""
    group.wait_for_all()
    yield group
    group.app.module.close_all(group.app.slot)


# ---- what is right


@pytest.fixture(scope="module")
def sealed(every_key: Keys) -> list[Sealed]:
    cipher = AESGCM(every_key.value("aes"))
    ivs = [Message(n, p11.CKG_NO_GENERATE).iv.raw for n in NUMBERS]
    both = [cipher.encrypt(iv, data, AAD) for iv, data in zip(ivs, WHOLE, strict=True)]
    return [(iv, each[:-16], each[-16:]) for iv, each in zip(ivs, both, strict=True)]


def opened(every_key: Keys, given: Sequence[Sealed]) -> list[bytes]:
    cipher = AESGCM(every_key.value("aes"))
    return [cipher.decrypt(iv, data + tag, AAD) for iv, data, tag in given]


@pytest.fixture(scope="module")
def signatures(every_key: Keys, soft_models: list[SoftToken]) -> dict[str, list[bytes]]:
    """By mechanism: HMACs in software, RSA by the token alone."""
    macs = [hmac.digest(every_key.value("generic"), data, "sha256") for data in WHOLE]
    with reference(soft_models[2]) as use:
        key = use.key("private rsa")
        rsa = [use.session.sign(p11.CKM_SHA256_RSA_PKCS, key, data) for data in WHOLE]
    return {"CKM_SHA256_HMAC": macs, "CKM_SHA256_RSA_PKCS": rsa}


# ---- stories, and the moments in them


def moments(asks: Callable[[bool], bool] = lambda _last: True) -> list[str]:
    """Before each Begin, each part and the Final; `asks`: whether a part, the last one or not, asks for its size."""
    names = []
    for n, parts in enumerate(MESSAGES, 1):
        names.append(f"Begin {n}")
        for k in range(1, len(parts) + 1):
            names += [f"size {n}.{k}", f"part {n}.{k}"] if asks(k == len(parts)) else [f"part {n}.{k}"]
    return [*names, "Final"]


CIPHERING = moments()
SIGNING = moments(lambda last: last)
VERIFYING = moments(lambda _last: False)
WHOLES = [*(f"message {n}" for n in NUMBERS), "Final"]
MECHANISM = pytest.mark.parametrize("mechanism", KEYS)
FORGED = pytest.mark.parametrize("forged", [(), (1,), (2,)], ids=["good", "1 forged", "2 forged"])


def when(names: Sequence[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("moment", names)


def advance(story: Story[Out], moment: str) -> None:
    """Up to a moment, and not beyond."""
    for name in story:
        if name == moment:
            return
    raise AssertionError(f"the story has no moment {moment}")


def finish(story: Story[Out]) -> Out:
    try:
        while True:
            next(story)
    except StopIteration as end:
        out: Out = end.value
        return out


def play(mortal: Mortal, use: Use, story: Story[Out], moment: str) -> Out:
    """Its member dies at that moment, and another one ends it."""
    advance(story, moment)
    dead = mortal.die(use)
    out = finish(story)
    assert mortal.app.served(use.session) != dead
    return out


def pieces(data: bytes, parts: Parts) -> Iterator[tuple[int, bytes, int]]:
    """Data cut like these parts: each with its number, and with the flags of a part."""
    for k, part in enumerate(parts, 1):
        piece, data = data[: len(part)], data[len(part) :]
        yield k, piece, p11.CKF_END_OF_MESSAGE if k == len(parts) else 0


def asked(use: Use, where: str, name: str, given: tuple[object, ...], *flags: int) -> Story[bytes]:
    """A part's output: its size, with too little room, in full; what it needs it was told."""
    size = c_ulong()
    yield f"size {where}"
    use.session.call(name, *given, None, byref(size), *flags)
    need = size.value
    if need:
        size.value -= 1
        little = ctypes.create_string_buffer(need)
        rv = use.session.module.rv(name, use.session.handle, *given, little, byref(size), *flags)
        assert (p11.rv_name(rv), size.value) == ("CKR_BUFFER_TOO_SMALL", need)
    yield f"part {where}"
    size.value = need
    room = ctypes.create_string_buffer(max(need, 1))
    use.session.call(name, *given, room, byref(size), *flags)
    assert size.value == need
    return room.raw[:need]


def encrypt(use: Use, generator: int) -> Story[list[Sealed]]:
    use.session.init("C_MessageEncryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
    out: list[Sealed] = []
    for n, parts in enumerate(MESSAGES, 1):
        message = Message(n, generator)
        yield f"Begin {n}"
        use.session.call("C_EncryptMessageBegin", *message.arguments, AAD, len(AAD))
        iv, data = message.iv.raw, b""
        for k, part, flags in pieces(WHOLE[n - 1], parts):
            given = (*message.arguments, part, len(part))
            data += yield from asked(use, f"{n}.{k}", "C_EncryptMessageNext", given, flags)
        assert message.iv.raw == iv  # the application was told of one
        assert message.parameter.generator == generator
        out.append((iv, data, message.tag.raw))
    yield "Final"
    use.session.call("C_MessageEncryptFinal")
    return out


def decrypt(use: Use, sealed: Sequence[Sealed], forged: Sequence[int] = ()) -> Story[list[bytes | str]]:
    """What comes out of each message, or what is said of it.  Tags come with the last parts."""
    use.session.init("C_MessageDecryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
    out: list[bytes | str] = []
    for n, (parts, (_, data, tag)) in enumerate(zip(MESSAGES, sealed, strict=True), 1):
        message = Message(n, p11.CKG_NO_GENERATE)
        yield f"Begin {n}"
        use.session.call("C_DecryptMessageBegin", *message.arguments, AAD, len(AAD))
        plain = b""
        try:
            for k, part, flags in pieces(data, parts):
                if flags:
                    message.tag.raw = flipped(tag) if n in forged else tag
                given = (*message.arguments, part, len(part))
                plain += yield from asked(use, f"{n}.{k}", "C_DecryptMessageNext", given, flags)
            out.append(plain)
        except p11.CkError as error:
            if error.name != WRONG_TAG:
                raise
            out.append(error.name)
    yield "Final"
    use.session.call("C_MessageDecryptFinal")
    return out


def flipped(tag: bytes) -> bytes:
    return bytes([tag[0] ^ 1]) + tag[1:]


def sign(use: Use, mechanism: str) -> Story[list[bytes]]:
    key = use.key(KEYS[mechanism][0])
    use.session.init("C_MessageSignInit", getattr(p11, mechanism), key)
    out: list[bytes] = []
    for n, parts in enumerate(MESSAGES, 1):
        yield f"Begin {n}"
        use.session.call("C_SignMessageBegin", None, 0)
        for k, part, is_last in pieces(WHOLE[n - 1], parts):
            given = (None, 0, part, len(part))
            if is_last:
                out.append((yield from asked(use, f"{n}.{k}", "C_SignMessageNext", given)))
            else:
                yield f"part {n}.{k}"
                use.session.call("C_SignMessageNext", *given, None, None)
    yield "Final"
    use.session.call("C_MessageSignFinal")
    return out


def verdict(use: Use, name: str, *given: object) -> str:
    try:
        use.session.call(name, *given)
    except p11.CkError as error:
        if error.name != WRONG_SIGNATURE:
            raise
        return error.name
    return "CKR_OK"


def verify(use: Use, mechanism: str, tags: Sequence[bytes], forged: Sequence[int]) -> Story[list[str]]:
    key = use.key(KEYS[mechanism][1])
    use.session.init("C_MessageVerifyInit", getattr(p11, mechanism), key)
    out: list[str] = []
    for n, (parts, tag) in enumerate(zip(MESSAGES, tags, strict=True), 1):
        yield f"Begin {n}"
        use.session.call("C_VerifyMessageBegin", None, 0)
        for k, part, is_last in pieces(WHOLE[n - 1], parts):
            yield f"part {n}.{k}"
            given = (None, 0, part, len(part))
            if is_last:
                said = flipped(tag) if n in forged else tag
                out.append(verdict(use, "C_VerifyMessageNext", *given, said, len(said)))
            else:
                use.session.call("C_VerifyMessageNext", *given, None, 0)
    yield "Final"
    use.session.call("C_MessageVerifyFinal")
    return out


# ---- they go on


@when(CIPHERING)
def test_encryption_goes_on(mortal: Mortal, sealed: list[Sealed], moment: str) -> None:
    use = mortal.use()
    assert play(mortal, use, encrypt(use, p11.CKG_NO_GENERATE), moment) == sealed


@when(CIPHERING)
def test_drawn_iv_is_not_drawn_again(mortal: Mortal, every_key: Keys, moment: str) -> None:
    """The member draws it when the message begins; whoever takes over goes on with what the application was told."""
    use = mortal.use()
    out = play(mortal, use, encrypt(use, p11.CKG_GENERATE_RANDOM), moment)
    assert opened(every_key, out) == WHOLE
    assert len({iv for iv, _, _ in out}) == len(out)


@when(CIPHERING)
def test_decryption_goes_on(mortal: Mortal, sealed: list[Sealed], moment: str) -> None:
    use = mortal.use()
    assert play(mortal, use, decrypt(use, sealed), moment) == WHOLE


@when(CIPHERING)
def test_wrong_tag_ends_its_message_alone(mortal: Mortal, sealed: list[Sealed], moment: str) -> None:
    use = mortal.use()
    out = play(mortal, use, decrypt(use, sealed, forged=[1]), moment)
    assert out == [WRONG_TAG, *WHOLE[1:]]


@MECHANISM
@when(SIGNING)
def test_signature_goes_on(
    mortal: Mortal, signatures: dict[str, list[bytes]], moment: str, mechanism: str
) -> None:
    use = mortal.use()
    assert play(mortal, use, sign(use, mechanism), moment) == signatures[mechanism]


@FORGED
@MECHANISM
@when(VERIFYING)
def test_verification_goes_on(
    mortal: Mortal, signatures: dict[str, list[bytes]], moment: str, mechanism: str, forged: tuple[int, ...]
) -> None:
    use = mortal.use()
    out = play(mortal, use, verify(use, mechanism, signatures[mechanism], forged), moment)
    assert out == [WRONG_SIGNATURE if n in forged else "CKR_OK" for n in NUMBERS]


@when([each for each in CIPHERING if each != "Final"])
def test_two_sessions_go_on(mortal: Mortal, sealed: list[Sealed], moment: str) -> None:
    """Both are there when their member dies.  It may be back before the second one asks again."""
    uses = one, other = mortal.use(), mortal.use()
    encrypts, decrypts = encrypt(one, p11.CKG_NO_GENERATE), decrypt(other, sealed)
    advance(encrypts, moment)
    advance(decrypts, moment)
    assert len({mortal.app.served(use.session) for use in uses}) == 1
    dead = mortal.die(one)
    assert finish(encrypts) == sealed
    assert finish(decrypts) == WHOLE
    assert mortal.app.served(one.session) != dead


def test_message_goes_to_and_fro(mortal: Mortal, sealed: list[Sealed]) -> None:
    """Its member dies before each call; the one that died before is back then."""
    use = mortal.use()
    story = encrypt(use, p11.CKG_NO_GENERATE)
    for moment in CIPHERING:
        advance(story, moment)
        mortal.wait_for_all()
        mortal.die(use)
    assert finish(story) == sealed


@when(["after Begin", *(f"after part {k}" for k, _ in enumerate(MESSAGES[0][:-1], 1))])
def test_what_was_given_is_the_application_s_again(mortal: Mortal, sealed: list[Sealed], moment: str) -> None:
    """It writes over its additional data; what comes out is written over the part that went in."""
    use = mortal.use()

    def story() -> Story[Sealed]:
        use.session.init("C_MessageEncryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
        message, aad, out = Message(1, p11.CKG_NO_GENERATE), ctypes.create_string_buffer(AAD, len(AAD)), b""
        use.session.call("C_EncryptMessageBegin", *message.arguments, aad, len(AAD))
        aad.raw = bytes(len(AAD))
        yield "after Begin"
        for k, part, flags in pieces(WHOLE[0], MESSAGES[0]):
            both, size = ctypes.create_string_buffer(part, len(part)), c_ulong(len(part))
            given = (*message.arguments, both, len(part), both, byref(size), flags)
            use.session.call("C_EncryptMessageNext", *given)
            out += both.raw
            if not flags:
                yield f"after part {k}"
        return message.iv.raw, out, message.tag.raw

    assert play(mortal, use, story(), moment) == sealed[0]


# ---- whole messages


@MECHANISM
@when(WHOLES)
def test_whole_messages_are_signed(
    mortal: Mortal, signatures: dict[str, list[bytes]], moment: str, mechanism: str
) -> None:
    use = mortal.use()

    def story() -> Story[list[bytes]]:
        use.session.init("C_MessageSignInit", getattr(p11, mechanism), use.key(KEYS[mechanism][0]))
        out: list[bytes] = []
        for name, data in zip(WHOLES, WHOLE, strict=False):
            yield name
            out.append(use.session.output("C_SignMessage", None, 0, data, len(data)))
        yield "Final"
        use.session.call("C_MessageSignFinal")
        return out

    assert play(mortal, use, story(), moment) == signatures[mechanism]


@FORGED
@MECHANISM
@when(WHOLES)
def test_whole_messages_are_verified(
    mortal: Mortal, signatures: dict[str, list[bytes]], moment: str, mechanism: str, forged: tuple[int, ...]
) -> None:
    use = mortal.use()

    def story() -> Story[list[str]]:
        use.session.init("C_MessageVerifyInit", getattr(p11, mechanism), use.key(KEYS[mechanism][1]))
        out: list[str] = []
        for n, (data, tag) in enumerate(zip(WHOLE, signatures[mechanism], strict=True), 1):
            yield f"message {n}"
            said = flipped(tag) if n in forged else tag
            given = (None, 0, data, len(data), said, len(said))
            out.append(verdict(use, "C_VerifyMessage", *given))
        yield "Final"
        use.session.call("C_MessageVerifyFinal")
        return out

    out = play(mortal, use, story(), moment)
    assert out == [WRONG_SIGNATURE if n in forged else "CKR_OK" for n in NUMBERS]


@when(WHOLES)
def test_whole_messages_between_those_of_parts(mortal: Mortal, sealed: list[Sealed], moment: str) -> None:
    """Encrypted as one, decrypted in parts, in one session and within one operation each."""
    use = mortal.use()

    def story() -> Story[list[Sealed]]:
        use.session.init("C_MessageEncryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
        out: list[Sealed] = []
        for n, data in enumerate(WHOLE, 1):
            yield f"message {n}"
            message = Message(n, p11.CKG_NO_GENERATE)
            given = (*message.arguments, AAD, len(AAD), data, len(data))
            out.append((message.iv.raw, use.session.output("C_EncryptMessage", *given), message.tag.raw))
        yield "Final"
        use.session.call("C_MessageEncryptFinal")
        return out

    assert play(mortal, use, story(), moment) == sealed
    assert finish(decrypt(use, sealed)) == WHOLE


# ---- they are lost


def begin(use: Use, message: Message) -> None:
    use.session.call("C_EncryptMessageBegin", *message.arguments, AAD, len(AAD))


def put(use: Use, message: Message, part: bytes, flags: int = 0) -> bytes:
    room, size = ctypes.create_string_buffer(ROOM + len(part)), c_ulong(ROOM + len(part))
    given = (*message.arguments, part, len(part), room, byref(size), flags)
    use.session.call("C_EncryptMessageNext", *given)
    return room.raw[: size.value]


def is_lost(use: Use, call: Callable[[], object]) -> None:
    """That is said once; the session is there for the next operation at once."""
    assert code(call) == LOST
    assert code(call) == OVER
    assert len(use.session.digest(p11.CKM_SHA256, TEXT)) == 32


@pytest.mark.parametrize("inside", [True, False], ids=["inside a message", "between messages"])
def test_counted_ivs_are_not_counted_again(mortal: Mortal, sealed: list[Sealed], inside: bool) -> None:
    """Another member would count from the start, and use an IV twice."""
    use = mortal.use()
    use.session.init("C_MessageEncryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
    message = Message(1, p11.CKG_GENERATE_COUNTER)
    message.parameter.fixed_bits = 32
    begin(use, message)
    put(use, message, TEXT)
    if not inside:
        put(use, message, TEXT, p11.CKF_END_OF_MESSAGE)
    mortal.die(use)
    is_lost(use, lambda: put(use, message, TEXT) if inside else begin(use, message))
    assert finish(encrypt(use, p11.CKG_NO_GENERATE)) == sealed


def test_too_much_of_one_message(mortal: Mortal, sealed: list[Sealed]) -> None:
    """It is lost with its member, and the operation with it."""
    use = mortal.use()
    use.session.init("C_MessageEncryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
    message = Message(1, p11.CKG_NO_GENERATE)
    begin(use, message)
    put(use, message, os.urandom(2 * LIMIT))
    mortal.die(use)
    is_lost(use, lambda: put(use, message, TEXT))
    assert finish(encrypt(use, p11.CKG_NO_GENERATE)) == sealed


@pytest.mark.parametrize("inside", [True, False], ids=["inside the next", "before the next"])
def test_the_message_after_too_much(mortal: Mortal, every_key: Keys, inside: bool) -> None:
    """What is over needs no repeating: two big messages, and the third one is small."""
    use = mortal.use()
    use.session.init("C_MessageEncryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
    for n in 1, 2:
        message = Message(n, p11.CKG_NO_GENERATE)
        begin(use, message)
        for _ in range(3):
            put(use, message, os.urandom(LIMIT))
        put(use, message, b"", p11.CKF_END_OF_MESSAGE)
    message = Message(3, p11.CKG_NO_GENERATE)
    if inside:
        begin(use, message)
        out = put(use, message, TEXT[:5])
        mortal.die(use)
    else:
        mortal.die(use)
        begin(use, message)
        out = put(use, message, TEXT[:5])
    out += put(use, message, TEXT[5:], p11.CKF_END_OF_MESSAGE)
    use.session.call("C_MessageEncryptFinal")
    assert opened(every_key, [(message.iv.raw, out, message.tag.raw)]) == [TEXT]
