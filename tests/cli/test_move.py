"""`headrace move`: copy a SQLite file to a schema of PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from headrace import compose
from headrace.app import Headrace
from headrace.core.block import Extra
from headrace.core.retry import Retry
from headrace.core.span import Key
from headrace.foundation.errors import Conflict, HeadraceError, StoreBroken
from headrace.foundation.settings import load
from headrace.runtime.engine import Engine
from headrace.store.protocol import DeadLetter
from headrace.store.sqlite import SqliteStore, copy_source
from headrace.store.store_copy import NOTHING, Belongings
from tests.cli.conftest import Shell
from tests.support import invariants
from tests.support.store_rig import StoreRig, chunks_of, fresh_schema

RUNS = 100_000


def app_on(store: str, folder: Path, name: str, *, stop_at: int = 0) -> tuple[Headrace, Any, asyncio.Event]:
    """Make an app with one task that fails sometimes; after `stop_at` runs it signals this and starts no more."""
    app = Headrace(
        "moving",
        store=store,
        objects=str(folder / f"{name}.objects") if store.startswith("sqlite") else None,
        inline_bytes_max=2_000,
        shutdown_grace_s=1,
    )
    reached, ran = asyncio.Event(), [0]

    @app.task(name="work", retry=Retry(attempts=2, backoff="exponential", delay_s=0.001))
    async def work(n: int) -> str:
        ran[0] += 1
        if stop_at and ran[0] >= stop_at:
            reached.set()
            await asyncio.Event().wait()
        if n % 1_000 == 7:
            raise ValueError(f"never {n}")
        return "x" * (5_000 if n % 5_000 == 3 else n % 7)

    return app, work, reached


async def half_finished(url: str, folder: Path, runs_count: int) -> str:
    """Create a batch of which about half has run, and whose worker is gone."""
    app, work, reached = app_on(url, folder, "source", stop_at=runs_count // 2)
    async with app:
        batch = await work.map(range(runs_count), batch_key="the-batch")
        async with app.worker(concurrency=50):
            await reached.wait()
    return str(batch.id)


async def finished(url: str, folder: Path, name: str, batch_id: str) -> list[Any]:
    """Run the remaining runs, and return all outcomes in order."""
    app, _, _ = app_on(url, folder, name)
    async with app, app.worker():
        batch = await app.get_batch(batch_id)
        await batch.wait()
        engine = await app.open()
        assert await invariants.faults(engine.store, "default") == []
        return [
            (outcome.state, outcome.output, outcome.failure and outcome.failure.message)
            async for outcome in batch.results()
        ]


def test_a_batch_moved_while_it_ran_completes_like_one_that_was_not_moved(shell: Shell) -> None:
    place = shell.place
    source, target = f"sqlite:///{place}/source.db", fresh_schema(place)
    batch_id = asyncio.run(half_finished(source, place, RUNS))
    (place / "stays").mkdir()
    stays = f"sqlite:///{place}/stays/source.db"
    stayed_id = asyncio.run(half_finished(stays, place / "stays", RUNS))
    flags = ["--source-objects", str(place / "source.objects")]
    ran = shell("move", source, target, *flags, "--json")
    assert ran.code == 0, ran.err
    assert ran.json | {"objects": 0} == {
        "batches": 1, "blocks": 391, "runs": RUNS, "objects": 0, "objects_missing": [], "resumed": False
    }  # fmt: skip
    assert ran.json["objects"] > 0
    moved = asyncio.run(finished(target, place, "target", batch_id))
    assert moved == asyncio.run(finished(stays, place / "stays", "source", stayed_id))
    assert shell("verify", "--store", target).code == 0
    again = shell("move", source, target)
    assert (again.code, "was moved to" in again.err) == (2, True)


def test_the_moved_file_accepts_no_writes_from_any_process(shell: Shell) -> None:
    source, target = f"sqlite:///{shell.place}/a.db", fresh_schema(shell.place)

    async def story() -> None:
        app, work, _ = app_on(source, shell.place, "a")
        async with app:
            batch = await work.map(range(10))
            engine = await app.open()
            await _ended(app)
            assert (await asyncio.to_thread(shell, "move", source, target)).code == 0
            with pytest.raises(StoreBroken, match="moved to another store"):
                await work.enqueue(1)
            with pytest.raises(StoreBroken, match="moved to another store"):
                await batch.cancel()
            assert (await engine.store.batch(batch.id))[1].waiting == 10, "it can still be read"

    asyncio.run(story())


async def _ended(app: Headrace) -> None:
    """End the session of an app's producer, as if other processes had taken it for crashed."""
    producer, app._producer = app._producer, None
    assert producer is not None
    await producer.close()


