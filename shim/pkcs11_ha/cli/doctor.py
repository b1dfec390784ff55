"""`p11ha doctor`: what is wrong with an installation and its configuration, and the cure; facts in, findings out."""

from __future__ import annotations

import shlex
import stat
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pkcs11_ha import ck
from pkcs11_ha.cli.facts import MODULE, Build, Facts, File, MemberFacts, User
from pkcs11_ha.cli.segments import Skipped

WRONG, NOTE, OK = "wrong", "note", "ok"

_USUAL_INTERVAL_S = 60
_ROOM_BYTES = 10 << 20
_LARGE_BYTES = 1 << 30
_CLOCK_OFF_S = 60
_NAMED = 3  # mechanisms named in a line
_BEFORE = datetime(2025, 1, 1, tzinfo=UTC).timestamp()  # no clock that runs right shows a time before


@dataclass(frozen=True)
class Finding:
    """One thing: how bad, about what, and in one line each what it is and what to do."""

    level: str
    about: str
    text: str
    cure: str = ""


def examine(facts: Facts, verbose: bool = False) -> list[Finding]:
    """What is wrong first, then notes; with `verbose` also what was looked at and is well, and each mechanism."""
    findings: list[Finding] = []
    for about, check in CHECKS.items():
        found = list(check(facts))
        findings += found
        if verbose and not found:
            findings.append(Finding(OK, about, "nothing to say"))
    findings += _mechanisms(facts, verbose)
    return sorted(findings, key=lambda finding: (WRONG, NOTE, OK).index(finding.level))


def is_good(findings: Iterable[Finding]) -> bool:
    """Whether nothing is wrong; notes do not count."""
    return all(finding.level != WRONG for finding in findings)


# ---- the library


def _build(facts: Facts) -> Iterator[Finding]:
    about, build = "build", facts.build
    if build is None:
        yield Finding(
            WRONG, about, f"{MODULE} is not found", "make build, or set PKCS11_HA_MODULE to its path"
        )
        return
    if build.problem:
        yield Finding(
            WRONG, about, f"{build.path} cannot be loaded: {build.problem}", "build or install it anew"
        )
        return
    if build.stamp != facts.stamp:
        text = f"{build.path} is of version {build.stamp or 'unknown'}, this command of {facts.stamp}"
        yield Finding(WRONG, about, text, "install both from one build: make build, make install")
    if build.python != facts.python:
        text = f"{build.path} was built for Python {build.python or '?'}, this command runs {facts.python}"
        yield Finding(WRONG, about, text, "use the p11ha that was installed with it")
    if build.stdlib and _at(facts, build.stdlib) is None:
        barrier = _barrier(facts, build.stdlib)
        if barrier:
            text = f"{facts.user.name} cannot enter {barrier}, where the Python of {build.path} is: {build.stdlib}"
            yield Finding(
                WRONG, about, text, "let applications in there, or build for a Python that all can read"
            )
        else:
            text = f"the Python that {build.path} was built for is gone: {build.stdlib}"
            yield Finding(WRONG, about, text, "install that Python again, or build anew for another")
    hosts = {member.host for member in facts.settings.members} if facts.settings else set()
    if "worker" in hosts and _at(facts, build.worker) is None:
        text = f'a member has host = "worker", and there is no {build.worker}'
        yield Finding(WRONG, about, text, "make install puts it beside the library")


def _at(facts: Facts, path: str) -> File | None:
    return facts.places[path][0].file


def _copies(facts: Facts) -> Iterator[Finding]:
    about = "copies"
    for path in facts.preloaded:
        if facts.build and path != facts.build.path:
            text = f"{path} is preloaded, and this command is of {facts.build.path}"
            yield Finding(WRONG, about, text, "correct LD_PRELOAD or /etc/ld.so.preload")
    for other in facts.others:
        yield _other(other, about)
    for member in facts.settings.members if facts.settings else ():
        if facts.places[member.module][0].path.endswith(f"/{MODULE}"):
            text = f"member {member.name} is this library itself: {member.module}"
            yield Finding(WRONG, about, text, "name the vendor's library as its module")


def _other(other: Build, about: str) -> Finding:
    text = f"there is another {MODULE}, {other.path}, of version {other.stamp or 'unknown'}"
    return Finding(NOTE, about, text, "see which of them applications are configured with; remove the other")


# ---- permissions


def _configuration(facts: Facts) -> Iterator[Finding]:
    if facts.problem:
        yield Finding(
            WRONG,
            "configuration",
            facts.problem,
            "make or correct the file; docs/configuration.md has the options",
        )
        return
    assert facts.settings
    yield from _writable("configuration", facts, facts.settings.path)


