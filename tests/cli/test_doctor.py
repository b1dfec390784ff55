"""`p11ha doctor`: what is planted in a real installation is found, its cure cures it, and each judgement for itself."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from demo.members import SoftToken, softhsm
from pkcs11_ha import ck, config
from pkcs11_ha.cli import doctor
from pkcs11_ha.cli.doctor import NOTE, OK, WRONG, examine, is_good, may
from pkcs11_ha.cli.facts import Build, Facts, File, LogFacts, MemberFacts, Place, User, WorkerProcess
from pkcs11_ha.cli.segments import Found as Segments
from tests.cli.test_status_and_check import run
from tests.conftest import GroupFactory, ServerFactory, SoftTokenFactory
from tests.observe.made import segment


@pytest.fixture
def east(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


@pytest.fixture
def west(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("west")


Found = dict[str, str]


def consult(*arguments: str) -> tuple[int, list[Found]]:
    done = run("doctor", "--json", *arguments)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def wrong(found: list[Found]) -> list[str]:
    return [each["text"] for each in found if each["level"] == WRONG]


# a real installation


@pytest.mark.usefixtures("module")
def test_a_good_installation_has_nothing_wrong(east: SoftToken, west: SoftToken, group: GroupFactory) -> None:
    group(east.member(), west.member(), recovery={"interval_s": 60})
    status, found = consult("--verbose")
    assert wrong(found) == []
    assert status == 0
    assert {each["about"] for each in found if each["level"] == OK} >= {
        "build",
        "permissions",
        "members",
        "workers",
    }
    assert run("doctor").stdout.splitlines()[-1].startswith("doctor: nothing is wrong")


@pytest.fixture
def leftover() -> Iterator[int]:
    """A process that looks like the worker of an application that is gone."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    command = ["pkcs11-ha-worker", "-c", "import time; time.sleep(100)", "--parent", str(ended.pid)]
    with subprocess.Popen(command, executable=sys.executable) as worker:
        yield worker.pid
        worker.kill()


@pytest.mark.usefixtures("module")
def test_what_is_wrong_is_found_and_its_cure_cures_it(
    east: SoftToken, west: SoftToken, group: GroupFactory, directory: Path, leftover: int
) -> None:
    pin = directory / "pin file"
    pin.write_text(east.pin)
    pin.chmod(0o640)
    vendor = directory / "vendor"
    vendor.mkdir()
    shutil.copy(softhsm(), vendor)
    vendor.chmod(0o777)
    library = vendor / softhsm().name
    where = group(
        east.member(module=str(library), pin_source=f"file:{str(pin).replace(' ', '%20')}"), west.member()
    )
    where.conf.chmod(0o666)
    where.state.chmod(0o777)
    status, found = consult()
    assert status == 1
    assert wrong(found) == [
        f"{where.conf} can be written by everybody",
        f"{vendor}, in which {library} lies, can be written by everybody",
        f"the PIN of east can be read or changed by others: {pin}",
        f"{where.state} can be written by everybody, who could ask for recovery and drain members",
        f"worker {leftover} is left over from process {_parent_of(leftover)}, which is gone",
    ]
    for each in found:
        if each["level"] == WRONG:
            subprocess.run(each["cure"], shell=True, check=True)
    os.waitpid(leftover, 0)
    assert consult()[0] == 0
    assert stat.S_IMODE(pin.stat().st_mode) == 0o600


def _parent_of(worker: int) -> str:
    return Path(f"/proc/{worker}/cmdline").read_text().split("\0")[-2]


@pytest.mark.usefixtures("module")
def test_members_that_are_away_alike_or_different(
    east: SoftToken, west: SoftToken, server: ServerFactory, group: GroupFactory
) -> None:
    remote = server(west)  # p11-kit passes on the mechanisms that it knows
    group(east.member(), remote.member(), {**east.member(), "name": "twin"})
    status, found = consult("--verbose")
    assert wrong(found) == [
        f"east, twin are one token (label 'east', serial {east.serial!r}): no help to each other"
    ]
    lacking = [
        each["text"] for each in found if each["about"] == "mechanisms of prod" and each["level"] == NOTE
    ]
    assert lacking
    assert all(text.startswith("CKM_") and text.endswith(" on 2 of 3 members (not west)") for text in lacking)
    (summary,) = [each["text"] for each in consult()[1] if each["about"] == "mechanisms of prod"]
    assert summary.startswith(lacking[0].split()[0])
    assert f"and {len(lacking) - 3} more" in summary
    remote.kill()
    status, found = consult()
    assert status == 1
    assert any(text.startswith("west is away: ") for text in wrong(found))