def test_a_move_is_refused_while_a_process_uses_the_file(shell: Shell) -> None:
    source, target = f"sqlite:///{shell.place}/a.db", fresh_schema(shell.place)

    async def story() -> None:
        app, work, _ = app_on(source, shell.place, "a")
        async with app, app.worker():
            await (await work.map(range(10))).wait()
            ran = await asyncio.to_thread(shell, "move", source, target)
            assert ran.code == 2
            assert "expected no other process on this file" in ran.err
            await (await work.map(range(10))).wait()

    asyncio.run(story())


async def opened(url: str, folder: Path) -> Engine:
    objects = str(folder / "objects") if url.startswith("sqlite") else None
    return await compose.open_engine(load({"store": url, "objects": objects}, {}, folder))


class Cut(Exception):
    """The process is gone."""


class Cutting:
    """A copy target whose n-th answer is lost."""

    def __init__(self, arrival: Any, steps: int) -> None:
        self._arrival = arrival
        self._left = steps

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._arrival, name)

        async def called(*args: Any, **kwargs: Any) -> Any:
            answer = await method(*args, **kwargs)
            self._left -= 1
            if not self._left:
                raise Cut
            return answer

        return called


@pytest.mark.parametrize("steps", range(1, 11))
async def test_an_interrupted_move_resumes(steps: int, tmp_path: Path) -> None:
    source_url, target_url = f"sqlite:///{tmp_path}/a.db", fresh_schema(tmp_path)
    app, work, _ = app_on(source_url, tmp_path, "a")
    async with app:
        ids = [(await work.map(range(20_000), batch_key=f"key-{n}")).id for n in range(2)]
        run = await work.options(idempotency_key="once", tags=["red"], delay_s=3_600).enqueue(5)
        await _ended(app)
    source, target = await opened(source_url, tmp_path), await opened(target_url, tmp_path)
    try:
        dead = await _died(source)
        await source.store.keep_rules("default", "killswitch", b"[]", before=None)
        move = compose.mover(source, target)
        move.copy_target = Cutting(move.copy_target, steps)
        try:
            await move.run("target", lambda _runs, _total: None)
        except Cut:
            moved = await compose.mover(source, target).run("target", lambda _runs, _total: None)
            assert moved.resumed
        for batch_id in [*ids, run.batch_id]:
            before, after = await source.store.batch(batch_id), await target.store.batch(batch_id)
            assert (after[1], after[0].state, after[0].key) == (before[1], before[0].state, before[0].key)
            assert after[0].metadata == before[0].metadata
        assert await invariants.faults(target.store, "default") == []
        (view,) = await target.store.runs("default", tag="red")
        assert (view.state, view.batch_id, view.index) == ("delayed", run.batch_id, run.index)
        assert await target.store.verify(ids[0]) == await source.store.verify(ids[0])
        assert await target.store.dead_letters("default") == dead
        assert await target.store.rules("default") == {"killswitch": b"[]"}
    finally:
        await source.close()
        await target.close()


