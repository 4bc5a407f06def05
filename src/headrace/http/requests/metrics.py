"""Prometheus metrics of a server.

Labels have few values: never an id or a path. Of queue names, which clients choose, only the fullest queues appear.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from headrace.http.requests.queue_metrics import QueueMetrics
from headrace.runtime.engine import DutyStats

if TYPE_CHECKING:
    from headrace.grpc.taskbroker.pusher import Pusher
    from headrace.grpc.transport.status import Code

BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


class _UpkeepMetrics(Collector):
    """Upkeep duties that this process performed."""

    def __init__(self, duties: Mapping[str, DutyStats]) -> None:
        self._duties = duties

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        rounds = CounterMetricFamily(
            "headrace_upkeep_duties", "Upkeep duties performed, by outcome.", labels=("duty", "outcome")
        )
        moved = CounterMetricFamily("headrace_upkeep_moved", "Rows changed by an upkeep duty.", labels=("duty",))
        seconds = CounterMetricFamily("headrace_upkeep_seconds", "Seconds spent on an upkeep duty.", labels=("duty",))
        for name, stats in self._duties.items():
            rounds.add_metric((name, "done"), stats.done_count)
            rounds.add_metric((name, "failed"), stats.failed_count)
            moved.add_metric((name,), stats.moved_count)
            seconds.add_metric((name,), stats.seconds)
        yield from (rounds, moved, seconds)


class PushMetrics(Collector):
    """Metrics of a pusher. Endpoints and applications come from the settings, so they are few."""

    def __init__(self, pusher: Pusher) -> None:
        self._pusher = pusher

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        labels = ("application", "endpoint")
        pushed = CounterMetricFamily(
            "headrace_pushes", "Activations sent to worker endpoints, by outcome.", labels=(*labels, "outcome")
        )
        in_flight = GaugeMetricFamily(
            "headrace_pushes_under_way", "Activations sent to a worker endpoint and not yet answered.", labels=labels
        )
        parked = GaugeMetricFamily(
            "headrace_push_parked",
            "Waiting activations of applications without an endpoint.",
            self._pusher.parked_count,
        )
        for application, endpoints in self._pusher.endpoints.items():
            for endpoint in endpoints:
                pushed.add_metric((application, endpoint.name, "taken"), endpoint.pushed_count)
                pushed.add_metric((application, endpoint.name, "busy"), endpoint.busy_count)
                pushed.add_metric((application, endpoint.name, "failed"), endpoint.failed_count)
                in_flight.add_metric((application, endpoint.name), endpoint.in_flight_count)
        yield from (pushed, in_flight, parked)


class GrpcCallMetrics(Collector):
    """gRPC calls by path and status, and their durations.

    Counted by plain additions on one event loop. The counters of prometheus_client take two locks a call, a tenth of
    the time that a whole call may take.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, Code], int] = {}
        self._seconds: dict[str, float] = {}
        self._buckets: dict[str, list[int]] = {}

    def observe(self, path: str, code: Code, seconds: float) -> None:
        """Count a finished call."""
        key = path, code
        self._counts[key] = self._counts.get(key, 0) + 1
        buckets = self._buckets.get(path)
        if buckets is None:
            buckets = self._buckets[path] = [0] * (len(BUCKETS_S) + 1)
        buckets[bisect_left(BUCKETS_S, seconds)] += 1
        self._seconds[path] = self._seconds.get(path, 0.0) + seconds

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        calls = CounterMetricFamily(
            "headrace_grpc_calls", "gRPC calls finished, by path and status.", labels=("path", "status")
        )
        for (path, code), count in list(self._counts.items()):
            calls.add_metric((path, code.name), count)
        took = HistogramMetricFamily(
            "headrace_grpc_call_seconds", "Duration of gRPC calls in seconds.", labels=("path",)
        )
        for path, buckets in list(self._buckets.items()):
            names = (*map(floatToGoString, BUCKETS_S), "+Inf")
            took.add_metric((path,), list(zip(names, accumulate(buckets), strict=True)), self._seconds[path])
        yield from (calls, took)


class Metrics:
    """Metrics of one server, in a registry of its own."""

    def __init__(self, duties: Mapping[str, DutyStats]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_UpkeepMetrics(duties))
        self.queues = QueueMetrics()
        registry.register(self.queues)
        self.requests = Counter(
            "headrace_http_requests",
            "HTTP requests, by route, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "headrace_http_request_seconds",
            "Seconds until the response began, by route.",
            ("route",),
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.calls = GrpcCallMetrics()
        registry.register(self.calls)
        self.streams = Gauge("headrace_ingest_streams", "Item streams in progress.", registry=registry)
        self.bytes = Counter(
            "headrace_ingest_bytes", "Bytes of items received, after decompression.", registry=registry
        )
        self.items = Counter("headrace_ingest_items", "Items received, by result.", ("what",), registry=registry)
        self.batches = Counter("headrace_batches_created", "Batches created over HTTP.", registry=registry)
        self.claimed = Counter("headrace_runs_claimed", "Runs leased to remote workers.", registry=registry)
        self.settled = Counter("headrace_runs_settled", "Runs settled by remote workers.", registry=registry)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
