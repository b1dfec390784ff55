"""Segments of real processes: made, counted in, told of losses, and gone with their process, however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from demo.members import SoftToken
from pkcs11_ha.cli import segments
from pkcs11_ha.runtime import native
from tests.conftest import Group, GroupFactory, ServerFactory, SoftTokenFactory
from tests.ha.app import FAR, SOON, until
from tests.ha.conftest import StartFactory, start
from tests.observe.conftest import ClientFactory, p11ha, shown
from tests.observe.made import put, segment

__all__ = ["start"]


@pytest.fixture
def east(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


@pytest.fixture
def west(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("west")


def files(group: Group) -> list[Path]:
    return sorted(group.state.glob("*.segment"))


def the_one(group: Group) -> segments.Process:
    found = segments.read_all(str(group.state))
    assert not found.skipped
    (process,) = found.processes
    return process


def counters(group: Group) -> segments.Counters:
    process = the_one(group)
    assert process.text
    return segments.total(process.of(member) for member in process.text.groups[0].members)


def test_each_process_tells_what_it_sees(
    east: SoftToken, west: SoftToken, server: ServerFactory, group: GroupFactory, client: ClientFactory
) -> None:
    dying = server(east)
    made = group(dying.member(), west.member(), recovery={"interval_s": 3600, "attempts": 5})
    one, other = client(), client()
    for each in (one, other):
        each.call(20)
    assert [(m["name"], m["status"], m["states"]) for m in shown()["members"]] == [
        ("east", "CKR_OK", {"up": 2}),
        ("west", "CKR_OK", {"up": 2}),
    ]
    dying.kill()
    one.call(20)
    started = made.log.read_text().count("core.started")
    first = shown()["members"][0]
    assert (first["status"], first["states"]) == ("CKR_DEVICE_ERROR", {"up": 1, "away": 1})
    views = {view["pid"]: view for view in first["processes"]}
    lost = views[one.pid]
    assert (lost["state"], lost["code"], lost["call"]) == ("away", "CKR_DEVICE_ERROR", "C_GenerateRandom")
    assert (lost["attempts_failed"], lost["attempts"]) == (0, 5)
    assert 0 < lost["next_attempt_s"] < 3600
    assert lost["failovers"] == 1
    assert views[other.pid]["state"] == "up"
    text = p11ha("status").stdout
    assert text.splitlines()[-3:] == [
        "HA group 1599447001 status:",
        f"HSM {east.serial} - CKR_DEVICE_ERROR",
        f"HSM {west.serial} - CKR_OK",
    ]
    assert made.log.read_text().count("core.started") == started  # nothing was tried for it
    one.do("module.ha_status(slot) and 0")
    assert shown()["members"][0]["status"] == "CKR_TOKEN_NOT_PRESENT"  # that process has read of the loss


def test_attempts_are_told_until_it_is_back(
    east: SoftToken, west: SoftToken, server: ServerFactory, group: GroupFactory, client: ClientFactory
) -> None:
    dying = server(east)
    made = group(dying.member(), west.member(), recovery={**SOON, "attempts": 2, "connect_timeout_s": 1})
    one = client()
    dying.kill()
    until(lambda: one.call() or "recovery.exhausted" in made.log.read_text(), "attempts are used up")
    (lost,) = shown()["members"][0]["processes"]
    assert (lost["state"], lost["status"]) == ("away", "CKR_TOKEN_NOT_PRESENT")
    assert (lost["attempts_failed"], lost["next_attempt_s"]) == (2, None)
    assert "attempt 2 of 2 failed, not tried again" in " ".join(p11ha("status").stdout.split())


def test_without_processes_a_new_one_is_asked(
    east: SoftToken, group: GroupFactory, client: ClientFactory
) -> None:
    group(east.member())
    one = client()
    running = json.loads(p11ha("status", "--json").stdout)
    probed = json.loads(p11ha("status", "--json", "--probe").stdout)
    one.do("module.finalize()")
    alone = json.loads(p11ha("status", "--json").stdout)
    assert running["groups"][0]["members"][0]["processes"] != []
    for other in (probed, alone):  # the same keys, empty where only a running process knows
        assert other.keys() == running.keys()
        assert other["groups"][0].keys() == running["groups"][0].keys()
        assert other["groups"][0]["configuration"] == running["groups"][0]["configuration"]
        (member,) = other["groups"][0]["members"]
        assert member.keys() == running["groups"][0]["members"][0].keys()
        assert (member["calls"], member["states"], member["processes"]) == (None, {}, [])


def test_calls_are_counted_and_one_in_64_is_timed(
    east: SoftToken, group: GroupFactory, client: ClientFactory
) -> None:
    made = group(east.member())
    one = client()
    one.call()
    before = counters(made)
    one.call(6400)
    after = counters(made)
    assert after.calls - before.calls == 6400
    timed = after.latency["cryptography"].samples - before.latency["cryptography"].samples
    assert 90 <= timed <= 110
    assert after.latency["cryptography"].total_ns > 0
    assert (after.in_flight, after.faulty, after.failovers) == (0, 0, 0)


def test_a_call_inside_a_library_is_seen(
    east: SoftToken, server: ServerFactory, group: GroupFactory, client: ClientFactory
) -> None:
    slow = server(east)
    made = group(slow.member(), recovery=FAR)
    one = client()
    one.call()
    slow.stop()
    one.do("import threading; threading.Thread(target=session.random, args=(8,), daemon=True).start()")
    until(lambda: counters(made).in_flight == 1, "the call is inside")
    slow.cont()
    until(lambda: counters(made).in_flight == 0, "it is back")


@pytest.mark.parametrize(("mode", "expected"), [(0o755, 0o600), (0o2770, 0o640)])
def test_who_may_read_it(
    mode: int, expected: int, east: SoftToken, group: GroupFactory, client: ClientFactory
) -> None:
    made = group(east.member())
    made.state.chmod(mode)
    before = os.umask(0)
    try:
        client()
    finally:
        os.umask(before)
    (file,) = files(made)
    assert file.stat().st_mode & 0o7777 == expected


@pytest.mark.parametrize("why", ["everybody can write to it", "belongs to another user", "Not a directory"])
def test_where_there_can_be_none_the_module_works_and_says_so_once(
    why: str, east: SoftToken, group: GroupFactory, client: ClientFactory
) -> None:
    made = group(east.member())
    if why == "Not a directory":
        made.state.rmdir()
        made.state.write_text("")
    elif why == "belongs to another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        os.chown(made.state, 12345, -1)
    else:
        made.state.chmod(0o1777)
    assert client().call(100) == 0
    assert [
        "status.unavailable why=" in line and why in line for line in made.log.read_text().splitlines()
    ].count(True) == 1
    if made.state.is_dir():
        assert not files(made)


def test_it_goes_with_its_process(east: SoftToken, group: GroupFactory, client: ClientFactory) -> None:
    made = group(east.member())
    one, other = client(), client()
    for _ in range(2):  # a second life of the same process
        assert len(files(made)) == 2
        one.do("module.finalize()")
        assert [file.name.split("-")[0] for file in files(made)] == [str(other.pid)]
        one.do("module.initialize()")
    other.process.kill()
    other.process.wait()
    assert len(files(made)) == 2  # nobody was there to remove it
    third = client()
    assert {file.name.split("-")[0] for file in files(made)} == {str(one.pid), str(third.pid)}
    third.process.kill()
    third.process.wait()
    p11ha("status")
    assert [file.name.split("-")[0] for file in files(made)] == [str(one.pid)]


def test_a_child_counts_for_itself(east: SoftToken, group: GroupFactory, client: ClientFactory) -> None:
    made = group(east.member())
    one = client()
    one.call(10)
    before = counters(made).calls
    child = one.do("__import__('tests.observe.child').observe.child.fork()")
    assert isinstance(child, int)

    def calls(pid: int) -> int:
        found = segments.read_all(str(made.state)).processes
        return sum(segments.total(process.counters).calls for process in found if process.pid == pid)

    until(lambda: calls(child) > 50, "the child counts in a segment of its own")
    assert calls(one.pid) == before
    # A call of the parent's that comes back in the child, as its library forks, is not counted off the parent's either.
    assert f"/{one.pid}-" not in Path(f"/proc/{child}/maps").read_text()
    assert f"/{one.pid}-" in Path(f"/proc/{one.pid}/maps").read_text()
    one.do(f"os.kill({child}, 9) or os.waitpid({child}, 0)[0]")
    assert counters(made).calls == before
    one.call(5)
    assert counters(made).calls == before + 5


def test_what_a_program_leaves_that_becomes_another_is_removed_by_that(
    east: SoftToken, group: GroupFactory, module: Path
) -> None:
    made = group(east.member())
    again = "import sys, os; from tests import p11; m = p11.Module(sys.argv[1]); m.initialize(); "
    last = again + "print(len(os.listdir(os.environ['PKCS11_HA_STATE'])), flush=True)"
    first = again + "os.execv(sys.executable, [sys.executable, '-c', sys.argv[2], sys.argv[1]])"
    done = subprocess.run(
        [sys.executable, "-c", first, str(module), last], capture_output=True, text=True, check=True
    )
    others = [each for each in made.state.iterdir() if each.suffix != ".segment"]
    assert int(done.stdout) == 1 + len(others)


def test_bad_files_are_named_and_passed_over(
    east: SoftToken, group: GroupFactory, client: ClientFactory
) -> None:
    made = group(east.member())
    one = client()
    me = os.getpid()
    bad = {
        "truncated: ": put(made.state, os.getppid(), segment(pid=os.getppid())[:-100]),
        "of format 7, ": put(made.state, me, segment(version=7)),
        "not the name of a status segment": made.state / "x.segment",
    }
    bad["not the name of a status segment"].write_bytes(segment())
    started = bad["of format 7, "].name.split("-")[1]
    fifo = made.state / f"{me}-{started.removesuffix('.segment')}-1.segment"
    os.mkfifo(fifo)
    bad["a FIFO"] = fifo
    link = made.state / f"{me}-{started.removesuffix('.segment')}-2.segment"
    link.symlink_to("/etc/passwd")
    bad["a symbolic link"] = link
    (made.state / "1-2.segment").mkdir()
    bad["a directory"] = made.state / "1-2.segment"
    bad["not a status segment"] = made.state / "1-3.segment"
    bad["not a status segment"].write_bytes(b"\xff" * 40_000)  # also where the text would be half written
    bad["too large for a status segment"] = made.state / "1-4.segment"
    with bad["too large for a status segment"].open("wb") as sparse:
        sparse.truncate(20 << 30)
    bad["empty, and process 1 that it is named for is gone"] = made.state / "1-5.segment"
    bad["empty, and process 1 that it is named for is gone"].touch()
    bad["empty for more than a moment"] = made.state / f"{me}-{started.removesuffix('.segment')}-4.segment"
    bad["empty for more than a moment"].touch()
    os.utime(bad["empty for more than a moment"], (0, 0))
    being_made = made.state / f"{me}-{started.removesuffix('.segment')}-5.segment"
    being_made.touch()
    os.utime(being_made, (2**33, 2**33))  # of a clock that was set back, as good as now
    (made.state / "copy-of.seg").write_bytes(b"x")
    other = made.state / f"{me}-{started.removesuffix('.segment')}-3.segment"
    other.write_bytes(segment(pid=4711))
    bad["says that it is of process 4711"] = other
    done = p11ha("status")
    lines = sorted(done.stderr.splitlines())
    assert lines == sorted(
        next(line for line in lines if line.startswith(f"{p}: {why}")) for why, p in bad.items()
    )
    assert f"HSM {east.serial} - CKR_OK" in done.stdout
    assert str(one.pid) in done.stdout
    assert len(json.loads(p11ha("status", "--json").stdout)["skipped"]) == len(bad)
    assert all(os.path.lexists(path) for path in bad.values())  # what is not ours is nobody's to remove


def test_a_text_is_never_read_by_halves(east: SoftToken, start: StartFactory) -> None:
    application = start(east.member())
    made = application.group
    known = the_one(made).text
    assert known is not None
    (member,) = known.groups[0].members

    def text(letter: str, length: int) -> bytes:
        said = replace(member, why=letter * length, code=letter * length, call=letter * length)
        text = replace(known, groups=(replace(known.groups[0], members=(said,) * 8),))
        return json.dumps(asdict(text)).encode()

    texts = [text("a", 150), text("b", 20), text("c", 199)]
    ended = threading.Event()

    def write() -> None:
        while not ended.wait(0.0002):
            for each in texts:
                assert native.lib.ha_segment_tell(each, len(each))
            texts.append(texts.pop(0))  # each is the last one for a while

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        for _ in range(500):
            read = the_one(made).text
            assert read is not None
            (said,) = {(m.why, m.code, m.call) for m in read.groups[0].members}
            assert len(set("".join(said))) <= 1  # none before the first
            seen.add(said[0][:1])
    finally:
        ended.set()
        writer.join()
    assert len(seen) > 1
