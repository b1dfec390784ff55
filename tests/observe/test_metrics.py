"""`p11ha metrics`: valid OpenMetrics, sums that do not fall, loopback alone; dashboard and rules use what there is."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from pkcs11_ha.cli.metrics import SegmentCollector, address, text
from pkcs11_ha.cli.segments import Found, Skipped, parse
from pkcs11_ha.spec.segment import BUCKETS
from tests.conftest import ROOT, GroupFactory, SoftTokenFactory
from tests.observe.conftest import P11HA, ClientFactory, p11ha
from tests.observe.made import APPLICATION, AWAY, EAST, PROD, record, segment

NOTHING = (0,) * BUCKETS
WORK = record(
    load=640 << 20 | 1, failovers=2, faults=(0, 3, *(0,) * 14), latency_ns=(0, 9000, 0),
    latency=(*NOTHING, 0, 0, 5, 0, 4, *NOTHING[5:], *NOTHING),
)  # fmt: skip
LOST = replace(APPLICATION, groups=(replace(PROD, members=(EAST, AWAY)),))
TWO = Found(
    (
        parse(segment(pid=1, started=1, records=(WORK, record())), "1-1.segment"),
        parse(segment(LOST, pid=2, started=2, records=(WORK, record())), "2-2.segment"),
    ),
    (Skipped("x.segment", "not a file", "rm x.segment"),),
)


def samples(exposition: str) -> dict[tuple[str, str], float]:
    """(name, member or group and what tells it apart) -> value."""
    return {
        (s.name, ",".join(s.labels[k] for k in ("member", "state", "class", "le") if k in s.labels)): s.value
        for family in text_string_to_metric_families(exposition)  # type: ignore[no-untyped-call]
        for s in family.samples
    }


def test_what_processes_show_is_told() -> None:
    found = samples(text(lambda: TWO))
    assert found["pkcs11_ha_segments_unreadable", ""] == 1
    assert found["pkcs11_ha_processes", ""] == 2
    assert found["pkcs11_ha_group_members_up", ""] == 1  # of two, for one of the processes
    assert found["pkcs11_ha_member_up", "east"] == 1
    assert found["pkcs11_ha_member_up", "west"] == 0
    assert found["pkcs11_ha_member_processes", "west,up"] == 1
    assert found["pkcs11_ha_member_processes", "west,away"] == 1
    assert found["pkcs11_ha_member_recovery_given_up", "west"] == 1
    assert found["pkcs11_ha_member_objects_owed", "west"] == 3
    assert ("pkcs11_ha_member_objects_owed", "east") not in found  # nobody knows
    assert found["pkcs11_ha_member_calls_in_flight", "east"] == 2
    assert found["pkcs11_ha_calls_total", "east"] == 1280
    assert found["pkcs11_ha_failovers_total", "east"] == 4
    assert found["pkcs11_ha_faults_total", "east,dead"] == 6
    name = "pkcs11_ha_call_duration_seconds"
    assert found[name + "_bucket", "east,cryptography,1.024e-06"] == 10
    assert found[name + "_bucket", "east,cryptography,4.096e-06"] == 18
    assert found[name + "_count", "east,cryptography"] == 18
    assert found[name + "_sum", "east,cryptography"] == pytest.approx(18e-6)


def test_sums_do_not_fall_when_a_process_ends() -> None:
    there = [TWO, replace(TWO, processes=TWO.processes[:1]), Found((), ()), TWO]
    collector = SegmentCollector(lambda: there.pop(0))
    calls = []
    for _ in range(4):
        families = {family.name: family for family in collector.collect()}
        calls.append(
            sum(s.value for s in families["pkcs11_ha_calls"].samples if s.labels["member"] == "east")
        )
    assert calls == [1280, 1280, 1280, 2560]  # those that come with the same numbers are others


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """`p11ha metrics --listen`, and where."""
    process = subprocess.Popen([P11HA, "metrics", "--listen", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        line = process.stderr.readline()
        match = re.fullmatch(r"serving on (.+) port ([0-9]+)\n", line)
        assert match, line
        yield f"http://{match[1]}:{match[2]}/metrics"
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.usefixtures("module")
def test_running_processes_are_served(
    soft_token: SoftTokenFactory, group: GroupFactory, client: ClientFactory
) -> None:
    group(soft_token("east").member())
    one = client()
    one.call(100)
    with serving("0") as url:
        before = samples(scrape(url))
        one.call(100)
        after = samples(scrape(url))
    assert after["pkcs11_ha_calls_total", "east"] - before["pkcs11_ha_calls_total", "east"] == 100
    assert samples(p11ha("metrics").stdout)["pkcs11_ha_member_up", "east"] == 1


def scrape(url: str) -> str:
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def test_what_else_is_asked_of_the_server() -> None:
    with serving("0") as url:
        for method, path, host, status in (
            ("GET", "/metrics?x=1", "localhost:1", 200),
            ("GET", "/metrics", "[::1]:9188", 200),
            ("GET", "/metrics", "10.1.2.3", 200),
            ("GET", "/metrics", "evil.example:9188", 403),  # a name that a web page had lead here
            ("GET", "/metrics", "evil.example", 403),
            ("GET", "/metrics", "[", 403),
            ("GET", "/", None, 404),
            ("GET", "/metrics/x", None, 404),
            ("POST", "/metrics", None, 405),
        ):
            connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
            connection.request(method, path, headers={"Host": host} if host else {})
            answer = connection.getresponse()
            assert answer.status == status, (method, path, host)
            body = answer.read()
            assert (b"pkcs11_ha_" in body) is (status == 200 and method == "GET")
            connection.close()
        with socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0)) as raw:
            raw.sendall(b"HEAD /metrics HTTP/1.0\r\n\r\n")
            head, _, body = b"".join(iter(lambda: raw.recv(4096), b"")).partition(b"\r\n\r\n")
        assert b" 200 " in head
        assert re.search(rb"Content-Length: [1-9][0-9]{2}", head)
        assert body == b""


def test_a_server_for_others_goes_by_any_name() -> None:
    with serving("0.0.0.0:0", "--public") as url:
        request = urllib.request.Request(url, headers={"Host": "hsm.example"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200


@pytest.mark.parametrize("given", ["127.0.0.1:9188", "9188", "localhost:9188", "[::1]:9188"])
def test_loopback_is_served(given: str) -> None:
    assert address(given, public=False)[1] == 9188


@pytest.mark.parametrize(
    "given", ["0.0.0.0:9188", "10.1.2.3:9188", "[::]:9188", "hsm.example:1", "x", "70000", ":"]
)
def test_other_addresses_are_refused(given: str) -> None:
    refused = p11ha("metrics", "--listen", given, status=2)
    assert "--listen" in refused.stderr
    if given == "0.0.0.0:9188":
        assert "type --public" in " ".join(re.sub("[│]", "", refused.stderr).split())
        assert address(given, public=True) == ("0.0.0.0", 9188)


def test_dashboard_and_rules_ask_for_what_there_is() -> None:
    there = {name for name, _ in samples(text(lambda: TWO))}
    board = json.loads((ROOT / "contrib" / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [variable.get("query", "") for variable in board["templating"]["list"]]
    asked.append((ROOT / "contrib" / "prometheus-alerts.yml").read_text())
    names = {name for expression in asked for name in re.findall(r"pkcs11_ha_[a-z0-9_]+", expression)}
    assert len(names) > 10
    assert names <= there
    states = {s for expression in asked for s in re.findall(r'state=~?"([a-z|]+)"', expression)}
    assert {s for each in states for s in each.split("|")} <= {
        "up",
        "away",
        "connecting",
        "drained",
        "ejected",
    }


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_the_rules_are_prometheus_s() -> None:
    rules = Path(ROOT / "contrib" / "prometheus-alerts.yml")
    subprocess.run(["promtool", "check", "rules", str(rules)], check=True)
