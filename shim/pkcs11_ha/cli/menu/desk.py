"""What lies before an operator: the module, the open sessions, the options, and questions that all numbers share."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pkcs11_ha import ck
from pkcs11_ha.cli.menu import attributes
from pkcs11_ha.cli.menu.attributes import KEY_TYPES, ValueForm, mechanism_name, plain
from pkcs11_ha.cli.menu.client import Client, Template, Value, value_bytes
from pkcs11_ha.cli.menu.dialogue import Dialogue, NotDone, Script, read_file, write_file

LAST = "last"
NOTHING: Template = {}
_HEX_LINES = 8
_HEX_LINE_BYTES = 32

_CLASSES = {
    "data": ck.CKO_DATA,
    "cert": ck.CKO_CERTIFICATE,
    "public": ck.CKO_PUBLIC_KEY,
    "private": ck.CKO_PRIVATE_KEY,
    "secret": ck.CKO_SECRET_KEY,
}

# What a type of key is used with, by the mechanisms' names; other types are offered all.
_MECHANISMS_OF: dict[int, str] = {
    ck.CKK_RSA: r"RSA",
    ck.CKK_DSA: r"^CKM_(FIPS_)?DSA",
    ck.CKK_DH: r"^CKM_DH_",
    ck.CKK_EC: r"ECDSA|ECDH|ECMQV",
    ck.CKK_EC_EDWARDS: r"EDDSA|ECDH",
    ck.CKK_EC_MONTGOMERY: r"ECDH|XEDDSA",
    ck.CKK_AES: r"^CKM_AES|CONCATENATE|XOR_BASE|EXTRACT_KEY",
    ck.CKK_DES3: r"^CKM_DES3|CONCATENATE|XOR_BASE|EXTRACT_KEY",
    ck.CKK_GENERIC_SECRET: r"HMAC|CONCATENATE|XOR_BASE|EXTRACT_KEY|HKDF|SP800",
}


@dataclass
class Options:
    """What number 98 changes."""

    verbose: bool = False
    ask: bool = True
    slot: int | None = None
    show_menu: bool = True
    keep_going: bool = False
    part: int = 1 << 20
    width: int = attributes.HEX_WIDTH


@dataclass(frozen=True)
class Session:
    """An open session; `number` is how it is called here."""

    number: int
    handle: int
    slot: int
    writes: bool

    def __str__(self) -> str:
        return f"{self.number}: slot {self.slot}, {'read-write' if self.writes else 'read-only'}"


@dataclass(frozen=True)
class Background:
    """A script that runs in a process of its own."""

    script: Path
    output: Path
    process: subprocess.Popen[bytes]


@dataclass
class Desk:
    """The one thing that every number of the menu is given."""

    client: Client
    dialogue: Dialogue
    options: Options
    run: Callable[[Script], int]
    """Carries out a script and returns how many of its numbers failed."""
    command: tuple[str, ...] = ()
    """What the menu was started with, for scripts in the background."""
    sessions: list[Session] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    """The objects made or found last, which `last` means."""
    result: bytes = b""
    """What was put out last, which `last` means where data are asked for."""
    used: dict[int, dict[str, bytes]] = field(default_factory=dict)
    """What the parameters of mechanisms were made of last: decryption wants what encryption had."""
    background: list[Background] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        """Shows a line."""
        self.dialogue.say(text)

    # ---- slots and sessions

    def slot(self) -> int:
        """Lists the slots and asks for one; the form is CKDemo's."""
        slots = self.client.slots()
        self.say("Slots available:")
        for slot in slots:
            self.say(f"slot#{slot} - {plain(self.client.slot_info(slot).description).strip()}")
        if not slots:
            raise NotDone("the module shows no slot")
        default = None if self.options.slot is None else str(self.options.slot)
        return self.dialogue.ask("Select a slot", number, default)

    def session(self) -> Session:
        """The open one; of several one is asked for.  Raises NotDone."""
        if not self.sessions:
            raise NotDone("no session is open: 1 opens one")
        if len(self.sessions) == 1:
            return self.sessions[0]
        for session in self.sessions:
            self.say(f"  session {session}")
        return self.dialogue.ask("Session", self._session_of, str(self.sessions[-1].number))

    def _session_of(self, text: str) -> Session:
        for session in self.sessions:
            if str(session.number) == text:
                return session
        known = ", ".join(str(session.number) for session in self.sessions)
        raise ValueForm(f"{text!r} is no open session: type one of {known}")

    # ---- objects

    def object(self, session: Session, prompt: str, wanted: Template = NOTHING) -> int:
        """A handle, or what finds one object; `wanted` tells those apart that have one name, as {CKA_SIGN: True}."""
        return self.dialogue.ask(
            f"{prompt} (handle, label, id=HEX, last)",
            lambda text: self.object_of(session, text, wanted),
            LAST if self.made else None,
        )

    def object_of(self, session: Session, text: str, wanted: Template = NOTHING) -> int:
        """The object that a text names; raises ValueForm."""
        handle = attributes.unsigned(text)
        if handle is not None:
            return handle
        found = self.made if text == LAST else self.client.find(session.handle, _named(text))
        if len(found) > 1 or text == LAST:
            found = [handle for handle in found if self._has(session, handle, wanted)]
        if len(found) == 1:
            return found[0]
        what = "made last" if text == LAST else f"called {text!r}"
        which = "".join(f" with {attributes.attribute_name(each)}" for each in wanted)
        if not found:
            raise ValueForm(f"no object {what}{which} is there, or it needs a login")
        some = ", ".join(f"{each} ({self.kind(session, each)})" for each in found[:4])
        raise ValueForm(f"{len(found)} objects {what}{which}: {some}: type a handle, or private:… public:…")

    def _has(self, session: Session, handle: int, wanted: Template) -> bool:
        got = self.client.get(session.handle, handle, tuple(wanted)) if wanted else {}
        return all(got.get(each) == value_bytes(value) for each, value in wanted.items())

    def kind(self, session: Session, handle: int) -> str:
        """Class and key type in a few words."""
        got = self.client.get(session.handle, handle, (ck.CKA_CLASS, ck.CKA_KEY_TYPE))
        words = [
            attributes.shown(each, got[each]).partition("_")[2].replace("_", " ").lower()
            for each in (ck.CKA_CLASS, ck.CKA_KEY_TYPE)
            if each in got
        ]
        return ", ".join(words) or "object"

    def row(self, session: Session, handle: int) -> str:
        """An object in one line."""
        got = self.client.get(session.handle, handle, (ck.CKA_LABEL, ck.CKA_ID))
        label = plain(got.get(ck.CKA_LABEL, b""))
        identifier = got.get(ck.CKA_ID, b"")
        named = f"  id {attributes.hexadecimal(identifier, 8)}" if identifier else ""
        return f"  {handle:<8} {self.kind(session, handle):<24} {label}{named}"

    def key_type(self, session: Session, handle: int) -> int | None:
        """CKA_KEY_TYPE, if the object has one and shows it."""
        data = self.client.get(session.handle, handle, (ck.CKA_KEY_TYPE,)).get(ck.CKA_KEY_TYPE)
        return None if data is None else int.from_bytes(data, "little")

    def pin_for_use(self, session: Session, key: int) -> bytes | None:
        """The PIN that some keys want at each use."""
        always = ck.CKA_ALWAYS_AUTHENTICATE
        if self.client.get(session.handle, key, (always,)).get(always) != b"\1":
            return None
        return self.dialogue.pin("PIN, which this key wants at each use")

    def keep(self, session: Session, *handles: int) -> None:
        """Shows new objects, which `last` means from now on."""
        self.made = list(handles)
        for handle in handles:
            self.say(self.row(session, handle))

    # ---- mechanisms

    def mechanism(self, slot: int, flag: int, key_type: int | None = None) -> int:
        """One of those that the token has for a purpose, by its place in the list, by name, or any by name."""
        offered = [
            each
            for each in self.client.mechanisms(slot)
            if self.client.mechanism_info(slot, each).flags & flag
        ]
        fitting = [each for each in offered if _fits(each, key_type)] or offered
        if self.dialogue.source.interactive:
            self._list(fitting)

        def read(text: str) -> int:
            place = attributes.unsigned(text)
            if place is not None and 1 <= place <= len(fitting):
                return fitting[place - 1]
            return attributes.mechanism_number(text)

        return self.dialogue.ask("Mechanism (number in the list, or name)", read)

    def _list(self, mechanisms: list[int]) -> None:
        words = [f"{i:3} {mechanism_name(m).removeprefix('CKM_')}" for i, m in enumerate(mechanisms, 1)]
        half = (len(words) + 1) // 2
        for left, right in zip(words[:half], [*words[half:], ""], strict=False):
            self.say(f"{left:<39} {right}".rstrip())

    # ---- data

    def data(self, prompt: str, *, last: bool = False) -> bytes:
        """Text, 0xHEX, @FILE, or the last result."""
        default = LAST if last and self.result else None
        return self.dialogue.ask(f"{prompt} (text, 0xHEX, @FILE, last)", self._data_of, default)

    def _data_of(self, text: str) -> bytes:
        if text == LAST:
            if not self.result:
                raise ValueForm("nothing was put out yet: type text, 0xHEX or @FILE")
            return self.result
        if text.startswith("@"):
            return read_file(Path(text[1:]))
        if text.startswith("0x"):
            return attributes.octets(text)
        return text.encode("utf-8", "surrogateescape")

    def put(self, title: str, data: bytes, *, readable: bool = False) -> None:
        """Shows a result, and writes it to a file if it is wanted there."""
        self.result = data
        self.say(f"{title} ({len(data)} bytes):")
        if readable and data.isascii() and plain(data) == data.decode("ascii"):
            self.say(f"  {data.decode('ascii')}")
        self.block(data)
        path = self.dialogue.text("Write it to a file (name, or nothing)", "")
        if not path:
            return
        if (
            Path(path).exists()
            and self.options.ask
            and not self.dialogue.sure(f"{path} is there: overwrite it")
        ):
            return
        write_file(Path(path), data)
        self.say(f"{path}: written")

    def block(self, data: bytes) -> None:
        """Bytes in lines of hexadecimal, of many the first."""
        lines = [data[at : at + _HEX_LINE_BYTES].hex() for at in range(0, len(data), _HEX_LINE_BYTES)]
        for line in lines[:_HEX_LINES]:
            self.say(f"  {line}")
        if len(lines) > _HEX_LINES:
            self.say(f"  … and {len(data) - _HEX_LINES * _HEX_LINE_BYTES} bytes more")

    def destroys(self, what: str) -> None:
        """Asks before something is lost; raises NotDone for a no."""
        if self.options.ask and not self.dialogue.sure(f"Destroy {what}"):
            raise NotDone("nothing was destroyed")


