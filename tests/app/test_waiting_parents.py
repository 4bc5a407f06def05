"""Runs that wait for other runs: they leave their slots to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace import Headrace, RunFailed, WaitTimeout
from headrace.foundation.errors import InvalidInput
from headrace.runtime.sessions.active_lease import BEGUN, NOT_BEGUN
from headrace.runtime.worker.slots import Slots
from headrace.runtime.worker.worker import Worker
from tests.support.engines import app_on, on_each_store, opened

pytestmark = on_each_store
PARENTS = 40
CHILDREN = 3


@asynccontextmanager
async def working(kind: str, folder: Path, **limits: int) -> AsyncIterator[Headrace]:
    """Open an app without a worker."""
    async with opened(kind, folder, **limits) as engine, app_on(engine) as app:
        yield app


async def until_waiting(slots: Slots) -> None:
    """Return when a run waits without a slot."""
    while not slots.waiting_count:
        await asyncio.sleep(0)


class Computing:
    """Counts the runs that compute at the same time."""

    def __init__(self) -> None:
        self.count = self.most = 0

    def begin(self) -> None:
        """Count a run that goes on."""
        self.count += 1
        self.most = max(self.most, self.count)

    def end(self) -> None:
        """Count a run that waits or ends."""
        self.count -= 1


@pytest.mark.parametrize("way", ["wait", "results", "result", "gather"])
async def test_parents_that_wait_leave_their_slots_to_their_children(kind: str, way: str, tmp_path: Path) -> None:
    computing = Computing()
    async with working(kind, tmp_path) as app:

        @app.task
        async def child(item: int) -> int:
            computing.begin()
            await asyncio.sleep(0)
            computing.end()
            return item

        async def children_of(item: int) -> int:
            if way == "wait":
                batch = await child.map(range(item, item + CHILDREN))
                computing.end()
                completed: int = (await batch.wait()).ledger.completed
                computing.begin()
                return completed
            if way == "results":
                batch = await child.map(range(item, item + CHILDREN))
                computing.end()
                outputs = [outcome.output async for outcome in batch.results()]
                computing.begin()
                assert outputs == list(range(item, item + CHILDREN))
                return len(outputs)
            runs = [await child.enqueue(item + number) for number in range(CHILDREN)]
            computing.end()
            if way == "result":
                values = [await run.result() for run in runs]
            else:
                values = list(await asyncio.gather(*(run.result() for run in runs)))
            computing.begin()
            assert values == list(range(item, item + CHILDREN))
            return len(values)

        @app.task
        async def parent(item: int) -> int:
            computing.begin()
            try:
                return await children_of(item)
            finally:
                computing.end()

        batch = await parent.map(range(PARENTS))
        async with app.worker(concurrency=4) as worker:
            assert [outcome.output async for outcome in batch.results()] == [CHILDREN] * PARENTS
            assert worker.stats.in_flight == 0
        if way in ("wait", "gather"):  # in the others a run computes between two waits, uncounted here
            assert computing.most <= 4
        assert computing.count == 0


async def test_plain_functions_that_wait_leave_their_slots_too(kind: str, tmp_path: Path) -> None:
    async with working(kind, tmp_path) as app:

        @app.task
        def child(item: int) -> int:
            return item

        @app.task
        def parent(item: int) -> int:
            batch = child.map_sync(range(item, item + CHILDREN))
            return sum(outcome.output or 0 for outcome in batch.results_sync())

        batch = await parent.map(range(PARENTS))
        async with app.worker(concurrency=2):
            outputs = [outcome.output async for outcome in batch.results()]
        assert outputs == [sum(range(item, item + CHILDREN)) for item in range(PARENTS)]


async def test_the_first_of_several_waits_that_ends_lets_its_parent_go_on(kind: str, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with working(kind, tmp_path) as app:

        @app.task
        async def child(item: int) -> int:
            if item:
                await gate.wait()
            return item

        @app.task
        async def parent(_item: int) -> list[int]:
            runs = [await child.enqueue(number) for number in range(2)]
            waits = [asyncio.ensure_future(run.result()) for run in runs]
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            first = [wait.result() for wait in done]
            gate.set()
            return [*first, *(await asyncio.gather(*waits))]

        run = await parent.enqueue(0)
        async with app.worker(concurrency=1):
            assert await run.result() == [0, 0, 1]


@pytest.mark.parametrize("end", ["fails", "times out", "is cancelled", "leaves a wait open"])
async def test_a_parent_that_ends_in_any_way_frees_its_slot_once(kind: str, end: str, tmp_path: Path) -> None:
    open_waits: list[asyncio.Future[Any]] = []
    slots: list[Slots] = []
    async with working(kind, tmp_path) as app:
        gate = asyncio.Event()

        @app.task
        async def never(_item: int) -> None:
            await gate.wait()

        @app.task
        async def child(item: int) -> int:
            return item

        @app.task
        async def parent(_item: int) -> None:
            run = await never.enqueue(0)
            if end == "fails":
                await run.cancel()
                await run.result()
            elif end == "times out":
                await run.result(timeout_s=0.001)
            elif end == "leaves a wait open":
                open_waits.append(asyncio.ensure_future(run.result()))
                await until_waiting(slots[0])
            else:
                await run.result()

        async with app.worker(concurrency=2) as worker:
            assert isinstance(worker, Worker)
            slots.append(worker._executor._slots)
            run = await parent.enqueue(0)
            if end == "is cancelled":
                await until_waiting(slots[0])
                await run.cancel()
            if end == "leaves a wait open":
                await run.result()
            else:
                with pytest.raises(RunFailed) as raised:
                    await run.result()
                if raised.value.failure is not None:
                    assert raised.value.failure.type == ("RunFailed" if end == "fails" else WaitTimeout.__name__)
            for waiting in open_waits:
                waiting.cancel()
            assert [outcome.ok async for outcome in (await child.map(range(50))).results()] == [True] * 50
            assert (slots[0].waiting_count, len(slots[0].resuming)) == (0, 0)
            await asyncio.gather(*open_waits, return_exceptions=True)
            gate.set()


async def test_parents_above_the_limit_keep_their_slots(kind: str, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with working(kind, tmp_path, waiting_parents_max=1) as app:

        @app.task
        async def child(_item: int) -> None:
            await gate.wait()

        @app.task
        async def parent(item: int) -> None:
            await (await child.enqueue(item)).result()

        batch = await parent.map(range(2))
        async with app.worker(concurrency=2) as worker:
            assert isinstance(worker, Worker)
            while worker._executor.in_flight_count < 3:
                await asyncio.sleep(0)
            assert worker._executor.waiting_count == 1, "one parent waits without a slot, and one with its own"
            gate.set()
            assert (await batch.wait()).ledger.completed == 2


async def test_a_run_that_waits_for_itself_fails(kind: str, tmp_path: Path) -> None:
    async with working(kind, tmp_path) as app:

        @app.task
        async def own_run(item: int) -> str:
            run = (await app.get_batch(ids[0])) if item else await app.get_run(ids[1])
            try:
                await (run.wait() if item else run.result())  # type: ignore[union-attr]  # by `item`
            except InvalidInput as error:
                return error.message
            return "no error"

        ids: list[str] = []
        batch = await own_run.map([1])
        alone = await own_run.enqueue(0)
        ids += [batch.id, alone.id]
        async with app.worker():
            (outcome,) = [outcome async for outcome in batch.results()]
            assert "waits for this batch" in str(outcome.output)
            assert "waits for itself" in await alone.result()


async def test_a_waiting_parent_is_not_suspected_of_a_crash(kind: str, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with working(kind, tmp_path) as app:

        @app.task
        async def child(_item: int) -> None:
            await gate.wait()

        @app.task
        async def parent(item: int) -> None:
            await (await child.enqueue(item)).result()
            again.append(marks())
            await second.wait()

        again: list[Any] = []
        second = asyncio.Event()
        run = await parent.enqueue(0)
        async with app.worker(concurrency=1) as worker:
            assert isinstance(worker, Worker)

            def marks() -> dict[str, int]:
                return {active.lease.task.rpartition(".")[2]: active.marks[0] for active in worker.session.held}

            while len(worker.session.held) < 2 or BEGUN not in marks().values():
                await asyncio.sleep(0)
            assert marks() == {"parent": NOT_BEGUN, "child": BEGUN}
            gate.set()
            while not again:
                await asyncio.sleep(0)
            assert again[0]["parent"] == BEGUN
            second.set()
            await run.result()