def _permissions(facts: Facts) -> Iterator[Finding]:
    about = "permissions"
    modules = [facts.build.path] if facts.build else []
    members = facts.settings.members if facts.settings else ()
    modules += [member.module for member in members if not member.host.startswith("unix:")]
    for path in dict.fromkeys(modules):
        yield from _writable(about, facts, path)
    for member in members:
        file = _at(facts, member.pin_source) if member.pin_source else None
        if member.pin_source and file and file.mode & 0o077:
            text = f"the PIN of {member.name} can be read or changed by others: {member.pin_source}"
            yield Finding(WRONG, about, text, f"chmod 600 {shlex.quote(member.pin_source)}")


def _writable(about: str, facts: Facts, path: str) -> Iterator[Finding]:
    """What others could put in the place of a file that runs in, or steers, processes that hold PINs."""
    for place in facts.places[path]:
        file = place.file
        if file is None:
            continue
        itself = place is facts.places[path][0]
        what = f"{path} can be" if itself else f"{place.path}, in which {path} lies, can be"
        sticky = stat.S_ISDIR(file.mode) and file.mode & stat.S_ISVTX
        if file.mode & stat.S_IWOTH and not sticky:
            yield Finding(
                WRONG, about, f"{what} written by everybody", f"chmod o-w {shlex.quote(place.path)}"
            )
        if file.uid not in (0, facts.uid, facts.user.uid):
            text = f"{what} changed by its owner, user {file.uid}, who is neither root nor runs this"
            yield Finding(NOTE, about, text, f"chown root {shlex.quote(place.path)}")


# ---- directories


def may(user: User, file: File, bits: int) -> bool:
    """Whether a file's mode lets the user do that (4 read, 2 write, 1 enter); access lists are not looked at."""
    if user.uid == 0:
        return True
    shift = 6 if user.uid == file.uid else 3 if file.gid in user.gids else 0
    return file.mode >> shift & bits == bits


def _barrier(facts: Facts, path: str) -> str:
    """The first directory above the path that the applications' user cannot enter; "" if there is none."""
    for place in reversed(facts.places[path][1:]):
        if place.file is not None and not may(facts.user, place.file, 1):
            return place.path
    return ""


def _state(facts: Facts) -> Iterator[Finding]:
    about, path = "state directory", facts.state_dir
    quoted, user = shlex.quote(path), facts.user
    file = _at(facts, path)
    if file is None:
        above = next(place.file for place in facts.places[path] if place.file is not None)
        if not may(user, above, 3):
            text = f"{path} is not there, and {user.name} cannot make it: status and requests do not work"
            yield Finding(NOTE, about, text, f"install -d -o {user.name} -m 750 {quoted}")
        return
    if not stat.S_ISDIR(file.mode):
        yield Finding(WRONG, about, f"{path} is no directory", "set PKCS11_HA_STATE to one")
        return
    if file.mode & stat.S_IWOTH and not file.mode & stat.S_ISVTX:
        text = f"{path} can be written by everybody, who could ask for recovery and drain members"
        yield Finding(WRONG, about, text, f"chmod o-w {quoted}")
    if file.uid not in (0, facts.uid, user.uid):
        text = f"{path} belongs to user {file.uid}, who is neither root nor {user.name}"
        yield Finding(WRONG, about, text, f"chown {user.name} {quoted}")
    elif not may(user, file, 3):
        text = f"{user.name} cannot write to {path}: status and requests do not work for its applications"
        yield Finding(NOTE, about, text, f"chgrp to a group of {user.name}'s, and chmod g+w {quoted}")
    if left := facts.found.left:
        text = f"status files of processes that are gone: {len(left)}, {left[0]} for one"
        yield Finding(
            NOTE, about, text, "nothing: the next application or p11ha status sweeps them; or remove them"
        )
    alike: defaultdict[str, list[Skipped]] = defaultdict(list)
    for each in facts.found.skipped:
        alike[each.cure].append(each)
    for cure, found in alike.items():
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        yield Finding(NOTE, about, f"{found[0]}{more}", cure)


