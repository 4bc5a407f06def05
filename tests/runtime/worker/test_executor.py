"""How runs end, whatever they do."""

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
from headrace.runtime.worker import executor as room
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
async def test_results_are_kept_in_the_order_of_the_runs(function: Any, inline: bool) -> None:
    async with rig(function, inline=inline) as made:
        works = [made.submit(*numbers(300)) for _ in range(3)]
        await made.until_over(*works)
        for work in works:
            assert work.results == [b"%d" % (2 * number) for number in range(300)]
            assert states(work) == ["completed"] * 300
            assert set(work.marks) == {ENDED}
        assert (made.executor.unbegun_count, made.executor.in_flight_count) == (0, 0)
        assert made.executor.ended_count == 900
        assert made.over == works


async def test_at_most_concurrency_runs_are_under_way_at_once() -> None:
    gate, most, now = asyncio.Event(), 0, 0

    async def counts(item: int) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await gate.wait()
        now -= 1

    async with rig(counts, concurrency=5) as made:
        work = made.submit(*numbers(40))
        await made.clock.settle()
        assert (now, made.executor.in_flight_count, made.executor.unbegun_count) == (5, 5, 35)
        gate.set()
        await made.until_over(work)
        assert most == 5


async def test_a_failure_keeps_its_class_words_and_own_frames() -> None:
    def inner(item: int) -> None:
        raise ValueError(f"no {item}")

    async def outer(item: int) -> None:
        inner(item)

    async with rig(outer) as made:
        found = failure(await made.ran(b"7", attempt=2, crashes_count=1))
    assert (found.type, found.message, found.attempts, found.crashes) == ("ValueError", "no 7", 2, 1)
    assert "in outer" in found.trace
    assert "in inner" in found.trace
    assert "headrace/runtime" not in found.trace


async def test_a_failure_is_bounded() -> None:
    async def deep(item: int) -> None:
        if item:
            return await deep(item - 1)
        raise ValueError("x" * 100_000)

    async with rig(deep, limits=Limits(error_chars_max=1_000)) as made:
        found = failure(await made.ran(b"300"))
    assert len(found.message) == 1_000
    assert len(found.trace) <= 1_000
    assert "raise ValueError" in found.trace


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit("not even that")


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
async def test_whatever_a_task_raises_fails_that_run_alone(error: BaseException, kind: str) -> None:
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
    async with rig(function, concurrency=1, inline=kind == "inline") as made:
        work = await made.ran(*numbers(3))
        assert states(work) == ["completed", "failed", "completed"]
        found = failure(work, 1)
        assert found.type in (type(error).__name__, "RuntimeError"), found
        assert states(await made.ran(b"5")) == ["completed"]


async def test_a_payload_that_does_not_fit_fails_its_run_and_says_where() -> None:
    async with rig(double) as made:
        work = await made.ran(b"1", b'"x"', b"3", b"nonsense", b"5")
        assert states(work) == ["completed", "failed", "completed", "failed", "completed"]
        assert failure(work, 1).type == "InvalidPayload"
        assert "Expected `int`, got `str`" in failure(work, 1).message
        assert "malformed" in failure(work, 3).message


async def test_a_task_that_raises_what_decoding_raises_is_told_from_its_payload() -> None:
    async def decodes(item: int) -> None:
        b"\xff".decode()

    async with rig(decodes, retry=Retry(attempts=2)) as made:
        work = await made.ran(b"1")
        assert states(work) == ["retry"]
        assert failure(work).type == "UnicodeDecodeError"


async def test_a_run_called_without_its_argument_uses_the_default() -> None:
    async def defaulted(item: int = 7) -> int:
        return item

    async with rig(defaulted) as made:
        assert (await made.ran(b"", b"1", b"")).results == [b"7", b"1", b"7"]


@pytest.mark.parametrize(
    "value", [object(), {1: object()}, "\ud800", 10**5_000, {1, object()}], ids=lambda value: type(value).__name__
)
async def test_a_result_that_can_not_be_written_fails_its_run_for_good(value: Any) -> None:
    async def returns(item: int) -> Any:
        return value if item == 1 else item

    async with rig(returns, retry=Retry(attempts=5)) as made:
        work = await made.ran(*numbers(3))
        assert states(work) == ["completed", "failed", "completed"]
        assert failure(work, 1).type == "InvalidResult"
        assert "can't be encoded as JSON" in failure(work, 1).message


async def test_a_result_over_the_inline_limit_goes_to_the_object_store() -> None:
    async def long(item: int) -> str:
        return "x" * item

    async with rig(long, limits=Limits(inline_bytes_max=64)) as made:
        work = await made.ran(b"61", b"62", b"1000")
        assert states(work) == ["completed"] * 3
        assert [work.kinds.get(number, 0) for number in range(3)] == [pack.JSON, pack.REFERENCE, pack.REFERENCE]
        assert made.objects.kept[work.results[2]][0] == b'"' + b"x" * 1_000 + b'"'
        settlement = work.take_settlement()
        assert settlement is not None
        assert len(settlement.object_keys) == 2


