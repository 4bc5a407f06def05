"""Failing runs cost little more than others: one text a place, a bounded number of log lines, one burst for many."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any

import pytest

from headrace.core.failure import decode
from headrace.core.retry import Retry
from headrace.core.span import RETRY
from headrace.runtime.worker.failure_log import LINES_MAX, WINDOW_S
from tests.support.executor_rig import numbers, rig
from tests.support.logged_events import logged_events

RUNS = 1_000


async def fails(item: int) -> None:
    if item % 2:
        raise ValueError(f"no {item}")
    raise TypeError(f"no {item}")


async def test_errors_of_one_place_are_formatted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    formatted_count = 0
    extract = traceback.extract_tb

    def counted(*arguments: Any) -> Any:
        nonlocal formatted_count
        formatted_count += 1
        return extract(*arguments)

    monkeypatch.setattr(traceback, "extract_tb", counted)
    async with rig(fails) as harness:
        active = await harness.ran(*numbers(RUNS))
    failures = [decode(result) for result in active.results]
    assert [failure.message for failure in failures] == [f"no {number}" for number in range(RUNS)]
    assert all(f"raise {failure.type}" in failure.trace for failure in failures)
    assert formatted_count <= 2, "one text for each of two places"


async def test_failed_attempts_are_logged_up_to_a_number_a_second_and_then_counted() -> None:
    with logged_events() as events:
        async with rig(fails) as harness:
            await harness.ran(*numbers(LINES_MAX))
            assert [event["event"] for event in events] == ["attempt.failed"] * LINES_MAX
            await harness.ran(*numbers(RUNS))
            assert len(events) == LINES_MAX, "one more gets no line"
            await harness.clock.advance_async(WINDOW_S)
            counted = {event["error"]: event["count"] for event in events[LINES_MAX:]}
            assert counted == {"ValueError": RUNS // 2, "TypeError": RUNS // 2}
            assert {event["event"] for event in events[LINES_MAX:]} == {"attempt.failures_unlogged"}
            events.clear()
            await harness.ran(*numbers(2))
            assert [event["event"] for event in events] == ["attempt.failed"] * 2, "a new second begins"
            await harness.ran(*numbers(RUNS))
        assert sum(event["count"] for event in events if "count" in event) == RUNS + 2 - LINES_MAX, "the executor ended"


async def test_failing_runs_of_a_lease_take_few_turns_of_the_loop() -> None:
    turns_count, is_over = 0, False

    async def count_turns() -> None:
        nonlocal turns_count
        while not is_over:
            turns_count += 1
            await asyncio.sleep(0)

    async with rig(fails, retry=Retry(attempts=3)) as harness:
        await harness.ran(*numbers(2))  # formats the texts
        counting = asyncio.create_task(count_turns())
        active = await harness.ran(*numbers(RUNS))
        is_over = True
        await counting
    assert set(active.codes) == {RETRY}
    assert turns_count < RUNS / 4, "one turn for many failed runs, not one for each"
