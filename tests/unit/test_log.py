"""One event is one line, whoever writes it and wherever it goes, and a log that fails fails nobody else."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkcs11_ha import log
from pkcs11_ha.log import EVENTS, Event, Log, describe, line, open_log, parse_target, quote, record

LOST = Event("member.lost", "prod", "east", {"code": "CKR_DEVICE_ERROR", "call": "C_Sign"})
LOST_TEXT = "group=prod member=east member.lost code=CKR_DEVICE_ERROR call=C_Sign"


class Lines:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def put(self, text: str) -> None:
        self.texts.append(text)

    def close(self) -> None:
        self.texts.append("closed")


class Clock:
    """A monotonic clock that stands still."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def syslog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A syslog daemon of the test's own."""
    address = tmp_path / "syslog"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(address))
        daemon.settimeout(5)
        monkeypatch.setattr(log, "SYSLOG_SOCKET", str(address))
        yield daemon


def file_log(path: Path, max_bytes: int = 0) -> tuple[Log, Lines, Clock]:
    fallback, clock = Lines(), Clock()
    return Log(log._File(str(path), fallback, clock, max_bytes=max_bytes)), fallback, clock


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


# what a line looks like


def test_line_has_time_process_group_member_event_and_details() -> None:
    assert describe(LOST) == LOST_TEXT
    assert line(describe(LOST), 1795367907123, 4711) == (
        b"2026-11-22T17:18:27.123Z pkcs11-ha[4711] " + LOST_TEXT.encode() + b"\n"
    )


def test_milliseconds_have_three_digits_and_are_not_rounded_up() -> None:
    assert line("", 1795367907999, 1).startswith(b"2026-11-22T17:18:27.999Z")
    assert line("", 1795367907004, 1).startswith(b"2026-11-22T17:18:27.004Z")


def test_event_without_group_or_member_does_not_mention_them() -> None:
    assert describe(Event("core.started")) == "core.started"
    assert describe(Event("group.vanished", "prod")) == "group=prod group.vanished"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("CKR_DEVICE_ERROR", "CKR_DEVICE_ERROR"),
        ("/usr/lib/x.so", "/usr/lib/x.so"),
        (0, "0"),
        (-1, "-1"),
        ("", '""'),
        ("my token", '"my token"'),
        ("a=b", '"a=b"'),
        ('a"b\\c', r'"a\"b\\c"'),
        ("a\nb\r\t\x1b[0m", r'"a\nb\r\t\x1b[0m"'),
        ("\x85\u2028\u202e", r'"\x85\u2028\u202e"'),
        ("\udc80\U000e0001", r'"\udc80\U000e0001"'),
        ("ö", '"ö"'),
    ],
)
def test_value_that_could_be_misread_is_quoted(value: str | int, written: str) -> None:
    assert quote(value) == written


def unquote(written: str) -> str:
    """The reader's side of `quote`."""
    if not written.startswith('"'):
        return written
    escape = r'\\(?:(["\\])|(x..|u.{4}|U.{8}|[nrt]))'

    def character(found: re.Match[str]) -> str:
        return found[1] or ("\\" + found[2]).encode().decode("unicode_escape")

    return re.sub(escape, character, written[1:-1])


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_no_text_forges_a_line_or_a_word_of_one(group: str, member: str, value: str) -> None:
    text = describe(Event("member.lost", group or "g", member or "m", {"reason": value}))
    assert text.isprintable()
    words = re.findall(r'([a-z]+)=("(?:\\.|[^"\\])*"|[^ "]+)|([a-z.]+)', text)
    assert [name or event for name, _, event in words] == ["group", "member", "member.lost", "reason"]
    assert [unquote(words[n][1]) for n in (0, 1, 3)] == [group or "g", member or "m", value]


@settings(deadline=None)
@given(st.text(min_size=1, max_size=20), st.integers(1, 1000))
def test_line_fits_one_atomic_write(text: str, times: int) -> None:
    data = line(describe(Event("member.lost", details={"reason": text * times})), 0, 2**22)
    assert len(data) <= 4096
    assert data.decode().count("\n") == 1


