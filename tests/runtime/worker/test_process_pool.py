"""Process pool: the runs of child processes, and their state after a child was killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.app import Headrace
from headrace.foundation.errors import InvalidSetting
from headrace.foundation.limits import DEFAULT, MIB
from headrace.runtime.clock import SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.worker.worker import Worker
from tests.support import pool_tasks
from tests.support.engines import on_each_store, opened

ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def running_worker(engine: Engine, **options: Any):  # type: ignore[no-untyped-def]  # the decorator's own
    """Attach the app of `pool_tasks` to an engine and run a worker, which is stopped at once at the end of the
    block.
    """
    app = pool_tasks.app
    app.use_engine(engine)
    defaults: dict[str, Any] = {"processes": 0, "concurrency": 4, "tasks": options.pop("tasks", None)}
    worker = Worker(engine, app.registry, **(defaults | options))
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop(now=True)
        if app._producer is not None:
            await app._producer.close()
        app._producer = app._engine = None


async def outputs(batch: Any) -> list[Any]:
    return [outcome.output if outcome.ok else outcome.failure.type async for outcome in batch.results()]


async def wait_for_lines(path: Path, count: int) -> list[str]:
    """Wait until a file has `count` lines, and return its lines."""
    clock = SystemClock()
    while not path.exists() or path.read_text().count("\n") < count:
        await clock.sleep(0.005)
    return path.read_text().splitlines()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@on_each_store
async def test_runs_are_spread_over_children_and_their_results_come_in_order(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, inline_bytes_max=100_000) as engine, running_worker(engine):
        assert await outputs(await pool_tasks.double.map(range(2_000))) == [2 * item for item in range(2_000)]
        assert await outputs(await pool_tasks.async_double.map(range(300))) == [2 * item for item in range(300)]
        pids = set(await outputs(await pool_tasks.pid.map(range(500))))
        assert os.getpid() not in pids
        assert await outputs(await pool_tasks.raises.map(range(5))) == [
            0,
            "SystemExit",
            "KeyboardInterrupt",
            "ValueError",
            4,
        ]
        assert await outputs(await pool_tasks.renamed.map([0, 1])) == ["ValueError", 1]


async def test_a_result_of_3_mb_is_returned_through_the_object_store(tmp_path: Path) -> None:
    async with opened("sqlite", tmp_path) as engine, running_worker(engine, tasks=["large"]):
        (result,) = await outputs(await pool_tasks.large.map([3_000_000]))
        assert len(result) == 3_000_000
        assert await outputs(await pool_tasks.large.map([DEFAULT.inline_bytes_max - 3])) == [
            "x" * (DEFAULT.inline_bytes_max - 3)
        ]
        assert len([stored async for stored in engine.payloads.list()]) == 1


async def test_every_task_may_run_in_children(tmp_path: Path) -> None:
    async with (
        opened("sqlite", tmp_path) as engine,
        running_worker(engine, processes=2, tasks=["in_a_thread_of_a_child", "renamed", "double"]),
    ):
        results = await outputs(await pool_tasks.in_a_thread_of_a_child.map(range(20)))
        assert {attempt for _, attempt in results} == {2}
        assert os.getpid() not in {pid for pid, _ in results}
        batch = await pool_tasks.renamed.map([0, 1, 2])
        assert await outputs(batch) == ["ValueError", 1, 2]
        assert (await engine.store.run(batch.id, 0)).attempt == 3


async def test_a_crash_charges_only_begun_runs(tmp_path: Path) -> None:
    side = tmp_path / "side"
    async with (
        opened("sqlite", tmp_path) as engine,
        running_worker(engine, tasks=["killed_once", "double"], processes=1),
    ):
        run = await pool_tasks.killed_once.enqueue(str(side))
        doubled = await pool_tasks.double.map(range(256))
        assert await outputs(doubled) == [2 * item for item in range(256)]
        assert await run.result() == 1
        view = await run.view()
        assert (view.attempt, view.crashes) == (1, 1)
        assert {(await engine.store.run(doubled.id, index)).crashes_count for index in range(256)} == {0}


async def test_a_run_that_kills_its_process_is_isolated_and_the_other_runs_complete(tmp_path: Path) -> None:
    side = tmp_path / "side"
    async with opened("sqlite", tmp_path) as engine, running_worker(engine, tasks=["noted"], processes=2):
        batch = await pool_tasks.noted.map([{"path": str(side), "item": item, "poison": 100} for item in range(256)])
        results = await outputs(batch)
        assert results == [item if item != 100 else "WorkerCrashed" for item in range(256)]
        views = [await engine.store.run(batch.id, index) for index in range(256)]
        assert {view.attempt for view in views} == {1}
        ran = Counter(int(line) for line in side.read_text().split())
        assert ran[100] == DEFAULT.crashes_max
        for view in views:
            if view.index != 100:
                assert view.crashes_count <= 2
                assert ran[view.index] <= 1 + DEFAULT.crashes_max * 2
        (failed,) = [outcome async for outcome in batch.results() if not outcome.ok]
        assert failed.failure is not None
        assert "exited with code 7" in failed.failure.message
        assert failed.failure.crashes == DEFAULT.crashes_max


async def test_an_at_most_once_run_that_kills_its_process_fails_and_no_other_runs_twice(tmp_path: Path) -> None:
    side = tmp_path / "side"
    async with opened("sqlite", tmp_path) as engine, running_worker(engine, tasks=["noted_once"], processes=2):
        items = [{"path": str(side), "item": item, "poison": 10} for item in range(40)]
        results = await outputs(await pool_tasks.noted_once.map(items))
        ran = Counter(int(line) for line in side.read_text().split())
        assert set(ran.values()) == {1}
        assert results[10] == "WorkerLost"
        assert {output for output in results if isinstance(output, str)} == {"WorkerLost"}


@pytest.mark.parametrize("task", ["stuck_in_c", "stuck_in_python", "stuck_in_a_coroutine"])
async def test_a_run_that_ignores_its_timeout_is_ended(task: str, tmp_path: Path) -> None:
    async with opened("sqlite", tmp_path) as engine, running_worker(engine, tasks=[task]):
        batch = await getattr(pool_tasks, task).map([0, 1, 0])
        assert await outputs(batch) == [0, "TimeoutError", 0]
        views = [await engine.store.run(batch.id, index) for index in range(3)]
        assert [(view.attempt, view.crashes_count) for view in views] == [(1, 0)] * 3


@on_each_store
async def test_a_cancelled_batch_stops_in_children(kind: str, tmp_path: Path) -> None:
    side = tmp_path / "side"
    async with (
        opened(kind, tmp_path, heartbeat_ms=10, session_timeout_ms=60_000) as engine,
        running_worker(engine, tasks=["waits"]),
    ):
        batch = await pool_tasks.waits.map([{"path": str(side), "item": item} for item in range(50)])
        await wait_for_lines(side, 1)
        await batch.cancel()
        summary = await batch.wait()
        assert summary.ledger.cancelled == 50
    lines = side.read_text().splitlines()
    began = {line.split()[1] for line in lines if line.startswith("began")}
    assert {line for line in lines if line.startswith("heard")} == {f"heard {item} True" for item in began}


async def test_a_stop_interrupts_children_and_releases_their_runs_uncharged(tmp_path: Path) -> None:
    side = tmp_path / "side"
    async with opened("sqlite", tmp_path) as engine:
        async with running_worker(engine, tasks=["blocks", "waits"]):
            batches = [
                await task.map([{"path": str(side), "item": 1}]) for task in (pool_tasks.blocks, pool_tasks.waits)
            ]
            lines = await wait_for_lines(side, 2)
        for batch in batches:
            view = await engine.store.run(batch.id, 0)
            assert (view.state, view.attempt, view.crashes_count) == ("waiting", 1, 0)
        (pid,) = [int(line.split()[1]) for line in lines if not line.startswith("began")]
        assert not is_alive(pid)
        assert list(tmp_path.glob("headrace.db.live/*")) == []


async def test_a_task_that_a_child_cannot_import_is_refused_at_the_start(tmp_path: Path) -> None:
    def local(item: int) -> int:
        return item

    app = Headrace("lost")
    app.registry.add(TaskSpec("local", local, pool="process"))
    async with opened("sqlite", tmp_path) as engine:
        worker = Worker(engine, app.registry, concurrency=2)
        with pytest.raises(InvalidSetting, match="defined inside a function"):
            await worker.start()
        assert await engine.maintenance.sessions() == []
        assert list(tmp_path.glob("headrace.db.live/*")) == []


async def test_a_task_with_other_options_in_the_child_is_refused_at_the_start(tmp_path: Path) -> None:
    app = Headrace("other")
    app.registry.add(TaskSpec("late", pool_tasks._plain, pool="process", timeout_s=5))
    async with opened("sqlite", tmp_path) as engine:
        with pytest.raises(InvalidSetting, match="other options"):
            await Worker(engine, app.registry, concurrency=2).start()


# -- scripts: real processes from the outside

SCRIPT = """
import asyncio, os, signal, sys
from headrace import Headrace

