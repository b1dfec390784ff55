"""Operations by messages (PKCS#11 3.0) on NSS softokn: each member fails before each message and before the end."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_ulong, c_void_p
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from demo.members import SoftToken, Table, library
from tests import p11
from tests.conftest import ROOT
from tests.ha.app import Application, code, working_until
from tests.replay.cases import IV, TEXT
from tests.replay.keys import Keys
from tests.replay.killable import AT_ONCE, NssToken, application
from tests.replay.scripts import Use
from tests.replication.conftest import scratch

MESSAGES = [TEXT, TEXT[:5], b"", TEXT * 3]
AAD = b"additional data"


class GcmMessage(ctypes.Structure):
    """CK_GCM_MESSAGE_PARAMS."""

    _fields_ = (
        ("iv", c_void_p),
        ("iv_size", c_ulong),
        ("fixed_bits", c_ulong),
        ("generator", c_ulong),
        ("tag", c_void_p),
        ("tag_bits", c_ulong),
    )


class Message:
    """The parameter of one message, with an IV of its own."""

    def __init__(self, number: int, generator: int, tag: bytes = bytes(16)) -> None:
        self.iv = ctypes.create_string_buffer(bytes([number]) + IV[1:12], 12)
        self.tag = ctypes.create_string_buffer(tag, 16)
        at = (ctypes.addressof(self.iv), 12, 0, generator, ctypes.addressof(self.tag), 128)
        self.parameter = GcmMessage(*at)

    @property
    def arguments(self) -> tuple[object, int]:
        return byref(self.parameter), ctypes.sizeof(self.parameter)


@dataclass
class Switched:
    """Members that fail and work again as they are told."""

    app: Application
    switches: dict[str, Path]

    def turn_off_serving(self, use: Use) -> str:
        name = self.app.served(use.session)
        self.switches[name].write_bytes(b"\1")
        return name

    def turn_on(self, name: str) -> None:
        self.switches[name].write_bytes(b"\0")

    def wait_for_all(self) -> None:
        for name in self.switches:
            self.turn_on(name)
        session = self.app.open()
        # Not random numbers: the generator is in libfreebl, which both instances share, and one ends it for both.
        work = partial(session.digest, p11.CKM_SHA256, TEXT)
        working_until(work, lambda: not self.app.away(), "all are back")
        session.close()


@pytest.fixture(scope="module")
def switch_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("switch") / "libswitch.so"
    flags = "-std=c11 -O1 -g -Wall -Wextra -Wconversion -Werror -shared -fPIC -Wl,-Bsymbolic".split()
    source = Path(__file__).with_name("switch.c")
    subprocess.run(["cc", *flags, f"-I{ROOT / 'include'}", "-o", made, source, "-ldl"], check=True)
    return made


@contextmanager
def switched(
    module: Path, switch_library: Path, directory: Path, tokens: list[SoftToken]
) -> Iterator[Switched]:
    switches: dict[str, Path] = {}
    members: list[Table] = []
    for token in tokens:
        assert isinstance(token, NssToken)
        switches[token.label] = directory / f"{token.label}.switch"
        switches[token.label].write_bytes(b"\0")
        softokn = shutil.copy(library("libsoftokn3.so"), directory / f"{token.label}.so")  # state of its own
        env = {"SWITCH_MODULE": str(softokn), "SWITCH_FILE": str(switches[token.label])}
        members.append(
            {
                "name": token.label,
                "module": str(switch_library),
                "token": token.uri,
                "env": env,
                "init_args": token.parameters,
                "instance": "own",
            }
        )
    with application(module, directory, members, AT_ONCE) as app:
        yield Switched(app, switches)


@pytest.fixture(scope="module")
def group(module: Path, switch_library: Path, nss_tokens: list[SoftToken]) -> Iterator[tuple[Switched, Use]]:
    with scratch() as path, switched(module, switch_library, Path(path), nss_tokens[:2]) as made:
        session = made.app.open()
        session.login(nss_tokens[0].pin)
        yield made, Use(session)


def put(use: Use, name: str, message: Message, data: bytes) -> bytes:
    out, size = ctypes.create_string_buffer(1 << 10), c_ulong(1 << 10)
    given = (*message.arguments, AAD, len(AAD), data, len(data), out, byref(size))
    use.session.call(name, *given)
    return out.raw[: size.value]


def sealed(every_key: Keys) -> list[tuple[bytes, bytes]]:
    """Text and tag of each message, in software."""
    cipher = AESGCM(every_key.value("aes"))
    both = [cipher.encrypt(bytes([number]) + IV[1:12], data, AAD) for number, data in enumerate(MESSAGES)]
    return [(each[:-16], each[-16:]) for each in both]


MOMENTS = pytest.mark.parametrize("moment", range(len(MESSAGES) + 1))


@MOMENTS
def test_encryption_goes_on(group: tuple[Switched, Use], every_key: Keys, moment: int) -> None:
    members, use = group
    members.wait_for_all()
    use.session.init("C_MessageEncryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
    failed = ""
    out: list[tuple[bytes, bytes]] = []
    for number, data in enumerate(MESSAGES):
        if number == moment:
            failed = members.turn_off_serving(use)
        message = Message(number, p11.CKG_NO_GENERATE)
        out.append((put(use, "C_EncryptMessage", message, data), message.tag.raw))
    if moment == len(MESSAGES):
        failed = members.turn_off_serving(use)
    use.session.call("C_MessageEncryptFinal")
    assert out == sealed(every_key)
    assert members.app.served(use.session) != failed


@MOMENTS
def test_decryption_goes_on(group: tuple[Switched, Use], every_key: Keys, moment: int) -> None:
    members, use = group
    members.wait_for_all()
    use.session.init("C_MessageDecryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
    failed = ""
    out: list[bytes] = []
    for number, (data, tag) in enumerate(sealed(every_key)):
        if number == moment:
            failed = members.turn_off_serving(use)
        out.append(put(use, "C_DecryptMessage", Message(number, p11.CKG_NO_GENERATE, tag), data))
    if moment == len(MESSAGES):
        failed = members.turn_off_serving(use)
    use.session.call("C_MessageDecryptFinal")
    assert out == MESSAGES
    assert members.app.served(use.session) != failed


def test_forged_message_stays_one(group: tuple[Switched, Use], every_key: Keys) -> None:
    """And the operation goes on to the next message."""
    members, use = group
    members.wait_for_all()
    (data, tag), *_ = sealed(every_key)
    use.session.init("C_MessageDecryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
    right = Message(0, p11.CKG_NO_GENERATE, tag)
    assert put(use, "C_DecryptMessage", right, data) == MESSAGES[0]
    members.turn_off_serving(use)
    forged = Message(0, p11.CKG_NO_GENERATE, bytes([tag[0] ^ 1]) + tag[1:])
    assert code(lambda: put(use, "C_DecryptMessage", forged, data)) != "CKR_OK"
    assert put(use, "C_DecryptMessage", right, data) == MESSAGES[0]
    use.session.call("C_MessageDecryptFinal")


def test_ivs_that_a_member_makes_are_not_made_again(group: tuple[Switched, Use]) -> None:
    """Another member would count from the start, and use an IV twice."""
    members, use = group
    members.wait_for_all()
    use.session.init("C_MessageEncryptInit", p11.CKM_AES_GCM, use.key("secret aes"))
    message = Message(0, p11.CKG_GENERATE_COUNTER)
    message.parameter.fixed_bits = 32
    assert code(lambda: put(use, "C_EncryptMessage", message, TEXT)) == "CKR_OK"
    members.turn_off_serving(use)
    assert code(lambda: put(use, "C_EncryptMessage", message, TEXT)) == "CKR_DEVICE_ERROR"
    assert code(lambda: put(use, "C_EncryptMessage", message, TEXT)) == "CKR_OPERATION_NOT_INITIALIZED"
    assert len(use.session.digest(p11.CKM_SHA256, TEXT)) == 32
