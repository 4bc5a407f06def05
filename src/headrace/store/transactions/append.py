"""Create batches, append runs, and seal. Each public function is one transaction."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from headrace.core import batch as batches
from headrace.core import run
from headrace.core.batch import STREAM, BatchRecord
from headrace.core.block import Chunk, EndedAtCreation, check_names, ended_at_creation, linked, narrowed
from headrace.core.index_set import IndexSet
from headrace.core.order import first_order_no
from headrace.core.pack import count, unpack_some
from headrace.core.run import ENDED_BADLY
from headrace.core.span import (
    DELAYED,
    DONE,
    WAITING,
    Counts,
    Key,
    Span,
    block_offsets_of,
    decode_uint16s,
    encode_uint16s,
)
from headrace.foundation.ids import run_id
from headrace.store.projections import birth_part
from headrace.store.protocol import Appended, NewBatch
from headrace.store.transactions.locate import (
    BLOCKS_MAX,
    find,
    find_with_width,
    indexes_of,
    locate,
    lock,
    received_of,
    require_live,
    spans_of_block,
)
from headrace.store.transactions.row_mapping import (
    Blob,
    BlockRow,
    add_parts,
    add_spans,
    as_json,
    put_batch,
    take_ids,
    to_batch,
)
from headrace.store.transactions.sql_script import Script, TransactionConflict, fetch, fetch_as, fetch_first, fetch_one

_extras_encoder = msgspec.msgpack.Encoder()


def create(new: NewBatch, now_us: int) -> Script[tuple[BatchRecord, bool]]:
    """Create a batch, or return the one that its key names."""
    if new.key is not None:
        row = yield from fetch_one("batch_by_key", environment=new.environment, key=new.key)
        if row is not None:
            return to_batch(row), False
    if (yield from fetch_one("batch", id=new.id)) is not None:
        return (yield from find(new.id)), False
    if new.session_id:
        yield from require_live(new.session_id, environment=new.environment, key_id=None)
    made = yield from fetch(
        "insert_batch",
        id=new.id,
        environment=new.environment,
        key=new.key,
        kind=new.kind,
        task=new.task,
        state=batches.OPEN,
        expected_count=new.expected_count,
        metadata=as_json(new.metadata),
        session_id=new.session_id,
        created_us=now_us,
        seal_timeout_ms=new.seal_timeout_ms,
    )
    if not made:
        raise TransactionConflict
    return (yield from find(new.id)), True


def enqueue(new: NewBatch, chunk: Chunk, now_us: int) -> Script[tuple[str, int]]:
    """Create a batch of one run, filled and sealed. Returns an older run if its idempotency key names one."""
    ((task, extra),) = [(key.task, chunk.extras.get(0)) for key in chunk.spans]
    if extra is not None and extra.idempotency_key:
        name = task, extra.idempotency_key
        run_by_key = yield from _named(new.environment, [name], now_us)
        if name in run_by_key:
            return run_by_key[name]
    yield from create(new, now_us)
    yield from append(new.id, [chunk], None, 1, now_us)
    yield from seal(new.id, 1, now_us)
    return new.id, 0


class _Fresh(NamedTuple):
    """The new part of an append."""

    chunks: list[Chunk]
    duplicates_count: int
    conflicts: list[int]
    existing: dict[int, tuple[str, int]]


def append(
    batch_id: str,
    chunks: Sequence[Chunk],
    cursor: bytes | None,
    runs_max: int,
    now_us: int,
    *,
    seals: bool = False,
) -> Script[Appended]:
    """Make those runs of `chunks` durable that are new, and store `cursor`; with `seals`, seal a complete batch."""
    batch = yield from lock(batch_id)
    for chunk in chunks:
        check_names(chunk)
        batches.check_append(batch, first_index=chunk.first_index, last_index=chunk.last_index, runs_max=runs_max)
    received = yield from received_of(batch_id)
    fresh = yield from _new_runs(batch, received, chunks, now_us)
    accepted_count = sum(chunk.runs_count for chunk in fresh.chunks)
    born_counts = Counts()
    if fresh.chunks:
        yield from _keep_lanes(batch, fresh.chunks)
        born_counts = yield from _insert(batch, fresh.chunks, now_us)
        for chunk in fresh.chunks:
            _add_indexes(received, chunk)
        width = max(chunk.last_index - chunk.first_index + 1 for chunk in fresh.chunks)
        yield from fetch("update_received", id=batch_id, received=received.to_bytes(), block_width=width)
    after = batches.appended(
        batch, accepted_count=accepted_count, created_with_outcome=born_counts, cursor=cursor, now_us=now_us
    )
    is_last = seals and batches.is_whole(after)
    if is_last:
        after = batches.sealed(after, received, expected_count=None, now_us=now_us)
    yield from put_batch(after)
    return Appended(
        accepted_count=accepted_count,
        duplicates_count=fresh.duplicates_count,
        conflicts=fresh.conflicts,
        existing=fresh.existing,
        sealed=after if is_last else None,
    )


def _new_runs(batch: BatchRecord, received: IndexSet, chunks: Sequence[Chunk], now_us: int) -> Script[_Fresh]:
    fresh = _Fresh([], 0, [], {})
    duplicates_count = 0
    seen = IndexSet()
    run_by_key: dict[tuple[str, str], tuple[str, int]] = {}
    repeats: list[tuple[Chunk, list[int]]] = []
    for chunk in chunks:
        keep, repeated = _new_block_offsets(chunk, received, seen)
        if repeated:
            duplicates_count += len(repeated)
            repeats.append((chunk, repeated))
        linked_chunk = chunk
        if any(extra.idempotency_key for extra in chunk.extras.values()):
            keep, linked_chunk = yield from _known_keys(batch, chunk, keep, run_by_key, fresh.existing, now_us)
        new_chunk = narrowed(linked_chunk, keep)
        if new_chunk is not None:
            fresh.chunks.append(new_chunk)
            _add_indexes(seen, new_chunk)
    conflicts = (yield from _conflicts(batch.id, repeats, fresh.chunks)) if repeats else []
    return fresh._replace(duplicates_count=duplicates_count, conflicts=conflicts)


def _add_indexes(indexes: IndexSet, chunk: Chunk) -> None:
    """Add a chunk's indexes to a set."""
    if chunk.gaps is None:
        indexes.add_range(chunk.first_index, chunk.last_index + 1)
    else:
        indexes.add(chunk.first_index + gap for gap in array("I", chunk.gaps))