@pytest.mark.usefixtures("module")
def test_what_dead_processes_left_and_what_applications_cannot_write(
    east: SoftToken, group: GroupFactory
) -> None:
    where = group(east.member(), ha={"log_max_bytes": 4096}, recovery={"interval_s": 1})
    (where.state / "1-1.segment").write_bytes(segment(pid=1, started=1))
    (where.state / "1-2.segment").symlink_to("/etc/passwd")
    (where.state / "1-3.segment").write_bytes(b"\xff" * 40_000)
    mine = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    (where.state / f"{os.getpid()}-{mine}.segment").touch()
    where.state.parent.chmod(0o755)
    found = consult()[1]
    assert [each["text"] for each in found if each["about"] == "recovery"] == [
        "interval_s = 1 is less than the usual 60, and a call waits up to 5 s for each attempt"
    ]
    told = [(each["text"], each["cure"]) for each in found if each["about"] == "state directory"]
    stale, *foreign = [text for text, _ in told]
    assert stale.startswith(f"status files of processes that are gone: 1, {where.state / '1-1.segment'}")
    assert foreign == [
        f"{where.state}/1-2.segment: a symbolic link",
        f"{where.state}/1-3.segment: not a status segment",
    ]
    assert foreign == run("status", "--probe").stderr.splitlines()  # the same there
    for _, cure in told[1:]:
        subprocess.run(cure, shell=True, check=True)
    assert not [each for each in consult()[1] if each["about"] == "state directory"]  # the first: by itself
    if os.geteuid() == 0:
        texts = wrong(consult("--user", "nobody")[1])
        assert f"nobody cannot write to {where.log}: its events go to syslog" in texts
    assert run("doctor", "--user", "no such user").returncode == 2


def test_a_wrong_configuration_is_a_finding(directory: Path) -> None:
    conf = directory / "none.toml"
    status, found = consult("--config", str(conf))
    (line,) = [text for text in wrong(found) if text.startswith(str(conf))]
    assert status == 1
    assert "No such file or directory: p11ha member add begins one" in line


# each judgement

NOW = datetime(2026, 11, 23, 10, 15, 30, tzinfo=UTC).timestamp()
DIRECTORY, FILE = File(0, 0, stat.S_IFDIR | 0o755), File(0, 0, stat.S_IFREG | 0o644)
CONFIG = """
[ha]
log = "file:/log/ha.log"
[[member]]
name = "east"
module = "/lib/east.so"
token = "pkcs11:token=east"
[[member]]
name = "west"
module = "/lib/west.so"
token = "pkcs11:token=west"
[[member]]
name = "north"
module = "/lib/north.so"
token = "pkcs11:token=north"
[[group]]
label = "prod"
members = ["east", "west", "north"]
"""
READY = ck.CKF_USER_PIN_INITIALIZED | ck.CKF_LOGIN_REQUIRED


def place(path: str, file: File | None = FILE) -> tuple[Place, ...]:
    parents = (str(each) for each in Path(path).parents)
    return (Place(path, file), *(Place(each, DIRECTORY) for each in parents))


def member(name: str, *mechanisms: int) -> MemberFacts:
    return MemberFacts(
        name, "prod", "", name, f"serial of {name}", READY, "", frozenset(mechanisms or {1, 2, 3})
    )


