"""Every step of every write: the client crashes there, or a member dies there, and the tokens agree in the end.

With $P11HA_CHAOS set, all of them; else a few of each write, others each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.chaos.chance import some
from tests.chaos.conftest import Begin
from tests.chaos.history import ClientDies, Fault, History, MemberDies
from tests.chaos.steps import Copy, Destroy, Do, GiveBack, Kill, New, Rename, Step, What

SERVED = (True, True)

pytestmark = pytest.mark.timeout(1200)


@dataclass(frozen=True)
class Case:
    """A write, and what must be there before."""

    what: What
    before: tuple[New, ...] = ()


CASES = {
    "create data": Case(New("data")),
    "create certificate": Case(New("certificate", private=False)),
    "create key": Case(New("aes given")),
    "generate key": Case(New("aes")),
    "generate extractable key": Case(New("aes", sensitive=False, extractable=True)),
    "generate pair": Case(New("ec")),
    "copy data": Case(Copy(0), (New("data"),)),
    "copy key": Case(Copy(0), (New("aes"),)),
    "change data": Case(Rename(0), (New("data"),)),
    "change key": Case(Rename(0), (New("aes"),)),
    "change half of a pair": Case(Rename(1), (New("ec"),)),
    "destroy data": Case(Destroy(0), (New("data"),)),
    "destroy key": Case(Destroy(0), (New("aes"),)),
    "destroy half of a pair": Case(Destroy(0), (New("ec"),)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Found:
    """What went wrong at which step, told all at once."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    @contextmanager
    def at(self, step: str) -> Iterator[None]:
        print(step)
        try:
            yield
        except AssertionError as error:
            self.wrong.append("\n".join([f"{step}: {error}", *error.__notes__]))

    def tell(self) -> None:
        if self.wrong:
            pytest.fail("\n".join([f"{len(self.wrong)} steps went wrong:", *self.wrong]), pytrace=False)


def prepared(history: History, case: Case) -> None:
    for new in case.before:
        Do(0, new).go(history)
    history.wait(0)


def moments(count: int) -> list[tuple[int, bool]]:
    """Before and after each call."""
    return some([(nth, after) for nth in range(1, count + 1) for after in (False, True)])


@every_case
def test_client_that_crashes(begin: Begin, case: Case) -> None:
    """The next client completes or undoes what it has begun."""
    with begin(SERVED) as history:
        prepared(history, case)
        history.seats[0].plan.forget()
        Do(0, case.what).go(history)
        trace = history.seats[0].plan.trace()
        history.finish()
    found = Found()
    for nth, after in moments(len(trace)):
        fault = ClientDies(nth, after)
        with found.at(f"{fault} of {len(trace)}, {trace[nth - 1]}"), begin(SERVED) as history:
            prepared(history, case)
            Do(0, case.what, fault).go(history)
            assert history.seats[0].client is None, "it has not died: a write has fewer steps than before"
            history.finish()
    found.tell()


@every_case
@pytest.mark.parametrize("member", [0, 1], ids=["east", "west"])
def test_member_that_dies(begin: Begin, case: Case, member: int) -> None:
    """The write is answered CKR_OK and is done, or is answered an error and has made nothing."""
    with begin(SERVED) as history:
        prepared(history, case)
        history.hsms[member].plan.forget()
        Do(0, case.what).go(history)
        trace = history.hsms[member].plan.trace()
        history.finish()
    assert trace, "the write does not reach the member"
    found = Found()
    for nth, after in moments(len(trace)):
        fault = MemberDies(member, nth, after)
        with found.at(f"{fault} of {len(trace)}, {trace[nth - 1]}"), begin(SERVED) as history:
            prepared(history, case)
            Do(0, case.what, fault).go(history)
            history.finish()
    found.tell()


# ---- a member comes back

MISSED: dict[str, Sequence[Step]] = {
    "new objects": [Do(0, New("data")), Do(0, New("aes")), Do(0, New("ec"))],
    "changes": [Do(0, Rename(0)), Do(0, Rename(1)), Do(0, Rename(3))],
    "destructions": [Do(0, Destroy(0)), Do(0, Destroy(0)), Do(0, Destroy(0))],
}


def returning(history: History, missed: Sequence[Step]) -> None:
    before: list[Step] = [Do(0, New("data")), Do(0, New("aes")), Do(0, New("ec")), Kill(0)]
    for step in [*before, *missed, GiveBack(0)]:
        step.go(history)


def in_process(history: History, fault: Fault) -> bool:
    return history.wait(0, fault)


def in_new_process(history: History, fault: Fault) -> bool:
    return history.enter(0, fault) and history.wait(0)


@pytest.mark.parametrize("missed", MISSED.values(), ids=MISSED)
@pytest.mark.parametrize("recover", [in_process, in_new_process])
def test_client_that_crashes_while_it_brings_a_member_up_to_date(
    begin: Begin, missed: Sequence[Step], recover: Callable[[History, Fault], bool]
) -> None:
    with begin(SERVED) as history:
        returning(history, missed)
        history.seats[0].plan.forget()
        assert recover(history, None)
        trace = history.seats[0].plan.trace()
        history.finish()
    found = Found()
    for nth, after in moments(len(trace)):
        fault = ClientDies(nth, after)
        with found.at(f"{fault} of {len(trace)}, {trace[nth - 1]}"), begin(SERVED) as history:
            returning(history, missed)
            recover(history, fault)
            assert history.seats[0].client is None, (
                "it has not died: the recovery has fewer steps than before"
            )
            history.finish()
    found.tell()
