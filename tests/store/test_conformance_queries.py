"""Conformance of every store, part 3: crashing runs, redrive, queries, upkeep, idempotency keys, verification."""

from __future__ import annotations

import json
from operator import methodcaller

import pytest

from headrace.core.block import Extra
from headrace.core.span import Key
from headrace.store.memory import MemoryStore
from headrace.store.postgres import PostgresStore
from headrace.store.protocol import Lease, Suspects
from headrace.store.sqlite import SqliteStore
from tests.support.store_rig import BOOM, NO_SUSPECTS, SECOND_US, StoreRig, indexes_of

POISON = 137


# -- runs that crash their worker


async def crash_or_finish(rig: StoreRig, session_id: str, leases: list[Lease], *, started_max: int) -> bool:
    """Run a worker that starts `started_max` runs of each lease at once; POISON kills it. Returns True if it was
    killed.
    """
    for lease in leases:
        for start in range(0, len(lease.span_slots), started_max):
            started = list(lease.span_slots[start : start + started_max])
            if POISON in lease.indexes[start : start + started_max]:
                held = {(other.span_id, other.token): () for other in leases}
                suspects = Suspects(
                    span_slots=held | {(lease.span_id, lease.token): tuple(started)}, evidence="signal 9"
                )
                await rig.recover(session_id, suspects)
                return True
            await rig.settle(lease, span_slots=started, part_no=start)
    return False


@pytest.mark.parametrize("started_max", [256, 16, 1])
async def test_a_run_that_kills_its_worker_is_isolated_and_the_others_complete(rig: StoreRig, started_max: int) -> None:
    batch_id = await rig.filled(256)
    deaths = 0
    for _ in range(60):
        session_id = await rig.session()
        leases = await rig.claim(session_id, 256)
        if not leases:
            break
        deaths += await crash_or_finish(rig, session_id, leases, started_max=started_max)
        rig.later(1)
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.state, ledger.completed, ledger.failed) == ("completed", 255, 1)
    failure = json.loads((await rig.outcomes(batch_id))[POISON].result)
    assert (failure["type"], failure["crashes"], "signal 9" in failure["message"]) == ("WorkerCrashed", deaths, True)
    assert deaths <= 3 + 9, "halved at each crash from the second on, then three crashes alone"
    for run in await rig.store.runs("default", batch_id=batch_id, limit=256):
        assert run.attempt == 1, "a crash does not use up an attempt"


async def test_what_had_not_started_is_not_charged_a_crash(rig: StoreRig) -> None:
    batch_id = await rig.filled(10)
    dead, heir = await rig.session(), await rig.session()
    (lease,) = await rig.claim(dead)
    await rig.recover(dead, Suspects(span_slots={(lease.span_id, lease.token): (2, 3)}, evidence="oom"))
    charged = {run.index: run.crashes_count for run in await rig.store.runs("default", batch_id=batch_id)}
    assert charged == {index: int(index in (2, 3)) for index in range(10)}
    assert sorted(indexes_of(await rig.claim(heir))) == list(range(10))


