"""Conformance of every store, part 2: claims, settlements, order, retries and cancellation."""

from __future__ import annotations

import json
from collections import Counter

import msgspec
import pytest

from headrace.core.block import Extra
from headrace.core.span import Key
from headrace.foundation.errors import (
    Conflict,
    SessionEnded,
    StoreUnavailable,
)
from headrace.foundation.ids import new_session_id
from headrace.store.protocol import Claim, NewBatch, Release, Session, SessionOwner
from tests.support.store_rig import BOOM, NO_SUSPECTS, SECOND_US, UNKNOWN_SUSPECTS, StoreRig, indexes_of, settlement_of

# -- promise 3: a run is executed at least once and recorded at most once


async def test_r1_a_claim_repeated_after_a_lost_answer_returns_the_same_spans(rig: StoreRig) -> None:
    await rig.filled(700)
    session_id = await rig.session()
    first = await rig.claim(session_id, 300, claim_no=1)
    again = await rig.claim(session_id, 300, claim_no=1)
    assert again == first
    assert indexes_of(first) == list(range(300))
    assert indexes_of(await rig.claim(session_id, 300, claim_no=2)) == list(range(300, 600))


async def test_r1_a_claim_repeated_is_in_the_same_order(rig: StoreRig) -> None:
    batch_id = await rig.batch(6)
    await rig.append(batch_id, [4, 5])
    await rig.append(batch_id, [0, 1, 2, 3])
    session_id = await rig.session()
    first = await rig.claim(session_id, 5, claim_no=1)
    assert indexes_of(first) == [0, 1, 2, 3, 4]
    assert await rig.claim(session_id, 5, claim_no=1) == first


async def test_r1_a_heartbeat_returns_the_leases_of_the_store(rig: StoreRig) -> None:
    await rig.filled(600)
    session_id = await rig.session()
    held = await rig.claim(session_id, 600, claim_no=9)
    await rig.settle(held[0])
    beat = await rig.store.heartbeat(session_id, now_us=rig.later(1))
    assert sorted(beat.leases) == sorted((lease.span_id, lease.token, 9) for lease in held[1:])
    assert (beat.stopped, beat.cancelled) == ([], [])


