"""How a batch fills and closes: create, append, seal. Each function is one transaction's work."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from headrace.core import batch as batches
from headrace.core import run
from headrace.core.batch import Batch
from headrace.core.block import Chunk, check_names, narrowed
from headrace.core.index_set import IndexSet
from headrace.core.order import first_order_no
from headrace.core.pack import count, pack, unpack_some
from headrace.core.span import DELAYED, DONE, WAITING, Key, Part, Span, decode_places, encode_places, positions_of
from headrace.store.protocol import Appended, NewBatch
from headrace.store.verbs.finding import BLOCKS_MAX, find, find_with_width, indexes_of, lock, received_of, require_live
from headrace.store.verbs.rows import Blob, add_parts, add_spans, as_json, put_batch, take_ids, to_batch
from headrace.store.verbs.script import Overtaken, Script, fetch, fetch_first, fetch_one

_extras_encoder = msgspec.msgpack.Encoder()


def create(new: NewBatch, now_us: int) -> Script[tuple[Batch, bool]]:
    """A new batch, or the one its key names."""
    if new.key is not None:
        row = yield from fetch_one("batch_by_key", environment=new.environment, key=new.key)
        if row is not None:
            return to_batch(row), False
    if (yield from fetch_one("batch", id=new.id)) is not None:
        return (yield from find(new.id)), False
    if new.session_id:
        yield from require_live(new.session_id)
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
        raise Overtaken
    return (yield from find(new.id)), True


class _Fresh(NamedTuple):
    """What of an append is new."""

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
) -> Script[Appended]:
    """Make the runs of `chunks` durable that are not yet, and keep `cursor` with them."""
    batch = yield from lock(batch_id)
    for chunk in chunks:
        check_names(chunk)
        batches.check_append(batch, first_index=chunk.first_index, last_index=chunk.last_index, runs_max=runs_max)
    received = yield from received_of(batch_id)
    fresh = yield from _fresh(batch, received, chunks, now_us)
    accepted_count = sum(chunk.runs_count for chunk in fresh.chunks)
    failed_count = 0
    if fresh.chunks:
        yield from _keep_lanes(batch, fresh.chunks)
        failed_count = yield from _insert(batch, fresh.chunks, now_us)
        for chunk in fresh.chunks:
            _note(received, chunk)
        width = max(chunk.last_index - chunk.first_index + 1 for chunk in fresh.chunks)
        yield from fetch("update_received", id=batch_id, received=received.to_bytes(), block_width=width)
    after = batches.appended(
        batch, accepted_count=accepted_count, failed_count=failed_count, cursor=cursor, now_us=now_us
    )
    yield from put_batch(after)
    return Appended(
        accepted_count=accepted_count,
        duplicates_count=fresh.duplicates_count,
        conflicts=fresh.conflicts,
        existing=fresh.existing,
    )


def _fresh(batch: Batch, received: IndexSet, chunks: Sequence[Chunk], now_us: int) -> Script[_Fresh]:
    fresh = _Fresh([], 0, [], {})
    duplicates_count = 0
    seen = IndexSet()
    known: dict[tuple[str, str], tuple[str, int]] = {}
    repeats: list[tuple[Chunk, list[int]]] = []
    for chunk in chunks:
        keep, repeated = _new_positions(chunk, received, seen)
        if repeated:
            duplicates_count += len(repeated)
            repeats.append((chunk, repeated))
        if any(extra.idempotency_key for extra in chunk.extras.values()):
            keep = yield from _without_known_keys(batch, chunk, keep, known, fresh.existing, now_us)
        kept = narrowed(chunk, keep)
        if kept is not None:
            fresh.chunks.append(kept)
            _note(seen, kept)
    conflicts = (yield from _conflicts(batch.id, repeats, fresh.chunks)) if repeats else []
    return fresh._replace(duplicates_count=duplicates_count, conflicts=conflicts)


def _note(indexes: IndexSet, chunk: Chunk) -> None:
    """Add a chunk's indexes to a set."""
    if chunk.gaps is None:
        indexes.add_range(chunk.first_index, chunk.last_index + 1)
    else:
        indexes.add(chunk.first_index + gap for gap in array("I", chunk.gaps))


def _new_positions(chunk: Chunk, received: IndexSet, seen: IndexSet) -> tuple[list[int], list[int]]:
    everything = list(range(chunk.runs_count))
    if not received.overlaps_range(chunk.first_index, chunk.last_index + 1) and not seen.overlaps_range(
        chunk.first_index, chunk.last_index + 1
    ):
        return everything, []
    keep: list[int] = []
    repeated: list[int] = []
    for position in everything:
        index = chunk.index_at(position)
        (repeated if index in received or index in seen else keep).append(position)
    return keep, repeated


