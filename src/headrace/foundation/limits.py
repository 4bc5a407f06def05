"""Limits: every bound of Headrace, in one table.

Each limit has a name that ends in its unit, a default, a least and a greatest value, and a description. The settings
page and `headrace config show` are made from `TABLE`. Relations between limits are checked when `Limits` are made, so a
process with contradictory limits never starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final, NamedTuple, Self

from headrace.foundation.errors import InvalidSetting

KIB: Final = 1024
MIB: Final = 1024 * KIB
SECOND_MS: Final = 1_000
MINUTE_MS: Final = 60 * SECOND_MS
HOUR_MS: Final = 60 * MINUTE_MS
DAY_MS: Final = 24 * HOUR_MS


class Limit(NamedTuple):
    """One bound: `least <= value <= most`, in `unit`."""

    name: str
    unit: str
    default: int
    least: int
    most: int
    meaning: str


TABLE: Final[Mapping[str, Limit]] = {
    limit.name: limit
    for limit in (
        Limit("chunk_runs_max", "runs", 256, 1, 4_096, "Runs that are stored, claimed and settled as one row."),
        Limit("chunk_bytes_max", "bytes", MIB, 4 * KIB, 16 * MIB, "Inline payload of one chunk."),
        Limit("results_page_bytes_max", "bytes", 8 * MIB, KIB, 1_024 * MIB, "Results, errors or metadata in one page that a store returns; a page has at least one entry."),
        Limit("claim_bytes_max", "bytes", 16 * MIB, KIB, 1_024 * MIB, "Inputs of the runs that one claim returns; a claim returns at least one run."),
        Limit("item_bytes_max", "bytes", 3 * MIB, KIB, 256 * MIB, "One line of a batch, before decoding."),
        Limit("inline_bytes_max", "bytes", 512 * KIB, 64, 16 * MIB, "Payloads and results of this size or more go to the object store."),
        Limit("database_object_bytes_max", "bytes", 64 * MIB, KIB, 256 * MIB, "One payload or result in a PostgreSQL store that has no object store."),
        Limit("batch_runs_max", "runs", 10_000_000, 1, 1_000_000_000, "Runs in one batch."),
        Limit("ingest_concurrency", "items", 10, 1, 10_000, "Large items of one batch that are written to the object store at a time."),
        Limit("flush_size", "updates", 500, 1, 100_000, "Updates that are flushed without waiting for the interval."),
        Limit("flush_interval_ms", "ms", 100, 1, HOUR_MS, "Longest time that an update waits for others before a flush."),
        Limit("waiting_parents_max", "runs", 10_000, 0, 1_000_000, "Runs of one process that wait for other runs, in memory and without a slot."),
        Limit("heartbeat_ms", "ms", 5_000, 10, HOUR_MS, "Time between two heartbeats of a process."),
        Limit("session_timeout_ms", "ms", 15_000, 30, DAY_MS, "Time without a heartbeat after which a process counts as crashed."),
        Limit("crashes_max", "crashes", 3, 1, 1_000, "Crashes of a worker, caused by a run that runs alone, after which the run fails."),
        Limit("seal_timeout_ms", "ms", 30 * MINUTE_MS, SECOND_MS, 365 * DAY_MS, "Time since the last accepted item after which an unsealed batch is abandoned."),
        Limit("orphan_grace_ms", "ms", HOUR_MS, 0, 365 * DAY_MS, "Age at which an object that no row refers to is removed."),
        Limit("retention_ms", "ms", 7 * DAY_MS, 0, 3_650 * DAY_MS, "Time that a finished batch is kept."),
        Limit("shutdown_grace_s", "s", 30, 0, 86_400, "Time that a stopping worker waits for its running tasks."),
        Limit("poll_interval_ms", "ms", 1_000, 5, HOUR_MS, "Longest time between two reads of the store by a waiting process."),
        Limit("upkeep_interval_ms", "ms", 5_000, 10, HOUR_MS, "Time between two rounds of upkeep."),
        Limit("schedule_grace_ms", "ms", MINUTE_MS, SECOND_MS, DAY_MS, "Delay after which a tick of a schedule counts as missed."),
        Limit("schedule_ticks_max", "ticks", 100, 1, 1_000, "Missed ticks of one schedule that are enqueued, the newest; older ones are skipped."),
        Limit("name_chars_max", "characters", 200, 1, 1_000, "Length of names of tasks, queues, keys and tags."),
        Limit("tags_max", "tags", 10, 0, 100, "Tags on one run."),
        Limit("headers_bytes_max", "bytes", 16 * KIB, 0, MIB, "Headers of one run, encoded."),
        Limit("http_idle_s", "s", 60, 1, 86_400, "Time that a server waits for a client that sends nothing; clients that wait for the server are not cut."),
        Limit("packet_bytes_max", "bytes", 16 * MIB, KIB, 256 * MIB, "One payload that a client uploads before it sends the item."),
        Limit("expansion_max", "times", 200, 2, 1_000, "Factor by which a compressed body may grow."),
        Limit("metadata_bytes_max", "bytes", 256 * KIB, 64, 16 * MIB, "Metadata of one run, encoded."),
        Limit("streams_max", "streams", 256, 1, 100_000, "Concurrent streams of items to one server. An environment may open another while it holds fewer than are free."),
        Limit("environment_streams_max", "streams", 128, 1, 100_000, "Concurrent streams of items of one environment to one server."),
        Limit("connections_max", "connections", 4_096, 1, 1_000_000, "Concurrent connections to one server; fewer where the system allows fewer descriptors."),
        Limit("peer_connections_percent", "per cent", 50, 1, 100, "Share of its connections that a server gives to one address, or one /64 network of IPv6."),
        Limit("reserved_descriptors", "descriptors", 128, 16, 100_000, "Descriptors that a server keeps for its files and its store; at most half of what the system allows."),
        Limit("requests_per_minute_max", "requests", 0, 0, 100_000_000, "Sustained request rate of an environment; 0 is no limit."),
        Limit("requests_burst_max", "requests", 750, 1, 100_000_000, "Requests that an environment may make at once, where the rate is limited."),
        Limit("batch_runs_per_minute_max", "runs", 0, 0, 10_000_000_000, "Sustained rate of announced runs of an environment; 0 is no limit."),
        Limit("batch_runs_burst_max", "runs", 1_200, 1, 10_000_000_000, "Runs that an environment may announce at once, where the rate is limited."),
        Limit("stream_grants_max", "requests", 10, 1, 1_000, "Streams of one batch that are exempt from the request rate."),
        Limit("delivery_grace_ms", "ms", 3 * SECOND_MS, 0, HOUR_MS, "Time beyond its processing deadline in which a worker may still report on an activation."),
        Limit("delivery_attempts_max", "times", 5, 1, 1_000_000, "Missed deadlines of one attempt of an activation after which it fails."),
        Limit("delivery_delay_max_s", "s", 3_600, 0, 31_536_000, "Longest delay of an activation; longer ones are cut to it."),
        Limit("delivery_recovery_ms", "ms", 15 * SECOND_MS, 0, DAY_MS, "Time without a heartbeat of a server after which its delivered activations are delivered again; at least session_timeout_ms."),
        Limit("deliveries_max", "runs", 100_000, 1, 10_000_000, "Activations that the workers of one server have at a time."),
        Limit("metrics_queues_max", "queues", 100, 0, 10_000, "Queues that /metrics shows by name, the fullest; the others are summed up."),
        Limit("queue_waiting_max", "runs", 0, 0, 10_000_000_000, "Waiting activations in one queue; 0 is no limit."),
        Limit("queue_delayed_max", "runs", 0, 0, 10_000_000_000, "Delayed activations in one queue; 0 is no limit."),
        Limit("queue_leased_max", "runs", 0, 0, 10_000_000_000, "Leased activations of one queue above which new ones are refused; 0 is no limit."),
        Limit("waiting_max", "runs", 0, 0, 10_000_000_000, "Waiting runs in all queues above which new activations are refused; 0 is no limit."),
        Limit("delayed_max", "runs", 0, 0, 10_000_000_000, "Delayed runs in all queues above which new activations are refused; 0 is no limit."),
        Limit("leased_max", "runs", 0, 0, 10_000_000_000, "Leased runs of all queues above which new activations are refused; 0 is no limit."),
        Limit("store_mib_max", "MiB", 0, 0, 1_000_000_000, "Size of the store above which new activations are refused; 0 is no limit."),
        Limit("ingest_wait_ms", "ms", 5_000, 0, HOUR_MS, "Time that new activations wait above a limit before they are refused."),
        Limit("dead_letter_retention_ms", "ms", 30 * DAY_MS, 0, 3_650 * DAY_MS, "Time that a dead letter is kept; 0 is for ever."),
        Limit("activation_bytes_max", "bytes", 5_000_000, KIB, 52 * MIB, "One activation, as received."),
        Limit("error_chars_max", "characters", 8_000, 100, MIB, "Length of an error's message, and of its traceback, as stored."),
        Limit("grpc_message_bytes_max", "bytes", 52 * MIB, KIB, 1_024 * MIB, "One gRPC message in either direction, decompressed."),
        Limit("grpc_calls_max", "calls", 256, 1, 65_536, "Concurrent calls of one gRPC connection."),
        Limit("grpc_buffer_bytes_max", "bytes", 256 * MIB, KIB, 65_536 * MIB, "Messages of all gRPC calls that one server holds at a time."),
        Limit("push_concurrency", "calls", 32, 1, 65_536, "Activations that are being pushed to one endpoint at a time."),
        Limit("push_timeout_ms", "ms", 30_000, 100, HOUR_MS, "Time in which a worker must accept an activation."),
        Limit("index_batch_events_max", "events", 5_000, 1, 1_000_000, "Events in one batch of an indexer."),
        Limit("index_depth_max", "batches", 8, 0, 1_000, "Batches of an indexer that may wait for their commit; 0 waits for each."),
        Limit("index_memory_mib", "MiB", 256, 1, 1_000_000, "Rows that an indexer keeps in memory, including staged ones."),
        Limit("index_row_bytes_max", "bytes", MIB, KIB, 256 * MIB, "Texts, bytes and JSON of one row of an indexer."),
        Limit("index_enqueues_max", "runs", 1_000, 0, 100_000, "Runs that the handler of one event may enqueue."),
        Limit("index_fetch_events_max", "events", 20_000, 1, 1_000_000, "Events of one source that are read ahead of their handlers."),
        Limit("index_retries_max", "tries", 12, 0, 1_000_000, "Repeats of an operation of an indexer while its store is unavailable."),
        Limit("index_handler_timeout_s", "s", 300, 1, 86_400, "Time that the handler of one event may wait."),
        Limit("index_effects_max", "calls", 100, 1, 100_000, "Effects of an indexer that run at a time."),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one process. Units are in the names; `TABLE` describes each.

    Raises `InvalidSetting` by name when a value is not an integer within its bounds, or when two limits contradict each
    other.
    """

    chunk_runs_max: int = TABLE["chunk_runs_max"].default
    chunk_bytes_max: int = TABLE["chunk_bytes_max"].default
    results_page_bytes_max: int = TABLE["results_page_bytes_max"].default
    claim_bytes_max: int = TABLE["claim_bytes_max"].default
    item_bytes_max: int = TABLE["item_bytes_max"].default
    inline_bytes_max: int = TABLE["inline_bytes_max"].default
    database_object_bytes_max: int = TABLE["database_object_bytes_max"].default
    batch_runs_max: int = TABLE["batch_runs_max"].default
    ingest_concurrency: int = TABLE["ingest_concurrency"].default
    flush_size: int = TABLE["flush_size"].default
    flush_interval_ms: int = TABLE["flush_interval_ms"].default
    waiting_parents_max: int = TABLE["waiting_parents_max"].default
    heartbeat_ms: int = TABLE["heartbeat_ms"].default
    session_timeout_ms: int = TABLE["session_timeout_ms"].default
    crashes_max: int = TABLE["crashes_max"].default
    seal_timeout_ms: int = TABLE["seal_timeout_ms"].default
    orphan_grace_ms: int = TABLE["orphan_grace_ms"].default
    retention_ms: int = TABLE["retention_ms"].default
    shutdown_grace_s: int = TABLE["shutdown_grace_s"].default
    poll_interval_ms: int = TABLE["poll_interval_ms"].default
    upkeep_interval_ms: int = TABLE["upkeep_interval_ms"].default
    schedule_grace_ms: int = TABLE["schedule_grace_ms"].default
    schedule_ticks_max: int = TABLE["schedule_ticks_max"].default
    name_chars_max: int = TABLE["name_chars_max"].default
    tags_max: int = TABLE["tags_max"].default
    headers_bytes_max: int = TABLE["headers_bytes_max"].default
    http_idle_s: int = TABLE["http_idle_s"].default
    packet_bytes_max: int = TABLE["packet_bytes_max"].default
    expansion_max: int = TABLE["expansion_max"].default
    metadata_bytes_max: int = TABLE["metadata_bytes_max"].default
    streams_max: int = TABLE["streams_max"].default
    environment_streams_max: int = TABLE["environment_streams_max"].default
    connections_max: int = TABLE["connections_max"].default
    peer_connections_percent: int = TABLE["peer_connections_percent"].default
    reserved_descriptors: int = TABLE["reserved_descriptors"].default
    requests_per_minute_max: int = TABLE["requests_per_minute_max"].default
    requests_burst_max: int = TABLE["requests_burst_max"].default
    batch_runs_per_minute_max: int = TABLE["batch_runs_per_minute_max"].default
    batch_runs_burst_max: int = TABLE["batch_runs_burst_max"].default
    stream_grants_max: int = TABLE["stream_grants_max"].default
    delivery_grace_ms: int = TABLE["delivery_grace_ms"].default
    delivery_attempts_max: int = TABLE["delivery_attempts_max"].default
    delivery_delay_max_s: int = TABLE["delivery_delay_max_s"].default
    delivery_recovery_ms: int = TABLE["delivery_recovery_ms"].default
    deliveries_max: int = TABLE["deliveries_max"].default
    metrics_queues_max: int = TABLE["metrics_queues_max"].default
    queue_waiting_max: int = TABLE["queue_waiting_max"].default
    queue_delayed_max: int = TABLE["queue_delayed_max"].default
    queue_leased_max: int = TABLE["queue_leased_max"].default
    waiting_max: int = TABLE["waiting_max"].default
    delayed_max: int = TABLE["delayed_max"].default
    leased_max: int = TABLE["leased_max"].default
    store_mib_max: int = TABLE["store_mib_max"].default
    ingest_wait_ms: int = TABLE["ingest_wait_ms"].default
    dead_letter_retention_ms: int = TABLE["dead_letter_retention_ms"].default
    activation_bytes_max: int = TABLE["activation_bytes_max"].default
    error_chars_max: int = TABLE["error_chars_max"].default
    grpc_message_bytes_max: int = TABLE["grpc_message_bytes_max"].default
    grpc_calls_max: int = TABLE["grpc_calls_max"].default
    grpc_buffer_bytes_max: int = TABLE["grpc_buffer_bytes_max"].default
    push_concurrency: int = TABLE["push_concurrency"].default
    push_timeout_ms: int = TABLE["push_timeout_ms"].default
    index_batch_events_max: int = TABLE["index_batch_events_max"].default
    index_depth_max: int = TABLE["index_depth_max"].default
    index_memory_mib: int = TABLE["index_memory_mib"].default
    index_row_bytes_max: int = TABLE["index_row_bytes_max"].default
    index_enqueues_max: int = TABLE["index_enqueues_max"].default
    index_fetch_events_max: int = TABLE["index_fetch_events_max"].default
    index_retries_max: int = TABLE["index_retries_max"].default
    index_handler_timeout_s: int = TABLE["index_handler_timeout_s"].default
    index_effects_max: int = TABLE["index_effects_max"].default

    def __post_init__(self) -> None:
        for name, limit in TABLE.items():
            check(limit, getattr(self, name))
        if self.inline_bytes_max > self.chunk_bytes_max:
            raise InvalidSetting(
                f"inline_bytes_max ({self.inline_bytes_max}) is more than a chunk holds, chunk_bytes_max "
                f"({self.chunk_bytes_max})",
                hint="lower inline_bytes_max or raise chunk_bytes_max",
            )
        if self.session_timeout_ms < 2 * self.heartbeat_ms:
            raise InvalidSetting(
                f"session_timeout_ms ({self.session_timeout_ms}) is under two heartbeats "
                f"({self.heartbeat_ms} ms each): one late heartbeat would end a live process",
                hint="set session_timeout_ms to three times heartbeat_ms",
            )

        if self.grpc_buffer_bytes_max < self.grpc_message_bytes_max:
            raise InvalidSetting(
                f"grpc_buffer_bytes_max ({self.grpc_buffer_bytes_max}) does not hold one message, "
                f"grpc_message_bytes_max ({self.grpc_message_bytes_max})",
                hint="raise grpc_buffer_bytes_max or lower grpc_message_bytes_max",
            )

    def replaced(self, **changes: int) -> Self:
        """Return the limits with some of them changed, all checked again."""
        current: dict[str, int] = {field.name: getattr(self, field.name) for field in fields(self)}
        unknown = changes.keys() - current.keys()
        if unknown:
            raise InvalidSetting(f"unknown limit {', '.join(sorted(unknown))}", hint="see `headrace config show`")
        return type(self)(**(current | changes))


def check(limit: Limit, value: object) -> int:
    """Return `value` if it is an integer within the limit's bounds. Raises `InvalidSetting` that names the limit."""
    if not isinstance(value, int) or isinstance(value, bool) or not limit.least <= value <= limit.most:
        raise InvalidSetting(
            f"{limit.name}: expected an integer from {limit.least} to {limit.most} ({limit.unit}), got {value!r}",
            hint=limit.meaning,
        )
    return value


assert set(TABLE) == {field.name for field in fields(Limits)}, "a limit is in both the table and Limits, or in neither"
DEFAULT: Final = Limits()