app = Headrace("script", store="sqlite:///headrace.db", poll_interval_ms=50)

@app.task(pool="process")
def work(item: int) -> int:
    with open("side", "a") as file:
        file.write(f"{item} {os.getpid()}\\n")
    if MODE == "pause":
        signal.pause()
    return item * 2

MODE = os.environ.get("MODE", "")

async def main() -> None:
    async with app.worker(concurrency=2):
        batch = await work.map(range(4), batch_key="once")
        print("mapped", flush=True)
        print([outcome.output async for outcome in batch.results()], flush=True)
    await app.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


def start_script(folder: Path, mode: str = "", *, code: str = SCRIPT, module: bool = False) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(textwrap.dedent(code))
    command = ["-m", "script"] if module else ["script.py"]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "MODE": mode},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("module", [False, True])
async def test_tasks_of_a_script_run_in_children(module: bool, tmp_path: Path) -> None:
    with start_script(tmp_path, module=module) as script:
        out, _ = await asyncio.to_thread(script.communicate)
    assert out == "mapped\n[0, 2, 4, 6]\n"
    assert script.returncode == 0


async def test_children_of_a_killed_parent_end_and_the_next_worker_continues_at_once(tmp_path: Path) -> None:
    side = tmp_path / "side"
    with start_script(tmp_path, "pause") as first:
        lines = await wait_for_lines(side, 2)
        first.send_signal(signal.SIGKILL)
        first.wait()
        if first.stdout is not None:
            first.stdout.close()
    children = {int(line.split()[1]) for line in lines}
    clock = SystemClock()
    while any(is_alive(pid) for pid in children):
        await clock.sleep(0.005)
    with start_script(tmp_path) as second:
        out, _ = await asyncio.to_thread(second.communicate)
    assert out.endswith("[0, 2, 4, 6]\n")
    begun = {int(line.split()[0]) for line in lines}
    async with opened("sqlite", tmp_path) as engine:
        ((batch, _),) = [entry for entry in await engine.store.batches("default") if entry[0].key == "once"]
        views = [await engine.store.run(batch.id, index) for index in range(4)]
        assert {view.index for view in views if view.crashes_count} == begun
        assert {view.attempt for view in views} == {1}


