"""Sizes of batches: small at the start and the end of an indexer's run, and at most the limit between."""

from __future__ import annotations

import pytest

from headrace.core.sizes import Sizes


def taken(sizes: Sizes, count: int, *, known_from: int = 0) -> list[int]:
    """Return the sizes of batches for `count` events; how many are left is known from `known_from` on."""
    batch_sizes, left = [], count
    while left:
        size = min(left, sizes.size(left if left <= known_from else None))
        sizes.grow()
        batch_sizes.append(size)
        left -= size
    return batch_sizes


def test_batches_begin_small_and_end_small() -> None:
    batch_sizes = taken(Sizes(5_000), 40_000, known_from=20_000)
    assert batch_sizes[:4] == [625, 1_250, 2_500, 5_000]
    assert max(batch_sizes) == 5_000
    assert batch_sizes[-1] <= 500
    assert batch_sizes[-3:] == sorted(batch_sizes[-3:], reverse=True)
    assert sum(batch_sizes) == 40_000
    assert len(batch_sizes) <= 40_000 // 5_000 + 8


@pytest.mark.parametrize("most", [1, 2, 7, 499, 500])
def test_batches_that_are_small_anyway_are_all_alike(most: int) -> None:
    batch_sizes = taken(Sizes(most), 10 * most, known_from=10 * most)
    assert batch_sizes == [most] * 10


def test_where_nothing_runs_beside_a_commit_batches_are_as_large_as_may_be() -> None:
    assert taken(Sizes(5_000, is_even=True), 12_000, known_from=12_000) == [5_000, 5_000, 2_000]
