"""A server dies while the application idles, and SIGPIPE ends programs: not this one.

The disposition is the default, as in every ordinary program.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from demo.members import p11_kit_client
from tests.boundary.conftest import DIGEST, PIN, PRIVATE, Hosts, Pair, must_sign
from tests.boundary.hosts import Host, HostDied, wait_until
from tests.conftest import GroupFactory, ServerFactory


def test_the_bare_client_is_killed(pair: Pair, server: ServerFactory, hosts: Hosts) -> None:
    """So that the tests below have something to fail for."""
    east = server(pair.east)
    host = hosts(module=p11_kit_client(), env=east.env)
    host.ok("C_Initialize", None)
    must_sign(host, pair)
    east.kill()
    with pytest.raises(HostDied, match="SIGPIPE"):
        host.rv("C_GetInfo", host.room(128))


@pytest.mark.parametrize("logged_in", [True, False])
def test_the_application_goes_on_with_the_other_member(
    logged_in: bool, pair: Pair, server: ServerFactory, group: GroupFactory, hosts: Hosts
) -> None:
    east, west = server(pair.east), server(pair.west)
    made = group(east.member(), west.member())
    host = hosts(env=made.env)
    before = host.command("signals")
    host.ok("C_Initialize", None)
    session = host.open()
    if logged_in:
        host.login(session, PIN)
    east.kill()
    if not logged_in:
        host.login(session, PIN)
    (key,) = host.find(session, PRIVATE)
    for _ in range(4):  # each member's turn
        pair.verify(host.sign(session, key, DIGEST))
    assert host.command("signals") == before
    assert int(host.status("SigPnd"), 16) == int(host.status("ShdPnd"), 16) == 0
    host.ok("C_Finalize", None)
    assert host.exit() == 0


FIRST_CALLS: dict[str, Callable[[Host, int], str]] = {
    "C_Finalize": lambda host, _: host.rv("C_Finalize", None),
    "C_GetTokenInfo": lambda host, _: host.rv("C_GetTokenInfo", 0, host.room(208)),
    "C_CloseSession": lambda host, session: host.rv("C_CloseSession", session),
    "C_CloseAllSessions": lambda host, _: host.rv("C_CloseAllSessions", 0),
    "C_Logout": lambda host, session: host.rv("C_Logout", session),
    "C_GenerateRandom": lambda host, session: host.rv("C_GenerateRandom", session, host.room(8), 8),
    "C_FindObjectsInit": lambda host, session: host.rv("C_FindObjectsInit", session, None, 0),
}


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("name", FIRST_CALLS)
def test_the_first_call_after_all_servers_died(
    name: str, used: bool, pair: Pair, server: ServerFactory, group: GroupFactory, hosts: Hosts
) -> None:
    """Whatever it is, also if the members' sessions have never been used."""
    east, west = server(pair.east), server(pair.west)
    made = group(east.member(), west.member())
    host = hosts(env=made.env)
    host.ok("C_Initialize", None)
    session = host.open()
    if used:
        host.login(session, PIN)
        host.find(session, PRIVATE)
    east.kill()
    west.kill()
    rv = FIRST_CALLS[name](host, session)
    assert rv.startswith("CKR_")
    assert host.alive
    if name != "C_Finalize":
        host.ok("C_Finalize", None)
    assert host.exit() == 0


@pytest.mark.parametrize("mode", ["call", "background"])
def test_recovery_attempts_do_not_end_the_application(
    mode: str, pair: Pair, server: ServerFactory, group: GroupFactory, hosts: Hosts
) -> None:
    """To finalize a dead connection is to write to it."""
    east, west = server(pair.east), server(pair.west)
    made = group(east.member(), west.member(), recovery={"mode": mode, "interval_s": 0.01})
    host = hosts(env=made.env)
    host.ok("C_Initialize", None)
    session = host.open()
    host.login(session, PIN)
    (key,) = host.find(session, PRIVATE)

    def signs_and_logs(event: str, times: int) -> bool:
        pair.verify(host.sign(session, key, DIGEST))
        return made.log.read_text().count(event) >= times

    for life in (1, 2):
        east.kill()
        wait_until(lambda life=life: signs_and_logs("recovery.failed", life), "attempts")  # type: ignore[misc]
        east.start()
        wait_until(lambda life=life: signs_and_logs("member.recovered", life), "recovery")  # type: ignore[misc]
    host.ok("C_Finalize", None)
    assert host.exit() == 0


def test_an_error_that_nobody_reads(pair: Pair, group: GroupFactory, hosts: Hosts) -> None:
    """stderr is a pipe whose reader has gone: our line is lost, the application is not."""
    made = group(pair.east.member(), balance="no such thing")
    host = hosts(env=made.env, deaf=True)
    assert host.rv("C_Initialize", None) == "CKR_GENERAL_ERROR"
    assert host.rv("C_Initialize", None) == "CKR_GENERAL_ERROR"
    assert host.exit() == 0
