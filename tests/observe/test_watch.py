"""`p11ha watch` in a terminal: live, ordered and filtered by keys, in any size, without colour."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

import pytest

from tests.conftest import GroupFactory, ServerFactory, SoftTokenFactory
from tests.observe.conftest import P11HA, ClientFactory, p11ha
from tests.observe.made import APPLICATION, put, record, segment
from tests.observe.terminal import Terminal

WATCH = (str(P11HA), "watch", "--interval", "0.2")


@pytest.fixture
def state(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PKCS11_HA_STATE", str(directory))
    return directory


@pytest.fixture
def sleepers() -> Iterator[list[int]]:
    """Processes that live, for segments to be of."""
    with ExitStack() as stack:
        processes = [stack.enter_context(Popen(["sleep", "600"])) for _ in range(12)]
        yield [process.pid for process in processes]
        for process in processes:
            process.kill()


def made(state: Path, pid: int, program: str, calls: int) -> None:
    path = put(state, pid)
    started = int(path.name.split("-")[1].removesuffix(".segment"))
    east = record(load=calls << 20)
    text = replace(APPLICATION, program=program)
    path.write_bytes(segment(text, (east, east), pid=pid, started=started))


def test_a_loss_is_seen_as_it_happens(
    soft_token: SoftTokenFactory, server: ServerFactory, group: GroupFactory, client: ClientFactory
) -> None:
    east, west = soft_token("east"), soft_token("west")
    dying = server(east)
    group(dying.member(), west.member(), recovery={"interval_s": 3600})
    one = client()
    one.call(20)
    with Terminal(WATCH) as terminal:
        terminal.says(f"{one.pid} python")
        dying.kill()
        one.call(20)
        lines = terminal.shows(
            lambda lines: any(str(one.pid) in line and " away " in line for line in lines), "east is away"
        )
        assert any("CKR_DEVICE_ERROR" in line for line in lines)
        terminal.press("q")
        assert terminal.ends() == 0
    assert b"\x1b[?1049l" in terminal.raw  # the screen of before is back


def test_keys_order_filter_and_scroll(state: Path, sleepers: list[int]) -> None:
    for number, pid in enumerate(sleepers):
        made(state, pid, f"program{number:02}", 1000 * number)
    with Terminal(WATCH) as terminal:
        terminal.says("12 processes  by trouble")
        terminal.says(f"{sleepers[11]} program11")  # the busiest first
        assert not any("program00" in line for line in terminal.lines)
        terminal.press("s")
        terminal.says("by process")
        terminal.press("a")
        terminal.says("1-21 of 27")
        terminal.press("\x1b[F")
        terminal.says("7-27 of 27")
        terminal.press("\x1b[A\x1b[A")
        terminal.says("5-25 of 27")
        terminal.press("\x1b[5~")
        terminal.says("1-21 of 27")
        terminal.press("/program07")
        terminal.says("filter: program07_")
        lines = terminal.shows(
            lambda lines: sum("program" in line for line in lines) == 3, "others are hidden"
        )
        assert all("program07" in line for line in lines if "program" in line)
        terminal.press("q\x7f\r")  # a letter while it is typed
        terminal.says("filter program07")
        terminal.press("fzzz\r")
        terminal.says("nothing that fits the filter")
        terminal.press("f\x1b")
        terminal.says("12 processes  by process")
        terminal.press("q")
        assert terminal.ends() == 0


def test_it_fits_any_size(state: Path, sleepers: list[int]) -> None:
    for pid in sleepers:
        made(state, pid, "a-program-with-a-very-long-name", 10**12)
    with Terminal(WATCH) as terminal:
        terminal.says("q quit")
        for columns, lines in ((60, 12), (132, 40), (20, 3), (80, 24)):
            terminal.resize(columns, lines)
            terminal.shows(
                lambda lines: "p11ha" in lines[0] and lines[-1].startswith(("1-", "q quit")),
                f"{columns}x{lines} is used",
            )
        terminal.press("\x03")
        assert terminal.ends() == 0


def test_it_has_no_colour_without_any(state: Path, sleepers: list[int]) -> None:
    made(state, sleepers[0], "program", 1)
    with Terminal(WATCH, NO_COLOR="1") as terminal:
        terminal.says("program")
        terminal.press("q")
        assert terminal.ends() == 0
    assert b"\x1b[3" not in terminal.raw.replace(b"\x1b[3m", b"")
    with Terminal(WATCH) as terminal:
        terminal.says("program")
        terminal.press("q")
        assert terminal.ends() == 0
    assert b"\x1b[32m" in terminal.raw


@pytest.mark.usefixtures("state")
def test_ctrl_c_ends_it() -> None:
    with Terminal(WATCH) as terminal:
        terminal.says("no process uses the library now")
        os.kill(terminal.process.pid, signal.SIGINT)
        assert terminal.ends() == 0


@pytest.mark.usefixtures("state")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_the_terminal_as_it_was(number: signal.Signals) -> None:
    with Terminal(WATCH) as terminal:
        terminal.says("no process uses the library now")
        os.kill(terminal.process.pid, number)
        assert terminal.ends() == -number
        terminal.shows(lambda _: b"\x1b[?1049l" in terminal.raw, "the screen is left")
        terminal.shows(lambda _: b"\x1b[?25h" in terminal.raw, "there is a cursor")


@pytest.mark.usefixtures("state")
def test_without_a_terminal_it_says_what_to_type() -> None:
    done = p11ha("watch", status=1)
    assert done.stderr == "watch needs a terminal: p11ha status shows the same once\n"
    with Terminal(WATCH, TERM="dumb") as terminal:
        assert terminal.ends() == 1
    assert b"TERM=dumb: set another" in terminal.raw
