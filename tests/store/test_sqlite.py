"""Tests of the SQLite store alone: groups, disks, locks, files, indexes, bytes."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from headrace.app import Headrace
from headrace.core.pack import pack
from headrace.core.span import Part
from headrace.foundation.errors import (
    HeadraceError,
    NotFound,
    SchemaOutdated,
    StoreBroken,
    StoreUnavailable,
    StoreUnreachable,
)
from headrace.foundation.limits import DEFAULT
from headrace.store.sqlite import SqliteStore
from headrace.store.sqlite.script_runner import SQL, run_script
from headrace.store.statements import migrations
from headrace.store.transactions.row_mapping import add_parts
from tests.support.logged_events import logged_events
from tests.support.store_rig import StoreRig, indexes_of, settlement_of

PACKAGE = "headrace.store.sqlite"


@asynccontextmanager
async def opened(path: Path, *, busy_timeout_ms: int = 200) -> AsyncIterator[StoreRig]:
    """Open a rig on one file, with all invariants at its end."""
    async with StoreRig(SqliteStore(path, DEFAULT, busy_timeout_ms=busy_timeout_ms)) as rig:
        yield rig


def sqlite_store(rig: StoreRig) -> SqliteStore:
    """Return the store of a rig as a SqliteStore."""
    assert isinstance(rig.store, SqliteStore)
    return rig.store


async def held_up(rig: StoreRig, work: Callable[[], Any]) -> None:
    """Run `work` while the writer is busy, so that its requests are one group."""
    loop = asyncio.get_running_loop()
    entered, go_on = asyncio.Event(), threading.Event()

    def hold(_: sqlite3.Connection) -> None:
        loop.call_soon_threadsafe(entered.set)
        go_on.wait()

    busy = asyncio.ensure_future(sqlite_store(rig)._writer.run(hold))
    await entered.wait()
    try:
        work()
        await asyncio.sleep(0)
    finally:
        go_on.set()
    await busy


# -- promise 1: accepted means durable


async def test_an_acknowledged_write_is_in_the_file(tmp_path: Path) -> None:
    async with opened(tmp_path / "db") as rig:
        batch_id = await rig.filled(300)
        (lease, _) = await rig.claim(await rig.session())
        await rig.settle(lease)
        checked = await rig.store.check()
        assert (checked["journal_mode"], checked["synchronous"]) == ("wal", "full")
    async with opened(tmp_path / "db") as again:
        _, ledger = await again.store.batch(batch_id)
        assert (ledger.completed, ledger.leased) == (256, 44)
        assert len(await again.outcomes(batch_id)) == 256


async def test_a_request_is_answered_after_its_commit(tmp_path: Path) -> None:
    async with opened(tmp_path / "db") as rig:
        batch_id = await rig.batch()
        statements: list[str] = []
        await traced(rig, statements.append)
        await rig.append(batch_id, range(3))
        assert statements[-1] == "COMMIT"
        assert statements.count("BEGIN IMMEDIATE") == 1
        with closing(sqlite3.connect(tmp_path / "db")) as other_connection:
            assert other_connection.execute("SELECT received_count FROM headrace_batch").fetchone() == (3,)


async def traced(rig: StoreRig, callback: Callable[[str], object] | None) -> None:
    """Record each statement that the writer's connection runs; statements of a trigger do not count."""

    def record(statement: str) -> None:
        if callback is not None and not statement.startswith("--"):
            callback(statement)

    await sqlite_store(rig)._writer.run(lambda c: c.set_trace_callback(record))


# -- R12: a failed group is replayed one request at a time


async def test_r12_waiting_requests_share_one_commit(tmp_path: Path) -> None:
    async with opened(tmp_path / "db") as rig:
        batch_id = await rig.batch()
        groups_before = sqlite_store(rig)._writer.groups_count
        appends: list[asyncio.Future[Any]] = []

        def work() -> None:
            appends.extend(asyncio.ensure_future(rig.append(batch_id, [index])) for index in range(50))

        await held_up(rig, work)
        assert sum(answer.accepted_count for answer in await asyncio.gather(*appends)) == 50
        assert sqlite_store(rig)._writer.groups_count - groups_before == 2, (
            "one group that kept the writer busy, and one for all requests"
        )


