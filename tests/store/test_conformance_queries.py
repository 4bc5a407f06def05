"""What every store promises, in the verbs of the seam: poison, redrive, reading, upkeep, keys.

A part of the suite that begins in `test_conformance.py`.
"""

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
from tests.support.store_rig import BOOM, NOBODY, SECOND_US, World, indexes_of

POISON = 137


# -- poison


async def crash_or_finish(world: World, session_id: str, leases: list[Lease], *, started_max: int) -> bool:
    """A worker that starts `started_max` runs of each lease at once; POISON kills it. Answers whether it died."""
    for lease in leases:
        for start in range(0, len(lease.span_slots), started_max):
            started = list(lease.span_slots[start : start + started_max])
            if POISON in lease.indexes[start : start + started_max]:
                held = {(other.span_id, other.token): () for other in leases}
                suspects = Suspects(
                    span_slots=held | {(lease.span_id, lease.token): tuple(started)}, evidence="signal 9"
                )
                await world.recover(session_id, suspects)
                return True
            await world.settle(lease, span_slots=started, part_no=start)
    return False


@pytest.mark.parametrize("started_max", [256, 16, 1])
async def test_one_run_that_kills_its_worker_is_found_and_the_others_complete(world: World, started_max: int) -> None:
    batch_id = await world.filled(256)
    deaths = 0
    for _ in range(60):
        session_id = await world.session()
        leases = await world.claim(session_id, 256)
        if not leases:
            break
        deaths += await crash_or_finish(world, session_id, leases, started_max=started_max)
        world.later(1)
    batch, ledger = await world.store.batch(batch_id)
    assert (batch.state, ledger.completed, ledger.failed) == ("completed", 255, 1)
    told = json.loads((await world.outcomes(batch_id))[POISON].result)
    assert (told["type"], told["crashes"], "signal 9" in told["message"]) == ("WorkerCrashed", deaths, True)
    assert deaths <= 3 + 9, "halved each time from the second crash on, then three times alone"
    for run in await world.store.runs("default", batch_id=batch_id, limit=256):
        assert run.attempt == 1, "a crash is no attempt"


async def test_what_had_not_started_is_not_charged_a_crash(world: World) -> None:
    batch_id = await world.filled(10)
    dead, heir = await world.session(), await world.session()
    (lease,) = await world.claim(dead)
    await world.recover(dead, Suspects(span_slots={(lease.span_id, lease.token): (2, 3)}, evidence="oom"))
    charged = {run.index: run.crashes_count for run in await world.store.runs("default", batch_id=batch_id)}
    assert charged == {index: int(index in (2, 3)) for index in range(10)}
    assert sorted(indexes_of(await world.claim(heir))) == list(range(10))


async def test_a_release_in_good_order_charges_nobody(world: World) -> None:
    batch_id, session_id = await world.filled(3), await world.session()
    for _ in range(5):
        (lease,) = await world.claim(session_id)
        assert (lease.crashes_count, lease.attempt, lease.whole) == (0, 1, True)
        await world.release(lease)
    assert await world.states(batch_id) == ["waiting"] * 3


async def test_a_run_alone_fails_after_as_many_crashes_as_are_allowed(world: World) -> None:
    batch_id, session_id = await world.filled(1), await world.session()
    for crashes in range(2):
        (lease,) = await world.claim(session_id)
        assert lease.crashes_count == crashes
        await world.release(lease, suspects=[0], crashes_max=2, evidence="segfault in line 3")
    assert await world.states(batch_id) == ["failed"]
    assert b"segfault in line 3" in (await world.outcomes(batch_id))[0].result


# -- redrive