def _new_block_offsets(chunk: Chunk, received: IndexSet, seen: IndexSet) -> tuple[list[int], list[int]]:
    everything = list(range(chunk.runs_count))
    if not received.overlaps_range(chunk.first_index, chunk.last_index + 1) and not seen.overlaps_range(
        chunk.first_index, chunk.last_index + 1
    ):
        return everything, []
    keep: list[int] = []
    repeated: list[int] = []
    for block_offset in everything:
        index = chunk.index_at(block_offset)
        (repeated if index in received or index in seen else keep).append(block_offset)
    return keep, repeated


def _conflicts(batch_id: str, repeats: Sequence[tuple[Chunk, list[int]]], kept: Sequence[Chunk]) -> Script[list[int]]:
    """Return the repeated indexes whose content differs from the stored one, or from `kept` in this append.

    A block that is sent again unchanged, the usual case, is compared as one value.
    """
    sent = [
        (index, content) for chunk, block_offsets in repeats for index, content in _contents_at(chunk, block_offsets)
    ]
    open_indexes = {index for index, _ in sent}
    as_sent = {(chunk.first_index, chunk.gaps): chunk.items for chunk, _ in repeats}
    stored: dict[int, tuple[bytes, int]] = {}
    for first_index, gaps, items in (yield from _contents(batch_id, repeats, kept)):
        indexes = indexes_of(first_index, count(items), gaps)
        if as_sent.get((first_index, gaps)) == items and len(sent) == len(open_indexes):
            open_indexes.difference_update(indexes)
            continue
        block_offsets = [block_offset for block_offset, index in enumerate(indexes) if index in open_indexes]
        payloads, kinds = unpack_some(items, block_offsets)
        for number, block_offset in enumerate(block_offsets):
            stored[indexes[block_offset]] = (payloads[number], kinds[number] if kinds else 0)
    return [index for index, content in sent if index in stored and stored[index] != content]


def _contents_at(chunk: Chunk, block_offsets: list[int]) -> Iterator[tuple[int, tuple[bytes, int]]]:
    """Yield `(index, (payload, kind))` for some runs of a chunk."""
    indexes = indexes_of(chunk.first_index, chunk.runs_count, chunk.gaps)
    payloads, kinds = unpack_some(chunk.items, block_offsets)
    for number, block_offset in enumerate(block_offsets):
        yield indexes[block_offset], (payloads[number], kinds[number] if kinds else 0)


def _contents(
    batch_id: str, repeats: Sequence[tuple[Chunk, list[int]]], kept: Sequence[Chunk]
) -> Script[list[tuple[int, bytes | None, bytes]]]:
    """Return `(first index, gaps, items)` of all blocks that may hold repeated indexes."""
    kept_contents = [(other.first_index, other.gaps, other.items) for other in kept]
    _, width = yield from find_with_width(batch_id)
    first_index = min(chunk.first_index for chunk, _ in repeats)
    rows = yield from fetch(
        "blocks_from",
        batch_id=batch_id,
        from_index=first_index,
        after_index=first_index - width,
        before_index=max(chunk.last_index for chunk, _ in repeats) + 1,
        rows_max=BLOCKS_MAX,
    )
    repeated = IndexSet.from_ranges((chunk.first_index, chunk.last_index + 1) for chunk, _ in repeats)
    near = [block_id for block_id, first, last, *_ in rows if repeated.overlaps_range(first, last + 1)]
    blocks = yield from fetch_as(BlockRow, "blocks", ids=as_json(near))
    return kept_contents + [(block.first_index, block.gaps, block.items) for block in blocks]


