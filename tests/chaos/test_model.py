"""Random histories of writes, kills, returns and crashes: in the end every member holds what the model says.

$P11HA_CHAOS is the number of histories, $P11HA_SEED the seed that draws them (printed; another one each time).
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings

from tests.chaos.chance import HISTORIES, SEED
from tests.chaos.conftest import Begin
from tests.chaos.steps import Step, happenings, setups


@pytest.mark.timeout(600 + 10 * HISTORIES)
def test_every_member_holds_what_the_model_says(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nchaos: {HISTORIES} histories, P11HA_SEED={SEED}")
    tally: Counter[str] = Counter()

    @seed(SEED)
    @settings(
        max_examples=HISTORIES,
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(setups, happenings)
    def history(served: tuple[bool, ...], happens: list[Step]) -> None:
        with begin(served, note) as history:
            for step in happens:
                note(str(step))
                step.go(history)
            history.finish()
            tally.update(history.tally)

    history()
    with capsys.disabled():
        print(
            "chaos: writes and deaths:", ", ".join(f"{count} {what}" for what, count in tally.most_common())
        )