async def test_redrive_opens_a_finished_batch_until_its_runs_end_again(world: World) -> None:
    batch_id, session_id = await world.filled(300), await world.session()
    first, second = await world.claim(session_id)
    await world.settle(first, "f" * 6 + "c" * 250)
    await world.settle(second)
    finished, _ = await world.store.batch(batch_id)
    assert finished.state == "completed"
    assert await world.store.redrive(batch_id, None) == 6
    assert await world.store.redrive(batch_id, None) == 0
    batch, ledger = await world.store.batch(batch_id)
    assert (batch.state, batch.is_finished, ledger.waiting, ledger.failed) == ("sealed", False, 6, 0)
    assert await world.outcomes(batch_id) == []
    world.later(5)
    assert await world.run_all(session_id) == list(range(6))
    batch, ledger = await world.store.batch(batch_id)
    assert (batch.state, batch.finished_us, ledger.completed) == ("completed", world.now_us, 300)
    run = await world.store.run(batch_id, 0)
    assert ([one["ended"] for one in run.attempts], run.result, run.attempt) == (["failed", "completed"], b"0", 1)


async def test_redrive_by_index_takes_what_ended_badly_in_any_way(world: World) -> None:
    batch_id, session_id = await world.filled(5), await world.session()
    (lease,) = await world.claim(session_id)
    await world.settle(lease, "cfxe", span_slots=[0, 1, 2, 3])
    assert await world.store.redrive(batch_id, [0, 2, 3, 4]) == 2
    assert await world.states(batch_id) == ["completed", "failed", "waiting", "waiting", "leased"]
    assert await world.settle(lease, "c", span_slots=[4], part_no=1) == "settled", "the lease goes on"
    assert await world.run_all(session_id) == [2, 3]


async def test_a_redriven_run_is_wanted_again_though_it_was_asked_to_cancel(world: World) -> None:
    batch_id, session_id = await world.filled(1), await world.session()
    (lease,) = await world.claim(session_id)
    await world.store.cancel_runs(batch_id, [0], now_us=world.now_us)
    await world.settle(lease, "f")
    assert await world.store.redrive(batch_id, [0]) == 1
    (again,) = await world.claim(session_id)
    assert (await world.store.heartbeat(session_id, now_us=world.now_us)).cancelled == []
    await world.release(again)
    assert await world.states(batch_id) == ["waiting"]


# -- outcomes


async def test_outcomes_come_in_index_order_while_the_batch_runs_and_stop_at_the_first_not_final(world: World) -> None:
    batch_id, session_id = await world.filled(900, runs_max=100), await world.session()
    leases = await world.claim(session_id)
    for number in (1, 0, 3):
        await world.settle(leases[number])
    assert [outcome.index for outcome in await world.outcomes(batch_id)] == list(range(200))
    assert [outcome.index for outcome in await world.outcomes(batch_id, 150, 20)] == list(range(150, 170))
    assert await world.outcomes(batch_id, 200) == []
    assert [outcome.index for outcome in await world.outcomes(batch_id, 350)] == list(range(350, 400))
    await world.settle(leases[2], span_slots=leases[2].span_slots[:7])
    assert (await world.outcomes(batch_id))[-1].index == 206


async def test_outcomes_of_blocks_that_overlap_are_in_index_order(world: World) -> None:
    batch_id = await world.batch(3_000)
    for start in range(7):
        await world.append(batch_id, range(start, 3_000, 7), runs_max=64)
    await world.run_all(await world.session())
    assert [outcome.index for outcome in await world.outcomes(batch_id)] == list(range(3_000))
    assert [outcome.index for outcome in await world.outcomes(batch_id, 2_950, 30)] == list(range(2_950, 2_980))


async def test_outcomes_do_not_stop_behind_hundreds_of_wide_blocks(world: World) -> None:
    batch_id = await world.batch(4_000)
    for start in range(600):
        await world.append(batch_id, range(start, 4_000, 600))
    await world.run_all(await world.session())
    assert [outcome.index for outcome in await world.outcomes(batch_id, 3_900, 10)] == list(range(3_900, 3_910))


