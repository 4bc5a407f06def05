"""One process's dealings with the store, with answers lost and stores away."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.core import run
from headrace.core.block import Coalescer
from headrace.core.pack import JSON
from headrace.core.span import Key
from headrace.foundation.errors import InvalidInput, SessionEnded, StoreUnavailable
from headrace.foundation.ids import new_batch_id, new_session_id
from headrace.runtime.clock import ManualClock
from headrace.runtime.engine import Engine
from headrace.runtime.flusher import UpdatesUnflushed
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.runtime.sessions.inflight_marks import InflightMarks, owner_has_ended, read
from headrace.runtime.sessions.recovery import STUCK_TIMEOUTS
from headrace.runtime.sessions.session import StoreSession
from headrace.store.protocol import Claim, NewBatch, Release, Session, Suspects
from tests.support import invariants
from tests.support.engines import Faulty, engine_of

AWAY = StoreUnavailable("away")
SECOND_US = 1_000_000


class Desk:
    """A broker on a store that can be made to fail, on a clock that stands."""

    def __init__(self, engine: Engine) -> None:
        self.store = Faulty(engine.store)
        self.clock = ManualClock()
        self.engine = dataclasses.replace(engine, store=self.store, clock=self.clock, beats_beside=False)
        self.broker = StoreSession(self.engine, kind="worker")

    async def batch(self, count: int, **key: Any) -> str:
        """A sealed batch of `count` runs of `task`."""
        now_us = self.clock.now_us()
        batch, _ = await self.store.create_batch(NewBatch(id=new_batch_id(now_us)), now_us=now_us)
        coalescer = Coalescer(runs_max=256, bytes_max=1 << 20)
        for index in range(count):
            coalescer.add(index, b"%d" % index, Key("task", **key), kind=JSON)
        await self.store.append(batch.id, coalescer.flush(), now_us=now_us)
        await self.store.seal(batch.id, count, now_us=now_us)
        return str(batch.id)

    async def claim(self, runs_max: int = 1_000) -> list[ActiveLease]:
        return await self.broker.claim(["task"], None, runs_max)

    async def end(self, work: ActiveLease, code: int = run.COMPLETED) -> None:
        """Every run of a lease ends so, and the lease with them."""
        while work.cursor < work.count:
            work.end(work.begin(), code, b"0")
        settlement = work.take_settlement()
        assert settlement is not None
        await self.broker.end_lease(work, [settlement])

    async def settled(self) -> None:
        """Until the flusher has nothing left."""
        flusher = self.broker._flusher
        assert flusher is not None
        while flusher.depth:
            await asyncio.sleep(0)

    async def beat(self) -> None:
        await self.broker._heartbeat_once(lambda news, *values: news(*values))

    async def states(self, batch_id: str) -> list[str]:
        return [view.state for view in await self.store.runs("default", batch_id=batch_id, limit=10_000)]


@asynccontextmanager
async def desk_on(folder: Path, **limits: Any) -> AsyncGenerator[Desk, None]:
    engine = await engine_of("sqlite", folder, **limits)
    desk = Desk(engine)
    await desk.broker.start()
    try:
        yield desk
        await desk.broker.stop()
        assert await invariants.faults(engine.store, "default") == []
    finally:
        await engine.close()


async def test_r1_a_claim_whose_answer_was_lost_is_repeated_and_answers_the_same_spans(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(300)
        desk.store.after["claim"] = [AWAY, AWAY]
        claiming = asyncio.create_task(desk.claim(100))
        while desk.store.calls.count("claim") < 3:
            await desk.clock.advance_async(1)
            await asyncio.sleep(0)
        works = await claiming
        assert sum(work.count for work in works) == 100
        _, ledger = await desk.store.batch(batch_id)
        assert (ledger.leased, ledger.waiting) == (100, 200)
        for work in works:
            await desk.end(work)


async def test_r1_leases_that_nobody_here_holds_go_back_after_a_heartbeat(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        desk.store.after["claim"] = [asyncio.CancelledError()]  # a stop came while the answer was on its way
        with pytest.raises(asyncio.CancelledError):
            await desk.claim()
        assert (await desk.store.batch(batch_id))[1].leased == 10
        await desk.beat()
        await desk.settled()
        assert (await desk.store.batch(batch_id))[1].leased == 0


async def test_r1_a_heartbeat_leaves_claims_alone_that_are_not_answered_yet(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        desk.store.after["claim"] = [AWAY]
        claiming = asyncio.create_task(desk.claim(4))
        while not desk.clock.sleepers_count > 1:
            await asyncio.sleep(0)
        (second,) = await desk.claim(3)  # claimed and answered later than the first, which waits to ask again
        await desk.beat()
        await desk.settled()
        assert (await desk.store.batch(batch_id))[1].leased == 7
        await desk.clock.advance_async(1)
        (first,) = await claiming
        for work in (first, second):
            await desk.end(work)
        await desk.settled()
        assert (await desk.states(batch_id)).count("completed") == 7


async def test_r1_a_heartbeat_leaves_leases_alone_whose_outcomes_are_on_their_way(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        (work,) = await desk.claim()
        desk.store.before["settle"] = [AWAY]
        await desk.end(work)
        while desk.broker._flusher is None or desk.broker._flusher.last_error is None:
            await asyncio.sleep(0)
        await desk.beat()
        await desk.clock.advance_async(1)
        await desk.settled()
        assert "release" not in desk.store.calls
        assert await desk.states(batch_id) == ["completed"] * 10


async def test_r2_a_settlement_whose_answer_was_lost_is_repeated_and_counts_once(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        (work,) = await desk.claim()
        desk.store.after["settle"] = [AWAY]
        await desk.end(work)
        while desk.store.calls.count("settle") < 2:
            await desk.clock.advance_async(1)
            await asyncio.sleep(0)
        await desk.broker.stop()
        assert desk.broker.lost_count == 0
        batch, ledger = await desk.store.batch(batch_id)
        assert (batch.state, ledger.completed) == ("completed", 10)


async def test_r3_a_thawed_session_drops_its_leases_and_starts_anew(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        (work,) = await desk.claim()
        ended: list[str] = []
        desk.broker.on_ended = lambda: ended.append(desk.broker.session_id)
        first = desk.broker.session_id
        await end_by_others(desk, first)
        await desk.beat()
        assert (ended, desk.broker.held, work.slot) == ([first], [], -1)
        with pytest.raises(SessionEnded):
            await desk.claim()
        await desk.broker.restart()
        assert desk.broker.session_id != first
        (again,) = await desk.claim()
        assert again.lease.token > work.lease.token
        await desk.end(work)  # late, under the old token
        await desk.settled()
        assert desk.broker.lost_count == 10
        assert (await desk.store.batch(batch_id))[1].leased == 10
        await desk.end(again)
        await desk.settled()
        assert await desk.states(batch_id) == ["completed"] * 10


async def end_by_others(desk: Desk, session_id: str) -> None:
    now_us = desk.clock.now_us()
    nobody = Suspects(span_slots={}, evidence="")
    await desk.store.recover(session_id, nobody, silent_since_us=now_us, crashes_max=3, now_us=now_us)


async def test_a_restart_uses_no_slot_of_the_old_file_again(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        await desk.batch(2)
        old = await desk.claim(1)
        await end_by_others(desk, desk.broker.session_id)
        await desk.broker.restart()
        marks = desk.broker.marks
        assert marks is not None
        free = marks.free_count
        for work in old:
            await desk.end(work)
        await desk.settled()
        assert marks.free_count == free
        old[0].marks[0] = 1  # a run that outlived its session may still write its marks
        assert read(marks.path) == {}


async def test_the_flusher_keeps_everything_while_the_store_fails(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(600)
        works = await desk.claim()
        desk.store.before["settle"] = [AWAY] * 5
        for work in works:
            await desk.end(work)
        while desk.store.before["settle"]:
            await desk.clock.advance_async(10)
            await asyncio.sleep(0)
        await desk.clock.advance_async(10)
        await desk.settled()
        batch, ledger = await desk.store.batch(batch_id)
        assert (batch.state, ledger.completed) == ("completed", 600)


async def test_a_lease_whose_settlement_is_refused_for_good_goes_back(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        (work,) = await desk.claim()
        desk.store.before["settle"] = [InvalidInput("never")]
        await desk.end(work)
        await desk.settled()
        assert (await desk.store.batch(batch_id))[1].leased == 10
        await desk.beat()
        await desk.settled()
        assert (await desk.store.batch(batch_id))[1].leased == 0


async def test_a_lease_is_evidence_until_its_last_update_is_durable(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        await desk.batch(3, at_most_once=True)
        (work,) = await desk.claim()
        marks = desk.broker.marks
        assert marks is not None
        desk.store.before["settle"] = [AWAY]
        await desk.end(work)
        while desk.broker._flusher is None or desk.broker._flusher.last_error is None:
            await asyncio.sleep(0)
        assert read(marks.path) == {(work.lease.span_id, work.lease.token): (0, 1, 2)}
        await desk.clock.advance_async(1)
        await desk.settled()
        assert read(marks.path) == {}


async def test_an_earlier_part_that_became_durable_ends_no_evidence(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        await desk.batch(3, at_most_once=True)
        (work,) = await desk.claim()
        marks = desk.broker.marks
        assert marks is not None
        seen: list[Any] = []
        desk.store.watch["settle"] = lambda: seen.append(read(marks.path))
        desk.store.before["settle"] = [AWAY]
        work.end(work.begin(), run.COMPLETED, b"0")
        part = work.take_settlement()
        assert part is not None
        await desk.broker.put(part)
        while desk.broker._flusher is None or desk.broker._flusher.last_error is None:
            await asyncio.sleep(0)
        await desk.end(work)  # waits behind the first part, which is tried again alone
        await desk.clock.advance_async(1)
        await desk.settled()
        name = (work.lease.span_id, work.lease.token)
        assert seen == [{name: (0, 1, 2)}, {name: (0, 1, 2)}]
        assert read(marks.path) == {}


async def test_claims_keep_to_the_leases_that_can_be_marked(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        small = StoreSession(desk.engine, kind="worker", slots=5)
        await small.start()
        await desk.batch(100)
        works = [work for _ in range(7) for work in await small.claim(["task"], None, 1)]
        assert (len(works), small.free_count) == (5, 0)
        assert await small.claim(["task"], None, 10) == []
        release = Release(span_id=works[0].lease.span_id, token=works[0].lease.token)
        await small.end_lease(works[0], [release])
        assert small._flusher is not None
        while small._flusher.depth:
            await asyncio.sleep(0)
        assert small.free_count == 1
        await small.stop()


async def test_a_broker_that_can_not_write_leaves_its_evidence(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        other = StoreSession(desk.engine, kind="worker")
        await other.start()
        (work,) = await other.claim(["task"], None, 10)
        assert other.marks is not None
        path = other.marks.path
        work.begin()
        desk.store.before["settle"] = [AWAY] * 1_000
        work.end(work.begin(), run.COMPLETED, b"1")
        settlement = work.take_settlement()
        assert settlement is not None
        await other.put(settlement)
        stopping = asyncio.create_task(other.stop(deadline_s=5))
        while not stopping.done():
            await desk.clock.advance_async(1)
            await asyncio.sleep(0)
        with pytest.raises(UpdatesUnflushed):
            await stopping
        desk.store.before.clear()
        assert owner_has_ended(path) is True
        assert await desk.broker.recover() == 1
        assert not path.exists()
        views = [await desk.store.run(batch_id, index) for index in range(10)]
        assert [view.crashes_count for view in views] == [1] + [0] * 9


async def lost(desk: Desk, *, marks: bool) -> tuple[str, InflightMarks | None, ActiveLease]:
    """A worker of another process that leased ten runs and began two of them."""
    now_us = desk.clock.now_us()
    session_id = new_session_id(now_us)
    assert desk.engine.live_directory is not None
    own = InflightMarks(desk.engine.live_directory / session_id, slot_runs=256) if marks else None
    session = Session(id=session_id, kind="worker", host="elsewhere", pid=7, started_us=now_us)
    await desk.store.start_session(session, now_us=now_us)
    wish = Claim(session_id=session_id, claim_no=1, environment="default", tasks=["task"], queues=None, runs_max=10)
    (lease,) = await desk.store.claim(wish, now_us=now_us)
    slot, body = own.take(lease.span_id, lease.token, lease.runs_count) if own is not None else (-1, None)
    work = ActiveLease(lease, body, slot)
    work.begin()
    work.begin()
    return session_id, own, work


async def crashes(desk: Desk, batch_id: str) -> list[int]:
    return [(await desk.store.run(batch_id, index)).crashes_count for index in range(10)]


async def test_a_dead_process_of_this_machine_is_recovered_at_once(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        _, marks, _ = await lost(desk, marks=True)
        assert marks is not None
        assert await desk.broker.recover() == 0  # it lives
        marks.close(keep=True)
        assert await desk.broker.recover() == 1
        assert await crashes(desk, batch_id) == [1, 1] + [0] * 8
        assert await desk.broker.recover() == 0


async def test_a_process_elsewhere_is_recovered_when_it_was_silent_too_long(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        await lost(desk, marks=False)
        desk.clock.advance(desk.engine.limits.session_timeout_ms / 1_000 - 0.001)
        assert await desk.broker.recover() == 0
        desk.clock.advance(0.001)
        assert await desk.broker.recover() == 1
        assert await crashes(desk, batch_id) == [1] * 10  # nothing is known of it, so all are suspect


async def test_a_process_that_lives_but_hangs_is_recovered_in_the_end(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        _, marks, _ = await lost(desk, marks=True)
        timeout_s = desk.engine.limits.session_timeout_ms / 1_000
        desk.clock.advance(STUCK_TIMEOUTS * timeout_s - 1)
        assert await desk.broker.recover() == 0
        desk.clock.advance(1)
        assert await desk.broker.recover() == 1
        assert await crashes(desk, batch_id) == [1, 1] + [0] * 8
        assert marks is not None
        marks.close()


async def test_a_heartbeat_that_fails_is_tried_again_and_says_what_nobody_wants(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        batch_id = await desk.batch(10)
        await desk.claim()
        told: list[Any] = []
        desk.broker.on_unwanted = told.append
        desk.store.before["heartbeat"] = [AWAY]
        await desk.beat()
        await desk.store.stop_batch(batch_id, "cancelled", now_us=desk.clock.now_us())
        await desk.beat()
        assert [reply.stopped for reply in told] == [[batch_id]]


async def test_r18_heartbeats_go_on_while_a_run_blocks_the_loop(tmp_path: Path) -> None:
    engine = await engine_of("sqlite", tmp_path, heartbeat_ms=10, session_timeout_ms=30)
    store = Faulty(engine.store)
    beats = threading.Semaphore(0)
    store.watch["heartbeat"] = lambda: beats.release()
    broker = StoreSession(dataclasses.replace(engine, store=store), kind="worker")
    await broker.start()
    for _ in range(3):
        assert beats.acquire(timeout=60)
    await broker.stop()
    await engine.close()


def test_a_heartbeat_ends_with_the_loop_of_its_owner_though_the_store_is_closed_too(tmp_path: Path) -> None:
    async def die() -> StoreSession:
        engine = await engine_of("sqlite", tmp_path, heartbeat_ms=10)
        broker = StoreSession(engine, kind="worker")
        await broker.start()
        await engine.close()
        return broker  # nobody stops it

    broker = asyncio.run(die())
    beating = broker._heartbeats
    assert isinstance(beating, threading.Thread)
    beating.join(timeout=60)
    assert not beating.is_alive()
    broker.abandon()


async def test_starting_and_stopping_twice_does_nothing_more(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        session_id = desk.broker.session_id
        await desk.broker.start()
        assert desk.broker.session_id == session_id
        await desk.broker.stop()
        await desk.broker.stop()
        assert await desk.store.sessions() == []
        assert list(tmp_path.glob("headrace.db.live/*")) == []


async def test_a_broker_that_can_not_start_leaves_nothing_behind(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        other = StoreSession(desk.engine, kind="worker")
        desk.store.before["start_session"] = [AWAY]
        with pytest.raises(StoreUnavailable):
            await other.start()
        assert len(list(tmp_path.glob("headrace.db.live/*"))) == 1
