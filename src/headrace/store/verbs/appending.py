"""How a batch fills and closes: create, append, seal, stop, redrive. Each function is one transaction's work."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from headrace.core import batch as batches
from headrace.core import run
from headrace.core.batch import Batch
from headrace.core.block import Chunk, Extra, check_names, narrowed
from headrace.core.index_set import IndexSet
from headrace.core.order import first_order_no
from headrace.core.pack import count, pack, unpack_some
from headrace.core.span import (
    DELAYED,
    DONE,
    WAITING,
    Counts,
    Key,
    Part,
    Span,
    cancel,
    decode_places,
    encode_places,
    positions_of,
)
from headrace.core.span import redrive as redrive_span
from headrace.foundation.errors import Conflict, InvalidInput, NotFound, StoreBroken
from headrace.store.protocol import Appended, NewBatch
from headrace.store.verbs.rows import (
    Blob,
    add_parts,
    add_spans,
    as_json,
    put_batch,
    put_spans,
    take_ids,
    to_batch,
    to_span,
)
from headrace.store.verbs.script import Overtaken, Script, fetch, fetch_first, fetch_one

SWEEP_SPANS_MAX: Final = 1_000
BLOCKS_MAX: Final = 1_000_000
"""Blocks that may hold one index: few, unless a batch came in random order."""
_extras_encoder = msgspec.msgpack.Encoder()
_extras_decoder = msgspec.msgpack.Decoder(dict[int, Extra])


def decode_extras(data: bytes | None) -> dict[int, Extra]:
    """What only some runs of a block have, by position."""
    return {} if data is None else _extras_decoder.decode(data)


def find(batch_id: str) -> Script[Batch]:
    """The batch, or `NotFound`."""
    batch, _ = yield from find_with_width(batch_id)
    return batch


def find_with_width(batch_id: str) -> Script[tuple[Batch, int]]:
    """The batch and the distance that the indexes of its widest block span, or `NotFound`."""
    return _known((yield from fetch_one("batch", id=batch_id)), batch_id)


def lock(batch_id: str) -> Script[Batch]:
    """The batch, not to be changed by others before this transaction ends. After the spans it locks (rule R8)."""
    batch, _ = _known((yield from fetch_one("lock_batch", id=batch_id)), batch_id)
    return batch


def _known(row: tuple[Any, ...] | None, batch_id: str) -> tuple[Batch, int]:
    if row is None:
        raise NotFound("there is no such batch", hint="`headrace batch list` shows those there are", batch_id=batch_id)
    return to_batch(row), int(row[21])


def received_of(batch_id: str) -> Script[IndexSet]:
    """The set of indexes a batch has received."""
    (data,) = yield from fetch_first("received", id=batch_id)
    try:
        return IndexSet.from_bytes(data) if data else IndexSet()
    except InvalidInput as error:
        raise StoreBroken("the set of received indexes can't be read", batch_id=batch_id) from error


def create(new: NewBatch, now_us: int) -> Script[tuple[Batch, bool]]:
    """A new batch, or the one its key names."""
    if new.key is not None:
        row = yield from fetch_one("batch_by_key", environment=new.environment, key=new.key)
        if row is not None:
            return to_batch(row), False
    if (yield from fetch_one("batch", id=new.id)) is not None:
        return (yield from find(new.id)), False
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


def indexes_of(first_index: int, runs_count: int, gaps: bytes | None) -> Sequence[int]:
    """The batch index of each position of a block."""
    if gaps is None:
        return range(first_index, first_index + runs_count)
    return [first_index + gap for gap in array("I", gaps)]


def locate(batch_id: str, index: int) -> Script[tuple[int, int] | None]:
    """`(block id, position)` of a run, or None when no such index was received."""
    row = yield from fetch_one("batch", id=batch_id)
    if row is None:
        return None
    width = row[21]
    blocks = yield from fetch(
        "blocks_from",
        batch_id=batch_id,
        from_index=index,
        after_index=index - width,
        before_index=index + 1,
        rows_max=BLOCKS_MAX,
    )
    for block_id, first_index, last_index, runs_count, gaps in blocks:
        if not first_index <= index <= last_index:
            continue
        if gaps is None:
            return block_id, index - first_index
        places = array("I", gaps)
        if index - first_index in places:
            return block_id, places.index(index - first_index)
        assert runs_count == len(places)
    return None


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


def clocks(environment: str, queues: set[str]) -> Script[dict[str, int]]:
    """The clocks of some queues; a queue nobody knows stands at 0."""
    rows = yield from fetch("clocks", environment=environment, names=as_json(sorted(queues)))
    found = {name: int(clock) for name, clock in rows}
    return {queue: found.get(queue, 0) for queue in queues}


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


def stop(batch_id: str, state: str, now_us: int) -> Script[Batch]:
    """Cancel or abandon a batch: a first bounded sweep now; claims and upkeep sweep the rest as they meet it."""
    yield from find(batch_id)
    rows = yield from fetch("unsettled_spans_of_batch", batch_id=batch_id, rows_max=SWEEP_SPANS_MAX)
    batch = yield from lock(batch_id)
    after = batches.stopped(batch, state, now_us)
    yield from put_batch(after)
    if after.is_stopped and not after.is_finished:
        yield from end_spans([cancel(to_span(row)) for row in rows], now_us)
    return (yield from find(batch_id))


def sweep_stopped(batch_id: str, spans_max: int, now_us: int) -> Script[tuple[int, int]]:
    """Cancel what waits in a stopped batch, at most `spans_max` spans; answers how many spans and runs."""
    rows = yield from fetch("unsettled_spans_of_batch", batch_id=batch_id, rows_max=spans_max)
    return len(rows), (yield from end_spans([cancel(to_span(row)) for row in rows], now_us))


def end_spans(ended: Sequence[tuple[Span, Counts]], now_us: int) -> Script[int]:
    """Keep spans some of whose runs ended without a worker, and count them in their batches."""
    yield from put_spans([span for span, _ in ended])
    changes: dict[str, Counts] = {}
    for span, counts in ended:
        changes[span.batch_id] = changes.get(span.batch_id, Counts()).plus(counts)
    yield from count_in(changes, now_us)
    return sum(counts.settled for counts in changes.values())


def count_in(changes: dict[str, Counts], now_us: int) -> Script[None]:
    """Add outcomes to their batches' counters; completes a batch in the same transaction."""
    rows = yield from fetch("lock_batches", ids=as_json(sorted(changes)))
    for row in rows:
        batch = to_batch(row)
        if any(changes[batch.id]):
            yield from put_batch(batches.settled(batch, changes[batch.id], now_us))