GOOD = Facts(
    version="1",
    stamp="1+a",
    python="3.11",
    uid=1000,
    user=User("app", 1000, frozenset({1000})),
    build=Build("/lib/ha.so", "1+a", "3.11", "", "/lib/worker", NOW - 1),
    others=(),
    preloaded=(),
    settings=config.parse(CONFIG, "/etc/x.toml"),
    problem="",
    state_dir="/state",
    found=Segments((), ()),
    log=LogFacts("/log/ha.log", 0, 1 << 30, 1000),
    members=(member("east"), member("west"), member("north")),
    unread="",
    workers=(WorkerProcess(1, 2, parent_lives=True),),
    now_s=NOW,
    synchronised=True,
    places={
        path: place(path) for path in ("/etc/x.toml", *(f"/lib/{name}" for name in "ha.so worker".split()))
    }
    | {f"/lib/{name}.so": place(f"/lib/{name}.so") for name in ("east", "west", "north")}
    | {"/log/ha.log": place("/log/ha.log", File(1000, 1000, stat.S_IFREG | 0o640))}
    | {"/state": place("/state", File(1000, 1000, stat.S_IFDIR | 0o750))},
)


def at(path: str, file: File | None) -> Facts:
    return replace(GOOD, places=dict(GOOD.places) | {path: place(path, file)})


def built(**changes: str) -> Facts:
    assert GOOD.build
    return replace(GOOD, build=replace(GOOD.build, **changes))  # type: ignore[arg-type]


def first(**changes: object) -> Facts:
    changed = replace(GOOD.members[0], **changes)  # type: ignore[arg-type]
    return replace(GOOD, members=(changed, *GOOD.members[1:]))


def settings(text: str) -> Facts:
    return replace(GOOD, settings=config.parse(CONFIG.replace('log"\n', f'log"\n{text}\n', 1), "/etc/x.toml"))


def test_good_facts_have_no_finding() -> None:
    assert examine(GOOD) == []


BEHIND_ROOT: tuple[Place, ...] = (Place("/root/python", None), Place("/root", File(0, 0, 0o40700)))


