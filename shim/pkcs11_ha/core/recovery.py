"""When a lost member is tried again: the check of the reference page, as arithmetic on a clock that is passed in.

    if (disconnected_member > 0 and recover_attempt_count < N and time_now - last_recover_attempt > X)

Counted per member, so that one that returns does not reset the limit of one that does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

UNLIMITED = -1
NEVER_NS = (1 << 64) - 1


@dataclass(frozen=True)
class Rule:
    """X in nanoseconds and N; N = -1 is without limit, 0 is off."""

    interval_ns: int
    attempts: int


@dataclass(frozen=True)
class Outage:
    """A member that is away: attempts that failed since, and when the last one ended (at first: the loss)."""

    last_ns: int
    failed: int = 0
    stopped: bool = False  # its PIN was refused: a further attempt could lock the token
    wanted: bool = False  # at once, whatever the rule says: it is new, or an operator asks for it


def due_at_ns(outage: Outage, rule: Rule) -> int:
    """The moment *after* which the next attempt is due (strictly more than X); NEVER_NS if none is."""
    if outage.wanted and not outage.stopped:
        return 0
    exhausted = rule.attempts != UNLIMITED and outage.failed >= rule.attempts
    return NEVER_NS if outage.stopped or exhausted else outage.last_ns + rule.interval_ns


def is_due(outage: Outage, rule: Rule, now_ns: int) -> bool:
    """Whether an attempt is to be made now."""
    return now_ns > due_at_ns(outage, rule)


def after_failure(outage: Outage, now_ns: int, pin_refused: bool) -> Outage:
    """The outage after one more failed attempt, which ended now."""
    stopped = outage.stopped or pin_refused
    return replace(outage, last_ns=now_ns, failed=outage.failed + 1, stopped=stopped, wanted=False)


def at_once(outage: Outage) -> Outage:
    """The outage of which an operator asks for an end: all attempts are left again, and the next is due.

    A PIN that was refused is not tried again by that: it could lock the token.
    """
    return outage if outage.stopped else replace(outage, failed=0, wanted=True)


def is_exhausted(outage: Outage, rule: Rule) -> bool:
    """Whether the last permitted attempt has failed."""
    return rule.attempts != UNLIMITED and outage.failed >= rule.attempts
