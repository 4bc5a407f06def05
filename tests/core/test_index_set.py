"""The set of received indexes behaves as Python's `set` does, and stays small."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core import index_set
from headrace.core.index_set import IndexSet
from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import INDEX_MAX


@pytest.fixture(autouse=True, scope="module", params=["ranges", "bits"])
def _form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Repeat each test with sets that are stored as bits, where their indexes are close enough."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "bits":
            patch.setattr(index_set, "RANGES_MAX", 0)
            patch.setattr(index_set, "RANGE_BYTES", 200_000)
        yield


indexes = st.integers(0, 60) | st.integers(10**6, 10**6 + 20) | st.sampled_from([INDEX_MAX - 1, INDEX_MAX])
batches = st.lists(indexes, max_size=40)


@given(st.lists(batches, max_size=6))
def test_adding_answers_how_many_are_new_as_a_set_would(added: list[list[int]]) -> None:
    received, expected = IndexSet(), set[int]()
    for batch in added:
        assert received.add(batch) == len(set(batch) - expected)
        expected |= set(batch)
        assert_same(received, expected)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12)), max_size=12))
def test_ranges_are_added_as_a_set_would(ranges: list[tuple[int, int]]) -> None:
    received, expected = IndexSet(), set[int]()
    for start, count in ranges:
        assert received.add_range(start, start + count) == len(set(range(start, start + count)) - expected)
        expected |= set(range(start, start + count))
        assert_same(received, expected)
    assert received == IndexSet.from_ranges((start, start + count) for start, count in ranges)


@given(batches, batches)
def test_a_union_holds_both_and_changes_neither(left: list[int], right: list[int]) -> None:
    left_set, right_set = IndexSet(left), IndexSet(right)
    assert_same(left_set.union(right_set), set(left) | set(right))
    assert_same(left_set, set(left))
    assert_same(right_set, set(right))
    assert left_set.update(right_set) == len(set(right) - set(left))
    assert_same(left_set, set(left) | set(right))


def test_a_set_may_be_updated_with_itself() -> None:
    received = IndexSet([1, 3, 4])
    assert received.update(received) == 0
    assert_same(received, {1, 3, 4})


@given(batches, batches)
def test_difference_and_overlap_keep_the_order_given(held: list[int], asked: list[int]) -> None:
    received = IndexSet(held)
    assert received.difference(asked) == [index for index in asked if index not in set(held)]
    assert received.overlap(asked) == [index for index in asked if index in set(held)]
    assert all((index in received) == (index in set(held)) for index in asked)


@given(batches, st.integers(0, 70), st.integers(0, 70))
def test_a_range_overlaps_when_one_of_its_indexes_is_held(held: list[int], start: int, stop: int) -> None:
    assert IndexSet(held).overlaps_range(start, stop) == any(start <= index < stop for index in held)


def test_a_range_beyond_all_that_is_held_overlaps_nothing() -> None:
    received = IndexSet([0, 3])
    assert not received.overlaps_range(8, 9)
    assert not received.overlaps_range(4, 100)


@given(batches)
def test_the_end_is_one_past_the_highest(held: list[int]) -> None:
    assert IndexSet(held).end == max(held, default=-1) + 1


@given(batches, st.integers(0, 80), st.integers(0, 10))
def test_missing_names_the_first_gaps(held: list[int], expected_count: int, ranges_max: int) -> None:
    absent = set(range(expected_count)) - set(held)
    gaps = list(IndexSet(absent).ranges())
    assert IndexSet(held).missing(expected_count, ranges_max) == gaps[:ranges_max]


def test_missing_of_ten_million_is_one_range() -> None:
    assert IndexSet().missing(10_000_000, 5) == [(0, 10_000_000)]
    assert IndexSet.from_ranges([(0, 10_000_000)]).missing(10_000_000, 5) == []


@given(batches)
def test_bytes_and_back_is_the_same_set(held: list[int]) -> None:
    received = IndexSet(held)
    decoded = IndexSet.from_bytes(received.to_bytes())
    assert decoded == received
    assert_same(decoded, set(held))


@given(batches, batches)
def test_sets_are_equal_when_their_indexes_are(left: list[int], right: list[int]) -> None:
    assert (IndexSet(left) == IndexSet(right)) == (set(left) == set(right))
    assert IndexSet(left) != set(left)


@given(st.binary(max_size=30))
def test_rubbish_is_refused_or_is_exactly_what_would_be_written(tail: bytes) -> None:
    for encoded in (tail, b"\x01" + tail, b"\x02" + tail):
        try:
            decoded = IndexSet.from_bytes(encoded)
        except InvalidInput:
            continue
        assert decoded.to_bytes() == encoded
        assert_well_formed(decoded)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "known form"),
        (b"\x03", "known form"),
        (b"\x02", "no bit set"),
        (b"\x02\x05\x00", "no bit set"),
        (b"\x02\xff\x0f", "one range"),
        (b"\x01\x05", "a range has no end"),
        (b"\x01\x00\x00", "empty or touch"),
        (b"\x01\x00\x01\x00\x01", "empty or touch"),
        (b"\x01\x00\x80", "ends inside a number"),
        (b"\x01\x00\x81\x00", "longer than necessary"),
        (b"\x01\x00" + b"\xff" * 9 + b"\x01", "too long"),
        (b"\x01\x00" + b"\xff" * 8 + b"\x7f", "too large"),
    ],
)
def test_what_is_no_set_is_refused_with_its_reason(encoded: bytes, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        IndexSet.from_bytes(encoded)


@pytest.mark.parametrize("bad", [[3, -1], [INDEX_MAX + 1], [2**70]])
def test_what_is_no_index_is_refused_and_changes_nothing(bad: list[int]) -> None:
    received = IndexSet([7])
    with pytest.raises(InvalidInput):
        received.add(bad)
    with pytest.raises(InvalidInput):
        received.add_range(min(*bad, 5), INDEX_MAX + 2)
    with pytest.raises(InvalidInput):
        received.add_range(5, 4)
    assert_same(received, {7})


def test_a_count_below_zero_is_refused() -> None:
    with pytest.raises(InvalidInput):
        IndexSet().missing(-1, 5)


def test_a_million_in_order_are_one_range_and_a_few_bytes() -> None:
    received = IndexSet()
    for start in range(0, 1_000_000, 1_000):
        received.add(range(start, start + 1_000))
    assert list(received.ranges()) == [(0, 1_000_000)]
    assert len(received) == 1_000_000
    assert len(received.to_bytes()) == 5


def test_adding_at_the_end_does_not_touch_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_set, "RANGES_MAX", 10**6)
    received = IndexSet(range(0, 40_000, 2))
    bounds = CountedBounds(received._bounds)
    monkeypatch.setattr(received, "_bounds", bounds)
    received.add_range(50_000, 50_010)
    received.add_range(50_010, 50_020)
    assert len(received) == 20_020
    assert bounds.moved_count <= 8, "an append moves its own bounds only"


def test_a_batch_all_over_the_set_is_merged_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_set, "RANGES_MAX", 10**6)
    received = IndexSet(range(0, 40_000, 2))
    bounds = CountedBounds(received._bounds)
    monkeypatch.setattr(received, "_bounds", bounds)
    assert received.add(range(1, 40_000, 100)) == 400
    assert bounds.moved_count <= 2 * 40_000, "one by one it would be four hundred passes"


class CountedBounds(list[int]):
    """Bounds that count how many of them are copied or replaced."""

    moved_count = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        self.moved_count += len(part) if isinstance(part, list) else 0
        return part

    def __setitem__(self, key: Any, part: Any) -> None:
        self.moved_count += len(self) - key.start
        super().__setitem__(key, part)


def test_a_shuffled_stream_ends_as_one_range() -> None:
    received = IndexSet()
    step = 7_919  # a prime, so that the multiples visit every index below the count once
    shuffled = [index * step % 100_000 for index in range(100_000)]
    for start in range(0, len(shuffled), 4_096):
        batch = shuffled[start : start + 4_096]
        assert received.difference(batch) == batch
        assert received.add(batch) == len(batch)
    assert list(received.ranges()) == [(0, 100_000)]


def test_a_random_stream_turns_into_bits_and_its_end_into_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_set, "RANGES_MAX", 4_096)
    monkeypatch.setattr(index_set, "RANGE_BYTES", 3)
    received, every = IndexSet(), 7_919
    shuffled = [index * every % 200_000 for index in range(200_000)]
    sizes = []
    for start in range(0, len(shuffled), 10_000):
        assert received.add(shuffled[start : start + 10_000]) == 10_000
        received = IndexSet.from_bytes(received.to_bytes())
        sizes.append(len(received.to_bytes()))
    assert max(sizes) <= 25_001, "a bit an index at most"
    assert received.to_bytes() == IndexSet.from_ranges([(0, 200_000)]).to_bytes()


def test_an_index_far_away_makes_bits_ranges_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_set, "RANGES_MAX", 10)
    monkeypatch.setattr(index_set, "RANGE_BYTES", 3)
    received = IndexSet(range(0, 100, 2))
    assert received.to_bytes()[0] == 2
    assert received.add([INDEX_MAX, 1]) == 2
    assert received.to_bytes()[0] == 1
    assert list(received) == sorted([*range(0, 100, 2), 1, INDEX_MAX])
    received = IndexSet(range(0, 100, 2))
    assert received.add_range(10**17, 10**17 + 5) == 5
    assert len(received.to_bytes()) < 300


def test_the_words_of_a_set_fit_on_a_line() -> None:
    assert repr(IndexSet([1, 2, 5])) == "<IndexSet of 3: 1..3, 5..6>"


def assert_same(received: IndexSet, expected: set[int]) -> None:
    assert list(received) == sorted(expected)
    assert len(received) == len(expected)
    assert_well_formed(received)


def assert_well_formed(received: IndexSet) -> None:
    bounds = [bound for pair in received.ranges() for bound in pair]
    assert all(before < after for before, after in pairwise(bounds))
    assert len(received) == sum(stop - start for start, stop in received.ranges())