async def test_a_stream_s_gaps_are_passed_over_however_wide(world: World) -> None:
    batch_id = await world.batch(kind="stream")
    for start in (0, 5, 100_000):
        await world.append(batch_id, range(start, start + 2))
    await world.run_all(await world.session())
    assert [outcome.index for outcome in await world.outcomes(batch_id)] == [0, 1, 5, 6, 100_000, 100_001]
    assert [outcome.index for outcome in await world.outcomes(batch_id, 7, 1)] == [100_000]


async def test_outcomes_of_a_batch_stop_at_a_missing_index(world: World) -> None:
    batch_id = await world.batch(10)
    await world.append(batch_id, [0, 1, 3])
    await world.run_all(await world.session())
    assert [outcome.index for outcome in await world.outcomes(batch_id)] == [0, 1]


async def test_every_way_to_end_is_told_with_what_is_known_of_it(world: World) -> None:
    batch_id, session_id = await world.filled(6), await world.session()
    (lease,) = await world.claim(session_id)
    await world.settle(lease, "cfxerc", dues_us=[world.now_us])
    (again,) = await world.claim(session_id)
    assert again.indexes == [4]
    await world.settle(again, "c", results=[b"at last"])
    told = [(chr(outcome.state), outcome.result) for outcome in await world.outcomes(batch_id)]
    assert told == [("c", b"0"), ("f", BOOM), ("x", b""), ("e", b""), ("c", b"at last"), ("c", b"5")]
    run = await world.store.run(batch_id, 4)
    assert [one["ended"] for one in run.attempts] == ["retried", "completed"]
    assert (run.attempts[0]["type"], run.result, run.attempt) == ("Boom", b"at last", 2)


# -- listings


async def test_runs_are_listed_newest_batch_first_and_by_index(world: World) -> None:
    old, new = await world.filled(3), await world.batch(4)
    await world.append(new, [0, 3])
    await world.append(new, [1, 2])
    listed = await world.store.runs("default")
    assert [(run.batch_id, run.index) for run in listed] == [(new, index) for index in range(4)] + [
        (old, index) for index in range(3)
    ]
    assert [run.index for run in await world.store.runs("default", limit=5)] == [0, 1, 2, 3, 0]
    assert [run.index for run in await world.store.runs("default", batch_id=old, limit=2)] == [0, 1]
    assert {run.payload for run in listed} == {b""}


async def test_runs_are_found_by_state_task_and_tag(world: World) -> None:
    batch_id = await world.batch(6)
    tags = {1: Extra(tags=("red", "big")), 2: Extra(tags=("red",)), 5: Extra(tags=("red",))}
    later = world.now_us + SECOND_US
    keys = [Key("a"), Key("a"), Key("b"), Key("b", due_us=later), Key("c"), Key("c")]
    await world.append(batch_id, range(6), key=keys.__getitem__, extras=tags)
    session_id = await world.session()
    (lease,) = await world.claim(session_id, 1, tasks=["a"])
    await world.settle(lease)
    await world.claim(session_id, tasks=["c"])

    async def found(**wanted: object) -> list[int]:
        return [run.index for run in await world.store.runs("default", **wanted)]  # type: ignore[arg-type]  # by name

    assert await found(state="completed") == [0]
    assert await found(state="waiting") == [1, 2]
    assert await found(state="delayed") == [3]
    assert await found(state="leased") == [4, 5]
    assert await found(state="failed") == []
    assert await found(task="b") == [2, 3]
    assert await found(tag="red") == [1, 2, 5]
    assert await found(tag="red", state="leased") == [5]
    assert await found(tag="red", task="c", limit=1) == [5], "the limit counts what matches"
    assert await found(tag="big", batch_id=batch_id) == [1]
    assert await found(tag="big", batch_id="batch_other") == []


