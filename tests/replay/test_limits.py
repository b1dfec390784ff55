"""What is not repeated: too much input, and output that would not be the same; an error once, and never wrong data."""

from __future__ import annotations

import os
from ctypes import byref, c_ubyte, c_ulong, create_string_buffer
from hashlib import sha256

import pytest

from demo.members import SoftToken
from tests import fake as fakes
from tests import p11
from tests.fake import PIN, FakeToken
from tests.ha.app import code
from tests.ha.conftest import FakeFactory, StartFactory
from tests.replay.cases import CtrParams
from tests.replay.conftest import Start
from tests.replay.keys import Keys, wanted
from tests.replay.killable import Killable, reference
from tests.replay.scripts import Use

LIMIT = 5000
DEFAULT = 1 << 20


def digest_parts(mortal: Killable, use: Use, *sizes: int) -> tuple[str, bytes]:
    """A digest of parts of such sizes, its member killed before the last call: what that answers, what is right."""
    parts = [os.urandom(size) for size in sizes]
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    for part in parts:
        use.session.feed("C_DigestUpdate", part)
    mortal.kill_serving(use)
    out: list[bytes] = []
    answer = code(lambda: out.append(use.session.output("C_DigestFinal")))
    assert out in ([], [sha256(b"".join(parts)).digest()])
    return answer, b"".join(out)


def is_usable(use: Use) -> None:
    """No operation is left, and the next one works."""
    assert code(lambda: use.session.output("C_DigestFinal")) == "CKR_OPERATION_NOT_INITIALIZED"
    assert use.session.digest(p11.CKM_SHA256, b"next") == sha256(b"next").digest()


