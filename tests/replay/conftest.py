"""Fixtures of the replay tests: tokens with the same keys, and applications whose members are killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from demo.members import SoftToken, Table, Toml, Worker
from tests.chaos.conftest import crash_library as crash_library
from tests.ha import conftest as ha
from tests.ha.conftest import clone
from tests.replay.keys import Keys
from tests.replay.killable import AT_ONCE, Killable, NssToken, behind, killable, reference
from tests.replay.scripts import Use
from tests.replication.conftest import scratch

NAMES = ("east", "west", "north")

fake_library = ha.fake_library
fake = ha.fake
start_fakes = ha.start


@pytest.fixture(scope="session")
def every_key() -> Keys:
    return Keys.generate()


def _provision(token: SoftToken, keys: Keys) -> SoftToken:
    with reference(token) as use:
        keys.put_on(use.session, *(("ed25519",) if isinstance(token, NssToken) else ()))
    return token


@pytest.fixture(scope="session")
def soft_models(every_key: Keys) -> Iterator[list[SoftToken]]:
    """Three tokens with every key, to be copied."""
    with scratch() as path:
        yield [_provision(SoftToken(Path(path, name), name), every_key) for name in NAMES]


@pytest.fixture(scope="session")
def nss_tokens(every_key: Keys) -> Iterator[list[SoftToken]]:
    """Three databases with every key; used as they are: nothing is written to them."""
    with scratch() as path:
        yield [_provision(NssToken(Path(path, name), name), every_key) for name in NAMES]


@pytest.fixture
def soft_tokens(soft_models: list[SoftToken], directory: Path) -> list[SoftToken]:
    """The test's own."""
    return [clone(each, directory / each.label) for each in soft_models]


class Start(Protocol):
    def __call__(self, *workers: Worker, recovery: Table = ..., **options: Toml) -> Killable: ...


@pytest.fixture
def start(module: Path, directory: Path, soft_tokens: list[SoftToken]) -> Iterator[Start]:
    """Starts an application on the first two tokens, or on what is given."""
    with ExitStack() as stack:

        def make(*workers: Worker, recovery: Table = AT_ONCE, **options: Toml) -> Killable:
            given = workers or tuple(map(behind, soft_tokens[:2]))
            return stack.enter_context(killable(module, directory, given, recovery, **options))

        yield make


@pytest.fixture
def undisturbed(soft_models: list[SoftToken]) -> Iterator[Use]:
    """A token with the same keys, by the vendor's module without us."""
    with reference(soft_models[2]) as use:
        yield use
