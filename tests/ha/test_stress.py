"""Eight threads sign while the members die and return in turn: not one call fails, and every signature verifies.

PKCS11_HA_STRESS="100000 10" is the size of the promise: signatures in all, and deaths of each member.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT, Group, GroupFactory
from tests.ha.app import until
from tests.ha.conftest import Pair
from tests.ha.keys import verify_ec

THREADS = 8
SIGNATURES, DEATHS = (int(word) for word in os.environ.get("PKCS11_HA_STRESS", "4000 3").split())
RECORD = 96


@pytest.fixture(scope="session")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("stress") / "stress"
    flags = "-std=c11 -O2 -Wall -Wextra -Wconversion -Werror -pthread".split()
    source = ROOT / "tests" / "ha" / "stress.c"
    subprocess.run(["cc", *flags, f"-I{ROOT / 'include'}", "-o", program, source, "-ldl"], check=True)
    return program


class Stress:
    """The program while it runs, and what it has said."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def signed(self) -> int:
        return max((int(line.split()[1]) for line in self.lines if line.startswith("signed")), default=0)

    def failures(self) -> list[str]:
        return [line for line in self.lines if not line.startswith(("signing", "signed", "done"))]

    def goes_on(self, count: int) -> None:
        """Until it has signed so many more."""
        enough = self.signed() + count
        until(lambda: self.signed() >= enough or self.process.poll() is not None, f"{count} more are signed")

    def end(self) -> tuple[int, int]:
        """Signatures and failures in all."""
        assert self.process.stdin
        self.process.stdin.close()
        until(lambda: self.process.poll() is not None, "it ends")
        self.reader.join()
        done = self.lines[-1].split()
        assert done[0] == "done", self.lines[-5:]
        return int(done[1]), int(done[2])


@contextmanager
def running(command: list[str]) -> Iterator[Stress]:
    program = Stress(command)
    try:
        yield program
    finally:
        program.process.kill()
        with program.process:  # closes its pipes and waits for it
            program.reader.join()


def count(group: Group, event: str, member: str) -> int:
    return sum(f"member={member} {event}" in line for line in group.log.read_text().splitlines())


def happened(group: Group, event: str, member: str, times: int) -> bool:
    return count(group, event, member) >= times


@pytest.mark.timeout(600)
def test_no_call_fails_while_members_die_and_return_in_turn(
    pair: Pair, group: GroupFactory, module: Path, stress: Path, directory: Path
) -> None:
    where = group(*pair.members(), recovery={"interval_s": 0.05})
    records = directory / "signatures"
    command = [stress, module, pair.pin, str(THREADS), str(SIGNATURES), records]
    share = SIGNATURES // (4 * DEATHS)  # each member dies and returns so many times
    with running([str(word) for word in command]) as program:
        until(lambda: "signing" in program.lines or program.process.poll() is not None, "it begins")
        for round_ in range(1, DEATHS + 1):
            for server in pair.servers:
                name = server.token.label
                program.goes_on(share)
                server.kill()
                until(partial(happened, where, "member.lost", name, round_), f"{name} is lost")
                program.goes_on(share)
                server.start()
                until(partial(happened, where, "member.recovered", name, round_), f"{name} is back")
        made, failed = program.end()
    assert program.failures() == []
    assert failed == 0
    assert made >= SIGNATURES
    data = records.read_bytes()
    assert len(data) == made * RECORD
    public = pair.keys.ec.public_key()
    digests = set()
    for at in range(0, len(data), RECORD):
        digest = data[at : at + 32]
        verify_ec(public, data[at + 32 : at + RECORD], digest)
        digests.add(digest)
    assert len(digests) == made
    for name in ("east", "west"):
        assert count(where, "member.lost", name) == DEATHS
        assert count(where, "member.recovered", name) == DEATHS
    print(f"signatures={made} failed={failed} verified={len(digests)} deaths={2 * DEATHS}")