async def test_r2_a_repeated_settlement_returns_recorded_and_a_stale_token_lost(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(2), await rig.session()
    (lease,) = await rig.claim(session_id)
    assert await rig.settle(lease, "f", span_slots=[0]) == "settled"
    assert await rig.settle(lease, "f", span_slots=[0]) == "recorded"
    assert await rig.release(lease) == "settled"
    assert await rig.release(lease) == "lost"
    assert await rig.settle(lease, "c", span_slots=[1], part_no=1) == "lost"
    (newer,) = await rig.claim(session_id)
    assert (newer.span_id, newer.span_slots, newer.token > lease.token) == (lease.span_id, [1], True)
    assert await rig.settle(lease, "f", span_slots=[1], part_no=1) == "lost"
    assert await rig.release(lease) == "lost", "it does not end the newer lease either"
    assert await rig.settle(lease, "f", span_slots=[0]) == "recorded", "what was recorded stays recorded"
    assert await rig.settle(newer) == "settled"
    assert await rig.settle(newer) == "recorded"
    assert await rig.states(batch_id) == ["failed", "completed"]


async def test_r2_one_call_settles_many_leases_and_returns_a_result_for_each(rig: StoreRig) -> None:
    await rig.filled(700)
    session_id = await rig.session()
    first, second, third = await rig.claim(session_id)
    await rig.settle(first)
    await rig.release(second)
    parts = [settlement_of(third, span_slots=[0, 1]), settlement_of(third, span_slots=[0, 1])]
    words = await rig.store.settle(
        [settlement_of(first), settlement_of(second), *parts, settlement_of(third, span_slots=[2], part_no=1)],
        now_us=rig.now_us,
    )
    assert words == ["recorded", "lost", "settled", "recorded", "settled"]


async def test_r19_part_of_a_lease_is_released_and_the_rest_continues(rig: StoreRig) -> None:
    batch_id, slow, idle = await rig.filled(10), await rig.session(), await rig.session()
    (lease,) = await rig.claim(slow)
    some = Release(span_id=lease.span_id, token=lease.token, span_slots=(4, 5, 6, 7, 8, 9))
    assert await rig.settle(lease, "c", span_slots=[0]) == "settled"
    for _ in range(2):  # its answer may be lost
        assert await rig.store.release([some], crashes_max=1, now_us=rig.now_us) == ["settled"]
    assert indexes_of(await rig.claim(idle, 4)) == [4, 5, 6, 7]
    assert await rig.states(batch_id) == ["completed", *["leased"] * 7, "waiting", "waiting"]
    view = await rig.store.run(batch_id, 5)
    assert (view.attempt, view.crashes_count) == (1, 0)
    assert await rig.settle(lease, "fcc", span_slots=[1, 2, 3], part_no=1) == "settled"
    assert await rig.store.release([some], crashes_max=1, now_us=rig.now_us) == ["lost"], "the lease has ended"
    rig.later(60)
    assert await rig.recover(idle, NO_SUSPECTS) == 1
    assert sorted(await rig.run_all(slow)) == [4, 5, 6, 7, 8, 9]


async def test_r19_runs_released_to_a_stopped_batch_are_cancelled(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(4), await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.store.stop_batch(batch_id, "cancelled", now_us=rig.now_us)
    some = Release(span_id=lease.span_id, token=lease.token, span_slots=(2, 3))
    assert await rig.store.release([some], crashes_max=1, now_us=rig.now_us) == ["settled"]
    assert await rig.states(batch_id) == ["leased", "leased", "cancelled", "cancelled"]
    assert await rig.settle(lease, "cf", span_slots=[0, 1]) == "settled"
    assert await rig.states(batch_id) == ["completed", "failed", "cancelled", "cancelled"]


async def test_a_lost_lease_settles_nothing(rig: StoreRig) -> None:
    batch_id, dead, heir = await rig.filled(3), await rig.session(), await rig.session()
    (lease,) = await rig.claim(dead)
    rig.later(60)
    assert await rig.recover(dead, NO_SUSPECTS) == 1
    assert await rig.settle(lease) == "lost"
    assert await rig.settle(lease, object_keys=["result"]) == "lost"
    assert await rig.store.unnamed(["result"]) == ["result"]
    assert await rig.states(batch_id) == ["waiting"] * 3
    assert await rig.run_all(heir) == [0, 1, 2]


async def test_r3_a_claim_needs_a_live_session(rig: StoreRig) -> None:
    await rig.filled(1)
    with pytest.raises(SessionEnded):
        await rig.claim("session_nobody")
    session_id = await rig.session()
    await rig.store.end_session(session_id, now_us=rig.now_us)
    await rig.store.end_session(session_id, now_us=rig.now_us)
    with pytest.raises(SessionEnded):
        await rig.claim(session_id)
    with pytest.raises(SessionEnded):
        await rig.store.heartbeat(session_id, now_us=rig.now_us)


async def test_r3_recover_ends_the_session_first_and_once(rig: StoreRig) -> None:
    await rig.filled(600)
    dead = await rig.session()
    await rig.claim(dead)
    alive = await rig.store.recover(
        dead, UNKNOWN_SUSPECTS, silent_since_us=rig.now_us - 1, crashes_max=3, now_us=rig.later(1)
    )
    assert alive == 0
    assert await rig.recover(dead) == 3
    assert await rig.recover(dead) == 0
    with pytest.raises(SessionEnded):
        await rig.claim(dead)
    assert await rig.store.sessions() == []
    assert await rig.recover("session_nobody") == 0


async def test_r3_a_heartbeat_keeps_a_session_alive(rig: StoreRig) -> None:
    session_id = await rig.session()
    before_us = rig.now_us
    await rig.store.heartbeat(session_id, now_us=rig.later(1))
    assert (await rig.store.sessions())[0].heartbeat_us == rig.now_us
    assert (
        await rig.store.recover(
            session_id, UNKNOWN_SUSPECTS, silent_since_us=before_us, crashes_max=3, now_us=rig.later(1)
        )
        == 0
    )
    await rig.store.heartbeat(session_id, now_us=before_us)
    assert (await rig.store.sessions())[0].heartbeat_us > before_us, "a late heartbeat does not set the time back"


async def test_r3_session_ids_are_never_reused(rig: StoreRig) -> None:
    session = Session(id="session_one", kind="cli", host="h", pid=2, started_us=5)
    await rig.store.start_session(session, now_us=rig.now_us)
    await rig.store.start_session(session, now_us=rig.now_us)  # after a lost answer
    assert [session.id for session in await rig.store.sessions()] == ["session_one"]
    await rig.store.end_session(session.id, now_us=rig.now_us)
    with pytest.raises(SessionEnded):
        await rig.store.start_session(session, now_us=rig.later(1))
    assert await rig.store.sessions() == []


async def test_the_session_of_another_owner_is_answered_like_an_unknown_one(rig: StoreRig) -> None:
    await rig.filled(3)
    owner = SessionOwner("default", "key_a")
    session = Session(id="session_one", kind="remote", host="h", pid=2, started_us=5, **owner._asdict())
    await rig.store.start_session(session, now_us=rig.now_us)
    claim = Claim(
        session_id=session.id,
        claim_no=1,
        environment="default",
        tasks=["task"],
        queues=None,
        runs_max=9,
        key_id="key_a",
    )
    leases = await rig.store.claim(claim, now_us=rig.now_us)
    (stored,) = await rig.store.sessions()
    assert (stored.environment, stored.key_id) == owner
    await rig.store.stop_batch(leases[0].batch_id, "cancelled", now_us=rig.now_us)
    for other in (SessionOwner("default", "key_b"), SessionOwner("elsewhere", "key_a"), SessionOwner("default", "")):
        for refused in (
            rig.store.heartbeat(session.id, now_us=rig.now_us, owner=other),
            rig.store.claim(msgspec.structs.replace(claim, **other._asdict()), now_us=rig.now_us),
            rig.store.start_session(msgspec.structs.replace(session, **other._asdict()), now_us=rig.now_us),
        ):
            with pytest.raises(SessionEnded):
                await refused
        unwanted = await rig.store.unwanted_runs(session.id, owner=other)
        assert (unwanted.leases, unwanted.stopped) == ([], [])
        await rig.store.end_session(session.id, now_us=rig.now_us, owner=other)
    assert (await rig.store.unwanted_runs(session.id, owner=owner)).stopped == [leases[0].batch_id]
    assert len((await rig.store.heartbeat(session.id, now_us=rig.now_us, owner=owner)).leases) == len(leases)
    await rig.store.end_session(session.id, now_us=rig.now_us, owner=owner)
    assert await rig.store.sessions() == []


async def test_a_session_that_ends_regularly_releases_its_leases(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(300), await rig.session()
    leases = await rig.claim(session_id)
    await rig.settle(leases[0], "cc", span_slots=[0, 1])
    await rig.store.end_session(session_id, now_us=rig.now_us)
    heir = await rig.session()
    again = await rig.claim(heir)
    assert indexes_of(again) == list(range(2, 300))
    assert {(lease.crashes_count, lease.attempt) for lease in again} == {(0, 1)}
    assert (await rig.store.batch(batch_id))[1].leased == 298


async def test_r5_an_at_most_once_run_that_was_delivered_never_runs_again(rig: StoreRig) -> None:
    batch_id = await rig.filled(3, key=Key("task", at_most_once=True))
    dead, heir = await rig.session(), await rig.session()
    (lease,) = await rig.claim(dead, 2)
    assert (lease.at_most_once, indexes_of([lease])) == (True, [0, 1])
    assert await rig.states(batch_id) == ["started", "started", "waiting"], "recorded as started by the claim"
    assert await rig.claim(dead, 2, claim_no=1) == [lease]
    assert await rig.recover(dead) == 1
    assert indexes_of(await rig.claim(heir)) == [2]
    outcomes = await rig.outcomes(batch_id)
    assert [json.loads(outcome.result)["type"] for outcome in outcomes] == ["WorkerLost"] * 2


async def test_r5_an_at_most_once_run_that_did_not_start_is_claimable_again(rig: StoreRig) -> None:
    batch_id = await rig.filled(2, key=Key("task", at_most_once=True))
    session_id = await rig.session()
    (lease,) = await rig.claim(session_id)
    assert await rig.release(lease, suspects=[1]) == "settled"
    assert await rig.states(batch_id) == ["waiting", "failed"]
    (again,) = await rig.claim(session_id)
    assert await rig.settle(again, "e") == "settled"
    assert await rig.states(batch_id) == ["expired", "failed"]


# -- promise 6 and R9 (a claim sweeps spans of a cancelled batch): order is virtual time


async def test_order_inside_a_batch_is_by_index_though_chunks_arrived_reversed(rig: StoreRig) -> None:
    batch_id = await rig.batch(1_000)
    for start in reversed(range(0, 1_000, 100)):
        await rig.append(batch_id, range(start, start + 100))
    assert await rig.run_all(await rig.session(), runs_max=150) == list(range(1_000))


async def test_a_small_batch_does_not_wait_behind_a_large_one(rig: StoreRig) -> None:
    big, session_id = await rig.filled(5_000), await rig.session()
    await rig.claim(session_id, 256)
    small = await rig.filled(10)
    leases = await rig.claim(session_id, 600)
    assert small in [lease.batch_id for lease in leases]
    assert big in [lease.batch_id for lease in leases]


async def test_batches_that_run_together_share_evenly(rig: StoreRig) -> None:
    ids = [await rig.filled(1_000, runs_max=50) for _ in range(3)]
    session_id = await rig.session()
    leases = await rig.claim(session_id, 600)
    shares = {
        batch_id: sum(len(lease.span_slots) for lease in leases if lease.batch_id == batch_id) for batch_id in ids
    }
    assert set(shares.values()) == {200}


async def test_priority_comes_first(rig: StoreRig) -> None:
    batch_id = await rig.batch(4)
    await rig.append(batch_id, range(4), key=lambda index: Key("task", priority=index))
    assert indexes_of(await rig.claim(await rig.session())) == [3, 2, 1, 0]


async def test_r9_claims_merge_lanes_of_queues_and_tasks(rig: StoreRig) -> None:
    batch_id = await rig.batch(8)
    lanes = [("a", "red"), ("b", "red"), ("a", "blue"), ("b", "blue")]
    await rig.append(batch_id, range(8), key=lambda index: Key(*lanes[index % 4]), runs_max=1)
    session_id = await rig.session()
    red = await rig.claim(session_id, tasks=["a", "b"], queues=["red"])
    assert indexes_of(red) == [0, 1, 4, 5]
    for lease in red:
        await rig.release(lease)
    assert indexes_of(await rig.claim(session_id, 1, tasks=["b"], queues=["red"])) == [1]
    assert await rig.claim(session_id, tasks=["c"]) == []
    assert sorted(indexes_of(await rig.claim(session_id, tasks=["a", "b"]))) == [0, 2, 3, 4, 5, 6, 7]


async def test_r9_many_small_spans_of_one_lane_are_not_skipped_for_a_later_span_of_another(rig: StoreRig) -> None:
    batch_id = await rig.batch()
    await rig.append(batch_id, range(6), runs_max=1)
    await rig.append(batch_id, [11], key=Key("task", queue="side"))
    assert indexes_of(await rig.claim(await rig.session(), 3)) == [0, 1, 2]


async def test_r9_a_claim_that_meets_a_cancelled_batch_sweeps_it(rig: StoreRig) -> None:
    big = await rig.batch(1_500)
    await rig.append(big, range(1_500), runs_max=1)
    after = await rig.filled(3)
    await rig.store.stop_batch(big, "cancelled", now_us=rig.now_us)
    assert (await rig.store.batch(big))[1].waiting == 500, "the first sweep is bounded"
    leases = await rig.claim(await rig.session(), 600)
    assert {lease.batch_id for lease in leases} == {after}
    assert (await rig.store.batch(big))[0].is_finished


async def test_r14_a_claim_does_not_touch_the_batch_row(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(300), await rig.session()
    before, _ = await rig.store.batch(batch_id)
    await rig.claim(session_id, 100)
    after, ledger = await rig.store.batch(batch_id)
    assert after == before
    assert (ledger.leased, ledger.waiting) == (100, 200), "leased is derived from spans"


async def test_a_small_claim_leaves_the_rest_claimable(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(256), await rig.session()
    (small,) = await rig.claim(session_id, 8)
    assert (indexes_of([small]), small.whole, small.runs_count) == (list(range(8)), False, 8)
    assert indexes_of(await rig.claim(session_id)) == list(range(8, 256))
    await rig.settle(small, "f")
    assert await rig.states(batch_id) == ["failed"] * 8 + ["leased"] * 248


async def test_a_released_span_is_the_first_to_be_claimed(rig: StoreRig) -> None:
    await rig.filled(1_000)
    session_id = await rig.session()
    first, second = await rig.claim(session_id, 512)
    await rig.settle(second)
    await rig.release(first)
    assert indexes_of(await rig.claim(session_id, 256)) == list(range(256))


async def test_environments_are_separate(rig: StoreRig) -> None:
    batch_id = await rig.batch(1, environment="staging")
    await rig.append(batch_id, [0])
    session_id = await rig.session()
    assert await rig.claim(session_id) == []
    assert await rig.store.runs("default") == []
    assert await rig.store.queues("default") == []
    with pytest.raises(SessionEnded):
        await rig.claim(session_id, environment="staging")
    assert indexes_of(await rig.claim(await rig.session(environment="staging"), environment="staging")) == [0]


async def test_a_paused_queue_gives_no_runs_to_claims(rig: StoreRig) -> None:
    await rig.store.pause_queue("default", "slow", paused=True)
    batch_id = await rig.batch(2)
    await rig.append(batch_id, range(2), key=lambda index: Key("task", queue=["slow", "fast"][index]))
    session_id = await rig.session()
    assert indexes_of(await rig.claim(session_id)) == [1]
    await rig.store.pause_queue("default", "slow", paused=False)
    assert indexes_of(await rig.claim(session_id)) == [0]


# -- retries, delays, expiry


async def test_a_retry_waits_for_its_time_and_is_then_the_first_to_be_claimed(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(600, runs_max=200), await rig.session()
    (lease,) = await rig.claim(session_id, 200)
    codes = "r" * 3 + "c" * 197
    await rig.settle(lease, codes, dues_us=[rig.now_us + 10 * SECOND_US] * 3)
    assert (await rig.states(batch_id))[:4] == ["delayed"] * 3 + ["completed"]
    due_us = await rig.store.next_due_us("default", ["task"])
    assert due_us is not None
    assert 10 * SECOND_US <= due_us - rig.now_us <= 10.5 * SECOND_US
    assert indexes_of(await rig.claim(session_id, 100)) == list(range(200, 300))
    rig.now_us = due_us
    again, *_ = await rig.claim(session_id, 100)
    assert (again.indexes, again.attempt) == ([0, 1, 2], 2), "runs that are due together wait in one span"
    assert await rig.store.next_due_us("default", ["task"]) is None
    await rig.settle(again)
    assert (await rig.store.run(batch_id, 0)).attempts[0]["ended"] == "retried"


async def test_a_retry_that_is_due_at_once_is_claimable_at_once(rig: StoreRig) -> None:
    await rig.filled(2)
    session_id = await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.settle(lease, "rc", dues_us=[rig.now_us])
    (again,) = await rig.claim(session_id)
    assert (again.indexes, again.attempt) == ([0], 2)


async def test_retries_of_many_moments_share_few_spans(rig: StoreRig) -> None:
    await rig.filled(200)
    session_id = await rig.session()
    (lease,) = await rig.claim(session_id)
    dues = [rig.now_us + 100 * SECOND_US + 1_000 * number for number in range(200)]
    await rig.settle(lease, "r", dues_us=dues)
    rig.later(110)
    assert len(await rig.claim(session_id)) == 1


async def test_retries_whose_times_have_passed_when_they_are_recorded_share_a_span(rig: StoreRig) -> None:
    await rig.filled(200)
    session_id = await rig.session()
    for attempt in (1, 2):
        (lease,) = await rig.claim(session_id)  # one row for all runs, as a store that falls behind needs it
        assert (len(lease.span_slots), lease.attempt) == (200, attempt)
        await rig.settle(lease, "r", dues_us=[rig.now_us - 1_000 * number for number in range(200)])
    (lease,) = await rig.claim(session_id)
    assert (lease.indexes, lease.attempt) == (list(range(200)), 3)


async def test_a_delayed_run_waits_and_an_expired_one_never_starts(rig: StoreRig) -> None:
    batch_id = await rig.batch(3)
    soon, late = rig.now_us + 5 * SECOND_US, rig.now_us + 9 * SECOND_US
    keys = [Key("task"), Key("task", due_us=soon), Key("task", expires_us=soon)]
    await rig.append(batch_id, range(3), key=keys.__getitem__)
    session_id = await rig.session()
    rig.now_us = late
    leases = await rig.claim(session_id, 2)
    assert indexes_of(leases) == [0, 1], "an expired span at the head of the queue hides no other span"
    swept = await rig.store.sweep(now_us=rig.now_us, rows_max=100)
    assert swept.expired_count == 1
    assert (await rig.states(batch_id))[2] == "expired"


# -- cancellation


async def test_a_cancelled_batch_ends_when_its_last_lease_has_ended(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(600), await rig.session()
    (lease,) = await rig.claim(session_id, 256)
    cancelled = await rig.store.stop_batch(batch_id, "cancelled", now_us=rig.now_us)
    assert (cancelled.state, cancelled.is_finished) == ("cancelled", False)
    assert (await rig.store.heartbeat(session_id, now_us=rig.now_us)).stopped == [batch_id]
    assert (await rig.store.unwanted_runs(session_id)).stopped == [batch_id]
    assert await rig.settle(lease, "c" * 100 + "r" * 100 + "x" * 56) == "settled"
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.is_finished, ledger.completed, ledger.cancelled) == (True, 100, 500)
    assert (await rig.store.stop_batch(batch_id, "abandoned", now_us=rig.now_us)).state == "cancelled"
    with pytest.raises(Conflict):
        await rig.append(batch_id, [0])
    with pytest.raises(Conflict):
        await rig.store.redrive(batch_id, None)
    with pytest.raises(Conflict):
        await rig.store.seal(batch_id, None, now_us=rig.now_us)


async def test_a_released_lease_of_a_cancelled_batch_ends_the_batch(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(10), await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.store.stop_batch(batch_id, "cancelled", now_us=rig.now_us)
    await rig.release(lease, suspects=[0, 1])
    assert (await rig.store.batch(batch_id))[0].is_finished
    assert await rig.states(batch_id) == ["cancelled"] * 10


async def test_a_batch_that_has_ended_stays_as_it_is(rig: StoreRig) -> None:
    batch_id = await rig.filled(1)
    await rig.run_all(await rig.session())
    assert (await rig.store.stop_batch(batch_id, "cancelled", now_us=rig.now_us)).state == "completed"


async def test_an_open_batch_is_cancelled_with_what_it_has(rig: StoreRig) -> None:
    batch_id = await rig.batch(10)
    await rig.append(batch_id, range(4))
    assert (await rig.store.stop_batch(batch_id, "cancelled", now_us=rig.now_us)).is_finished
    ledger = (await rig.store.batch(batch_id))[1]
    assert (ledger.cancelled, ledger.missing) == (4, 6)


async def test_single_runs_are_cancelled_at_once_or_with_the_heartbeat_of_their_worker(rig: StoreRig) -> None:
    batch_id = await rig.batch(7)
    await rig.append(batch_id, range(7), key=lambda index: Key("task", due_us=(index == 6) * (rig.now_us + 9)))
    session_id = await rig.session()
    (lease,) = await rig.claim(session_id, 4)
    nothing = await rig.store.unwanted_runs(session_id)
    assert (nothing.leases, nothing.stopped, nothing.cancelled) == ([], [], [])
    assert await rig.store.cancel_runs(batch_id, [1, 2, 5, 6], now_us=rig.now_us) == 4
    assert await rig.states(batch_id) == ["leased"] * 4 + ["waiting", "cancelled", "cancelled"]
    beat = await rig.store.heartbeat(session_id, now_us=rig.now_us)
    assert sorted(beat.cancelled) == [(batch_id, 1), (batch_id, 2)]
    unwanted = await rig.store.unwanted_runs(session_id)
    assert (sorted(unwanted.cancelled), unwanted.leases) == (sorted(beat.cancelled), beat.leases)
    nothing = await rig.store.unwanted_runs(new_session_id(rig.now_us))
    assert (nothing.leases, nothing.stopped, nothing.cancelled) == ([], [], [])
    await rig.settle(lease, "xr", span_slots=[1, 2], dues_us=[rig.now_us])
    await rig.release(lease)
    assert await rig.states(batch_id) == [
        "waiting",
        "cancelled",
        "cancelled",
        "waiting",
        "waiting",
        "cancelled",
        "cancelled",
    ]
    assert await rig.store.cancel_runs(batch_id, [1], now_us=rig.now_us) == 0


async def test_a_run_to_be_cancelled_is_cancelled_when_its_lease_is_released(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(3), await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.store.cancel_runs(batch_id, [0, 2], now_us=rig.now_us)
    await rig.release(lease, suspects=[0, 1])
    assert await rig.states(batch_id) == ["cancelled", "waiting", "cancelled"]


async def test_a_closed_store_is_reported(rig: StoreRig) -> None:
    await rig.store.close()
    await rig.store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await rig.batch()
    with pytest.raises(StoreUnavailable, match="closed"):
        await rig.store.sessions()
    await rig.store.open()
    assert await rig.store.check()


async def test_r3_an_ended_session_can_own_no_new_batch(rig: StoreRig) -> None:
    session_id = await rig.session()
    stream = await rig.batch(kind="stream", session_id=session_id)
    await rig.store.end_session(session_id, now_us=rig.now_us)
    with pytest.raises(SessionEnded):
        await rig.batch(kind="stream", session_id=session_id)
    with pytest.raises(SessionEnded):
        await rig.batch(session_id="session_of_nobody")
    batch, created = await rig.store.create_batch(
        NewBatch(id=stream, kind="stream", session_id=session_id), now_us=rig.now_us
    )
    assert (batch.id, created) == (stream, False), "a creation may be repeated after a lost answer"


async def test_a_batch_is_abandoned_with_the_session_that_fed_it(rig: StoreRig) -> None:
    session_id = await rig.session()
    stream = await rig.batch(kind="stream", session_id=session_id)
    fed = await rig.batch(session_id=session_id)
    for batch_id in (stream, fed):
        await rig.append(batch_id, range(3))
    (lease, *_) = await rig.claim(await rig.session(), 2)
    rig.later(60)
    assert (
        await rig.store.recover(session_id, NO_SUSPECTS, silent_since_us=rig.now_us, crashes_max=3, now_us=rig.now_us)
        == 0
    )
    assert [(await rig.store.batch(batch_id))[0].state for batch_id in (stream, fed)] == ["sealed", "abandoned"]
    await rig.settle(lease)
    await rig.store.sweep(now_us=rig.now_us, rows_max=100)
    assert await rig.states(fed) == ["cancelled"] * 3, "no other process can send the rest"
    assert (await rig.store.batch(fed))[0].is_finished
    assert "cancelled" not in await rig.states(stream), "all of its runs were enqueued"


async def test_a_run_without_a_readable_input_is_not_redriven(rig: StoreRig) -> None:
    batch_id = await rig.batch(4)
    await rig.append(batch_id, range(4), extras={1: Extra(failure=BOOM)})
    await rig.store.seal(batch_id, None, now_us=rig.now_us)
    (lease,) = await rig.claim(await rig.session())
    await rig.settle(lease, "f")
    assert await rig.states(batch_id) == ["failed"] * 4
    assert await rig.store.redrive(batch_id, [1]) == 0, "no run of it can run"
    assert await rig.store.redrive(batch_id, None) == 3
    assert await rig.states(batch_id) == ["waiting", "failed", "waiting", "waiting"]


async def test_a_queue_that_was_never_used_does_not_starve_one_that_was(rig: StoreRig) -> None:
    old = await rig.batch()
    await rig.append(old, range(3_000), key=lambda _: Key("task", queue="old"))
    session_id = await rig.session()
    taken = await rig.claim(session_id, 1_000)
    assert indexes_of(taken) == list(range(1_000))
    new = await rig.batch()
    await rig.append(new, range(2_000), key=lambda _: Key("task", queue="new"))
    shared = await rig.claim(session_id, 1_024)
    counts = Counter(lease.queue for lease in shared for _ in lease.span_slots)
    assert abs(counts["old"] - counts["new"]) <= 256, "within a chunk, both have the same share"
