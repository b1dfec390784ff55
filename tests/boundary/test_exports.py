"""What the module shows: its symbols, function lists and interfaces."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from demo.members import softhsm
from pkcs11_ha.spec.functions import FUNCTIONS
from tests import p11
from tests.boundary.conftest import Hosts
from tests.boundary.hosts import Host, Place, ulong

NAMES = [row.name for row in FUNCTIONS]
COUNTS = {(2, 40): 68, (3, 0): 92, (3, 2): 104}
STANDARD, VENDOR = b"PKCS 11\0", b"Vendor pkcs11-ha\0"


@pytest.fixture
def host(hosts: Hosts) -> Host:
    """A host that has not called C_Initialize: all this works without."""
    return hosts()


def text(host: Host, address: int) -> bytes:
    """A C string anywhere in the host."""
    with Path(f"/proc/{host.pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(64).partition(b"\0")[0] + b"\0"


def words(host: Host, address: int, count: int) -> list[int]:
    """CK_ULONGs or pointers anywhere in the host."""
    with Path(f"/proc/{host.pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        raw = memory.read(8 * count)
    return [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]


def version(host: Host, list_: int) -> tuple[int, int]:
    """Every function list begins with its CK_VERSION."""
    raw = words(host, list_, 1)[0].to_bytes(8, "little")
    return raw[0], raw[1]


def get_interface(
    host: Host, name: bytes | None, wanted: tuple[int, int] | None = None, flags: int = 0
) -> tuple[str, list[int]]:
    """The answer, and name, list and flags of the interface."""
    place = host.memory(ulong(0))
    rv = host.rv("C_GetInterface", name, None if wanted is None else bytes(wanted), place, flags)
    pointer = host.number(place)
    return rv, words(host, pointer, 3) if pointer else []


def function_list(host: Host, wanted: tuple[int, int]) -> int:
    if wanted == (2, 40):
        return host.new("C_GetFunctionList")
    return get_interface(host, STANDARD, wanted)[1][1]


def test_the_symbols_are_those_of_the_contract_and_no_other(module: Path) -> None:
    done = subprocess.run(["nm", "-D", "--defined-only", module], check=True, capture_output=True, text=True)
    found = sorted(line.split()[-1].partition("@")[0] for line in done.stdout.splitlines())
    assert len(NAMES) == 104
    assert found == sorted([*NAMES, "CA_GetHAState"])


def test_the_table_has_the_functions_of_each_version() -> None:
    for since, count in COUNTS.items():
        assert sum(tuple(map(int, row.since.split("."))) <= since for row in FUNCTIONS) == count


@pytest.mark.parametrize("wanted", COUNTS, ids=str)
@pytest.mark.parametrize("how", ["local", "global", "deepbind", "preload", "after another"])
def test_a_function_list_holds_the_exported_functions(
    how: str, wanted: tuple[int, int], hosts: Hosts
) -> None:
    """Also where the program has the functions of another library under these names."""
    host = hosts(preload=[softhsm()]) if how == "after another" else hosts(how)
    list_ = function_list(host, wanted)
    assert version(host, list_) == wanted
    names = NAMES[: COUNTS[wanted]]
    assert words(host, list_ + 8, len(names)) == [int(host.command(f"symbol {name}"), 16) for name in names]


def test_c_get_function_list_wants_somewhere_to_put_it(host: Host) -> None:
    assert host.rv("C_GetFunctionList", None) == "CKR_ARGUMENTS_BAD"


def interfaces(host: Host) -> list[tuple[bytes, tuple[int, int], int]]:
    count = host.memory(ulong(0))
    host.ok("C_GetInterfaceList", None, count)
    size = host.number(count)
    array = host.room(24 * size)
    host.ok("C_GetInterfaceList", array, count)
    assert host.number(count) == size
    found = [
        [host.number(Place(array.page, array.offset + 24 * i + 8 * field)) for field in range(3)]
        for i in range(size)
    ]
    return [(text(host, name), version(host, list_), flags) for name, list_, flags in found]


def test_the_interfaces(host: Host) -> None:
    assert interfaces(host) == [
        (STANDARD, (3, 2), 0),
        (STANDARD, (3, 0), 0),
        (STANDARD, (2, 40), 0),
        (VENDOR, (1, 0), 0),
    ]


@pytest.mark.parametrize("room", [0, 1, 3])
def test_an_interface_list_without_room_for_all_is_refused_and_says_how_many(room: int, host: Host) -> None:
    count, array = host.memory(ulong(room)), host.memory(b"\x5a" * 96)
    assert host.rv("C_GetInterfaceList", array, count) == "CKR_BUFFER_TOO_SMALL"
    assert host.number(count) == 4
    assert host.read(array, 96) == b"\x5a" * 96


def test_c_get_interface_list_wants_a_count(host: Host) -> None:
    assert host.rv("C_GetInterfaceList", None, None) == "CKR_ARGUMENTS_BAD"
    assert host.rv("C_GetInterfaceList", host.room(96), None) == "CKR_ARGUMENTS_BAD"


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        (None, None, (STANDARD, (3, 2))),
        (None, (2, 40), (STANDARD, (2, 40))),
        (STANDARD, None, (STANDARD, (3, 2))),
        (STANDARD, (3, 2), (STANDARD, (3, 2))),
        (STANDARD, (3, 0), (STANDARD, (3, 0))),
        (STANDARD, (2, 40), (STANDARD, (2, 40))),
        (VENDOR, None, (VENDOR, (1, 0))),
        (VENDOR, (1, 0), (VENDOR, (1, 0))),
    ],
)
def test_c_get_interface(
    name: bytes | None,
    wanted: tuple[int, int] | None,
    expected: tuple[bytes, tuple[int, int]],
    host: Host,
) -> None:
    rv, (name_at, list_, flags) = get_interface(host, name, wanted)
    assert rv == "CKR_OK"
    assert (text(host, name_at), version(host, list_), flags) == (*expected, 0)


@pytest.mark.parametrize(
    ("name", "wanted", "flags"),
    [
        (b"\0", None, 0),
        (b"PKCS 1\0", None, 0),
        (b"PKCS 112\0", None, 0),
        (b"pkcs 11\0", None, 0),
        (b"Vendor NSS Module Interface\0", None, 0),
        (STANDARD, (3, 1), 0),
        (STANDARD, (2, 41), 0),
        (STANDARD, (0, 0), 0),
        (VENDOR, (3, 2), 0),
        (STANDARD, None, p11.CKF_INTERFACE_FORK_SAFE),
        (None, None, p11.CKF_INTERFACE_FORK_SAFE),
        (STANDARD, None, 1 << 63),
    ],
)
def test_an_interface_that_there_is_not(
    name: bytes | None, wanted: tuple[int, int] | None, flags: int, host: Host
) -> None:
    assert get_interface(host, name, wanted, flags) == ("CKR_FUNCTION_FAILED", [])


def test_c_get_interface_wants_somewhere_to_put_it(host: Host) -> None:
    assert host.rv("C_GetInterface", STANDARD, None, None, 0) == "CKR_ARGUMENTS_BAD"


def test_the_vendor_interface_holds_the_exported_status_function(host: Host) -> None:
    _, (_, list_, _) = get_interface(host, VENDOR)
    status, session_member = words(host, list_ + 8, 2)
    assert status == int(host.command("symbol CA_GetHAState"), 16)
    assert session_member not in (0, status)


def test_the_vendor_functions_are_refused_before_c_initialize(host: Host) -> None:
    _, (_, list_, _) = get_interface(host, VENDOR)
    for address in words(host, list_ + 8, 2):
        assert host.command(f"call 0x{address:x} 0 0 0") == "0x190"
