"""Processes on hosts whose clocks disagree, on one PostgreSQL database."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.compose import open_engine
from headrace.core.block import Coalescer
from headrace.core.span import Key
from headrace.foundation.ids import new_batch_id
from headrace.foundation.settings import load
from headrace.runtime import clock
from headrace.runtime.engine import Engine
from headrace.runtime.sessions.session import StoreSession
from headrace.store.protocol import NewBatch
from tests.support import invariants
from tests.support.store_rig import fresh_schema

MINUTE_US = 60_000_000


async def engine_on(url: str, folder: Path, offset_us: int, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Open an engine of a host whose clock is off by `offset_us`."""

    shifted_time = SimpleNamespace(time_ns=lambda: time.time_ns() + 1_000 * offset_us, monotonic_ns=time.monotonic_ns)
    monkeypatch.setattr(clock, "time", shifted_time)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / str(offset_us)))  # hosts do not see each other's processes
    (folder / str(offset_us)).mkdir()
    settings = load({"store": url, "heartbeat_ms": 20}, {}, folder)
    return await open_engine(settings)


async def test_hosts_whose_clocks_are_minutes_apart_agree_on_live_sessions_and_due_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = fresh_schema(tmp_path)
    late = await engine_on(url, tmp_path, -10 * MINUTE_US, monkeypatch)
    early = await engine_on(url, tmp_path, 10 * MINUTE_US, monkeypatch)
    sessions = [StoreSession(late, kind="worker"), StoreSession(early, kind="worker")]
    try:
        for session in sessions:
            await session.start()
        assert abs(late.clock.now_us() - early.clock.now_us()) < MINUTE_US
        now_us = late.clock.now_us()
        batch, _ = await late.store.create_batch(NewBatch(id=new_batch_id(now_us)), now_us=now_us)
        coalescer = Coalescer(runs_max=256, bytes_max=1 << 20)
        for index in range(10):
            coalescer.add(index, b"0", Key("task", due_us=now_us + 5 * MINUTE_US if index == 9 else 0))
        await late.store.append(batch.id, coalescer.flush(), now_us=now_us)
        await late.store.seal(batch.id, 10, now_us=now_us)
        (lease,) = await sessions[0].claim(["task"], None, 100)
        assert await sessions[1].claim(["task"], None, 100) == [], (
            "expected the run that is due in five minutes to stay unclaimed on this host too"
        )
        assert lease.count == 9
        for session in sessions:
            assert await session.recover() == 0, (
                "expected the live session to stay, although the clocks of its host differed"
            )
    finally:
        for session in sessions:
            await session.stop()
        assert await invariants.faults(late.store, "default") == []
        await late.close()
        await early.close()


async def test_each_heartbeat_sets_a_clock_that_was_moved_back_to_the_time_of_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await engine_on(fresh_schema(tmp_path), tmp_path, 0, monkeypatch)
    session = StoreSession(engine, kind="worker")
    heartbeat_received = asyncio.Event()
    session.on_unwanted = lambda _: heartbeat_received.set()
    await session.start()
    try:
        true_us = engine.clock.now_us()
        engine.clock.anchor(true_us - 30 * MINUTE_US)  # a suspended machine: its clock stopped
        engine.clock._anchor = engine.clock._anchor._replace(floor_us=0)  # type: ignore[attr-defined]
        assert engine.clock.now_us() < true_us
        heartbeat_received.clear()
        await heartbeat_received.wait()
        assert engine.clock.now_us() >= true_us
    finally:
        await session.stop()
        await engine.close()
