"""What every store promises of runs: how they are handed out and settled, in which order, tried again and cancelled.

It goes on where `test_conformance.py` ends, and is held in the same way.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

from headrace.core.block import Extra
from headrace.core.span import Key
from headrace.foundation.errors import (
    Conflict,
    SessionEnded,
    StoreUnavailable,
)
from headrace.store.protocol import NewBatch, Release, Session
from tests.support.store_rig import BOOM, NOBODY, SECOND_US, UNKNOWN, World, indexes_of, settlement_of

# -- 3: at least once to run, at most once to record (rules R1, R2, R3, R5)


async def test_r1_a_claim_repeated_after_a_lost_answer_returns_the_same_spans(world: World) -> None:
    await world.filled(700)
    session_id = await world.session()
    first = await world.claim(session_id, 300, claim_no=1)
    again = await world.claim(session_id, 300, claim_no=1)
    assert again == first
    assert indexes_of(first) == list(range(300))
    assert indexes_of(await world.claim(session_id, 300, claim_no=2)) == list(range(300, 600))


async def test_r1_a_claim_repeated_is_in_the_same_order(world: World) -> None:
    batch_id = await world.batch(6)
    await world.append(batch_id, [4, 5])
    await world.append(batch_id, [0, 1, 2, 3])
    session_id = await world.session()
    first = await world.claim(session_id, 5, claim_no=1)
    assert indexes_of(first) == [0, 1, 2, 3, 4]
    assert await world.claim(session_id, 5, claim_no=1) == first


async def test_r1_a_heartbeat_tells_what_the_store_thinks_is_leased(world: World) -> None:
    await world.filled(600)
    session_id = await world.session()
    held = await world.claim(session_id, 600, claim_no=9)
    await world.settle(held[0])
    beat = await world.store.heartbeat(session_id, now_us=world.later(1))
    assert sorted(beat.leases) == sorted((lease.span_id, lease.token, 9) for lease in held[1:])
    assert (beat.stopped, beat.cancelled) == ([], [])


async def test_r2_a_settlement_repeated_answers_recorded_and_a_stale_token_lost(world: World) -> None:
    batch_id, session_id = await world.filled(2), await world.session()
    (lease,) = await world.claim(session_id)
    assert await world.settle(lease, "f", span_slots=[0]) == "settled"
    assert await world.settle(lease, "f", span_slots=[0]) == "recorded"
    assert await world.release(lease) == "settled"
    assert await world.release(lease) == "lost"
    assert await world.settle(lease, "c", span_slots=[1], part_no=1) == "lost"
    (newer,) = await world.claim(session_id)
    assert (newer.span_id, newer.span_slots, newer.token > lease.token) == (lease.span_id, [1], True)
    assert await world.settle(lease, "f", span_slots=[1], part_no=1) == "lost"
    assert await world.release(lease) == "lost", "nor does it take the newer lease away"
    assert await world.settle(lease, "f", span_slots=[0]) == "recorded", "what was recorded stays so"
    assert await world.settle(newer) == "settled"
    assert await world.settle(newer) == "recorded"
    assert await world.states(batch_id) == ["failed", "completed"]


async def test_r2_one_call_settles_many_and_tells_each(world: World) -> None:
    await world.filled(700)
    session_id = await world.session()
    first, second, third = await world.claim(session_id)
    await world.settle(first)
    await world.release(second)
    parts = [settlement_of(third, span_slots=[0, 1]), settlement_of(third, span_slots=[0, 1])]
    words = await world.store.settle(
        [settlement_of(first), settlement_of(second), *parts, settlement_of(third, span_slots=[2], part_no=1)],
        now_us=world.now_us,
    )
    assert words == ["recorded", "lost", "settled", "recorded", "settled"]


async def test_r19_part_of_a_lease_goes_back_and_the_rest_goes_on(world: World) -> None:
    batch_id, slow, idle = await world.filled(10), await world.session(), await world.session()
    (lease,) = await world.claim(slow)
    some = Release(span_id=lease.span_id, token=lease.token, span_slots=(4, 5, 6, 7, 8, 9))
    assert await world.settle(lease, "c", span_slots=[0]) == "settled"
    for _ in range(2):  # its answer may get lost
        assert await world.store.release([some], crashes_max=1, now_us=world.now_us) == ["settled"]
    assert indexes_of(await world.claim(idle, 4)) == [4, 5, 6, 7]
    assert await world.states(batch_id) == ["completed", *["leased"] * 7, "waiting", "waiting"]
    view = await world.store.run(batch_id, 5)
    assert (view.attempt, view.crashes_count) == (1, 0)
    assert await world.settle(lease, "fcc", span_slots=[1, 2, 3], part_no=1) == "settled"
    assert await world.store.release([some], crashes_max=1, now_us=world.now_us) == ["lost"], "the lease has ended"
    world.later(60)
    assert await world.recover(idle, NOBODY) == 1
    assert sorted(await world.run_all(slow)) == [4, 5, 6, 7, 8, 9]


async def test_r19_what_goes_back_to_a_stopped_batch_is_cancelled(world: World) -> None:
    batch_id, session_id = await world.filled(4), await world.session()
    (lease,) = await world.claim(session_id)
    await world.store.stop_batch(batch_id, "cancelled", now_us=world.now_us)
    some = Release(span_id=lease.span_id, token=lease.token, span_slots=(2, 3))
    assert await world.store.release([some], crashes_max=1, now_us=world.now_us) == ["settled"]
    assert await world.states(batch_id) == ["leased", "leased", "cancelled", "cancelled"]
    assert await world.settle(lease, "cf", span_slots=[0, 1]) == "settled"
    assert await world.states(batch_id) == ["completed", "failed", "cancelled", "cancelled"]


async def test_a_lost_lease_settles_nothing(world: World) -> None:
    batch_id, dead, heir = await world.filled(3), await world.session(), await world.session()
    (lease,) = await world.claim(dead)
    world.later(60)
    assert await world.recover(dead, NOBODY) == 1
    assert await world.settle(lease) == "lost"
    assert await world.settle(lease, object_keys=["result"]) == "lost"
    assert await world.store.unnamed(["result"]) == ["result"]
    assert await world.states(batch_id) == ["waiting"] * 3
    assert await world.run_all(heir) == [0, 1, 2]


async def test_r3_a_claim_needs_a_live_session(world: World) -> None:
    await world.filled(1)
    with pytest.raises(SessionEnded):
        await world.claim("session_nobody")
    session_id = await world.session()
    await world.store.end_session(session_id, now_us=world.now_us)
    await world.store.end_session(session_id, now_us=world.now_us)
    with pytest.raises(SessionEnded):
        await world.claim(session_id)
    with pytest.raises(SessionEnded):
        await world.store.heartbeat(session_id, now_us=world.now_us)


async def test_r3_recover_ends_the_session_first_and_once(world: World) -> None:
    await world.filled(600)
    dead = await world.session()
    await world.claim(dead)
    alive = await world.store.recover(
        dead, UNKNOWN, silent_since_us=world.now_us - 1, crashes_max=3, now_us=world.later(1)
    )
    assert alive == 0
    assert await world.recover(dead) == 3
    assert await world.recover(dead) == 0
    with pytest.raises(SessionEnded):
        await world.claim(dead)
    assert await world.store.sessions() == []
    assert await world.recover("session_nobody") == 0


async def test_r3_a_heartbeat_keeps_a_session_alive(world: World) -> None:
    session_id = await world.session()
    before_us = world.now_us
    await world.store.heartbeat(session_id, now_us=world.later(1))
    assert (await world.store.sessions())[0].heartbeat_us == world.now_us
    assert (
        await world.store.recover(session_id, UNKNOWN, silent_since_us=before_us, crashes_max=3, now_us=world.later(1))
        == 0
    )
    await world.store.heartbeat(session_id, now_us=before_us)
    assert (await world.store.sessions())[0].heartbeat_us > before_us, "a late sign of life takes nothing back"


async def test_r3_session_ids_are_never_reused(world: World) -> None:
    session = Session(id="session_one", kind="cli", host="h", pid=2, started_us=5)
    await world.store.start_session(session, now_us=world.now_us)
    await world.store.start_session(session, now_us=world.now_us)  # after a lost answer
    assert [known.id for known in await world.store.sessions()] == ["session_one"]
    await world.store.end_session(session.id, now_us=world.now_us)
    with pytest.raises(SessionEnded):
        await world.store.start_session(session, now_us=world.later(1))
    assert await world.store.sessions() == []


async def test_a_session_that_ends_in_good_order_gives_its_leases_back(world: World) -> None:
    batch_id, session_id = await world.filled(300), await world.session()
    leases = await world.claim(session_id)
    await world.settle(leases[0], "cc", span_slots=[0, 1])
    await world.store.end_session(session_id, now_us=world.now_us)
    heir = await world.session()
    again = await world.claim(heir)
    assert indexes_of(again) == list(range(2, 300))
    assert {(lease.crashes_count, lease.attempt) for lease in again} == {(0, 1)}
    assert (await world.store.batch(batch_id))[1].leased == 298


async def test_r5_an_at_most_once_run_that_was_handed_out_never_runs_again(world: World) -> None:
    batch_id = await world.filled(3, key=Key("task", at_most_once=True))
    dead, heir = await world.session(), await world.session()
    (lease,) = await world.claim(dead, 2)
    assert (lease.at_most_once, indexes_of([lease])) == (True, [0, 1])
    assert await world.states(batch_id) == ["started", "started", "waiting"], "durable in the claim"
    assert await world.claim(dead, 2, claim_no=1) == [lease]
    assert await world.recover(dead) == 1
    assert indexes_of(await world.claim(heir)) == [2]
    outcomes = await world.outcomes(batch_id)
    assert [json.loads(outcome.result)["type"] for outcome in outcomes] == ["WorkerLost"] * 2


async def test_r5_an_at_most_once_run_known_not_to_have_started_comes_back(world: World) -> None:
    batch_id = await world.filled(2, key=Key("task", at_most_once=True))
    session_id = await world.session()
    (lease,) = await world.claim(session_id)
    assert await world.release(lease, suspects=[1]) == "settled"
    assert await world.states(batch_id) == ["waiting", "failed"]
    (again,) = await world.claim(session_id)
    assert await world.settle(again, "e") == "settled"
    assert await world.states(batch_id) == ["expired", "failed"]


# -- 6 and R9: order is virtual time


async def test_order_inside_a_batch_is_by_index_though_chunks_arrived_reversed(world: World) -> None:
    batch_id = await world.batch(1_000)
    for start in reversed(range(0, 1_000, 100)):
        await world.append(batch_id, range(start, start + 100))
    assert await world.run_all(await world.session(), runs_max=150) == list(range(1_000))


async def test_a_small_batch_is_not_stuck_behind_a_big_one(world: World) -> None:
    big, session_id = await world.filled(5_000), await world.session()
    await world.claim(session_id, 256)
    small = await world.filled(10)
    leases = await world.claim(session_id, 600)
    assert small in [lease.batch_id for lease in leases]
    assert big in [lease.batch_id for lease in leases]


async def test_batches_that_run_together_share_evenly(world: World) -> None:
    ids = [await world.filled(1_000, runs_max=50) for _ in range(3)]
    session_id = await world.session()
    leases = await world.claim(session_id, 600)
    shares = {
        batch_id: sum(len(lease.span_slots) for lease in leases if lease.batch_id == batch_id) for batch_id in ids
    }
    assert set(shares.values()) == {200}


async def test_priority_comes_first(world: World) -> None:
    batch_id = await world.batch(4)
    await world.append(batch_id, range(4), key=lambda index: Key("task", priority=index))
    assert indexes_of(await world.claim(await world.session())) == [3, 2, 1, 0]


async def test_r9_claims_merge_lanes_of_queues_and_tasks(world: World) -> None:
    batch_id = await world.batch(8)
    lanes = [("a", "red"), ("b", "red"), ("a", "blue"), ("b", "blue")]
    await world.append(batch_id, range(8), key=lambda index: Key(*lanes[index % 4]), runs_max=1)
    session_id = await world.session()
    red = await world.claim(session_id, tasks=["a", "b"], queues=["red"])
    assert indexes_of(red) == [0, 1, 4, 5]
    for lease in red:
        await world.release(lease)
    assert indexes_of(await world.claim(session_id, 1, tasks=["b"], queues=["red"])) == [1]
    assert await world.claim(session_id, tasks=["c"]) == []
    assert sorted(indexes_of(await world.claim(session_id, tasks=["a", "b"]))) == [0, 2, 3, 4, 5, 6, 7]


async def test_r9_many_small_spans_of_one_lane_are_not_passed_over_for_a_later_one_of_another(world: World) -> None:
    batch_id = await world.batch()
    await world.append(batch_id, range(6), runs_max=1)
    await world.append(batch_id, [11], key=Key("task", queue="side"))
    assert indexes_of(await world.claim(await world.session(), 3)) == [0, 1, 2]


async def test_r9_a_claim_that_meets_a_cancelled_batch_sweeps_it(world: World) -> None:
    big = await world.batch(1_500)
    await world.append(big, range(1_500), runs_max=1)
    after = await world.filled(3)
    await world.store.stop_batch(big, "cancelled", now_us=world.now_us)
    assert (await world.store.batch(big))[1].waiting == 500, "the first sweep is bounded"
    leases = await world.claim(await world.session(), 600)
    assert {lease.batch_id for lease in leases} == {after}
    assert (await world.store.batch(big))[0].is_finished


async def test_r14_a_claim_does_not_touch_the_batch_row(world: World) -> None:
    batch_id, session_id = await world.filled(300), await world.session()
    before, _ = await world.store.batch(batch_id)
    await world.claim(session_id, 100)
    after, ledger = await world.store.batch(batch_id)
    assert after == before
    assert (ledger.leased, ledger.waiting) == (100, 200), "leased is derived from spans"


async def test_a_small_claim_leaves_the_rest_claimable(world: World) -> None:
    batch_id, session_id = await world.filled(256), await world.session()
    (small,) = await world.claim(session_id, 8)
    assert (indexes_of([small]), small.whole, small.runs_count) == (list(range(8)), False, 8)
    assert indexes_of(await world.claim(session_id)) == list(range(8, 256))
    await world.settle(small, "f")
    assert await world.states(batch_id) == ["failed"] * 8 + ["leased"] * 248


async def test_a_released_span_goes_to_the_head_of_the_line(world: World) -> None:
    await world.filled(1_000)
    session_id = await world.session()
    first, second = await world.claim(session_id, 512)
    await world.settle(second)
    await world.release(first)
    assert indexes_of(await world.claim(session_id, 256)) == list(range(256))


async def test_environments_do_not_meet(world: World) -> None:
    batch_id = await world.batch(1, environment="staging")
    await world.append(batch_id, [0])
    session_id = await world.session()
    assert await world.claim(session_id) == []
    assert await world.store.runs("default") == []
    assert await world.store.queues("default") == []
    assert indexes_of(await world.claim(session_id, environment="staging")) == [0]


async def test_a_paused_queue_hands_out_nothing(world: World) -> None:
    await world.store.pause_queue("default", "slow", paused=True)
    batch_id = await world.batch(2)
    await world.append(batch_id, range(2), key=lambda index: Key("task", queue=["slow", "fast"][index]))
    session_id = await world.session()
    assert indexes_of(await world.claim(session_id)) == [1]
    await world.store.pause_queue("default", "slow", paused=False)
    assert indexes_of(await world.claim(session_id)) == [0]


# -- retries, delays, expiry


async def test_a_retry_waits_for_its_time_and_then_heads_the_line(world: World) -> None:
    batch_id, session_id = await world.filled(600, runs_max=200), await world.session()
    (lease,) = await world.claim(session_id, 200)
    codes = "r" * 3 + "c" * 197
    await world.settle(lease, codes, dues_us=[world.now_us + 10 * SECOND_US] * 3)
    assert (await world.states(batch_id))[:4] == ["delayed"] * 3 + ["completed"]
    due_us = await world.store.next_due_us("default", ["task"])
    assert due_us is not None
    assert 10 * SECOND_US <= due_us - world.now_us <= 10.5 * SECOND_US
    assert indexes_of(await world.claim(session_id, 100)) == list(range(200, 300))
    world.now_us = due_us
    again, *_ = await world.claim(session_id, 100)
    assert (again.indexes, again.attempt) == ([0, 1, 2], 2), "those due together wait in one span"
    assert await world.store.next_due_us("default", ["task"]) is None
    await world.settle(again)
    assert (await world.store.run(batch_id, 0)).attempts[0]["ended"] == "retried"


async def test_a_retry_that_is_due_at_once_is_claimable_at_once(world: World) -> None:
    await world.filled(2)
    session_id = await world.session()
    (lease,) = await world.claim(session_id)
    await world.settle(lease, "rc", dues_us=[world.now_us])
    (again,) = await world.claim(session_id)
    assert (again.indexes, again.attempt) == ([0], 2)


async def test_retries_of_many_moments_share_few_spans(world: World) -> None:
    await world.filled(200)
    session_id = await world.session()
    (lease,) = await world.claim(session_id)
    dues = [world.now_us + 100 * SECOND_US + 1_000 * number for number in range(200)]
    await world.settle(lease, "r", dues_us=dues)
    world.later(110)
    assert len(await world.claim(session_id)) == 1


async def test_a_delayed_run_waits_and_an_expired_one_never_starts(world: World) -> None:
    batch_id = await world.batch(3)
    soon, late = world.now_us + 5 * SECOND_US, world.now_us + 9 * SECOND_US
    keys = [Key("task"), Key("task", due_us=soon), Key("task", expires_us=soon)]
    await world.append(batch_id, range(3), key=keys.__getitem__)
    session_id = await world.session()
    world.now_us = late
    leases = await world.claim(session_id, 2)
    assert indexes_of(leases) == [0, 1], "an expired span at the head of the line hides nobody"
    swept = await world.store.sweep(now_us=world.now_us, rows_max=100)
    assert swept.expired_count == 1
    assert (await world.states(batch_id))[2] == "expired"


# -- cancellation


async def test_a_cancelled_batch_ends_when_its_last_lease_has_ended(world: World) -> None:
    batch_id, session_id = await world.filled(600), await world.session()
    (lease,) = await world.claim(session_id, 256)
    cancelled = await world.store.stop_batch(batch_id, "cancelled", now_us=world.now_us)
    assert (cancelled.state, cancelled.is_finished) == ("cancelled", False)
    assert (await world.store.heartbeat(session_id, now_us=world.now_us)).stopped == [batch_id]
    assert await world.settle(lease, "c" * 100 + "r" * 100 + "x" * 56) == "settled"
    batch, ledger = await world.store.batch(batch_id)
    assert (batch.is_finished, ledger.completed, ledger.cancelled) == (True, 100, 500)
    assert (await world.store.stop_batch(batch_id, "abandoned", now_us=world.now_us)).state == "cancelled"
    with pytest.raises(Conflict):
        await world.append(batch_id, [0])
    with pytest.raises(Conflict):
        await world.store.redrive(batch_id, None)
    with pytest.raises(Conflict):
        await world.store.seal(batch_id, None, now_us=world.now_us)


async def test_a_lease_of_a_cancelled_batch_that_is_given_back_ends_it(world: World) -> None:
    batch_id, session_id = await world.filled(10), await world.session()
    (lease,) = await world.claim(session_id)
    await world.store.stop_batch(batch_id, "cancelled", now_us=world.now_us)
    await world.release(lease, suspects=[0, 1])
    assert (await world.store.batch(batch_id))[0].is_finished
    assert await world.states(batch_id) == ["cancelled"] * 10


async def test_a_batch_that_has_ended_stays_as_it_is(world: World) -> None:
    batch_id = await world.filled(1)
    await world.run_all(await world.session())
    assert (await world.store.stop_batch(batch_id, "cancelled", now_us=world.now_us)).state == "completed"


async def test_an_open_batch_is_cancelled_with_what_it_has(world: World) -> None:
    batch_id = await world.batch(10)
    await world.append(batch_id, range(4))
    assert (await world.store.stop_batch(batch_id, "cancelled", now_us=world.now_us)).is_finished
    ledger = (await world.store.batch(batch_id))[1]
    assert (ledger.cancelled, ledger.missing) == (4, 6)


async def test_single_runs_are_cancelled_at_once_or_when_their_worker_hears_of_it(world: World) -> None:
    batch_id = await world.batch(7)
    await world.append(batch_id, range(7), key=lambda index: Key("task", due_us=(index == 6) * (world.now_us + 9)))
    session_id = await world.session()
    (lease,) = await world.claim(session_id, 4)
    assert await world.store.cancel_runs(batch_id, [1, 2, 5, 6], now_us=world.now_us) == 4
    assert await world.states(batch_id) == ["leased"] * 4 + ["waiting", "cancelled", "cancelled"]
    beat = await world.store.heartbeat(session_id, now_us=world.now_us)
    assert sorted(beat.cancelled) == [(batch_id, 1), (batch_id, 2)]
    await world.settle(lease, "xr", span_slots=[1, 2], dues_us=[world.now_us])
    await world.release(lease)
    assert await world.states(batch_id) == [
        "waiting",
        "cancelled",
        "cancelled",
        "waiting",
        "waiting",
        "cancelled",
        "cancelled",
    ]
    assert await world.store.cancel_runs(batch_id, [1], now_us=world.now_us) == 0


async def test_a_run_asked_to_cancel_is_cancelled_when_its_lease_is_given_back(world: World) -> None:
    batch_id, session_id = await world.filled(3), await world.session()
    (lease,) = await world.claim(session_id)
    await world.store.cancel_runs(batch_id, [0, 2], now_us=world.now_us)
    await world.release(lease, suspects=[0, 1])
    assert await world.states(batch_id) == ["cancelled", "waiting", "cancelled"]


async def test_a_closed_store_says_so(world: World) -> None:
    await world.store.close()
    await world.store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await world.batch()
    with pytest.raises(StoreUnavailable, match="closed"):
        await world.store.sessions()
    await world.store.open()
    assert await world.store.check()


async def test_r3_an_ended_session_can_own_no_new_batch(world: World) -> None:
    session_id = await world.session()
    stream = await world.batch(kind="stream", session_id=session_id)
    await world.store.end_session(session_id, now_us=world.now_us)
    with pytest.raises(SessionEnded):
        await world.batch(kind="stream", session_id=session_id)
    with pytest.raises(SessionEnded):
        await world.batch(session_id="session_of_nobody")
    found, created = await world.store.create_batch(
        NewBatch(id=stream, kind="stream", session_id=session_id), now_us=world.now_us
    )
    assert (found.id, created) == (stream, False), "a creation whose answer was lost may be asked for again"


async def test_a_batch_ends_with_the_session_that_fed_it(world: World) -> None:
    session_id = await world.session()
    stream = await world.batch(kind="stream", session_id=session_id)
    fed = await world.batch(session_id=session_id)
    for batch_id in (stream, fed):
        await world.append(batch_id, range(3))
    (lease, *_) = await world.claim(await world.session(), 2)
    world.later(60)
    assert (
        await world.store.recover(session_id, NOBODY, silent_since_us=world.now_us, crashes_max=3, now_us=world.now_us)
        == 0
    )
    assert [(await world.store.batch(batch_id))[0].state for batch_id in (stream, fed)] == ["sealed", "abandoned"]
    await world.settle(lease)
    await world.store.sweep(now_us=world.now_us, rows_max=100)
    assert await world.states(fed) == ["cancelled"] * 3, "nobody else could send the rest"
    assert (await world.store.batch(fed))[0].is_finished
    assert "cancelled" not in await world.states(stream), "all of it was asked for"


async def test_a_run_without_a_readable_input_is_not_redriven(world: World) -> None:
    batch_id = await world.batch(4)
    await world.append(batch_id, range(4), extras={1: Extra(failure=BOOM)})
    await world.store.seal(batch_id, None, now_us=world.now_us)
    (lease,) = await world.claim(await world.session())
    await world.settle(lease, "f")
    assert await world.states(batch_id) == ["failed"] * 4
    assert await world.store.redrive(batch_id, [1]) == 0, "there is nothing to run"
    assert await world.store.redrive(batch_id, None) == 3
    assert await world.states(batch_id) == ["waiting", "failed", "waiting", "waiting"]


async def test_a_queue_that_was_never_used_does_not_starve_one_that_was(world: World) -> None:
    old = await world.batch()
    await world.append(old, range(3_000), key=lambda _: Key("task", queue="old"))
    session_id = await world.session()
    taken = await world.claim(session_id, 1_000)
    assert indexes_of(taken) == list(range(1_000))
    new = await world.batch()
    await world.append(new, range(2_000), key=lambda _: Key("task", queue="new"))
    shared = await world.claim(session_id, 1_024)
    counts = Counter(lease.queue for lease in shared for _ in lease.span_slots)
    assert abs(counts["old"] - counts["new"]) <= 256, "within a chunk, both have the same share"
