"""A PKCS#11 module as tests call it: any module by its path, each failure an exception that names its code.

Functions, their order and constants are read from include/pkcs11.h: `p11.CKM_ECDSA` is what the header
says. What has no method here can be called by its C name: `module.call("C_CancelFunction", session.handle)`.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from ctypes import POINTER, byref, c_char, c_ubyte, c_ulong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_HEADER = (Path(__file__).parent.parent / "include" / "pkcs11.h").read_text()
_CONSTANTS: dict[str, int] = {
    name: int(value, 0)
    for name, value in re.findall(r"^#define (CK\w+) \(?(0x[0-9A-Fa-f]+|\d+)UL\)?", _HEADER, re.MULTILINE)
}
_FUNCTIONS: list[str] = re.findall(r"^ +F\((C_\w+),", _HEADER, re.MULTILINE)
FUNCTIONS_2_40 = _FUNCTIONS[: _FUNCTIONS.index("C_WaitForSlotEvent") + 1]
_RV_NAMES: dict[int, str] = {
    value: name for name, value in reversed(_CONSTANTS.items()) if name.startswith("CKR_")
}

Value = bool | int | str | bytes
Template = Mapping[int, Value]
Mechanism = int | tuple[int, bytes | ctypes.Structure]


def __getattr__(name: str) -> int:
    try:
        return _CONSTANTS[name]
    except KeyError:
        raise AttributeError(name) from None


def rv_name(rv: int) -> str:
    return _RV_NAMES.get(rv, f"0x{rv:08x}")


class CkError(Exception):
    """A call answered something else than CKR_OK."""

    def __init__(self, call: str, rv: int) -> None:
        super().__init__(f"{call}: {rv_name(rv)}")
        self.call, self.rv, self.name = call, rv, rv_name(rv)


class _Version(ctypes.Structure):
    _fields_ = (("major", c_ubyte), ("minor", c_ubyte))


class _FunctionList(ctypes.Structure):
    _fields_ = (("version", _Version), *((name, c_void_p) for name in FUNCTIONS_2_40))


class _Interface(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("functions", c_void_p), ("flags", c_ulong))


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


class _TokenInfo(ctypes.Structure):
    _fields_ = (
        *(
            ("label", c_char * 32),
            ("manufacturer", c_char * 32),
            ("model", c_char * 16),
            ("serial", c_char * 16),
        ),
        ("flags", c_ulong),
        *((name, c_ulong) for name in ("max_sessions", "sessions", "max_rw_sessions", "rw_sessions")),
        *((name, c_ulong) for name in ("max_pin", "min_pin", "total_public", "free_public")),
        *(("total_private", c_ulong), ("free_private", c_ulong)),
        *(("hardware", _Version), ("firmware", _Version), ("time", c_char * 16)),
    )


class _SessionInfo(ctypes.Structure):
    _fields_ = tuple((name, c_ulong) for name in ("slot", "state", "flags", "device_error"))


class _HaMember(ctypes.Structure):
    _fields_ = (("serial", c_char * 20), ("status", c_ulong))


class _HaStatus(ctypes.Structure):
    _fields_ = (("group", c_char * 20), ("members", _HaMember * 32), ("size", c_ulong))


class _HaFunctionList(ctypes.Structure):
    _fields_ = (("version", _Version), ("CA_GetHAState", c_void_p), ("CA_GetSessionMember", c_void_p))


_Function = ctypes.CFUNCTYPE(c_ulong)


@dataclass(frozen=True)
class Token:
    label: str
    manufacturer: str
    model: str
    serial: str
    flags: int


@dataclass(frozen=True)
class SessionInfo:
    slot: int
    state: int
    flags: int
    device_error: int


@dataclass(frozen=True)
class HaStatus:
    """The answer of CA_GetHAState; members are serial number to name of the status code."""

    group: str
    members: dict[str, str]


class Module:
    """A loaded module; as a context manager, an initialised one."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        pointer = POINTER(_FunctionList)()
        rv = _Function(("C_GetFunctionList", self._library))(byref(pointer))
        if rv != 0:
            raise CkError("C_GetFunctionList", rv)
        self._list = pointer.contents
        self.version = (self._list.version.major, self._list.version.minor)

    def rv(self, name: str, *arguments: object) -> int:
        """Call a function by its C name and return its code; integers are passed as CK_ULONG."""
        address = getattr(self._list, name, None)
        function = _Function(address) if address else _Function((name, self._library))
        return int(function(*(c_ulong(each) if isinstance(each, int) else each for each in arguments)))

    def call(self, name: str, *arguments: object) -> None:
        rv = self.rv(name, *arguments)
        if rv != 0:
            raise CkError(name, rv)

    def initialize(self, flags: int = _CONSTANTS["CKF_OS_LOCKING_OK"], reserved: str | None = None) -> None:
        """C_Initialize; `reserved` is the string that some libraries want (NSS)."""
        text = None if reserved is None else reserved.encode()
        self.call("C_Initialize", byref(_InitializeArgs(flags=flags, reserved=text)))

    def finalize(self) -> None:
        self.call("C_Finalize", None)

    def slots(self, present: bool = True) -> list[int]:
        count = c_ulong()
        self.call("C_GetSlotList", int(present), None, byref(count))
        slots = (c_ulong * count.value)()
        self.call("C_GetSlotList", int(present), slots, byref(count))
        return list(slots[: count.value])

    def token(self, slot: int) -> Token:
        info = _TokenInfo()
        self.call("C_GetTokenInfo", slot, byref(info))
        return Token(
            _text(info.label), _text(info.manufacturer), _text(info.model), _text(info.serial), info.flags
        )

    def slot(self, label: str) -> int:
        """The slot of the token with that label."""
        labels = {self.token(slot).label: slot for slot in self.slots()}
        if label not in labels:
            raise LookupError(f"no token {label} among {sorted(labels)}")
        return labels[label]

    def mechanisms(self, slot: int) -> list[int]:
        count = c_ulong()
        self.call("C_GetMechanismList", slot, None, byref(count))
        mechanisms = (c_ulong * count.value)()
        self.call("C_GetMechanismList", slot, mechanisms, byref(count))
        return list(mechanisms[: count.value])

    def open(self, slot: int, rw: bool = False) -> Session:
        handle = c_ulong()
        flags = _CONSTANTS["CKF_SERIAL_SESSION"] | (_CONSTANTS["CKF_RW_SESSION"] if rw else 0)
        self.call("C_OpenSession", slot, flags, None, None, byref(handle))
        return Session(self, handle.value)

    def close_all(self, slot: int) -> None:
        self.call("C_CloseAllSessions", slot)

    def ha_status(self, slot: int) -> HaStatus:
        status = _HaStatus()
        self.call("CA_GetHAState", slot, byref(status))
        members = status.members[: status.size]
        return HaStatus(_text(status.group), {_text(each.serial): rv_name(each.status) for each in members})

    def session_member(self, session: Session) -> tuple[str, str]:
        """Name and serial number of the member that served the session's last call; empty if none did."""
        interface = POINTER(_Interface)()
        self.call("C_GetInterface", b"Vendor pkcs11-ha", None, byref(interface), 0)
        functions = ctypes.cast(interface.contents.functions, POINTER(_HaFunctionList)).contents
        name, serial = ctypes.create_string_buffer(64), ctypes.create_string_buffer(20)
        rv = _Function(functions.CA_GetSessionMember)(c_ulong(session.handle), name, serial)
        if rv != 0:
            raise CkError("CA_GetSessionMember", rv)
        return name.value.decode(), serial.value.decode()

    def __enter__(self) -> Module:
        self.initialize()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.finalize()


