"""The hot operations on PostgreSQL: one statement each (R7, a hot operation is one statement), answered from indexes
for tables of any size (R9, claims read lane by lane and sweep cancelled batches).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest

from headrace.core import run
from headrace.core.block import Extra
from headrace.core.span import Key, encode_uint16s
from headrace.foundation.errors import Conflict, IllegalTransition
from headrace.foundation.limits import DEFAULT
from headrace.store.postgres import PostgresStore
from headrace.store.postgres.fast_path import WHOLE_SPAN_SLOTS
from headrace.store.postgres.pool import SETTINGS, compiled
from tests.support.postgres_observer import other_connection, postgres_store, schema_of, sent_statements
from tests.support.store_rig import START_US, StoreRig, fresh_schema, indexes_of, settlement_of

T = TypeVar("T")


@pytest.fixture
def rig(tmp_path: Path) -> StoreRig:
    """Return a rig on a schema of its own."""
    return StoreRig(PostgresStore(fresh_schema(tmp_path), DEFAULT))


# -- R7: a hot operation is one statement


async def test_r7_a_claim_and_a_settlement_are_one_statement_each(rig: StoreRig) -> None:
    await rig.filled(256 * 20)
    session = await rig.session()
    for lease in await rig.claim(session, 256):  # this connects, and takes a range of ids
        await rig.settle(lease)
    leases, sent = await sent_statements(rig, lambda: rig.claim(session, 256 * 8))
    assert (len(leases), len(sent)) == (8, 1)
    settlements = [settlement_of(lease, object_keys=[f"default/b/{lease.span_id:064x}"]) for lease in leases]
    words, sent = await sent_statements(rig, lambda: rig.store.settle(settlements, now_us=rig.now_us))
    assert (set(words), len(sent)) == ({"settled"}, 1)


async def test_r7_one_lease_with_results_in_the_object_store_is_settled_in_one_statement_too(rig: StoreRig) -> None:
    await rig.filled(256 * 2)
    session = await rig.session()
    first, second = await rig.claim(session, 256 * 2)
    await rig.settle(first)  # this connects
    settlements = [settlement_of(second, object_keys=[f"default/b/{second.span_id:064x}"])]
    words, sent = await sent_statements(rig, lambda: rig.store.settle(settlements, now_us=rig.now_us))
    assert (words, sent) == (["settled"], ["settle_ended"])


async def test_r7_parts_of_a_span_are_settled_in_one_statement_too(rig: StoreRig) -> None:
    batch_id, session = await rig.filled(256), await rig.session()
    (lease,) = await rig.claim(session)
    parts = [list(range(100)), list(range(100, 256))]
    for part_no, span_slots in enumerate(parts):
        word, sent = await sent_statements(rig, partial(rig.settle, lease, span_slots=span_slots, part_no=part_no))
        assert (word, len(sent)) == ("settled", 1)
        assert await rig.settle(lease, span_slots=span_slots, part_no=part_no) == "recorded"
    assert [outcome.result for outcome in await rig.outcomes(batch_id)] == [b"%d" % index for index in range(256)]


async def test_r7_consecutive_runs_of_a_split_span_keep_their_block_offsets(rig: StoreRig) -> None:
    batch_id, session = await rig.filled(100), await rig.session()
    first, second, rest = [(await rig.claim(session, runs_max))[0] for runs_max in (30, 40, 100)]
    assert await rig.settle(second, "cf" * 5, span_slots=range(10), part_no=0) == "settled"
    assert await rig.settle(second, "x", span_slots=range(10, 40), part_no=1) == "settled"
    assert await rig.settle(rest, "c") == await rig.settle(first, "f") == "settled"
    states = await rig.states(batch_id)
    assert states[:30] == ["failed"] * 30
    assert states[30:40] == ["completed", "failed"] * 5
    assert states[40:] == ["cancelled"] * 30 + ["completed"] * 30
    assert await rig.settle(rest, "c", span_slots=[0, 1], part_no=7) == "lost"


@pytest.mark.parametrize("seed", range(4))
async def test_r7_runs_that_end_in_random_order_are_settled_in_one_statement_each_time(
    rig: StoreRig, seed: int
) -> None:
    dice = Random(seed)
    batch_id, session = await rig.filled(300), await rig.session()
    await rig.claim(session, 37)  # the rest is split off, and has block offsets of its own
    leases = await rig.claim(session, 263)
    wanted: dict[int, str] = {}
    left = [(lease, span_slot) for lease in leases for span_slot in lease.span_slots]
    dice.shuffle(left)
    for part_no, start in enumerate(range(0, len(left), 40)):
        settlements = []
        for lease in leases:
            span_slots = sorted(span_slot for leased, span_slot in left[start : start + 40] if leased is lease)
            codes = "".join(dice.choice("cfxe") for _ in span_slots)
            if span_slots:
                settlements.append(settlement_of(lease, codes, span_slots=span_slots, part_no=part_no))
                index_at = dict(zip(lease.span_slots, lease.indexes, strict=True))
                wanted |= {
                    index_at[span_slot]: run.NAMES[ord(code)] for span_slot, code in zip(span_slots, codes, strict=True)
                }
        words, sent = await sent_statements(rig, partial(rig.store.settle, settlements, now_us=rig.now_us))
        assert (set(words), sent) == ({"settled"}, ["settle_ended"])
        assert set(await rig.store.settle(settlements, now_us=rig.now_us)) == {"recorded"}
    states = await rig.states(batch_id)
    assert {index: states[index] for index in wanted} == wanted
    outcomes = await rig.store.outcomes(batch_id, 0, 300, passing=True)
    results = {outcome.index: outcome.result for outcome in outcomes}
    assert all(results[index] == b"%d" % index for index, state in wanted.items() if state == "completed")
    batch, _ = await rig.store.batch(batch_id)
    assert batch.counts.settled == len(wanted) == 263


@pytest.mark.parametrize("seed", range(8))
async def test_r7_runs_of_one_lease_are_settled_in_one_statement_in_consecutive_stretches(
    rig: StoreRig, seed: int
) -> None:
    dice = Random(seed)
    batch_id, session = await rig.filled(60), await rig.session()
    if seed % 2:
        await rig.claim(session, 7)  # the rest is split off, and has block offsets of its own
    (lease,) = await rig.claim(session, 60)
    index_at = dict(zip(lease.span_slots, lease.indexes, strict=True))
    wanted: dict[int, str] = {}
    left, part_no = list(lease.span_slots), 0
    while left:
        span_slots = sorted(dice.sample(left, dice.randint(1, min(9, len(left)))))
        if dice.random() < 0.3:  # adjacent runs
            start = dice.randrange(len(left))
            span_slots = [
                span_slot
                for number, span_slot in enumerate(left[start : start + 9])
                if span_slot == left[start] + number
            ]
        left = [span_slot for span_slot in left if span_slot not in span_slots]
        codes = "".join(dice.choice("cfxe") for _ in span_slots)
        settlements = [settlement_of(lease, codes, span_slots=span_slots, part_no=part_no)]
        words, sent = await sent_statements(rig, partial(rig.store.settle, settlements, now_us=rig.now_us))
        is_stretch = span_slots[-1] - span_slots[0] == len(span_slots) - 1
        assert (words, sent) == (["settled"], ["settle_stretch" if is_stretch else "settle_stretches"])
        assert await rig.store.settle(settlements, now_us=rig.now_us) == ["recorded"]
        wanted |= {index_at[span_slot]: run.NAMES[ord(code)] for span_slot, code in zip(span_slots, codes, strict=True)}
        states = await rig.states(batch_id)
        assert {index: states[index] for index in wanted} == wanted
        part_no += 1
    outcomes = await rig.store.outcomes(batch_id, 0, 60, passing=True)
    results = {outcome.index: outcome.result for outcome in outcomes}
    assert all(results[index] == b"%d" % index for index, state in wanted.items() if state == "completed")
    batch, _ = await rig.store.batch(batch_id)
    assert batch.counts.settled == len(wanted) == len(lease.span_slots)


async def test_r8_parts_of_one_lease_that_are_settled_at_once_are_all_recorded(rig: StoreRig) -> None:
    batch_id, session = await rig.filled(256), await rig.session()
    (lease,) = await rig.claim(session)
    for span_slots in [range(number, 256, 8) for number in range(4)]:  # scattered runs beside consecutive ones
        assert await rig.settle(lease, span_slots=span_slots, part_no=span_slots[0]) == "settled"
    parts = [
        settlement_of(lease, span_slots=[*range(4 + 8 * number, 8 + 8 * number)], part_no=9 + number)
        for number in range(31)
    ]
    parts += [
        settlement_of(lease, span_slots=[252, 254], part_no=90),
        settlement_of(lease, span_slots=[253, 255], part_no=91),
    ]
    words = await asyncio.gather(*(rig.store.settle([part], now_us=rig.now_us) for part in parts))
    assert words == [["settled"]] * 33
    assert await rig.states(batch_id) == ["completed"] * 256
    batch, _ = await rig.store.batch(batch_id)
    assert (batch.counts.completed, batch.state) == (256, "completed")


async def test_r7_a_run_among_others_that_has_an_outcome_leaves_all_of_them_to_the_script(rig: StoreRig) -> None:
    batch_id, session = await rig.filled(10), await rig.session()
    (lease,) = await rig.claim(session)
    assert await rig.settle(lease, "f", span_slots=[4], part_no=0) == "settled"
    settlements = [settlement_of(lease, "c", span_slots=[1, 4, 7], part_no=1)]
    with pytest.raises(IllegalTransition):
        await rig.store.settle(settlements, now_us=rig.now_us)
    assert (await rig.states(batch_id)).count("failed") == 1
    assert await rig.settle(lease, "c", span_slots=[1, 7], part_no=1) == "settled"
    assert [state for state in await rig.states(batch_id) if state == "completed"] == ["completed"] * 2


async def test_r7_small_claims_are_one_statement_each_too(rig: StoreRig) -> None:
    await rig.filled(300)
    session = await rig.session()
    order = indexes_of(await rig.claim(session, 8))
    while leases := (await sent_statements(rig, lambda: rig.claim(session, 8)))[0]:
        order += indexes_of(leases)
    assert order == list(range(300))
    await rig.recover(session)
    again = await rig.session()
    leases, sent = await sent_statements(rig, lambda: rig.claim(again, 5))
    assert (len(indexes_of(leases)), len(sent)) == (5, 1)


async def test_r7_a_claim_of_single_runs_learns_how_many_rows_it_needs(rig: StoreRig) -> None:
    batch_id, session = await rig.batch(), await rig.session()
    for index in range(200):
        await rig.append(batch_id, [index])
    assert len(await rig.claim(session, 60)) == 60
    leases, sent = await sent_statements(rig, lambda: rig.claim(session, 60))
    assert (indexes_of(leases), len(sent)) == (list(range(60, 120)), 1)


async def test_r7_a_settlement_with_a_stale_one_in_it_is_still_one_transaction(rig: StoreRig) -> None:
    batch_id, session = await rig.filled(256 * 3), await rig.session()
    stale, *rest = await rig.claim(session)
    assert await rig.release(stale) == "settled"
    settlements = [settlement_of(lease) for lease in (rest[0], stale, rest[1])]
    assert await rig.store.settle(settlements, now_us=rig.now_us) == ["settled", "lost", "settled"]
    assert await rig.store.settle(settlements, now_us=rig.now_us) == ["recorded", "lost", "recorded"]
    _, ledger = await rig.store.batch(batch_id)
    assert (ledger.completed, ledger.waiting) == (512, 256)


async def test_r7_an_append_that_follows_is_one_statement(rig: StoreRig) -> None:
    batch_id = await rig.batch(1_000)
    await rig.append(batch_id, range(10), runs_max=4)  # the batch has used the queue now, and ids are taken
    appended, sent = await sent_statements(rig, lambda: rig.append(batch_id, range(10, 300), b"cursor", runs_max=100))
    assert (appended.accepted_count, appended.duplicates_count, sent) == (290, 0, ["append_in_order"])
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.cursor, ledger.missing, ledger.waiting) == (b"cursor", 700, 300)
    assert await rig.run_all(await rig.session()) == list(range(300))


async def test_r7_an_append_out_of_order_is_left_to_the_script(rig: StoreRig) -> None:
    batch_id = await rig.batch(100)
    assert (await rig.append(batch_id, range(10))).accepted_count == 10
    cases: list[tuple[dict[str, Any], list[int], int]] = [
        ({}, list(range(5, 15)), 5),  # some of it was received
        ({}, [20, 21], 2),  # a gap
        ({}, list(range(15, 18)), 3),  # in the gap
        ({"key": Key("new", queue="unmet")}, [18, 19], 2),  # fills the gap, in a queue that the batch has not used
        ({"extras": {22: Extra(tags=("t",))}}, [22], 1),
    ]
    for more, indexes, count in cases:
        appended, sent = await sent_statements(rig, partial(rig.append, batch_id, indexes, **more))
        assert appended.accepted_count == count
        assert "begin" in sent
    postgres_store(rig)._out_of_order.hit(batch_id)
    _, sent = await sent_statements(rig, lambda: rig.append(batch_id, range(23, 30), key=Key("new", queue="unmet")))
    assert sent == ["append_in_order"]
    await rig.store.stop_batch(batch_id, "cancelled", now_us=rig.now_us)
    with pytest.raises(Conflict):
        await rig.append(batch_id, range(30, 31))


async def test_r7_a_batch_in_random_order_skips_the_statement_for_appends_in_order(rig: StoreRig) -> None:
    batch_id = await rig.batch()
    for index in (9, 7, 5):
        _, sent = await sent_statements(rig, partial(rig.append, batch_id, [index]))
        assert "append_in_order" in sent
    _, sent = await sent_statements(rig, lambda: rig.append(batch_id, [3]))
    assert "append_in_order" not in sent


async def test_r7_one_statement_writes_what_the_script_writes(rig: StoreRig) -> None:
    keys = [Key("task"), Key("task", priority=3), Key("other", queue="b", expires_us=START_US * 2, at_most_once=True)]
    keys.append(Key("task", due_us=START_US * 2))
    batch_ids = [await rig.batch() for _ in range(2)]
    for batch_id in batch_ids:
        await rig.append(batch_id, range(4), key=lambda index: keys[index])
    postgres_store(rig)._out_of_order.miss(batch_ids[1])
    postgres_store(rig)._out_of_order._counts[batch_ids[1]] = 100
    written = []
    for batch_id in batch_ids:
        _, sent = await sent_statements(
            rig, partial(rig.append, batch_id, range(4, 90), key=lambda index: keys[index % 4], runs_max=16)
        )
        assert (sent == ["append_in_order"]) == (batch_id == batch_ids[0])
        async with other_connection() as connection:
            rows = await connection.fetch(
                f'SELECT span.*, block.* FROM "{schema_of(rig)}".block JOIN "{schema_of(rig)}".span '
                "ON span.block_id = block.id WHERE block.batch_id = $1 ORDER BY block.first_index, span.id",
                batch_id,
            )
            batch = await connection.fetchrow(f'SELECT * FROM "{schema_of(rig)}".batch WHERE id = $1', batch_id)
        span_columns = {"id", "block_id", "batch_id", "created_us"}
        written.append([{name: row[name] for name in set(row.keys()) - span_columns} for row in (*rows, batch)])
    assert written[0] == written[1]
    assert len(written[0]) > 20


async def test_r7_concurrent_appends_of_the_same_runs_add_them_once(rig: StoreRig) -> None:
    batch_id = await rig.batch()
    await rig.append(batch_id, range(10))
    appended = await asyncio.gather(*(rig.append(batch_id, range(10, 200), runs_max=50) for _ in range(6)))
    assert sorted(answer.accepted_count for answer in appended) == [0] * 5 + [190]
    assert sum(answer.duplicates_count for answer in appended) == 5 * 190


# -- R9: claims read lane by lane, and plans over a long history

HISTORY = """
INSERT INTO {schema}.batch SELECT 'b' || g, 'default', NULL, 'batch', 'task', 'completed', 2560, 2560, 2560, 0, 0, 0,
    '{{}}', '', '{{}}', '', 1, 1, 1, 1, 0, 256, '' FROM generate_series(1, {count} / 10) AS g;
