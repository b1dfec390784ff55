"""The virtual token looks the same whatever member answers, is slow or is missing, in this process and the next."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests import p11
from tests.conftest import Group
from tests.ha import operations
from tests.ha.app import SOON, Application, until, working_until
from tests.ha.conftest import FakeFactory, Pair, StartFactory
from tests.ha.operations import Use

IDENTITY = ("label", "manufacturer", "model", "serial")


def face(app: Application) -> tuple[int, ...] | tuple[object, ...]:
    token = app.module.token(app.slot)
    return (app.slot, *(getattr(token, name) for name in IDENTITY))


def again(app: Application) -> None:
    """A new run, as a new process has it."""
    app.module.finalize()
    app.module.initialize()


@pytest.mark.parametrize("dead", ["east", "west"])
def test_token_is_the_same_with_either_member_dead(pair: Pair, start: StartFactory, dead: str) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    before, flags = face(use.app), use.app.module.token(use.app.slot).flags
    assert before == (0, "prod", "pkcs11-ha", "HA group", "1599447001")
    pair.named(dead).kill()
    assert face(use.app) == before
    working_until(lambda: operations.sign_ecdsa(use), use.app.away, "the loss is noticed")
    assert face(use.app) == before
    assert use.app.module.token(use.app.slot).flags == flags
    again(use.app)
    assert use.app.away() == {dead}
    assert face(use.app) == before


def test_session_info_names_the_same_slot_throughout(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    slot = use.session.info().slot
    pair.east.kill()
    operations.sign_ecdsa(use)
    operations.sign_ecdsa(use)
    assert use.session.info().slot == slot == use.app.slot


def without_serial(group: Group) -> None:
    """The group's serial is then made of its first member's."""
    text = group.conf.read_text()
    group.conf.write_text(re.sub(r'^serial = "1599447001"\n', "", text, flags=re.MULTILINE))


@pytest.fixture
def unnamed(pair: Pair, start: StartFactory) -> Application:
    app = start(*pair.members())
    app.module.finalize()
    without_serial(app.group)
    app.module.initialize()
    return app


def test_serial_is_one_and_that_of_the_first_member(unnamed: Application, pair: Pair) -> None:
    assert unnamed.module.token(unnamed.slot).serial == ("1" + pair.east.token.serial)[:16]


def test_serial_is_the_same_in_a_process_that_never_saw_the_first_member(
    unnamed: Application, pair: Pair
) -> None:
    before = face(unnamed)
    pair.east.kill()
    again(unnamed)
    assert unnamed.away() == {"east"}
    assert face(unnamed) == before
    pair.east.start()
    again(unnamed)
    assert face(unnamed) == before


def test_serial_of_a_first_member_nobody_ever_saw_is_warned_of(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members())
    app.module.finalize()
    without_serial(app.group)
    pair.east.kill()
    app.module.initialize()
    assert len(app.events("config.warned")) == 1
    first = face(app)
    again(app)
    assert face(app) == first


def test_token_says_what_was_configured(pair: Pair, start: StartFactory) -> None:
    """Applications store the identity of the token they were set up with."""
    app = start(
        *pair.members(), label="old HSM", serial="0123456789abcdef", manufacturer="Vendor", model="Box 7"
    )
    assert face(app) == (0, "old HSM", "Vendor", "Box 7", "0123456789abcdef")
    pair.east.kill()
    assert face(app)[1:] == ("old HSM", "Vendor", "Box 7", "0123456789abcdef")


def test_mechanisms_are_those_that_every_serving_member_offers(
    fake: FakeFactory, start: StartFactory
) -> None:
    east, west = fake("east"), fake("west")
    west.shared.mechanisms = 3
    app = start(east.member(), west.member(), recovery={"interval_s": 0.05})
    assert app.module.mechanisms(app.slot) == [p11.CKM_RSA_PKCS, p11.CKM_SHA256_HMAC, p11.CKM_AES_ECB]
    session = app.open()
    west.shared.absent = 1
    until(lambda: session.random(8) and app.away(), "the loss is noticed")
    assert len(app.module.mechanisms(app.slot)) == 5
    west.shared.absent = 0
    until(lambda: session.random(8) and not app.away(), "it is back")
    assert len(app.module.mechanisms(app.slot)) == 3


def test_member_whose_slot_number_moved_is_found_by_its_token(fake: FakeFactory, start: StartFactory) -> None:
    """Another token has taken the number meanwhile."""
    east, west, other = fake("east"), fake("west"), fake("other")
    env = {"FAKE_TOKENS": f"{east.file}:{other.file}"}
    app = start(east.member(env=env), west.member(), recovery={"interval_s": 0.05})
    session = app.open()
    east.shared.absent = 1
    until(lambda: session.random(8) and app.away(), "the loss is noticed")
    east.shared.label, other.shared.label = other.shared.label, east.shared.label
    east.shared.absent = 0
    until(lambda: session.random(8) and not app.away(), "it is back")
    before = other.calls("C_GenerateRandom")
    for _ in range(4):
        session.random(8)
    assert other.calls("C_GenerateRandom") > before


def test_two_tokens_that_fit_are_none(fake: FakeFactory, start: StartFactory) -> None:
    """Which of them is meant must not depend on their order."""
    east, west, twin = fake("east"), fake("west"), fake("twin")
    twin.shared.label = b"east"
    env = {"FAKE_TOKENS": f"{east.file}:{twin.file}"}
    app = start(east.member(env=env), west.member())
    assert app.away() == {"east"}
    (lost,) = app.events("member.lost", "east")
    assert "be more precise" in lost


def test_member_that_restarts_as_another_token_is_not_taken_in(
    fake: FakeFactory, start: StartFactory
) -> None:
    east, west = fake("east"), fake("west")
    app = start(east.member(), west.member(), recovery={"interval_s": 0.05})
    session = app.open()
    east.shared.absent = 1
    until(lambda: session.random(8) and app.away(), "the loss is noticed")
    east.shared.label = b"somebody else"
    east.shared.absent = 0
    until(lambda: session.random(8) and len(app.events("recovery.failed")) >= 2, "it was tried")
    assert app.away() == {"east"}


def test_serial_of_a_member_that_is_away_is_what_it_last_was(pair: Pair, start: StartFactory) -> None:
    """Also if it came only after the start of the process that saw it."""
    pair.east.kill()
    app = start(*pair.members(), recovery=SOON)
    assert set(app.module.ha_status(app.slot).members) == {"east", pair.west.token.serial}
    session = app.open()
    pair.east.start()
    until(lambda: session.random(8) and not app.away(), "it is taken in")
    pair.east.kill()
    again(app)
    assert app.away() == {"east"}
    assert set(app.module.ha_status(app.slot).members) == {pair.east.token.serial, pair.west.token.serial}


def test_group_moves_with_its_state(pair: Pair, start: StartFactory, directory: Path) -> None:
    """What is remembered of serials lies in the state directory and nowhere else."""
    app = start(*pair.members())
    app.module.finalize()
    without_serial(app.group)
    app.module.initialize()
    serial = app.module.token(app.slot).serial
    assert serial in (app.group.state / "serials.json").read_text()
    assert replace(app.group, label="x").state == directory / "state"