async def test_an_object_store_that_is_away_costs_no_attempt() -> None:
    async def echo(item: str) -> str:
        return item

    async with rig(echo, limits=Limits(inline_bytes_max=64)) as made:
        made.objects.kept[b"reference"] = (b'"' + b"y" * 100 + b'"', pack.JSON)
        made.objects.faults = [StoreUnavailable("away")] * 3
        work = made.submit(b"reference", kinds=bytes((pack.REFERENCE,)))
        for _ in range(3):
            await made.clock.advance_async(10)
        await made.until_over(work)
        assert states(work) == ["completed"]
        assert made.objects.requests_count == 5


async def test_a_missing_object_fails_its_run_with_a_reason() -> None:
    async with rig(double, retry=Retry(attempts=5)) as made:
        work = await made.ran(b"gone", b"4", kinds=bytes((pack.REFERENCE, pack.JSON)))
        assert states(work) == ["failed", "completed"]
        assert failure(work).type == "OBJECT_MISSING"
        assert "not in the object store" in failure(work).message


async def test_a_fault_of_the_object_store_that_nobody_foresaw_fails_its_run_alone() -> None:
    async with rig(double) as made:
        made.objects.faults = [RuntimeError("odd")]
        work = await made.ran(b"x", b"4", kinds=bytes((pack.REFERENCE, pack.JSON)))
        assert states(work) == ["failed", "completed"]
        assert failure(work).type == "RuntimeError"


# -- retries


async def test_a_failed_attempt_with_attempts_left_is_put_off() -> None:
    async def fails(item: int) -> None:
        raise ValueError("again")

    async with rig(fails, retry=Retry(attempts=3, backoff="constant", delay_s=10, jitter=0)) as made:
        for attempt, state in ((1, "retry"), (2, "retry"), (3, "failed")):
            work = await made.ran(b"1", attempt=attempt)
            assert states(work) == [state]
            assert failure(work).attempts == attempt
            if state == "retry":
                assert work.dues[0] == made.clock.now_us() + 10 * SECOND_US


async def test_retry_after_says_when_and_classes_say_whether() -> None:
    async def fails(item: int) -> None:
        raise (RetryAfter(90), KeyError("k"), LookupError("l"), OSError("o"), KeyboardInterrupt())[item]

    policy = Retry(attempts=2, delay_s=1, jitter=0, retry_on=(LookupError,), give_up_on=(KeyError,))
    async with rig(fails, retry=policy) as made:
        work = await made.ran(*numbers(5))
        assert states(work) == ["retry", "failed", "retry", "failed", "failed"]
        now_us = made.clock.now_us()
        assert work.dues == {0: now_us + 90 * SECOND_US, 2: now_us + SECOND_US}


async def test_a_run_that_expired_before_it_began_does_not_begin() -> None:
    seen: list[int] = []

    async def sees(item: int) -> None:
        seen.append(item)

    async with rig(sees) as made:
        late, early = made.clock.now_us(), made.clock.now_us() + 1
        assert states(await made.ran(b"1", expires_us=late)) == ["expired"]
        assert states(await made.ran(b"2", expires_us=early)) == ["completed"]
        assert seen == [2]


# -- context


async def test_a_context_tells_a_run_who_it_is() -> None:
    told: list[Context] = []

    async def asks(item: int, context: Context) -> str:
        told.append(context)
        return context.run_id

    async with rig(asks, timeout_s=30) as made:
        work = await made.ran(b"5", attempt=4)
        (context,) = told
        assert (context.batch_id, context.index, context.attempt, context.task) == ("batch_0", 0, 4, "task")
        assert context.deadline_us == made.clock.now_us() + 30 * SECOND_US
        assert (context.cancelled, dict(context.headers), context.queue) == (False, {}, "default")
        assert work.results == [b'"run_0_0"']


# -- suspects


async def test_suspects_run_while_nothing_else_does() -> None:
    gates = {name: asyncio.Event() for name in ("plain", "suspect")}
    begun: list[str] = []

    async def waits(item: str) -> None:
        begun.append(item)
        await gates[item].wait()

    async with rig(waits) as made:
        plain = made.submit(b'"plain"', b'"plain"')
        await made.clock.settle()
        suspects = [made.submit(b'"suspect"', crashes_count=2) for _ in range(2)]
        later = made.submit(b'"plain"')
        await made.clock.settle()
        assert begun == ["plain", "plain"]
        gates["plain"].set()
        await made.until_over(plain)
        await made.clock.settle()
        assert begun == ["plain", "plain", "suspect"]
        gates["suspect"].set()
        await made.until_over(*suspects, later)
        assert begun == ["plain", "plain", "suspect", "suspect", "plain"]


