"""Order numbers: virtual time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.core.order import CLOCK_STEP, clock_after, first_order_no, returned_order_no

TIMES = st.integers(0, 10**12)


@given(TIMES, TIMES, TIMES, TIMES)
def test_inside_a_batch_order_is_by_index_whatever_time_it_is(clock: int, base: int, index: int, other: int) -> None:
    low, high = sorted((index, other))
    assert first_order_no(clock=clock, base=base, index=low) <= first_order_no(clock=clock, base=base, index=high)


@given(TIMES, TIMES, TIMES)
def test_nothing_new_is_behind_the_clock(clock: int, base: int, index: int) -> None:
    assert first_order_no(clock=clock, base=base, index=index) >= clock


@given(TIMES, TIMES)
def test_what_comes_back_is_at_the_head_of_the_line(clock: int, index: int) -> None:
    assert returned_order_no(clock=clock) == clock
    assert returned_order_no(clock=clock) <= first_order_no(clock=clock, base=clock, index=index)


@given(TIMES, TIMES)
def test_a_clock_never_goes_back(clock: int, claimed: int) -> None:
    after = clock_after(clock=clock, claimed_order_no=claimed)
    assert after >= clock
    assert 0 <= max(clock, claimed) - after < CLOCK_STEP
    assert clock_after(clock=after, claimed_order_no=after + CLOCK_STEP) > after


def test_a_small_batch_is_not_stuck_behind_a_large_one() -> None:
    halfway = 5_000_000
    small_last = first_order_no(clock=halfway, base=halfway, index=99)
    large_next = first_order_no(clock=halfway, base=0, index=halfway + 100)
    assert small_last < large_next
