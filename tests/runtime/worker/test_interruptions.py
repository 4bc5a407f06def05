"""Interrupted runs: timeouts, cancellations, and a worker that stops."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from headrace.core.retry import Retry
from headrace.runtime.sessions.active_lease import BEGUN, NOT_BEGUN
from headrace.runtime.tasks.context import Context
from headrace.runtime.worker import executor as executor_module
from tests.support.executor_rig import failure, numbers, rig, states

SECOND_US = 1_000_000


async def double(item: int) -> int:
    return item * 2


async def test_r17_a_timeout_is_armed_when_a_run_first_suspends() -> None:
    gate = asyncio.Event()

    async def sometimes(item: int) -> None:
        if item:
            await gate.wait()

    async with rig(sometimes, timeout_s=5) as harness:
        await harness.ran(*[b"0"] * 50)
        assert harness.clock.sleepers_count == 0
        active = harness.submit(b"0", b"1", b"0")
        await harness.clock.settle()
        assert harness.clock.sleepers_count == 1
        gate.set()
        await harness.until_over(active)
        assert harness.clock.sleepers_count == 0


async def test_a_run_that_waits_too_long_times_out() -> None:
    cleaned: list[int] = []

    async def waits(item: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(item)

    async with rig(waits, timeout_s=5, retry=Retry(attempts=2, delay_s=0)) as harness:
        active = harness.submit(b"0")
        await harness.clock.advance_async(4.9)
        assert states(active) == ["open"]
        await harness.clock.advance_async(0.1)
        assert states(active) == ["retry"]
        assert (failure(active).type, failure(active).message) == ("TimeoutError", "timed out after 5 s")
        assert cleaned == [0]
        last = harness.submit(b"1", attempt=2)
        await harness.clock.advance_async(5)
        assert states(last) == ["failed"]


async def test_a_run_that_swallows_its_interruption_and_returns_is_completed() -> None:
    async def swallows(item: int) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "so far"
        return "never"

    async with rig(swallows, timeout_s=5) as harness:
        active = harness.submit(b"0")
        await harness.clock.advance_async(5)
        assert (states(active), active.results) == (["completed"], [b'"so far"'])


async def test_a_run_that_swallows_its_interruption_and_continues_is_interrupted_again() -> None:
    interruptions_count = 0

    async def stubborn(item: int) -> None:
        nonlocal interruptions_count
        while interruptions_count < 3:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                interruptions_count += 1
        raise RuntimeError("at last")

    async with rig(stubborn, timeout_s=5) as harness:
        active = harness.submit(b"0")
        await harness.clock.advance_async(5)
        assert (interruptions_count, states(active)) == (1, ["open"])
        await harness.clock.advance_async(2 * executor_module.INSIST_S)
        assert (interruptions_count, states(active)) == (3, ["failed"])
        assert failure(active).type == "TimeoutError"


async def test_a_threaded_run_past_its_timeout_is_notified_and_its_outcome_dropped() -> None:
    release, ended, seen = threading.Event(), threading.Event(), []

    def blocks(item: int, context: Context) -> str:
        release.wait()
        seen.append(context.cancelled)
        ended.set()
        return "too late"

    async with rig(blocks, timeout_s=5) as harness:
        active = harness.submit(b"0")
        await harness.clock.advance_async(5)
        assert states(active) == ["failed"]
        assert failure(active).type == "TimeoutError"
        release.set()
        await asyncio.to_thread(ended.wait)
        assert seen == [True]
        assert active.results[0].startswith(b'{"type":"TimeoutError"')


async def test_an_inline_run_past_its_timeout_is_interrupted_by_the_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[float] = []
    monkeypatch.setattr(signal, "setitimer", lambda _which, seconds: armed.append(seconds))

    def slow(item: int) -> None:
        assert armed[-1] == 5
        raise TimeoutError("timed out")  # raised in the run by the signal handler of the alarm

    async with rig(slow, timeout_s=5, inline=True) as harness:
        active = await harness.ran(b"0")
        assert failure(active).type == "TimeoutError"
        assert armed == [5, 0]
        assert harness.deadlines[0] > 0
        assert harness.deadlines[-1] == 0


async def test_a_cancelled_run_is_interrupted_and_other_runs_continue() -> None:
    contexts: dict[int, Context] = {}

    async def waits(item: int, context: Context) -> None:
        contexts[item] = context
        await asyncio.Event().wait()

    async with rig(waits) as harness:
        active = harness.submit(*numbers(3))
        await harness.clock.settle()
        harness.executor.interrupt(lambda _active, number: number == 1, "cancelled")
        await harness.clock.settle()
        assert states(active) == ["open", "cancelled", "open"]
        assert [contexts[item].cancelled for item in range(3)] == [False, True, False]


async def test_a_run_cancelled_before_it_began_does_not_begin() -> None:
    begun: list[int] = []
    gate = asyncio.Event()

    async def waits(item: int) -> None:
        begun.append(item)
        await gate.wait()

    async with rig(waits, concurrency=2) as harness:
        active = harness.submit(*numbers(6))
        await harness.clock.settle()
        harness.executor.interrupt(lambda _active, number: number in (1, 3, 4), "cancelled")
        gate.set()
        await harness.until_over(active)
        assert begun == [0, 1, 2, 5]
        assert states(active) == ["completed", "cancelled", "completed", "cancelled", "cancelled", "completed"]


# -- stopping


async def test_a_stop_lets_running_runs_end_and_begins_no_other_run() -> None:
    gate, begun = asyncio.Event(), []

    async def waits(item: int) -> None:
        begun.append(item)
        await gate.wait()

    async with rig(waits, concurrency=2) as harness:
        active = harness.submit(*numbers(5))
        await harness.clock.settle()
        stopping = asyncio.create_task(harness.executor.stop(grace_s=30))
        await harness.clock.settle()
        assert not stopping.done()
        gate.set()
        await stopping
        assert (begun, states(active)) == ([0, 1], ["completed"] * 2 + ["open"] * 3)
        assert harness.clock.now_us() == 1_700_000_000 * SECOND_US


async def test_past_the_grace_runs_are_interrupted_and_released_uncharged() -> None:
    cleaned: list[int] = []

    async def waits(item: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(item)
            if item:
                raise OSError("while cleaning up")

    async with rig(waits) as harness:
        active = harness.submit(*numbers(2))
        await harness.clock.settle()
        assert set(active.marks) == {BEGUN}
        stopping = asyncio.create_task(harness.executor.stop(grace_s=30))
        await harness.clock.advance_async(30)
        await stopping
        assert (cleaned, states(active), set(active.marks)) == ([0, 1], ["open"] * 2, {NOT_BEGUN})


async def test_a_second_stop_cuts_the_grace_short() -> None:
    async def waits(item: int) -> None:
        await asyncio.Event().wait()

    async with rig(waits) as harness:
        active = harness.submit(b"0")
        await harness.clock.settle()
        first = asyncio.create_task(harness.executor.stop(grace_s=30))
        await harness.clock.settle()
        await harness.executor.stop(grace_s=0)
        await first
        assert states(active) == ["open"]


async def test_a_stop_does_not_wait_for_a_run_that_ignores_its_interruption() -> None:
    released = asyncio.Event()

    async def deaf(item: int) -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    async with rig(deaf) as harness:
        active = harness.submit(b"0")
        await harness.clock.settle()
        await harness.executor.stop(grace_s=0)
        assert states(active) == ["open"]
        released.set()
        await harness.clock.settle()


async def test_an_interrupted_at_most_once_run_is_never_released() -> None:
    async def waits(item: int) -> None:
        await asyncio.Event().wait()

    async with rig(waits) as harness:
        active = harness.submit(*numbers(2), at_most_once=True)
        await harness.clock.settle()
        await harness.executor.stop(grace_s=0)
        assert states(active) == ["failed"] * 2
        assert failure(active).type == "WorkerStopped"
        assert set(active.marks) == {BEGUN}


async def test_an_at_most_once_run_that_ended_stays_marked_until_its_outcome_is_durable() -> None:
    async with rig(double) as harness:
        active = await harness.ran(*numbers(2), at_most_once=True)
        assert states(active) == ["completed"] * 2
        assert set(active.marks) == {BEGUN}


async def test_an_at_most_once_run_is_not_retried() -> None:
    async def fails(item: int) -> None:
        raise ValueError

    async with rig(fails, retry=Retry(attempts=5)) as harness:
        assert states(await harness.ran(b"0", at_most_once=True)) == ["failed"]


async def test_outcomes_are_reported_while_the_rest_runs() -> None:
    gate = asyncio.Event()

    async def last_waits(item: int) -> int:
        if item == 2:
            await gate.wait()
        return item

    async with rig(last_waits) as harness:
        active = harness.submit(*numbers(4))
        await harness.clock.settle()
        assert harness.dirty == [active]
        part = active.take_settlement()
        assert part is not None
        assert (part.part_no, part.codes) == (0, b"ccc")
        assert active.take_settlement() is None
        gate.set()
        await harness.until_over(active)
        rest = active.take_settlement()
        assert rest is not None
        assert (rest.part_no, rest.codes) == (1, b"c")
