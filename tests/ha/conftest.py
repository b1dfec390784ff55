"""Fixtures of the HA tests: applications on groups of fake and of real members."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from demo.members import Server, SoftToken, Table, Toml, scratch
from tests import fake as fakes
from tests import p11
from tests.conftest import GroupFactory, ServerFactory
from tests.fake import FakeToken
from tests.ha.app import FAR, Application
from tests.ha.keys import Keys, provision


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.build(tmp_path_factory.mktemp("fake"))


class FakeFactory(Protocol):
    def __call__(self, label: str, *objects: p11.Template) -> FakeToken: ...


@pytest.fixture
def fake(fake_library: Path, directory: Path) -> FakeFactory:
    """Makes fake tokens that hold the given objects."""

    def make(label: str, *objects: p11.Template) -> FakeToken:
        token = FakeToken(fake_library, directory / f"{label}.token", label)
        for template in objects:
            token.add(template)
        return token

    return make


class StartFactory(Protocol):
    def __call__(
        self, *members: Table, recovery: Table | None = ..., ha: Table | None = ..., **options: Toml
    ) -> Application: ...


@pytest.fixture
def start(module: Path, group: GroupFactory) -> Iterator[StartFactory]:
    """Configures a group, initialises the module, and finalises it at the end."""
    with ExitStack() as stack:

        def make(
            *members: Table, recovery: Table | None = None, ha: Table | None = None, **options: Toml
        ) -> Application:
            label = options.pop("label", "prod")
            assert isinstance(label, str)
            rule = FAR if recovery is None else recovery
            where = group(*members, label=label, recovery=rule, ha=ha, **options)
            application = Application(p11.Module(module), where)
            application.module.initialize()
            stack.callback(_finalize, application.module)
            return application

        yield make


def _finalize(module: p11.Module) -> None:
    with suppress(p11.CkError):  # some tests have done so
        module.finalize()


@dataclass
class Pair:
    """Two tokens with the same keys, each behind a server that can be killed."""

    east: Server
    west: Server
    keys: Keys

    @property
    def servers(self) -> tuple[Server, Server]:
        return self.east, self.west

    def named(self, name: str) -> Server:
        return {"east": self.east, "west": self.west}[name]

    def other(self, name: str) -> Server:
        return {"east": self.west, "west": self.east}[name]

    def members(self) -> tuple[Table, Table]:
        return self.east.member(), self.west.member()

    @property
    def pin(self) -> str:
        return self.east.token.pin


@pytest.fixture(scope="session")
def keys() -> Keys:
    return Keys.generate()


@pytest.fixture(scope="session")
def models(keys: Keys) -> Iterator[tuple[SoftToken, SoftToken]]:
    """Two tokens with the same keys, to be copied: SoftHSM takes a tenth of a second to write a key."""
    with scratch() as path:
        both = SoftToken(Path(path, "east"), "east"), SoftToken(Path(path, "west"), "west")
        for token in both:
            provision(token, keys)
        yield both


@pytest.fixture
def tokens(models: tuple[SoftToken, SoftToken], directory: Path) -> tuple[SoftToken, SoftToken]:
    """Two tokens with the same keys, the test's own."""
    return clone(models[0], directory / "east"), clone(models[1], directory / "west")


def clone(model: SoftToken, directory: Path) -> SoftToken:
    """A copy of a token in a store of its own: the same label, serial number, PINs and objects."""
    shutil.copytree(model.directory, directory)
    token = copy.copy(model)
    token.directory = directory
    token.conf = directory / model.conf.name
    token.conf.write_text(model.conf.read_text().replace(str(model.directory), str(directory)))
    token.env = {"SOFTHSM2_CONF": str(token.conf)}
    return token


@pytest.fixture
def pair(tokens: tuple[SoftToken, SoftToken], server: ServerFactory, keys: Keys) -> Pair:
    return Pair(server(tokens[0]), server(tokens[1]), keys)
