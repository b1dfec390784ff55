"""What comes next after a member's answer, and which members serve: decisions as functions of values."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from pkcs11_ha.core.codes import Code
from pkcs11_ha.spec.functions import Effect, Phase


class Verdict(enum.Enum):
    """What to do with an answer that is not clean."""

    ANSWER = "answer"  # it is the application's answer
    LOSE = "lose"  # the member is lost; go on with another
    LOSE_AND_TELL = "lose and tell"  # the member is lost, and what it did is not known: CKR_DEVICE_ERROR
    SUSPECT = "suspect"  # go on with another, whose success would prove this one at fault
    PROBE = "probe"  # nobody else can do it: ask the member how it is
    ELSEWHERE = "elsewhere"  # go on with another; nobody is at fault
    NEW_SESSION = "new session"
    NEW_LOGIN = "new login"
    NEW_HANDLES = "new handles"
    NEW_LIBRARY = "new library"


@dataclass(frozen=True)
class Answer:
    """The circumstances of one answer of one member."""

    code: Code
    effect: Effect
    phase: Phase
    sent: bool  # the function itself was called; False: its session could not even be opened
    makes_token_objects: bool
    other_operations: bool  # the session has an operation under way beside the one that this call starts
    can_move: bool  # and what the session has under way may be repeated elsewhere
    logged_in: bool  # the virtual token is
    repaired: frozenset[Code]  # classes for which this call had a repair already


_REPAIRS = {
    Code.SESSION: Verdict.NEW_SESSION,
    Code.LOGIN: Verdict.NEW_LOGIN,
    Code.HANDLE: Verdict.NEW_HANDLES,
    Code.LIBRARY: Verdict.NEW_LIBRARY,
    Code.OPERATION: Verdict.NEW_SESSION,
}


def repeatable(answer: Answer) -> bool:
    """Whether the function may be called again although the first outcome is not known.

    A token write is not repeated blindly, a try of a PIN never; what was not sent may always be.
    """
    if not answer.sent:
        return True
    match answer.effect:
        case Effect.READ | Effect.CRYPTO | Effect.LOCAL:
            return True
        case Effect.CREATE:
            return not answer.makes_token_objects
        case Effect.WRITE | Effect.CREDENTIAL:
            return False


def judge(answer: Answer) -> Verdict:
    """The verdict on one answer."""
    code = answer.code
    if code is Code.CLEAN:
        return Verdict.ANSWER
    if code is Code.DEAD or (code in (Code.SESSION, Code.LIBRARY) and code in answer.repaired):
        return Verdict.LOSE if repeatable(answer) else Verdict.LOSE_AND_TELL
    if code is Code.SUSPECT:
        return Verdict.SUSPECT if repeatable(answer) and answer.can_move else Verdict.PROBE
    if code in (Code.BUSY, Code.CAPABILITY):
        return Verdict.ELSEWHERE if answer.can_move else Verdict.ANSWER
    if code is Code.LOGIN and not answer.logged_in:
        return Verdict.ANSWER
    if code is Code.OPERATION and not _stale_operation(answer):
        return Verdict.ANSWER
    if code in answer.repaired:
        return Verdict.ELSEWHERE if repeatable(answer) and answer.can_move else Verdict.ANSWER
    return _REPAIRS[
        code
    ]  # an operation that cannot be begun again is found lost with its session, and said so


def _stale_operation(answer: Answer) -> bool:
    """The member session is left over in an operation that the virtual session knows nothing of, or the other
    way round: a new one cures it, unless the application itself has another operation under way."""
    return not (answer.phase is Phase.INIT and answer.other_operations)


@dataclass(frozen=True)
class Standing:
    """One member of a group: is it there, and what is it for."""

    up: bool
    standby: bool
    drained: bool = False  # by an operator


def serving(members: Sequence[Standing]) -> int:
    """The members that take new work, as a mask: the active ones; standbys when no active one is left."""
    ready = [(1 << i, m.standby) for i, m in enumerate(members) if m.up and not m.drained]
    active = sum(bit for bit, standby in ready if not standby)
    return active or sum(bit for bit, _ in ready)
