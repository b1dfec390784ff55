"""The checker on histories made by hand: what it must say of each, and that it says nothing of a good one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest

from tests import p11
from tests.soak import plan
from tests.soak.checker import SECOND, Report, check
from tests.soak.history import (
    Client,
    Did,
    Fault,
    Given,
    Held,
    Left,
    NotTakenIn,
    Over,
    Pin,
    Record,
    Seen,
    Setting,
    Settled,
    Wish,
    Writer,
    Wrote,
    read,
)

MEMBERS = ["east", "west", "north"]
SETTING = Setting("domain", 1, MEMBERS, SECOND, SECOND, 3, ["make"])
ALIVE = [Settled(0, member) for member in MEMBERS]


def at(seconds: float) -> int:
    return round(seconds * SECOND)


def struck(*members: str, begin: float = 10, end: float = 11, settled: float = 12) -> list[Record]:
    """Each of them from `begin` to `end`, and back with every client later."""
    return [
        *(Fault(at(begin), 1, "kill", member) for member in members),
        *(Over(at(end), 1, "kill", member) for member in members),
        *(Settled(at(settled), member) for member in members),
    ]


def did(start: float, took: float = 0.1, rv: str = "CKR_OK", name: str = "sign", why: str = "") -> Did:
    return Did("a", 0, name, at(start), at(start + took), at(took), "C_Sign", rv, why)


def judge(driver: Sequence[Record], *clients: Record) -> Report:
    return check([SETTING, *ALIVE, *driver], [clients])


def rules(driver: Sequence[Record], *clients: Record) -> dict[str, int]:
    return dict(judge(driver, *clients).counted)


def test_nothing_is_said_of_a_good_history() -> None:
    driver = [*struck("east", "west"), Client(at(1), "a", "began"), Client(at(99), "a", "left")]
    report = judge(driver, did(1), did(10.5), did(20), Pin(at(1), "a", "east", "p", p11.CKR_OK))
    assert report.counted == {}
    assert report.operations == {"sign": 3}
    assert report.faults == {"kill": 2}


def test_a_call_must_not_fail_while_a_member_lives() -> None:
    assert rules(struck("east", "west"), did(10.5, rv="CKR_DEVICE_ERROR")) == {"call failed": 1}
    assert rules([], did(1, rv="CKR_DEVICE_ERROR")) == {"call failed": 1}


def test_a_call_may_fail_when_only_those_live_that_have_not_got_its_mechanism() -> None:
    setting = SETTING._replace(unable={"north": ["cbc"]})
    driver = [setting, *ALIVE, *struck("east", "west")]
    failed = [did(10.5, rv="CKR_DEVICE_ERROR", name=name) for name in ("cbc", "sign")]
    assert dict(check(driver, [failed]).counted) == {"call failed": 1}


def test_a_call_may_fail_when_nobody_lived_all_the_time_of_it() -> None:
    everybody = struck(*MEMBERS)
    for start in (9.95, 10.5, 11.95):
        report = judge(everybody, did(start, rv="CKR_DEVICE_ERROR"))
        assert (report.counted, report.excused) == ({}, {"CKR_DEVICE_ERROR": 1})
    assert rules(everybody, did(9.8, rv="CKR_DEVICE_ERROR")) == {"call failed": 1}
    assert rules(everybody, did(12.1, rv="CKR_DEVICE_ERROR")) == {"call failed": 1}


def test_a_member_lives_again_when_its_last_fault_is_over() -> None:
    """It was settled after the first, with the second under way."""
    others = struck("west", "north", begin=5, end=90, settled=91)
    driver = [
        *others[:2],
        Fault(at(10), 2, "slow", "east"),
        Fault(at(11), 3, "kill", "east"),
        Over(at(12), 2, "slow", "east"),
        Settled(at(13), "east"),
        Over(at(14), 3, "kill", "east"),
        Settled(at(15), "east"),
    ]
    assert rules(driver, did(13.5, rv="CKR_DEVICE_ERROR")) == {}
    assert rules(driver, did(15.5, rv="CKR_DEVICE_ERROR")) == {"call failed": 1}


def test_wrong_results_are_never_excused() -> None:
    assert rules(struck(*MEMBERS), did(10.5, why="the signature does not verify")) == {"wrong result": 1}


def test_handles_that_end_with_a_member_are_told_apart() -> None:
    assert rules(struck("east"), did(10.5, rv="CKR_SESSION_HANDLE_INVALID")) == {"handle lost": 1}
    assert rules(struck("east"), did(10.5, rv="CKR_KEY_HANDLE_INVALID")) == {"handle lost": 1}


def test_a_call_has_its_bound() -> None:
    """A limit and a second; for each member that is not well another limit, and what bringing it back may take.

    Three clients write one after the other.
    """
    assert rules([], did(1, took=1.9)) == {}
    assert rules([], did(1, took=2.1)) == {"too slow": 1}
    assert rules([], did(1, took=5.9, name="make")) == {}
    assert rules([], did(1, took=6.1, name="make")) == {"too slow": 1}
    assert rules(struck("east"), did(9.9, took=3.9)) == {}
    assert rules(struck("east"), did(9.9, took=4.1)) == {"too slow": 1}
    assert rules(struck("east", "west"), did(9.9, took=5.9)) == {}


def test_a_member_that_is_back_must_be_taken_in() -> None:
    assert rules([NotTakenIn(at(30), "east", "a")]) == {"not taken in": 1}


def test_clients_die_only_when_they_are_killed() -> None:
    assert rules([Client(at(3), "a", "killed"), Client(at(4), "a", "began")]) == {}
    assert rules([Client(at(3), "a", "ended with status -11")]) == {"client died": 1}


# ---- token objects


def wrote(
    uid: str, label: str | None, rv: str = "CKR_OK", when: float = 1, kind: str = "aes"
) -> list[Record]:
    return [
        Wish("a", at(when), kind, uid, label),
        Wrote("a", at(when), at(when + 0.1), kind, uid, rv),
    ]


def held(**labels: Sequence[str]) -> Sequence[Record]:
    """AES keys by member, each with a proof that goes with its uid."""
    return [
        Held(member, "aes", label, f"proof {label[:1]}") for member, each in labels.items() for label in each
    ] + [Held(member, "data", "beacon", "") for member in MEMBERS]


BEACON: Record = Given("data", "beacon", "")


def objects(driver: Sequence[Record], *clients: Record) -> dict[str, int]:
    return rules([BEACON, *driver], *clients)


def test_what_was_made_is_on_every_member() -> None:
    made = wrote("x", "x")
    assert objects(held(east=["x"], west=["x"], north=["x"]), *made) == {}
    assert objects(held(east=["x"], west=["x"]), *made) == {"key lost": 1, "members differ": 1}
    assert objects(held(), *made) == {"key lost": 3}


def test_what_was_destroyed_does_not_come_back() -> None:
    both = wrote("x", "x") + wrote("x", None, when=2)
    assert objects(held(), *both) == {}
    assert objects(held(north=["x"]), *both) == {"key resurrected": 1, "members differ": 1}


def test_what_nobody_has_made_must_not_be_there() -> None:
    assert objects(held(east=["x"], west=["x"], north=["x"])) == {"key resurrected": 3}


def test_the_last_name_is_the_one_that_counts() -> None:
    both = wrote("x", "x") + wrote("x", "x~1", when=2)
    assert objects(held(east=["x~1"], west=["x~1"], north=["x~1"]), *both) == {}
    assert objects(held(east=["x~1"], west=["x~1"], north=["x"]), *both) == {
        "object wrong": 1,
        "members differ": 1,
    }
    assert objects(held(east=["x~1", "x~1"], west=["x~1"], north=["x~1"]), *both)["object wrong"] == 1


def test_of_a_write_that_nobody_ended_both_outcomes_are_right_but_the_same_everywhere() -> None:
    wish = wrote("x", "x")[:1]
    assert objects(held(east=["x"], west=["x"], north=["x"]), *wish) == {}
    assert objects(held(), *wish) == {}
    assert objects(held(east=["x"], west=["x"]), *wish) == {"members differ": 1}


def test_a_making_that_failed_has_left_nothing_if_somebody_was_there() -> None:
    failed = wrote("x", "x", rv="CKR_DEVICE_ERROR", when=10.5)
    everywhere = held(east=["x"], west=["x"], north=["x"])
    assert objects([*struck(*MEMBERS), *everywhere], *failed) == {}
    assert objects([*struck("east", "west"), *everywhere], *failed) == {"key resurrected": 3}


def test_a_destruction_that_failed_may_have_happened() -> None:
    both = wrote("x", "x") + wrote("x", None, rv="CKR_DEVICE_ERROR", when=2)
    assert objects(held(), *both) == {}
    assert objects(held(east=["x"], west=["x"], north=["x"]), *both) == {}


def test_a_key_is_the_same_for_ever_and_everywhere() -> None:
    made = wrote("x", "x")
    everywhere = held(east=["x"], west=["x"], north=["x"])
    assert objects(everywhere, *made, Seen("a", "aes", "x", "proof x")) == {}
    assert objects(everywhere, *made, Seen("a", "aes", "x", "proof y")) == {"another key": 3}
    assert objects([*everywhere[1:], Held("east", "aes", "x", "proof y")], *made) == {"another key": 1}


def test_provisioned_keys_stay() -> None:
    assert rules([BEACON, *held()[:2]]) == {}
    gone = [BEACON, Given("rsa", "rsa", ""), *held()]
    assert rules(gone) == {"key lost": 3}


def test_nothing_of_the_groups_own_is_left_under_way() -> None:
    assert rules([Left("east", "a write that was announced")]) == {"left over": 1}


# ---- PINs


def pin(when: float, rv: int, member: str = "east", client: str = "a", value: str = "p") -> Pin:
    return Pin(at(when), client, member, value, rv)


RIGHT = pin(0.1, p11.CKR_OK, "west")


def test_a_refused_pin_is_not_tried_again() -> None:
    assert rules([], RIGHT, pin(1, p11.CKR_PIN_INCORRECT)) == {}
    twice = [pin(1, p11.CKR_PIN_INCORRECT), pin(2, p11.CKR_PIN_INCORRECT)]
    assert rules([], RIGHT, *twice) == {"PIN tried twice": 1}
    assert rules([], RIGHT, twice[0], pin(2, p11.CKR_OK)) == {"PIN tried twice": 1}


def test_another_client_or_the_application_may_try_it_again() -> None:
    twice = [pin(1, p11.CKR_PIN_INCORRECT), pin(2, p11.CKR_PIN_INCORRECT)]
    assert rules([], RIGHT, twice[0], pin(2, p11.CKR_PIN_INCORRECT, client="b")) == {}
    assert rules([], RIGHT, did(1.5, took=0.6, name="login"), *twice) == {}
    assert rules([Client(at(1.5), "a", "began")], RIGHT, *twice) == {}
    assert rules([], RIGHT, did(0.9, took=1.2, name="login"), *twice) == {"PIN tried twice": 1}


def test_a_pin_that_is_nobodys_costs_one_try_on_one_member() -> None:
    one = pin(1, p11.CKR_PIN_INCORRECT, client="", value="wrong")
    other = pin(1.1, p11.CKR_PIN_INCORRECT, "west", client="", value="wrong")
    assert rules([], RIGHT, one) == {}
    assert rules([], RIGHT, one, other) == {"PIN tried twice": 1}


# ---- the history and the plan


def test_a_history_is_read_as_it_was_written_and_a_cut_line_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "history"
    records: list[Record] = [SETTING, *ALIVE, did(1), *wrote("x", None), Client(4, "a", "killed")]
    writer = Writer(file)
    writer.write(*records[:3])
    writer.close()
    with file.open("ab") as cut:
        cut.write(b'["Did","a",0,"si')
    writer = Writer(file)
    writer.write(*records[3:])
    writer.close()
    assert list(read(file)) == records


@pytest.mark.parametrize("arena", plan.ARENAS, ids=lambda arena: arena.name)
def test_each_step_spares_a_member_that_can_do_everything(arena: plan.Arena) -> None:
    seats = {seat.name: seat for seat in arena.seats}
    drawn = list(islice(plan.steps(arena, ["a", "b"], seed=7), 400))
    for step in drawn:
        targets = [strike.target for strike in step.strikes]
        assert len(targets) == len(set(targets))
        if step.spare is None:
            assert {strike.kind for strike in step.strikes} == {plan.BLACKOUT}
        else:
            assert step.spare not in targets
            assert seats[step.spare].complete
        for strike in step.strikes:
            forms = plan.KINDS[strike.kind].forms
            assert (strike.target in ("a", "b")) if forms is None else (seats[strike.target].form in forms)
    assert {strike.kind for step in drawn for strike in step.strikes} == set(plan.kinds_for(arena))
    assert len(plan.kinds_for(arena)) >= 8


def test_a_plan_is_its_seeds() -> None:
    def drawn(seed: int) -> list[plan.Step]:
        return list(islice(plan.steps(plan.ARENAS[0], ["a"], seed), 50))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