async def test_a_ctrl_c_to_the_process_group_reaches_the_parent_only(tmp_path: Path) -> None:
    with start_script(tmp_path, "pause") as script:
        lines = await wait_for_lines(tmp_path / "side", 2)
        pids = {int(line.split()[1]) for line in lines}
        os.killpg(script.pid, signal.SIGINT)
        assert script.stdout is not None
        assert all(os.getpgid(pid) != script.pid and is_alive(pid) for pid in pids)
        script.kill()
        script.communicate()


@pytest.mark.parametrize("kind", ["memory", "postgres"])
async def test_large_payloads_and_results_of_children_pass_their_parent_where_only_it_reaches_the_objects(
    tmp_path: Path, kind: str
) -> None:
    async with (
        opened(kind, tmp_path, item_bytes_max=32 * MIB) as engine,
        running_worker(engine, tasks=["large", "size"]),
    ):
        (result,) = await outputs(await pool_tasks.large.map([20_000_000]))
        assert len(result) == 20_000_000
        assert await outputs(await pool_tasks.size.map(["x" * 3_000_000, "y"])) == [3_000_000, 1]
        assert len([stored async for stored in engine.payloads.list()]) == 2


async def test_a_child_gets_the_error_of_an_object_that_its_parent_misses(tmp_path: Path) -> None:
    async with opened("memory", tmp_path) as engine:
        pool_tasks.app.use_engine(engine)
        batch = await pool_tasks.size.map(["x" * 600_000])
        await engine.payloads.delete([stored.key async for stored in engine.payloads.list()])
        async with running_worker(engine, tasks=["size"]):
            assert await outputs(batch) == ["OBJECT_MISSING"]