def test_long_line_shows_that_it_was_cut() -> None:
    assert describe(Event("member.lost", "prod", details={"reason": "x" * 5000})).endswith("x…")
    assert describe(Event("member.lost", "prod", details={"reason": "x" * 3000})).endswith("x")


def test_json_line_is_one_object_with_the_same_keys_always() -> None:
    assert json.loads(record(LOST, 1795367907123, 4711)) == {
        "time": "2026-11-22T17:18:27.123Z",
        "pid": 4711,
        "group": "prod",
        "member": "east",
        "event": "member.lost",
        "details": {"code": "CKR_DEVICE_ERROR", "call": "C_Sign"},
    }
    bare = json.loads(record(Event("core.stopped"), 0, 1))
    assert (bare["group"], bare["member"], bare["details"]) == (None, None, {})


@settings(deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(1, 200), st.integers())
def test_json_line_stays_an_object_whatever_is_in_it(text: str, times: int, number: int) -> None:
    event = Event("member.lost", text * times, text * times, {"why": text * times, "n": number})
    written = record(event, 0, 2**22)
    assert written.isprintable()
    assert len(written) < 4096
    read = json.loads(written)
    assert read["details"]["n"] == number
    assert (text * times).startswith(read["details"]["why"].removesuffix("…"))
    if times == 1:
        assert (read["group"], read["details"]["why"]) == (text, text)


# what is our own fault


@pytest.mark.parametrize("spec", ["off", "stderr"])
def test_event_outside_the_catalogue_raises_wherever_the_log_goes(spec: str) -> None:
    with pytest.raises(ValueError, match=r"no such event: 'member\.sad'"):
        open_log(spec).write(Event("member.sad"))


def test_bytes_are_never_written() -> None:
    secret: object = b"1234"
    with pytest.raises(TypeError, match="not bytes"):
        describe(Event("login.refused", details={"pin": secret}))  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="not bytes"):
        describe(Event("login.refused", secret))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not bytes"):
        record(Event("login.refused", details={"pin": secret}), 0, 1)  # type: ignore[dict-item]


@pytest.mark.parametrize("key", ["", "a b", "a=b", "a\n", "A", "ö"])
def test_key_that_is_no_word_raises(key: str) -> None:
    with pytest.raises(ValueError, match="not a word"):
        describe(Event("member.lost", details={key: 1}))


def test_every_event_is_named_noun_past_and_has_a_meaning() -> None:
    assert all(re.fullmatch(r"[a-z]+\.[a-z_]+", name) for name in EVENTS)
    assert all(meaning and meaning.isprintable() for meaning in EVENTS.values())
    assert list(EVENTS) == sorted(EVENTS)


# where it goes


@pytest.mark.parametrize("spec", ["syslog", "stderr", "off"])
def test_words_are_targets(spec: str) -> None:
    assert parse_target(spec) == spec


def test_file_uri_is_a_target() -> None:
    assert parse_target("file:/var/log/a%20b") == "/var/log/a b"


@pytest.mark.parametrize("spec", ["", "file", "file:ha.log", "/var/log/ha.log", "Syslog", "none"])
def test_other_targets_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r'expected "file:/path", "syslog", "stderr" or "off"'):
        open_log(spec)


def test_off_writes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    open_log("off").write(LOST)
    assert capfd.readouterr() == ("", "")


def test_stderr_gets_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    open_log("stderr").write(LOST)
    out, err = capfd.readouterr()
    assert out == ""
    moment, text = err.split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", moment)
    assert text == f"pkcs11-ha[{os.getpid()}] {LOST_TEXT}\n"


