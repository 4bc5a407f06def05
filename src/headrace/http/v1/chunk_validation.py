"""Validation of batches, chunks and ticks from remote processes: complete, bounded, of the client's environment."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from headrace.core.batch import SINGLE
from headrace.core.block import Chunk, Extra
from headrace.core.pack import KINDS, REFERENCE, count, unpack
from headrace.core.serving import Serving
from headrace.core.span import decode_uint16s
from headrace.foundation.errors import InvalidInput, NotFound, StoreBroken
from headrace.foundation.ids import check_batch_id
from headrace.foundation.limits import TABLE, Limits
from headrace.http.requests.service import RequestContext
from headrace.runtime.tasks.bounds import SCHEDULES_MAX, check_name, check_priority, check_text
from headrace.runtime.tasks.schedule_spec import stored_rule
from headrace.store.payloads import Reference, check_key, environment_segment
from headrace.store.protocol import NewBatch, Schedule, Tick

RUNS_MAX = TABLE["chunk_runs_max"].most
SERVING_BYTES_MAX = 256 * 1024
AHEAD_US = 60 * 60 * 1_000_000
"""Time by which a client's clock may be ahead of the server's."""


def validated_batch(context: RequestContext, limits: Limits, new: NewBatch) -> NewBatch:
    """Return a valid batch in the client's environment. Raises `InvalidInput`."""
    check_batch_id(new.id)
    if new.key is not None:
        check_name("key", new.key)
    if new.kind not in ("batch", "stream") or len(new.task) > limits.name_chars_max:
        raise InvalidInput(
            f"expected a batch of kind 'batch' or 'stream' with a task name, "
            f"got {new.kind[:20]!r} and {new.task[:60]!r}"
        )
    check_text("task", new.task)
    if len(msgspec.json.encode(new.metadata)) > limits.metadata_bytes_max:
        raise InvalidInput(f"expected metadata of at most {limits.metadata_bytes_max} bytes")
    if not 0 <= new.seal_timeout_ms <= TABLE["seal_timeout_ms"].most:
        raise InvalidInput(
            f"expected seal_timeout_ms from 0 to {TABLE['seal_timeout_ms'].most}, got {new.seal_timeout_ms}"
        )
    return msgspec.structs.replace(new, environment=context.environment)


def validated_serving(context: RequestContext, serves: Serving | None) -> Serving | None:
    """Return what a worker serves, in the client's environment. Raises `InvalidInput` if it is too large."""
    if serves is None:
        return None
    size = len(msgspec.json.encode(serves))
    if size > SERVING_BYTES_MAX:
        raise InvalidInput(f"expected names of tasks and queues of at most {SERVING_BYTES_MAX} bytes, got {size}")
    return msgspec.structs.replace(serves, environment=context.environment)


def check_chunk(context: RequestContext, limits: Limits, batch_id: str, chunk: Chunk) -> None:
    """Raise `InvalidInput` for a chunk that is inconsistent, too large, or refers to payloads of another batch."""
    runs_count = chunk.runs_count
    try:
        payloads, kinds = unpack(chunk.items)
    except StoreBroken as error:
        raise InvalidInput(f"expected a chunk with readable items: {error.message}") from None
    if not 0 < runs_count <= RUNS_MAX or count(chunk.items) != runs_count:
        raise InvalidInput(
            f"expected a chunk of 1 to {RUNS_MAX} runs with as many items, got {runs_count} runs", runs_count=runs_count
        )
    _check_indexes(chunk)
    _check_spans(chunk)
    bytes_max = min(limits.chunk_bytes_max, limits.item_bytes_max)
    for block_offset, payload in enumerate(payloads):
        kind = kinds[block_offset] if kinds is not None else 0
        if kind not in KINDS.values() or len(payload) > bytes_max:
            raise InvalidInput(
                f"expected a payload of a known kind and at most {bytes_max} bytes, "
                f"got kind {kind} and {len(payload)} bytes"
            )
        if kind == REFERENCE:
            reference = Reference.decode(payload)
            check_object_key(context, batch_id, reference.key)
            if reference.bytes_count > limits.item_bytes_max:
                raise InvalidInput(
                    f"expected a payload of at most {limits.item_bytes_max} bytes (item_bytes_max), "
                    f"got {reference.bytes_count}"
                )
    if not chunk.extras.keys() <= set(range(runs_count)):
        raise InvalidInput(f"expected extras of the chunk's {runs_count} runs only")
    for extra in chunk.extras.values():
        _check_extra(context, limits, batch_id, extra)


