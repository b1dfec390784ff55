"""`p11ha events`: each line of the log comes back as it went in, once, over rotations, in both forms, filtered."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_ha import log
from pkcs11_ha.cli.events import Entry, entry_of, since
from pkcs11_ha.log import EVENTS, Event
from tests.conftest import Group, GroupFactory, ServerFactory, SoftTokenFactory
from tests.observe.conftest import P11HA, ClientFactory, p11ha

AT_MS = 1_795_428_000_123
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(
    st.sampled_from(sorted(EVENTS)),
    st.just("") | NAMES,
    st.just("") | NAMES,
    st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), NAMES, max_size=4),
)
def test_a_line_comes_back_as_it_went_in(name: str, group: str, member: str, details: dict[str, str]) -> None:
    event = Event(name, group, member, details)
    line = log.line(log.describe(event), AT_MS, 17).decode().removesuffix("\n")
    entry = entry_of(line)
    assert entry is not None
    assert entry == Entry(datetime.fromtimestamp(AT_MS / 1000, UTC), 17, event)
    assert entry.text() == line
    assert entry_of(json.dumps(entry.as_json())) == entry


@given(st.text() | st.text().map(lambda text: f"2026-11-23T10:00:00.000Z pkcs11-ha[1] {text}"))
def test_any_text(text: str) -> None:
    entry = entry_of(text)
    if entry is not None:
        assert entry.text().isprintable()


@given(
    st.dictionaries(
        st.sampled_from(["time", "pid", "group", "member", "event", "details"]), st.text() | st.integers()
    )
)
def test_any_object(plain: dict[str, object]) -> None:
    entry_of(json.dumps(plain))


def test_since() -> None:
    now = datetime(2026, 11, 23, 12, tzinfo=UTC)
    assert since("90m", now) == now - timedelta(minutes=90)
    assert since("2026-11-23T11:00", now) == since("2026-11-23T12:00+01:00", now) == now - timedelta(hours=1)
    with pytest.raises(ValueError, match="neither a time"):
        since("yesterday", now)


# ---- the command


def written(number: int, member: str = "east", name: str = "member.lost") -> bytes:
    return log.line(log.describe(Event(name, "prod", member, {"number": number})), AT_MS + number, 1)


def numbers(output: str) -> list[int]:
    return [int(line.rsplit("=", 1)[1]) for line in output.splitlines()]


@pytest.fixture
def made(soft_token: SoftTokenFactory, group: GroupFactory) -> Group:
    return group(soft_token("east").member())


def rotated(made: Group, *parts: bytes) -> None:
    """A log in so many files, the oldest first, the last one live; as rotation names and dates them."""
    for age, part in enumerate(reversed(parts)):
        path = Path(f"{made.log}.20261123T1015{59 - age:02}.123Z") if age else made.log
        path.write_bytes(part)
        os.utime(path, (1e9 - age, 1e9 - age))


def test_rotated_files_are_read_in_order(made: Group) -> None:
    rotated(made, written(1) + written(2), written(3), b"no line of ours\n" + written(4))
    made.log.with_name("ha.log.old.gz").write_bytes(b"\x1f\x8b")
    assert numbers(p11ha("events").stdout) == [1, 2, 3, 4]


def test_filters(made: Group) -> None:
    lines = [
        written(1),
        written(2, "west"),
        written(3, "east", "member.recovered"),
        written(4, "east", "login.refused"),
    ]
    rotated(made, b"".join(lines))
    assert numbers(p11ha("events", "prod").stdout) == [1, 2, 3, 4]
    assert numbers(p11ha("events", "--member", "east").stdout) == [1, 3, 4]
    assert numbers(p11ha("events", "--event", "member.*").stdout) == [1, 2, 3]
    moment = datetime.fromtimestamp((AT_MS + 3) / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
    assert numbers(p11ha("events", "--since", moment).stdout) == [3, 4]
    (last,) = p11ha("events", "--event", "login.refused", "--json").stdout.splitlines()
    assert json.loads(last)["details"] == {"number": "4"}


def test_lines_of_json_are_read_alike(made: Group) -> None:
    entry = entry_of(written(5).decode().strip())
    assert entry is not None
    made.log.write_text(json.dumps(entry.as_json()) + "\n")
    assert p11ha("events").stdout.encode() == written(5)


@contextmanager
def following(made: Group, *arguments: str) -> Iterator[Queue[str]]:
    command: list[str | Path] = [P11HA, "events", "--follow", "--config", str(made.conf), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: Queue[str] = Queue()

    def take() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line)

    taker = Thread(target=take)
    taker.start()
    try:
        yield lines
    finally:
        process.terminate()
        taker.join()
        process.communicate()


def next_number(lines: Queue[str]) -> int:
    return numbers(lines.get(timeout=30))[0]


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_following_outlives_rotation(made: Group) -> None:
    rotated(made, b"".join(map(written, range(5))), b"".join(map(written, range(5, 12))))
    with following(made) as lines:
        assert [next_number(lines) for _ in range(10)] == list(range(2, 12))  # the last ten
        append(made.log, written(12)[:20])
        append(made.log, written(12)[20:])
        assert next_number(lines) == 12
        first, second = (Path(f"{made.log}.20261123T10200{n}.000Z") for n in (0, 1))
        append(made.log, written(13))
        made.log.rename(first)
        made.log.write_bytes(written(14))
        append(first, written(15))  # on its way when the file was renamed
        made.log.rename(second)
        made.log.write_bytes(written(16))
        assert sorted(next_number(lines) for _ in range(4)) == [13, 14, 15, 16]
        made.log.unlink()
        made.log.write_bytes(written(17))
        assert next_number(lines) == 17
        made.log.write_bytes(b"")
        append(made.log, written(18, "e"))  # shorter than what was there
        assert next_number(lines) == 18
    assert lines.empty()


def test_what_an_application_logs_is_followed(
    soft_token: SoftTokenFactory, server: ServerFactory, group: GroupFactory, client: ClientFactory
) -> None:
    east, west = server(soft_token("east")), soft_token("west")
    made = group(east.member(), west.member(), recovery={"interval_s": 3600})
    one = client()
    with following(made, "prod", "--event", "member.*", "--json") as lines:
        one.call(10)
        east.kill()
        one.call(10)
        lost = json.loads(lines.get(timeout=30))
    assert (lost["event"], lost["member"], lost["pid"]) == ("member.lost", "east", one.pid)
    assert lost["details"]["code"] == "CKR_DEVICE_ERROR"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--event", "member.loss"), 2, "there is no event 'member.loss': type member.lost"),
        (("--event", "nonsense"), 2, "there is no event 'nonsense': type one of docs/log.md, or member.*"),
        (
            ("--since", "noon"),
            2,
            "'noon' is neither a time (2026-11-23T12:00, in UTC) nor an age (10m, 2h, 3d)",
        ),
        (("--config", "/nowhere.toml"), 1, "/nowhere.toml: No such file or directory: p11ha member add"),
        (("--config", "/"), 1, "/: Is a directory"),
        (("--config", "/dev/null"), 1, "/dev/null: not a regular file"),
        (("--config", "/dev/null/x"), 1, "/dev/null/x: Not a directory"),
        ((), 1, "ha.log: No such file or directory"),
    ],
)
def test_wrong_use_is_said(arguments: tuple[str, ...], status: int, says: str, made: Group) -> None:
    assert not made.log.exists()
    said = p11ha("events", *arguments, status=status, COLUMNS="200").stderr
    assert says in said


def test_a_configuration_that_is_no_toml_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[[x")
    said = p11ha("events", "--config", str(broken), status=1).stderr
    assert said.startswith(f"{broken}:1: not valid TOML")
    assert "syslog" not in said


def test_names_that_nobody_knows_are_said(made: Group) -> None:
    append(made.log, log.line(log.describe(Event("member.lost", "old", "west", {"number": 1})), AT_MS, 1))
    for arguments, says in (
        (("prid",), "no group 'prid': there is prod"),
        (("--member", "eats"), "no member 'eats': there is east"),
        (("prod", "--member", "west"), "no member 'west' in group prod: there is east"),
        (("prid", "--follow"), "no group 'prid': there is prod"),
    ):
        done = p11ha("events", *arguments, status=1)
        assert (done.stdout, done.stderr) == ("", says + "\n")
    assert p11ha("events", "prod", "--member", "east").stdout == ""  # known, and nothing happened to it
    assert numbers(p11ha("events", "old").stdout) == [1]  # no longer configured
    assert numbers(p11ha("events", "--member", "west").stdout) == [1]
    assert p11ha("events", "old", "--event", "login.refused").stdout == ""


def test_who_reads_no_further_is_no_fault_of_the_log(made: Group) -> None:
    rotated(made, b"".join(written(number) for number in range(3000)))  # more than a pipe holds
    with subprocess.Popen([P11HA, "events"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, b"")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([P11HA, "events"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert str(made.log) not in done.stderr


@pytest.mark.parametrize(
    ("target", "says"),
    [("syslog", "journalctl -t pkcs11-ha"), ("off", "is kept nowhere"), ("stderr", "is kept nowhere")],
)
def test_a_log_that_is_no_file(
    target: str, says: str, soft_token: SoftTokenFactory, group: GroupFactory
) -> None:
    group(soft_token("east").member(), ha={"log": target})
    assert says in p11ha("events", status=1).stderr