def test_json_goes_wherever_the_text_goes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], syslog: socket.socket
) -> None:
    for spec in ("stderr", "syslog", f"file:{tmp_path}/ha.log"):
        open_log(spec, "json").write(LOST)
    sent = syslog.recv(9999).decode().partition("]: ")[2]
    for text in (capfd.readouterr().err, sent, (tmp_path / "ha.log").read_text()):
        read = json.loads(text)
        assert (read["pid"], read["event"]) == (os.getpid(), "member.lost")


def test_syslog_gets_a_datagram(syslog: socket.socket) -> None:
    open_log("syslog").write(LOST)
    assert syslog.recv(9999).decode() == f"<29>pkcs11-ha[{os.getpid()}]: {LOST_TEXT}"


@pytest.mark.usefixtures("syslog")
def test_syslog_that_restarts_gets_the_next_event(tmp_path: Path) -> None:
    events = open_log("syslog")
    (tmp_path / "syslog").unlink()
    events.write(Event("core.started"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "syslog"))
        daemon.settimeout(5)
        events.write(LOST)
        assert daemon.recv(9999).decode().endswith(LOST_TEXT)


@pytest.mark.usefixtures("syslog")
def test_syslog_that_does_not_read_makes_nobody_wait() -> None:
    events = open_log("syslog")
    for _ in range(2000):  # far more than a socket queues
        events.write(LOST)


# the file


def test_file_is_made_for_owner_and_group_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "ha.log"
    path.write_text("before\n")
    umask = os.umask(0)
    try:
        open_log(f"file:{path}").write(LOST)
        open_log(f"file:{path}2").write(LOST)
    finally:
        os.umask(umask)
    assert lines_of(path)[0] == "before"
    assert lines_of(path)[1].endswith(LOST_TEXT)
    assert Path(f"{path}2").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("removed", [True, False])
def test_file_that_was_rotated_is_made_anew_after_a_second(tmp_path: Path, removed: bool) -> None:
    path, rotated = tmp_path / "ha.log", tmp_path / "ha.log.1"
    events, fallback, clock = file_log(path)
    events.write(LOST)
    path.rename(rotated)
    if removed:
        rotated.unlink()
    clock.now += 0.9
    events.write(LOST)
    assert not path.exists()
    clock.now += 0.1
    events.write(LOST)
    assert len(lines_of(path)) == 1
    assert removed or len(lines_of(rotated)) == 2
    assert fallback.texts == []


