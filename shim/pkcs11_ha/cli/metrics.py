"""`p11ha metrics`: what running processes show, as OpenMetrics for Prometheus, printed once or served."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from socketserver import ThreadingMixIn
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector

from pkcs11_ha import __version__
from pkcs11_ha.cli import segments
from pkcs11_ha.cli.segments import Counters, Found, Group, Member, Process
from pkcs11_ha.spec.segment import BUCKETS, MEMBER_STATES

_PREFIX = "pkcs11_ha_"
_GROUP = ("group", "serial")
_MEMBER = (*_GROUP, "member")
_COUNTED = (*_MEMBER, "program")
_BUCKETS = range(2, BUCKETS, 2)  # every other one, from a microsecond on: an octave tells no more to a graph

PATH = "/metrics"

Key = tuple[str, str, str, str]
"""Values of _COUNTED."""


@dataclass
class Totals:
    """What was counted, by program: sums that never fall while this process lives, though others end."""

    ended: dict[Key, Counters] = field(default_factory=dict)
    running: dict[str, dict[Key, Counters]] = field(default_factory=dict)

    def take(self, processes: Iterable[Process]) -> dict[Key, Counters]:
        now = {process.name: _counted(process) for process in processes}
        for name in self.running.keys() - now.keys():
            for key, counters in self.running[name].items():
                self.ended[key] = self.ended.get(key, segments.NOTHING) + replace(counters, in_flight=0)
        self.running = now
        sums = dict(self.ended)
        for each in now.values():
            for key, counters in each.items():
                sums[key] = sums.get(key, segments.NOTHING) + counters
        return sums


def _counted(process: Process) -> dict[Key, Counters]:
    text = process.text
    return {
        (group.label, group.serial, member.name, text.program): process.of(member)
        for group in (text.groups if text else ())
        for member in group.members
        if text
    }


class SegmentCollector(Collector):
    """Looks anew each time it is asked, from whatever thread."""

    def __init__(self, look: Callable[[], Found]) -> None:
        self._look = look
        self._totals = Totals()
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            found = self._look()
            sums = self._totals.take(found.processes)
        yield InfoMetricFamily(_PREFIX + "exporter", "This p11ha", value={"version": __version__})
        yield _gauge(
            "segments_unreadable", "Status segments that could not be read", (), [((), len(found.skipped))]
        )
        groups = segments.join(found.processes)
        yield from _of_groups(groups)
        yield from _of_members(groups)
        yield from _counts(sums)
        yield _latency(sums)


def _gauge(
    name: str, doc: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    metric = GaugeMetricFamily(_PREFIX + name, doc, labels=labels)
    for values, value in rows:
        metric.add_metric(values, value)
    return metric


def _of_groups(groups: Iterable[Group]) -> Iterator[Metric]:
    by_group: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        by_group.setdefault((group.text.label, group.text.serial), []).append(group)
    yield _gauge(
        "processes",
        "Processes that use the group",
        _GROUP,
        [(key, sum(len(g.processes) for g in each)) for key, each in by_group.items()],
    )
    yield _gauge(
        "group_members_up",
        "Members that are up for the process that has the fewest",
        _GROUP,
        [(key, min(map(_fewest_up, each))) for key, each in by_group.items()],
    )


def _fewest_up(group: Group) -> int:
    return min(
        sum(
            view.status == "CKR_OK"
            for member in group.members
            for view in member.views
            if view.process is process
        )
        for process in group.processes
    )


def _of_members(groups: Iterable[Group]) -> Iterator[Metric]:
    members: dict[tuple[str, ...], Member] = {}
    for group in groups:
        for member in group.members:
            key = (group.text.label, group.text.serial, member.name)
            known = members.get(key)
            members[key] = replace(member, views=known.views + member.views) if known else member
    yield _gauge(
        "member_up",
        "1 if the member is up for all processes, 0 if it is away for any",
        _MEMBER,
        [(key, float(member.status == "CKR_OK")) for key, member in members.items()],
    )
    yield _gauge(
        "member_processes",
        "Processes that see the member in a state",
        (*_MEMBER, "state"),
        [
            ((*key, state), member.states.get(state, 0))
            for key, member in members.items()
            for state in MEMBER_STATES
        ],
    )
    yield _gauge(
        "member_state_since_seconds",
        "Since when the member is as it is, for the process where that is longest ago",
        _MEMBER,
        [(key, min(v.member.since_ns for v in member.views) / 1e9) for key, member in members.items()],
    )
    yield _gauge(
        "member_recovery_attempts_failed",
        "Attempts to recover the member that failed, for the process with the most",
        _MEMBER,
        [(key, max(v.member.failed for v in member.views)) for key, member in members.items()],
    )
    yield _gauge(
        "member_recovery_given_up",
        "Processes that do not try to recover the member any more",
        _MEMBER,
        [(key, sum(map(_has_given_up, member.views))) for key, member in members.items()],
    )
    yield _gauge(
        "member_objects_owed",
        "Objects that the member has yet to be given or to lose, for the process that knows of the most",
        _MEMBER,
        [(key, max(owed)) for key, member in members.items() if (owed := _owed(member))],
    )
    yield _gauge(
        "member_calls_in_flight",
        "Calls inside the member's library now",
        _MEMBER,
        [(key, member.counters.in_flight) for key, member in members.items()],
    )


def _owed(member: Member) -> list[int]:
    """What each process says that knows of it."""
    return [view.member.owed for view in member.views if view.member.owed is not None]


def _has_given_up(view: segments.View) -> bool:
    return view.member.state == "away" and view.member.next_monotonic_ns is None


def _counts(sums: dict[Key, Counters]) -> Iterator[Metric]:
    calls = CounterMetricFamily(_PREFIX + "calls", "Calls of a member's library", labels=_COUNTED)
    failovers = CounterMetricFamily(
        _PREFIX + "failovers", "Calls that went on elsewhere after the member failed", labels=_COUNTED
    )
    faults = CounterMetricFamily(
        _PREFIX + "faults", "Answers of a member that were at fault", labels=(*_COUNTED, "class")
    )
    for key, counters in sums.items():
        calls.add_metric(key, counters.calls)
        failovers.add_metric(key, counters.failovers)
        for name, count in counters.faults.items():
            faults.add_metric((*key, name), count)
    yield from (calls, failovers, faults)


def _latency(sums: dict[Key, Counters]) -> Metric:
    metric = HistogramMetricFamily(
        _PREFIX + "call_duration_seconds",
        "How long calls of a member's library took: of one in 64, by class of function",
        labels=(*_COUNTED, "class"),
    )
    for key, counters in sums.items():
        for name, latency in counters.latency.items():
            if latency.samples:
                buckets = [(_seconds(b), float(sum(latency.counts[: b + 1]))) for b in _BUCKETS]
                buckets.append(("+Inf", float(latency.samples)))
                metric.add_metric((*key, name), buckets, latency.total_ns / 1e9)
    return metric


def _seconds(bucket: int) -> str:
    return str(segments.edge_ns(bucket) / 1e9)


def text(look: Callable[[], Found]) -> str:
    """OpenMetrics, of now."""
    registry = CollectorRegistry()
    registry.register(SegmentCollector(look))
    return str(generate_latest(registry).decode())  # type: ignore[no-untyped-call]


# ---- served ----


def address(given: str, public: bool) -> tuple[str, int]:
    """`[ADDRESS:]PORT`, on loopback unless `public`; raises ValueError."""
    host, _, port = given.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{given!r} is not [ADDRESS:]PORT, for instance 9188")
    try:
        ip = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address") from None
    if not ip.is_loopback and not public:
        raise ValueError(f"others can reach {host}: type --public if they may read it")
    return str(ip), int(port)


def server(look: Callable[[], Found], host: str, port: int) -> WSGIServer:
    """What serves them once it is told to; raises OSError."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SegmentCollector(look))
    ip = ipaddress.ip_address(host)
    app = _guarded(make_wsgi_app(registry), by_address=ip.is_loopback)
    return make_server(host, port, app, _Server if ip.version == 4 else _Server6, _Handler)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def _guarded(app: WSGIApplication, *, by_address: bool) -> WSGIApplication:
    """GET and HEAD of one path.  With `by_address` no host is known by a name: a page of the web can have its own name
    lead to loopback, and would read what the browser gets there.
    """

    def guarded(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        method, problem = environ["REQUEST_METHOD"], ""
        if by_address and not _is_address(environ.get("HTTP_HOST", "localhost")):
            problem = "403 Forbidden"
        elif environ["PATH_INFO"] != PATH:
            problem = "404 Not Found"
        elif method not in ("GET", "HEAD"):
            problem = "405 Method Not Allowed"
        if problem:
            start(problem, [("Content-Type", "text/plain"), ("Allow", "GET, HEAD")])
            return [f"{problem}: GET {PATH}\n".encode()]
        if method == "GET":
            return app(environ, start)
        kept: list[tuple[str, list[tuple[str, str]]]] = []

        def keep(
            status: str, headers: list[tuple[str, str]], _: object = None, /
        ) -> Callable[[bytes], object]:
            kept.append((status, headers))
            return lambda _data: None

        size = sum(map(len, app({**environ, "REQUEST_METHOD": "GET"}, keep)))
        ((status, headers),) = kept
        start(status, [*headers, ("Content-Length", str(size))])
        return []

    return guarded


def _is_address(host: str) -> bool:
    """Whether a Host header names an IP address, or localhost."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
