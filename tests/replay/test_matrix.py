"""Each operation by each mechanism of SoftHSM, its member killed at every moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.members import SoftToken
from tests.replay.cases import CASES, SOFTHSM, Case
from tests.replay.matrix import Matrix, matrix
from tests.replay.scripts import run, stops

OURS = [case for case in CASES if case.operation.member == SOFTHSM]


@pytest.fixture(scope="module")
def softhsm(module: Path, soft_models: list[SoftToken]) -> Iterator[Matrix]:
    with matrix(module, soft_models) as made:
        yield made


@pytest.mark.parametrize("case", OURS, ids=str)
def test_operation_goes_on(softhsm: Matrix, case: Case) -> None:
    softhsm.kill_at_every_moment(case)


@pytest.mark.parametrize("case", [case for case in OURS if case.operation.does == "verify"], ids=str)
def test_forgery_stays_one(softhsm: Matrix, case: Case) -> None:
    """The member dies before the last call; the other one has all the data, and says what it says of a forgery."""
    right = softhsm.taken(case)
    forged = right[:-1] + bytes([right[-1] ^ 1])
    last = len(stops(case.script(softhsm.undisturbed, forged))) - 1
    out, _ = softhsm.kill_at(last, case, forged)
    assert out == run(case.script(softhsm.undisturbed, forged))
    assert out != b"CKR_OK"