def test_file_that_was_rotated_away_for_good_gets_no_more_lines(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "ha.log"
    path.parent.mkdir()
    events, fallback, clock = file_log(path)
    path.parent.rename(tmp_path / "old")
    clock.now += 1
    events.write(LOST)
    events.write(LOST)
    assert fallback.texts == [LOST_TEXT] * 2
    assert lines_of(tmp_path / "old" / "ha.log") == []


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_looking_for_the_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    path = tmp_path / "ha.log"
    before = open_descriptors()
    events, _, clock = file_log(path)
    for turn in range(10):
        clock.now += 1
        events.write(LOST)
        if turn % 2:
            path.unlink()
    assert open_descriptors() == before + 1
    events.close()
    assert open_descriptors() == before


def test_file_that_cannot_be_opened_is_one_line_on_stderr_and_then_syslog(
    tmp_path: Path, syslog: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    events = open_log(f"file:{tmp_path}/none/ha.log")
    events.write(LOST)
    events.write(Event("core.stopped"))
    assert [syslog.recv(9999).decode().split(": ")[1] for _ in range(2)] == [LOST_TEXT, "core.stopped"]
    complaint = capfd.readouterr().err
    assert complaint.count("\n") == 1
    assert f"log file {tmp_path}/none/ha.log cannot be written (No such file or directory)" in complaint


def test_file_that_can_be_opened_again_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "none" / "ha.log"
    events, fallback, clock = file_log(path)
    path.parent.mkdir()
    events.write(LOST)
    assert fallback.texts == [LOST_TEXT]
    clock.now += 1
    events.write(LOST)
    assert len(lines_of(path)) == 1
    assert len(fallback.texts) == 1


def test_file_that_takes_no_more_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    events, fallback, _ = file_log(Path("/dev/full"))
    events.write(LOST)
    events.write(LOST)
    assert fallback.texts == [LOST_TEXT] * 2
    assert capfd.readouterr().err.count("No space left") == 1


def test_path_that_no_system_call_takes_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    events, fallback, _ = file_log(Path("/tmp/\0\ud800"))
    events.write(LOST)
    assert fallback.texts == [LOST_TEXT]
    assert capfd.readouterr().err.count("\n") == 1


def test_fifo_without_a_reader_makes_nobody_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    events, fallback, _ = file_log(tmp_path / "fifo")
    events.write(LOST)
    assert fallback.texts == [LOST_TEXT]


def test_descriptor_that_the_host_took_is_left_alone(tmp_path: Path) -> None:
    """A daemon closes all descriptors after C_Initialize, and its database gets our number."""
    path = tmp_path / "ha.log"
    events, fallback, _ = file_log(path)
    descriptors = Path("/proc/self/fd").iterdir()
    (ours,) = (int(entry.name) for entry in descriptors if entry.is_symlink() and entry.readlink() == path)
    database = os.open(tmp_path / "database", os.O_RDWR | os.O_CREAT)
    os.dup2(database, ours)
    events.write(LOST)
    assert len(lines_of(path)) == 1
    assert (tmp_path / "database").read_bytes() == b""
    events.close()
    os.write(ours, b"still open")
    os.close(ours)
    os.close(database)
    assert fallback.texts == []


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "ha.log"
    script = (
        "import sys; from pkcs11_ha.log import Event, open_log; log = open_log('file:' + sys.argv[1])\n"
        "for n in range(300): log.write(Event('core.failed', sys.argv[2], '', {'n': n, 'x': 'x' * (n * 10)}))"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(log.__file__).parents[1])}
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(path), name], env=environ) for name in "abcd"
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    pattern = re.compile(r"\S+Z pkcs11-ha\[\d+\] group=([abcd]) core\.failed n=(\d+) x=(x+|\"\")")
    found = [pattern.fullmatch(text) for text in lines_of(path)]
    assert len(found) == 1200
    assert all(match and (len(match[3]) == int(match[2]) * 10 or match[2] == "0") for match in found)


def test_broken_pipe_does_not_kill_the_host() -> None:
    """SIGPIPE's default action ends a process; the host's own choice for it is left as it was."""
    script = (
        "import os, signal; from pkcs11_ha.log import Event, open_log\n"
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "reader, writer = os.pipe(); os.dup2(writer, 2); os.close(reader); os.close(writer)\n"
        "log = open_log('stderr'); log.write(Event('core.started')); log.write(Event('core.stopped'))\n"
        "assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set() and signal.sigpending() == set()\n"
        "print('alive', flush=True); os.write(2, b'the host itself')"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(log.__file__).parents[1])}
    host = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environ, timeout=60, check=False
    )
    assert host.stdout == b"alive\n"
    assert host.returncode == -signal.SIGPIPE


# the file, when it is full

ROTATED = re.compile(r"ha\.log\.\d{8}T\d{6}\.\d{3}Z")


def rotated_of(path: Path) -> list[Path]:
    return sorted(entry for entry in path.parent.iterdir() if ROTATED.fullmatch(entry.name))


def test_full_file_gets_a_name_with_the_time_that_no_other_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ha.log"
    events, fallback, _ = file_log(path, 2 * len(line(LOST_TEXT, 0, os.getpid())))
    monkeypatch.setattr("time.time_ns", lambda: 1795367907123 * 1_000_000)
    for _ in range(7):
        events.write(LOST)
    assert [entry.name for entry in rotated_of(path)] == [
        f"ha.log.20261122T171827.{milliseconds}Z" for milliseconds in (123, 124, 125)
    ]
    assert [len(lines_of(entry)) for entry in (*rotated_of(path), path)] == [2, 2, 2, 1]
    assert fallback.texts == []


