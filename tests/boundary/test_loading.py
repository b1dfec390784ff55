"""However a host loads the module, it works: locally, globally, deep-bound, preloaded, beside the vendor's library."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from demo.members import Table, softhsm
from tests.boundary.conftest import (
    HERE,
    NO_DEEPBIND,
    Hosts,
    Pair,
    Program,
    compile_c,
    must_sign,
)
from tests.boundary.hosts import PATIENCE_S, environment
from tests.conftest import Group, GroupFactory, is_sanitized


@pytest.mark.parametrize("how", ["local", "global", "deepbind", "preload"])
def test_a_host_signs(how: str, signing: Group, pair: Pair, hosts: Hosts) -> None:
    host = hosts(how, env=signing.env)
    assert host.greeting == "ready"
    host.ok("C_Initialize", None)
    must_sign(host, pair)
    host.ok("C_Finalize", None)
    assert host.exit() == 0
    assert host.lines() == []


@pytest.mark.parametrize("instance", ["shared", "own"])
@pytest.mark.parametrize("preloaded", [True, False])
def test_a_program_linked_against_the_vendors_library(
    instance: str, preloaded: bool, module: Path, pair: Pair, group: GroupFactory, tmp_path: Path
) -> None:
    """Its calls, and the vendor's own list, are bound to our symbols then: no call comes back to us."""
    made = group(pair.east.member(instance=instance), pair.west.member(instance=instance))
    program = tmp_path / "linked"
    compile_c(HERE / "linked.c", program, str(softhsm()), f"-Wl,-rpath,{softhsm().parent}")
    preload = ":".join([*filter(None, [environment().get("LD_PRELOAD")]), str(module)])
    env = {"LD_PRELOAD": preload} if preloaded else pair.east.env
    done = subprocess.run(
        [program],
        env=environment(made.env | env),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == (["pkcs11-ha", "pkcs11-ha"] if preloaded else ["Implement"] * 2)
    if preloaded:
        assert "member.lost" not in made.log.read_text()


def test_a_library_that_is_another_copy_of_us_is_no_member(
    module: Path, pair: Pair, group: GroupFactory, hosts: Hosts, directory: Path
) -> None:
    """By its own name, by a link to it: a member that is this very module would call itself for ever."""
    link = directory / "vendor.so"
    link.symlink_to(module)
    mirrors = [
        pair.east.member(name=name, module=str(path), token="pkcs11:token=prod")
        for name, path in (("self", module), ("link", link))
    ]
    made = group(pair.east.member(), *mirrors)
    host = hosts(env=made.env)
    host.ok("C_Initialize", None)
    must_sign(host, pair)
    lost = [line for line in made.log.read_text().splitlines() if "member.lost" in line]
    assert len(lost) == 2
    assert all("is this very library" in line for line in lost)


def test_the_host_may_let_go_of_the_library_and_load_it_again(
    module: Path, signing: Group, program: Program
) -> None:
    """dlclose after C_Finalize, and also without: our threads and fork handlers stay where they are."""
    done = subprocess.run(
        [program("reload"), module],
        env=environment(signing.env),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("how", ["local", "global", "preload"])
def test_a_members_library_calls_its_own_functions(
    how: str, module: Path, group: GroupFactory, program: Program, hosts: Hosts
) -> None:
    """By names that are ours too."""
    if is_sanitized(module):
        pytest.skip(NO_DEEPBIND)
    member: Table = {"name": "yes", "module": str(program("libyes")), "token": "pkcs11:token=yes"}
    host = hosts(how, env=group(member).env)
    host.ok("C_Initialize", None)
    assert len(host.slots()) == 1
    host.ok("C_GenerateRandom", host.open(), host.room(8), 8)
