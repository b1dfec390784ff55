"""Fixtures of the chaos tests: the crash module, and domains of members to be copied for each history."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from tests.chaos import crash, members
from tests.chaos.history import History
from tests.chaos.members import Domain
from tests.conftest import is_sanitized

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def crash_library(tmp_path_factory: pytest.TempPathFactory, module: Path) -> Path:
    return crash.build(tmp_path_factory.mktemp("crash"), sanitized=is_sanitized(module))


def scratch() -> tempfile.TemporaryDirectory[str]:
    """In memory if possible: a token writes every object through to its disk."""
    return tempfile.TemporaryDirectory(prefix="p11ha-", dir=MEMORY if MEMORY.is_dir() else "/tmp")


@pytest.fixture(scope="session")
def domains(module: Path, crash_library: Path) -> Iterator[dict[int, Domain]]:
    """By the number of their members."""
    replication = os.environ.get("P11HA_REPLICATION", "domain")
    with scratch() as path:
        names = ("east", "west", "north")
        made = {}
        for count in (2, 3):
            directory = Path(path, str(count))
            directory.mkdir()
            made[count] = members.prepare(directory, names[:count], module, crash_library, replication)
        yield made


class Begin(Protocol):
    def __call__(
        self, served: Sequence[bool], say: Callable[[str], None] = ...
    ) -> AbstractContextManager[History]: ...


@pytest.fixture(scope="session")
def begin(domains: dict[int, Domain]) -> Begin:
    """Begins a history with as many members as `served` says, each behind a server or not."""

    @contextmanager
    def started(served: Sequence[bool], say: Callable[[str], None] = print) -> Iterator[History]:
        with scratch() as path, History(domains[len(served)], served, Path(path), say) as history:
            yield history

    return started