async def test_a_run_tells_all_that_is_known_of_it(world: World) -> None:
    batch_id = await world.batch(2)
    extra = Extra(tags=("t",), headers={"trace": "abc"}, idempotency_key="k")
    key = Key("task", queue="q", priority=3, expires_us=world.now_us + SECOND_US)
    await world.append(batch_id, range(2), key=key, extras={1: extra})
    run = await world.store.run(batch_id, 1)
    assert (run.task, run.queue, run.priority, run.state, run.attempt) == ("task", "q", 3, "waiting", 1)
    assert (run.payload, run.headers, run.tags, run.idempotency_key) == (b"[1]", {"trace": "abc"}, ["t"], "k")
    assert run.expires_us == world.now_us + SECOND_US
    (lease,) = await world.claim(await world.session())
    assert dict(lease.extras) == {1: extra}


async def test_batches_are_listed_newest_first_and_continue(world: World) -> None:
    ids = [await world.filled(1) for _ in range(5)]
    await world.store.stop_batch(ids[2], "cancelled", now_us=world.now_us)
    listed = [batch.id for batch, _ in await world.store.batches("default", limit=2)]
    assert listed == [ids[4], ids[3]]
    assert [batch.id for batch, _ in await world.store.batches("default", before_id=ids[3])] == ids[2::-1]
    stopped = await world.store.batches("default", states=["cancelled", "abandoned"])
    assert [batch.id for batch, _ in stopped] == [ids[2]]
    assert await world.store.batches("elsewhere") == []


async def test_queues_tell_what_stands_in_them(world: World) -> None:
    await world.store.pause_queue("default", "idle", paused=True)
    batch_id = await world.batch(10)
    later = world.now_us + SECOND_US
    await world.append(batch_id, range(10), key=lambda index: Key("task", queue="busy", due_us=(index < 2) * later))
    await world.claim(await world.session(), 3)
    busy, idle = await world.store.queues("default")
    assert (busy.name, busy.waiting_count, busy.delayed_count, busy.leased_count) == ("busy", 5, 2, 3)
    assert (busy.paused, busy.oldest_us) == (False, (await world.store.batch(batch_id))[0].created_us)
    assert (idle.name, idle.paused, idle.waiting_count, idle.oldest_us) == ("idle", True, 0, 0)


# -- keys and streams


async def test_an_idempotency_key_makes_one_run_within_an_append_and_across(world: World) -> None:
    batch_id = await world.batch(kind="stream")
    keyed = {index: Extra(idempotency_key="same") for index in range(4)}
    appended = await world.append(batch_id, range(4), extras=keyed, runs_max=2)
    assert (appended.accepted_count, appended.existing) == (1, dict.fromkeys((1, 2, 3), (batch_id, 0)))
    other = await world.batch(kind="stream")
    again = await world.append(other, [0, 1], extras={0: Extra(idempotency_key="same")})
    assert (again.accepted_count, again.existing) == (1, {0: (batch_id, 0)})
    elsewhere = await world.append(other, [2], key=Key("another task"), extras={2: Extra(idempotency_key="same")})
    assert elsewhere.accepted_count == 1, "a key belongs to its task"


async def test_an_expired_idempotency_key_is_taken_over(world: World) -> None:
    batch_id = await world.batch(kind="stream")
    until = world.now_us + 10 * SECOND_US
    extra = Extra(idempotency_key="k", idempotency_expires_us=until)
    await world.append(batch_id, [0], extras={0: extra})
    assert (await world.append(batch_id, [1], extras={1: extra})).existing == {1: (batch_id, 0)}
    world.now_us = until
    renewed = Extra(idempotency_key="k", idempotency_expires_us=until + SECOND_US)
    assert (await world.append(batch_id, [1], extras={1: renewed})).accepted_count == 1
    assert (await world.append(batch_id, [2], extras={2: renewed})).existing == {2: (batch_id, 1)}


