"""What a server counts, for Prometheus.

Labels have few values: never an id or a path, and of names that clients chose only the fullest queues'.
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

from headrace.http.requests.queue_metrics import Depths
from headrace.runtime.engine import DutyStats

if TYPE_CHECKING:
    from headrace.grpc.taskbroker.pusher import Pusher
    from headrace.grpc.transport.status import Code

BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


class _Duties(Collector):
    """The duties of upkeep that this process did."""

    def __init__(self, duties: Mapping[str, DutyStats]) -> None:
        self._duties = duties

    def collect(self) -> Iterator[Metric]:
        """Read when somebody asks."""
        rounds = CounterMetricFamily("headrace_upkeep_duties", "Duties of upkeep ended.", labels=("duty", "outcome"))
        moved = CounterMetricFamily("headrace_upkeep_moved", "What a duty moved on.", labels=("duty",))
        seconds = CounterMetricFamily("headrace_upkeep_seconds", "Time a duty took.", labels=("duty",))
        for name, stats in self._duties.items():
            rounds.add_metric((name, "done"), stats.done_count)
            rounds.add_metric((name, "failed"), stats.failed_count)
            moved.add_metric((name,), stats.moved_count)
            seconds.add_metric((name,), stats.seconds)
        yield from (rounds, moved, seconds)


class Pushes(Collector):
    """What a pusher does. Endpoints and applications are those of the settings, so they are few."""

    def __init__(self, pusher: Pusher) -> None:
        self._pusher = pusher

    def collect(self) -> Iterator[Metric]:
        """Read when somebody asks."""
        labels = ("application", "endpoint")
        pushed = CounterMetricFamily("headrace_pushes", "Activations offered to workers.", labels=(*labels, "outcome"))
        under_way = GaugeMetricFamily("headrace_pushes_under_way", "On their way to workers.", labels=labels)
        parked = GaugeMetricFamily(
            "headrace_push_parked",
            "Activations that wait for applications without an endpoint.",
            self._pusher.parked_count,
        )
        for application, endpoints in self._pusher.endpoints.items():
            for one in endpoints:
                pushed.add_metric((application, one.name, "taken"), one.pushed_count)
                pushed.add_metric((application, one.name, "busy"), one.busy_count)
                pushed.add_metric((application, one.name, "failed"), one.failed_count)
                under_way.add_metric((application, one.name), one.in_flight_count)
        yield from (pushed, under_way, parked)


class Calls(Collector):
    """gRPC calls answered, by path and status, and how long they took.

    Counted from one loop by plain additions, where the library's own counters take two locks a call: a call may cost
    no more than ten times that.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, Code], int] = {}
        self._seconds: dict[str, float] = {}
        self._buckets: dict[str, list[int]] = {}

    def observe(self, path: str, code: Code, seconds: float) -> None:
        """One was answered."""
        key = path, code
        self._counts[key] = self._counts.get(key, 0) + 1
        buckets = self._buckets.get(path)
        if buckets is None:
            buckets = self._buckets[path] = [0] * (len(BUCKETS_S) + 1)
        buckets[bisect_left(BUCKETS_S, seconds)] += 1
        self._seconds[path] = self._seconds.get(path, 0.0) + seconds

    def collect(self) -> Iterator[Metric]:
        """Read when somebody asks."""
        calls = CounterMetricFamily("headrace_grpc_calls", "gRPC calls answered.", labels=("path", "status"))
        for (path, code), count in list(self._counts.items()):
            calls.add_metric((path, code.name), count)
        took = HistogramMetricFamily("headrace_grpc_call_seconds", "Until the answer.", labels=("path",))
        for path, buckets in list(self._buckets.items()):
            names = (*map(floatToGoString, BUCKETS_S), "+Inf")
            took.add_metric((path,), list(zip(names, accumulate(buckets), strict=True)), self._seconds[path])
        yield from (calls, took)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self, duties: Mapping[str, DutyStats]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_Duties(duties))
        self.depths = Depths()
        registry.register(self.depths)
        self.requests = Counter(
            "headrace_http_requests", "Requests answered.", ("route", "method", "status"), registry=registry
        )
        self.seconds = Histogram(
            "headrace_http_request_seconds", "Until the answer began.", ("route",), buckets=BUCKETS_S, registry=registry
        )
        self.calls = Calls()
        registry.register(self.calls)
        self.streams = Gauge("headrace_ingest_streams", "Streams of items under way.", registry=registry)
        self.bytes = Counter("headrace_ingest_bytes", "Bytes of items read, unpacked.", registry=registry)
        self.items = Counter("headrace_ingest_items", "Items taken in.", ("what",), registry=registry)
        self.batches = Counter("headrace_batches_created", "Batches created.", registry=registry)
        self.claimed = Counter("headrace_runs_claimed", "Runs handed to remote workers.", registry=registry)
        self.settled = Counter("headrace_runs_settled", "Runs settled by remote workers.", registry=registry)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
