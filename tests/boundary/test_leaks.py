"""An application that runs for years holds what it held on its first day.

P11HA_LEAKS="10000 1000000" is the size of the promise: lives of the module, and sessions.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.boundary.conftest import Pair, Program
from tests.boundary.hosts import environment
from tests.conftest import GroupFactory, is_sanitized

LIVES, SESSIONS = (int(word) for word in os.environ.get("P11HA_LEAKS", "300 50000").split())
NOISE_KIB = 1024


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("what", "count", "host"),
    [
        ("lives", LIVES, "process"),
        ("sessions", SESSIONS, "process"),
        ("objects", SESSIONS // 25, "worker"),  # SoftHSM keeps session objects until C_Finalize: not in here
    ],
)
def test_memory_does_not_grow(
    what: str, count: int, host: str, program: Program, module: Path, pair: Pair, group: GroupFactory
) -> None:
    """lasting.c measures."""
    if is_sanitized(module):
        pytest.skip("freed memory is kept for a while, to catch its use")
    made = group(*(token.member(host=host) for token in (pair.east, pair.west)))
    done = subprocess.run(
        [program("lasting"), module, what, str(count)],
        env=environment(made.env),
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    print(done.stdout)
    points = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(points) == 11
    assert max(points) - points[0] < NOISE_KIB, f"KiB at each tenth of {count} {what}: {points}"
