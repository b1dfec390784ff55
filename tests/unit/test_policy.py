"""What comes next after an answer, over every circumstance there is, and who serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_ha.core.codes import Code
from pkcs11_ha.core.policy import Answer, Standing, Verdict, judge, repeatable, serving
from pkcs11_ha.spec.functions import FUNCTIONS, Effect, Phase

REPAIRS = {
    Verdict.NEW_SESSION,
    Verdict.NEW_LOGIN,
    Verdict.NEW_HANDLES,
    Verdict.NEW_LIBRARY,
}
ENDS = {Verdict.ANSWER, Verdict.LOSE_AND_TELL, Verdict.PROBE}
"""Verdicts after which the function is not called again for this call."""

REPAIRABLE = (Code.SESSION, Code.LOGIN, Code.HANDLE, Code.LIBRARY, Code.OPERATION)
# Of a call that was answered so, nobody knows whether it was done.
AMBIGUOUS = {Code.DEAD, Code.SUSPECT}


def every_answer() -> Iterator[Answer]:
    """The whole input space: 368,640 of them."""
    subsets = [
        frozenset(some)
        for some in chain.from_iterable(combinations(REPAIRABLE, n) for n in range(len(REPAIRABLE) + 1))
    ]
    flags = (False, True)
    yield from (
        Answer(*circumstances)
        for circumstances in product(Code, Effect, Phase, flags, flags, flags, flags, flags, subsets)
    )


@pytest.fixture(scope="module")
def judged() -> list[tuple[Answer, Verdict]]:
    return [(answer, judge(answer)) for answer in every_answer()]


Judged = list[tuple[Answer, Verdict]]


def broken(judged: Judged, rule: Callable[[Answer, Verdict], bool]) -> list[tuple[Answer, Verdict]]:
    """The first few that break a rule."""
    return [(answer, verdict) for answer, verdict in judged if not rule(answer, verdict)][:3]


def test_clean_answer_is_always_the_application_s(judged: Judged) -> None:
    assert not broken(judged, lambda a, v: a.code is not Code.CLEAN or v is Verdict.ANSWER)


def test_write_or_pin_that_may_have_been_done_is_never_repeated(judged: Judged) -> None:
    def once(answer: Answer, verdict: Verdict) -> bool:
        writes = answer.effect in (Effect.WRITE, Effect.CREDENTIAL) or (
            answer.effect is Effect.CREATE and answer.makes_token_objects
        )
        ambiguous = answer.code in AMBIGUOUS or (
            answer.code is Code.SESSION and Code.SESSION in answer.repaired
        )
        return not (writes and ambiguous and answer.sent) or verdict in ENDS - {Verdict.ANSWER}

    assert not broken(judged, once)


def test_what_never_reached_a_member_is_never_reported_as_perhaps_done(judged: Judged) -> None:
    assert not broken(judged, lambda a, v: a.sent or v is not Verdict.LOSE_AND_TELL)


def test_what_changes_nothing_is_always_repeatable(judged: Judged) -> None:
    harmless = (Effect.READ, Effect.CRYPTO, Effect.LOCAL)
    assert not broken(judged, lambda a, _: a.effect not in harmless or repeatable(a))


def test_dead_member_is_lost_whatever_it_was_asked(judged: Judged) -> None:
    assert not broken(
        judged, lambda a, v: a.code is not Code.DEAD or v in (Verdict.LOSE, Verdict.LOSE_AND_TELL)
    )


def test_only_a_dead_member_is_lost_without_another_s_word(judged: Judged) -> None:
    """A second time after a new session, or a new start of the library, is as good as dead."""

    def rule(answer: Answer, verdict: Verdict) -> bool:
        lost = verdict in (Verdict.LOSE, Verdict.LOSE_AND_TELL)
        twice = answer.code in (Code.SESSION, Code.LIBRARY) and answer.code in answer.repaired
        return not lost or answer.code is Code.DEAD or twice

    assert not broken(judged, rule)


def test_suspicion_goes_to_another_member_or_to_a_probe(judged: Judged) -> None:
    assert not broken(
        judged, lambda a, v: a.code is not Code.SUSPECT or v in (Verdict.SUSPECT, Verdict.PROBE)
    )


def test_busy_or_incapable_member_is_never_at_fault(judged: Judged) -> None:
    assert not broken(
        judged,
        lambda a, v: a.code not in (Code.BUSY, Code.CAPABILITY) or v in (Verdict.ELSEWHERE, Verdict.ANSWER),
    )


def test_no_repair_is_made_twice_for_one_call(judged: Judged) -> None:
    """So every call ends: each further turn uses up a member or a kind of repair."""
    assert not broken(judged, lambda a, v: v not in REPAIRS or a.code not in a.repaired)


def test_operation_that_cannot_be_repeated_does_not_move(judged: Judged) -> None:
    moving = (Verdict.SUSPECT, Verdict.ELSEWHERE)
    assert not broken(judged, lambda a, v: a.can_move or v not in moving)


def test_pin_is_not_sent_again_for_an_application_that_is_not_logged_in(judged: Judged) -> None:
    assert not broken(judged, lambda a, v: a.logged_in or v is not Verdict.NEW_LOGIN)
    assert not broken(judged, lambda a, v: a.code is Code.LOGIN or v is not Verdict.NEW_LOGIN)


def test_second_operation_is_refused_where_the_application_has_begun_it_itself(judged: Judged) -> None:
    assert not broken(
        judged,
        lambda a, v: (
            not (a.code is Code.OPERATION and a.phase is Phase.INIT and a.other_operations)
            or v is Verdict.ANSWER
        ),
    )


EVERYDAY = Answer(
    code=Code.CLEAN,
    effect=Effect.CRYPTO,
    phase=Phase.SINGLE,
    sent=True,
    makes_token_objects=False,
    other_operations=False,
    can_move=True,
    logged_in=True,
    repaired=frozenset(),
)


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (Code.CLEAN, Verdict.ANSWER),
        (Code.DEAD, Verdict.LOSE),
        (Code.SUSPECT, Verdict.SUSPECT),
        (Code.BUSY, Verdict.ELSEWHERE),
        (Code.CAPABILITY, Verdict.ELSEWHERE),
        (Code.SESSION, Verdict.NEW_SESSION),
        (Code.LOGIN, Verdict.NEW_LOGIN),
        (Code.HANDLE, Verdict.NEW_HANDLES),
        (Code.OPERATION, Verdict.NEW_SESSION),
        (Code.LIBRARY, Verdict.NEW_LIBRARY),
    ],
)
def test_signature_is_made_elsewhere_or_after_a_repair(code: Code, verdict: Verdict) -> None:
    from dataclasses import replace

    assert judge(replace(EVERYDAY, code=code)) is verdict


def test_functions_that_spend_a_pin_or_write_are_marked_so() -> None:
    """The table decides what is repeated; a row marked wrongly would undo all of the above."""
    effects = {row.name: row.effect for row in FUNCTIONS}
    for name in ("C_Login", "C_LoginUser", "C_SetPIN", "C_InitPIN", "C_InitToken"):
        assert effects[name] is Effect.CREDENTIAL
    for name in ("C_DestroyObject", "C_SetAttributeValue"):
        assert effects[name] is Effect.WRITE
    making = {"CreateObject", "CopyObject", "GenerateKey", "GenerateKeyPair", "UnwrapKey", "DeriveKey"}
    making |= {"EncapsulateKey", "DecapsulateKey", "UnwrapKeyAuthenticated"}
    assert {name for name, effect in effects.items() if effect is Effect.CREATE} == {f"C_{n}" for n in making}


# ---- who serves

standings = st.lists(st.builds(Standing, up=st.booleans(), standby=st.booleans()), max_size=32)


def members(mask: int) -> set[int]:
    return {index for index in range(32) if mask >> index & 1}


@given(standings)
def test_active_members_serve_and_standbys_only_when_none_is_left(group: list[Standing]) -> None:
    active = {i for i, member in enumerate(group) if member.up and not member.standby}
    standby = {i for i, member in enumerate(group) if member.up and member.standby}
    assert members(serving(group)) == (active or standby)


@given(standings)
def test_nobody_serves_who_is_away(group: list[Standing]) -> None:
    assert all(group[i].up for i in members(serving(group)))


@given(standings)
def test_somebody_serves_as_long_as_anybody_is_up(group: list[Standing]) -> None:
    assert (serving(group) == 0) == (not any(member.up for member in group))


def test_empty_group_is_served_by_nobody() -> None:
    assert serving([]) == 0
