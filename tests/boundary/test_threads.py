"""Many threads at the two ends of the module's life: no crash, no hang, every call comes back."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from demo.members import Table
from tests import p11
from tests.boundary.conftest import Hosts, Program
from tests.boundary.hosts import PATIENCE_S, environment, wait_until
from tests.conftest import Group, GroupFactory


@pytest.mark.parametrize("story", ["start", "end", "churn", "logins"])
def test_many_threads(story: str, program: Program, module: Path, signing: Group) -> None:
    """The stories are told in threads.c."""
    done = subprocess.run(
        [program("threads"), module, story],
        env=environment(signing.env),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert "core.failed" not in signing.log.read_text()


def test_c_finalize_waits_for_a_call_that_has_no_session(
    program: Program, group: GroupFactory, hosts: Hosts, directory: Path
) -> None:
    hold = directory / "hold"
    os.mkfifo(hold)
    member: Table = {"name": "slow", "module": str(program("libyes")), "token": "pkcs11:token=yes"}
    host = hosts(env=group(member).env | {"YES_HOLD_INFO": str(hold)})
    host.ok("C_Initialize", None)
    host.spawn("C_GetMechanismInfo", 0, p11.CKM_SHA256, host.room(24))
    wait_until((directory / "hold.reached").exists, "the call to be on its way")
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(host.rv, "C_Finalize", None)
        with pytest.raises(TimeoutError):  # this long it does not end, though nothing else keeps it
            ending.result(timeout=0.5)
        hold.open("wb").close()
        assert ending.result(timeout=PATIENCE_S) == "CKR_OK"
    wait_until(lambda: host.spawned() is not None, "the call to come back")
    assert host.spawned() == "CKR_OK"
    host.ok("C_Initialize", None)
