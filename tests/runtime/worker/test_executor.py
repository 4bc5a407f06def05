"""Executor: the outcome of each run, for everything that user code may do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest

from headrace.core import pack
from headrace.core.retry import Retry, RetryAfter
from headrace.foundation.errors import StoreUnavailable
from headrace.foundation.limits import Limits
from headrace.runtime.sessions.active_lease import ENDED, NOT_BEGUN
from headrace.runtime.tasks.context import Context
from headrace.runtime.worker import executor as executor_module
from tests.support.executor_rig import Rig, failure, numbers, rig, states

SECOND_US = 1_000_000


async def double(item: int) -> int:
    return item * 2


async def double_after_a_turn(item: int) -> int:
    await asyncio.sleep(0)
    return item * 2


def double_in_a_thread(item: int) -> int:
    return item * 2


@pytest.mark.parametrize("function", [double, double_after_a_turn, double_in_a_thread])
@pytest.mark.parametrize("inline", [False, True])
async def test_results_are_stored_in_the_order_of_the_runs(function: Any, inline: bool) -> None:
    async with rig(function, inline=inline) as harness:
        leases = [harness.submit(*numbers(300)) for _ in range(3)]
        await harness.until_over(*leases)
        for active in leases:
            assert active.results == [b"%d" % (2 * number) for number in range(300)]
            assert states(active) == ["completed"] * 300
            assert set(active.marks) == {ENDED}
        assert (harness.executor.unbegun_count, harness.executor.in_flight_count) == (0, 0)
        assert harness.executor.ended_count == 900
        assert harness.over == leases


async def test_running_runs_are_bounded_by_the_concurrency() -> None:
    gate, most, now = asyncio.Event(), 0, 0

    async def counts(item: int) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await gate.wait()
        now -= 1

    async with rig(counts, concurrency=5) as harness:
        active = harness.submit(*numbers(40))
        await harness.clock.settle()
        assert (now, harness.executor.in_flight_count, harness.executor.unbegun_count) == (5, 5, 35)
        gate.set()
        await harness.until_over(active)
        assert most == 5


async def test_a_failure_has_its_class_its_message_and_the_frames_of_user_code() -> None:
    def inner(item: int) -> None:
        raise ValueError(f"no {item}")

    async def outer(item: int) -> None:
        inner(item)

    async with rig(outer) as harness:
        error_record = failure(await harness.ran(b"7", attempt=2, crashes_count=1))
    assert (error_record.type, error_record.message, error_record.attempts, error_record.crashes) == (
        "ValueError",
        "no 7",
        2,
        1,
    )
    assert "in outer" in error_record.trace
    assert "in inner" in error_record.trace
    assert "headrace/runtime" not in error_record.trace


async def test_a_failure_is_bounded() -> None:
    async def deep(item: int) -> None:
        if item:
            return await deep(item - 1)
        raise ValueError("x" * 100_000)

    async with rig(deep, limits=Limits(error_chars_max=1_000)) as harness:
        error_record = failure(await harness.ran(b"300"))
    assert len(error_record.message) == 1_000
    assert len(error_record.trace) <= 1_000
    assert "raise ValueError" in error_record.trace


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit("no message")


@pytest.mark.parametrize(
    "error",
    [
        Mute(),
        SystemExit(3),
        KeyboardInterrupt(),
        StopIteration(5),
        StopAsyncIteration(),
        GeneratorExit(),
        asyncio.CancelledError(),
        BaseExceptionGroup("several", [KeyboardInterrupt()]),
        RecursionError("deep"),
        MemoryError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        ValueError("\ud800"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("kind", ["at once", "after a turn", "thread", "inline"])
async def test_any_exception_of_a_task_fails_that_run_alone(error: BaseException, kind: str) -> None:
    async def at_once(item: int) -> int:
        if item == 1:
            raise error
        return item

    async def after_a_turn(item: int) -> int:
        await asyncio.sleep(0)
        return await at_once(item)

    def plain(item: int) -> int:
        if item == 1:
            raise error
        return item

    function: Any = {"at once": at_once, "after a turn": after_a_turn}.get(kind, plain)
    async with rig(function, concurrency=1, inline=kind == "inline") as harness:
        active = await harness.ran(*numbers(3))
        assert states(active) == ["completed", "failed", "completed"]
        error_record = failure(active, 1)
        assert error_record.type in (type(error).__name__, "RuntimeError"), error_record
        assert states(await harness.ran(b"5")) == ["completed"]


async def test_an_invalid_payload_fails_its_run_with_the_position() -> None:
    async with rig(double) as harness:
        active = await harness.ran(b"1", b'"x"', b"3", b"nonsense", b"5")
        assert states(active) == ["completed", "failed", "completed", "failed", "completed"]
        assert failure(active, 1).type == "InvalidPayload"
        assert "Expected `int`, got `str`" in failure(active, 1).message
        assert "malformed" in failure(active, 3).message


async def test_a_decoding_error_raised_by_a_task_is_not_taken_for_an_invalid_payload() -> None:
    async def decodes(item: int) -> None:
        b"\xff".decode()

    async with rig(decodes, retry=Retry(attempts=2)) as harness:
        active = await harness.ran(b"1")
        assert states(active) == ["retry"]
        assert failure(active).type == "UnicodeDecodeError"


async def test_a_run_called_without_its_argument_uses_the_default() -> None:
    async def defaulted(item: int = 7) -> int:
        return item

    async with rig(defaulted) as harness:
        assert (await harness.ran(b"", b"1", b"")).results == [b"7", b"1", b"7"]


@pytest.mark.parametrize(
    "value", [object(), {1: object()}, "\ud800", 10**5_000, {1, object()}], ids=lambda value: type(value).__name__
)
async def test_a_result_that_cannot_be_encoded_fails_its_run_permanently(value: Any) -> None:
    async def returns(item: int) -> Any:
        return value if item == 1 else item

    async with rig(returns, retry=Retry(attempts=5)) as harness:
        active = await harness.ran(*numbers(3))
        assert states(active) == ["completed", "failed", "completed"]
        assert failure(active, 1).type == "InvalidResult"
        assert "can't be encoded as JSON" in failure(active, 1).message


async def test_a_result_over_the_inline_limit_goes_to_the_object_store() -> None:
    async def long(item: int) -> str:
        return "x" * item

    async with rig(long, limits=Limits(inline_bytes_max=64)) as harness:
        active = await harness.ran(b"61", b"62", b"1000")
        assert states(active) == ["completed"] * 3
        assert [active.kinds.get(number, 0) for number in range(3)] == [pack.JSON, pack.REFERENCE, pack.REFERENCE]
        assert harness.objects.kept[active.results[2]][0] == b'"' + b"x" * 1_000 + b'"'
        settlement = active.take_settlement()
        assert settlement is not None
        assert len(settlement.object_keys) == 2


async def test_an_unavailable_object_store_uses_up_no_attempt() -> None:
    async def echo(item: str) -> str:
        return item

    async with rig(echo, limits=Limits(inline_bytes_max=64)) as harness:
        harness.objects.kept[b"reference"] = (b'"' + b"y" * 100 + b'"', pack.JSON)
        harness.objects.faults = [StoreUnavailable("away")] * 3
        active = harness.submit(b"reference", kinds=bytes((pack.REFERENCE,)))
        for _ in range(3):
            await harness.clock.advance_async(10)
        await harness.until_over(active)
        assert states(active) == ["completed"]
        assert harness.objects.requests_count == 5


async def test_a_missing_object_fails_its_run_with_a_reason() -> None:
    async with rig(double, retry=Retry(attempts=5)) as harness:
        active = await harness.ran(b"gone", b"4", kinds=bytes((pack.REFERENCE, pack.JSON)))
        assert states(active) == ["failed", "completed"]
        assert failure(active).type == "OBJECT_MISSING"
        assert "not in the object store" in failure(active).message


async def test_an_unexpected_error_of_the_object_store_fails_its_run_alone() -> None:
    async with rig(double) as harness:
        harness.objects.faults = [RuntimeError("odd")]
        active = await harness.ran(b"x", b"4", kinds=bytes((pack.REFERENCE, pack.JSON)))
        assert states(active) == ["failed", "completed"]
        assert failure(active).type == "RuntimeError"


# -- retries


async def test_a_failed_attempt_with_attempts_left_is_retried_later() -> None:
    async def fails(item: int) -> None:
        raise ValueError("again")

    async with rig(fails, retry=Retry(attempts=3, backoff="constant", delay_s=10, jitter=0)) as harness:
        for attempt, state in ((1, "retry"), (2, "retry"), (3, "failed")):
            active = await harness.ran(b"1", attempt=attempt)
            assert states(active) == [state]
            assert failure(active).attempts == attempt
            if state == "retry":
                assert active.dues[0] == harness.clock.now_us() + 10 * SECOND_US


async def test_retry_after_sets_the_time_and_the_exception_class_decides_on_a_retry() -> None:
    async def fails(item: int) -> None:
        raise (RetryAfter(90), KeyError("k"), LookupError("l"), OSError("o"), KeyboardInterrupt())[item]

    policy = Retry(attempts=2, delay_s=1, jitter=0, retry_on=(LookupError,), give_up_on=(KeyError,))
    async with rig(fails, retry=policy) as harness:
        active = await harness.ran(*numbers(5))
        assert states(active) == ["retry", "failed", "retry", "failed", "failed"]
        now_us = harness.clock.now_us()
        assert active.dues == {0: now_us + 90 * SECOND_US, 2: now_us + SECOND_US}


async def test_a_run_that_expired_before_it_began_does_not_begin() -> None:
    seen: list[int] = []

    async def sees(item: int) -> None:
        seen.append(item)

    async with rig(sees) as harness:
        late, early = harness.clock.now_us(), harness.clock.now_us() + 1
        assert states(await harness.ran(b"1", expires_us=late)) == ["expired"]
        assert states(await harness.ran(b"2", expires_us=early)) == ["completed"]
        assert seen == [2]


# -- context of a run


async def test_a_context_identifies_its_run() -> None:
    contexts: list[Context] = []

    async def asks(item: int, context: Context) -> str:
        contexts.append(context)
        return context.run_id

    async with rig(asks, timeout_s=30) as harness:
        active = await harness.ran(b"5", attempt=4)
        (context,) = contexts
        assert (context.batch_id, context.index, context.attempt, context.task) == ("batch_0", 0, 4, "task")
        assert context.deadline_us == harness.clock.now_us() + 30 * SECOND_US
        assert (context.cancelled, dict(context.headers), context.queue) == (False, {}, "default")
        assert active.results == [b'"run_0_0"']


# -- suspects


async def test_suspects_run_while_no_other_run_does() -> None:
    gates = {name: asyncio.Event() for name in ("plain", "suspect")}
    begun: list[str] = []

    async def waits(item: str) -> None:
        begun.append(item)
        await gates[item].wait()

    async with rig(waits) as harness:
        plain = harness.submit(b'"plain"', b'"plain"')
        await harness.clock.settle()
        suspects = [harness.submit(b'"suspect"', crashes_count=2) for _ in range(2)]
        later = harness.submit(b'"plain"')
        await harness.clock.settle()
        assert begun == ["plain", "plain"]
        gates["plain"].set()
        await harness.until_over(plain)
        await harness.clock.settle()
        assert begun == ["plain", "plain", "suspect"]
        gates["suspect"].set()
        await harness.until_over(*suspects, later)
        assert begun == ["plain", "plain", "suspect", "suspect", "plain"]


async def test_withdrawn_suspects_do_not_block_other_runs() -> None:
    gate = asyncio.Event()

    async def waits(item: int) -> None:
        await gate.wait()

    async with rig(waits) as harness:
        suspect = harness.submit(b"1", crashes_count=2)
        await harness.clock.settle()
        harness.executor.take_unbegun()
        harness.executor.interrupt(lambda *_: True, "stopped")
        await harness.clock.settle()
        assert states(suspect) == ["open"]
        gate.set()
        assert states(await harness.ran(b"2")) == ["completed"]


async def test_withdrawn_suspects_do_not_begin() -> None:
    begun: list[int] = []

    async def waits(item: int) -> None:
        begun.append(item)
        await asyncio.Event().wait()

    async with rig(waits, concurrency=1) as harness:
        harness.submit(*numbers(3), crashes_count=2)
        await harness.clock.settle()
        harness.executor.take_unbegun()
        harness.executor.interrupt(lambda *_: True, "stopped")
        await harness.clock.settle()
        assert begun == [0]


# -- the event loop under user code


async def test_r15_a_run_that_never_suspends_creates_no_task_and_no_future() -> None:
    loop = asyncio.get_running_loop()
    made_tasks = made_futures = 0
    create_future = loop.create_future

    def counted_task(loop: Any, coro: Any, **options: Any) -> asyncio.Task[Any]:
        nonlocal made_tasks
        made_tasks += 1
        return asyncio.Task(coro, loop=loop, **options)

    def counted_future() -> asyncio.Future[Any]:
        nonlocal made_futures
        made_futures += 1
        return create_future()

    async with rig(double) as harness:
        loop.set_task_factory(counted_task)
        loop.create_future = counted_future  # type: ignore[method-assign]  # to count
        leases = [harness.submit(*numbers(256)) for _ in range(16)]
        await harness.until_over(*leases)
        assert harness.executor.ended_count == 4_096
        assert made_tasks <= harness.executor.concurrency + 1
        assert made_futures <= 50


async def test_r16_context_variables_do_not_leak_from_run_to_run() -> None:
    from contextvars import ContextVar

    variable: ContextVar[int] = ContextVar("variable", default=-1)

    async def sets(item: int) -> list[int]:
        before = variable.get()
        variable.set(item)
        if item % 2:
            await asyncio.sleep(0)
            child = await asyncio.create_task(reads())
            return [before, variable.get(), child]
        return [before, variable.get(), item]

    async def reads() -> int:
        return variable.get()

    def sets_in_a_thread(item: int) -> list[int]:
        before = variable.get()
        variable.set(item)
        return [before, variable.get(), item]

    for function in (sets, sets_in_a_thread):
        async with rig(function, concurrency=3) as harness:
            active = await harness.ran(*numbers(20))
            assert active.results == [b"[-1,%d,%d]" % (item, item) for item in range(20)]
    assert variable.get() == -1


async def test_r18_runners_yield_to_the_loop_every_2_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    run_s = 0.0
    monkeypatch.setattr(executor_module, "perf_counter", lambda: now_s)
    turns: list[float] = []
    loop = asyncio.get_running_loop()

    def turn() -> None:
        turns.append(now_s)
        loop.call_soon(turn)

    async def busy(item: int) -> None:
        nonlocal now_s
        now_s += run_s

    async def busy_and_general(item: int, context: Context) -> None:
        nonlocal now_s
        now_s += run_s

    for function in (busy, busy_and_general):
        for run_s in (0.000_01, 0.000_5, 0.001, 0.01):
            async with rig(function, concurrency=2) as harness:
                turns.clear()
                turn()
                await harness.ran(*numbers(1_000))
                waits = [after - before for before, after in pairwise(turns)]
                assert max(waits) <= 2 * 0.002 + run_s + 1e-9, run_s
            turns.clear()


async def child(item: int) -> int:
    await asyncio.sleep(0)
    if item < 0:
        raise ValueError("child")
    return item


async def in_a_timeout() -> None:
    async with asyncio.timeout(0):
        await asyncio.Event().wait()


async def in_a_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(child(1))
        group.create_task(child(-1))


async def in_a_gather() -> None:
    assert list(await asyncio.gather(child(1), child(2))) == [1, 2]


async def in_a_task_that_is_cancelled() -> None:
    task = asyncio.create_task(asyncio.Event().wait())
    task.cancel()
    await task


async def in_a_task_that_cancels_itself() -> None:
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0
    current.cancel()
    await asyncio.sleep(0)


async def in_a_task_that_cancels_itself_and_returns() -> None:
    current = asyncio.current_task()
    assert current is not None
    current.cancel()


USES: list[tuple[Callable[[], Awaitable[None]], str]] = [
    (in_a_timeout, "TimeoutError"),
    (in_a_group, "ExceptionGroup"),
    (in_a_gather, ""),
    (in_a_task_that_is_cancelled, "CancelledError"),
    (in_a_task_that_cancels_itself, "CancelledError"),
    (in_a_task_that_cancels_itself_and_returns, ""),
]


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_user_code_may_use_timeouts_groups_and_tasks_inside_runs(concurrency: int) -> None:
    async def uses(item: int) -> None:
        await USES[item][0]()

    async with rig(uses, concurrency=concurrency) as harness:
        for number in (*range(6), *reversed(range(6)), 5, 5, 4, 1, 0):
            active = await harness.ran(b"%d" % number)
            error = USES[number][1]
            assert states(active) == (["failed"] if error else ["completed"]), USES[number]
            if error:
                assert failure(active).type == error
        assert [runner.task.done() for runner in harness.executor._runners] == [False] * len(harness.executor._runners)


async def test_a_run_that_cancels_its_task_and_returns_does_not_affect_later_runs() -> None:
    async def cancels(item: int) -> int:
        if item == 0:
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
        else:
            await asyncio.sleep(0)
        return item

    async with rig(cancels, concurrency=1) as harness:
        first = await harness.ran(b"0")
        second = await harness.ran(b"1")
        assert states(first) + states(second) == ["completed"] * 2


async def test_runners_end_when_their_loop_ends() -> None:
    """Runs are released when `asyncio.run` cancels all tasks at its end: runners do not count that as a cancellation by
    the run.
    """

    async def waits(item: int) -> None:
        await asyncio.Event().wait()

    leases: list[Any] = []

    async def main() -> None:
        harness = Rig(waits)
        leases.append(harness.submit(*numbers(3)))
        await harness.clock.settle()

    await asyncio.to_thread(asyncio.run, main())
    (active,) = leases
    assert states(active) == ["open"] * 3
    assert set(active.marks) == {NOT_BEGUN}