def _log(facts: Facts) -> Iterator[Finding]:
    about, log, user = "log", facts.log, facts.user
    if log is None or facts.settings is None:
        return
    file = _at(facts, log.path)
    directory, above = facts.places[log.path][1].file, facts.places[log.path][1].path
    if directory is None:
        text = f"{above} is not there: events go to syslog"
        yield Finding(WRONG, about, text, f"install -d -o {user.name} {shlex.quote(above)}")
        return
    if barrier := _barrier(facts, log.path):
        text = f"{user.name} cannot enter {barrier}, so not write {log.path}"
        yield Finding(WRONG, about, text, f"chmod +x {shlex.quote(barrier)}, or another `log`")
    elif file is not None and not may(user, file, 2):
        text = f"{user.name} cannot write to {log.path}: its events go to syslog"
        yield Finding(WRONG, about, text, f"chown {user.name} {shlex.quote(log.path)}")
    elif file is None and not may(user, directory, 3):
        text = f"{user.name} cannot make a file in {above}: events go to syslog"
        yield Finding(WRONG, about, text, f"chown {user.name} {shlex.quote(above)}")
    elif facts.settings.ha.log_max_bytes and not may(user, directory, 3):
        text = f"{user.name} cannot rename files in {above}, so the log is not rotated"
        yield Finding(WRONG, about, text, f"chown {user.name} {shlex.quote(above)}")
    if log.free_bytes is not None and log.free_bytes < _ROOM_BYTES:
        text = f"{log.free_bytes >> 10} KiB are free in {above}"
        yield Finding(WRONG, about, text, "make room: a full disk loses the log, and events go to syslog")
    if log.free_files == 0:
        yield Finding(
            WRONG, about, f"no more file can be made in {above}: no inodes are free", "remove files there"
        )
    if not facts.settings.ha.log_max_bytes and log.size > _LARGE_BYTES:
        text = f"{log.path} has {log.size >> 20} MiB"
        yield Finding(NOTE, about, text, "set log_max_bytes in [ha], or have logrotate take care of it")


# ---- the group


def _recovery(facts: Facts) -> Iterator[Finding]:
    if facts.settings is None:
        return
    rule = facts.settings.recovery
    if rule.attempts == 0:
        text = "attempts = 0: a lost member never comes back by itself"
        yield Finding(NOTE, "recovery", text, "p11ha ha retry -1 (without limit) or a number")
    elif rule.interval_s < _USUAL_INTERVAL_S:
        text = f"interval_s = {rule.interval_s:g} is less than the usual {_USUAL_INTERVAL_S}"
        if rule.mode == "call":
            text += f", and a call waits up to {rule.connect_timeout_s:g} s for each attempt"
        yield Finding(NOTE, "recovery", text, f"p11ha ha interval {_USUAL_INTERVAL_S}")


_PIN_FLAGS = (
    (ck.CKF_USER_PIN_LOCKED, WRONG, "the user PIN is locked", "the security officer unlocks it (C_InitPIN)"),
    (
        ck.CKF_USER_PIN_FINAL_TRY,
        WRONG,
        "one more wrong PIN locks it",
        "log in with the right PIN, then see who does not",
    ),
    (
        ck.CKF_USER_PIN_TO_BE_CHANGED,
        WRONG,
        "the user PIN must be changed",
        "change it with the vendor's tool",
    ),
    (ck.CKF_USER_PIN_COUNT_LOW, NOTE, "a wrong PIN was tried", "see in the log who does (login.refused)"),
)


def _members(facts: Facts) -> Iterator[Finding]:
    about = "members"
    if facts.unread:
        yield Finding(
            WRONG,
            about,
            f"they cannot be looked at: {facts.unread}",
            "see the line on stderr, and p11ha check",
        )
    for member in facts.members:
        if member.drained:
            yield Finding(
                NOTE, about, f"{member.name} is drained", f"p11ha enable {member.name}, when it is well"
            )
            continue
        if member.why:
            cure = f"look at the device and its library; then p11ha recover {shlex.quote(member.group)} {member.name}"
            yield Finding(WRONG, about, f"{member.name} is away: {member.why}", cure)
            continue
        if not member.flags & ck.CKF_USER_PIN_INITIALIZED and member.flags & ck.CKF_LOGIN_REQUIRED:
            text = f"{member.name}: the user PIN was never set"
            yield Finding(WRONG, about, text, "the security officer sets it (C_InitPIN)")
        flag = next((row for row in _PIN_FLAGS if member.flags & row[0]), None)
        if flag:
            yield Finding(flag[1], about, f"{member.name}: {flag[2]}", flag[3])
    yield from _twins(facts.members)


def _twins(members: Sequence[MemberFacts]) -> Iterator[Finding]:
    by_serial: defaultdict[str, list[MemberFacts]] = defaultdict(list)
    for member in members:
        if member.serial:
            by_serial[member.serial].append(member)
    for serial, alike in by_serial.items():
        names = ", ".join(member.name for member in alike)
        labels = {member.label for member in alike}
        if len(labels) < len(alike):
            text = (
                f"{names} are one token (label {alike[0].label!r}, serial {serial!r}): no help to each other"
            )
            yield Finding(WRONG, "members", text, "give each member a `token` URI of its own, with serial=")
        elif len(alike) > 1:
            text = f"{names} have the same serial {serial!r}"
            yield Finding(NOTE, "members", text, "see that they are not one device")


