"""Batches are small at both ends of a run, and as large as may be between."""

from __future__ import annotations

import pytest

from headrace.core.sizes import Sizes


def taken(sizes: Sizes, count: int, *, known_from: int = 0) -> list[int]:
    """The batches that so many events come to; how many are left is known once it is `known_from` at the most."""
    found, left = [], count
    while left:
        size = min(left, sizes.size(left if left <= known_from else None))
        sizes.grow()
        found.append(size)
        left -= size
    return found


def test_batches_begin_small_and_end_small() -> None:
    found = taken(Sizes(5_000), 40_000, known_from=20_000)
    assert found[:4] == [625, 1_250, 2_500, 5_000]
    assert max(found) == 5_000
    assert found[-1] <= 500
    assert found[-3:] == sorted(found[-3:], reverse=True)
    assert sum(found) == 40_000
    assert len(found) <= 40_000 // 5_000 + 8


@pytest.mark.parametrize("most", [1, 2, 7, 499, 500])
def test_batches_that_are_small_anyway_are_all_alike(most: int) -> None:
    found = taken(Sizes(most), 10 * most, known_from=10 * most)
    assert found == [most] * 10


def test_where_nothing_runs_beside_a_commit_batches_are_as_large_as_may_be() -> None:
    assert taken(Sizes(5_000, is_even=True), 12_000, known_from=12_000) == [5_000, 5_000, 2_000]
