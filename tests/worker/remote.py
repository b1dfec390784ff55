"""The stubs of one worker as tests call them, past the group: any function with any arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from demo.members import SoftToken, softhsm
from pkcs11_ha.runtime import native
from pkcs11_ha.spec import wire
from pkcs11_ha.spec.functions import FUNCTIONS, INDEX, Deadline
from tests import p11
from tests.spec import golden

ERROR_SIZE = 512
PATIENCE_MS = 10000
ROOM = 40  # bytes or elements of each output
GUARD = 64


def _limits(limits_ms: Mapping[str, int]) -> Any:
    """By class; there is none where none is given, but for connecting."""
    given = {Deadline.CONNECT.value: PATIENCE_MS} | dict(limits_ms)
    return native.ffi.new("unsigned[]", [given.get(each.value, 0) for each in Deadline])


class Refused(Exception):
    """A worker that could not be started or reached."""


class Remote:
    """One remote of the module, which must be initialised."""

    def __init__(self) -> None:
        self.number = native.lib.ha_remote_new()
        assert self.number >= 0

    def start(self, token: SoftToken, **limits_ms: int) -> None:
        arguments = [native.text(str(softhsm())), native.ffi.NULL]
        entries = [*(native.text(f"{name}={value}") for name, value in token.env.items()), native.ffi.NULL]
        why = native.ffi.new("char[]", ERROR_SIZE)
        done = native.lib.ha_remote_start(
            self.number,
            native.ffi.new("char *[]", arguments),
            native.ffi.new("char *[]", entries),
            _limits(limits_ms),
            why,
            ERROR_SIZE,
        )
        if not done:
            raise Refused(native.ffi.string(why).decode())

    def connect(self, path: object, **limits_ms: int) -> None:
        why = native.ffi.new("char[]", ERROR_SIZE)
        where = native.text(str(path))
        limits = _limits(limits_ms)
        if not native.lib.ha_remote_connect(self.number, where, limits, why, ERROR_SIZE):
            raise Refused(native.ffi.string(why).decode())

    @property
    def alive(self) -> bool:
        return bool(native.lib.ha_remote_alive(self.number))

    def call(self, name: str, *arguments: Any) -> str:
        """Name of the code that a function answers."""
        stub = native.lib.ha_remote_function(self.number, INDEX[name])
        assert stub != native.ffi.NULL, name
        return p11.rv_name(native.ffi.cast(f"CK_{name}", stub)(*arguments))

    def free(self) -> None:
        native.lib.ha_remote_free(self.number)


class Arguments:
    """Arguments that ask a function for all it can answer; each buffer has a guard behind it."""

    def __init__(self, name: str) -> None:
        self.given: list[Any] = []
        self._kept: list[Any] = []
        self._guarded: list[tuple[Any, int]] = []
        types = iter(native.ffi.typeof(f"CK_{name}").args)
        for carried in wire.items(FUNCTIONS[INDEX[name]], golden.prototypes()[name]):
            kinds = [next(types) for _ in carried.arguments]
            self.given += getattr(self, f"_{carried.item.value}")(*kinds)

    def check_guards(self) -> None:
        """Not a byte behind any buffer was written."""
        for memory, size in self._guarded:
            assert bytes(native.ffi.buffer(memory))[size : size + GUARD] == b"\xa5" * GUARD

    def _memory(self, kind: Any, count: int = 1) -> Any:
        """Room for so many of what a pointer points to."""
        size = count * (1 if kind.item.cname == "void" else native.ffi.sizeof(kind.item))
        memory = native.ffi.new("char[]", b"\xa5" * (size + GUARD))
        self._guarded.append((memory, size))
        return native.ffi.cast(kind, memory)

    def _bytes_of(self, count: int) -> Any:
        return self._memory(native.ffi.typeof("CK_BYTE *"), count)

    def _size(self, kind: Any) -> Any:
        size = self._memory(kind)
        size[0] = ROOM
        return size

    def _number(self, _kind: Any) -> list[Any]:
        return [1]

    def _bytes(self, kind: Any, _size: Any) -> list[Any]:
        return [self._memory(kind, ROOM), ROOM]

    def _fill(self, kind: Any, _size: Any) -> list[Any]:
        return [self._memory(kind, ROOM), ROOM]

    def _room(self, kind: Any, size: Any) -> list[Any]:
        return [self._memory(kind, ROOM), self._size(size)]

    def _list(self, kind: Any, count: Any) -> list[Any]:
        return [self._memory(kind, ROOM), self._size(count)]

    def _found(self, kind: Any, _capacity: Any, count: Any) -> list[Any]:
        return [self._memory(kind, ROOM), ROOM, self._size(count)]

    def _result(self, kind: Any) -> list[Any]:
        return [self._memory(kind)]

    def _label(self, kind: Any) -> list[Any]:
        return [self._memory(kind, 32)]

    def _mechanism(self, _kind: Any) -> list[Any]:
        gcm = native.ffi.new(
            "CK_GCM_PARAMS *", {"ulIvLen": 12, "ulIvBits": 96, "ulAADLen": 3, "ulTagBits": 128}
        )
        gcm.pIv, gcm.pAAD = self._bytes_of(12), self._bytes_of(3)
        mechanism = native.ffi.new("CK_MECHANISM *", {"mechanism": p11.CKM_AES_GCM})
        mechanism.pParameter, mechanism.ulParameterLen = gcm, native.ffi.sizeof("CK_GCM_PARAMS")
        self._kept += [gcm, mechanism]
        return [mechanism]

    def _message_mechanism(self, _kind: Any) -> list[Any]:
        mechanism = native.ffi.new("CK_MECHANISM *", {"mechanism": p11.CKM_AES_GCM})
        self._kept.append(mechanism)
        return [mechanism]

    def _template(self, _kind: Any, _count: Any) -> list[Any]:
        """Two values, and a template with two more."""
        attributes, inner = native.ffi.new("CK_ATTRIBUTE[3]"), native.ffi.new("CK_ATTRIBUTE[2]")
        for each in (*attributes[0:2], *inner):
            each.type, each.pValue, each.ulValueLen = p11.CKA_LABEL, self._bytes_of(20), 20
        attributes[2].type, attributes[2].pValue = p11.CKA_WRAP_TEMPLATE, inner
        attributes[2].ulValueLen = native.ffi.sizeof(inner)
        self._kept += [inner, attributes]
        return [attributes, 3]

    _answers = _template

    def _parameter(self, kind: Any, _size: Any) -> list[Any]:
        return [native.ffi.cast(kind, native.ffi.NULL), 0]

    def _initialize(self, kind: Any) -> list[Any]:
        return [native.ffi.cast(kind, native.ffi.NULL)]

    _nothing = _initialize
