"""Prometheus metrics of the queues: the fullest by name, and all others together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from headrace.store.protocol import QueueView

OTHERS: Final = "(others)"


class QueueCounts(NamedTuple):
    """Counts of one queue, or of several together: runs by state, and the age of the oldest waiting run."""

    queue: str
    waiting: int
    delayed: int
    leased: int
    oldest_s: float


class QueueMetrics(Collector):
    """Metrics of the queues, as last reported by the store."""

    def __init__(self) -> None:
        self._rows: list[QueueCounts] = []

    def update(self, views: Sequence[QueueView], *, names_max: int, now_us: int) -> None:
        """Set the counts. At most `names_max` queues appear by name."""
        rows = [
            QueueCounts(
                view.name,
                view.waiting_count,
                view.delayed_count,
                view.leased_count,
                max(0, now_us - view.oldest_us) / 1_000_000 if view.oldest_us else 0.0,
            )
            for view in views
        ]
        rows.sort(key=lambda row: (-row.waiting - row.delayed - row.leased, row.queue))
        self._rows, rest = rows[:names_max], rows[names_max:]
        if rest:
            waiting, delayed, leased = (sum(column) for column in zip(*(row[1:4] for row in rest), strict=True))
            self._rows.append(QueueCounts(OTHERS, waiting, delayed, leased, max(row.oldest_s for row in rest)))

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        runs = GaugeMetricFamily("headrace_queue_runs", "Runs in a queue, by state.", labels=("queue", "state"))
        oldest = GaugeMetricFamily(
            "headrace_queue_oldest_seconds", "Seconds the oldest run of a queue has been waiting.", labels=("queue",)
        )
        for row in self._rows:
            runs.add_metric((row.queue, "waiting"), row.waiting)
            runs.add_metric((row.queue, "delayed"), row.delayed)
            runs.add_metric((row.queue, "leased"), row.leased)
            oldest.add_metric((row.queue,), row.oldest_s)
        yield from (runs, oldest)
