"""Any PKCS#11 module by its path, in this process: typed calls, each failure an exception that names its code."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char, c_ubyte, c_ulong, c_void_p
from dataclasses import dataclass
from pathlib import Path

from pkcs11_ha import ck
from pkcs11_ha.cli.module import ModuleError, Status
from pkcs11_ha.spec.functions import FUNCTIONS

Value = bool | int | str | bytes
Template = Mapping[int, Value]

FIND_AT_ONCE = 64
_MORE_ROOM = 64
"""Beyond the size that was told: NSS forgets the tag of AES-GCM, and ends the operation where there is no room."""


class CallError(Exception):
    """A call answered something else than CKR_OK."""

    def __init__(self, call: str, rv: int) -> None:
        super().__init__(f"{call} answers {ck.rv_name(rv)}")
        self.call, self.rv = call, rv


@dataclass(frozen=True)
class Mechanism:
    """A CK_MECHANISM; a structure keeps the buffers alive that it points to."""

    type: int
    parameter: bytes | ctypes.Structure | None = None


class Version(ctypes.Structure):
    """CK_VERSION"""

    _fields_ = (("major", c_ubyte), ("minor", c_ubyte))


class _FunctionList(ctypes.Structure):
    _fields_ = (
        ("version", Version),
        *((row.name, c_void_p) for row in FUNCTIONS if row.since == "2.40"),
    )


class _InitializeArgs(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("create", "destroy", "lock", "unlock")),
        ("flags", c_ulong),
        ("reserved", ctypes.c_char_p),
    )


class _Mechanism(ctypes.Structure):
    _fields_ = (("type", c_ulong), ("parameter", POINTER(c_char)), ("size", c_ulong))


class _Attribute(ctypes.Structure):
    _fields_ = (("type", c_ulong), ("value", POINTER(c_char)), ("size", c_ulong))


class Info(ctypes.Structure):
    """CK_INFO"""

    _fields_ = (
        ("cryptoki", Version),
        ("manufacturer", c_char * 32),
        ("flags", c_ulong),
        ("description", c_char * 32),
        ("library", Version),
    )


class SlotInfo(ctypes.Structure):
    """CK_SLOT_INFO"""

    _fields_ = (
        ("description", c_char * 64),
        ("manufacturer", c_char * 32),
        ("flags", c_ulong),
        ("hardware", Version),
        ("firmware", Version),
    )


class TokenInfo(ctypes.Structure):
    """CK_TOKEN_INFO"""

    _fields_ = (
        ("label", c_char * 32),
        ("manufacturer", c_char * 32),
        ("model", c_char * 16),
        ("serial", c_char * 16),
        ("flags", c_ulong),
        *((name, c_ulong) for name in ("max_sessions", "sessions", "max_rw_sessions", "rw_sessions")),
        *((name, c_ulong) for name in ("max_pin", "min_pin", "total_public", "free_public")),
        *(("total_private", c_ulong), ("free_private", c_ulong)),
        *(("hardware", Version), ("firmware", Version), ("utc", c_char * 16)),
    )


class SessionInfo(ctypes.Structure):
    """CK_SESSION_INFO"""

    _fields_ = tuple((name, c_ulong) for name in ("slot", "state", "flags", "device_error"))


class MechanismInfo(ctypes.Structure):
    """CK_MECHANISM_INFO"""

    _fields_ = tuple((name, c_ulong) for name in ("least", "most", "flags"))


@dataclass(frozen=True)
class HaStatus:
    """What CA_GetHAState tells: serial number and return value of each member, in their order."""

    group: str
    members: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Operation:
    """The four functions of one kind of operation."""

    init: str
    whole: str
    update: str
    final: str


ENCRYPT = Operation("C_EncryptInit", "C_Encrypt", "C_EncryptUpdate", "C_EncryptFinal")
DECRYPT = Operation("C_DecryptInit", "C_Decrypt", "C_DecryptUpdate", "C_DecryptFinal")
SIGN = Operation("C_SignInit", "C_Sign", "C_SignUpdate", "C_SignFinal")
VERIFY = Operation("C_VerifyInit", "C_Verify", "C_VerifyUpdate", "C_VerifyFinal")
DIGEST = Operation("C_DigestInit", "C_Digest", "C_DigestUpdate", "C_DigestFinal")
_CIPHERS = (ENCRYPT, DECRYPT)

_Function = ctypes.CFUNCTYPE(c_ulong)


class Client:
    """A loaded module, between `initialize` and `finalize`.

    `trace` is told of every call: its name, what it answered and how many seconds it took.  A Ctrl-C within a call
    waits for its end: the module, or the core that works in this interpreter, is not left halfway.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            raise ModuleError(f"{path}: cannot be loaded: {error}") from None
        pointer = POINTER(_FunctionList)()
        try:
            rv = _Function(("C_GetFunctionList", self._library))(byref(pointer))
        except AttributeError:
            raise ModuleError(f"{path}: no PKCS#11 module: it has no C_GetFunctionList") from None
        if rv != ck.CKR_OK:
            raise ModuleError(f"{path}: C_GetFunctionList answers {ck.rv_name(rv)}")
        self._list = pointer.contents
        self.path = path
        self.trace: Callable[[str, int, float], None] | None = None
        self._inside = self._interrupted = False

    # ---- calls

    def interrupt(self) -> None:
        """A Ctrl-C: at once where no call is under way, else at its end."""
        if not self._inside:
            raise KeyboardInterrupt
        self._interrupted = True

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt

    def rv(self, name: str, *arguments: object) -> int:
        """Calls a function of the list by its C name; integers are passed as CK_ULONG."""
        address = getattr(self._list, name)
        if not address:
            return ck.CKR_FUNCTION_NOT_SUPPORTED
        return self._timed(name, _Function(address), arguments)

    def _timed(self, name: str, function: Callable[..., int], arguments: tuple[object, ...]) -> int:
        passed = [c_ulong(each) if isinstance(each, int) else each for each in arguments]
        began = time.monotonic()
        with self._uninterrupted():
            rv = int(function(*passed))
        if self.trace:
            self.trace(name, rv, time.monotonic() - began)
        return rv

    def call(self, name: str, *arguments: object) -> None:
        """The same; raises CallError."""
        rv = self.rv(name, *arguments)
        if rv != ck.CKR_OK:
            raise CallError(name, rv)

    def _output(self, name: str, *arguments: object) -> bytes:
        """What a function puts out, its size asked first."""
        size = c_ulong()
        self.call(name, *arguments, None, byref(size))
        size.value += _MORE_ROOM
        room = ctypes.create_string_buffer(size.value)
        self.call(name, *arguments, room, byref(size))
        return room.raw[: size.value]

    def _list_of(self, name: str, *arguments: object) -> list[int]:
        count = c_ulong()
        self.call(name, *arguments, None, byref(count))
        numbers = (c_ulong * max(count.value, 1))()
        self.call(name, *arguments, numbers, byref(count))
        return list(numbers[: count.value])

    def _handle(self, name: str, *arguments: object) -> int:
        handle = c_ulong()
        self.call(name, *arguments, byref(handle))
        return handle.value

    # ---- the module, slots and tokens

    def initialize(self, init_args: str = "") -> None:
        """C_Initialize; `init_args` is the string that some libraries want in pReserved (NSS)."""
        reserved = init_args.encode() if init_args else None
        self.call("C_Initialize", byref(_InitializeArgs(flags=ck.CKF_OS_LOCKING_OK, reserved=reserved)))

    def finalize(self) -> None:
        """C_Finalize, whatever it answers."""
        self.rv("C_Finalize", None)

    def info(self) -> Info:
        """C_GetInfo"""
        info = Info()
        self.call("C_GetInfo", byref(info))
        return info

    def slots(self, *, present: bool = False) -> list[int]:
        """C_GetSlotList"""
        return self._list_of("C_GetSlotList", int(present))

    def slot_info(self, slot: int) -> SlotInfo:
        """C_GetSlotInfo"""
        info = SlotInfo()
        self.call("C_GetSlotInfo", slot, byref(info))
        return info

    def token_info(self, slot: int) -> TokenInfo:
        """C_GetTokenInfo"""
        info = TokenInfo()
        self.call("C_GetTokenInfo", slot, byref(info))
        return info

    def mechanisms(self, slot: int) -> list[int]:
        """C_GetMechanismList"""
        return self._list_of("C_GetMechanismList", slot)

    def mechanism_info(self, slot: int, mechanism: int) -> MechanismInfo:
        """C_GetMechanismInfo"""
        info = MechanismInfo()
        self.call("C_GetMechanismInfo", slot, mechanism, byref(info))
        return info

    def slot_event(self) -> int:
        """C_WaitForSlotEvent, which does not wait: the slot where something happened."""
        slot = c_ulong()
        self.call("C_WaitForSlotEvent", ck.CKF_DONT_BLOCK, byref(slot), None)
        return slot.value

    def init_token(self, slot: int, so_pin: bytes | None, label: str) -> None:
        """C_InitToken"""
        self.call("C_InitToken", slot, so_pin, len(so_pin or b""), label.encode()[:32].ljust(32))

    def ha_status(self, slot: int) -> HaStatus:
        """CA_GetHAState, of a module that has it: ours, or an HSM vendor's with that extension."""
        name, status = "CA_GetHAState", Status()
        try:
            function = _Function((name, self._library))
        except AttributeError:
            raise CallError(name, ck.CKR_FUNCTION_NOT_SUPPORTED) from None
        rv = self._timed(name, function, (slot, byref(status)))
        if rv != ck.CKR_OK:
            raise CallError(name, rv)
        listed = status.members[: min(status.size, len(status.members))]
        members = tuple((each.serial.decode("utf-8", "replace"), int(each.status)) for each in listed)
        return HaStatus(status.serial.decode("utf-8", "replace"), members)

    # ---- sessions

    def open(self, slot: int, *, writes: bool) -> int:
        """C_OpenSession"""
        flags = ck.CKF_SERIAL_SESSION | (ck.CKF_RW_SESSION if writes else 0)
        return self._handle("C_OpenSession", slot, flags, None, None)

    def close(self, session: int) -> None:
        """C_CloseSession"""
        self.call("C_CloseSession", session)

    def session_info(self, session: int) -> SessionInfo:
        """C_GetSessionInfo"""
        info = SessionInfo()
        self.call("C_GetSessionInfo", session, byref(info))
        return info

    def login(self, session: int, user: int, pin: bytes | None) -> None:
        """C_Login; no PIN where the token asks for it by itself."""
        self.call("C_Login", session, user, pin, len(pin or b""))

    def logout(self, session: int) -> None:
        """C_Logout"""
        self.call("C_Logout", session)

    def init_pin(self, session: int, pin: bytes | None) -> None:
        """C_InitPIN"""
        self.call("C_InitPIN", session, pin, len(pin or b""))

    def set_pin(self, session: int, old: bytes | None, new: bytes | None) -> None:
        """C_SetPIN"""
        self.call("C_SetPIN", session, old, len(old or b""), new, len(new or b""))

    # ---- objects

    def create(self, session: int, template: Template) -> int:
        """C_CreateObject"""
        return self._handle("C_CreateObject", session, *_template(template))

    def copy(self, session: int, handle: int, template: Template) -> int:
        """C_CopyObject"""
        return self._handle("C_CopyObject", session, handle, *_template(template))

    def destroy(self, session: int, handle: int) -> None:
        """C_DestroyObject"""
        self.call("C_DestroyObject", session, handle)

    def size(self, session: int, handle: int) -> int:
        """C_GetObjectSize"""
        return self._handle("C_GetObjectSize", session, handle)

    def get(self, session: int, handle: int, types: tuple[int, ...]) -> dict[int, bytes]:
        """C_GetAttributeValue: values of those attributes that the object has and shows."""
        some = (ck.CKR_OK, ck.CKR_ATTRIBUTE_SENSITIVE, ck.CKR_ATTRIBUTE_TYPE_INVALID)
        template = (_Attribute * len(types))(*(_Attribute(type=each) for each in types))
        rv = self.rv("C_GetAttributeValue", session, handle, template, len(types))
        if rv not in some:
            raise CallError("C_GetAttributeValue", rv)
        there = [each for each in template if each.size != ck.CK_UNAVAILABLE_INFORMATION]
        buffers = [ctypes.create_string_buffer(max(each.size, 1)) for each in there]
        template = (_Attribute * len(there))(
            *(_Attribute(e.type, _pointer(b), e.size) for e, b in zip(there, buffers, strict=True))
        )
        if there:
            self.call("C_GetAttributeValue", session, handle, template, len(there))
        return {e.type: b.raw[: e.size] for e, b in zip(template, buffers, strict=True)}

    def attribute(self, session: int, handle: int, kind: int) -> bytes:
        """C_GetAttributeValue of one; raises CallError where the object has or shows none."""
        template = (_Attribute * 1)(_Attribute(type=kind))
        self.call("C_GetAttributeValue", session, handle, template, 1)
        buffer = ctypes.create_string_buffer(max(template[0].size, 1))
        template[0].value = _pointer(buffer)
        self.call("C_GetAttributeValue", session, handle, template, 1)
        return buffer.raw[: template[0].size]

    def set(self, session: int, handle: int, template: Template) -> None:
        """C_SetAttributeValue"""
        self.call("C_SetAttributeValue", session, handle, *_template(template))

    def find(self, session: int, template: Template) -> list[int]:
        """C_FindObjectsInit to C_FindObjectsFinal"""
        self.call("C_FindObjectsInit", session, *_template(template))
        found: list[int] = []
        handles, count = (c_ulong * FIND_AT_ONCE)(), c_ulong()
        try:
            while True:
                self.call("C_FindObjects", session, handles, FIND_AT_ONCE, byref(count))
                found += handles[: count.value]
                if count.value == 0:
                    return found
        finally:
            self.rv("C_FindObjectsFinal", session)

    # ---- keys

    def generate_key(self, session: int, mechanism: Mechanism, template: Template) -> int:
        """C_GenerateKey"""
        return self._handle("C_GenerateKey", session, _mechanism(mechanism), *_template(template))

    def generate_pair(
        self, session: int, mechanism: Mechanism, public: Template, private: Template
    ) -> tuple[int, int]:
        """C_GenerateKeyPair: the public and the private key."""
        one, other = c_ulong(), c_ulong()
        templates = (*_template(public), *_template(private))
        self.call("C_GenerateKeyPair", session, _mechanism(mechanism), *templates, byref(one), byref(other))
        return one.value, other.value

    def wrap(self, session: int, mechanism: Mechanism, wrapping_key: int, key: int) -> bytes:
        """C_WrapKey"""
        return self._output("C_WrapKey", session, _mechanism(mechanism), wrapping_key, key)

    def unwrap(
        self, session: int, mechanism: Mechanism, unwrapping_key: int, wrapped: bytes, template: Template
    ) -> int:
        """C_UnwrapKey"""
        given = (_mechanism(mechanism), unwrapping_key, wrapped, len(wrapped))
        return self._handle("C_UnwrapKey", session, *given, *_template(template))

    def derive(self, session: int, mechanism: Mechanism, key: int, template: Template) -> int:
        """C_DeriveKey"""
        return self._handle("C_DeriveKey", session, _mechanism(mechanism), key, *_template(template))

    def random(self, session: int, size: int) -> bytes:
        """C_GenerateRandom"""
        buffer = ctypes.create_string_buffer(max(size, 1))
        self.call("C_GenerateRandom", session, buffer, size)
        return buffer.raw[:size]

    def seed(self, session: int, data: bytes) -> None:
        """C_SeedRandom"""
        self.call("C_SeedRandom", session, data, len(data))

    # ---- operations

    def operate(
        self,
        of: Operation,
        session: int,
        mechanism: Mechanism,
        key: int | None,
        data: bytes,
        part: int,
        pin: bytes | None = None,
    ) -> bytes:
        """An operation from its Init to its end: in one call, data of more than `part` bytes in several.

        `pin` is for a key that wants it at each use (CKA_ALWAYS_AUTHENTICATE).
        """
        self.call(of.init, session, _mechanism(mechanism), *(() if key is None else (key,)))
        if pin is not None:
            self.login(session, ck.CKU_CONTEXT_SPECIFIC, pin)
        if len(data) <= part:
            return self._output(of.whole, session, data, len(data))
        pieces = [self._update(of, session, data[at : at + part]) for at in range(0, len(data), part)]
        return b"".join((*pieces, self._output(of.final, session)))

    def verify(
        self, session: int, mechanism: Mechanism, key: int, data: bytes, signature: bytes, part: int
    ) -> None:
        """C_VerifyInit to its end; raises CallError with CKR_SIGNATURE_INVALID."""
        self.call(VERIFY.init, session, _mechanism(mechanism), key)
        if len(data) <= part:
            self.call(VERIFY.whole, session, data, len(data), signature, len(signature))
            return
        for at in range(0, len(data), part):
            self._update(VERIFY, session, data[at : at + part])
        self.call(VERIFY.final, session, signature, len(signature))

    def digest_key(self, session: int, mechanism: Mechanism, key: int) -> bytes:
        """C_DigestInit, C_DigestKey, C_DigestFinal"""
        self.call(DIGEST.init, session, _mechanism(mechanism))
        self.call("C_DigestKey", session, key)
        return self._output(DIGEST.final, session)

    def _update(self, of: Operation, session: int, data: bytes) -> bytes:
        if of in _CIPHERS:
            return self._output(of.update, session, data, len(data))
        self.call(of.update, session, data, len(data))
        return b""


