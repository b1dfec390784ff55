"""Fixtures shared by all tests: real tokens, killable servers in front of them, and a configured group."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from demo.members import Server, SoftToken, Table, Toml, scratch, write_config

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's job in the background: what we start would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
# `make asan` and `make tsan` say another one, in a directory of the sanitizer's name.
MODULE = Path(os.environ.get("PKCS11_HA_MODULE") or ROOT / "build" / "libpkcs11-ha.so")
SANITIZERS = {"asan": "address", "tsan": "thread"}
# With no module at all neither: libp11-kit waits in freelocale(), from its destructor, for a lock that is never let go.
P11_KIT_DOES_NOT_END = "beside AddressSanitizer programs of p11-kit and GnuTLS do not end"

ServerFactory = Callable[[SoftToken], Server]


class SoftTokenFactory(Protocol):
    def __call__(self, label: str, pin: str = ..., so_pin: str = ...) -> SoftToken: ...


@dataclass(frozen=True)
class Group:
    """Where a configured group lives; `env` is what an application must have in its environment to use it."""

    label: str
    conf: Path
    state: Path
    log: Path
    env: dict[str, str]


class GroupFactory(Protocol):
    def __call__(
        self,
        *members: Table,
        label: str = ...,
        recovery: Table | None = ...,
        ha: Table | None = ...,
        **options: Toml,
    ) -> Group: ...


def is_sanitized(module: Path) -> bool:
    """Built by `make asan` or `make tsan`."""
    return module.parent.name in SANITIZERS


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What cannot run beside a sanitizer says why."""
    mark = item.get_closest_marker("not_sanitized")
    if mark and is_sanitized(MODULE):
        pytest.skip(mark.args[0])


@pytest.fixture(scope="session")
def module() -> Path:
    """The module under test. A missing one is a failure: a skipped suite would look like a passed one."""
    if not MODULE.exists():
        pytest.fail(f"{MODULE} is missing: run `make build`")
    return MODULE


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of the test's own where sockets may live: pytest's tmp_path is too long for them."""
    with scratch() as path:
        yield Path(path)


@pytest.fixture
def soft_token(directory: Path) -> SoftTokenFactory:
    """Makes initialised SoftHSM tokens, each in a store of its own."""

    def make(label: str, pin: str = "123456", so_pin: str = "12345678") -> SoftToken:
        return SoftToken(directory / label, label, pin, so_pin)

    return make


@pytest.fixture
def server() -> Iterator[ServerFactory]:
    """Starts p11-kit servers; none of their processes outlives the test."""
    with ExitStack() as servers:
        yield lambda token: servers.enter_context(Server(token))


@pytest.fixture
def group(directory: Path, monkeypatch: pytest.MonkeyPatch) -> GroupFactory:
    """Configures a group of the given members; child processes of the test find it in their environment.

    Members come from `SoftToken.member()` and `Server.member()`; `options` go into `[[group]]`. A member
    named in `standby` is no active one.
    """

    def make(
        *members: Table,
        label: str = "prod",
        recovery: Table | None = None,
        ha: Table | None = None,
        **options: Toml,
    ) -> Group:
        state, log = directory / "state", directory / "ha.log"
        state.mkdir(exist_ok=True)
        standby = options.get("standby", [])
        assert isinstance(standby, list)
        active = [member["name"] for member in members if member["name"] not in standby]
        table: Table = {"label": label, "serial": "1599447001", "members": active} | options
        conf = write_config(
            directory / "pkcs11-ha.toml", members, [table], recovery, {"log": f"file:{log}"} | dict(ha or {})
        )
        env = {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": str(state)}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return Group(label, conf, state, log, env)

    return make
