"""Short histories that once went wrong, found by the random ones and by going through every step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.chaos.conftest import Begin
from tests.chaos.history import ClientDies, MemberDies
from tests.chaos.steps import Destroy, Do, GiveBack, Kill, New, Rename, Step, Use, Wait

DATA, KEY, PAIR = New("data"), New("aes"), New("ec")

ONCE_WRONG: dict[str, Sequence[Step]] = {
    "placed, and still hidden": [Wait(0), Do(0, KEY, ClientDies(9))],
    "a pair without its private key": [Wait(0), Do(0, PAIR, ClientDies(9))],
    "destroyed where it is announced, and the member dies of that": [
        Do(0, DATA),
        Wait(0),
        Do(0, Destroy(0), MemberDies(0, 1)),
    ],
    "made where it cannot be marked, while the first member is away": [
        Kill(0),
        Do(0, DATA),
        Do(0, DATA, ClientDies(4, after=True)),
    ],
    "announced, never made, and then renamed elsewhere": [
        Do(0, DATA, MemberDies(1, 1, after=True)),
        Do(0, Rename(0)),
    ],
    "found on one member while another dies": [
        Do(0, KEY),
        Kill(0),
        Do(0, DATA),
        Do(1, DATA),
        GiveBack(0),
        Do(0, DATA),
        Do(1, DATA),
        Do(0, DATA),
        Kill(0),
        Use(1, 0),
    ],
}
OWED: dict[str, Sequence[Step]] = {
    # Its first calls are those of the login and of the lease; then a data object, which can bear no mark, is announced,
    # made, and said to be there.
    f"owed, and its member dies over it (call {nth}) before {write}": [
        Kill(1),
        Do(0, DATA),
        GiveBack(1),
        Wait(0, MemberDies(1, nth, after=True)),
        Do(0, write),
    ]
    for nth in (4, 5)
    for write in (Destroy(0), Rename(0))
}


@pytest.mark.parametrize("steps", (ONCE_WRONG | OWED).values(), ids=ONCE_WRONG | OWED)
def test_it_goes_right(begin: Begin, steps: Sequence[Step]) -> None:
    with begin((True, True)) as history:
        for step in steps:
            step.go(history)
        history.finish()