@pytest.mark.parametrize("dies", [True, False])
async def test_a_stream_is_sealed_with_its_session(world: World, dies: bool) -> None:
    producer = await world.session("producer")
    batch_id = await world.batch(kind="stream", session_id=producer)
    await world.append(batch_id, [0, 1, 7])
    await world.run_all(await world.session())
    assert (await world.store.batch(batch_id))[0].state == "open"
    if dies:
        await world.recover(producer, NOBODY)
    else:
        await world.store.end_session(producer, now_us=world.now_us)
    batch, ledger = await world.store.batch(batch_id)
    assert (batch.state, ledger.expected, ledger.completed) == ("completed", 3, 3)
    assert (await world.append(batch_id, [0, 7])).duplicates_count == 2
    with pytest.raises(Exception, match="no more items"):
        await world.append(batch_id, [2])


# -- upkeep


async def test_sweep_moves_on_what_is_overdue(world: World) -> None:
    forgotten = await world.batch(5, seal_timeout_ms=60_000)
    await world.append(forgotten, range(2))
    fed = await world.batch(5, seal_timeout_ms=60_000)
    patient = await world.batch(5)
    expiring = await world.filled(3, key=Key("task", expires_us=world.now_us + 30 * SECOND_US))
    assert await world.store.sweep(now_us=world.later(29), rows_max=100) == await world.store.sweep(
        now_us=world.now_us, rows_max=100
    )
    await world.append(fed, [0])
    swept = await world.store.sweep(now_us=world.later(32), rows_max=100)
    assert (swept.expired_count, swept.abandoned, swept.more) == (3, [forgotten], False)
    assert [(await world.store.batch(name))[0].state for name in (forgotten, fed, patient, expiring)] == [
        "abandoned",
        "open",
        "open",
        "completed",
    ]
    assert await world.states(forgotten) == ["cancelled"] * 2


async def test_sweep_is_bounded_and_says_when_there_is_more(world: World) -> None:
    batch_id = await world.batch()
    await world.append(batch_id, range(2_000), runs_max=1)
    await world.store.stop_batch(batch_id, "cancelled", now_us=world.now_us)
    swept = await world.store.sweep(now_us=world.now_us, rows_max=600)
    assert (swept.cancelled_count, swept.more) == (600, True)
    swept = await world.store.sweep(now_us=world.now_us, rows_max=600)
    assert (swept.cancelled_count, swept.more) == (400, False)
    assert (await world.store.batch(batch_id))[0].is_finished


async def test_r3_leases_without_a_session_are_given_back_by_sweep(world: World) -> None:
    batch_id = await world.batch(4)
    once = Key("task", at_most_once=True)
    await world.append(batch_id, range(4), key=lambda index: once if index > 1 else Key("task"))
    session_id = await world.session()
    leases = await world.claim(session_id)
    await lose_session(world, session_id)
    assert (await world.store.sweep(now_us=world.now_us, rows_max=100)).more is False
    assert await world.settle(leases[0]) == "lost"
    assert await world.states(batch_id) == ["waiting", "waiting", "failed", "failed"], "at most once, so it is lost"
    assert indexes_of(await world.claim(await world.session())) == [0, 1]


async def lose_session(world: World, session_id: str) -> None:
    """No verb leaves leases behind; a database restored by hand may."""
    if isinstance(world.store, MemoryStore):
        del world.store._tables.sessions[session_id]
    elif isinstance(world.store, SqliteStore):
        await world.store._writer.run(methodcaller("execute", "DELETE FROM session WHERE id = ?", (session_id,)))
    else:
        await tampered(world, f"DELETE FROM {{}}.session WHERE id = '{session_id}'")