async def test_suspects_that_were_withdrawn_hold_nobody_up() -> None:
    gate = asyncio.Event()

    async def waits(item: int) -> None:
        await gate.wait()

    async with rig(waits) as made:
        suspect = made.submit(b"1", crashes_count=2)
        await made.clock.settle()
        made.executor.take_unbegun()
        made.executor.interrupt(lambda *_: True, "stopped")
        await made.clock.settle()
        assert states(suspect) == ["open"]
        gate.set()
        assert states(await made.ran(b"2")) == ["completed"]


async def test_of_suspects_that_were_withdrawn_no_more_begin() -> None:
    begun: list[int] = []

    async def waits(item: int) -> None:
        begun.append(item)
        await asyncio.Event().wait()

    async with rig(waits, concurrency=1) as made:
        made.submit(*numbers(3), crashes_count=2)
        await made.clock.settle()
        made.executor.take_unbegun()
        made.executor.interrupt(lambda *_: True, "stopped")
        await made.clock.settle()
        assert begun == [0]


# -- the loop and what user code does to it


async def test_r15_a_run_that_never_waits_makes_no_task_and_no_future() -> None:
    loop = asyncio.get_running_loop()
    made_tasks = made_futures = 0
    create_future = loop.create_future

    def counted_task(own: Any, coro: Any, **more: Any) -> asyncio.Task[Any]:
        nonlocal made_tasks
        made_tasks += 1
        return asyncio.Task(coro, loop=own, **more)

    def counted_future() -> asyncio.Future[Any]:
        nonlocal made_futures
        made_futures += 1
        return create_future()

    async with rig(double) as made:
        loop.set_task_factory(counted_task)
        loop.create_future = counted_future  # type: ignore[method-assign]  # to count
        works = [made.submit(*numbers(256)) for _ in range(16)]
        await made.until_over(*works)
        assert made.executor.ended_count == 4_096
        assert made_tasks <= made.executor.concurrency + 1
        assert made_futures <= 50


async def test_r16_context_variables_do_not_leak_from_run_to_run() -> None:
    from contextvars import ContextVar

    own: ContextVar[int] = ContextVar("own", default=-1)

    async def sets(item: int) -> list[int]:
        before = own.get()
        own.set(item)
        if item % 2:
            await asyncio.sleep(0)
            child = await asyncio.create_task(reads())
            return [before, own.get(), child]
        return [before, own.get(), item]

    async def reads() -> int:
        return own.get()

    def sets_in_a_thread(item: int) -> list[int]:
        before = own.get()
        own.set(item)
        return [before, own.get(), item]

    for function in (sets, sets_in_a_thread):
        async with rig(function, concurrency=3) as made:
            work = await made.ran(*numbers(20))
            assert work.results == [b"[-1,%d,%d]" % (item, item) for item in range(20)]
    assert own.get() == -1


async def test_r18_runners_give_the_loop_back_every_2_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    run_s = 0.0
    monkeypatch.setattr(room, "perf_counter", lambda: now_s)
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
            async with rig(function, concurrency=2) as made:
                turns.clear()
                turn()
                await made.ran(*numbers(1_000))
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

    async with rig(uses, concurrency=concurrency) as made:
        for number in (*range(6), *reversed(range(6)), 5, 5, 4, 1, 0):
            work = await made.ran(b"%d" % number)
            error = USES[number][1]
            assert states(work) == (["failed"] if error else ["completed"]), USES[number]
            if error:
                assert failure(work).type == error
        assert [runner.task.done() for runner in made.executor._runners] == [False] * len(made.executor._runners)


async def test_a_run_that_cancels_its_task_and_returns_takes_no_later_run_with_it() -> None:
    async def cancels(item: int) -> int:
        if item == 0:
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
        else:
            await asyncio.sleep(0)
        return item

    async with rig(cancels, concurrency=1) as made:
        first = await made.ran(b"0")
        second = await made.ran(b"1")
        assert states(first) + states(second) == ["completed"] * 2


async def test_runners_end_when_their_loop_ends() -> None:
    """`asyncio.run` cancels every task at its end: runs give up, and runners don't take it for a run's own doing."""

    async def waits(item: int) -> None:
        await asyncio.Event().wait()

    kept: list[Any] = []

    async def main() -> None:
        made = Rig(waits)
        kept.append(made.submit(*numbers(3)))
        await made.clock.settle()

    await asyncio.to_thread(asyncio.run, main())
    (work,) = kept
    assert states(work) == ["open"] * 3
    assert set(work.marks) == {NOT_BEGUN}
