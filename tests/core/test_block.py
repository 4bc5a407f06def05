"""Coalescing of runs into chunks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.core.block import Chunk, Coalescer, Extra, narrowed
from headrace.core.pack import JSON, TEXT, unpack
from headrace.core.span import Key, decode_uint16s

KEYS = [Key("a"), Key("b", priority=1), Key("a", queue="other")]
RUNS = st.lists(
    st.tuples(st.integers(0, 10_000), st.binary(max_size=40), st.sampled_from(KEYS), st.sampled_from([JSON, TEXT])),
    max_size=60,
    unique_by=lambda run: run[0],
)
Content = dict[int, tuple[bytes, Key, int, Extra | None]]


def content_of(chunks: list[Chunk]) -> Content:
    """Return the content of chunks, by index."""
    content: Content = {}
    for chunk in chunks:
        payloads, kinds = unpack(chunk.items)
        keys = {
            block_offset: key
            for key, block_offsets in chunk.spans.items()
            for block_offset in (range(chunk.runs_count) if block_offsets is None else decode_uint16s(block_offsets))
        }
        assert len(keys) == chunk.runs_count, "each run is in one span"
        for block_offset, payload in enumerate(payloads):
            index = chunk.index_at(block_offset)
            assert chunk.first_index <= index <= chunk.last_index
            assert index not in content
            kind = kinds[block_offset] if kinds else JSON
            content[index] = (payload, keys[block_offset], kind, chunk.extras.get(block_offset))
    return content


@given(RUNS, st.integers(1, 20), st.integers(1, 200))
def test_every_run_comes_out_once_as_it_went_in(
    runs: list[tuple[int, bytes, Key, int]], runs_max: int, bytes_max: int
) -> None:
    coalescer = Coalescer(runs_max=runs_max, bytes_max=bytes_max)
    extras = {index: Extra(tags=(str(index),)) for index, _, _, _ in runs if index % 3 == 0}
    for index, payload, key, kind in runs:
        coalescer.add(index, payload, key, kind=kind, extra=extras.get(index))
    chunks = coalescer.flush()
    assert content_of(chunks) == {index: (payload, key, kind, extras.get(index)) for index, payload, key, kind in runs}
    assert all(chunk.runs_count <= runs_max for chunk in chunks)
    assert coalescer.flush() == []


@given(st.lists(st.binary(max_size=50), max_size=80), st.integers(0, 100), st.integers(1, 20), st.integers(1, 300))
def test_many_at_once_make_the_chunks_that_one_by_one_would(
    payloads: list[bytes], first: int, runs_max: int, bytes_max: int
) -> None:
    at_once, singly = (Coalescer(runs_max=runs_max, bytes_max=bytes_max) for _ in range(2))
    at_once.extend(first, payloads, KEYS[0])
    for number, payload in enumerate(payloads):
        singly.add(first + number, payload, KEYS[0])
    assert at_once.flush() == singly.flush()


def test_a_chunk_closes_by_count_and_by_bytes() -> None:
    coalescer = Coalescer(runs_max=3, bytes_max=10)
    for index in range(3):
        coalescer.add(index, b"x", KEYS[0])
    assert [chunk.runs_count for chunk in coalescer.take()] == [3]
    coalescer.add(3, b"123456", KEYS[0])
    coalescer.add(4, b"123456", KEYS[0])
    assert [chunk.first_index for chunk in coalescer.take()] == [3]
    assert coalescer.open_count == 1
    assert coalescer.open_bytes == 6


def test_one_run_larger_than_a_chunk_has_a_chunk_to_itself() -> None:
    coalescer = Coalescer(runs_max=10, bytes_max=10)
    for index, payload in enumerate([b"1", b"x" * 100, b"2"]):
        coalescer.add(index, payload, KEYS[0])
    assert [chunk.runs_count for chunk in coalescer.flush()] == [1, 1, 1]


def test_consecutive_indexes_cost_no_gaps() -> None:
    coalescer = Coalescer(runs_max=10, bytes_max=1_000)
    coalescer.extend(5, [b"1"] * 4, KEYS[0])
    (chunk,) = coalescer.flush()
    assert chunk.gaps is None
    assert (chunk.first_index, chunk.last_index) == (5, 8)


def test_indexes_further_apart_than_32_bits_are_in_two_chunks() -> None:
    coalescer = Coalescer(runs_max=10, bytes_max=1_000)
    for index in (2**40, 0, 1):
        coalescer.add(index, b"%d" % index, KEYS[0])
    chunks = coalescer.flush()
    assert sorted(content_of(chunks)) == [0, 1, 2**40]
    assert len(chunks) == 2


@given(RUNS.filter(bool), st.data())
def test_a_narrowed_chunk_holds_the_runs_that_were_kept_and_no_others(
    runs: list[tuple[int, bytes, Key, int]], data: st.DataObject
) -> None:
    coalescer = Coalescer(runs_max=100, bytes_max=10_000)
    for index, payload, key, kind in runs:
        coalescer.add(index, payload, key, kind=kind, extra=Extra(tags=("t",)) if index % 2 else None)
    (chunk,) = coalescer.flush()
    keep = sorted(data.draw(st.sets(st.integers(0, chunk.runs_count - 1))))
    kept = narrowed(chunk, keep)
    whole = content_of([chunk])
    wanted = {chunk.index_at(block_offset) for block_offset in keep}
    assert (content_of([kept]) if kept is not None else {}) == {i: run for i, run in whole.items() if i in wanted}
