"""Programs in C under valgrind, or under LeakSanitizer in `make asan`: no error, and nothing is lost when they end.

P11HA_VALGRIND=1 (`make valgrind`) tells the long stories too; without valgrind they are short.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.boundary.conftest import Pair, Program
from tests.boundary.hosts import environment
from tests.conftest import ROOT, Group, GroupFactory

SHORT = ["reload", "lasting MODULE sessions 100"]
LONG = [
    "lasting MODULE lives 30",
    "lasting MODULE objects 300",
    *(f"threads MODULE {story}" for story in ("start", "end", "churn", "logins")),
]
VALGRIND = [
    *("valgrind", "--quiet", "--error-exitcode=99", "--fair-sched=yes", "--num-callers=20"),
    *("--leak-check=full", "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"),
    f"--suppressions={ROOT / 'tests' / 'valgrind.supp'}",
]
LEAKS = {
    "ASAN_OPTIONS": "detect_leaks=1:fast_unwind_on_malloc=0",
    "LSAN_OPTIONS": f"print_suppressions=0:suppressions={ROOT / 'tests' / 'lsan.supp'}",
}
# What LeakSanitizer says in the child of a fork, of a thread that only the parent has.
NOT_IN_A_CHILD = re.compile(r"==\d+==Running thread \d+ was not suspended\. False leaks are possible\.")


@pytest.fixture
def unhurried(pair: Pair, group: GroupFactory) -> Group:
    """A group that gives up no attempt for being slow: what is left behind then counts as lost."""
    return group(pair.east.member(), pair.west.member(), recovery={"connect_timeout_s": 300})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("story", SHORT + LONG)
def test_nothing_is_wrong_and_nothing_is_lost(
    story: str, program: Program, module: Path, unhurried: Group
) -> None:
    """The stories are told in the programs."""
    kind = module.parent.name
    if kind == "tsan" or (kind != "asan" and story in LONG and "P11HA_VALGRIND" not in os.environ):
        pytest.skip("for `make asan` and `make valgrind`")
    name, _, arguments = story.partition(" MODULE")
    done = subprocess.run(
        [*([] if kind == "asan" else VALGRIND), program(name), module, *arguments.split()],
        env=environment(unhurried.env) | (LEAKS if kind == "asan" else {"SLOWER": "4"}),
        check=False,
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if not NOT_IN_A_CHILD.fullmatch(line)]
    assert (done.returncode, said) == (0, [])
