"""fork: a child starts anew and works, whatever the parent's threads were doing; the parent notices nothing."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from pathlib import Path

import pytest

from demo.members import Server, Table
from tests.boundary.conftest import Hosts, Pair, Program
from tests.boundary.hosts import environment, wait_until
from tests.conftest import Group, GroupFactory, ServerFactory, is_sanitized

CHILDREN = 30
BACKGROUND: Table = {"mode": "background", "interval_s": 0.01}


def must_fork(program: Path, module: Path, made: Group, workers: int, children: int, how: str) -> None:
    if workers and is_sanitized(module):
        pytest.skip("a sanitizer's own lock that some thread holds at a fork is held for ever in the child")
    done = subprocess.run(
        [program, module, str(workers), str(children), how],
        env=environment(made.env),
        check=False,
        capture_output=True,
        text=True,
    )
    said = "ok\n" * (1 + children if how == "exec" else 1)
    assert done.stderr == ""
    assert (done.returncode, done.stdout) == (0, said)
    assert "core.failed" not in made.log.read_text()


@pytest.mark.parametrize(
    ("instance", "workers", "children", "how"),
    [
        ("own", 0, 10, "use"),
        ("own", 8, CHILDREN, "use"),
        ("shared", 8, 10, "use"),
        ("own", 8, CHILDREN, "leave"),
        ("own", 2, 5, "deep"),
        ("own", 2, 5, "close"),
        ("own", 2, 5, "exec"),
    ],
)
def test_a_program_with_tokens_in_its_process_forks(
    instance: str,
    workers: int,
    children: int,
    how: str,
    pair: Pair,
    group: GroupFactory,
    program: Program,
    module: Path,
) -> None:
    tokens = (pair.east, pair.west)
    made = group(*(token.member(instance=instance) for token in tokens), recovery=BACKGROUND)
    must_fork(program("forks"), module, made, workers, children, how)


@pytest.mark.parametrize(
    ("workers", "children", "how"), [(0, 10, "use"), (8, CHILDREN, "use"), (8, CHILDREN, "leave")]
)
def test_a_program_with_tokens_behind_sockets_forks(
    workers: int,
    children: int,
    how: str,
    pair: Pair,
    server: ServerFactory,
    group: GroupFactory,
    program: Program,
    module: Path,
) -> None:
    made = group(server(pair.east).member(), server(pair.west).member(), recovery=BACKGROUND)
    must_fork(program("forks"), module, made, workers, children, how)


@pytest.mark.parametrize("workers", [0, 8])
def test_a_program_forks_while_a_member_is_tried_again_and_again(
    workers: int, pair: Pair, group: GroupFactory, program: Program, module: Path, directory: Path
) -> None:
    """The background thread is in the middle of loading, connecting or failing whenever the fork comes."""
    dead = Server(pair.west, directory / "dead.sock")
    made = group(pair.east.member(), dead.member(), recovery=BACKGROUND)
    must_fork(program("forks"), module, made, workers, CHILDREN, "use")
    assert made.log.read_text().count("recovery.failed") > CHILDREN


def test_a_program_forks_while_its_configuration_is_edited(
    pair: Pair, group: GroupFactory, program: Program, module: Path
) -> None:
    """Its children follow changes of their own, and leave the parent's watch to the parent."""
    tables = [token.member() for token in (pair.east, pair.west)]
    made = group(*tables)
    texts = [
        made.conf.read_text(),
        group(*tables, balance="primary-first", standby=["west"]).conf.read_text(),
    ]
    over = threading.Event()

    def edit() -> None:
        for number in itertools.count():
            new = made.conf.with_suffix(".new")
            new.write_text(texts[number % 2])
            new.rename(made.conf)
            if over.wait(0.1):
                return

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        must_fork(program("forks"), module, made, 2, 8, "use")
    finally:
        over.set()
        editor.join()
    assert "config.reloaded" in made.log.read_text()


def test_a_program_forks_while_a_member_hangs_in_c_initialize(
    pair: Pair, group: GroupFactory, program: Program, hosts: Hosts, directory: Path
) -> None:
    """The parent's thread holds what its member's environment needs; the child has no such thread to wait for."""
    hold = directory / "hold"
    stuck: Table = {
        "name": "stuck",
        "module": str(program("libyes")),
        "token": "pkcs11:token=yes",
        "env": {"YES_HOLD": str(hold)},
    }
    made = group(pair.east.member(), stuck, recovery={**BACKGROUND, "connect_timeout_s": 0.2})
    host = hosts(env=made.env)
    host.ok("C_Initialize", None)
    wait_until(lambda: "recovery.failed" in made.log.read_text(), "an attempt that fails")
    os.mkfifo(hold)
    wait_until(lambda: "no answer in time" in made.log.read_text(), "an attempt that hangs")
    hold.unlink()
    assert host.command("fork") == "0"
    host.ok("C_Finalize", None)
    assert host.lines() == []
