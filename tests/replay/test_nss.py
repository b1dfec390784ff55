"""What SoftHSM does not have: two operations at once, recovery and messages, on NSS softokn killed at every moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.members import SoftToken
from tests.replay.cases import CASES, NSS, Case
from tests.replay.matrix import Matrix, matrix


@pytest.fixture(scope="module")
def nss(module: Path, nss_tokens: list[SoftToken]) -> Iterator[Matrix]:
    with matrix(module, nss_tokens) as made:
        yield made


@pytest.mark.parametrize("case", [case for case in CASES if case.operation.member == NSS], ids=str)
def test_operation_goes_on(nss: Matrix, case: Case) -> None:
    nss.kill_at_every_moment(case)