def _known_keys(
    batch: BatchRecord,
    chunk: Chunk,
    keep: list[int],
    run_by_key: dict[tuple[str, str], tuple[str, int]],
    existing: dict[int, tuple[str, int]],
    now_us: int,
) -> Script[tuple[list[int], Chunk]]:
    """Link runs whose key already names a run, in the store or in `known`; in a stream leave them out.

    Returns the block offsets to keep, and the chunk they belong to, and adds the new keys to `known`. A key is free
    again when its run failed, was cancelled or expired, unless that run must not run twice.
    """
    tasks = {
        block_offset: key.task
        for key, block_offsets in chunk.spans.items()
        for block_offset in _block_offsets(chunk, block_offsets)
    }
    named = [
        (block_offset, (tasks[block_offset], chunk.extras[block_offset].idempotency_key))
        for block_offset in keep
        if block_offset in chunk.extras and chunk.extras[block_offset].idempotency_key
    ]
    unknown_keys = sorted({name for _, name in named} - run_by_key.keys())
    run_by_key |= yield from _named(batch.environment, unknown_keys, now_us)
    links: dict[int, str] = {}
    for block_offset, name in named:
        if name in run_by_key:
            existing[chunk.index_at(block_offset)] = run_by_key[name]
            links[block_offset] = run_id(*run_by_key[name])
        else:
            run_by_key[name] = (batch.id, chunk.index_at(block_offset))
    if batch.kind == STREAM:
        return [block_offset for block_offset in keep if block_offset not in links], chunk
    return keep, linked(chunk, links)


def _named(
    environment: str, keys: Sequence[tuple[str, str]], now_us: int
) -> Script[dict[tuple[str, str], tuple[str, int]]]:
    """Return the runs that keys name, by `(task, key)`; delete the keys that are free again."""
    rows = yield from fetch("known_keys", environment=environment, rows=as_json(list(keys)), now_us=now_us)
    runs: dict[tuple[str, str], tuple[str, int]] = {}
    free: list[tuple[str, str]] = []
    for task, key, batch_id, index in rows:
        if (yield from _is_free(batch_id, index)):
            free.append((task, key))
        else:
            runs[task, key] = batch_id, index
    if free:
        yield from fetch("free_keys", environment=environment, rows=as_json(free))
    return runs


def _is_free(batch_id: str, index: int) -> Script[bool]:
    """True if the key of a run is free: its run failed, was cancelled or expired, and may run again."""
    location = yield from locate(batch_id, index)
    if location is None:
        return True
    for span in (yield from spans_of_block(location.block_id)):
        for block_offset, state in zip(block_offsets_of(span), span.states, strict=True):
            if block_offset == location.block_offset and state in ENDED_BADLY:
                return not span.at_most_once
    return False


def _block_offsets(chunk: Chunk, block_offsets: bytes | None) -> Sequence[int]:
    return range(chunk.runs_count) if block_offsets is None else decode_uint16s(block_offsets)


def _keep_lanes(batch: BatchRecord, chunks: Sequence[Chunk]) -> Script[None]:
    """Create the queues and lanes of chunks, and store the clock at which the batch first uses each queue."""
    lanes = sorted({(key.queue, key.task) for chunk in chunks for key in chunk.spans})
    new_queues = {queue for queue, _ in lanes} - batch.order_bases.keys()
    for queue in sorted(new_queues):
        yield from fetch("know_queue", environment=batch.environment, name=queue)
    yield from fetch("know_lanes", environment=batch.environment, rows=as_json(lanes))
    if new_queues:
        (clock,) = yield from fetch_first("environment_clock", environment=batch.environment)
        batch.order_bases = batch.order_bases | dict.fromkeys(new_queues, int(clock))