@pytest.mark.parametrize(
    ("facts", "level", "text"),
    [
        (replace(GOOD, build=None), WRONG, "libpkcs11-ha.so is not found"),
        (built(problem="no ELF"), WRONG, "/lib/ha.so cannot be loaded: no ELF"),
        (built(stamp="1+b"), WRONG, "/lib/ha.so is of version 1+b, this command of 1+a"),
        (built(python="3.12"), WRONG, "/lib/ha.so was built for Python 3.12, this command runs 3.11"),
        (
            replace(built(stdlib="/root/python"), places={**GOOD.places, "/root/python": BEHIND_ROOT}),
            WRONG,
            "app cannot enter /root, where the Python of /lib/ha.so is: /root/python",
        ),
        (
            replace(GOOD, preloaded=("/old/ha.so",)),
            WRONG,
            "/old/ha.so is preloaded, and this command is of /lib/ha.so",
        ),
        (
            replace(GOOD, others=(Build("/old/ha.so", "0+c", "3.11", "", "", 0),)),
            NOTE,
            "there is another libpkcs11-ha.so, /old/ha.so, of version 0+c",
        ),
        (
            at("/lib/west.so", File(7, 0, 0o644)),
            NOTE,
            "/lib/west.so can be changed by its owner, user 7, who is",
        ),
        (
            at("/state", File(7, 7, stat.S_IFDIR | 0o755)),
            WRONG,
            "/state belongs to user 7, who is neither root nor app",
        ),
        (at("/state", File(0, 0, stat.S_IFDIR | 0o755)), NOTE, "app cannot write to /state: "),
        (at("/state", None), NOTE, "/state is not there, and app cannot make it"),
        (at("/state", FILE), WRONG, "/state is no directory"),
        (at("/log/ha.log", FILE), WRONG, "app cannot write to /log/ha.log: its events go to syslog"),
        (at("/log/ha.log", None), WRONG, "app cannot make a file in /log: events go to syslog"),
        (
            settings("log_max_bytes = 4096"),
            WRONG,
            "app cannot rename files in /log, so the log is not",
        ),
        (replace(GOOD, log=LogFacts("/log/ha.log", 0, 5000, 10)), WRONG, "4 KiB are free in /log"),
        (
            replace(GOOD, log=LogFacts("/log/ha.log", 0, 1 << 30, 0)),
            WRONG,
            "no more file can be made in /log",
        ),
        (replace(GOOD, log=LogFacts("/log/ha.log", 2 << 30, 1 << 30, 1)), NOTE, "/log/ha.log has 2048 MiB"),
        (
            settings("[recovery]\nattempts = 0"),
            NOTE,
            "attempts = 0: a lost member never comes back by itself",
        ),
        (first(flags=READY | ck.CKF_USER_PIN_LOCKED), WRONG, "east: the user PIN is locked"),
        (first(flags=READY | ck.CKF_USER_PIN_COUNT_LOW), NOTE, "east: a wrong PIN was tried"),
        (first(flags=READY | 3 * ck.CKF_USER_PIN_COUNT_LOW), WRONG, "east: one more wrong PIN locks it"),
        (first(flags=ck.CKF_LOGIN_REQUIRED), WRONG, "east: the user PIN was never set"),
        (first(serial="serial of west"), NOTE, "east, west have the same serial 'serial of west'"),
        (first(mechanisms=frozenset({9})), WRONG, "none is on all 3 members"),
        (first(mechanisms=frozenset({1, 3})), NOTE, f"{ck.MECHANISM_NAMES[2]} on 2 of 3 members (not east)"),
        (
            first(mechanisms=frozenset({1, 2, 3, 9})),
            NOTE,
            f"{ck.MECHANISM_NAMES[9]} on 1 of 3 members (not west, north)",
        ),
        (first(clock="2026112310153100"), None, ""),
        (first(clock="2026112310173100"), WRONG, "the clock of east is 121 s ahead of this host's"),
        (first(clock="2026112309153000"), WRONG, "the clock of east is 3600 s behind this host's"),
        (first(clock="0" * 16), NOTE, "the token of east has a clock that says '0000000000000000'"),
        (replace(GOOD, now_s=0.0), WRONG, "the system says 1970-01-01 00:00:00 UTC, which is past"),
        (
            replace(GOOD, synchronised=False),
            NOTE,
            "the kernel says that the system clock is not synchronised",
        ),
        (replace(GOOD, synchronised=None), None, ""),
        (
            replace(GOOD, members=(), unread="C_Initialize answers CKR_GENERAL_ERROR"),
            WRONG,
            "they cannot be looked at: C_Initialize answers CKR_GENERAL_ERROR",
        ),
    ],
)
def test_a_fact_and_its_finding(facts: Facts, level: str | None, text: str) -> None:
    found = examine(facts)
    if level is None:
        assert found == []
        return
    (finding,) = found
    assert (finding.level, finding.text[: len(text)]) == (level, text)
    assert finding.cure
    assert "\n" not in finding.cure
    assert is_good(found) is (level == NOTE)


@pytest.mark.parametrize(
    ("mode", "uid", "gids", "may_write"),
    [
        (0o600, 5, {9}, True),
        (0o060, 5, {9}, False),  # the owner's bits are for the owner, whatever the others say
        (0o060, 6, {9}, True),
        (0o602, 6, {9}, False),
        (0o602, 6, {8}, True),
        (0o000, 0, {8}, True),
    ],
)
def test_a_mode_lets_a_user_write_or_not(mode: int, uid: int, gids: set[int], may_write: bool) -> None:
    assert may(User("x", uid, frozenset(gids)), File(5, 9, mode), 2) is may_write


def test_lines_fit_the_terminal() -> None:
    findings = examine(replace(GOOD, synchronised=False, build=None))
    assert max(len(row) for text in doctor.show(findings, 80) for row in text.splitlines()) <= 80
    assert all("\n" not in text for text in doctor.show(findings, None))
    assert list(doctor.show(findings, 80))[-1] == "doctor: 1 thing is wrong, 1 note"
    assert list(doctor.show([], 80)) == ["doctor: nothing is wrong"]
    alike = examine(first(mechanisms=frozenset({1})), verbose=True)
    assert [text.partition(":")[0].strip() for text in doctor.show(alike, None)][:3] == [NOTE, NOTE, "cure"]
