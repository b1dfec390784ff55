"""C_Initialize and C_Finalize: what they take, what they change in the host, and again and again."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from demo.members import Server
from tests import p11
from tests.boundary.conftest import Hosts, Pair, must_sign
from tests.boundary.hosts import Host, ulong, wait_until
from tests.conftest import Group, GroupFactory, ServerFactory, is_sanitized

MUTEX = (0xDEAD0001, 0xDEAD0002, 0xDEAD0003, 0xDEAD0004)  # never called
NO_MUTEX = (0, 0, 0, 0)


def arguments(functions: tuple[int, ...] = NO_MUTEX, flags: int = 0, reserved: int = 0) -> bytes:
    """CK_C_INITIALIZE_ARGS."""
    return ulong(*functions, flags, reserved)


@pytest.fixture
def host(hosts: Hosts, signing: Group) -> Host:
    return hosts(env=signing.env)


@pytest.mark.parametrize(
    "given",
    [
        None,
        arguments(),
        arguments(flags=p11.CKF_OS_LOCKING_OK),
        arguments(flags=p11.CKF_LIBRARY_CANT_CREATE_OS_THREADS),
        arguments(flags=p11.CKF_LIBRARY_CANT_CREATE_OS_THREADS | p11.CKF_OS_LOCKING_OK),
        arguments(MUTEX, p11.CKF_OS_LOCKING_OK),
    ],
)
def test_arguments_that_are_right(given: bytes | None, host: Host, pair: Pair) -> None:
    host.ok("C_Initialize", given)
    must_sign(host, pair)
    assert host.rv("C_Initialize", given) == "CKR_CRYPTOKI_ALREADY_INITIALIZED"
    assert host.rv("C_Initialize", None) == "CKR_CRYPTOKI_ALREADY_INITIALIZED"
    host.ok("C_Finalize", None)
    assert host.rv("C_Finalize", None) == "CKR_CRYPTOKI_NOT_INITIALIZED"


def test_arguments_that_are_wrong(host: Host, pair: Pair) -> None:
    for flags in (0, p11.CKF_OS_LOCKING_OK):
        for given in itertools.product((False, True), repeat=4):
            functions = tuple(MUTEX[k] if given[k] else 0 for k in range(4))
            if 0 < sum(given) < 4:
                rv = host.rv("C_Initialize", arguments(functions, flags))
                assert (functions, flags, rv) == (functions, flags, "CKR_ARGUMENTS_BAD")
        assert host.rv("C_Initialize", arguments(flags=flags, reserved=1)) == "CKR_ARGUMENTS_BAD"
    assert host.rv("C_Initialize", arguments(MUTEX)) == "CKR_CANT_LOCK"  # ours are the system's locks
    assert host.rv("C_GetInfo", host.room(128)) == "CKR_CRYPTOKI_NOT_INITIALIZED"
    assert host.lines() == []
    host.ok("C_Initialize", None)
    must_sign(host, pair)


def test_c_finalize_takes_null_alone(host: Host, pair: Pair) -> None:
    assert host.rv("C_Finalize", None) == "CKR_CRYPTOKI_NOT_INITIALIZED"
    host.ok("C_Initialize", None)
    assert host.rv("C_Finalize", 1) == "CKR_ARGUMENTS_BAD"
    must_sign(host, pair)  # and it has changed nothing


@pytest.mark.parametrize("mode", ["call", "background"])
def test_an_application_that_forbids_threads_gets_none(
    mode: str, pair: Pair, group: GroupFactory, hosts: Hosts
) -> None:
    made = group(pair.east.member(), pair.west.member(), recovery={"mode": mode})
    host = hosts(env=made.env)
    for flags, threads in (
        (p11.CKF_LIBRARY_CANT_CREATE_OS_THREADS, 1),
        (0, 3 if mode == "background" else 2),  # one waits for what operators change
    ):
        host.ok("C_Initialize", arguments(flags=flags))
        must_sign(host, pair)
        # A thread that has done its work may still be on its way out.
        wait_until(lambda threads=threads: len(host.threads()) == threads, "our threads")  # type: ignore[misc]
        host.ok("C_Finalize", None)
        wait_until(lambda: len(host.threads()) == 1, "the end of our threads")


def test_the_signals_of_the_application_are_its_own(pair: Pair, group: GroupFactory, hosts: Hosts) -> None:
    """Mask and dispositions stay as they are, and no thread of ours takes a signal that is meant for it."""
    made = group(pair.east.member(), pair.west.member(), recovery={"mode": "background"})
    host = hosts(env=made.env)
    before = host.command("signals").split()
    host.ok("C_Initialize", None)
    assert host.command("signals").split() == before
    must_sign(host, pair)
    assert host.command("signals").split() == before
    for thread in host.threads():
        if thread != host.pid:
            blocked = int(host.status("SigBlk", thread), 16)
            assert all(blocked >> number - 1 & 1 for number in (1, 2, 3, 13, 14, 15, 17)), f"{blocked:x}"
    host.ok("C_Finalize", None)
    assert host.command("signals").split() == before


@pytest.mark.parametrize("kind", ["shared", "own", "behind a socket"])
def test_two_hundred_lives_leave_nothing_behind(
    kind: str, module: Path, pair: Pair, server: ServerFactory, group: GroupFactory, hosts: Hosts
) -> None:
    slack = 128 if is_sanitized(module) else 1  # freed memory is kept for a while, to catch its use
    tokens = (pair.east, pair.west)
    if kind == "behind a socket":
        members = [server(token).member() for token in tokens]
    else:
        members = [token.member(instance=kind) for token in tokens]
    host = hosts(env=group(*members).env)

    def live(times: int) -> None:
        for _ in range(times):
            host.ok("C_Initialize", None)
            session = host.open()
            host.ok("C_GenerateRandom", session, host.room(8), 8)
            host.ok("C_Finalize", None)
        wait_until(lambda: len(host.threads()) == 1, "the end of our threads")

    live(20)
    before = host.descriptors(), host.mappings()
    memory = int(host.status("VmRSS").split()[0])
    live(180)
    assert host.descriptors() == before[0]
    assert host.mappings() <= before[1] + 10 * slack
    grown = int(host.status("VmRSS").split()[0]) - memory
    assert grown < 2048 * slack, f"{grown} KiB more after 180 lives"
    host.ok("C_Initialize", None)
    must_sign(host, pair)


def test_attempts_to_recover_leave_nothing_behind(
    module: Path, pair: Pair, group: GroupFactory, hosts: Hosts, directory: Path
) -> None:
    """A member may be away for months."""
    slack = 32 if is_sanitized(module) else 1
    dead = Server(pair.west, directory / "dead.sock")
    made = group(pair.east.member(), dead.member(), recovery={"interval_s": 1e-9})
    host = hosts(env=made.env)
    host.ok("C_Initialize", None)
    session = host.open()

    def attempts() -> int:
        host.ok("C_GetSessionInfo", session, host.room(32))  # the check is in every call
        return made.log.read_text().count("recovery.failed")

    wait_until(lambda: attempts() >= 20, "attempts")
    before = host.descriptors()
    memory = int(host.status("VmRSS").split()[0])
    wait_until(lambda: attempts() >= 220, "attempts")
    assert host.descriptors() == before
    grown = int(host.status("VmRSS").split()[0]) - memory
    assert grown < 512 * slack, f"{grown} KiB more after 200 attempts"
