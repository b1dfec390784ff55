"""Fixtures of the models: three tokens, each in a worker process that is really killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from demo.members import SoftToken, Worker
from tests.replication.conftest import scratch

NAMES = ("east", "west", "north")


@pytest.fixture(scope="session")
def workers() -> Iterator[dict[str, Worker]]:
    """By name of their member. A story kills and starts them as it likes, and begins with all of them there."""
    with scratch() as path, ExitStack() as stack:
        yield {name: stack.enter_context(Worker(SoftToken(Path(path, name), name))) for name in NAMES}