async def test_r12_a_failing_request_in_a_group_fails_alone(tmp_path: Path) -> None:
    async with opened(tmp_path / "db") as rig:
        batch_id = await rig.batch()
        asked: list[asyncio.Future[Any]] = []

        def late_refusal(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE headrace_batch SET task = 'half done'")
            raise NotFound("refused after it wrote")

        def broken(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE headrace_batch SET task = 'half done'")
            connection.execute("SELECT * FROM nowhere")

        def bug(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE headrace_batch SET task = 'half done'")
            raise ZeroDivisionError

        def work() -> None:
            for index in range(5):
                asked.append(asyncio.ensure_future(rig.append(batch_id, [index])))
                asked.append(asyncio.ensure_future(rig.store.batch("batch_of_nobody")))
                asked.append(asyncio.ensure_future(rig.append("batch_of_nobody", [0])))
            asked.extend(
                asyncio.ensure_future(sqlite_store(rig)._writer.run(request)) for request in (late_refusal, broken, bug)
            )
            asked.append(asyncio.ensure_future(rig.append(batch_id, [5])))

        await held_up(rig, work)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failures = [type(answer) for answer in answers if isinstance(answer, BaseException)]
        assert failures == [NotFound] * 11 + [StoreBroken, ZeroDivisionError]
        batch, _ = await rig.store.batch(batch_id)
        assert (batch.received_count, batch.task) == (6, "")


async def test_r12_a_full_disk_fails_requests_that_do_not_fit_and_loses_no_acknowledged_write(tmp_path: Path) -> None:
    async with opened(tmp_path / "db") as rig:
        batch_id = await rig.batch()
        await rig.append(batch_id, range(10))
        used = (await sqlite_store(rig)._writer.run(lambda c: c.execute("PRAGMA page_count").fetchone()))[0]
        await sqlite_store(rig)._writer.run(lambda c: c.execute(f"PRAGMA max_page_count = {used + 12}").fetchone())
        asked: list[asyncio.Future[Any]] = []

        def work() -> None:
            for index in range(10, 20):
                size = 200_000 if index % 2 else 10
                asked.append(
                    asyncio.ensure_future(rig.append(batch_id, [index], payload=lambda _, size=size: b"x" * size))
                )

        await held_up(rig, work)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        full = [answer for answer in answers if isinstance(answer, StoreUnavailable)]
        assert len(full) == 5
        assert all("disk" in str(error) and error.retryable for error in full)
        batch, _ = await rig.store.batch(batch_id)
        assert batch.received_count == 15
        await rig.check()
        await sqlite_store(rig)._writer.run(lambda c: c.execute("PRAGMA max_page_count = 1000000").fetchone())
        again = await rig.append(batch_id, [11], payload=lambda _: b"x" * 200_000)
        assert again.accepted_count == 1, "the same call works when there is space"


async def test_a_cancelled_caller_does_not_affect_other_requests(tmp_path: Path) -> None:
    async with opened(tmp_path / "db") as rig:
        batch_id = await rig.batch()
        asked: list[asyncio.Future[Any]] = []

        def work() -> None:
            asked.extend(asyncio.ensure_future(rig.append(batch_id, [index])) for index in range(2))

        await held_up(rig, work)
        asked[0].cancel()
        assert (await asked[1]).accepted_count == 1
        assert (await rig.append(batch_id, [0, 1])).duplicates_count == 2


# -- R13: bulk writes are one statement with one blob


@pytest.mark.parametrize("verb", ["append", "settle", "retry", "restream", "claim", "release"])
async def test_r13_the_number_of_statements_does_not_grow_with_the_spans(tmp_path: Path, verb: str) -> None:
    counts = []
    for spans_count in (4, 40):
        async with opened(tmp_path / f"{spans_count}.db") as rig:
            counts.append(await sent_statements(rig, verb, spans_count))
    assert counts[1] == counts[0]
    assert counts[0] < 25


async def sent_statements(rig: StoreRig, verb: str, spans_count: int) -> int:
    """Return how many statements one operation over so many spans runs on the writer's connection."""
    batch_id, session_id = await rig.batch(), await rig.session()
    runs_count = spans_count * 8
    statements: list[str] = []
    if verb != "append":
        await rig.append(batch_id, range(runs_count), runs_max=8)
    leases = await rig.claim(session_id) if verb in ("settle", "retry", "release") else []
    await traced(rig, statements.append)
    if verb in ("append", "restream"):
        await rig.append(batch_id, range(runs_count), runs_max=8)
    elif verb == "claim":
        assert len(await rig.claim(session_id)) == spans_count
    elif verb == "release":
        await rig.store.end_session(session_id, now_us=rig.now_us)
    else:
        codes = "r" if verb == "retry" else "c"
        settlements = [settlement_of(lease, codes, dues_us=[rig.now_us] * (codes == "r") * 8) for lease in leases]
        words = await rig.store.settle(settlements, now_us=rig.now_us)
        assert words == ["settled"] * spans_count
    await traced(rig, None)
    return len(statements)


async def test_r13_a_bulk_write_keeps_any_bytes(tmp_path: Path) -> None:
    chance = random.Random(11)
    pieces = [b"", b"\x00", b"\x00\x00x\x00", "é".encode(), b"\xff" * 300, b"'\"\\u0000"]
    pieces += [chance.randbytes(chance.randrange(400)) for _ in range(60)]
    async with opened(tmp_path / "db") as rig:

        def work(connection: sqlite3.Connection) -> list[tuple[bytes | None, bytes, bytes]]:
            parts = [
                Part(
                    block_id=10**9,
                    span_id=number,
                    token=1,
                    part_no=0,
                    block_offsets=None if number % 3 == 0 else piece,
                    codes=piece[::-1],
                    results=pack([piece]),
                    settled_us=2**53,
                )
                for number, piece in enumerate(pieces)
            ]
            run_script(connection, add_parts(parts))
            rows = connection.execute("SELECT positions, codes, results FROM headrace_part ORDER BY span_id").fetchall()
            connection.execute("DELETE FROM headrace_part")
            return rows

        kept = await sqlite_store(rig)._writer.run(work)
    assert kept == [
        (None if number % 3 == 0 else piece, piece[::-1], pack([piece])) for number, piece in enumerate(pieces)
    ]


# -- files and other processes


async def test_a_file_locked_by_another_process_fails_the_call_and_works_later(tmp_path: Path) -> None:
    async with opened(tmp_path / "db", busy_timeout_ms=20) as rig:
        batch_id = await rig.batch()
        with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answers = await asyncio.gather(
                *(rig.append(batch_id, [index]) for index in range(5)), return_exceptions=True
            )
            assert [type(answer) for answer in answers] == [StoreUnreachable] * 5
            assert "another process" in str(answers[0])
            assert (await rig.store.batch(batch_id))[0].received_count == 0, "reads continue"
            other.execute("ROLLBACK")
        assert (await rig.append(batch_id, range(5))).accepted_count == 5


async def test_two_stores_on_one_file_see_each_other_s_commits(tmp_path: Path) -> None:
    async with (
        opened(tmp_path / "db", busy_timeout_ms=5_000) as first,
        opened(tmp_path / "db", busy_timeout_ms=5_000) as second,
    ):
        batch_id = await first.batch(200)
        appended = await asyncio.gather(*(rig.append(batch_id, range(200)) for rig in (first, second, first, second)))
        assert sum(answer.accepted_count for answer in appended) == 200
        first_session, second_session = await first.session(), await second.session()
        claimed = await asyncio.gather(first.claim(first_session, 100), second.claim(second_session, 100))
        assert sorted(indexes_of([*claimed[0], *claimed[1]])) == list(range(200))


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\x00" + b"\x00\xff" * 3_000])
async def test_a_corrupt_file_is_reported_as_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "db").write_bytes(content)
    with pytest.raises(StoreBroken, match="damaged"):
        async with opened(tmp_path / "db"):
            pass
    assert (tmp_path / "db").read_bytes() == content


async def test_a_file_that_is_damaged_after_its_creation_is_reported(tmp_path: Path) -> None:
    async with opened(tmp_path / "db") as rig:
        await rig.filled(5_000)
    with (tmp_path / "db").open("r+b") as file:
        file.seek(4_096)
        file.write(b"\xa5" * 40_960)
    with pytest.raises(HeadraceError) as refused:
        async with opened(tmp_path / "db") as rig:
            await rig.batch()
    assert isinstance(refused.value, StoreBroken)


async def test_a_newer_schema_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    async with opened(tmp_path / "db"):
        pass
    with closing(sqlite3.connect(tmp_path / "db")) as connection:
        connection.execute("UPDATE headrace_version SET number = 999")
        connection.commit()
    with pytest.raises(StoreBroken, match="999") as refused:
        async with opened(tmp_path / "db"):
            pass
    assert "upgrade" in refused.value.hint


async def test_a_path_that_can_not_be_written_is_named_with_its_problem(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        folder = Path("/proc")  # a user who may write anywhere still can't write there
    for path, problem in (
        (folder / "db", str(folder)),
        (tmp_path / "missing" / "db", f"the directory {tmp_path}/missing does not exist"),
        (tmp_path, "it is a directory, expected a file"),
    ):
        with pytest.raises(StoreUnavailable, match=re.escape(f"can't write {path}: ")) as refused:
            async with opened(path):
                pass
        assert problem in refused.value.message
        assert refused.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to any file")
@pytest.mark.parametrize("closed", ["file", "directory"])
async def test_a_file_that_this_user_can_not_write_is_named_with_what_to_change(tmp_path: Path, closed: str) -> None:
    path = tmp_path / "own" / "db"
    path.parent.mkdir()
    async with opened(path):
        pass
    target = path if closed == "file" else path.parent
    target.chmod(0o444 if closed == "file" else 0o555)
    with pytest.raises(StoreUnavailable, match=re.escape(f"can't write {path}: the {closed}")) as refused:
        async with opened(path):
            pass
    assert str(target) in refused.value.hint
    target.chmod(0o755)


async def test_a_file_with_foreign_tables_of_our_prefix_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE headrace_batch (id INTEGER)")
        before = schema(connection)
    message = "expected the table headrace_version, got only headrace_batch"
    with pytest.raises(StoreBroken, match=f"{re.escape(str(path))} is not a Headrace database.*{message}") as refused:
        async with opened(path):
            pass
    assert "--store" in refused.value.hint
    with closing(sqlite3.connect(path)) as connection:
        assert schema(connection) == before


async def test_headrace_shares_a_file_with_an_application_of_any_table_names_and_version(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "db")) as connection:
        connection.executescript(
            "CREATE TABLE batch (id INTEGER); CREATE VIEW tag AS SELECT 1; CREATE TABLE orders (id INTEGER);"
            "CREATE INDEX batch_listed ON batch (id); PRAGMA user_version = 7"
        )
        before = schema(connection)
    async with opened(tmp_path / "db") as rig:
        await rig.filled(3)
    with closing(sqlite3.connect(tmp_path / "db")) as connection:
        after = schema(connection)
        assert connection.execute("PRAGMA user_version").fetchone() == (7,)
    assert set(before) <= set(after)
    made = {name for _, name, table, *_ in set(after) - set(before) if not name.startswith("sqlite_")}
    assert made
    assert {name for name in made if not name.startswith("headrace_")} == set()


async def test_a_store_that_must_not_migrate_creates_nothing(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "own")) as connection:
        connection.execute("CREATE TABLE batch (id INTEGER)")
        connection.commit()
    content = (tmp_path / "own").read_bytes()
    for name in ("own", "missing"):
        with pytest.raises(SchemaOutdated, match=r"expected the tables of Headrace in .*, got none") as refused:
            await SqliteStore(tmp_path / name, DEFAULT, migrates=False).open()
        assert "headrace migrate" in refused.value.hint
    assert (tmp_path / "own").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


async def test_a_store_that_must_not_migrate_works_on_a_current_schema(tmp_path: Path) -> None:
    async with opened(tmp_path / "db"):
        pass
    store = SqliteStore(tmp_path / "db", DEFAULT, migrates=False)
    await store.open()
    assert await store.queues("default") == []
    await store.close()


async def test_an_impossible_path_raises_instead_of_hanging(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null"):
        async with opened(Path(f"{tmp_path}/a\0b")):
            pass


def schema(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    """Return every table and index with its SQL."""
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name").fetchall()


async def test_a_fresh_schema_equals_a_migrated_one(tmp_path: Path) -> None:
    async with opened(tmp_path / "fresh"):
        pass
    scripts = migrations(PACKAGE)
    with closing(sqlite3.connect(tmp_path / "old")) as connection:
        connection.executescript(scripts[0][1])
        connection.execute("UPDATE headrace_version SET number = 1")
        connection.commit()
    async with opened(tmp_path / "old") as rig:
        await rig.filled(3)
    with closing(sqlite3.connect(tmp_path / "fresh")) as fresh, closing(sqlite3.connect(tmp_path / "old")) as old:
        assert schema(fresh) == schema(old)
        versions = [
            connection.execute("SELECT number FROM headrace_version").fetchone()[0] for connection in (fresh, old)
        ]
        assert versions == [scripts[-1][0]] * 2


# -- plans of hot statements

PLANS = {
    "claim_candidates": ["SEARCH span USING INDEX span_claimable (environment=? AND queue=? AND task=?)"],
    "due_spans": ["SEARCH span USING INDEX span_delayed (due_us<?)", "SEARCH queue USING PRIMARY KEY"],
    "claimed_before": ["SEARCH span USING INDEX span_leased (session_id=? AND claim_no=?)"],
    "lock_spans_of_session": ["SEARCH span USING INDEX span_leased (session_id=?)"],
    "leases_of_session": ["SEARCH span USING INDEX span_leased (session_id=?)"],
    "lock_spans": ["SEARCH span USING INTEGER PRIMARY KEY (rowid=?)"],
    "recorded_part": ["USING COVERING INDEX part_once (block_id=? AND span_id=? AND token=? AND part_no=?)"],
    "blocks_from": ["SEARCH block USING INDEX block_by_index (batch_id=? AND first_index>? AND first_index<?)"],
    "blocks": ["SEARCH block USING INTEGER PRIMARY KEY (rowid=?)"],
    "states_of_blocks": ["SEARCH span USING INDEX span_of_block (block_id=?)"],
    "parts_of_blocks": ["SEARCH part USING INDEX part_once (block_id=?)"],
    "expired_spans": ["SEARCH span USING INDEX span_expiring (expires_us>? AND expires_us<?)"],
    "unsettled_spans_of_batch": ["SEARCH span USING INDEX span_unsettled (batch_id=? AND state=?)"],
    "leased_count": ["SEARCH span USING INDEX span_unsettled (batch_id=? AND state=?)"],
    "update_spans": ["SEARCH span USING INTEGER PRIMARY KEY (rowid=?)"],
    "lease_spans": ["SEARCH span USING INTEGER PRIMARY KEY (rowid=?)"],
    "promote_spans": ["SEARCH span USING INTEGER PRIMARY KEY (rowid=?)"],
    "stopping_batches": ["SEARCH batch USING INDEX batch_unfinished (state=?)"],
    "lock_streams_of_session": ["SEARCH batch USING INDEX batch_of_session (session_id=?)"],
    "next_due": ["span_delayed"],
    "list_queues": ["span USING INDEX span_"],
    "open_batches": ["SEARCH batch USING INDEX batch_unfinished (state=?)"],
    "finished_batches": ["SEARCH batch USING INDEX batch_finished (finished_us>? AND finished_us<?)"],
    "batch_by_key": ["SEARCH batch USING INDEX batch_by_key (environment=? AND key=?)"],
    "list_batches": ["batch_listed (environment=?)"],
    "known_keys": ["SEARCH idempotency USING PRIMARY KEY (environment=? AND task=? AND key=?)"],
    "leases_without_session": ["span_leased"],
}


@pytest.mark.parametrize("name", PLANS)
async def test_a_hot_statement_uses_its_index(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path / "db") as rig:
        sql = SQL[name]
        words = set(re.findall(r":([a-z_]+)", sql))
        values = {word: "[]" if word in ("ids", "rows", "names") else b"" if word == "blob" else 1 for word in words}
        rows = await sqlite_store(rig)._writer.run(lambda c: c.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall())
    plan = "\n".join(row[3] for row in rows).replace("headrace_", "")
    for step in PLANS[name]:
        assert step in plan, plan
    for table in ("span", "block", "part", "batch"):
        assert f"SCAN {table}\n" not in plan + "\n", plan
    if name in ("claim_candidates", "blocks_from", "finished_batches", "list_batches"):
        assert "TEMP B-TREE" not in plan, plan


async def test_processes_that_create_one_file_at_once_all_open_it(tmp_path: Path) -> None:
    for round_no in range(20):
        stores = [SqliteStore(tmp_path / f"{round_no}.db", DEFAULT) for _ in range(4)]
        await asyncio.gather(*(store.open() for store in stores))
        await asyncio.gather(*(store.close() for store in stores))


async def test_a_deleted_or_replaced_file_is_reported_and_one_that_is_put_back_is_used(tmp_path: Path) -> None:
    path, away = tmp_path / "headrace.db", tmp_path / "away.db"
    async with opened(path) as rig:
        batch_id = await rig.batch()
        path.rename(away)
        for _ in range(2):
            with pytest.raises(
                StoreBroken, match=r"headrace.db that this process has open, but it was deleted or moved"
            ):
                await rig.append(batch_id, [0])
            with pytest.raises(StoreBroken, match="was deleted"):
                await rig.store.batch(batch_id)
        assert not path.exists(), "no new file is created in its place"
        path.touch()
        with pytest.raises(StoreBroken, match="was replaced by another file"):
            await rig.append(batch_id, [0])
        away.rename(path)
        await rig.append(batch_id, [0])
        assert (await rig.store.batch(batch_id))[0].received_count == 1


async def test_a_worker_without_work_reports_that_its_database_file_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "headrace.db"
    app = Headrace("deleted", store=f"sqlite:///{path}", poll_interval_ms=20)

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    with logged_events() as events:
        async with app, app.worker():
            assert await (await double.enqueue(1)).result(timeout_s=60) == 2
            away = path.rename(tmp_path / "away.db")
            async with asyncio.timeout(60):
                while not (reports := [event for event in events if event["event"] == "claim.failed"]):
                    await asyncio.sleep(0)
            away.rename(path)
    assert "that this process has open, but it was deleted or moved" in reports[0]["error"]
