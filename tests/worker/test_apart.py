"""Libraries that could not live in one process with one setting each do so in workers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from demo.members import SoftToken, softhsm
from tests import fake as fakes
from tests import p11
from tests.conftest import SoftTokenFactory
from tests.ha.app import Application
from tests.ha.conftest import FakeFactory, StartFactory
from tests.worker.processes import started_by


def write_on(app: Application, name: str) -> None:
    """A data object by the member's own slot."""
    index = list(app.core.members).index(name)
    session = app.module.open(index, rw=True)
    session.login("123456")
    label = f"of {name}"
    session.create(
        {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_LABEL: label, p11.CKA_VALUE: b"x"}
    )
    session.close()


def objects(token: SoftToken) -> int:
    """How many its store has."""
    return len(
        [path for path in Path(token.directory, "tokens").rglob("*.object") if path.name != "token.object"]
    )


def test_one_library_with_two_settings(soft_token: SoftTokenFactory, start: StartFactory) -> None:
    """Each sees its own store alone, without a copy of the library."""
    tokens = [soft_token("east"), soft_token("west")]
    members = [token.member(host="worker", instance="shared") for token in tokens]
    app = start(*members, ha={"only": False})
    assert app.away() == set()
    assert len(started_by(os.getpid())) == 2
    for times, name in enumerate(["east", "west", "west"], 1):
        write_on(app, name)
        assert sum(map(objects, tokens)) == times
    assert [objects(token) for token in tokens] == [1, 2]


def test_libraries_with_the_same_symbols(
    soft_token: SoftTokenFactory, fake: FakeFactory, start: StartFactory, directory: Path
) -> None:
    """A library, a copy of it that another vendor might ship under another name, and one more."""
    copy = directory / "libvendor.so"
    shutil.copy2(softhsm(), copy)
    east, west, north = soft_token("east"), soft_token("west"), fake("north", fakes.signing_key())
    north.shared.pin = east.pin.encode()
    app = start(
        east.member(host="worker"), west.member(host="worker", module=str(copy)), north.member(host="worker")
    )
    assert app.away() == set()
    session = app.login(east.pin)
    assert {(len(session.random(8)), app.served(session)) for _ in range(9)} == {
        (8, "east"),
        (8, "west"),
        (8, "north"),
    }