def value_bytes(value: Value) -> bytes:
    """A value as it stands in memory."""
    match value:
        case bool():
            return bytes([value])
        case int():
            return bytes(c_ulong(value))
        case str():
            return value.encode("utf-8", "surrogateescape")
        case bytes():
            return value


def buffer(data: bytes) -> ctypes._Pointer[c_char]:
    """A pointer for a field of a parameter; the structure keeps its memory alive."""
    return _pointer(ctypes.create_string_buffer(data, max(len(data), 1)))


def _pointer(memory: ctypes.Structure | ctypes.Array[c_char]) -> ctypes._Pointer[c_char]:
    return ctypes.cast(ctypes.pointer(memory), POINTER(c_char))


def _template(template: Template) -> tuple[object, int]:
    """Attributes and their number, as two arguments."""
    attributes = (_Attribute * len(template))()
    for attribute, (kind, value) in zip(attributes, template.items(), strict=True):
        data = value_bytes(value)
        attribute.type, attribute.value, attribute.size = kind, buffer(data), len(data)
    return attributes, len(template)


def _mechanism(mechanism: Mechanism) -> object:
    parameter = mechanism.parameter
    if parameter is None:
        return byref(_Mechanism(type=mechanism.type))
    if isinstance(parameter, bytes):
        return byref(_Mechanism(mechanism.type, buffer(parameter), len(parameter)))
    return byref(_Mechanism(mechanism.type, _pointer(parameter), ctypes.sizeof(parameter)))
