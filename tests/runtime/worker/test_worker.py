"""Worker: claim, run and settle, end to end on each store."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

from headrace.core.retry import Retry
from headrace.foundation.errors import StoreUnavailable
from headrace.runtime.clock import ManualClock
from headrace.runtime.flusher import UpdatesUnflushed
from headrace.runtime.tasks.context import Context
from headrace.runtime.worker.worker import Worker
from headrace.store.protocol import Heartbeat, HeldLease, Suspects
from tests.support.engines import Faulty, app_on, on_each_store, opened

pytestmark = on_each_store


async def outputs(batch: Any) -> list[Any]:
    return [outcome.output if outcome.ok else outcome.failure.type async for outcome in batch.results()]


async def states(app: Any, batch: Any) -> list[str]:
    engine = await app.open()
    return [view.state for view in await engine.store.runs("default", batch_id=batch.id, limit=10_000)]


async def test_a_batch_completes_and_its_results_come_in_order(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def double(item: int) -> int:
            if item % 3 == 0:
                await asyncio.sleep(0)
            return item * 2

        @app.task
        def shout(word: str, times: int = 1) -> str:
            return word.upper() * times

        async with app.worker() as worker:
            numbers = await double.map(range(1_000))
            words = await shout.map([{"word": "a", "times": 2}, ["b"], {"word": "c"}])
            assert await outputs(numbers) == [2 * item for item in range(1_000)]
            assert await outputs(words) == ["AA", "B", "C"]
            summary = await numbers.wait()
            assert (summary.state, summary.ledger.completed, summary.is_finished) == ("completed", 1_000, True)
        assert worker.stats == (1_003, 0, 0, 0)
        assert not [session for session in await engine.maintenance.sessions() if session.kind == "worker"]


async def test_invalid_items_fail_alone_and_failures_are_stored(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def halve(item: int) -> int:
            if item % 2:
                raise ValueError(f"{item} is odd")
            return item // 2

        batch = await halve.map([0, "x", 3, 4, "\ud800"])
        async with app.worker() as worker:
            assert await outputs(batch) == [0, "InvalidPayload", "ValueError", 2, "InvalidPayload"]
            run = await halve.enqueue(7)
            with pytest.raises(Exception, match="ValueError: 7 is odd"):
                await run.result()
        assert worker.stats[:2] == (2, 2)


async def test_results_are_read_while_the_batch_runs(kind: str, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with opened(kind, tmp_path, flush_interval_ms=1) as engine, app_on(engine) as app:

        @app.task
        async def last_waits(item: int) -> int:
            if item == 9:
                await gate.wait()
            return item

        async with app.worker():
            batch = await last_waits.map(range(10))
            seen = []
            async for outcome in batch.results():
                seen.append(outcome.index)
                if outcome.index == 8:
                    gate.set()  # only now: nine outcomes of a lease came before its tenth
            assert seen == list(range(10))


async def test_several_workers_share_a_batch_and_nothing_runs_twice(kind: str, tmp_path: Path) -> None:
    ran: list[int] = []
    async with opened(kind, tmp_path, poll_interval_ms=5) as engine, app_on(engine) as app:

        @app.task
        async def notes(item: int) -> None:
            ran.append(item)
            await asyncio.sleep(0)

        async with app.worker(concurrency=3), app.worker(concurrency=5):
            batch = await notes.map(range(500))
            await batch.wait()
        assert sorted(ran) == list(range(500))


async def test_options_of_a_call_are_applied(kind: str, tmp_path: Path) -> None:
    order: list[int] = []
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task(queue="usual", priority=5)
        async def notes(item: int, context: Context | None = None) -> None:
            order.append(item)
            assert context is not None
            assert context.headers.get("n") == str(item)
            assert context.queue == ("other" if item == 3 else "usual")

        runs = []
        for item, priority in ((1, 1), (2, None), (3, 9), (4, 5)):
            queue = "other" if item == 3 else None
            call = notes.options(priority=priority, headers={"n": str(item)}, queue=queue, tags=["t", f"t{item}"])
            runs.append(await call.enqueue(item))
        async with app.worker(concurrency=1):
            for run in runs:
                await run.result()
        assert order == [3, 2, 4, 1]
        tagged = await engine.store.runs("default", tag="t2")
        assert [view.index for view in tagged] == [runs[1].index]


async def test_a_worker_takes_only_its_tasks_and_queues(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def selected(item: int) -> int:
            return item

        @app.task
        async def other(item: int) -> int:
            return item

        batches = [await selected.map([1]), await other.map([2]), await selected.options(queue="slow").map([3])]
        async with app.worker(tasks=["selected"], queues=["default"]):
            await batches[0].wait()
        assert [(await batch.view()).ledger.completed for batch in batches] == [1, 0, 0]
        async with app.worker():
            for batch in batches:
                await batch.wait()


async def test_a_paused_queue_delivers_no_run(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, poll_interval_ms=5) as engine, app_on(engine) as app:

        @app.task
        async def task(item: int) -> int:
            return item

        await engine.store.pause_queue("default", "paused", paused=True)
        paused, active = await task.options(queue="paused").map([1]), await task.map([2])
        async with app.worker():
            await active.wait()
            assert await states(app, paused) == ["waiting"]
            await engine.store.pause_queue("default", "paused", paused=False)
            await paused.wait()


async def test_a_failed_attempt_is_retried(kind: str, tmp_path: Path) -> None:
    attempts: dict[int, list[int]] = {}
    async with opened(kind, tmp_path, poll_interval_ms=5) as engine, app_on(engine) as app:

        @app.task(retry=Retry(attempts=3, delay_s=0))
        async def flaky(item: int, context: Context) -> int:
            attempts.setdefault(item, []).append(context.attempt)
            if context.attempt <= item:
                raise ValueError("not yet")
            return item

        batch = await flaky.map(range(5))
        async with app.worker() as worker:
            assert await outputs(batch) == [0, 1, 2, "ValueError", "ValueError"]
        assert attempts == {0: [1], 1: [1, 2], 2: [1, 2, 3], 3: [1, 2, 3], 4: [1, 2, 3]}
        assert worker.stats[:3] == (3, 2, 7)
        view = await engine.store.run(batch.id, 3)
        assert (view.state, view.attempt, len(view.attempts)) == ("failed", 3, 3)


async def test_large_payloads_and_results_pass_through_the_object_store(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, inline_bytes_max=1_000) as engine, app_on(engine) as app:

        @app.task
        async def echo(item: str) -> str:
            return item

        items = ["x" * size for size in (10, 2_000, 997, 998, 3_000_000)]
        async with app.worker():
            batch = await echo.map(items)
            assert await outputs(batch) == items
            assert await (await echo.enqueue("y" * 5_000)).result() == "y" * 5_000
        stored_objects = [stored async for stored in engine.payloads.list()]
        assert len(stored_objects) == 4
        assert await engine.maintenance.unnamed([stored.key for stored in stored_objects]) == []


async def test_a_run_with_a_missing_payload_fails_with_a_reason(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, inline_bytes_max=1_000) as engine, app_on(engine) as app:

        @app.task
        async def size(item: str) -> int:
            return len(item)

        batch = await size.map(["x" * 2_000, "short"])
        await engine.payloads.delete([stored.key async for stored in engine.payloads.list()])
        async with app.worker():
            outcomes = [outcome async for outcome in batch.results()]
        assert [outcome.ok for outcome in outcomes] == [False, True]
        assert outcomes[0].failure is not None
        assert outcomes[0].failure.type == "OBJECT_MISSING"


async def test_a_cancelled_batch_stops_its_running_runs_and_starts_no_other(kind: str, tmp_path: Path) -> None:
    begun: list[int] = []
    interrupted: list[int] = []
    all_begun = asyncio.Event()
    async with opened(kind, tmp_path, heartbeat_ms=10, session_timeout_ms=60_000) as engine, app_on(engine) as app:

        @app.task
        async def waits(item: int, context: Context) -> None:
            begun.append(item)
            if len(begun) == 4:
                all_begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                assert context.cancelled
                interrupted.append(item)

        batch = await waits.map(range(20))
        async with app.worker(concurrency=4):
            await all_begun.wait()
            await batch.cancel()
            summary = await batch.wait()
        assert sorted(interrupted) == sorted(begun)
        assert len(begun) == 4
        assert (summary.state, summary.ledger.cancelled) == ("cancelled", 20)


async def test_an_answer_from_before_a_run_was_claimed_again_does_not_cancel_it(kind: str, tmp_path: Path) -> None:
    gate, begun = asyncio.Event(), asyncio.Event()
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def waits(item: int) -> int:
            begun.set()
            await gate.wait()
            return item

        batch = await waits.map([7])
        async with app.worker() as worker:
            await begun.wait()
            (active,) = worker.session.held
            earlier = HeldLease(active.lease.span_id, active.lease.token - 1, 1)
            worker._on_cancelled(Heartbeat(leases=[earlier], stopped=[batch.id], cancelled=[(batch.id, 0)]))
            gate.set()
            assert (await batch.wait()).ledger.completed == 1


async def test_a_cancelled_run_stops_and_its_batch_continues(kind: str, tmp_path: Path) -> None:
    gate, begun = asyncio.Event(), asyncio.Event()
    async with opened(kind, tmp_path, heartbeat_ms=10, session_timeout_ms=60_000) as engine, app_on(engine) as app:

        @app.task
        async def waits(item: int) -> int:
            begun.set()
            await (asyncio.Event() if item == 1 else gate).wait()
            return item

        batch = await waits.map(range(3))
        async with app.worker():
            await begun.wait()
            run = await app.get_run(f"run_{batch.id.removeprefix('batch_')}_1")
            assert await run.cancel()
            with pytest.raises(Exception, match="cancelled"):
                await run.result()
            gate.set()
            summary = await batch.wait()
        assert (summary.ledger.completed, summary.ledger.cancelled) == (2, 1)
        assert not await run.cancel()


# -- stopping


async def test_a_graceful_stop_releases_unbegun_runs_and_settles_the_rest(kind: str, tmp_path: Path) -> None:
    gate, begun = asyncio.Event(), asyncio.Event()
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def waits(item: int) -> int:
            begun.set()
            await gate.wait()
            return item

        batch = await waits.map(range(100))
        worker = Worker(engine, app.registry, concurrency=3)
        await worker.start()
        await begun.wait()
        stopping = asyncio.create_task(worker.stop())
        gate.set()
        await stopping
        run_states = await states(app, batch)
        assert (run_states.count("completed"), run_states.count("waiting")) == (3, 97)
        views = [await engine.store.run(batch.id, index) for index in range(100)]
        assert {(view.attempt, view.crashes_count) for view in views} == {(1, 0)}
        assert not [session for session in await engine.maintenance.sessions() if session.kind == "worker"]
        await worker.stop()


async def test_r19_runs_that_turn_slow_after_a_large_claim_move_to_an_idle_worker(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as slow, app_on(engine) as quick:
        gate, began = asyncio.Event(), []

        async def turns(item: int) -> int:
            if item >= 20_000:
                began.append(item)
                await gate.wait()
            return item

        @quick.task(name="turns")
        async def at_once(item: int) -> int:
            return item

        task = slow.task(turns)
        batch = await task.map(range(24_000))
        async with slow.worker(concurrency=4) as first:
            while len(began) < 4:
                await asyncio.sleep(0)
            assert first._executor.unbegun_count > 100, "expected the worker to have claimed ahead while runs were fast"
            async with quick.worker(concurrency=4):
                while (await batch.view()).ledger.completed < 23_996:
                    await asyncio.sleep(0)
            assert len(began) == 4, "expected the other worker to have run the rest"
            gate.set()
            assert (await batch.wait()).ledger.completed == 24_000


async def test_unbegun_runs_are_claimable_before_the_grace_of_a_stop_ends(kind: str, tmp_path: Path) -> None:
    gate, begun = asyncio.Event(), asyncio.Event()
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def waits(item: int) -> int:
            begun.set()
            await gate.wait()
            return item

        first = await waits.map([1])
        worker = Worker(engine, app.registry, concurrency=1)
        await worker.start()
        await begun.wait()
        second = await waits.map(range(5))
        for active in await worker.session.claim(["waits"], None, 5):
            worker._executor.submit(active)
        assert (await second.view()).ledger.leased == 5
        stopping = asyncio.create_task(worker.stop())
        while (await second.view()).ledger.leased:
            await asyncio.sleep(0)
        assert not stopping.done()
        gate.set()
        await stopping
        assert (await states(app, first), await states(app, second)) == (["completed"], ["waiting"] * 5)


async def test_a_second_stop_interrupts_runs_and_releases_them_uncharged(kind: str, tmp_path: Path) -> None:
    begun = asyncio.Event()
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def waits(item: int) -> int:
            begun.set()
            await asyncio.Event().wait()
            return item

        batch = await waits.map(range(3))
        worker = Worker(engine, app.registry, concurrency=2)
        await worker.start()
        await begun.wait()
        first = asyncio.create_task(worker.stop())
        await asyncio.sleep(0)
        await worker.stop(now=True)
        await first
        assert await states(app, batch) == ["waiting"] * 3
        views = [await engine.store.run(batch.id, index) for index in range(3)]
        assert {(view.attempt, view.crashes_count) for view in views} == {(1, 0)}


async def test_a_stop_during_a_claim_releases_the_claim(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def task(item: int) -> int:
            return item

        batch = await task.map(range(10))
        store = Faulty(engine.store)
        store.after["claim"] = [StoreUnavailable("the response is lost")] * 100
        worker = Worker(dataclasses.replace(engine, store=store), app.registry, concurrency=3)
        claimed = asyncio.Event()
        store.watch["claim"] = claimed.set
        await worker.start()
        await claimed.wait()
        await worker.stop()
        assert await states(app, batch) == ["waiting"] * 10


async def test_a_stop_while_the_store_is_unavailable_reports_unflushed_updates(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, shutdown_grace_s=0) as engine, app_on(engine) as app:

        @app.task
        async def task(item: int) -> int:
            return item

        batch = await task.map(range(10))
        store = Faulty(engine.store)
        store.before["settle"] = [StoreUnavailable("away")] * 1_000
        worker = Worker(dataclasses.replace(engine, store=store), app.registry, concurrency=3)
        await worker.start()
        while "settle" not in store.calls:
            await asyncio.sleep(0)
        with pytest.raises(UpdatesUnflushed):
            await worker.stop()
        sessions = [session for session in await engine.maintenance.sessions() if session.kind == "worker"]
        now_us = engine.clock.now_us()
        for session in sessions:
            no_suspects = Suspects(span_slots={}, evidence="")
            await engine.maintenance.recover(
                session.id, no_suspects, silent_since_us=now_us, crashes_max=3, now_us=now_us
            )
        async with app.worker():
            assert await outputs(batch) == list(range(10))


async def test_an_at_most_once_run_never_runs_twice(kind: str, tmp_path: Path) -> None:
    ran: list[int] = []
    begun = asyncio.Event()
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task(at_most_once=True, retry=Retry(attempts=3, delay_s=0))
        async def once(item: int) -> int:
            ran.append(item)
            if item == 1:
                raise ValueError("no second attempt")
            if item == 2:
                begun.set()
                await asyncio.Event().wait()
            return item

        batch = await once.map(range(4))
        worker = Worker(engine, app.registry, concurrency=1)
        await worker.start()
        await begun.wait()
        await worker.stop(now=True)
        assert ran == [0, 1, 2]
        async with app.worker():
            assert await outputs(batch) == [0, "ValueError", "WorkerStopped", 3]
        assert ran == [0, 1, 2, 3]


# -- sessions and faults


async def test_r3_a_worker_whose_session_was_ended_continues_under_a_new_session(kind: str, tmp_path: Path) -> None:
    begun: list[int] = []
    first_begun, gate = asyncio.Event(), asyncio.Event()
    async with opened(kind, tmp_path, heartbeat_ms=10, session_timeout_ms=60_000) as engine, app_on(engine) as app:

        @app.task
        async def waits(item: int) -> int:
            begun.append(item)
            first_begun.set()
            await gate.wait()
            return item

        async with app.worker(concurrency=2) as worker:
            batch = await waits.map(range(6))
            await first_begun.wait()
            old = worker.session.session_id
            no_suspects, now_us = Suspects(span_slots={}, evidence=""), engine.clock.now_us() + 1_000_000
            await engine.maintenance.recover(old, no_suspects, silent_since_us=now_us, crashes_max=3, now_us=now_us)
            gate.set()
            assert await outputs(batch) == list(range(6))
            assert worker.session.session_id != old
        assert len({view.attempt for view in [await engine.store.run(batch.id, index) for index in range(6)]}) == 1


async def test_two_loops_that_meet_an_ended_session_start_a_single_new_session(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def task(item: int) -> int:
            return item

        store = Faulty(engine.store)
        worker = Worker(dataclasses.replace(engine, store=store), app.registry, concurrency=3)
        await worker.start()
        old = worker.session.session_id
        await engine.store.end_session(old, now_us=engine.clock.now_us())
        await asyncio.gather(worker._renew_session(old), worker._renew_session(old), worker._renew_session(old))
        assert store.calls.count("start_session") == 2
        assert [session.id for session in await engine.maintenance.sessions()] == [worker.session.session_id]
        assert await outputs(await task.map(range(5))) == list(range(5))
        await worker.stop()


async def test_a_worker_survives_an_unavailable_store(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, poll_interval_ms=5) as engine, app_on(engine) as app:

        @app.task
        async def task(item: int) -> int:
            return item

        store = Faulty(engine.store)
        away = StoreUnavailable("away")
        for operation in ("claim", "settle", "release", "heartbeat", "next_due_us", "sweep"):
            store.before[operation] = [away, away]
            store.after[operation] = [away]
        worker = Worker(dataclasses.replace(engine, store=store), app.registry, concurrency=3)
        await worker.start()
        batch = await task.map(range(100))
        assert await outputs(batch) == list(range(100))
        await worker.stop()


async def test_a_claim_loop_survives_an_unexpected_error(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine, app_on(engine) as app:

        @app.task
        async def task(item: int) -> int:
            return item

        store = Faulty(engine.store)
        store.before["claim"] = [RuntimeError("odd")]
        worker = Worker(dataclasses.replace(engine, store=store), app.registry, concurrency=3)
        await worker.start()
        batch = await task.map(range(3))
        while not (await batch.view()).is_finished:
            await clock.advance_async(1)
        await worker.stop()


async def test_a_worker_on_an_unavailable_store_does_not_start(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        store = Faulty(engine.store)
        store.before["sessions"] = [StoreUnavailable("away")]
        worker = Worker(dataclasses.replace(engine, store=store), app.registry, concurrency=3)
        with pytest.raises(StoreUnavailable):
            await worker.start()
        assert not [session for session in await engine.maintenance.sessions() if session.kind == "worker"]
        await worker.stop()


async def test_threads_of_plain_functions_run_side_by_side(kind: str, tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=60)
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        def meets(item: int) -> int:
            together.wait()
            return item

        async with app.worker(concurrency=4):
            assert await outputs(await meets.map(range(8))) == list(range(8))
