"""What a remote process may put into a store: batches and chunks that are whole, bounded, and its own environment's."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from headrace.core.batch import SINGLE
from headrace.core.block import Chunk, Extra
from headrace.core.pack import KINDS, REFERENCE, count, unpack
from headrace.core.span import decode_uint16s
from headrace.foundation.errors import InvalidInput, NotFound, StoreBroken
from headrace.foundation.ids import check_batch_id
from headrace.foundation.limits import TABLE, Limits
from headrace.http.requests.service import RequestContext
from headrace.runtime.tasks.bounds import SCHEDULES_MAX, check_name, check_priority
from headrace.runtime.tasks.schedule_spec import stored_rule
from headrace.store.payloads import Reference, check_key
from headrace.store.protocol import NewBatch, Schedule, Tick

RUNS_MAX = TABLE["chunk_runs_max"].most
AHEAD_US = 60 * 60 * 1_000_000
"""How far a client's clock may be ahead of the server's."""


def checked_batch(call: RequestContext, limits: Limits, new: NewBatch) -> NewBatch:
    """A batch to create, in the environment that asks. Raises `InvalidInput`."""
    if new.key is not None:
        check_name("key", new.key)
    if new.kind not in ("batch", "stream") or len(new.task) > limits.name_chars_max:
        raise InvalidInput("a batch is of kind batch or stream, and of a task with a name")
    if len(msgspec.json.encode(new.metadata)) > limits.metadata_bytes_max:
        raise InvalidInput(f"metadata has at most {limits.metadata_bytes_max} bytes")
    if not 0 <= new.seal_timeout_ms <= TABLE["seal_timeout_ms"].most:
        raise InvalidInput("a seal timeout is within the bounds of seal_timeout_ms")
    return msgspec.structs.replace(new, environment=call.environment)


def check_chunk(call: RequestContext, limits: Limits, batch_id: str, chunk: Chunk) -> None:
    """Raise `InvalidInput` unless a chunk is one that a coalescer makes, of payloads that are this batch's."""
    runs_count = chunk.runs_count
    try:
        payloads, kinds = unpack(chunk.items)
    except StoreBroken as error:
        raise InvalidInput(f"a chunk's items can't be read: {error.message}") from None
    if not 0 < runs_count <= RUNS_MAX or count(chunk.items) != runs_count:
        raise InvalidInput("a chunk says that it holds other runs than it does", runs_count=runs_count)
    _check_indexes(chunk)
    _check_spans(chunk)
    for block_offset, payload in enumerate(payloads):
        kind = kinds[block_offset] if kinds is not None else 0
        if kind not in KINDS.values() or len(payload) > limits.chunk_bytes_max:
            raise InvalidInput("a payload is of no known kind, or larger than a chunk holds")
        if kind == REFERENCE:
            check_own(call, batch_id, Reference.decode(payload).key)
    if not chunk.extras.keys() <= set(range(runs_count)):
        raise InvalidInput("a chunk has extras of runs that it does not hold")
    for extra in chunk.extras.values():
        _check_extra(call, limits, batch_id, extra)


def check_schedules(schedules: Sequence[Schedule]) -> None:
    """Raise `InvalidInput` unless each is one that ticks, and they are as few as an app has."""
    if len(schedules) > SCHEDULES_MAX:
        raise InvalidInput(f"an app has at most {SCHEDULES_MAX} schedules, not {len(schedules)}")
    for one in schedules:
        check_name("schedule", one.name)
        check_name("task", one.task)
        stored_rule(one)


def checked_tick(call: RequestContext, limits: Limits, tick: Tick) -> Tick:
    """A tick whose runs are batches of one, in the environment that asks. Raises `InvalidInput`."""
    if len(tick.runs) > TABLE["schedule_ticks_max"].most:
        raise InvalidInput(f"a tick is at most {TABLE['schedule_ticks_max'].most} runs, not {len(tick.runs)}")
    if not 0 <= tick.last_us < tick.until_us <= call.engine.clock.now_us() + AHEAD_US:
        raise InvalidInput("a tick is of the past, and after the last one", schedule=tick.name[:200])
    runs = []
    for new, chunk in tick.runs:
        check_batch_id(new.id)
        check_name("task", new.task)
        check_chunk(call, limits, new.id, chunk)
        is_keyed = any(extra.idempotency_key for extra in chunk.extras.values())
        if chunk.runs_count != 1 or len(chunk.spans) != 1 or is_keyed:
            raise InvalidInput("the run of a tick is one run, and has no idempotency key")
        runs.append(
            (NewBatch(id=new.id, environment=call.environment, kind=SINGLE, task=new.task, expected_count=1), chunk)
        )
    return msgspec.structs.replace(tick, runs=runs)


def check_own(call: RequestContext, batch_id: str, key: str) -> str:
    """An object's key, when it is this environment's, and this batch's where one is named. Raises `NotFound`."""
    environment, batch, _ = check_key(key).split("/")
    if environment != call.environment or batch_id not in ("", batch):
        raise NotFound("there is no such object", key=key)
    return key


def _check_spans(chunk: Chunk) -> None:
    covered: list[int] = []
    for key, block_offsets in chunk.spans.items():
        check_name("task", key.task)
        check_name("queue", key.queue)
        check_priority(key.priority)
        if not 0 <= key.due_us < 2**62 or not 0 <= key.expires_us < 2**62:
            raise InvalidInput("a run is due and expires at moments that there are")
        covered += range(chunk.runs_count) if block_offsets is None else decode_uint16s(block_offsets)
    if sorted(covered) != list(range(chunk.runs_count)):
        raise InvalidInput("the spans of a chunk do not cover each of its runs once")


def _check_extra(call: RequestContext, limits: Limits, batch_id: str, extra: Extra) -> None:
    if extra.link or len(extra.tags) > limits.tags_max or len(extra.kept) > 2 * limits.metadata_bytes_max:
        raise InvalidInput("an extra says what only the store says, or too much")
    if len(msgspec.json.encode(extra.headers)) > limits.headers_bytes_max:
        raise InvalidInput(f"the headers of a run have at most {limits.headers_bytes_max} bytes")
    if len(extra.failure) > 4 * limits.error_chars_max:
        raise InvalidInput(f"a failure has at most {4 * limits.error_chars_max} bytes")
    for name in (extra.idempotency_key, *extra.tags):
        if name:
            check_name("key or tag", name)
    if extra.object_key:
        check_own(call, batch_id, extra.object_key)


def _check_indexes(chunk: Chunk) -> None:
    if chunk.first_index < 0 or chunk.last_index < chunk.first_index:
        raise InvalidInput("a chunk's indexes begin below zero, or end before they begin")
    if chunk.gaps is None:
        own_last = chunk.first_index + chunk.runs_count - 1
    else:
        gaps = array("I")
        if len(chunk.gaps) != gaps.itemsize * chunk.runs_count:
            raise InvalidInput("a chunk has a gap for each of its runs")
        gaps.frombytes(chunk.gaps)
        if gaps[0] or any(one >= two for one, two in pairwise(gaps)):
            raise InvalidInput("a chunk's gaps begin at zero and grow")
        own_last = chunk.first_index + gaps[-1]
    if own_last != chunk.last_index:
        raise InvalidInput("a chunk ends at another index than it says")
