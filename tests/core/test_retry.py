"""Retry policies: their bounds, when they give up, how delays grow, and how due times are quantised."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.retry import (
    ATTEMPTS_MAX,
    DELAY_S_MAX,
    NO_RETRY,
    Backoff,
    Retry,
    RetryAfter,
    quantised_due_us,
    retry_at_us,
)
from headrace.foundation.errors import InvalidInput, InvalidSetting

NOW_US = 1_790_000_000_123_456
SECOND_US = 1_000_000


def delays_s(policy: Retry, attempts: list[int]) -> list[float]:
    due = [
        retry_at_us(policy, attempt=attempt, error=ValueError(), now_us=NOW_US, random=no_chance)
        for attempt in attempts
    ]
    return [math.nan if due_us is None else (due_us - NOW_US) / SECOND_US for due_us in due]


def no_chance() -> float:
    return 0.0


def never_called() -> float:
    raise AssertionError("a policy without jitter draws no random number")


def test_one_attempt_is_no_retry() -> None:
    assert Retry() == NO_RETRY == Retry(attempts=1)
    assert retry_at_us(NO_RETRY, attempt=1, error=ValueError(), now_us=NOW_US, random=never_called) is None


def test_the_last_attempt_gives_up_and_the_one_before_does_not() -> None:
    policy = Retry(attempts=3)
    due = [
        retry_at_us(policy, attempt=attempt, error=ValueError(), now_us=NOW_US, random=no_chance)
        for attempt in (1, 2, 3, 4, 10**400)
    ]
    assert [due_us is None for due_us in due] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        ("exponential", [1.5, 4.5, 13.5, 40.5, 100]),
        ("linear", [1.5, 3, 4.5, 6, 7.5]),
        ("constant", [1.5] * 5),
    ],
)
def test_delays_grow_as_their_backoff_says_up_to_the_cap(backoff: Backoff, expected: list[float]) -> None:
    policy = Retry(attempts=10, backoff=backoff, delay_s=1.5, factor=3, delay_max_s=100)
    assert delays_s(policy, [1, 2, 3, 4, 5]) == expected


@pytest.mark.parametrize("backoff", ["exponential", "linear", "constant"])
@pytest.mark.parametrize("delay_s", [0.0, 5e-324, 1e-9, 1.0, 3_600.0])
@pytest.mark.parametrize("factor", [1, 1.0000001, 2, 1_000.0])
def test_no_attempt_number_overflows(backoff: Backoff, delay_s: float, factor: float) -> None:
    policy = Retry(attempts=ATTEMPTS_MAX, backoff=backoff, delay_s=delay_s, factor=factor)
    delays = delays_s(policy, [1, 2, 400, 1_100, 50_000, ATTEMPTS_MAX - 1])
    assert all(0 <= delay <= policy.delay_max_s for delay in delays)
    assert delays == sorted(delays)
    if delay_s == 0.0 or (backoff == "exponential" and factor >= 2):
        assert delays[-1] == (policy.delay_max_s if delay_s else 0.0)


@given(st.floats(0, 1), st.floats(0, 1, exclude_max=True), st.integers(1, 60))
def test_jitter_takes_off_at_most_its_fraction_and_adds_nothing(jitter: float, chance: float, attempt: int) -> None:
    policy = Retry(attempts=100, jitter=jitter, delay_max_s=500)
    (whole_s,) = delays_s(policy, [attempt])
    due_us = retry_at_us(policy, attempt=attempt, error=ValueError(), now_us=NOW_US, random=lambda: chance)
    assert due_us is not None
    delay_us = due_us - NOW_US
    assert whole_s * (1 - jitter) * SECOND_US - 1 <= delay_us <= whole_s * SECOND_US
    assert abs(delay_us - whole_s * (1 - jitter * chance) * SECOND_US) <= 1


def test_without_jitter_chance_is_not_asked() -> None:
    policy = Retry(attempts=2, jitter=0)
    due_us = retry_at_us(policy, attempt=1, error=ValueError(), now_us=NOW_US, random=never_called)
    assert due_us == NOW_US + SECOND_US


def test_only_errors_to_retry_on_are_retried() -> None:
    policy = Retry(attempts=5, retry_on=(OSError,), give_up_on=(FileNotFoundError,))

    def is_retried(error: BaseException) -> bool:
        due_us = retry_at_us(policy, attempt=1, error=error, now_us=NOW_US, random=no_chance)
        return due_us is not None

    assert is_retried(OSError())
    assert is_retried(PermissionError())
    assert not is_retried(FileNotFoundError())
    assert not is_retried(ValueError())
    assert not is_retried(KeyboardInterrupt())


def test_by_default_an_interrupt_is_not_retried() -> None:
    assert (
        retry_at_us(Retry(attempts=5), attempt=1, error=KeyboardInterrupt(), now_us=NOW_US, random=never_called) is None
    )


def test_a_task_that_asks_is_retried_just_then_whatever_the_policy_says() -> None:
    policy = Retry(attempts=2, delay_s=1, delay_max_s=5, retry_on=(OSError,), give_up_on=(Exception,))
    error = RetryAfter(7_200.5)
    asked = retry_at_us(policy, attempt=1, error=error, now_us=NOW_US, random=never_called)
    assert asked == NOW_US + 7_200_500_000
    assert retry_at_us(policy, attempt=2, error=error, now_us=NOW_US, random=never_called) is None, (
        "it still uses up an attempt"
    )


def test_a_task_that_asks_is_never_retried_too_early() -> None:
    due_us = retry_at_us(Retry(attempts=2), attempt=1, error=RetryAfter(1e-9), now_us=NOW_US, random=never_called)
    assert due_us == NOW_US + 1


@pytest.mark.parametrize("seconds", [-1, -0.001, math.nan, math.inf, -math.inf, DELAY_S_MAX + 1, 10**400, True, "5"])
def test_retry_after_refuses_what_is_no_delay(seconds: Any) -> None:
    with pytest.raises(InvalidInput, match="0 to 31536000 seconds"):
        RetryAfter(seconds)


@pytest.mark.parametrize("seconds", [0, 0.5, 365 * 86_400])
def test_retry_after_survives_a_process_boundary(seconds: float) -> None:
    copy = pickle.loads(pickle.dumps(RetryAfter(seconds)))
    assert copy.seconds == seconds
    assert str(copy) == f"the task asked for a retry in {seconds} s"


def test_attempts_are_counted_from_one() -> None:
    with pytest.raises(InvalidInput, match="at least 1"):
        retry_at_us(Retry(attempts=3), attempt=0, error=ValueError(), now_us=NOW_US, random=no_chance)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("attempts", value) for value in (0, -1, 1.5, True, None, "3", ATTEMPTS_MAX + 1)),
        *(("backoff", value) for value in ("fibonacci", "", None)),
        *(("delay_s", value) for value in (-1, math.nan, math.inf, "1", True, None, DELAY_S_MAX + 1, 10**400)),
        *(("factor", value) for value in (0.99, 0, -2, math.nan, math.inf, 1_001)),
        *(("delay_max_s", value) for value in (-1, math.nan, math.inf, DELAY_S_MAX + 1)),
        *(("jitter", value) for value in (-0.1, 1.1, math.nan, math.inf, True)),
        *(("retry_on", value) for value in (ValueError, [ValueError], (ValueError(),), ("ValueError",), (int,))),
        *(("give_up_on", value) for value in (ValueError, (3,), None)),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting, match=f"^{name}: expected"):
        Retry(**{name: value})


def test_a_delay_over_its_own_cap_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="exceeds delay_max_s"):
        Retry(attempts=2, delay_s=7_200)
    assert delays_s(Retry(attempts=2, delay_s=7_200, delay_max_s=7_200), [1]) == [7_200]


@given(st.integers(0, 10**17), st.integers(-(10**12), 10**15))
def test_a_quantised_time_is_never_early_and_hardly_late(now_us: int, delay_us: int) -> None:
    due_us = now_us + delay_us
    quantised = quantised_due_us(due_us, now_us)
    if delay_us <= 0:
        assert quantised == now_us, "all runs whose time has passed are due now"
    else:
        assert due_us <= quantised <= due_us + max(delay_us // 20, 10_000)
        assert quantised % 10_000 == 0


@given(st.integers(1, 10**15), st.integers(0, 10**9))
def test_a_quantised_time_stays_where_it_is_when_quantised_again(delay_us: int, waited_us: int) -> None:
    quantised = quantised_due_us(NOW_US + delay_us, NOW_US)
    no_more_left_us = quantised - delay_us  # an earlier time has more of the delay left, perhaps with a coarser quantum
    later_us = min(no_more_left_us + waited_us, quantised)
    assert quantised_due_us(quantised, later_us) == quantised


def test_a_thousand_jittered_retries_are_at_most_twenty_five_spans() -> None:
    dice = random.Random(1)
    due = {quantised_due_us(NOW_US + round(dice.uniform(9, 11) * SECOND_US), NOW_US) for _ in range(1_000)}
    assert len(due) <= 25


def test_retries_of_one_policy_that_failed_at_different_moments_meet() -> None:
    dice = random.Random(2)
    policy = Retry(attempts=9, delay_s=10, jitter=0.1)
    due = set()
    for failure in range(1_000):
        now_us = NOW_US + failure * 1_000
        due_us = retry_at_us(policy, attempt=1, error=ValueError(), now_us=now_us, random=dice.random)
        assert due_us is not None
        due.add(quantised_due_us(due_us, now_us))
    assert len(due) <= 25


@pytest.mark.parametrize(
    ("delay_s", "step_us"),
    [(0.001, 10_000), (0.399, 10_000), (0.4, 20_000), (1, 40_000), (10, 320_000), (3_600, 163_840_000)],
)
def test_steps_are_ten_milliseconds_doubled(delay_s: float, step_us: int) -> None:
    delay_us = round(delay_s * SECOND_US)
    start_us = NOW_US // step_us * step_us
    assert quantised_due_us(start_us, start_us - delay_us) == start_us
    assert quantised_due_us(start_us + 1, start_us + 1 - delay_us) == start_us + step_us
    assert quantised_due_us(start_us + step_us, start_us + step_us - delay_us) == start_us + step_us