def _named(text: str) -> Template:
    """What `LABEL`, `label=LABEL`, `id=HEX` and `private:…` look for; raises ValueForm."""
    template: dict[int, Value] = {}
    kind, colon, rest = text.partition(":")
    if colon and kind in _CLASSES:
        template[ck.CKA_CLASS], text = _CLASSES[kind], rest
    if text.startswith("id="):
        template[ck.CKA_ID] = attributes.octets(text.removeprefix("id="))
    else:
        template[ck.CKA_LABEL] = text.removeprefix("label=")
    return template


def _fits(mechanism: int, key_type: int | None) -> bool:
    pattern = _MECHANISMS_OF.get(key_type) if key_type is not None else None
    return pattern is None or re.search(pattern, mechanism_name(mechanism)) is not None


def number(text: str) -> int:
    """A number; raises ValueForm."""
    value = attributes.unsigned(text)
    if value is None:
        raise ValueForm(f"{text!r} is no number")
    return value


def at_most(most: int, least: int = 0) -> Callable[[str], int]:
    """Reads a number in bounds; raises ValueForm."""

    def read(text: str) -> int:
        value = number(text)
        if not least <= value <= most:
            raise ValueForm(f"{value} is not from {least} to {most}")
        return value

    return read


def choice(choices: Iterable[str]) -> Callable[[str], str]:
    """Reads one of these words; raises ValueForm."""
    words = tuple(choices)

    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueForm(f"{text!r} is none of {', '.join(words)}")
        return text.lower()

    return read


def key_type_name(key_type: int) -> str:
    """CKK_…, or the number."""
    return KEY_TYPES.get(key_type) or f"0x{key_type:X}"