def _insert(batch: BatchRecord, chunks: Sequence[Chunk], now_us: int) -> Script[Counts]:
    """Insert blocks, their spans, and rows for what only some runs have. Returns the counts of runs that ended at
    creation.
    """
    (clock,) = yield from fetch_first("environment_clock", environment=batch.environment)
    spans: list[Span] = []
    ended: list[tuple[Span, dict[int, EndedAtCreation]]] = []
    first_block_id, _ = yield from take_ids(blocks_count=len(chunks))
    blob, rows = Blob(), []
    for block_id, chunk in enumerate(chunks, first_block_id):
        rows.append(
            (
                block_id,
                chunk.first_index,
                chunk.last_index,
                chunk.runs_count,
                *blob.put(chunk.gaps),
                *blob.put(_extras_encoder.encode(chunk.extras) if chunk.extras else None),
                *blob.put(chunk.items),
            )
        )
        at_birth = ended_at_creation(chunk)
        for key, block_offsets in chunk.spans.items():
            for span in _new_spans(batch, block_id, chunk, key, block_offsets, at_birth, clock, now_us):
                spans.append(span)
                if span.state == DONE:
                    ended.append((span, at_birth))
    yield from fetch("insert_blocks", batch_id=batch.id, rows=as_json(rows), blob=blob.bytes())
    _, first_span_id = yield from take_ids(spans_count=len(spans))
    yield from add_spans(spans, first_id=first_span_id)
    yield from add_parts([birth_part(span, at_birth, now_us) for span, at_birth in ended])
    yield from _insert_extras(batch, chunks, now_us)
    states = b"".join(span.states for span, _ in ended)
    return Counts(completed=states.count(run.COMPLETED), failed=states.count(run.FAILED))


def _new_spans(
    batch: BatchRecord,
    block_id: int,
    chunk: Chunk,
    key: Key,
    block_offsets: bytes | None,
    at_birth: dict[int, EndedAtCreation],
    clock: int,
    now_us: int,
) -> Iterator[Span]:
    """Yield the span of the runs that can run, and a span for each state in which runs ended at creation."""
    every = _block_offsets(chunk, block_offsets)
    by_state: dict[int, Sequence[int]] = {run.WAITING: every}
    if at_birth:
        offsets_by_state: dict[int, list[int]] = {}
        for block_offset in every:
            offsets_by_state.setdefault(
                at_birth[block_offset].state if block_offset in at_birth else run.WAITING, []
            ).append(block_offset)
        by_state = dict(offsets_by_state)
    for state, offsets in by_state.items():
        span_state = DONE if state != run.WAITING else DELAYED if key.due_us > now_us else WAITING
        is_whole = block_offsets is None and len(offsets) == chunk.runs_count and span_state != DONE
        yield Span(
            block_id=block_id,
            batch_id=batch.id,
            environment=batch.environment,
            queue=key.queue,
            task=key.task,
            priority=key.priority,
            due_us=key.due_us,
            expires_us=key.expires_us,
            at_most_once=key.at_most_once,
            dead_letter=key.dead_letter,
            since_us=now_us,
            order_no=first_order_no(clock=clock, base=batch.order_bases[key.queue], index=chunk.index_at(offsets[0])),
            first_index=chunk.first_index,
            block_offsets=None if is_whole else encode_uint16s(offsets),
            states=bytes((state,)) * len(offsets),
            unsettled_count=0 if span_state == DONE else len(offsets),
            state=span_state,
        )


def _insert_extras(batch: BatchRecord, chunks: Sequence[Chunk], now_us: int) -> Script[None]:
    keys, tags, objects = [], [], []
    for chunk in chunks:
        if not chunk.extras:
            continue
        tasks = {
            at: key.task for key, block_offsets in chunk.spans.items() for at in _block_offsets(chunk, block_offsets)
        }
        for block_offset, extra in chunk.extras.items():
            index = chunk.index_at(block_offset)
            if extra.idempotency_key:
                keys.append((tasks[block_offset], extra.idempotency_key, index, extra.idempotency_expires_us))
            tags += [(tag, index) for tag in extra.tags]
            if extra.object_key:
                objects.append((extra.object_key, batch.id))
    if keys:
        inserted = yield from fetch(
            "insert_keys", environment=batch.environment, batch_id=batch.id, rows=as_json(keys), now_us=now_us
        )
        if len(inserted) < len(keys):
            raise TransactionConflict
    if tags:
        yield from fetch("insert_tags", environment=batch.environment, batch_id=batch.id, rows=as_json(tags))
    if objects:
        yield from fetch("insert_objects", rows=as_json(objects))


def seal_whole(batch_id: str, now_us: int) -> Script[BatchRecord | None]:
    """Seal a batch if it has received all that it announced."""
    batch = yield from lock(batch_id)
    return (yield from seal(batch_id, None, now_us)) if batches.is_whole(batch) else None


def seal(batch_id: str, expected_count: int | None, now_us: int) -> Script[BatchRecord]:
    """Seal a batch. The decision that completes it is in the same transaction."""
    batch = yield from lock(batch_id)
    after = batches.sealed(batch, (yield from received_of(batch_id)), expected_count=expected_count, now_us=now_us)
    yield from put_batch(after)
    return after
