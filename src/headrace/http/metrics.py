"""What a server counts, for Prometheus. Labels have few values: never an id, a path or a name that a client chose."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "headrace_http_requests", "Requests answered.", ("route", "method", "status"), registry=registry
        )
        self.seconds = Histogram(
            "headrace_http_request_seconds", "Until the answer began.", ("route",), buckets=BUCKETS_S, registry=registry
        )
        self.streams = Gauge("headrace_ingest_streams", "Streams of items under way.", registry=registry)
        self.bytes = Counter("headrace_ingest_bytes", "Bytes of items read, unpacked.", registry=registry)
        self.items = Counter("headrace_ingest_items", "Items taken in.", ("what",), registry=registry)
        self.batches = Counter("headrace_batches_created", "Batches created.", registry=registry)
        self.claimed = Counter("headrace_runs_claimed", "Runs handed to remote workers.", registry=registry)
        self.settled = Counter("headrace_runs_settled", "Runs settled by remote workers.", registry=registry)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