def cancel_runs(batch_id: str, indexes: Sequence[int], now_us: int) -> Script[int]:
    """Cancel single runs: those that wait now, those leased when their worker hears of it."""
    yield from find(batch_id)
    by_block = yield from _by_block(batch_id, indexes)
    ended, leased = [], []
    for block_id, positions in by_block.items():
        for span in (yield from lock_spans_of_block(block_id)):
            live = {own for own, state in zip(positions_of(span), span.states, strict=True) if state in run.UNSETTLED}
            if wanted := live & positions.keys():
                if span.state in (WAITING, DELAYED):
                    ended.append(cancel(span, wanted))
                else:
                    leased += [positions[position] for position in wanted]
    if leased:
        yield from fetch("ask_to_cancel", batch_id=batch_id, indexes=as_json(sorted(leased)))
    return (yield from end_spans(ended, now_us)) + len(leased)


def _by_block(batch_id: str, indexes: Sequence[int]) -> Script[dict[int, dict[int, int]]]:
    """`{block id: {position: index}}`; an index nobody received is `NotFound`."""
    found: dict[int, dict[int, int]] = {}
    for index in indexes:
        place = yield from locate(batch_id, index)
        if place is None:
            raise NotFound("the batch has no such run", batch_id=batch_id, index=index)
        found.setdefault(place[0], {})[place[1]] = index
    return found


def spans_of_block(block_id: int) -> Script[list[Span]]:
    """All spans over one block."""
    return [to_span(row) for row in (yield from fetch("spans_of_block", block_id=block_id))]


def lock_spans_of_block(block_id: int) -> Script[list[Span]]:
    """All spans over one block, not to be changed by others before this transaction ends."""
    return [to_span(row) for row in (yield from fetch("lock_spans_of_block", block_id=block_id))]


def redrive(batch_id: str, indexes: Sequence[int] | None) -> Script[int]:
    """Send failed runs round again; a completed batch is sealed once more until they end."""
    batch = yield from find(batch_id)
    if batch.is_stopped:
        raise Conflict(f"the batch is {batch.state}; its runs can't run again", batch_id=batch_id)
    wanted: list[tuple[Span, set[int] | None]]
    if indexes is None:
        wanted = [(span, None) for span in (yield from _failed_spans(batch_id))]
    else:
        if len(indexes) > SWEEP_SPANS_MAX:
            raise InvalidInput(f"at most {SWEEP_SPANS_MAX} runs can be redriven by index at once")
        by_block = yield from _by_block(batch_id, indexes)
        wanted = []
        for block_id, named in by_block.items():
            spans = yield from lock_spans_of_block(block_id)
            wanted += [(span, set(named)) for span in spans]
    now_clocks = yield from clocks(batch.environment, {span.queue for span, _ in wanted})
    unrunnable = yield from _born_failed(sorted({span.block_id for span, _ in wanted}))
    kept, fresh, change = [], [], Counts()
    for span, positions in wanted:
        after, taken, gone = redrive_span(
            span, positions, clock=now_clocks[span.queue], unrunnable=unrunnable.get(span.block_id, ())
        )
        if taken is not None:
            kept.append(after)
            fresh.append(taken)
            change = change.plus(gone)
    if fresh:
        yield from put_spans(kept)
        yield from add_spans(fresh, first_id=(yield from take_ids(spans_count=len(fresh)))[1])
        yield from fetch("forget_cancellations", batch_id=batch_id, indexes=as_json((yield from _indexes(fresh))))
        yield from put_batch(batches.redriven((yield from lock(batch_id)), change))
    return -change.settled


def _born_failed(block_ids: Sequence[int]) -> Script[dict[int, set[int]]]:
    """The positions of some blocks whose items were unreadable, by block id."""
    rows = yield from fetch("extras_of_blocks", ids=as_json(block_ids))
    return {
        block_id: {position for position, extra in decode_extras(extras).items() if extra.failure}
        for block_id, extras in rows
    }


def _indexes(spans: Sequence[Span]) -> Script[list[int]]:
    """The batch indexes of the runs of some spans."""
    ids = as_json(sorted({span.block_id for span in spans}))
    shapes = {
        block_id: indexes_of(first_index, runs_count, gaps)
        for block_id, first_index, runs_count, gaps in (yield from fetch("shapes_of_blocks", ids=ids))
    }
    return [shapes[span.block_id][position] for span in spans for position in positions_of(span)]


def _failed_spans(batch_id: str) -> Script[list[Span]]:
    found: list[Span] = []
    after_id = 0
    while True:
        rows = yield from fetch(
            "spans_with_state",
            batch_id=batch_id,
            state=bytes((run.FAILED,)),
            after_id=after_id,
            rows_max=SWEEP_SPANS_MAX,
        )
        found += [to_span(row) for row in rows]
        if len(rows) < SWEEP_SPANS_MAX:
            return found
        after_id = found[-1].id
