"""The fake token as tests hold it: its script and counters, shared with the library in tests/fake/fake.c."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char, c_ubyte, c_uint64
from pathlib import Path

from demo.members import Table, Toml
from tests import p11

ROOT = Path(__file__).parent.parent.parent
ALWAYS = (1 << 64) - 1
PIN, SO_PIN = "1234", "87654321"
PATIENCE_S = 20.0
ENDS = ("answers", "crashes", "exits", "exits at once", "aborts", "spins")
# CK_FUNCTION_LIST of 2.40: all functions up to C_WaitForSlotEvent, in the order of the header.
FUNCTIONS = p11.FUNCTIONS_2_40


class Rule(ctypes.Structure):
    """What is counted of a function and how it misbehaves; `struct rule`."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in ("calls", "skip", "times", "answer", "late", "sleep_us", "hold", "held", "end")
    )
    calls: int
    sleep_us: int
    hold: int
    held: int
    times: int
    end: int

    def ends(self, how: str, times: int = 1) -> None:
        """End the process, or never come back, in so many calls."""
        self.times = self.skip = 0
        self.end = ENDS.index(how)
        self.times = times

    def is_over(self) -> bool:
        """Whether the calls have come that it was for."""
        return self.times == 0

    def answers(self, rv: int, times: int = ALWAYS, *, skip: int = 0, late: bool = False) -> None:
        """Answer `rv` to so many calls after the next `skip` ones; `late`: after having done the work."""
        self.times = self.end = 0
        self.skip, self.answer, self.late = skip, rv, late
        self.times = times

    def works(self) -> None:
        self.times = self.sleep_us = self.hold = 0

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Calls that come meanwhile wait until the end."""
        self.hold = 1
        try:
            yield
        finally:
            self.hold = 0

    def wait_held(self, count: int = 1) -> None:
        """Until so many calls wait."""
        deadline = time.monotonic() + PATIENCE_S
        while self.held < count:
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.held} calls wait, not {count}")
            time.sleep(0.001)


class _Attribute(ctypes.Structure):
    _fields_ = (("type", c_uint64), ("size", c_uint64), ("value", c_ubyte * 256))


class _Object(ctypes.Structure):
    _fields_ = (
        ("used", c_uint64),
        ("session", c_uint64),
        ("count", c_uint64),
        ("attribute", _Attribute * 24),
    )


class _Token(ctypes.Structure):
    _fields_ = (
        ("label", c_char * 32),
        ("serial", c_char * 16),
        ("pin", c_char * 32),
        ("so_pin", c_char * 32),
        *(
            (name, c_uint64)
            for name in (
                "absent",
                "flags",
                "mechanisms",
                "most_sessions",
                "pin_tries",
                "pin_failures",
                "forget_sessions",
                "forget_login",
                "forget_library",
                "starts",
                "sessions",
            )
        ),
        ("every", Rule),
        ("rule", Rule * len(FUNCTIONS)),
        ("object", _Object * 64),
    )


def build(directory: Path) -> Path:
    """Compile the library; warnings are errors, as in ours."""
    library = directory / "libfake.so"
    flags = "-std=c11 -O1 -g -Wall -Wextra -Wconversion -Werror -pthread -shared -fPIC".split()
    source = ROOT / "tests" / "fake" / "fake.c"
    subprocess.run(["cc", *flags, f"-I{ROOT / 'include'}", "-o", library, source], check=True)
    return library


class FakeToken:
    """One token; `fake["C_Sign"]` is the rule of a function, `fake.every` that of all at once."""

    def __init__(self, library: Path, file: Path, label: str) -> None:
        self.library, self.file, self.label = library, file, label
        self.serial = f"fake{sum(label.encode()):012}"
        size = ctypes.sizeof(_Token)
        file.write_bytes(bytes(size))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), size)
        self.shared = _Token.from_buffer(self._map)
        self.shared.label, self.shared.serial = label.encode(), self.serial.encode()
        self.shared.pin, self.shared.so_pin = PIN.encode(), SO_PIN.encode()
        self.shared.mechanisms, self.shared.most_sessions = ALWAYS, 200
        self.env = {"FAKE_TOKENS": str(file)}

    def __getitem__(self, function: str) -> Rule:
        rule: Rule = self.shared.rule[FUNCTIONS.index(function)]
        return rule

    @property
    def every(self) -> Rule:
        rule: Rule = self.shared.every
        return rule

    def calls(self, function: str) -> int:
        """How many calls of a function have reached it so far."""
        return int(self[function].calls)

    def dies(self) -> None:
        """From now on every call fails, as with a client whose server was killed."""
        self.every.answers(p11.CKR_DEVICE_ERROR)
        self["C_Initialize"].answers(p11.CKR_DEVICE_ERROR)

    def is_well_again(self) -> None:
        self.every.works()
        for rule in self.shared.rule:
            rule.works()

    def member(self, **options: Toml) -> Table:
        """This token as a `[[member]]` with the library to itself."""
        member: dict[str, Toml] = {
            "name": self.label,
            "module": str(self.library),
            "token": f"pkcs11:token={self.label}",
            "env": self.env,
            "instance": "own",
        }
        return member | options

    # Objects, put into the token and looked at behind the library's back

    def add(self, template: p11.Template) -> None:
        """Put a token object into it."""
        place = next(place for place in self.shared.object if not place.used)
        values = {p11.CKA_TOKEN: True} | dict(template)
        for attribute, (kind, value) in zip(place.attribute, values.items(), strict=False):
            raw = p11.value_bytes(value)
            attribute.type, attribute.size = kind, len(raw)
            ctypes.memmove(attribute.value, raw, len(raw))
        place.session, place.count = 0, len(values)
        place.used = 1

    def objects(self) -> list[dict[int, bytes]]:
        """The token objects it has, as attribute -> value."""
        return [
            {each.type: bytes(each.value[: each.size]) for each in place.attribute[: place.count]}
            for place in self.shared.object
            if place.used and not place.session
        ]

    def labels(self) -> list[str]:
        """The labels of its token objects."""
        return sorted(each.get(p11.CKA_LABEL, b"").decode() for each in self.objects())


def signing_key(label: str = "signing", modulus: bytes = b"\xc1" * 128) -> dict[int, p11.Value]:
    """A private key that shows its public half, so it is recognised without a proof."""
    return {
        p11.CKA_CLASS: p11.CKO_PRIVATE_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_RSA,
        p11.CKA_PRIVATE: True,
        p11.CKA_LABEL: label,
        p11.CKA_ID: b"\x01",
        p11.CKA_SIGN: True,
        p11.CKA_MODULUS: modulus,
        p11.CKA_PUBLIC_EXPONENT: b"\x01\x00\x01",
    }


def secret_key(label: str = "secret", value: bytes = b"k" * 32) -> dict[int, p11.Value]:
    """A secret key: two of them can only be told apart by using them."""
    return {
        p11.CKA_CLASS: p11.CKO_SECRET_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET,
        p11.CKA_PRIVATE: True,
        p11.CKA_LABEL: label,
        p11.CKA_ID: b"\x02",
        p11.CKA_SIGN: True,
        p11.CKA_VALUE_LEN: len(value),
        p11.CKA_VALUE: value,
    }


def cipher_key(label: str = "cipher", value: bytes = b"c" * 16) -> dict[int, p11.Value]:
    """An AES key that encrypts and decrypts."""
    return {
        p11.CKA_CLASS: p11.CKO_SECRET_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_AES,
        p11.CKA_PRIVATE: True,
        p11.CKA_LABEL: label,
        p11.CKA_ID: b"\x03",
        p11.CKA_ENCRYPT: True,
        p11.CKA_DECRYPT: True,
        p11.CKA_VALUE_LEN: len(value),
        p11.CKA_VALUE: value,
    }
