"""The module itself: its symbols, and a library's lists, interfaces and functions, all there and all with faults."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import POINTER, byref, c_ulong, c_void_p
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.members import SoftToken
from demo.members import library as system_library
from pkcs11_ha.spec.functions import FUNCTIONS, INDEX, Function, Role
from tests import fault as faults
from tests import p11
from tests.boundary import conftest as boundary
from tests.boundary.conftest import Program
from tests.fault import Fault
from tests.ha.app import environment
from tests.ha.conftest import clone

program = boundary.program
COUNTS = {"2.40": 68, "3.0": 92, "3.2": 104}


def test_it_exports_what_finds_its_functions_and_nothing_else() -> None:
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", str(faults.library())], check=True, capture_output=True, text=True
    ).stdout
    symbols = {line.split()[-1] for line in shown.splitlines()}
    assert symbols == {"C_GetFunctionList", "C_GetInterfaceList", "C_GetInterface"}


@dataclass(frozen=True)
class Interface:
    name: str
    version: tuple[int, int]
    flags: int
    at: int  # its function list

    def function(self, name: str) -> int:
        """The address in its place in the list; 0 if there is none."""
        size = ctypes.sizeof(c_void_p)
        return c_void_p.from_address(self.at + size + size * INDEX[name]).value or 0


def interfaces(module: p11.Module) -> list[Interface]:
    count = c_ulong()
    module.call("C_GetInterfaceList", None, byref(count))
    found = (p11._Interface * count.value)()
    module.call("C_GetInterfaceList", found, byref(count))
    return [read(each) for each in found]


def read(interface: p11._Interface) -> Interface:
    version = p11._Version.from_address(interface.functions)
    return Interface(
        interface.name.decode(), (version.major, version.minor), interface.flags, interface.functions
    )


def get_interface(module: p11.Module, name: bytes | None, version: bytes | None = None) -> Interface:
    pointer = POINTER(p11._Interface)()
    module.call("C_GetInterface", name, version, byref(pointer), 0)
    return read(pointer.contents)


class Wrapped:
    """Any library behind the fault module, in this process."""

    def __init__(self, wrapped: Path, directory: Path) -> None:
        self._script = directory / "script"
        self.write()
        copy = shutil.copy(faults.library(), directory / "copy.so")
        with environment({"PKCS11_FAULT_MODULE": str(wrapped), "PKCS11_FAULT_SCRIPT": str(self._script)}):
            self.module = p11.Module(copy)

    def write(self, *lines: str) -> None:
        new = self._script.with_name("script.new")
        new.write_text("\n".join(lines))
        new.rename(self._script)


@pytest.fixture(scope="module")
def every(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Wrapped:
    return Wrapped(program("libyes"), tmp_path_factory.mktemp("every"))


NUMBERS = (Role.SESSION, Role.SLOT, Role.OBJECT, Role.COUNT, Role.IN_LEN, Role.VALUE)


@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row.name)
def test_every_function_can_fail(every: Wrapped, row: Function) -> None:
    interface = get_interface(every.module, b"PKCS 11", b"\x03\x02")
    function = ctypes.CFUNCTYPE(c_ulong)(interface.function(row.name))
    given = [
        c_ulong(0) if role in NUMBERS else None if role is Role.POINTER else (c_ulong * 512)(9)
        for role in row.roles
    ]
    assert function(*given) == p11.CKR_OK
    every.write(f"{row.name} times 1 return 0x80001234")
    assert [function(*given) for _ in range(2)] == [0x80001234, p11.CKR_OK]


def test_a_library_of_2_40_is_one(fault: Fault) -> None:
    with fault.module() as module:
        assert module.version == (2, 40)
        (only,) = interfaces(module)
        assert (only.name, only.version) == ("PKCS 11", (2, 40))
        assert get_interface(module, None) == only
        pointer = POINTER(p11._Interface)()
        assert (
            module.rv("C_GetInterface", b"PKCS 11", b"\x03\x00", byref(pointer), 0) == p11.CKR_FUNCTION_FAILED
        )


def test_all_interfaces_of_the_wrapped_library_are_offered(module: Path, directory: Path) -> None:
    """Those of PKCS#11 with other functions in the same places, a vendor's as they are."""
    bare, wrapped = p11.Module(module), Wrapped(module, directory).module
    ours, theirs = interfaces(wrapped), interfaces(bare)
    assert [(each.name, each.version, each.flags) for each in ours] == [
        (each.name, each.version, each.flags) for each in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        if one.name == "PKCS 11":
            count = COUNTS[f"{one.version[0]}.{one.version[1]}"]
            assert all(one.function(row.name) != other.function(row.name) for row in FUNCTIONS[:count])
            assert all(one.function(row.name) for row in FUNCTIONS[:count])
        else:
            assert one.at == other.at
        assert get_interface(wrapped, one.name.encode(), bytes(one.version)) == one
    assert get_interface(wrapped, None).version == get_interface(bare, None).version


def test_nss_of_3_0_works_and_fails(directory: Path) -> None:
    """softokn has two lists and a vendor's interface; its functions of 3.0 are called through ours."""
    softokn = system_library("libsoftokn3.so")
    wrapped = Wrapped(softokn, directory)
    module, bare = wrapped.module, p11.Module(softokn)
    assert [(i.name, i.version) for i in interfaces(module)] == [
        (i.name, i.version) for i in interfaces(bare)
    ]
    newest = get_interface(module, b"PKCS 11", b"\x03\x00")
    (directory / "db").mkdir()
    parameters = f"configdir='sql:{directory / 'db'}' certPrefix='' keyPrefix='' secmod='secmod.db' flags="
    module.initialize(reserved=parameters)
    try:
        session = module.open(module.slots()[0])
        login = ctypes.CFUNCTYPE(c_ulong)(newest.function("C_LoginUser"))
        given = (c_ulong(session.handle), c_ulong(p11.CKU_USER), b"pin", c_ulong(3), b"user", c_ulong(4))
        assert login(*given) == p11.CKR_OPERATION_NOT_INITIALIZED  # what softokn says of it
        wrapped.write("C_LoginUser return CKR_PIN_LOCKED", "C_Digest flip 0")
        assert login(*given) == p11.CKR_PIN_LOCKED
        assert session.digest(p11.CKM_SHA256, b"")[:2] == b"\x1c\xb0"  # and not e3 b0
    finally:
        wrapped.write()
        module.finalize()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("/nonexistent.so", "cannot open shared object file"),
        (str(system_library("libc.so.6")), "gives no function list"),
        ("copy.so", "gives no function list"),  # itself
    ],
)
def test_a_library_that_is_none_is_refused(
    directory: Path, wrong: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(p11.CkError, match="C_GetFunctionList: CKR_GENERAL_ERROR"):
        Wrapped(directory / wrong, directory)
    error = capfd.readouterr().err
    assert error.startswith("pkcs11-fault: PKCS11_FAULT_MODULE: ")
    assert says in error
    assert error.count("\n") == 1


def test_two_tokens_in_one_process_have_faults_of_their_own(
    models: tuple[SoftToken, SoftToken], directory: Path
) -> None:
    east, west = (Fault(clone(model, directory / model.label)) for model in models)
    east.script("C_GetTokenInfo return CKR_DEVICE_ERROR")
    with east.module() as one, west.module() as other:
        assert other.token(other.slot("west")).label == "west"
        with pytest.raises(p11.CkError, match="CKR_DEVICE_ERROR"):
            one.token(one.slots()[0])
    assert (east.injected(), west.injected()) == (1, 0)
