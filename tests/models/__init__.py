"""The module against models of a few lines: hypothesis draws what happens, and both must say the same.

P11HA_MODELS=20 draws twenty times as much, another each time, and shortens what fails. Without it, what is drawn is
always the same, and told as it was drawn: to shorten it takes minutes of real deaths.
"""

import os
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

_TIMES = int(os.environ.get("P11HA_MODELS", "1"))


def tell(machine: Callable[[], RuleBasedStateMachine], stories: int, steps: int) -> None:
    """So many stories of at most so many steps, each of them with a new machine."""
    how = settings(
        max_examples=stories * _TIMES,
        stateful_step_count=steps,
        derandomize=_TIMES == 1,
        phases=[Phase.generate] if _TIMES == 1 else [Phase.generate, Phase.shrink],
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=how)  # type: ignore[arg-type]  # whatever makes one


def seconds(limit: int) -> int:
    """What a test may take that draws that much."""
    return limit * _TIMES
