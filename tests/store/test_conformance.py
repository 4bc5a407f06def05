"""Conformance of every store, part 1: how batches are filled and completed.

The same tests run on every store. A test names the promise or the rule of the design that it checks. Claims and
settlements are in `test_conformance_leases.py`; queries, upkeep and verification are in `test_conformance_queries.py`.
Each test ends with a check of all invariants.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from headrace.core.block import Extra
from headrace.core.pack import JSON, TEXT
from headrace.core.span import Key, Settlement
from headrace.foundation.errors import (
    ClientFault,
    Conflict,
    IllegalTransition,
    InvalidInput,
    NotFound,
)
from headrace.foundation.ids import new_batch_id
from headrace.store.memory import MemoryStore
from headrace.store.postgres import PostgresStore
from headrace.store.protocol import NewBatch, Store
from headrace.store.sqlite import SqliteStore
from tests.support.store_rig import BOOM, StoreRig, chunks_of, settlement_of

STORES: list[type[Store]] = [MemoryStore, SqliteStore, PostgresStore]  # mypy checks here that each is a Store


# -- promises 1 and 2: accepted means durable, exactly once into the batch


async def test_accepted_runs_are_stored(rig: StoreRig) -> None:
    batch_id = await rig.batch(3)
    appended = await rig.append(batch_id, range(3), cursor=b"line 3")
    batch, ledger = await rig.store.batch(batch_id)
    assert (appended.accepted_count, appended.duplicates_count) == (3, 0)
    assert (batch.state, batch.received_count, batch.cursor) == ("open", 3, b"line 3")
    assert (ledger.expected, ledger.missing, ledger.waiting) == (3, 0, 3)


async def test_a_restream_adds_nothing_twice(rig: StoreRig) -> None:
    batch_id = await rig.batch(600)
    await rig.append(batch_id, range(600), cursor=b"end")
    again = await rig.append(batch_id, range(600))
    assert (again.accepted_count, again.duplicates_count, again.conflicts) == (0, 600, [])
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.received_count, ledger.waiting, batch.cursor) == (600, 600, b"end")


async def test_a_restream_of_a_sealed_batch_adds_nothing(rig: StoreRig) -> None:
    batch_id = await rig.filled(5)
    assert (await rig.append(batch_id, range(5))).duplicates_count == 5


async def test_a_partial_overlap_adds_what_is_new(rig: StoreRig) -> None:
    batch_id = await rig.batch(1_000)
    await rig.append(batch_id, range(100, 300))
    appended = await rig.append(batch_id, range(400), runs_max=150)
    assert (appended.accepted_count, appended.duplicates_count, appended.conflicts) == (200, 200, [])
    assert await rig.store.missing(batch_id, 5) == [(400, 1_000)]
    assert [run.index for run in await rig.store.runs("default", batch_id=batch_id, limit=900)] == list(range(400))


async def test_random_order_and_gaps_are_received_once(rig: StoreRig) -> None:
    batch_id = await rig.batch(500)
    shuffled = list(range(500))
    random.Random(7).shuffle(shuffled)
    await rig.append(batch_id, shuffled[:200], runs_max=40)
    assert sum(stop - start for start, stop in await rig.store.missing(batch_id, 500)) == 300
    await rig.append(batch_id, shuffled[100:], runs_max=70)
    assert await rig.store.missing(batch_id, 5) == []
    await rig.store.seal(batch_id, 500, now_us=rig.now_us)
    assert sorted(await rig.run_all(await rig.session())) == list(range(500))
    assert [outcome.result for outcome in await rig.outcomes(batch_id)] == [b"%d" % index for index in range(500)]


async def test_an_index_sent_again_with_other_content_is_a_conflict_and_the_first_content_is_kept(
    rig: StoreRig,
) -> None:
    batch_id = await rig.batch(300)
    await rig.append(batch_id, range(300))
    again = await rig.append(batch_id, range(250, 300), payload=lambda index: b"[%d]" % (index if index % 10 else 0))
    assert again.conflicts == [250, 260, 270, 280, 290]
    assert (await rig.store.run(batch_id, 250)).payload == b"[250]"


async def test_a_content_conflict_is_found_in_blocks_of_any_shape(rig: StoreRig) -> None:
    batch_id = await rig.batch(100)
    await rig.append(batch_id, range(0, 100, 2), runs_max=20)
    await rig.append(batch_id, range(1, 100, 2), runs_max=30)
    again = await rig.append(batch_id, range(100), payload=lambda index: b"x" if index in (3, 64) else b"[%d]" % index)
    assert (again.duplicates_count, again.conflicts) == (100, [3, 64])
    other_kind = await rig.append(batch_id, [5], kind=TEXT)
    assert other_kind.conflicts == [5]


async def test_an_index_twice_in_one_append_is_one_run(rig: StoreRig) -> None:
    batch_id = await rig.batch(10)
    chunks = chunks_of([0, 1, 2]) + chunks_of([2, 3], payload=lambda _: b"other")
    appended = await rig.store.append(batch_id, chunks, now_us=rig.now_us)
    assert (appended.accepted_count, appended.duplicates_count, appended.conflicts) == (4, 1, [2])
    assert (await rig.store.run(batch_id, 2)).payload == b"[2]"


async def test_two_concurrent_streams_of_one_batch_add_each_run_once(rig: StoreRig) -> None:
    batch_id = await rig.batch(400)
    starts = [*range(0, 400, 25), *range(0, 400, 40)]
    random.Random(3).shuffle(starts)
    appended = await asyncio.gather(*(rig.append(batch_id, range(start, min(start + 50, 400))) for start in starts))
    assert sum(answer.accepted_count for answer in appended) == 400
    assert not any(answer.conflicts for answer in appended)
    assert (await rig.store.seal(batch_id, None, now_us=rig.now_us)).state == "sealed"


async def test_a_failed_append_changes_nothing(rig: StoreRig) -> None:
    batch_id = await rig.batch(10)
    with pytest.raises(InvalidInput, match="is not in the batch"):
        await rig.store.append(batch_id, chunks_of([0, 1]) + chunks_of([10]), now_us=rig.now_us)
    batch, _ = await rig.store.batch(batch_id)
    assert (batch.received_count, await rig.store.missing(batch_id, 5)) == (0, [(0, 10)])


async def test_a_batch_key_names_one_batch_in_its_environment(rig: StoreRig) -> None:
    first = await rig.batch(key="nightly")
    assert await rig.batch(key="nightly") == first
    elsewhere = await rig.batch(key="nightly", environment="staging")
    assert elsewhere != first
    assert (batch := await rig.store.find_batch("default", "nightly")) is not None
    assert batch.id == first
    assert await rig.store.find_batch("default", "weekly") is None


async def test_creating_a_batch_again_returns_the_first(rig: StoreRig) -> None:
    new = NewBatch(id=new_batch_id(rig.now_us), expected_count=5, metadata={"who": ["é", None, 1.5]})
    created = await rig.store.create_batch(new, now_us=rig.now_us)
    again = await rig.store.create_batch(new, now_us=rig.later(1))
    assert (created[1], again[1], again[0]) == (True, False, created[0])
    assert again[0].metadata == {"who": ["é", None, 1.5]}


# -- promise 10: bad input gets a clear error and changes nothing


async def test_an_unreadable_item_fails_at_its_own_index_and_the_others_run(rig: StoreRig) -> None:
    batch_id = await rig.batch(4)
    await rig.append(batch_id, range(4), extras={1: Extra(failure=BOOM), 3: Extra(failure=BOOM)})
    await rig.store.seal(batch_id, None, now_us=rig.now_us)
    assert await rig.states(batch_id) == ["waiting", "failed", "waiting", "failed"]
    assert await rig.run_all(await rig.session()) == [0, 2]
    assert [outcome.result for outcome in await rig.outcomes(batch_id)] == [b"0", BOOM, b"2", BOOM]


async def test_a_batch_of_unreadable_items_completes_with_its_seal(rig: StoreRig) -> None:
    batch_id = await rig.batch(2)
    await rig.append(batch_id, range(2), extras={0: Extra(failure=BOOM), 1: Extra(failure=BOOM)})
    assert (await rig.store.seal(batch_id, None, now_us=rig.now_us)).state == "completed"


@pytest.mark.parametrize("count", [-1, 10_000_001])
async def test_a_batch_of_an_impossible_size_is_refused(rig: StoreRig, count: int) -> None:
    with pytest.raises(InvalidInput, match="expected 0 to"):
        await rig.batch(count)


async def test_an_open_ended_batch_is_bounded_too(rig: StoreRig) -> None:
    batch_id = await rig.batch()
    with pytest.raises(InvalidInput, match="is not in the batch"):
        await rig.append(batch_id, [10_000_000])


async def test_what_does_not_exist_is_not_found(rig: StoreRig) -> None:
    nothing, batch_id = new_batch_id(0), await rig.filled(1)
    for asked in (
        rig.store.batch(nothing),
        rig.append(nothing, [0]),
        rig.store.seal(nothing, None, now_us=1),
        rig.store.stop_batch(nothing, "cancelled", now_us=1),
        rig.store.cancel_runs(nothing, [0], now_us=1),
        rig.store.cancel_runs(batch_id, [1], now_us=1),
        rig.store.redrive(nothing, None),
        rig.store.redrive(batch_id, [1]),
        rig.store.missing(nothing, 1),
        rig.store.outcomes(nothing, 0, 1),
        rig.store.run(batch_id, 1),
        rig.store.run(nothing, 0),
        rig.store.verify(nothing),
    ):
        with pytest.raises(NotFound):
            await asked


async def test_an_impossible_settlement_changes_nothing(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(3), await rig.session()
    (lease,) = await rig.claim(session_id)
    for bad in (
        settlement_of(lease, "cmc", part_no=1),
        settlement_of(lease, "wss", part_no=1),
        settlement_of(lease, "cc", span_slots=[1, 3], part_no=1),
        settlement_of(lease, "cc", span_slots=[1, 1], part_no=1),
        settlement_of(lease, "rr", span_slots=[1, 1], part_no=1),
        settlement_of(lease, "cc", span_slots=[1, 2], results=[b"1"], part_no=1),
        Settlement(span_id=lease.span_id, token=lease.token, part_no=1, span_slots=None, codes=b"cc", results=b""),
    ):
        with pytest.raises(IllegalTransition):
            await rig.store.settle([settlement_of(lease, span_slots=[0]), bad], now_us=rig.now_us)
    assert await rig.states(batch_id) == ["leased"] * 3
    assert await rig.settle(lease) == "settled"


async def test_a_run_that_has_an_outcome_gets_no_other(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(2), await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.settle(lease, "f", span_slots=[0])
    with pytest.raises(IllegalTransition):
        await rig.settle(lease, "c", span_slots=[0], part_no=1)
    assert await rig.states(batch_id) == ["failed", "leased"]


async def test_unknown_states_and_names_are_refused(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(1), await rig.session()
    with pytest.raises(InvalidInput, match="as the state of a stopped batch"):
        await rig.store.stop_batch(batch_id, "completed", now_us=rig.now_us)
    with pytest.raises(InvalidInput, match="expected a state of a run"):
        await rig.store.runs("default", state="running")
    for runs_max in (0, -3):
        with pytest.raises(ClientFault):
            await rig.claim(session_id, runs_max)


async def test_payloads_of_any_bytes_and_kinds_come_back(rig: StoreRig) -> None:
    hostile = [b"", b"\x00", b"\xff\x00\x80" * 50, "é\u2028".encode(), b"x" * 70_000, b"'; DROP TABLE span; --"]
    batch_id = await rig.batch(len(hostile))
    await rig.append(batch_id, range(3), payload=hostile.__getitem__, kind=TEXT)
    await rig.append(batch_id, range(3, 6), payload=hostile.__getitem__, kind=JSON)
    first, second = await rig.claim(await rig.session())
    assert (first.payloads, first.kinds, second.payloads, second.kinds) == (
        hostile[:3],
        bytes([TEXT] * 3),
        hostile[3:],
        None,
    )
    await rig.settle(first, results=hostile[:3])
    await rig.settle(second, results=hostile[3:])
    await rig.store.seal(batch_id, None, now_us=rig.now_us)
    assert [outcome.result for outcome in await rig.outcomes(batch_id)] == hostile


async def test_names_of_any_text_come_back(rig: StoreRig) -> None:
    odd = "a\tb'\"\\u0000%_é😀"
    batch_id = await rig.batch(1, task=odd, key=odd)
    await rig.append(batch_id, [0], key=Key(odd, queue=odd), extras={0: Extra(tags=(odd,), idempotency_key=odd)})
    assert (await rig.store.runs("default", tag=odd))[0].task == odd
    (lease,) = await rig.claim(await rig.session(), tasks=[odd], queues=[odd])
    assert (lease.task, lease.queue, lease.extras[0].tags) == (odd, odd, (odd,))


@pytest.mark.parametrize("bad", ["a\0b", "\ud800"])
async def test_a_name_that_no_database_can_keep_is_refused(rig: StoreRig, bad: str) -> None:
    batch_id = await rig.batch(1)
    for more in (
        {"key": Key(bad)},
        {"key": Key("task", queue=bad)},
        {"extras": {0: Extra(tags=(bad,))}},
        {"extras": {0: Extra(idempotency_key=bad)}},
    ):
        with pytest.raises(InvalidInput):
            await rig.append(batch_id, [0], **more)


# -- promise 4: a batch completes exactly once


async def test_a_batch_that_finishes_before_its_seal_is_completed_by_the_seal(rig: StoreRig) -> None:
    batch_id = await rig.batch()
    await rig.append(batch_id, range(300))
    await rig.run_all(await rig.session())
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.state, batch.is_finished, ledger.completed) == ("open", False, 300)
    sealed = await rig.store.seal(batch_id, 300, now_us=rig.later(1))
    assert (sealed.state, sealed.finished_us) == ("completed", rig.now_us)
    again = await rig.store.seal(batch_id, 300, now_us=rig.later(1))
    assert again == sealed


async def test_the_last_outcome_completes_a_sealed_batch(rig: StoreRig) -> None:
    batch_id, session_id = await rig.filled(2), await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.settle(lease, span_slots=[0])
    assert (await rig.store.batch(batch_id))[0].state == "sealed"
    await rig.settle(lease, "f", span_slots=[1], part_no=1)
    assert (await rig.store.batch(batch_id))[0].state == "completed"


@pytest.mark.parametrize("in_order", [True, False])
async def test_the_last_append_seals_a_batch_that_it_completes(rig: StoreRig, in_order: bool) -> None:
    batch_id = await rig.batch(6)
    parts = ([0, 1, 2], [3, 4, 5]) if in_order else ([0, 2, 4], [1, 3, 5])
    first = await rig.append(batch_id, parts[0], seals=True)
    assert (first.accepted_count, first.sealed) == (3, None)
    assert (await rig.store.batch(batch_id))[0].state == "open"
    last = await rig.append(batch_id, parts[1], seals=True)
    assert last.sealed is not None
    assert (last.sealed.state, last.sealed.sealed_us) == ("sealed", rig.now_us)
    assert (await rig.store.batch(batch_id))[0] == last.sealed
    again = await rig.append(batch_id, parts[1], seals=True)
    assert (again.accepted_count, again.duplicates_count, again.sealed) == (0, 3, None)


async def test_an_append_seals_only_if_a_count_was_announced_and_sealing_was_requested(rig: StoreRig) -> None:
    open_ended, whole = await rig.batch(), await rig.batch(2)
    assert (await rig.append(open_ended, [0, 1], seals=True)).sealed is None
    assert (await rig.append(whole, [0, 1])).sealed is None
    assert {(await rig.store.batch(batch_id))[0].state for batch_id in (open_ended, whole)} == {"open"}
    assert (await rig.append(whole, [0, 1], seals=True)).sealed is not None, (
        "a repeat seals what the first append left open"
    )


async def test_a_batch_that_finished_before_its_sealing_append_is_completed_by_it(rig: StoreRig) -> None:
    batch_id, session_id = await rig.batch(3), await rig.session()
    await rig.append(batch_id, [0, 1, 2])
    for lease in await rig.claim(session_id):
        await rig.settle(lease)
    appended = await rig.append(batch_id, [2], seals=True)
    assert appended.sealed is not None
    assert (appended.sealed.state, appended.sealed.finished_us) == ("completed", rig.now_us)


async def test_a_refused_seal_names_the_missing_indexes_and_changes_nothing(rig: StoreRig) -> None:
    batch_id = await rig.batch(10)
    await rig.append(batch_id, [0, 1, 5])
    with pytest.raises(Conflict, match=r"missing: 2\.\.4, 6\.\.9"):
        await rig.store.seal(batch_id, None, now_us=rig.now_us)
    with pytest.raises(Conflict, match="sealed with 3"):
        await rig.store.seal(batch_id, 3, now_us=rig.now_us)
    assert (await rig.store.batch(batch_id))[0].state == "open"


async def test_an_open_ended_batch_is_sealed_at_its_received_count(rig: StoreRig) -> None:
    batch_id = await rig.batch()
    await rig.append(batch_id, range(3))
    with pytest.raises(Conflict):
        await rig.store.seal(batch_id, 4, now_us=rig.now_us)
    assert (await rig.store.seal(batch_id, None, now_us=rig.now_us)).expected_count == 3
    with pytest.raises(InvalidInput):
        await rig.append(batch_id, [3])


async def test_an_empty_batch_completes_with_its_seal(rig: StoreRig) -> None:
    assert (await rig.store.seal(await rig.batch(), None, now_us=rig.now_us)).state == "completed"
    assert (await rig.store.seal(await rig.batch(0), 0, now_us=rig.now_us)).state == "completed"
