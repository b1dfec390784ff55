"""How much the chaos tests do, and the seed of what they choose: $P11HA_CHAOS histories, $P11HA_SEED."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

THOROUGH = "P11HA_CHAOS" in os.environ
HISTORIES = int(os.environ.get("P11HA_CHAOS") or "40")
SEED = int(os.environ.get("P11HA_SEED") or random.SystemRandom().getrandbits(32))
_A_FEW = 3

T = TypeVar("T")


def some(of: Sequence[T]) -> list[T]:
    """All of them in a thorough run, else a few."""
    if THOROUGH:
        return list(of)
    chosen = sorted(random.Random(SEED).sample(range(len(of)), min(_A_FEW, len(of))))
    return [of[place] for place in chosen]