@pytest.mark.parametrize(
    ("limit", "sizes", "answer"),
    [
        (LIMIT, [LIMIT], "CKR_OK"),
        (LIMIT, [LIMIT + 1], "CKR_DEVICE_ERROR"),
        (LIMIT, [1, LIMIT - 2, 1], "CKR_OK"),
        (LIMIT, [1, LIMIT - 1, 1], "CKR_DEVICE_ERROR"),
        (LIMIT, [LIMIT, 0, 0], "CKR_OK"),
        (LIMIT, [LIMIT + 1, 0], "CKR_DEVICE_ERROR"),
        (DEFAULT, [DEFAULT], "CKR_OK"),
        (DEFAULT, [DEFAULT, 1], "CKR_DEVICE_ERROR"),
        (DEFAULT, [1] * 3000, "CKR_OK"),
        (0, [1], "CKR_DEVICE_ERROR"),
        (0, [], "CKR_OK"),
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else f"{len(value)} parts of {sum(value)}",
)
def test_input_up_to_the_limit(start: Start, limit: int, sizes: list[int], answer: str) -> None:
    mortal = start() if limit == DEFAULT else start(replay_limit_bytes=limit)
    use = mortal.use()
    assert digest_parts(mortal, use, *sizes)[0] == answer
    if answer == "CKR_OK":
        mortal.wait_for_all()
        assert digest_parts(mortal, use, *sizes)[0] == answer
    is_usable(use)


def test_small_parts_take_no_more_than_they_are(start: Start) -> None:
    """What is kept of an operation is what its state has; the longest entry of parts that were joined is 4096 bytes."""
    mortal = start()
    use = mortal.use()
    sizes = [*[0] * 2000, *[1] * 5000, *[0, 3] * 1000, 4096, 1, 4097, *[1] * 100]
    parts = [os.urandom(size) for size in sizes]
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    for part in parts:
        use.session.feed("C_DigestUpdate", part)
    size = c_ulong()
    use.session.call("C_GetOperationState", None, byref(size))
    assert size.value < sum(sizes) + 1000
    mortal.kill_serving(use)
    assert use.session.output("C_DigestFinal") == sha256(b"".join(parts)).digest()


def test_parts_that_cannot_be_joined_are_limited_too(start: Start) -> None:
    """Each has given something out: an entry of its own, which is larger than what is in it."""
    use = start(replay_limit_bytes=LIMIT).use()
    counter = CtrParams(128, (c_ubyte * 16)())
    use.session.init("C_EncryptInit", (p11.CKM_AES_CTR, counter), use.key("secret aes"))
    size = c_ulong()
    for _ in range(LIMIT - 1):
        use.session.output("C_EncryptUpdate", b"x", 1)
    rv = use.session.module.rv("C_GetOperationState", use.session.handle, None, byref(size))
    assert p11.rv_name(rv) == "CKR_STATE_UNSAVEABLE"
    use.session.output("C_EncryptFinal")


def test_what_was_lost_is_said_once_and_by_the_next_call(start: Start) -> None:
    mortal = start(replay_limit_bytes=0)
    use = mortal.use()
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    use.session.feed("C_DigestUpdate", b"part")
    mortal.kill_serving(use)
    assert code(lambda: use.session.feed("C_DigestUpdate", b"part")) == "CKR_DEVICE_ERROR"
    assert code(lambda: use.session.feed("C_DigestUpdate", b"part")) == "CKR_OPERATION_NOT_INITIALIZED"
    is_usable(use)


def test_one_part_has_no_limit(start: Start) -> None:
    """It is the application's own buffer."""
    mortal = start(replay_limit_bytes=0)
    use = mortal.use()
    data = os.urandom(2 * DEFAULT)
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    mortal.kill_serving(use)
    assert use.session.output("C_Digest", data, len(data)) == sha256(data).digest()


def test_an_update_without_a_limit_is_repeated_itself(start: Start) -> None:
    """The call that finds its member dead is in the application's buffer, too: only what went before must be kept."""
    mortal = start(replay_limit_bytes=4)
    use = mortal.use()
    big = os.urandom(LIMIT)
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    use.session.feed("C_DigestUpdate", b"four")
    mortal.kill_serving(use)
    use.session.feed("C_DigestUpdate", big)
    assert use.session.output("C_DigestFinal") == sha256(b"four" + big).digest()


# ---- output that does not come out again


class Ciphers:
    """East and west with one key, by which east encrypts; west's key is another one from then on."""

    def __init__(self, fake: FakeFactory, start: StartFactory) -> None:
        self.east, self.west = (fake(name, fakes.cipher_key()) for name in ("east", "west"))
        app = start(self.east.member(), self.west.member(), balance="primary-first")
        self.session = app.login(PIN)
        self.key = self.session.find_one({p11.CKA_LABEL: "cipher"})
        for token in (self.west, self.east):  # each has used it, so that none asks again what it is
            self.session.init("C_EncryptInit", p11.CKM_AES_ECB, self.key)
            if token is self.west:
                self.east["C_Encrypt"].answers(p11.CKR_FUNCTION_NOT_SUPPORTED, times=1)
            self.session.output("C_Encrypt", bytes(16), 16)
        assert app.away() == set()

    def change_west(self) -> None:
        for place in self.west.shared.object:
            for attribute in place.attribute[: place.count] if place.used else ():
                if attribute.type == p11.CKA_VALUE:
                    attribute.value[0] ^= 1

    def update(self, part: bytes) -> bytes:
        out, size = create_string_buffer(64), c_ulong(64)
        self.session.call("C_EncryptUpdate", part, len(part), out, byref(size))
        return out.raw[: size.value]


@pytest.fixture
def ciphers(fake: FakeFactory, start_fakes: StartFactory) -> Ciphers:
    return Ciphers(fake, start_fakes)


def undisturbed(ciphers: Ciphers) -> bytes:
    ciphers.session.init("C_EncryptInit", p11.CKM_AES_ECB, ciphers.key)
    return ciphers.update(b"a" * 16) + ciphers.update(b"b" * 16) + ciphers.session.output("C_EncryptFinal")


def calls(token: FakeToken) -> list[int]:
    return [token.calls(name) for name in ("C_EncryptInit", "C_EncryptUpdate")]


def test_output_that_comes_out_again_lets_it_go_on(ciphers: Ciphers) -> None:
    right = undisturbed(ciphers)
    ciphers.session.init("C_EncryptInit", p11.CKM_AES_ECB, ciphers.key)
    before = calls(ciphers.west)
    out = ciphers.update(b"a" * 16)
    ciphers.east.dies()
    assert out + ciphers.update(b"b" * 16) + ciphers.session.output("C_EncryptFinal") == right
    assert [now - then for now, then in zip(calls(ciphers.west), before, strict=True)] == [1, 2]


def test_output_that_is_another_one_is_an_error_once(ciphers: Ciphers) -> None:
    ciphers.session.init("C_EncryptInit", p11.CKM_AES_ECB, ciphers.key)
    ciphers.update(b"a" * 16)
    ciphers.change_west()
    ciphers.east.dies()
    room = create_string_buffer(b"\xa5" * 64, 64)
    size = c_ulong(64)
    session = ciphers.session
    given = (b"b" * 16, 16, room, byref(size))
    rv = session.module.rv("C_EncryptUpdate", session.handle, *given)
    assert p11.rv_name(rv) == "CKR_DEVICE_ERROR"
    assert room.raw == b"\xa5" * 64
    again = code(lambda: ciphers.update(b"b" * 16))
    assert again == "CKR_OPERATION_NOT_INITIALIZED"
    assert session.digest(p11.CKM_SHA256, b"next") == session.digest(p11.CKM_SHA256, b"next")


def test_parameter_of_unknown_layout_is_not_repeated(ciphers: Ciphers) -> None:
    """CKM_AES_ECB has none, so nobody knows what this one is."""
    session, mechanism = ciphers.session, (p11.CKM_AES_ECB, b"whatever")
    session.init("C_EncryptInit", mechanism, ciphers.key)
    ciphers.east.dies()
    assert code(lambda: ciphers.update(b"a" * 16)) == "CKR_DEVICE_ERROR"
    assert code(lambda: ciphers.update(b"a" * 16)) == "CKR_OPERATION_NOT_INITIALIZED"
    undisturbed(ciphers)


# ---- a PIN


@pytest.mark.parametrize(
    ("dies", "answers"),
    [
        ("before the login", ["CKR_DEVICE_ERROR", "CKR_USER_NOT_LOGGED_IN"]),
        ("after the login", ["CKR_OK", "CKR_DEVICE_ERROR"]),
    ],
)
def test_pin_for_one_operation_is_sent_once(
    start: Start, soft_tokens: list[SoftToken], every_key: Keys, dies: str, answers: list[str]
) -> None:
    """Where it goes on it would be wanted again (CKA_ALWAYS_AUTHENTICATE), and nobody keeps it."""
    private = next(each for each in every_key.templates if wanted("private rsa").items() <= each.items())
    always: dict[int, p11.Value] = {
        p11.CKA_LABEL: "always",
        p11.CKA_ID: b"always",
        p11.CKA_ALWAYS_AUTHENTICATE: True,
    }
    for token in soft_tokens[:2]:
        with reference(token) as use:
            use.session.create(private | always)
    mortal = start()
    session = (use := mortal.use()).session
    key = session.find_one({p11.CKA_LABEL: "always"})

    def login() -> None:
        session.login(mortal.pin, p11.CKU_CONTEXT_SPECIFIC)

    def sign() -> None:
        session.output("C_Sign", b"data", 4)

    session.init("C_SignInit", p11.CKM_SHA256_RSA_PKCS, key)
    if dies == "before the login":
        mortal.kill_serving(use)
    said = [code(login)]
    if dies == "after the login":
        mortal.kill_serving(use)
    assert [*said, code(sign)] == answers
    assert code(sign) == "CKR_OPERATION_NOT_INITIALIZED"
    session.init("C_SignInit", p11.CKM_SHA256_RSA_PKCS, key)
    assert [code(login), code(sign)] == ["CKR_OK", "CKR_OK"]