def test_new_file_is_for_those_who_could_write_to_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "ha.log"
    path.touch()
    path.chmod(0o660)
    events, _, _ = file_log(path, 1)
    events.write(LOST)
    assert len(rotated_of(path)) == 1
    assert path.stat().st_mode & 0o777 == 0o660


def test_link_to_the_file_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "ha.log")
    events, _, _ = file_log(tmp_path / "link", 1)
    events.write(LOST)
    events.write(LOST)
    assert len(rotated_of(tmp_path / "there" / "ha.log")) == 2
    assert (tmp_path / "link").is_symlink()


def test_file_that_cannot_be_renamed_grows_and_is_complained_of_once(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = directory / "ha.log"
    path.touch()
    path.chmod(0o666)
    directory.chmod(0o1777)  # where one may make files, and not rename those of others
    user = os.geteuid()
    if user == 0:
        os.chown(directory, 1, 1)
        os.chown(path, 1, 1)
    else:
        directory.chmod(0o555)
    try:
        if user == 0:
            os.seteuid(65534)
        events, fallback, _ = file_log(path, 1)
        events.write(LOST)
        events.write(LOST)
    finally:
        os.seteuid(user)
        directory.chmod(0o755)
    assert len(lines_of(path)) == 2
    assert [entry.name for entry in directory.iterdir()] == ["ha.log"]
    assert fallback.texts == []
    complaint = capfd.readouterr().err
    assert complaint.count("\n") == 1
    assert f"log file {path} cannot be rotated (" in complaint


def test_device_is_not_rotated(capfd: pytest.CaptureFixture[str]) -> None:
    open_log("file:/dev/stderr", max_bytes=1).write(LOST)
    assert LOST_TEXT in capfd.readouterr().err


WRITERS, LINES, MAX_BYTES = 8, 1000, 16384
WRITER = f"""
import os, sys, threading
from pkcs11_ha.log import Event, open_log
log = open_log("file:" + sys.argv[1], "text", {MAX_BYTES})
sys.stdin.readline()
def write(name):
    for n in range({LINES // 2}):
        log.write(Event("core.failed", name, "", {{"n": n, "x": "x" * (n % 500)}}))
child = os.fork()  # which has the same open file
name = sys.argv[2] + ("p" if child else "c")
threads = [threading.Thread(target=write, args=(name + str(k),)) for k in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
sys.exit(os.waitpid(child, 0)[1] if child else 0)
"""


def test_no_line_of_many_processes_is_lost_or_doubled_over_many_rotations(tmp_path: Path) -> None:
    path = tmp_path / "ha.log"
    environ = {**os.environ, "PYTHONPATH": str(Path(log.__file__).parents[1])}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name],
            env=environ,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in "abcdefgh"[:WRITERS]
    ]
    for writer in writers:
        assert writer.stdin
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    said = [writer.communicate(timeout=100)[1] for writer in writers]
    assert said == [b""] * WRITERS
    assert [writer.returncode for writer in writers] == [0] * WRITERS

    pattern = re.compile(r"\S+Z pkcs11-ha\[\d+\] group=([a-h][pc][01]) core\.failed n=(\d+) x=(x+|\"\")")
    found = []
    files = [*rotated_of(path), path]
    for text in (text for file in files for text in lines_of(file)):
        match = pattern.fullmatch(text)
        assert match, text
        assert len(match[3].strip('"')) == int(match[2]) % 500
        found.append((match[1], int(match[2])))
    names = [f"{name}{half}{thread}" for name in "abcdefgh"[:WRITERS] for half in "pc" for thread in "01"]
    assert sorted(found) == [(name, n) for name in sorted(names) for n in range(LINES // 2)]

    # Full, each took at most one line more of every thread: so nobody stayed with it.
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= MAX_BYTES + len(names) * 600
    assert len(sizes) > 100