def _mechanisms(facts: Facts, verbose: bool) -> Iterator[Finding]:
    """What some members of a group lack is not offered by the group."""
    for group in dict.fromkeys(member.group for member in facts.members):
        up = [member for member in facts.members if member.group == group and not member.why]
        if len(up) < 2:
            continue
        everywhere = frozenset.intersection(*(member.mechanisms for member in up))
        about = f"mechanisms of {group}"
        if not everywhere:
            cure = "see that the members are what they should be"
            yield Finding(WRONG, about, f"none is on all {len(up)} members", cure)
            continue
        for lacking, names in _by_absence(up, everywhere).items():
            where = f"on {len(up) - len(lacking)} of {len(up)} members (not {', '.join(lacking)})"
            cure = "the group offers what all its members have: update or configure those that lack it"
            for text in names if verbose else [_some(names)]:
                yield Finding(NOTE, about, f"{text} {where}", cure)
        if verbose:
            yield Finding(OK, about, f"{len(everywhere)} on all {len(up)} members")


def _by_absence(
    members: Sequence[MemberFacts], everywhere: frozenset[int]
) -> dict[tuple[str, ...], list[str]]:
    """Members that lack the same -> what they lack."""
    found: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for mechanism in sorted(frozenset.union(*(member.mechanisms for member in members)) - everywhere):
        lacking = tuple(member.name for member in members if mechanism not in member.mechanisms)
        found[lacking].append(ck.MECHANISM_NAMES.get(mechanism, f"0x{mechanism:X}"))
    return found


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more (--verbose)" if more > 0 else "")


# ---- the host


def _clock(facts: Facts) -> Iterator[Finding]:
    about, now = "clock", facts.now_s
    cure = "set the clock, and have it synchronised (chrony, systemd-timesyncd)"
    built_s = facts.build.built_s if facts.build else 0
    if now < max(_BEFORE, built_s):
        text = f"the system says {datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC, which is past"
        yield Finding(WRONG, about, text, cure)
    elif facts.synchronised is False:
        text = (
            "the kernel says that the system clock is not synchronised: times of several hosts do not compare"
        )
        yield Finding(NOTE, about, text, "have it synchronised (chrony, systemd-timesyncd)")
    for member in facts.members:
        off = _off_s(member.clock, now) if member.clock else 0
        if off is None:
            text = f"the token of {member.name} has a clock that says {member.clock!r}"
            yield Finding(NOTE, about, text, "set the device's clock")
        elif abs(off) > _CLOCK_OFF_S:
            text = f"the clock of {member.name} is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this host's"
            yield Finding(WRONG, about, text, "set the one that is wrong; have both synchronised")


def _off_s(clock: str, now_s: float) -> float | None:
    """By how much a token's utcTime (YYYYMMDDhhmmss00) is ahead; None if it is none."""
    try:
        return datetime.strptime(clock[:14], "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp() - now_s
    except ValueError:
        return None


def _workers(facts: Facts) -> Iterator[Finding]:
    for worker in facts.workers:
        if not worker.parent_lives:
            text = f"worker {worker.pid} is left over from process {worker.parent}, which is gone"
            yield Finding(WRONG, "workers", text, f"kill -9 {worker.pid}")


CHECKS: dict[str, Callable[[Facts], Iterator[Finding]]] = {
    "build": _build,
    "copies": _copies,
    "configuration": _configuration,
    "permissions": _permissions,
    "state directory": _state,
    "log": _log,
    "recovery": _recovery,
    "members": _members,
    "clock": _clock,
    "workers": _workers,
}
"""Everything that is looked at, but for mechanisms, of which more is said with --verbose."""


def show(findings: Sequence[Finding], width: int | None) -> Iterator[str]:
    """Lines for people; `width` None: one for each text and cure, for what reads lines."""
    cures = [finding.cure for finding in findings[1:]] + [""]
    for finding, next_cure in zip(findings, cures, strict=False):  # none if there is no finding
        yield _wrapped(f"{finding.level}: ", f"{finding.about}: {finding.text}", width)
        if finding.cure and finding.cure != next_cure:  # one cure of several in a row is said once
            yield _wrapped("  cure: ", finding.cure, width)
    levels = Counter(finding.level for finding in findings)
    wrong = {0: "nothing is wrong", 1: "1 thing is wrong"}.get(
        levels[WRONG], f"{levels[WRONG]} things are wrong"
    )
    notes = {0: "", 1: ", 1 note"}.get(levels[NOTE], f", {levels[NOTE]} notes")
    yield f"doctor: {wrong}{notes}"


def _wrapped(head: str, text: str, width: int | None) -> str:
    if width is None:
        return head + text
    return textwrap.fill(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
