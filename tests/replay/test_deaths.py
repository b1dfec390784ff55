"""Deaths at the worst of times: one after another, in the middle of a call, in the middle of a replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from demo.members import SoftToken
from tests.chaos.crash import CrashPlan
from tests.replay.cases import CASES, Case
from tests.replay.conftest import Start
from tests.replay.killable import behind, dying
from tests.replay.scripts import Use, run, stops

SOME = {
    "digest in parts": "CKM_SHA256",
    "digest with a key": "CKM_SHA256",
    "sign in parts": "CKM_SHA256_RSA_PKCS",
    "verify in parts": "CKM_SHA256_HMAC",
    "encrypt in parts": "CKM_AES_CBC_PAD",
    "decrypt in parts": "CKM_AES_CBC",
    "encrypt": "CKM_AES_GCM",
    "sign": "CKM_AES_CMAC",
}
EACH = pytest.mark.parametrize(
    "case", [case for case in CASES if SOME.get(case.operation.name) == case.mechanism.name], ids=str
)


@pytest.fixture
def plan(directory: Path) -> Iterator[CrashPlan]:
    with closing(CrashPlan(directory / "plan", every=True)) as made:
        yield made


def given(case: Case, undisturbed: Use) -> bytes:
    return run(case.takes.script(undisturbed)) if case.takes else b""


@EACH
def test_every_member_but_the_last_dies_within_one_operation(
    start: Start, soft_tokens: list[SoftToken], undisturbed: Use, case: Case
) -> None:
    """One before each call, for as long as there is another one."""
    mortal = start(*map(behind, soft_tokens), recovery={"interval_s": 3600})
    use, taken = mortal.use(), given(case, undisturbed)
    dead: list[str] = []

    def die(_number: int, _name: str) -> None:
        if len(dead) < 2:
            dead.append(mortal.kill_serving(use))

    assert run(case.script(use, taken), die) == run(case.script(undisturbed, taken))
    assert len(set(dead)) == 2
    assert mortal.app.away() == set(dead)


@EACH
def test_operation_goes_to_and_fro(start: Start, undisturbed: Use, case: Case) -> None:
    """Its member dies before each call; the one that died before is back then."""
    mortal = start()
    use, taken = mortal.use(), given(case, undisturbed)
    dead: list[str] = []

    def die(_number: int, _name: str) -> None:
        mortal.wait_for_all()
        dead.append(mortal.kill_serving(use))

    assert run(case.script(use, taken), die) == run(case.script(undisturbed, taken))
    assert len(dead) == len(stops(case.script(undisturbed, taken)))
    assert all(one != other for one, other in pairwise(dead))


@pytest.mark.parametrize("after", [False, True], ids=["before its work", "after its work"])
@EACH
def test_member_dies_in_any_call(
    start: Start,
    soft_tokens: list[SoftToken],
    crash_library: Path,
    plan: CrashPlan,
    undisturbed: Use,
    case: Case,
    after: bool,
) -> None:
    east, west = soft_tokens[:2]
    mortal = start(dying(east, crash_library, plan), behind(west), balance="primary-first")
    use, taken = mortal.use(), given(case, undisturbed)
    right = run(case.script(undisturbed, taken))
    assert run(case.script(use, taken)) == right
    deaths = 0
    while True:
        plan.arm(deaths + 1, after=after)
        assert run(case.script(use, taken)) == right, f"death in call {deaths + 1}"
        if plan.disarm():
            break
        deaths += 1
        mortal.wait_for_all()
    assert deaths > len(stops(case.script(undisturbed, taken)))  # each call and the Init


@EACH
def test_next_member_dies_in_any_call_of_the_replay(
    start: Start,
    soft_tokens: list[SoftToken],
    crash_library: Path,
    plan: CrashPlan,
    undisturbed: Use,
    case: Case,
) -> None:
    east, west, north = soft_tokens
    workers = behind(east), dying(west, crash_library, plan), behind(north)
    mortal = start(*workers, balance="primary-first")
    use, taken = mortal.use(), given(case, undisturbed)
    right = run(case.script(undisturbed, taken))
    last = len(stops(case.script(undisturbed, taken))) - 1
    deaths, has_died = 0, True
    while has_died:
        mortal.wait_for_all()

        def die(number: int, _name: str, nth: int = deaths + 1) -> None:
            if number == last:
                plan.arm(nth, after=False)
                assert mortal.kill_serving(use) == "east"

        assert run(case.script(use, taken), die) == right, f"west died in call {deaths + 1}"
        has_died = not plan.disarm()
        deaths += has_died
        assert mortal.app.served(use.session) == ("north" if has_died else "west")
    assert deaths > (1 if case.operation.parts else 0)