def _conflicts(batch_id: str, repeats: Sequence[tuple[Chunk, list[int]]], kept: Sequence[Chunk]) -> Script[list[int]]:
    """Indexes among the repeated ones whose content differs from what is stored, or from `kept` in this append.

    A block that is sent again as it was, the usual case, is compared as one value.
    """
    sent = [(index, content) for chunk, positions in repeats for index, content in _contents_at(chunk, positions)]
    wanted = {index for index, _ in sent}
    as_sent = {(chunk.first_index, chunk.gaps): chunk.items for chunk, _ in repeats}
    stored: dict[int, tuple[bytes, int]] = {}
    for first_index, gaps, items in (yield from _contents(batch_id, repeats, kept)):
        own = indexes_of(first_index, count(items), gaps)
        if as_sent.get((first_index, gaps)) == items and len(sent) == len(wanted):
            wanted.difference_update(own)
            continue
        positions = [position for position, index in enumerate(own) if index in wanted]
        payloads, kinds = unpack_some(items, positions)
        for number, position in enumerate(positions):
            stored[own[position]] = (payloads[number], kinds[number] if kinds else 0)
    return [index for index, content in sent if index in stored and stored[index] != content]


def _contents_at(chunk: Chunk, positions: list[int]) -> Iterator[tuple[int, tuple[bytes, int]]]:
    """`(index, (payload, kind))` of some runs of a chunk."""
    own = indexes_of(chunk.first_index, chunk.runs_count, chunk.gaps)
    payloads, kinds = unpack_some(chunk.items, positions)
    for number, position in enumerate(positions):
        yield own[position], (payloads[number], kinds[number] if kinds else 0)


def _contents(
    batch_id: str, repeats: Sequence[tuple[Chunk, list[int]]], kept: Sequence[Chunk]
) -> Script[list[tuple[int, bytes | None, bytes]]]:
    """`(first index, gaps, items)` of all that may hold repeated indexes."""
    found = [(other.first_index, other.gaps, other.items) for other in kept]
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
    met = IndexSet.from_ranges((chunk.first_index, chunk.last_index + 1) for chunk, _ in repeats)
    near = [row[0] for row in rows if met.overlaps_range(row[1], row[2] + 1)]
    blocks = yield from fetch("blocks", ids=as_json(near))
    return found + [(first_index, gaps, items) for _, first_index, gaps, _, items in blocks]


def _without_known_keys(
    batch: Batch,
    chunk: Chunk,
    keep: list[int],
    known: dict[tuple[str, str], tuple[str, int]],
    existing: dict[int, tuple[str, int]],
    now_us: int,
) -> Script[list[int]]:
    """Drop runs whose key already names a run, in the store or in `known`, and remember which run that is."""
    tasks = {position: key.task for key, positions in chunk.spans.items() for position in _positions(chunk, positions)}
    wanted = [
        (tasks[position], chunk.extras[position].idempotency_key)
        for position in keep
        if position in chunk.extras and chunk.extras[position].idempotency_key
    ]
    known |= {
        (task, key): (batch_id, index)
        for task, key, batch_id, index in (
            yield from fetch("known_keys", environment=batch.environment, rows=as_json(wanted), now_us=now_us)
        )
    }
    kept = []
    for position in keep:
        extra = chunk.extras.get(position)
        index = chunk.index_at(position)
        if extra is None or not extra.idempotency_key:
            kept.append(position)
            continue
        name = (tasks[position], extra.idempotency_key)
        if name in known:
            existing[index] = known[name]
        else:
            known[name] = (batch.id, index)
            kept.append(position)
    return kept


def _positions(chunk: Chunk, positions: bytes | None) -> Sequence[int]:
    return range(chunk.runs_count) if positions is None else decode_places(positions)


def _keep_lanes(batch: Batch, chunks: Sequence[Chunk]) -> Script[None]:
    """Make queues and lanes known, and note what time it is when the batch first meets each queue."""
    lanes = sorted({(key.queue, key.task) for chunk in chunks for key in chunk.spans})
    new_queues = {queue for queue, _ in lanes} - batch.order_bases.keys()
    for queue in sorted(new_queues):
        yield from fetch("know_queue", environment=batch.environment, name=queue)
    yield from fetch("know_lanes", environment=batch.environment, rows=as_json(lanes))
    if new_queues:
        (clock,) = yield from fetch_first("environment_clock", environment=batch.environment)
        batch.order_bases = batch.order_bases | dict.fromkeys(new_queues, int(clock))


