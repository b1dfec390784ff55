"""Segments are read whole or refused in one line, whatever the bytes are, and joined."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_ha.cli import screen, segments
from pkcs11_ha.cli.segments import Damaged, Unfinished, edge_ns, join, parse
from pkcs11_ha.spec import segment as layout
from tests.observe.made import APPLICATION, AWAY, EAST, PROD, WEST, record, segment


def test_a_segment_is_read_as_it_was_written() -> None:
    counts = (0, 2, 1, *(0 for _ in range(layout.BUCKETS - 3)))
    nothing = (0,) * layout.BUCKETS
    east = record(
        load=7 << layout.LOAD_BITS | 2,
        failovers=3,
        faults=(0, 5, *(0 for _ in range(layout.FAULTS - 2))),
        latency_ns=(0, 1500, 0),
        latency=(*nothing, *counts, *nothing),
    )
    read = parse(segment(records=(east, record())), "x")
    assert read.text == APPLICATION
    of = read.of(EAST)
    assert (of.calls, of.in_flight, of.failovers, of.faults) == (7, 2, 3, {"dead": 5})
    assert of.latency["cryptography"].counts == counts
    assert of.latency["cryptography"].quantile_ns(0.5) == edge_ns(1) == 512
    assert of.latency["cryptography"].quantile_ns(0.99) == edge_ns(2)
    assert of.latency["generation"].quantile_ns(0.5) is None


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"P11HASEG", "truncated: 8 bytes"),
        (segment()[:-1], "truncated: "),
        (segment()[:200], "truncated: 200 of "),
        (segment() + b"\0", "damaged: "),
        (b"\x7fELF".ljust(500, b"x"), "not a status segment"),
        (segment(version=2), "of format 2, this p11ha reads format 1"),
        (segment(records=(record(),), record_size=8), "damaged: its header makes no sense"),
        (segment(text_at=2**63), "damaged: its header makes no sense"),
        (segment(text_size=3), "damaged: its text makes no sense"),
        (segment(replace(APPLICATION, groups=(replace(PROD, members=(replace(EAST, record=2),)),))), "damaged: "),
        (segment(replace(APPLICATION, groups=(replace(PROD, members=(replace(EAST, state="fine"),)),))), "damaged: "),
        (segment().replace(b'"slot": 0', b'"slot":[]'), "damaged: its text makes no sense"),
    ],
)  # fmt: skip
def test_what_is_no_segment_is_said_in_a_line(data: bytes, problem: str) -> None:
    with pytest.raises(Damaged) as refused:
        parse(data)
    assert str(refused.value).startswith(problem)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("data", [b"", bytes(40), bytes(5000)])
def test_a_file_in_the_making_is_no_complaint(data: bytes) -> None:
    with pytest.raises(Unfinished):
        parse(data)


def test_names_of_a_hostile_process_steer_no_terminal() -> None:
    read = parse(segment(replace(APPLICATION, program="\x1b[2J\u202ex")))
    assert read.text
    assert read.text.program == "\\x1b[2J\\u202ex"


@given(st.binary(max_size=4000))
def test_any_bytes(data: bytes) -> None:
    with suppress(Damaged, Unfinished):
        parse(data)
    with suppress(Damaged, Unfinished):
        parse(layout.MAGIC + data)


WHOLE = segment()


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=8))
def test_any_damage(changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for at, byte in changes:
        data[at] = byte
    with suppress(Damaged, Unfinished):
        show(parse(bytes(data)))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KEYS = sorted({key for text in layout.TEXTS for key in text.__dataclass_fields__})


@given(st.sampled_from(_KEYS), _JSON)
def test_any_value_of_any_key(key: str, value: object) -> None:
    def changed(plain: object) -> object:
        if isinstance(plain, dict):
            return {k: value if k == key else changed(v) for k, v in plain.items()}
        return [changed(each) for each in plain] if isinstance(plain, list) else plain

    at = WHOLE.index(b'{"program"')
    text = json.dumps(changed(json.loads(WHOLE[at:].rstrip(b"\0")))).encode()
    data = bytearray(WHOLE[:at] + text)
    for name, number in (("size", len(data)), ("text_size", len(text)), ("text_room", len(text))):
        place = next(place for each, place in layout.offsets(layout.HEADER) if each.name == name)
        data[place : place + 8] = number.to_bytes(8, "little")
    with suppress(Damaged):
        show(parse(bytes(data)))


def show(process: segments.Process) -> None:
    for line in screen.lines(join([process]), screen.Look(every=True)):
        assert line.plain.isprintable()


def test_processes_are_joined_by_member() -> None:
    one = parse(segment(pid=11, started=1), "one")
    lost = replace(APPLICATION, groups=(replace(PROD, members=(EAST, AWAY)),))
    other = parse(segment(lost, pid=12, started=2), "other")
    (prod,) = join([one, other])
    east, west = prod.members
    assert (east.states, east.status) == ({"up": 2}, "CKR_OK")
    assert (west.states, west.status) == ({"up": 1, "away": 1}, "CKR_DEVICE_ERROR")
    assert [view.process.pid for view in west.views] == [11, 12]


def test_a_loss_that_was_read_or_outlived_an_attempt_is_an_old_one() -> None:
    def status(member: layout.MemberText) -> str:
        text = replace(APPLICATION, groups=(replace(PROD, members=(EAST, member)),))
        (prod,) = join([parse(segment(text))])
        return prod.members[1].status

    assert status(AWAY) == "CKR_DEVICE_ERROR"
    assert status(replace(AWAY, loss_was_read=True)) == "CKR_TOKEN_NOT_PRESENT"
    assert status(replace(AWAY, failed=1)) == "CKR_TOKEN_NOT_PRESENT"
    assert status(replace(WEST, state="ejected")) == "CKR_OK"


def test_two_hundred_processes_fit_a_screen() -> None:
    lost = replace(APPLICATION, groups=(replace(PROD, members=(EAST, AWAY)),))
    found = [parse(segment(lost if pid == 150 else APPLICATION, pid=pid, started=1)) for pid in range(1, 201)]
    lines = [line.plain for line in screen.lines(join(found), screen.Look())]
    assert len(lines) < 25
    assert max(map(len, lines)) < 80
    assert any("150 openssl" in line and "away" in line for line in lines)  # trouble comes first
    assert len(screen.lines(join(found), screen.Look(every=True))) > 400


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (lambda s: s.number(99_999), "99999"),
        (lambda s: s.number(100_000), "100k"),
        (lambda s: s.number(123_456_789), "123M"),
        (lambda s: s.number(999_999_999), "1.0G"),
        (lambda s: s.duration(3_725_000_000_000), "1h02m"),
        (lambda s: s.duration(-5), "0s"),
        (lambda s: s.time_of(512), "0.5us"),
        (lambda s: s.time_of(33_554_432), "34ms"),
        (lambda s: s.time_of(None), "-"),
    ],
)  # fmt: skip
def test_figures_are_short(said: object, shown: str) -> None:
    assert callable(said)
    assert said(screen) == shown
