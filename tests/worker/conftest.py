"""Fixtures of the worker tests: tokens behind workers, started and listening, and stubs called without a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Protocol

import pytest

from demo.members import SoftToken, Table, Toml, Worker
from tests.ha import conftest as ha
from tests.ha.app import Application
from tests.ha.conftest import StartFactory
from tests.worker.remote import Remote

keys = ha.keys
models = ha.models
tokens = ha.tokens
fake_library = ha.fake_library
fake = ha.fake
start = ha.start
pair = ha.pair
fake = ha.fake
fake_library = ha.fake_library

WorkerFactory = Callable[[SoftToken], Worker]


class Hosted(Protocol):
    def __call__(self, token: SoftToken, **options: Toml) -> Table: ...


@pytest.fixture
def listening() -> Iterator[WorkerFactory]:
    """Starts workers at sockets; none of their processes outlives the test."""
    with ExitStack() as stack:
        yield lambda token: stack.enter_context(Worker(token))


@pytest.fixture(params=["worker", "unix"])
def hosted(request: pytest.FixtureRequest, listening: WorkerFactory) -> Hosted:
    """A token as a member in a worker, of each kind."""

    def make(token: SoftToken, **options: Toml) -> Table:
        if request.param == "unix":
            return listening(token).member(**options)
        return token.member(host="worker", **options)

    return make


@pytest.fixture
def application(tokens: tuple[SoftToken, SoftToken], hosted: Hosted, start: StartFactory) -> Application:
    """A group of two tokens with the same keys, each in a worker."""
    return start(*(hosted(token) for token in tokens))


@pytest.fixture
def remote(tokens: tuple[SoftToken, SoftToken], start: StartFactory) -> Iterator[Remote]:
    """Stubs without a group; the group beside it is there because the module must be up."""
    start(tokens[0].member())
    made = Remote()
    yield made
    made.free()