INSERT INTO {schema}.block SELECT g, 'b' || (g / 10 + 1), (g % 10) * 256, (g % 10) * 256 + 255, 256, NULL, NULL, 'x'
    FROM generate_series(1, {count}) AS g;
INSERT INTO {schema}.span SELECT g, g, 'b' || (g / 10 + 1), 'default', 'default', 'task', 0, 0, 0, 0, g, (g % 10) * 256,
    1, 0, 0, NULL, CASE WHEN g > {count} - 200 THEN 'www' ELSE 'ccc' END::bytea,
    CASE WHEN g > {count} - 200 THEN 3 ELSE 0 END,
    CASE WHEN g > {count} - 100 THEN 'waiting' WHEN g > {count} - 200 THEN 'leased' ELSE 'done' END,
    CASE WHEN g > {count} - 200 AND g <= {count} - 100 THEN 's' || (g % 7) ELSE '' END, g, 1, 0, '', 1
    FROM generate_series(1, {count}) AS g;
INSERT INTO {schema}.part (block_id, span_id, token, part_no, codes, results, settled_us)
    SELECT g, g, 1, 0, 'c', 'x', 1 FROM generate_series(1, {count}) AS g;
INSERT INTO {schema}.batch SELECT 'new', 'default', NULL, 'batch', 'task', 'open', NULL, 0, 0, 0, 0, 0,
    '{{"default": 0}}', '', '{{}}', '', 1, 1, 0, 0, 0, 256, '';
