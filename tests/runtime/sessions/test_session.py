"""Store sessions: repeated calls after lost responses, and stores that are unavailable."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.core import run
from headrace.core.block import Coalescer
from headrace.core.pack import JSON
from headrace.core.span import Key
from headrace.foundation.errors import InvalidInput, SessionEnded, StoreBroken, StoreUnavailable
from headrace.foundation.ids import new_batch_id, new_session_id, session_name
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
from tests.support.logged_events import logged_events

AWAY = StoreUnavailable("away")
SECOND_US = 1_000_000


class SessionRig:
    """A session on a store that can fail, with a manual clock."""

    def __init__(self, engine: Engine) -> None:
        self.store = Faulty(engine.store)
        self.clock = ManualClock()
        self.engine = dataclasses.replace(engine, store=self.store, clock=self.clock, beats_beside=False)
        self.session = StoreSession(self.engine, kind="worker")

    async def batch(self, count: int, **key: Any) -> str:
        """Append and seal a batch of `count` runs of `task`."""
        now_us = self.clock.now_us()
        batch, _ = await self.store.create_batch(NewBatch(id=new_batch_id(now_us)), now_us=now_us)
        coalescer = Coalescer(runs_max=256, bytes_max=1 << 20)
        for index in range(count):
            coalescer.add(index, b"%d" % index, Key("task", **key), kind=JSON)
        await self.store.append(batch.id, coalescer.flush(), now_us=now_us)
        await self.store.seal(batch.id, count, now_us=now_us)
        return str(batch.id)

    async def claim(self, runs_max: int = 1_000) -> list[ActiveLease]:
        return await self.session.claim(["task"], None, runs_max)

    async def end(self, active: ActiveLease, code: int = run.COMPLETED) -> None:
        """End each run of a lease with the given outcome, and then the lease."""
        while active.cursor < active.count:
            active.end(active.begin(), code, b"0")
        settlement = active.take_settlement()
        assert settlement is not None
        await self.session.end_lease(active, [settlement])

    async def settled(self) -> None:
        """Wait until the flusher has no update left."""
        flusher = self.session._flusher
        assert flusher is not None
        while flusher.depth:
            await asyncio.sleep(0)

    async def beat(self) -> None:
        await self.session._heartbeat_once(lambda callback, *values: callback(*values))

    async def states(self, batch_id: str) -> list[str]:
        return [view.state for view in await self.store.runs("default", batch_id=batch_id, limit=10_000)]


@asynccontextmanager
async def open_rig(folder: Path, **limits: Any) -> AsyncGenerator[SessionRig, None]:
    engine = await engine_of("sqlite", folder, **limits)
    rig = SessionRig(engine)
    await rig.session.start()
    try:
        yield rig
        await rig.session.stop()
        assert await invariants.faults(engine.store, "default") == []
    finally:
        await engine.close()


async def test_r1_a_claim_whose_response_was_lost_is_repeated_and_returns_the_same_spans(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(300)
        rig.store.after["claim"] = [AWAY, AWAY]
        claiming = asyncio.create_task(rig.claim(100))
        while rig.store.calls.count("claim") < 3:
            await rig.clock.advance_async(1)
            await asyncio.sleep(0)
        leases = await claiming
        assert sum(active.count for active in leases) == 100
        _, ledger = await rig.store.batch(batch_id)
        assert (ledger.leased, ledger.waiting) == (100, 200)
        for active in leases:
            await rig.end(active)


async def test_r1_leases_that_the_process_does_not_hold_are_released_after_a_heartbeat(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        rig.store.after["claim"] = [asyncio.CancelledError()]  # the worker was stopped before the response arrived
        with pytest.raises(asyncio.CancelledError):
            await rig.claim()
        assert (await rig.store.batch(batch_id))[1].leased == 10
        await rig.beat()
        await rig.settled()
        assert (await rig.store.batch(batch_id))[1].leased == 0


async def test_r1_a_heartbeat_keeps_the_leases_of_pending_claims(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        rig.store.after["claim"] = [AWAY]
        claiming = asyncio.create_task(rig.claim(4))
        while not rig.clock.sleepers_count > 1:
            await asyncio.sleep(0)
        (second,) = await rig.claim(3)  # claimed and returned after the first claim, which waits for its retry
        await rig.beat()
        await rig.settled()
        assert (await rig.store.batch(batch_id))[1].leased == 7
        await rig.clock.advance_async(1)
        (first,) = await claiming
        for active in (first, second):
            await rig.end(active)
        await rig.settled()
        assert (await rig.states(batch_id)).count("completed") == 7


async def test_r1_a_heartbeat_keeps_leases_whose_outcomes_are_pending(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        (active,) = await rig.claim()
        rig.store.before["settle"] = [AWAY]
        await rig.end(active)
        while rig.session._flusher is None or rig.session._flusher.last_error is None:
            await asyncio.sleep(0)
        await rig.beat()
        await rig.clock.advance_async(1)
        await rig.settled()
        assert "release" not in rig.store.calls
        assert await rig.states(batch_id) == ["completed"] * 10


async def answered_late(rig: SessionRig, change: Callable[[], Awaitable[None]]) -> None:
    """Send a heartbeat, change something after the store has answered, and only then deliver the answer."""
    answers: list[tuple[Any, ...]] = []
    await rig.session._heartbeat_once(lambda *call: answers.append(call))
    await change()
    for callback, *values in answers:
        callback(*values)


async def test_r1_a_lease_that_ended_since_the_heartbeat_was_sent_is_not_released(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        (active,) = await rig.claim()

        async def settle() -> None:
            await rig.end(active)
            await rig.settled()

        await answered_late(rig, settle)
        await rig.settled()
        assert "release" not in rig.store.calls
        assert await rig.states(batch_id) == ["completed"] * 10


async def test_r1_a_lease_that_was_claimed_since_the_heartbeat_was_sent_is_not_released(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)

        async def claim_and_settle() -> None:
            (active,) = await rig.claim()
            await rig.end(active)
            await rig.settled()

        await answered_late(rig, claim_and_settle)
        await rig.settled()
        assert "release" not in rig.store.calls
        assert await rig.states(batch_id) == ["completed"] * 10


async def test_r1_a_claim_in_flight_at_the_heartbeat_whose_runs_end_before_its_answer_is_not_released(
    tmp_path: Path,
) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        rig.store.after["claim"] = [AWAY]
        claiming = asyncio.create_task(rig.claim())
        while rig.clock.sleepers_count < 2:
            await asyncio.sleep(0)

        async def answer_and_settle() -> None:
            await rig.clock.advance_async(1)
            (active,) = await claiming
            await rig.end(active)
            await rig.settled()

        await answered_late(rig, answer_and_settle)
        await rig.settled()
        assert "release" not in rig.store.calls
        assert await rig.states(batch_id) == ["completed"] * 10


async def test_r1_an_unknown_lease_is_released_once_however_many_heartbeats_name_it(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.batch(10)
        rig.store.after["claim"] = [asyncio.CancelledError()]
        with pytest.raises(asyncio.CancelledError):
            await rig.claim()
        rig.store.before["release"] = [AWAY] * 3
        for _ in range(3):
            await rig.beat()
        await rig.clock.advance_async(10)
        await rig.settled()
        assert rig.store.calls.count("release") == 4
        flusher = rig.session._flusher
        assert flusher is not None
        assert flusher.flushed_count == 1


async def test_r2_a_settlement_whose_response_was_lost_is_repeated_and_counts_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        (active,) = await rig.claim()
        rig.store.after["settle"] = [AWAY]
        await rig.end(active)
        while rig.store.calls.count("settle") < 2:
            await rig.clock.advance_async(1)
            await asyncio.sleep(0)
        await rig.session.stop()
        assert rig.session.lost_count == 0
        batch, ledger = await rig.store.batch(batch_id)
        assert (batch.state, ledger.completed) == ("completed", 10)


async def test_r3_a_thawed_session_drops_its_leases_and_restarts(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        (active,) = await rig.claim()
        ended: list[str] = []
        rig.session.on_ended = lambda: ended.append(rig.session.session_id)
        first = rig.session.session_id
        await end_elsewhere(rig, first)
        await rig.beat()
        assert (ended, rig.session.held, active.slot) == ([first], [], -1)
        with pytest.raises(SessionEnded):
            await rig.claim()
        await rig.session.restart()
        assert rig.session.session_id != first
        (again,) = await rig.claim()
        assert again.lease.token > active.lease.token
        await rig.end(active)  # late, with the old token
        await rig.settled()
        assert rig.session.lost_count == 10
        assert (await rig.store.batch(batch_id))[1].leased == 10
        await rig.end(again)
        await rig.settled()
        assert await rig.states(batch_id) == ["completed"] * 10


async def end_elsewhere(rig: SessionRig, session_id: str) -> None:
    now_us = rig.clock.now_us()
    no_suspects = Suspects(span_slots={}, evidence="")
    await rig.store.recover(session_id, no_suspects, silent_since_us=now_us, crashes_max=3, now_us=now_us)


async def test_a_restart_reuses_no_slot_of_the_old_file(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.batch(2)
        old = await rig.claim(1)
        await end_elsewhere(rig, rig.session.session_id)
        await rig.session.restart()
        marks = rig.session.marks
        assert marks is not None
        free = marks.free_count
        for active in old:
            await rig.end(active)
        await rig.settled()
        assert marks.free_count == free
        old[0].marks[0] = 1  # a run that survived its session may still write its marks
        assert read(marks.path) == {}


async def test_a_restart_that_the_store_refuses_closes_its_file_of_marks(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await end_elsewhere(rig, rig.session.session_id)
        await rig.beat()
        rig.store.before["start_session"] = [StoreBroken("gone")]
        with pytest.raises(StoreBroken):
            await rig.session.restart()
        assert rig.session.marks is None
        assert not [path for path in (tmp_path / "headrace.db.live").iterdir() if path.suffix == ""]


async def test_the_flusher_keeps_all_updates_while_the_store_fails(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(600)
        leases = await rig.claim()
        rig.store.before["settle"] = [AWAY] * 5
        for active in leases:
            await rig.end(active)
        while rig.store.before["settle"]:
            await rig.clock.advance_async(10)
            await asyncio.sleep(0)
        await rig.clock.advance_async(10)
        await rig.settled()
        batch, ledger = await rig.store.batch(batch_id)
        assert (batch.state, ledger.completed) == ("completed", 600)


async def test_a_lease_whose_settlement_is_permanently_refused_is_released(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        (active,) = await rig.claim()
        rig.store.before["settle"] = [InvalidInput("never")]
        await rig.end(active)
        await rig.settled()
        assert (await rig.store.batch(batch_id))[1].leased == 10
        await rig.beat()
        await rig.settled()
        assert (await rig.store.batch(batch_id))[1].leased == 0


async def test_a_lease_stays_marked_until_its_last_update_is_durable(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.batch(3, at_most_once=True)
        (active,) = await rig.claim()
        marks = rig.session.marks
        assert marks is not None
        rig.store.before["settle"] = [AWAY]
        await rig.end(active)
        while rig.session._flusher is None or rig.session._flusher.last_error is None:
            await asyncio.sleep(0)
        assert read(marks.path) == {(active.lease.span_id, active.lease.token): (0, 1, 2)}
        await rig.clock.advance_async(1)
        await rig.settled()
        assert read(marks.path) == {}


async def test_a_lease_stays_marked_after_an_earlier_part_became_durable(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.batch(3, at_most_once=True)
        (active,) = await rig.claim()
        marks = rig.session.marks
        assert marks is not None
        seen: list[Any] = []
        rig.store.watch["settle"] = lambda: seen.append(read(marks.path))
        rig.store.before["settle"] = [AWAY]
        active.end(active.begin(), run.COMPLETED, b"0")
        part = active.take_settlement()
        assert part is not None
        await rig.session.put(part)
        while rig.session._flusher is None or rig.session._flusher.last_error is None:
            await asyncio.sleep(0)
        await rig.end(active)  # waits behind the first part, which is retried alone
        await rig.clock.advance_async(1)
        await rig.settled()
        name = (active.lease.span_id, active.lease.token)
        assert seen == [{name: (0, 1, 2)}, {name: (0, 1, 2)}]
        assert read(marks.path) == {}


async def test_claims_are_bounded_by_the_free_mark_slots(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        small = StoreSession(rig.engine, kind="worker", slots=5)
        await small.start()
        await rig.batch(100)
        leases = [active for _ in range(7) for active in await small.claim(["task"], None, 1)]
        assert (len(leases), small.free_count) == (5, 0)
        assert await small.claim(["task"], None, 10) == []
        release = Release(span_id=leases[0].lease.span_id, token=leases[0].lease.token)
        await small.end_lease(leases[0], [release])
        assert small._flusher is not None
        while small._flusher.depth:
            await asyncio.sleep(0)
        assert small.free_count == 1
        await small.stop()


async def test_log_lines_about_a_session_do_not_contain_its_id(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.batch(10)
        lost_id, marks, _ = await lost_worker(rig, marks=True)
        assert marks is not None
        marks.close(keep=True)
        with logged_events() as events:
            assert await rig.session.recover() == 1
        assert [event["event"] for event in events] == ["session.recovered"]
        assert events[0]["session"] == session_name(lost_id)
        assert lost_id not in str(events)


async def test_a_session_that_cannot_settle_leaves_its_marks(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        other = StoreSession(rig.engine, kind="worker")
        await other.start()
        (active,) = await other.claim(["task"], None, 10)
        assert other.marks is not None
        path = other.marks.path
        active.begin()
        rig.store.before["settle"] = [AWAY] * 1_000
        active.end(active.begin(), run.COMPLETED, b"1")
        settlement = active.take_settlement()
        assert settlement is not None
        await other.put(settlement)
        stopping = asyncio.create_task(other.stop(deadline_s=5))
        while not stopping.done():
            await rig.clock.advance_async(1)
            await asyncio.sleep(0)
        with pytest.raises(UpdatesUnflushed):
            await stopping
        rig.store.before.clear()
        assert owner_has_ended(path) is True
        assert await rig.session.recover() == 1
        assert not path.exists()
        views = [await rig.store.run(batch_id, index) for index in range(10)]
        assert [view.crashes_count for view in views] == [1] + [0] * 9


async def lost_worker(rig: SessionRig, *, marks: bool) -> tuple[str, InflightMarks | None, ActiveLease]:
    """Simulate a worker of another process that leased ten runs and began two of them."""
    now_us = rig.clock.now_us()
    session_id = new_session_id(now_us)
    assert rig.engine.live_directory is not None
    marks_file = InflightMarks(rig.engine.live_directory / session_id, slot_runs=256) if marks else None
    record = Session(id=session_id, kind="worker", host="elsewhere", pid=7, started_us=now_us)
    await rig.store.start_session(record, now_us=now_us)
    claim = Claim(session_id=session_id, claim_no=1, environment="default", tasks=["task"], queues=None, runs_max=10)
    (lease,) = await rig.store.claim(claim, now_us=now_us)
    slot, body = marks_file.take(lease.span_id, lease.token, lease.runs_count) if marks_file is not None else (-1, None)
    active = ActiveLease(lease, body, slot)
    active.begin()
    active.begin()
    return session_id, marks_file, active


async def crashes(rig: SessionRig, batch_id: str) -> list[int]:
    return [(await rig.store.run(batch_id, index)).crashes_count for index in range(10)]


async def test_an_ended_process_of_this_machine_is_recovered_at_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        _, marks, _ = await lost_worker(rig, marks=True)
        assert marks is not None
        assert await rig.session.recover() == 0  # its owner is alive
        marks.close(keep=True)
        assert await rig.session.recover() == 1
        assert await crashes(rig, batch_id) == [1, 1] + [0] * 8
        assert await rig.session.recover() == 0


async def test_a_process_of_another_machine_is_recovered_when_its_session_lapsed(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        await lost_worker(rig, marks=False)
        rig.clock.advance(rig.engine.limits.session_timeout_ms / 1_000 - 0.001)
        assert await rig.session.recover() == 0
        rig.clock.advance(0.001)
        assert await rig.session.recover() == 1
        assert await crashes(rig, batch_id) == [1] * 10  # no marks are available, so all runs are suspect


async def test_a_live_process_that_hangs_is_recovered_after_several_timeouts(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        _, marks, _ = await lost_worker(rig, marks=True)
        timeout_s = rig.engine.limits.session_timeout_ms / 1_000
        rig.clock.advance(STUCK_TIMEOUTS * timeout_s - 1)
        assert await rig.session.recover() == 0
        rig.clock.advance(1)
        assert await rig.session.recover() == 1
        assert await crashes(rig, batch_id) == [1, 1] + [0] * 8
        assert marks is not None
        marks.close()


async def test_a_failed_heartbeat_is_retried_and_reports_stopped_batches(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        batch_id = await rig.batch(10)
        await rig.claim()
        replies: list[Any] = []
        rig.session.on_unwanted = replies.append
        rig.store.before["heartbeat"] = [AWAY]
        await rig.beat()
        await rig.store.stop_batch(batch_id, "cancelled", now_us=rig.clock.now_us())
        await rig.beat()
        assert replies[-1].stopped == [batch_id]


async def test_r18_heartbeats_continue_while_a_run_blocks_the_loop(tmp_path: Path) -> None:
    engine = await engine_of("sqlite", tmp_path, heartbeat_ms=10, session_timeout_ms=30)
    store = Faulty(engine.store)
    beats = threading.Semaphore(0)
    store.watch["heartbeat"] = lambda: beats.release()
    session = StoreSession(dataclasses.replace(engine, store=store), kind="worker")
    await session.start()
    for _ in range(3):
        assert beats.acquire(timeout=60)
    await session.stop()
    await engine.close()


def test_heartbeats_end_with_the_loop_of_their_owner_when_the_store_is_closed(tmp_path: Path) -> None:
    async def start_without_stop() -> StoreSession:
        engine = await engine_of("sqlite", tmp_path, heartbeat_ms=10)
        session = StoreSession(engine, kind="worker")
        await session.start()
        await engine.close()
        return session  # without stopping the session

    session = asyncio.run(start_without_stop())
    beating = session._heartbeats
    assert isinstance(beating, threading.Thread)
    beating.join(timeout=60)
    assert not beating.is_alive()
    session.abandon()


async def test_starting_and_stopping_are_idempotent(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        session_id = rig.session.session_id
        await rig.session.start()
        assert rig.session.session_id == session_id
        await rig.session.stop()
        await rig.session.stop()
        assert await rig.store.sessions() == []
        assert list(tmp_path.glob("headrace.db.live/*")) == []


async def test_a_session_that_fails_to_start_leaves_no_file(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        other = StoreSession(rig.engine, kind="worker")
        rig.store.before["start_session"] = [AWAY]
        with pytest.raises(StoreUnavailable):
            await other.start()
        assert len(list(tmp_path.glob("headrace.db.live/*"))) == 1
