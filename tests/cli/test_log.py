"""The HA log as `[ha]` wants it, written by the module itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo.members import SoftToken
from tests import p11
from tests.cli.test_status_and_check import run
from tests.conftest import GroupFactory, SoftTokenFactory


@pytest.fixture
def east(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


@pytest.mark.usefixtures("module")
def test_a_container_has_its_log_on_stderr_in_json(east: SoftToken, group: GroupFactory) -> None:
    group(east.member(), ha={"log": "stderr", "log_format": "json"})
    shown = run("status")
    assert shown.returncode == 0
    lines = [json.loads(line) for line in shown.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["core.started", "core.stopped"]
    assert lines[0]["details"]["version"]


def test_a_refused_configuration_is_logged_as_it_wants_its_log(
    east: SoftToken, group: GroupFactory, module: Path
) -> None:
    where = group(east.member(), ha={"log_format": "json", "log_max_bytes": 4096, "nonsense": 1})
    application = p11.Module(module)
    assert application.rv("C_Initialize", None) == p11.CKR_GENERAL_ERROR
    (line,) = where.log.read_text().splitlines()
    assert "ha.nonsense: unknown key" in json.loads(line)["details"]["why"]
