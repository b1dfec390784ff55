"""What an operation took is in memory while it may be needed again, and nowhere after it is over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.members import SoftToken
from tests.conftest import ROOT
from tests.memory import holds
from tests.replay.killable import Killable, behind, killable

ENDS = (
    "ended",
    "encrypted",
    "cancelled",
    "session cancelled",
    "closed",
    "all closed",
    "finalised",
    "saved",
)


@pytest.fixture(scope="module")
def members(
    module: Path, soft_models: list[SoftToken], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Killable]:
    """A group for clients that are processes of their own; ours is on it as well."""
    directory = tmp_path_factory.mktemp("secrets")
    with killable(module, directory, map(behind, soft_models[:2]), recovery={"interval_s": 3600}) as made:
        yield made


@pytest.mark.parametrize("ending", ENDS)
def test_nothing_is_left_in_memory(module: Path, members: Killable, ending: str) -> None:
    secret, mask = os.urandom(32), os.urandom(32)
    masked = bytes(a ^ b for a, b in zip(secret, mask, strict=True))
    arguments = [str(module), members.pin, mask.hex(), masked.hex(), ending]
    client = subprocess.Popen(
        [sys.executable, "-m", "tests.replay.secret_client", *arguments],
        cwd=ROOT,
        env=os.environ | members.app.group.env | {"PYTHONPATH": f"{ROOT}:{ROOT / 'shim'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin
    assert client.stdout
    seen = {}
    try:
        for step in ("idle", "taken", "over"):
            assert client.stdout.readline().strip() == step
            seen[step] = holds(client.pid, secret)
            client.stdin.write("\n")
            client.stdin.flush()
        assert client.wait(30) == 0
    finally:
        client.kill()
        client.communicate()
    assert seen == {"idle": False, "taken": True, "over": False}