def check_schedules(schedules: Sequence[Schedule]) -> None:
    """Raise `InvalidInput` for an invalid schedule, or for more schedules than an app may have."""
    if len(schedules) > SCHEDULES_MAX:
        raise InvalidInput(f"expected at most {SCHEDULES_MAX} schedules, got {len(schedules)}")
    for schedule in schedules:
        check_name("schedule", schedule.name)
        check_name("task", schedule.task)
        stored_rule(schedule)


def validated_tick(context: RequestContext, limits: Limits, tick: Tick) -> Tick:
    """Return a valid tick in the client's environment. Its runs are batches of one run. Raises `InvalidInput`."""
    if len(tick.runs) > TABLE["schedule_ticks_max"].most:
        raise InvalidInput(f"expected a tick of at most {TABLE['schedule_ticks_max'].most} runs, got {len(tick.runs)}")
    if not 0 <= tick.last_us < tick.until_us <= context.engine.clock.now_us() + AHEAD_US:
        raise InvalidInput("expected a tick after the previous one and not in the future", schedule=tick.name[:200])
    runs = []
    for new, chunk in tick.runs:
        check_batch_id(new.id)
        check_name("task", new.task)
        check_chunk(context, limits, new.id, chunk)
        is_keyed = any(extra.idempotency_key for extra in chunk.extras.values())
        if chunk.runs_count != 1 or len(chunk.spans) != 1 or is_keyed:
            raise InvalidInput("expected one run for each batch of a tick, without an idempotency key")
        runs.append(
            (NewBatch(id=new.id, environment=context.environment, kind=SINGLE, task=new.task, expected_count=1), chunk)
        )
    return msgspec.structs.replace(tick, runs=runs)


def check_object_key(context: RequestContext, batch_id: str, key: str) -> str:
    """Return an object key of this environment, and of this batch if one is given. Raises `NotFound`."""
    segment, batch, _ = check_key(key).split("/")
    if segment != environment_segment(context.environment) or batch_id not in ("", batch):
        raise NotFound("object not found", key=key)
    return key


def _check_spans(chunk: Chunk) -> None:
    covered: list[int] = []
    for key, block_offsets in chunk.spans.items():
        check_name("task", key.task)
        check_name("queue", key.queue)
        check_priority(key.priority)
        if not 0 <= key.due_us < 2**62 or not 0 <= key.expires_us < 2**62:
            raise InvalidInput(f"expected due_us and expires_us in [0, 2^62), got {key.due_us} and {key.expires_us}")
        covered += range(chunk.runs_count) if block_offsets is None else decode_uint16s(block_offsets)
    if sorted(covered) != list(range(chunk.runs_count)):
        raise InvalidInput("expected the spans of a chunk to cover each of its runs exactly once")


def _check_extra(context: RequestContext, limits: Limits, batch_id: str, extra: Extra) -> None:
    if extra.link or len(extra.tags) > limits.tags_max or len(extra.kept) > 2 * limits.metadata_bytes_max:
        raise InvalidInput("expected an extra without a link, within the limits on tags and metadata")
    if len(msgspec.json.encode(extra.headers)) > limits.headers_bytes_max:
        raise InvalidInput(f"expected run headers of at most {limits.headers_bytes_max} bytes")
    if len(extra.failure) > 4 * limits.error_chars_max:
        raise InvalidInput(
            f"expected a failure of at most {4 * limits.error_chars_max} bytes, got {len(extra.failure)}"
        )
    for name in (extra.idempotency_key, *extra.tags):
        if name:
            check_name("key or tag", name)
    if extra.object_key:
        check_object_key(context, batch_id, extra.object_key)


def _check_indexes(chunk: Chunk) -> None:
    if chunk.first_index < 0 or chunk.last_index < chunk.first_index:
        raise InvalidInput(f"expected ascending indexes from 0, got {chunk.first_index} to {chunk.last_index}")
    if chunk.gaps is None:
        last_index = chunk.first_index + chunk.runs_count - 1
    else:
        gaps = array("I")
        if len(chunk.gaps) != gaps.itemsize * chunk.runs_count:
            raise InvalidInput(f"expected a gap for each of the chunk's {chunk.runs_count} runs")
        gaps.frombytes(chunk.gaps)
        if gaps[0] or any(left >= right for left, right in pairwise(gaps)):
            raise InvalidInput("expected gaps that begin at 0 and increase")
        last_index = chunk.first_index + gaps[-1]
    if last_index != chunk.last_index:
        raise InvalidInput(f"expected the chunk to end at index {last_index}, got {chunk.last_index}")