class Session:
    """An open session; objects are their handles."""

    def __init__(self, module: Module, handle: int) -> None:
        self.module, self.handle = module, handle

    def close(self) -> None:
        self.call("C_CloseSession")

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that takes this session first."""
        self.module.call(name, self.handle, *arguments)

    def info(self) -> SessionInfo:
        info = _SessionInfo()
        self.call("C_GetSessionInfo", byref(info))
        return SessionInfo(info.slot, info.state, info.flags, info.device_error)

    def login(self, pin: str, user: int = _CONSTANTS["CKU_USER"]) -> None:
        self.call("C_Login", user, pin.encode(), len(pin.encode()))

    def logout(self) -> None:
        self.call("C_Logout")

    # Objects

    def find(self, template: Template) -> list[int]:
        self.call("C_FindObjectsInit", *attributes(template))
        found: list[int] = []
        handles, count = (c_ulong * 64)(), c_ulong()
        try:
            while True:
                self.call("C_FindObjects", handles, len(handles), byref(count))
                found += handles[: count.value]
                if count.value == 0:
                    return found
        finally:
            self.call("C_FindObjectsFinal")

    def find_one(self, template: Template) -> int:
        found = self.find(template)
        if len(found) != 1:
            raise LookupError(f"{len(found)} objects match {dict(template)}")
        return found[0]

    def create(self, template: Template) -> int:
        return self._new("C_CreateObject", *attributes(template))

    def copy(self, handle: int, template: Template) -> int:
        return self._new("C_CopyObject", handle, *attributes(template))

    def destroy(self, handle: int) -> None:
        self.call("C_DestroyObject", handle)

    def get(self, handle: int, *types: int) -> tuple[bytes, ...]:
        """Values of attributes, as they are in memory."""
        template = (_Attribute * len(types))(*(_Attribute(type=each) for each in types))
        self.call("C_GetAttributeValue", handle, template, len(types))
        buffers = [ctypes.create_string_buffer(each.size) for each in template]
        for attribute, buffer in zip(template, buffers, strict=True):
            attribute.value = _pointer(buffer)
        self.call("C_GetAttributeValue", handle, template, len(types))
        return tuple(buffer.raw[: each.size] for each, buffer in zip(template, buffers, strict=True))

    def set(self, handle: int, template: Template) -> None:
        self.call("C_SetAttributeValue", handle, *attributes(template))

    # Keys

    def generate_key(self, mechanism: Mechanism, template: Template) -> int:
        return self._new("C_GenerateKey", _mechanism(mechanism), *attributes(template))

    def generate_key_pair(self, mechanism: Mechanism, public: Template, private: Template) -> tuple[int, int]:
        keys = (c_ulong * 2)()
        at = [ctypes.addressof(keys), ctypes.addressof(keys) + ctypes.sizeof(c_ulong)]
        both = (*attributes(public), *attributes(private))
        self.call("C_GenerateKeyPair", _mechanism(mechanism), *both, *map(c_void_p, at))
        return keys[0], keys[1]

    def wrap(self, mechanism: Mechanism, wrapping_key: int, key: int) -> bytes:
        return self.output("C_WrapKey", _mechanism(mechanism), wrapping_key, key)

    def unwrap(self, mechanism: Mechanism, unwrapping_key: int, blob: bytes, template: Template) -> int:
        given = (_mechanism(mechanism), unwrapping_key, blob, len(blob))
        return self._new("C_UnwrapKey", *given, *attributes(template))

    def derive(self, mechanism: Mechanism, key: int, template: Template) -> int:
        return self._new("C_DeriveKey", _mechanism(mechanism), key, *attributes(template))

    # Operations

    def sign(self, mechanism: Mechanism, key: int, data: bytes) -> bytes:
        self.init("C_SignInit", mechanism, key)
        return self.output("C_Sign", data, len(data))

    def verify(self, mechanism: Mechanism, key: int, data: bytes, signature: bytes) -> None:
        self.init("C_VerifyInit", mechanism, key)
        self.call("C_Verify", data, len(data), signature, len(signature))

    def encrypt(self, mechanism: Mechanism, key: int, data: bytes) -> bytes:
        self.init("C_EncryptInit", mechanism, key)
        return self.output("C_Encrypt", data, len(data))

    def decrypt(self, mechanism: Mechanism, key: int, data: bytes) -> bytes:
        self.init("C_DecryptInit", mechanism, key)
        return self.output("C_Decrypt", data, len(data))

    def digest(self, mechanism: Mechanism, data: bytes) -> bytes:
        self.init("C_DigestInit", mechanism)
        return self.output("C_Digest", data, len(data))

    def random(self, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        self.call("C_GenerateRandom", buffer, size)
        return buffer.raw

    def init(self, name: str, mechanism: Mechanism, *key: int) -> None:
        """Begin an operation: `init("C_SignInit", p11.CKM_ECDSA, key)`."""
        self.call(name, _mechanism(mechanism), *key)

    def feed(self, name: str, data: bytes) -> None:
        """Give an operation input that has no output yet: `feed("C_SignUpdate", b"…")`."""
        self.call(name, data, len(data))

    def output(self, name: str, *arguments: object) -> bytes:
        """What a function puts out, its size asked first: `output("C_SignFinal")`."""
        size = c_ulong()
        self.call(name, *arguments, None, byref(size))
        buffer = ctypes.create_string_buffer(max(size.value, 1))
        self.call(name, *arguments, buffer, byref(size))
        return buffer.raw[: size.value]

    def _new(self, name: str, *arguments: object) -> int:
        handle = c_ulong()
        self.call(name, *arguments, byref(handle))
        return handle.value


def _text(padded: bytes) -> str:
    return padded.decode().rstrip(" ")


def value_bytes(value: Value) -> bytes:
    match value:
        case bool():
            return bytes([value])
        case int():
            return bytes(c_ulong(value))
        case str():
            return value.encode()
        case bytes():
            return value


def _pointer(memory: ctypes.Structure | ctypes.Array[c_char]) -> ctypes._Pointer[c_char]:
    """A pointer that keeps its memory alive, also as a field of a structure."""
    return ctypes.cast(ctypes.pointer(memory), POINTER(c_char))


def attributes(template: Template) -> tuple[ctypes.Array[_Attribute], int]:
    """A template and its length, as two arguments."""
    attributes = (_Attribute * len(template))()
    for attribute, (kind, value) in zip(attributes, template.items(), strict=True):
        memory = ctypes.create_string_buffer(value_bytes(value), len(value_bytes(value)))
        attribute.type, attribute.value, attribute.size = kind, _pointer(memory), len(memory)
    return attributes, len(template)


def _mechanism(mechanism: Mechanism) -> object:
    if isinstance(mechanism, int):
        return byref(_Mechanism(type=mechanism))
    kind, parameter = mechanism
    memory = (
        ctypes.create_string_buffer(parameter, len(parameter)) if isinstance(parameter, bytes) else parameter
    )
    return byref(_Mechanism(type=kind, parameter=_pointer(memory), size=ctypes.sizeof(memory)))
