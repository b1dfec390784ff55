"""One case of the table at every moment: its member is killed, and what comes out is as if nobody had died."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo.members import SoftToken
from tests.replay.cases import Case
from tests.replay.killable import Killable, behind, killable, reference
from tests.replay.scripts import Use, at, run, stops
from tests.replication.conftest import scratch


@dataclass
class Matrix:
    """An application for all cases, and a token of the same kind without us."""

    mortal: Killable
    use: Use
    undisturbed: Use

    def kill_at_every_moment(self, case: Case) -> None:
        given = self.taken(case)
        moments = stops(case.script(self.undisturbed, given))
        for moment, name in enumerate(moments):
            out, dead = self.kill_at(moment, case, given)
            what = f"{dead} killed before {name}, call {moment + 1} after the Init"
            self.check(case, out, given, what)
            assert self.mortal.app.served(self.use.session) != dead, what

    def kill_at(self, moment: int, case: Case, given: bytes) -> tuple[bytes, str]:
        """What comes out, and who died."""
        dead: list[str] = []

        self.mortal.wait_for_all()
        die = at(moment, lambda: dead.append(self.mortal.kill_serving(self.use)))
        out = run(case.script(self.use, given), die)
        return out, dead[0]

    def taken(self, case: Case) -> bytes:
        """What the case is given, by the token."""
        return run(case.takes.script(self.undisturbed)) if case.takes else b""

    def check(self, case: Case, out: bytes, given: bytes, what: str) -> None:
        """The output is right: the same as the token's own, or the token takes it."""
        if case.proof is None:
            assert out == run(case.script(self.undisturbed, given)), what
        else:
            proven = run(case.proof.script(self.undisturbed, out))
            assert proven == (b"CKR_OK" if case.operation.does == "sign" else case.mechanism.data), what


@contextmanager
def matrix(module: Path, tokens: list[SoftToken]) -> Iterator[Matrix]:
    """A group of the first two; the third one is without us."""
    with (
        scratch() as path,
        reference(tokens[2]) as undisturbed,
        killable(module, Path(path), map(behind, tokens[:2])) as mortal,
    ):
        yield Matrix(mortal, mortal.use(), undisturbed)