async def test_lists_of_different_lengths_are_each_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch may have many tags and few keys: the list that ends first must not start again."""
    monkeypatch.setattr(copy_source, "PAGE_ROWS", 2)
    source = await opened(f"sqlite:///{tmp_path}/a.db", tmp_path)
    try:
        rig = StoreRig(source.store)
        extras = {
            index: Extra(idempotency_key=f"key {index}" if index < 3 else "", tags=("red", "blue")[: 1 + index % 2])
            for index in range(9)
        }
        batch_id = await rig.batch(9)
        await source.store.append(batch_id, chunks_of(range(9), extras=extras), now_us=rig.now_us)
        departure = copy_source.SqliteCopySource(cast("SqliteStore", source.store))
        pages: list[Belongings] = []
        page: Belongings | None = None
        while (page := await departure.belongings(batch_id, page)) != NOTHING:
            pages.append(page)
            assert len(pages) <= 7, "the lists never end"
        assert sorted(key for page in pages for _, key, *_ in page.keys) == [f"key {index}" for index in range(3)]
        tags = sorted(tag for page in pages for tag in page.tags)
        assert tags == sorted([("red", index) for index in range(9)] + [("blue", index) for index in range(1, 9, 2)])
    finally:
        await source.close()


async def _died(engine: Engine) -> list[DeadLetter]:
    """Create a dead letter in the store."""
    rig = StoreRig(engine.store)
    session_id = await rig.session()
    await rig.filled(1, key=Key("old", dead_letter=True))
    (lease,) = await rig.claim(session_id, tasks=["old"])
    await rig.settle(lease, "f")
    await engine.store.end_session(session_id, now_us=rig.now_us)
    return await engine.store.dead_letters("default")


async def test_an_undone_move_leaves_both_stores_unchanged(tmp_path: Path) -> None:
    source_url, target_url = f"sqlite:///{tmp_path}/a.db", fresh_schema(tmp_path)
    app, work, _ = app_on(source_url, tmp_path, "a")
    async with app:
        batch = await work.map(range(30_000))
        await _ended(app)
        source, target = await opened(source_url, tmp_path), await opened(target_url, tmp_path)
        move = compose.mover(source, target)
        with pytest.raises(Conflict, match="no move"):
            await move.undo()
        seen = []

        def cut(runs: int, _total: int) -> None:
            seen.append(runs)
            if len(seen) == 2:
                raise Cut

        with pytest.raises(Cut):
            await move.run("target", cut)
        with pytest.raises(StoreBroken):
            await work.enqueue(1)
        with pytest.raises(HeadraceError):
            await compose.mover(source, target).run("elsewhere", lambda _runs, _total: None)
        await move.undo()
        async with app.worker():
            assert (await batch.wait()).ledger.completed == 30_000 - 30
        await _ended(app) if app._producer is not None else None
        moved = await compose.mover(source, target).run("target", lambda _runs, _total: None)
        assert (moved.resumed, moved.runs) == (False, 30_000)
        assert await invariants.faults(target.store, "default") == []
        with pytest.raises(Conflict, match="run in the target already"):
            await move.undo()
        await source.close()
        await target.close()


def test_a_batch_key_in_both_stores_stops_the_move_before_copying(shell: Shell) -> None:
    source, target = f"sqlite:///{shell.place}/a.db", fresh_schema(shell.place)

    async def filled(url: str, name: str) -> None:
        app, work, _ = app_on(url, shell.place, name)
        async with app:
            await work.map(range(10), batch_key="nightly")

    asyncio.run(filled(source, "a"))
    asyncio.run(filled(target, "b"))
    ran = shell("move", source, target)
    assert ran.code == 2
    assert "'nightly'" in ran.err
    assert shell("move", source, target, "--undo").code == 0


def test_a_killed_move_is_completed_by_repeating_the_command(shell: Shell) -> None:
    source, target = f"sqlite:///{shell.place}/a.db", fresh_schema(shell.place)
    batch_id = asyncio.run(half_finished(source, shell.place, 60_000))
    command = [sys.executable, "-m", "headrace", "move", source, target, "--no-progress"]
    command += ["--source-objects", str(shell.place / "source.objects")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not asyncio.run(_pages(target)) and process.poll() is None:
            pass
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was killed half-way"
    done = subprocess.run([*command, "--json"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"]
    assert shell("verify", "--store", target).code == 0
    assert shell("batch", "show", batch_id, "--store", target, "--json").json["expected"] == 60_000


async def _pages(target: str) -> int:
    """Count the source's blocks that a move has copied, once it has created the schema."""
    dsn, _, schema = target.partition("?schema=")
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval(f'SELECT coalesce(max(block_id), 0) FROM "{schema}".move'))
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return 0
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("postgresql://nobody@127.0.0.1:1/x", "sqlite:///b.db", "can't be reached|connect|refused"),
        ("sqlite:///nothing.db", "sqlite:///b.db", "there is no database"),
    ],
)
def test_an_impossible_move_is_refused(shell: Shell, source: str, target: str, message: str) -> None:
    ran = shell("move", source, target)
    assert ran.code != 0
    assert re.search(message, ran.err), ran.err


async def test_only_sqlite_into_postgres(tmp_path: Path) -> None:
    first, second = await opened(f"sqlite:///{tmp_path}/a.db", tmp_path), await opened("memory://", tmp_path)
    try:
        with pytest.raises(HeadraceError, match="expected a move from SQLite to PostgreSQL"):
            compose.mover(first, second)
    finally:
        await first.close()
        await second.close()
