"""Fixtures of the replication tests: groups of tokens with one domain key, copies of a pair that is made once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from demo.members import SoftToken, Table, Toml
from tests import p11
from tests.conftest import GroupFactory
from tests.ha.app import bare, code
from tests.ha.conftest import clone
from tests.replication import contents, domain
from tests.replication.compare import Do, Made, Step
from tests.replication.domain import NAMES, PIN, SOON, Domain

MEMORY = Path("/dev/shm")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """In memory if possible: a token writes every object through to its disk."""
    return tempfile.TemporaryDirectory(prefix="p11ha-", dir=MEMORY if MEMORY.is_dir() else None)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of the test's own."""
    with scratch() as path:
        yield Path(path)


@dataclass(frozen=True)
class Models:
    """Tokens to be copied: a pair with one domain key, and a token that knows of no group."""

    pair: Sequence[SoftToken]
    plain: SoftToken


@pytest.fixture(scope="session")
def models(module: Path) -> Iterator[Models]:
    assert module.exists()  # what the p11ha command loads
    with scratch() as path:
        pair = [SoftToken(Path(path, name), name, PIN) for name in NAMES]
        domain.initialise(Path(path, "init"), [token.member() for token in pair])
        yield Models(pair, SoftToken(Path(path, "plain"), "plain", PIN))


@pytest.fixture
def tokens(models: Models, directory: Path) -> list[SoftToken]:
    """A pair with a domain key, the test's own."""
    return [clone(token, directory / token.label) for token in models.pair]


@pytest.fixture
def plain(models: Models, directory: Path) -> SoftToken:
    """A token of no group, to compare with."""
    return clone(models.plain, directory / "plain")


class StartFactory(Protocol):
    def __call__(self, *members: Table, ha: Table | None = ..., **options: Toml) -> Domain: ...


@pytest.fixture
def start(module: Path, group: GroupFactory, tokens: Sequence[SoftToken]) -> Iterator[StartFactory]:
    """Configures the group of the pair, or of other members, and initialises the module; finalised at the end."""
    with ExitStack() as stack:

        def make(*members: Table, ha: Table | None = None, **options: Toml) -> Domain:
            given = members or tuple(token.member() for token in tokens)
            settings: dict[str, Toml] = {"replication": "domain"} | options
            label = settings.pop("label", domain.LABEL)
            assert isinstance(label, str)
            where = group(*given, label=label, recovery=SOON, ha=ha, **settings)
            app = Domain(p11.Module(module), where, tokens)
            app.module.initialize()
            stack.callback(_finalize, app.module)
            return app

        yield make


def _finalize(module: p11.Module) -> None:
    with suppress(p11.CkError):  # some tests have done so
        module.finalize()


@pytest.fixture
def app(start: StartFactory) -> Domain:
    """The group of the pair."""
    return start()


@pytest.fixture
def do(start: StartFactory, tokens: Sequence[SoftToken], plain: SoftToken) -> Do:
    """Does the same on a token of no group and in the group of two; the group's first member is the origin."""

    def done(steps: Mapping[str, Step]) -> Made:
        with bare(plain) as session:
            right = {name: code(lambda: step(session)) for name, step in steps.items()}  # noqa: B023
        app = start(balance="primary-first")
        session = app.login(PIN)
        ours = {name: code(lambda: step(session)) for name, step in steps.items()}  # noqa: B023
        app.module.finalize()
        answers = {name: (right[name], ours[name]) for name in steps}
        origin, copy = map(contents.of, tokens)
        for each in origin, copy:
            assert (set(each.ledger) - {"kept"}, each.others) == (set(), [])
        return Made(contents.of(plain), origin, copy, answers)

    return done
