"""Every input that a fuzzer once found worth keeping goes through it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import build
from tests.fuzz.run import Fuzzer, clean_environment


@pytest.fixture(scope="session")
def fuzzers() -> dict[str, Fuzzer]:
    command = [sys.executable, str(build.ROOT / "build.py"), "--sanitize=fuzzer"]
    subprocess.run(command, check=True, env=clean_environment())
    return {name: Fuzzer(name) for name in build.FUZZERS}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", build.FUZZERS)
def test_the_kept_inputs_are_harmless(fuzzers: dict[str, Fuzzer], name: str, tmp_path: Path) -> None:
    fuzzer = fuzzers[name]
    directory = fuzzer.unpack(tmp_path / name)
    assert any(directory.iterdir())
    done = subprocess.run(
        fuzzer.command("-runs=0", directory),
        env=fuzzer.environment(),
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr[-4000:]