INSERT INTO {schema}.lane VALUES ('default', 'default', 'task');
INSERT INTO {schema}.queue VALUES ('default', 'default', 0, 0);
INSERT INTO {schema}.session SELECT 's' || g, 'worker', '', 1, 0, 0, 0, '', 'default', ''
FROM generate_series(0, 5000) AS g;
"""
TABLES = ("batch", "block", "span", "part", "session")
VALUES: dict[str, Any] = {
    "ids": "[4, 5, 6]",
    "rows": "[[1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]]",
    "names": '["default"]',
    "objects": "[]",
    "tasks": '["task"]',
    "queues": None,
    "queue_prefix": "",
    "blob": b"c",
    "span_slots": WHOLE_SPAN_SLOTS,
    "marks": "{}",
    "lanes": '[["default", "task"]]',
    "blocks": "[[0, 0, 1, 1, 1]]",
    "spans": '[[0, 0, "default", "task", 0, 0, 0, 0, 0, 0, 1, 0, -1, 0]]',
    "received_before": b"",
    "received": b"",
    "cursor": None,
    "environment": "default",
    "queue": "default",
    "task": "task",
    "session_id": "s1",
    "key_id": "",
    "batch_id": "b7",
    "id": "b7",
    "key": "key",
    "codes": b"c",
    "results": b"x",
    "kept_from": [0, 1],
    "kept_count": [0, 1],
    "codes_from": [0, 1],
    "codes_count": [1, 1],
}
PAGES_MAX = 400


def _part(count: int) -> dict[str, Any]:
    """Return all runs of a lease, or the first and the last one."""
    return {
        "span_id": count - 150, "token": 1, "part_no": 9, "span_slots": None, "codes": b"ccc", "results": b"x",
        "runs_count": 3, "completed": 0, "failed": 0, "cancelled": 0, "expired": 0, "span_slot": 0, "is_whole": 1,
        "end": 3,
    }  # fmt: skip


DONE: dict[str, Callable[[int], dict[str, Any]]] = {
    "claim_whole": lambda count: {"runs_max": 9, "rows_max": 5, "due_us": 1, "now_us": 1, "span_id": 10**9},
    "settle_ended": lambda count: {
        "rows": f"[[{count - 150}, 1, 3, 9, 0, 1, 1, 1, 1, 3, 0, 0, 0, 0, 3]]",
        "blob": b"ccc",
    },
    "settle_stretch": lambda count: _part(count),
    "settle_stretches": lambda count: (
        _part(count) | {"span_slots": encode_uint16s([0, 2]), "codes": b"cc", "runs_count": 2}
    ),
    "append_in_order": lambda count: {"batch_id": "new", "block_id": 10**9, "span_id": 10**9, "runs_max": 10**6},
}
PLANS = {
    "settle_ended": ["span_pkey", "batch_"],
    "settle_stretch": ["span_pkey", "batch_pkey"],
    "settle_stretches": ["span_pkey", "batch_pkey"],
    "append_in_order": ["batch_", "lane_pkey", "queue_pkey"],
    "claim_whole": ["span_claimable", "span_leased", "span_delayed", "block_pkey", "session_pkey"],
    "claim_candidates": ["span_claimable"],
    "claimed_before": ["span_leased"],
    "due_spans": ["span_delayed"],
    "lock_spans": ["span_pkey"],
    "update_spans": ["span_pkey"],
    "update_states": ["span_pkey"],
    "count_outcomes": ["batch_pkey"],
    "lock_spans_of_session": ["span_leased"],
    "leases_of_session": ["span_leased"],
    "recorded_part": ["part_once"],
    "blocks": ["block_pkey"],
    "blocks_from": ["block_by_index"],
    "spans_of_blocks": ["span_of_block"],
    "states_of_blocks": ["span_of_block"],
    "parts_of_blocks": ["part_once"],
    "unsettled_spans_of_batch": ["span_unsettled"],
    "leased_count": ["span_unsettled"],
    "expired_spans": ["span_expiring"],
    "lock_waiting": ["span_claimable"],
    "move_spans": ["span_pkey"],
    "stopping_batches": ["batch_unfinished"],
    "lock_batches": ["batch_"],
    "lock_streams_of_session": ["batch_of_session", "span_leased"],
}


@asynccontextmanager
async def with_history(
    rig: StoreRig, count: int = 20_000, *, is_sampled: bool = True
) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """Return the plan of a statement over so many chunks, most of them history, on a server without our settings.

    `is_sampled`: the statistics know leased spans. A sample of 30,000 rows has none of 100 in a million now and then.
    """
    schema = f'"{schema_of(rig)}"'
    rig.was_tampered_with = True
    async with other_connection() as connection:
        # Indexes are made after the rows, and nothing is logged: a million chunks in seconds.
        indexes = await connection.fetch(
            "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS made FROM pg_index "
            "JOIN pg_class ON pg_class.oid = indrelid WHERE relnamespace = $1::regnamespace AND NOT indisprimary "
            "AND relname = ANY ($2)",
            schema,
            list(TABLES),
        )
        for name in TABLES:
            await connection.execute(f"ALTER TABLE {schema}.{name} SET UNLOGGED")
        await connection.execute("; ".join(f"DROP INDEX {index['name']}" for index in indexes))
        await connection.execute(HISTORY.format(schema=schema, count=count))
        await connection.execute("; ".join(index["made"] for index in indexes))
        leased = (
            f"UPDATE {schema}.span SET state = '%s', session_id = %s WHERE id > {count - 200} AND id <= {count - 100}"
        )
        if not is_sampled:
            await connection.execute(leased % ("done", "''"))
        for name in TABLES:
            await connection.execute(f"VACUUM ANALYZE {schema}.{name}")
        if not is_sampled:
            await connection.execute(leased % ("leased", "'s' || (id % 7)"))
        yield lambda name: plan_of(connection, schema_of(rig), name)


async def plan_of(connection: Any, schema: str, name: str) -> str:
    sql, words, _ = compiled(schema)[name]
    ids = '["b4", "b5"]' if name == "lock_batches" else VALUES["ids"]
    values = [(VALUES | {"ids": ids}).get(word, 1) for word in words]
    return "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {sql}", *values))


@pytest.mark.parametrize(("count", "is_sampled"), [(20_000, True), (20_000, False), (1_000_000, False)])
async def test_r9_hot_statements_use_indexes_of_any_tables_and_statistics(
    rig: StoreRig, count: int, is_sampled: bool
) -> None:
    async with with_history(rig, count, is_sampled=is_sampled) as plan:
        for name, indexes in PLANS.items():
            text = await plan(name)
            for index in indexes:
                assert index in text, f"{name}\n{text}"
            for table in TABLES:
                assert f"Seq Scan on {table}" not in text, f"{name}\n{text}"
        for name, values in DONE.items():  # not only planned: it reads a few pages of tables of any size
            pages = await pages_touched(rig, name, values(count))
            assert 0 < pages < PAGES_MAX, (name, pages)


async def pages_touched(rig: StoreRig, name: str, values: dict[str, Any]) -> int:
    """Return how many pages a statement reads when it is run; it is rolled back."""
    sql, words, _ = compiled(schema_of(rig))[name]
    async with other_connection() as connection:
        await connection.execute("BEGIN")
        rows = await connection.fetch(
            f"EXPLAIN (ANALYZE, BUFFERS) {sql}", *((VALUES | values).get(word, 1) for word in words)
        )
        await connection.execute("ROLLBACK")
    plan = "\n".join(row[0] for row in rows)
    match = re.search(r"Buffers: shared hit=(\d+)(?: read=(\d+))?", plan)
    assert match is not None, plan
    return int(match[1]) + int(match[2] or 0)


async def test_r9_a_plan_made_for_empty_tables_is_the_same(rig: StoreRig) -> None:
    async with other_connection(server_settings=SETTINGS) as connection:
        for name in ("claim_whole", "settle_ended"):
            assert "Seq Scan" not in await plan_of(connection, schema_of(rig), name)


async def test_r9_a_claim_merges_lanes_by_priority_and_order(rig: StoreRig) -> None:
    session = await rig.session()
    first, second = await rig.batch(), await rig.batch()
    await rig.append(first, range(40), runs_max=10, key=Key("task", queue="a"))
    await rig.append(second, range(40), runs_max=10, key=Key("other", queue="b"))
    await rig.append(second, [40, 41], key=Key("task", queue="b", priority=5))
    (leases, sent) = await sent_statements(rig, lambda: rig.claim(session, 40, tasks=("task", "other")))
    assert [(lease.batch_id == second, lease.indexes[0]) for lease in leases] == [
        (True, 40), (False, 0), (True, 0), (False, 10), (True, 10)
    ]  # fmt: skip
    assert len(indexes_of(leases)) == 40
    assert sent[-1] == "claim_whole"


# -- R10: claims start at the queue's watermark


def marks_of(rig: StoreRig) -> list[tuple[int, int]]:
    """Return where the store would begin to scan."""
    return [mark for _, marks in postgres_store(rig)._claim_cursors._cursors.values() for mark in marks.values()]


async def test_r10_spans_before_the_cursor_are_found_each_poll_interval(rig: StoreRig) -> None:
    await rig.filled(100, runs_max=5)
    session = await rig.session()
    async with other_connection() as other:
        held = other.transaction()
        await held.start()
        schema = schema_of(rig)
        await other.execute(f'SELECT 1 FROM "{schema}".span ORDER BY order_no LIMIT 1 FOR UPDATE')
        assert indexes_of(await rig.claim(session, 10)) == list(range(5, 15))
        await held.rollback()
    assert [order_no for _, order_no in marks_of(rig)] == [10]
    assert indexes_of(await rig.claim(session, 10)) == list(range(15, 25))
    rig.later(DEFAULT.poll_interval_ms / 1_000)
    assert indexes_of(await rig.claim(session, 10)) == [*range(5), *range(25, 30)]


async def test_r10_a_claim_that_finds_too_little_from_the_cursor_scans_everything(rig: StoreRig) -> None:
    await rig.filled(30, runs_max=5)
    session = await rig.session()
    async with other_connection() as other:
        held = other.transaction()
        await held.start()
        await other.execute(f'SELECT 1 FROM "{schema_of(rig)}".span ORDER BY order_no LIMIT 1 FOR UPDATE')
        assert indexes_of(await rig.claim(session, 10)) == list(range(5, 15))
        await held.rollback()
    leases, sent = await sent_statements(rig, lambda: rig.claim(session, 20))
    assert sorted(indexes_of(leases)) == [*range(5), *range(15, 30)]
    assert sent == ["claim_whole"] * 2
    assert indexes_of(leases)[:5] == list(range(5))
    assert await rig.claim(session, 20) == []
    assert marks_of(rig) == []
    _, sent = await sent_statements(rig, lambda: rig.claim(session, 20))
    assert sent == ["claim_whole"]


async def test_r10_runs_of_a_higher_priority_are_not_hidden_by_the_cursor(rig: StoreRig) -> None:
    batch_id = await rig.batch()
    await rig.append(batch_id, range(100), runs_max=5)
    session = await rig.session()
    assert indexes_of(await rig.claim(session, 10)) == list(range(10))
    await rig.append(batch_id, range(100, 105), key=Key("task", priority=7))
    assert indexes_of(await rig.claim(session, 10)) == [*range(100, 105), *range(10, 15)]
    assert marks_of(rig) == [(0, 10)]
    assert indexes_of(await rig.claim(session, 10)) == list(range(15, 25))


async def test_r10_a_claim_from_a_cursor_starts_inside_the_index(rig: StoreRig) -> None:
    async with with_history(rig), other_connection() as connection:
        sql, words, _ = compiled(schema_of(rig))["claim_whole"]
        values = [(VALUES | {"marks": '{"default": {"task": [0, 19000]}}'}).get(word, 1) for word in words]
        plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {sql}", *values))
    assert "(priority = lanes_1.priority) AND (order_no >= lanes_1.mark)" in plan, plan
    assert "(priority > lanes" in plan, plan


# -- R13 (bulk writes are one statement with one blob) and R14 (a claim changes no counters)


async def test_r13_the_statements_of_an_append_do_not_grow_with_its_chunks(rig: StoreRig) -> None:
    sizes = []
    for number, runs_max in enumerate((500, 10)):
        batch_id = await rig.batch()
        extras = {0: Extra(tags=("one",)), 7: Extra(tags=("two",))}
        _, sent = await sent_statements(
            rig, partial(rig.append, batch_id, range(500), runs_max=runs_max, extras=extras)
        )
        sizes.append(len([name for name in sent if not name.startswith("next_")]))
        assert number or sent
    assert sizes[0] == sizes[1]


async def test_r14_a_claim_does_not_write_the_row_of_its_batch(rig: StoreRig) -> None:
    batch_id, session = await rig.filled(300), await rig.session()
    async with other_connection() as connection:
        row = f'SELECT xmin::text, xmax::text FROM "{schema_of(rig)}".batch WHERE id = $1'
        before = await connection.fetchrow(row, batch_id)
        assert len(indexes_of(await rig.claim(session, 5)) + indexes_of(await rig.claim(session))) == 300
        assert await connection.fetchrow(row, batch_id) == before
