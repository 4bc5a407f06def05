"""Calls become durable runs."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from headrace import Headrace
from headrace.foundation.errors import Conflict, InvalidInput, StoreUnavailable
from headrace.handles import RunFailed, WaitTimeout
from headrace.runtime.clock import ManualClock
from headrace.runtime.flusher import UpdatesUnflushed
from headrace.runtime.producing import producer as producer_module
from headrace.runtime.producing.producer import Producer
from headrace.runtime.tasks.call_options import Options
from headrace.store.protocol import Suspects
from tests.support.engines import Faulty, app_on, on_each_store, opened

pytestmark = on_each_store


def with_task(app: Headrace) -> Any:
    @app.task
    async def task(item: int) -> int:
        if item < 0:
            raise ValueError(f"{item} is negative")
        return item

    return task


async def test_an_enqueued_run_is_durable_when_its_call_returns(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        run = await with_task(app).enqueue(5)
        if kind == "sqlite":
            with sqlite3.connect(tmp_path / "headrace.db") as other:  # another process would see the same
                assert other.execute("SELECT count(*) FROM headrace_span").fetchone() == (1,)
            other.close()
        view = await run.view()
        assert (view.state, view.input, view.task, view.attempt) == ("waiting", 5, "task", 1)
        async with app.worker():
            assert await run.result() == 5
            assert await (await app.get_run(run.id)).result() == 5


async def test_many_enqueues_at_once_share_few_commits(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine:
        store = Faulty(engine.store)
        store.before["append"] = [StoreUnavailable("away")]  # so that all of them wait for one commit
        async with app_on(dataclasses.replace(engine, store=store)) as app:
            task = with_task(app)
            calls = [asyncio.create_task(task.enqueue(item)) for item in range(1_000)]
            while app._producer is None or app._producer._flusher is None or app._producer._flusher.depth < 1_000:
                await asyncio.sleep(0)
            await clock.advance_async(1)
            runs = await asyncio.gather(*calls)
            assert store.calls.count("append") <= 5
            assert sorted(run.index for run in runs) == list(range(1_000))
            assert len({run.batch_id for run in runs}) == 1
            async with app.worker():
                assert [await run.result() for run in runs] == list(range(1_000))


async def test_a_single_enqueue_does_not_wait_for_others(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()  # no time passes at all
    async with opened(kind, tmp_path, clock=clock) as engine, app_on(engine) as app:
        await with_task(app).enqueue(1)


async def test_an_idempotency_key_returns_the_older_run_until_it_expires(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine, app_on(engine) as app, app_on(engine) as other:
        task = with_task(app)
        keyed = task.options(idempotency_key="k", idempotency_ttl_s=60)
        first = await keyed.enqueue(1)
        assert (await keyed.enqueue(2)).id == first.id
        assert (await with_task(other).options(idempotency_key="k").enqueue(3)).id == first.id
        together = await asyncio.gather(*(task.options(idempotency_key="same").enqueue(item) for item in range(20)))
        assert len({run.id for run in together}) == 1
        clock.advance(60.001)
        second = await keyed.enqueue(4)
        assert second.id != first.id
        assert (await second.view()).input == 4
        assert (await first.view()).input == 1


async def test_options_out_of_bounds_are_refused_at_the_call(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        task = with_task(app)
        wrong: list[dict[str, Any]] = [
            {"delay_s": -1},
            {"delay_s": float("nan")},
            {"expires_s": 1e12},
            {"priority": 1_000_001},
            {"queue": ""},
            {"queue": "a\0b"},
            {"tags": ["t"] * 11},
            {"tags": [""]},
            {"headers": {"a": 1}},
            {"headers": {"a": "\ud800"}},
            {"headers": {"a": "x" * 20_000}},
            {"idempotency_key": "x" * 201},
            {"idempotency_key": "\ud800"},
        ]
        for options in wrong:
            with pytest.raises(InvalidInput):
                await task.options(**options).enqueue(1)
            with pytest.raises(InvalidInput):
                await task.options(**options).map([1])
        with pytest.raises(InvalidInput, match="Expected `int`, got `str`"):
            await task.enqueue("x")
        with pytest.raises(InvalidInput, match="names one run"):
            await task.options(idempotency_key="k").map([1])
        assert await engine.store.batches("default") == []


async def test_a_delayed_run_waits_for_its_time(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine, app_on(engine) as app:
        task = with_task(app)
        later = await task.options(delay_s=3_600).enqueue(1)
        expiring = await task.options(expires_s=60, delay_s=120).enqueue(2)
        async with app.worker():
            now = await task.enqueue(3)
            await until(clock, now, "completed")
            assert (await later.view()).state == "delayed"
            clock.advance(3_000)
            await until(clock, expiring, "expired")
            assert (await later.view()).state == "delayed"
            with pytest.raises(RunFailed, match="the run was expired"):
                await expiring.result()
            clock.advance(600)
            await until(clock, later, "completed")


async def until(clock: ManualClock, run: Any, state: str) -> None:
    """Advance the clock slowly until a run is in a state, since a file takes its own time."""
    while (await run.view()).state != state:
        await clock.advance_async(0.01)


async def test_result_distinguishes_failed_from_cancelled_and_respects_its_timeout(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine, app_on(engine) as app:
        task = with_task(app)
        run = await task.enqueue(-1)
        waiting = asyncio.create_task(run.result(timeout_s=10))
        batch = await task.map([1, 2])
        also = asyncio.create_task(batch.wait(timeout_s=10))
        while not (waiting.done() and also.done()):
            await clock.advance_async(1)
        for late in (waiting, also):
            with pytest.raises(WaitTimeout, match="has not ended"):
                await late
        with pytest.raises(WaitTimeout):
            await anext(batch.results(timeout_s=0))
        cancelled = await task.enqueue(2)
        assert await cancelled.cancel()
        with pytest.raises(RunFailed, match="the run was cancelled") as caught:
            await cancelled.result()
        assert caught.value.failure is None
        async with app.worker():
            with pytest.raises(RunFailed, match="ValueError: -1 is negative") as caught:
                await run.result()
        assert caught.value.failure is not None
        assert caught.value.failure.attempts == 1
        assert await run.redrive()
        assert (await run.view()).state == "waiting"


async def test_a_large_argument_goes_to_the_object_store(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, inline_bytes_max=1_000) as engine, app_on(engine) as app:

        @app.task
        async def size(item: str) -> int:
            return len(item)

        runs = await asyncio.gather(*(size.options(tags=["t"]).enqueue("x" * length) for length in (10, 5_000, 7_000)))
        async with app.worker():
            assert [await run.result() for run in runs] == [10, 5_000, 7_000]


async def test_a_stream_sealed_by_another_process_is_followed_by_a_new_one(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        task = with_task(app)
        first = await task.enqueue(1)
        (session,) = await engine.maintenance.sessions()
        now_us = engine.clock.now_us() + 1
        no_suspects = Suspects(span_slots={}, evidence="")
        await engine.maintenance.recover(session.id, no_suspects, silent_since_us=now_us, crashes_max=3, now_us=now_us)
        runs = await asyncio.gather(*(task.enqueue(item) for item in range(2, 50)))
        assert {run.batch_id for run in runs}.isdisjoint({first.batch_id})
        (again,) = await engine.maintenance.sessions()
        assert again.id != session.id
        await engine.store.stop_batch(runs[0].batch_id, "cancelled", now_us=now_us)
        last = await task.enqueue(50)
        assert last.batch_id not in {first.batch_id, runs[0].batch_id}
        assert [session_row.id for session_row in await engine.maintenance.sessions()] == [again.id]
        async with app.worker():
            assert (await first.result(), await last.result()) == (1, 50)


async def test_a_full_stream_is_followed_by_a_new_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer_module, "STREAM_RUNS_MAX", 10)
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        task = with_task(app)
        runs = await asyncio.gather(*(task.enqueue(item) for item in range(35)))
        assert len({run.id for run in runs}) == 35
        assert len({run.batch_id for run in runs}) == 4
        async with app.worker():
            assert [await run.result() for run in runs] == list(range(35))


async def test_a_stream_is_sealed_and_completed_when_its_producer_leaves(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        task = with_task(app)
        run = await task.enqueue(1)
        async with app.worker():
            await run.result()
        assert (await engine.store.batch(run.batch_id))[0].state == "open"
        assert app._producer is not None
        await app._producer.close()
        await app._producer.close()
        assert (await engine.store.batch(run.batch_id))[0].state == "completed"
        assert await engine.maintenance.sessions() == []
        assert (await task.enqueue(2)).batch_id != run.batch_id


async def test_an_enqueue_whose_answer_was_lost_makes_one_run(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine:
        store = Faulty(engine.store)
        store.after["append"] = [StoreUnavailable("the answer is lost")]
        store.before["append"] = []
        async with app_on(dataclasses.replace(engine, store=store)) as app:
            calling = asyncio.create_task(with_task(app).enqueue(1))
            while not calling.done():
                await clock.advance_async(0.1)
            run = await calling
            batch, _ = await engine.store.batch(run.batch_id)
            assert (batch.received_count, run.index, store.calls.count("append")) == (1, 0, 2)


async def test_a_close_that_can_not_write_fails_the_waiting_enqueues(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine:
        store = Faulty(engine.store)
        producer = Producer(dataclasses.replace(engine, store=store))
        app = Headrace("own")
        spec = with_task(app).spec
        store.before["append"] = [StoreUnavailable("away")] * 1_000
        calling = asyncio.create_task(producer.enqueue(spec, b"1", Options()))
        while "append" not in store.calls:
            await asyncio.sleep(0)
        closing = asyncio.create_task(producer.close())
        while not closing.done():
            await clock.advance_async(1)
        with pytest.raises(UpdatesUnflushed):
            await closing
        with pytest.raises(StoreUnavailable, match="closed before"):
            await calling
        assert await engine.maintenance.sessions() == []


# -- maps


async def test_a_map_takes_any_iterable_and_pulls_it_lazily(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        task = with_task(app)

        async def source() -> Any:
            for item in range(300):
                yield item

        async with app.worker():
            for items, count in (((item for item in range(10)), 10), (source(), 300), ([], 0), ({1, 2}, 2)):
                batch = await task.map(items)
                summary = await batch.wait()
                assert (summary.state, summary.ledger.expected, summary.ledger.completed) == ("completed", count, count)


async def test_a_repeated_map_with_its_batch_key_adds_only_missing_items(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        task = with_task(app)

        def broken() -> Any:
            yield from range(700)
            raise OSError("the source broke")

        with pytest.raises(OSError, match="the source broke"):
            await task.map(broken(), batch_key="k")
        batch = await task.map(range(1_000), batch_key="k", metadata={"a": 1})
        again = await task.map(range(1_000), batch_key="k")
        assert again.id == batch.id
        async with app.worker():
            assert [outcome.output async for outcome in batch.results()] == list(range(1_000))
        with pytest.raises((Conflict, InvalidInput)):
            await task.map(range(1_001), batch_key="k")
        assert (await batch.view()).ledger.expected == 1_000


async def test_a_map_whose_source_raises_is_cancelled_unless_it_has_a_batch_key(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        task = with_task(app)

        async def broken() -> Any:
            for item in range(300):
                yield item
            raise KeyError("source")

        with pytest.raises(KeyError):
            await task.map(broken())
        ((batch, ledger),) = await engine.store.batches("default")
        assert (batch.state, ledger.waiting) == ("cancelled", 0)


async def test_a_batch_can_be_found_cancelled_and_redriven(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        task = with_task(app)
        batch = await task.map([1, -1, -2])
        async with app.worker():
            await batch.wait()
            assert await batch.redrive() == 2
            summary = await batch.wait()
        assert (summary.ledger.completed, summary.ledger.failed) == (1, 2)
        handle = await app.get_batch(batch.id)
        assert [outcome.state async for outcome in handle.results(from_index=1)] == ["failed", "failed"]
        other = await task.map([1, 2])
        assert (await other.cancel()).ledger.cancelled == 2
        assert [outcome.state async for outcome in other.results()] == ["cancelled"] * 2