async def test_a_regular_release_charges_no_crash(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(3), await rig.session()
    for _ in range(5):
        (lease,) = await rig.claim(session_id)
        assert (lease.crashes_count, lease.attempt, lease.whole) == (0, 1, True)
        await rig.release(lease)
    assert await rig.states(batch_id) == ["waiting"] * 3


async def test_a_run_alone_fails_after_as_many_crashes_as_are_allowed(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(1), await rig.session()
    for crashes in range(2):
        (lease,) = await rig.claim(session_id)
        assert lease.crashes_count == crashes
        await rig.release(lease, suspects=[0], crashes_max=2, evidence="segfault in line 3")
    assert await rig.states(batch_id) == ["failed"]
    assert b"segfault in line 3" in (await rig.outcomes(batch_id))[0].result


# -- redrive


async def test_redrive_opens_a_finished_batch_until_its_runs_end_again(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(300), await rig.session()
    first, second = await rig.claim(session_id)
    await rig.settle(first, "f" * 6 + "c" * 250)
    await rig.settle(second)
    finished, _ = await rig.store.batch(batch_id)
    assert finished.state == "completed"
    assert await rig.store.redrive(batch_id, None) == 6
    assert await rig.store.redrive(batch_id, None) == 0
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.state, batch.is_finished, ledger.waiting, ledger.failed) == ("sealed", False, 6, 0)
    assert await rig.outcomes(batch_id) == []
    rig.later(5)
    assert await rig.run_all(session_id) == list(range(6))
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.state, batch.finished_us, ledger.completed) == ("completed", rig.now_us, 300)
    run = await rig.store.run(batch_id, 0)
    assert ([attempt["ended"] for attempt in run.attempts], run.result, run.attempt) == (
        ["failed", "completed"],
        b"0",
        1,
    )


async def test_redrive_by_index_runs_failed_cancelled_and_expired_runs_again(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(5), await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.settle(lease, "cfxe", span_slots=[0, 1, 2, 3])
    assert await rig.store.redrive(batch_id, [0, 2, 3, 4]) == 2
    assert await rig.states(batch_id) == ["completed", "failed", "waiting", "waiting", "leased"]
    assert await rig.settle(lease, "c", span_slots=[4], part_no=1) == "settled", "the lease continues"
    assert await rig.run_all(session_id) == [2, 3]


async def test_a_redriven_run_is_not_cancelled_by_an_earlier_request(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(1), await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.store.cancel_runs(batch_id, [0], now_us=rig.now_us)
    await rig.settle(lease, "f")
    assert await rig.store.redrive(batch_id, [0]) == 1
    (again,) = await rig.claim(session_id)
    assert (await rig.store.heartbeat(session_id, now_us=rig.now_us)).cancelled == []
    await rig.release(again)
    assert await rig.states(batch_id) == ["waiting"]


# -- listings


async def test_listed_runs_have_their_keys_attempts_and_errors(rig: StoreRig) -> None:
    extra = Extra(tags=("t",), headers={"trace": "abc"}, idempotency_key="k")
    batch_id, session_id = await rig.batch(3), await rig.session()
    await rig.append(batch_id, range(3), extras={1: extra})
    await rig.store.seal(batch_id, None, now_us=rig.now_us)
    (lease,) = await rig.claim(session_id)
    await rig.settle(lease, "cf", span_slots=[0, 1])
    listed = await rig.store.runs("default", batch_id=batch_id)
    for record in listed:
        whole = await rig.store.run(batch_id, record.index)
        assert (record.attempts, record.tags, record.headers) == (whole.attempts, whole.tags, whole.headers)
        assert record.idempotency_key == whole.idempotency_key
        assert (record.payload, record.result) == (b"", whole.result if record.state == "failed" else b"")
    assert [record.idempotency_key for record in listed] == ["", "k", ""]
    assert [len(record.attempts) for record in listed] == [1, 1, 0]
    (tagged,) = await rig.store.runs("default", tag="t")
    assert tagged == listed[1]


async def test_runs_are_listed_by_queue_and_the_tasks_of_batches_by_batch(rig: StoreRig) -> None:
    plain, empty = await rig.filled(300), await rig.batch(1)
    mixed = await rig.batch(4)
    await rig.append(mixed, [0, 1], key=Key("b", queue="slow"))
    await rig.append(mixed, [2, 3], key=Key("a", queue="fast"))
    assert [run.index for run in await rig.store.runs("default", queue="slow")] == [0, 1]
    assert await rig.store.runs("default", queue="slow", task="a") == []
    since_us = rig.later(60)
    assert await rig.store.runs("default", since_us=since_us) == []
    later = await rig.filled(1)
    assert [run.batch_id for run in await rig.store.runs("default", since_us=since_us)] == [later]
    tasks = await rig.store.tasks_of_batches("default", [plain, empty, mixed, f"batch_{'0' * 26}"])
    assert tasks == {plain: ["task"], mixed: ["a", "b"]}
    assert await rig.store.tasks_of_batches("elsewhere", [plain]) == {}


# -- outcomes


async def test_outcomes_come_in_index_order_while_the_batch_runs_and_stop_at_the_first_not_final(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(900, runs_max=100), await rig.session()
    leases = await rig.claim(session_id)
    for number in (1, 0, 3):
        await rig.settle(leases[number])
    assert [outcome.index for outcome in await rig.outcomes(batch_id)] == list(range(200))
    assert [outcome.index for outcome in await rig.outcomes(batch_id, 150, 20)] == list(range(150, 170))
    assert await rig.outcomes(batch_id, 200) == []
    assert [outcome.index for outcome in await rig.outcomes(batch_id, 350)] == list(range(350, 400))
    await rig.settle(leases[2], span_slots=leases[2].span_slots[:7])
    assert (await rig.outcomes(batch_id))[-1].index == 206


async def test_outcomes_of_blocks_that_overlap_are_in_index_order(rig: StoreRig) -> None:
    batch_id = await rig.batch(3_000)
    for start in range(7):
        await rig.append(batch_id, range(start, 3_000, 7), runs_max=64)
    await rig.run_all(await rig.session())
    assert [outcome.index for outcome in await rig.outcomes(batch_id)] == list(range(3_000))
    assert [outcome.index for outcome in await rig.outcomes(batch_id, 2_950, 30)] == list(range(2_950, 2_980))


async def test_outcomes_do_not_stop_behind_hundreds_of_wide_blocks(rig: StoreRig) -> None:
    batch_id = await rig.batch(4_000)
    for start in range(600):
        await rig.append(batch_id, range(start, 4_000, 600))
    await rig.run_all(await rig.session())
    assert [outcome.index for outcome in await rig.outcomes(batch_id, 3_900, 10)] == list(range(3_900, 3_910))


async def test_gaps_of_a_stream_are_skipped_at_any_width(rig: StoreRig) -> None:
    batch_id = await rig.batch(kind="stream")
    for start in (0, 5, 100_000):
        await rig.append(batch_id, range(start, start + 2))
    await rig.run_all(await rig.session())
    assert [outcome.index for outcome in await rig.outcomes(batch_id)] == [0, 1, 5, 6, 100_000, 100_001]
    assert [outcome.index for outcome in await rig.outcomes(batch_id, 7, 1)] == [100_000]


async def test_outcomes_of_a_batch_stop_at_a_missing_index(rig: StoreRig) -> None:
    batch_id = await rig.batch(10)
    await rig.append(batch_id, [0, 1, 3])
    await rig.run_all(await rig.session())
    assert [outcome.index for outcome in await rig.outcomes(batch_id)] == [0, 1]


async def test_every_final_state_is_returned_with_its_result(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(6), await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.settle(lease, "cfxerc", dues_us=[rig.now_us])
    (again,) = await rig.claim(session_id)
    assert again.indexes == [4]
    await rig.settle(again, "c", results=[b"at last"])
    outcomes = [(chr(outcome.state), outcome.result) for outcome in await rig.outcomes(batch_id)]
    assert outcomes == [("c", b"0"), ("f", BOOM), ("x", b""), ("e", b""), ("c", b"at last"), ("c", b"5")]
    run = await rig.store.run(batch_id, 4)
    assert [attempt["ended"] for attempt in run.attempts] == ["retried", "completed"]
    assert (run.attempts[0]["type"], run.result, run.attempt) == ("Boom", b"at last", 2)


# -- listings


async def test_runs_are_listed_newest_batch_first_and_by_index(rig: StoreRig) -> None:
    old, new = await rig.filled(3), await rig.batch(4)
    await rig.append(new, [0, 3])
    await rig.append(new, [1, 2])
    listed = await rig.store.runs("default")
    assert [(run.batch_id, run.index) for run in listed] == [(new, index) for index in range(4)] + [
        (old, index) for index in range(3)
    ]
    assert [run.index for run in await rig.store.runs("default", limit=5)] == [0, 1, 2, 3, 0]
    assert [run.index for run in await rig.store.runs("default", batch_id=old, limit=2)] == [0, 1]
    assert {run.payload for run in listed} == {b""}


async def test_runs_are_found_by_state_task_and_tag(rig: StoreRig) -> None:
    batch_id = await rig.batch(6)
    tags = {1: Extra(tags=("red", "big")), 2: Extra(tags=("red",)), 5: Extra(tags=("red",))}
    later = rig.now_us + SECOND_US
    keys = [Key("a"), Key("a"), Key("b"), Key("b", due_us=later), Key("c"), Key("c")]
    await rig.append(batch_id, range(6), key=keys.__getitem__, extras=tags)
    session_id = await rig.session()
    (lease,) = await rig.claim(session_id, 1, tasks=["a"])
    await rig.settle(lease)
    await rig.claim(session_id, tasks=["c"])

    async def matching(**wanted: object) -> list[int]:
        return [run.index for run in await rig.store.runs("default", **wanted)]  # type: ignore[arg-type]  # by name

    assert await matching(state="completed") == [0]
    assert await matching(state="waiting") == [1, 2]
    assert await matching(state="delayed") == [3]
    assert await matching(state="leased") == [4, 5]
    assert await matching(state="failed") == []
    assert await matching(task="b") == [2, 3]
    assert await matching(tag="red") == [1, 2, 5]
    assert await matching(tag="red", state="leased") == [5]
    assert await matching(tag="red", task="c", limit=1) == [5], "the limit counts what matches"
    assert await matching(tag="big", batch_id=batch_id) == [1]
    assert await matching(tag="big", batch_id="batch_other") == []


async def test_a_run_is_returned_with_all_its_details(rig: StoreRig) -> None:
    batch_id = await rig.batch(2)
    extra = Extra(tags=("t",), headers={"trace": "abc"}, idempotency_key="k")
    key = Key("task", queue="q", priority=3, expires_us=rig.now_us + SECOND_US)
    await rig.append(batch_id, range(2), key=key, extras={1: extra})
    run = await rig.store.run(batch_id, 1)
    assert (run.task, run.queue, run.priority, run.state, run.attempt) == ("task", "q", 3, "waiting", 1)
    assert (run.payload, run.headers, run.tags, run.idempotency_key) == (b"[1]", {"trace": "abc"}, ["t"], "k")
    assert run.expires_us == rig.now_us + SECOND_US
    (lease,) = await rig.claim(await rig.session())
    assert dict(lease.extras) == {1: extra}


async def test_batches_are_listed_newest_first_and_continue(rig: StoreRig) -> None:
    ids = [await rig.filled(1) for _ in range(5)]
    await rig.store.stop_batch(ids[2], "cancelled", now_us=rig.now_us)
    listed = [batch.id for batch, _ in await rig.store.batches("default", limit=2)]
    assert listed == [ids[4], ids[3]]
    assert [batch.id for batch, _ in await rig.store.batches("default", before_id=ids[3])] == ids[2::-1]
    stopped = await rig.store.batches("default", states=["cancelled", "abandoned"])
    assert [batch.id for batch, _ in stopped] == [ids[2]]
    assert await rig.store.batches("elsewhere") == []


async def test_queues_report_the_numbers_of_their_runs(rig: StoreRig) -> None:
    await rig.store.pause_queue("default", "idle", paused=True)
    batch_id = await rig.batch(10)
    later = rig.now_us + SECOND_US
    await rig.append(batch_id, range(10), key=lambda index: Key("task", queue="busy", due_us=(index < 2) * later))
    await rig.claim(await rig.session(), 3)
    busy, idle = await rig.store.queues("default")
    assert (busy.name, busy.waiting_count, busy.delayed_count, busy.leased_count) == ("busy", 5, 2, 3)
    assert (busy.paused, busy.oldest_us) == (False, (await rig.store.batch(batch_id))[0].created_us)
    assert (idle.name, idle.paused, idle.waiting_count, idle.oldest_us) == ("idle", True, 0, 0)


# -- keys and streams


async def test_an_idempotency_key_makes_one_run_within_an_append_and_across(rig: StoreRig) -> None:
    batch_id = await rig.batch(kind="stream")
    keyed = {index: Extra(idempotency_key="same") for index in range(4)}
    appended = await rig.append(batch_id, range(4), extras=keyed, runs_max=2)
    assert (appended.accepted_count, appended.existing) == (1, dict.fromkeys((1, 2, 3), (batch_id, 0)))
    other = await rig.batch(kind="stream")
    again = await rig.append(other, [0, 1], extras={0: Extra(idempotency_key="same")})
    assert (again.accepted_count, again.existing) == (1, {0: (batch_id, 0)})
    elsewhere = await rig.append(other, [2], key=Key("another task"), extras={2: Extra(idempotency_key="same")})
    assert elsewhere.accepted_count == 1, "a key belongs to its task"


async def test_an_expired_idempotency_key_is_replaced(rig: StoreRig) -> None:
    batch_id = await rig.batch(kind="stream")
    until = rig.now_us + 10 * SECOND_US
    extra = Extra(idempotency_key="k", idempotency_expires_us=until)
    await rig.append(batch_id, [0], extras={0: extra})
    assert (await rig.append(batch_id, [1], extras={1: extra})).existing == {1: (batch_id, 0)}
    rig.now_us = until
    renewed = Extra(idempotency_key="k", idempotency_expires_us=until + SECOND_US)
    assert (await rig.append(batch_id, [1], extras={1: renewed})).accepted_count == 1
    assert (await rig.append(batch_id, [2], extras={2: renewed})).existing == {2: (batch_id, 1)}


@pytest.mark.parametrize("dies", [True, False])
async def test_a_stream_is_sealed_with_its_session(rig: StoreRig, dies: bool) -> None:
    producer = await rig.session("producer")
    batch_id = await rig.batch(kind="stream", session_id=producer)
    await rig.append(batch_id, [0, 1, 7])
    await rig.run_all(await rig.session())
    assert (await rig.store.batch(batch_id))[0].state == "open"
    if dies:
        await rig.recover(producer, NO_SUSPECTS)
    else:
        await rig.store.end_session(producer, now_us=rig.now_us)
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.state, ledger.expected, ledger.completed) == ("completed", 3, 3)
    assert (await rig.append(batch_id, [0, 7])).duplicates_count == 2
    with pytest.raises(Exception, match="no more items"):
        await rig.append(batch_id, [2])


# -- upkeep


async def test_sweep_expires_abandons_and_cancels_what_is_overdue(rig: StoreRig) -> None:
    forgotten = await rig.batch(5, seal_timeout_ms=60_000)
    await rig.append(forgotten, range(2))
    fed = await rig.batch(5, seal_timeout_ms=60_000)
    patient = await rig.batch(5)
    expiring = await rig.filled(3, key=Key("task", expires_us=rig.now_us + 30 * SECOND_US))
    assert await rig.store.sweep(now_us=rig.later(29), rows_max=100) == await rig.store.sweep(
        now_us=rig.now_us, rows_max=100
    )
    await rig.append(fed, [0])
    swept = await rig.store.sweep(now_us=rig.later(32), rows_max=100)
    assert (swept.expired_count, swept.abandoned, swept.more) == (3, [forgotten], False)
    assert [(await rig.store.batch(name))[0].state for name in (forgotten, fed, patient, expiring)] == [
        "abandoned",
        "open",
        "open",
        "completed",
    ]
    assert await rig.states(forgotten) == ["cancelled"] * 2


async def test_sweep_is_bounded_and_reports_if_more_is_overdue(rig: StoreRig) -> None:
    batch_id = await rig.batch()
    await rig.append(batch_id, range(2_000), runs_max=1)
    await rig.store.stop_batch(batch_id, "cancelled", now_us=rig.now_us)
    swept = await rig.store.sweep(now_us=rig.now_us, rows_max=600)
    assert (swept.cancelled_count, swept.more) == (600, True)
    swept = await rig.store.sweep(now_us=rig.now_us, rows_max=600)
    assert (swept.cancelled_count, swept.more) == (400, False)
    assert (await rig.store.batch(batch_id))[0].is_finished


async def test_r3_sweep_releases_leases_without_a_session(rig: StoreRig) -> None:
    batch_id = await rig.batch(4)
    once = Key("task", at_most_once=True)
    await rig.append(batch_id, range(4), key=lambda index: once if index > 1 else Key("task"))
    session_id = await rig.session()
    leases = await rig.claim(session_id)
    await lose_session(rig, session_id)
    assert (await rig.store.sweep(now_us=rig.now_us, rows_max=100)).more is False
    assert await rig.settle(leases[0]) == "lost"
    assert await rig.states(batch_id) == ["waiting", "waiting", "failed", "failed"], "at most once, so it failed"
    assert indexes_of(await rig.claim(await rig.session())) == [0, 1]


async def lose_session(rig: StoreRig, session_id: str) -> None:
    """Check leases without a session: no operation leaves them, but a restored database may have them."""
    if isinstance(rig.store, MemoryStore):
        del rig.store._tables.sessions[session_id]
    elif isinstance(rig.store, SqliteStore):
        await rig.store._writer.run(methodcaller("execute", "DELETE FROM headrace_session WHERE id = ?", (session_id,)))
    else:
        await tampered(rig, f"DELETE FROM {{}}.session WHERE id = '{session_id}'")


async def test_prune_deletes_whole_batches_and_reports_if_more_are_due(rig: StoreRig) -> None:
    ids = [await rig.filled(600) for _ in range(3)]
    kept = await rig.filled(10)
    extras = {0: Extra(tags=("t",), idempotency_key="k", object_key="object")}
    await rig.append(loose := await rig.batch(1), [0], extras=extras)
    await rig.store.stop_batch(loose, "cancelled", now_us=rig.now_us)
    session_id = await rig.session()
    for _ in range(9):
        for lease in await rig.claim(session_id, 256):
            if lease.batch_id != kept:
                await rig.settle(lease)
    before_us = rig.now_us
    assert await rig.store.unnamed(["object", "other"]) == ["other"]
    assert await rig.store.prune(before_us - 1, batches_max=9, rows_max=9) == await rig.store.prune(
        0, batches_max=9, rows_max=9
    )
    gone: list[str] = []
    for _ in range(50):
        pruned = await rig.store.prune(before_us, batches_max=2, rows_max=2)
        gone += [batch_id for _, batch_id in pruned.batches]
        if not pruned.more:
            break
    assert sorted(gone) == sorted([*ids, loose])
    assert [batch.id for batch, _ in await rig.store.batches("default")] == [kept]
    assert await rig.store.runs("default", tag="t") == []
    assert await rig.store.unnamed(["object", "other"]) == ["object", "other"]
    fresh = await rig.batch(1)
    assert (await rig.append(fresh, [0], extras=extras)).existing == {}, "its key is free again"


async def test_prune_forgets_sessions_that_ended_long_ago(rig: StoreRig) -> None:
    gone = await rig.session()
    await rig.store.end_session(gone, now_us=rig.now_us)
    await rig.store.prune(rig.later(10), batches_max=10, rows_max=10)
    assert await rig.store.sessions() == []
    with pytest.raises(Exception, match="ended"):
        await rig.claim(gone)


async def test_objects_of_payloads_and_results_are_named_until_their_batch_is_deleted(rig: StoreRig) -> None:
    batch_id = await rig.batch(1)
    await rig.append(batch_id, [0], extras={0: Extra(object_key="in", object_bytes=9)})
    (lease,) = await rig.claim(await rig.session())
    assert lease.extras[0].object_key == "in"
    assert await rig.store.unnamed(["in", "out"]) == ["out"]
    await rig.settle(lease, object_keys=["out"])
    assert await rig.store.unnamed(["in", "out", "x", "x"]) == ["x", "x"]


# -- promise 5: verify counts from the chunks


async def test_verify_finds_a_planted_difference(rig: StoreRig) -> None:
    batch_id = await rig.filled(300)
    (lease, *_) = await rig.claim(await rig.session(), 256)
    await rig.settle(lease, span_slots=lease.span_slots[:10])
    assert (await rig.store.verify(batch_id)).differences == []
    await plant(rig, batch_id)
    differences = (await rig.store.verify(batch_id)).differences
    assert any("completed: the counters say 11, the chunks 10" in difference for difference in differences)
    assert any("received set" in difference for difference in differences)
    assert any("without a recorded outcome" in difference for difference in differences)


async def plant(rig: StoreRig, batch_id: str) -> None:
    """Plant a wrong counter, a wrong received set and a missing part."""
    rig.was_tampered_with = True
    if isinstance(rig.store, MemoryStore):
        tables = rig.store._tables
        counts = tables.batches[batch_id].counts
        tables.batches[batch_id].counts = counts._replace(completed=counts.completed + 1)
        tables.received[batch_id].add([300])
        tables.parts.clear()
    elif isinstance(rig.store, SqliteStore):
        for statement in (
            "UPDATE headrace_batch SET completed_count = completed_count + 1",
            "UPDATE headrace_batch SET received = x'010001'",
            "DELETE FROM headrace_part",
        ):
            await rig.store._writer.run(methodcaller("execute", statement))
    else:
        await tampered(
            rig,
            "UPDATE {}.batch SET completed_count = completed_count + 1",
            r"UPDATE {}.batch SET received = '\x010001'",
            "DELETE FROM {}.part",
        )


async def tampered(rig: StoreRig, *statements: str) -> None:
    """Change a PostgreSQL store from outside."""
    assert isinstance(rig.store, PostgresStore)
    async with (await rig.store._pool()).borrowed() as connection:
        for statement in statements:
            await connection.raw.execute(statement.format(rig.store._schema))
