"""Conformance of every store: sessions record what they serve, and waiting runs that no live worker takes are found."""

from __future__ import annotations

import pytest

from headrace.core.serving import CLAIMS_DECIDE, NAMES_MAX, Serving, StalledLane
from headrace.core.span import Key
from headrace.store.protocol import LeaseLoad, MaintainStore
from tests.support.store_rig import StoreRig

KEY = Key(task="task", queue="default")


async def stalled(rig: StoreRig, batch_id: str = "") -> list[tuple[str, str, str]]:
    lanes = await rig.store.stalled_lanes("default", batch_id=batch_id, now_us=rig.now_us)
    assert all(type(lane) is StalledLane for lane in lanes)
    return [(lane.queue, lane.task, lane.reason) for lane in lanes]


async def test_a_batch_without_a_live_worker_is_found(rig: StoreRig) -> None:
    batch_id = await rig.filled(300)
    assert await stalled(rig, batch_id) == [("default", "task", "no_worker")]
    producer = await rig.session("producer")
    assert await stalled(rig) == [("default", "task", "no_worker")], "a producer serves nothing"
    await rig.store.end_session(producer, now_us=rig.now_us)
    await rig.session(serves=Serving(tasks=("task",)))
    assert await stalled(rig, batch_id) == []
    assert await stalled(rig) == []


async def test_a_task_that_no_live_worker_knows_and_a_queue_that_none_takes_are_found(rig: StoreRig) -> None:
    await rig.filled(2)
    other = await rig.filled(2, key=KEY._replace(task="other", queue="slow"))
    await rig.session(serves=Serving(tasks=("task", "third"), queues=("default",)))
    assert await stalled(rig) == [("slow", "other", "unknown_task")]
    await rig.session(serves=Serving(tasks=("other",), queues=("default",)))
    assert await stalled(rig, other) == [("slow", "other", "other_queues")]
    await rig.session(serves=Serving())
    assert await stalled(rig) == []


async def test_a_heartbeat_adds_the_lanes_that_a_worker_claims_from(rig: StoreRig) -> None:
    if not isinstance(rig.store, MaintainStore):
        pytest.skip("a server adds the lanes of its clients")
    await rig.filled(2)
    session_id = await rig.session(serves=CLAIMS_DECIDE)
    assert await stalled(rig) == [("default", "task", "unknown_task")]
    for task, queues, expected in (
        ("other", ("slow",), [("default", "task", "unknown_task")]),
        ("task", ("slow",), [("default", "task", "other_queues")]),
        ("task", ("default",), []),
        ("other", None, []),
    ):
        serves = Serving(tasks=(task,), queues=queues)
        await rig.store.heartbeat(session_id, now_us=rig.now_us, serves=serves)
        assert await stalled(rig) == expected
    (session,) = [session for session in await rig.store.sessions() if session.id == session_id]
    assert session.serves == Serving(tasks=("other", "task"))
    await rig.store.heartbeat(session_id, now_us=rig.now_us, serves=Serving(tasks=tuple(map(str, range(NAMES_MAX)))))
    (session,) = [session for session in await rig.store.sessions() if session.id == session_id]
    assert session.serves == Serving(), "too many names become all"


async def test_lanes_are_added_to_no_session_that_serves_nothing(rig: StoreRig) -> None:
    if not isinstance(rig.store, MaintainStore):
        pytest.skip("a server adds the lanes of its clients")
    session_id = await rig.session("producer")
    await rig.store.heartbeat(session_id, now_us=rig.now_us, serves=Serving(tasks=("task",)))
    assert [session.serves for session in await rig.store.sessions()] == [None]


async def test_a_worker_without_heartbeats_serves_nothing(rig: StoreRig) -> None:
    await rig.filled(1)
    session_id = await rig.session(serves=Serving())
    rig.later(16)
    assert await stalled(rig) == [("default", "task", "no_worker")]
    await rig.store.heartbeat(session_id, now_us=rig.now_us)
    assert await stalled(rig) == []


async def test_runs_that_have_ended_or_are_leased_or_delayed_are_not_stalled(rig: StoreRig) -> None:
    batch_id = await rig.filled(1, key=KEY._replace(due_us=rig.now_us + 60_000_000))
    assert await stalled(rig, batch_id) == []
    ended = await rig.filled(1)
    session_id = await rig.session()
    (lease,) = await rig.claim(session_id)
    assert await stalled(rig, ended) == []
    await rig.settle(lease)
    assert await stalled(rig) == []


async def test_a_paused_queue_is_named_as_such(rig: StoreRig) -> None:
    batch_id = await rig.filled(1)
    await rig.session(serves=Serving())
    await rig.store.pause_queue("default", "default", paused=True)
    assert await stalled(rig, batch_id) == [("default", "task", "paused")]


async def test_sessions_are_listed_with_what_they_serve_and_how_much_they_hold(rig: StoreRig) -> None:
    if not isinstance(rig.store, MaintainStore):
        pytest.skip("a client of a server has no maintenance operations")
    serves = Serving(environment="other", tasks=("a", "b"), queues=("q",), queue_prefix="q", concurrency=7)
    named, plain = await rig.session(serves=serves), await rig.session()
    assert {session.id: session.serves for session in await rig.store.sessions()} == {named: serves, plain: None}
    await rig.filled(300)
    rig.later(1)
    leases = await rig.claim(plain)
    await rig.settle(leases[0])
    assert await rig.store.lease_loads() == {plain: LeaseLoad(44, rig.now_us)}