async def test_prune_deletes_whole_batches_and_says_when_more_are_due(world: World) -> None:
    ids = [await world.filled(600) for _ in range(3)]
    kept = await world.filled(10)
    extras = {0: Extra(tags=("t",), idempotency_key="k", object_key="object")}
    await world.append(loose := await world.batch(1), [0], extras=extras)
    await world.store.stop_batch(loose, "cancelled", now_us=world.now_us)
    session_id = await world.session()
    for _ in range(9):
        for lease in await world.claim(session_id, 256):
            if lease.batch_id != kept:
                await world.settle(lease)
    before_us = world.now_us
    assert await world.store.unnamed(["object", "other"]) == ["other"]
    assert await world.store.prune(before_us - 1, batches_max=9, rows_max=9) == await world.store.prune(
        0, batches_max=9, rows_max=9
    )
    gone: list[str] = []
    for _ in range(50):
        pruned = await world.store.prune(before_us, batches_max=2, rows_max=2)
        gone += [batch_id for _, batch_id in pruned.batches]
        if not pruned.more:
            break
    assert sorted(gone) == sorted([*ids, loose])
    assert [batch.id for batch, _ in await world.store.batches("default")] == [kept]
    assert await world.store.runs("default", tag="t") == []
    assert await world.store.unnamed(["object", "other"]) == ["object", "other"]
    fresh = await world.batch(1)
    assert (await world.append(fresh, [0], extras=extras)).existing == {}, "its key is free again"


async def test_prune_forgets_sessions_that_ended_long_ago(world: World) -> None:
    gone = await world.session()
    await world.store.end_session(gone, now_us=world.now_us)
    await world.store.prune(world.later(10), batches_max=10, rows_max=10)
    assert await world.store.sessions() == []
    with pytest.raises(Exception, match="ended"):
        await world.claim(gone)


async def test_objects_of_payloads_and_results_are_named_until_their_batch_goes(world: World) -> None:
    batch_id = await world.batch(1)
    await world.append(batch_id, [0], extras={0: Extra(object_key="in", object_bytes=9)})
    (lease,) = await world.claim(await world.session())
    assert lease.extras[0].object_key == "in"
    assert await world.store.unnamed(["in", "out"]) == ["out"]
    await world.settle(lease, object_keys=["out"])
    assert await world.store.unnamed(["in", "out", "x", "x"]) == ["x", "x"]


# -- 5: verify counts from the chunks


async def test_verify_finds_a_planted_difference(world: World) -> None:
    batch_id = await world.filled(300)
    (lease, *_) = await world.claim(await world.session(), 256)
    await world.settle(lease, span_slots=lease.span_slots[:10])
    assert (await world.store.verify(batch_id)).differences == []
    await plant(world, batch_id)
    differences = (await world.store.verify(batch_id)).differences
    assert any("completed: the counters say 11, the chunks 10" in difference for difference in differences)
    assert any("received set" in difference for difference in differences)
    assert any("without a recorded outcome" in difference for difference in differences)


async def plant(world: World, batch_id: str) -> None:
    """A counter, a received set and a part that are not what the verbs wrote."""
    world.was_tampered_with = True
    if isinstance(world.store, MemoryStore):
        tables = world.store._tables
        counts = tables.batches[batch_id].counts
        tables.batches[batch_id].counts = counts._replace(completed=counts.completed + 1)
        tables.received[batch_id].add([300])
        tables.parts.clear()
    elif isinstance(world.store, SqliteStore):
        for statement in (
            "UPDATE batch SET completed_count = completed_count + 1",
            "UPDATE batch SET received = x'010001'",
            "DELETE FROM part",
        ):
            await world.store._writer.run(methodcaller("execute", statement))
    else:
        await tampered(
            world,
            "UPDATE {}.batch SET completed_count = completed_count + 1",
            r"UPDATE {}.batch SET received = '\x010001'",
            "DELETE FROM {}.part",
        )


async def tampered(world: World, *statements: str) -> None:
    """Change a Postgres store behind its back."""
    assert isinstance(world.store, PostgresStore)
    async with (await world.store._pool()).borrowed() as connection:
        for statement in statements:
            await connection.raw.execute(statement.format(world.store._schema))