def _insert(batch: Batch, chunks: Sequence[Chunk], now_us: int) -> Script[int]:
    """Insert blocks, their spans, and rows for what only some runs have; answers how many were born failed."""
    (clock,) = yield from fetch_first("environment_clock", environment=batch.environment)
    spans: list[Span] = []
    parts: list[tuple[Span, list[int], list[bytes]]] = []
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
        failures = {position: extra.failure for position, extra in chunk.extras.items() if extra.failure}
        for key, positions in chunk.spans.items():
            alive, dead = _new_spans(batch, block_id, chunk, key, positions, failures, clock, now_us)
            spans += [span for span in (alive, dead) if span is not None]
            if dead is not None:
                places = list(positions_of(dead))
                parts.append((dead, places, [failures[position] for position in places]))
    yield from fetch("insert_blocks", batch_id=batch.id, rows=as_json(rows), blob=blob.bytes())
    _, first_span_id = yield from take_ids(spans_count=len(spans))
    yield from add_spans(spans, first_id=first_span_id)
    yield from add_parts([_birth_part(span, places, failures, now_us) for span, places, failures in parts])
    yield from _insert_extras(batch, chunks, now_us)
    return sum(len(places) for _, places, _ in parts)


def _new_spans(
    batch: Batch,
    block_id: int,
    chunk: Chunk,
    key: Key,
    positions: bytes | None,
    failures: dict[int, bytes],
    clock: int,
    now_us: int,
) -> tuple[Span | None, Span | None]:
    """The span of the runs that can run, and the one of those that were born failed."""
    every = _positions(chunk, positions)
    good = [position for position in every if position not in failures] if failures else every
    bad = [position for position in every if position in failures] if failures else []

    def span(own: Sequence[int], state: int, *, whole: bool) -> Span | None:
        if not own:
            return None
        delayed = key.due_us > now_us
        return Span(
            block_id=block_id,
            batch_id=batch.id,
            environment=batch.environment,
            queue=key.queue,
            task=key.task,
            priority=key.priority,
            due_us=key.due_us,
            expires_us=key.expires_us,
            at_most_once=key.at_most_once,
            order_no=first_order_no(clock=clock, base=batch.order_bases[key.queue], index=chunk.index_at(own[0])),
            first_index=chunk.first_index,
            positions=None if whole else encode_places(own),
            states=bytes((state,)) * len(own),
            unsettled_count=len(own) if state == run.WAITING else 0,
            state=DONE if state != run.WAITING else DELAYED if delayed else WAITING,
        )

    return span(good, run.WAITING, whole=positions is None and not bad), span(bad, run.FAILED, whole=False)


def _birth_part(span: Span, positions: list[int], failures: list[bytes], now_us: int) -> Part:
    return Part(
        block_id=span.block_id,
        span_id=span.id,
        token=0,
        part_no=0,
        positions=encode_places(positions),
        codes=bytes((run.FAILED,)) * len(positions),
        results=pack(failures),
        settled_us=now_us,
    )


def _insert_extras(batch: Batch, chunks: Sequence[Chunk], now_us: int) -> Script[None]:
    keys, tags, objects = [], [], []
    for chunk in chunks:
        if not chunk.extras:
            continue
        tasks = {at: key.task for key, positions in chunk.spans.items() for at in _positions(chunk, positions)}
        for position, extra in chunk.extras.items():
            index = chunk.index_at(position)
            if extra.idempotency_key:
                keys.append((tasks[position], extra.idempotency_key, index, extra.idempotency_expires_us))
            tags += [(tag, index) for tag in extra.tags]
            if extra.object_key:
                objects.append((extra.object_key, batch.id))
    if keys:
        kept = yield from fetch(
            "insert_keys", environment=batch.environment, batch_id=batch.id, rows=as_json(keys), now_us=now_us
        )
        if len(kept) < len(keys):
            raise Overtaken
    if tags:
        yield from fetch("insert_tags", environment=batch.environment, batch_id=batch.id, rows=as_json(tags))
    if objects:
        yield from fetch("insert_objects", rows=as_json(objects))


def seal(batch_id: str, expected_count: int | None, now_us: int) -> Script[Batch]:
    """Close a batch; the decision that completes it is in the same transaction."""
    batch = yield from lock(batch_id)
    after = batches.sealed(batch, (yield from received_of(batch_id)), expected_count=expected_count, now_us=now_us)
    yield from put_batch(after)
    return after
