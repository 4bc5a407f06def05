"""The scenarios: each is a function from a size and a target to a figure, with its own baseline if there is one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple

import msgspec

from headrace.benchmarks.targets import BenchmarkTarget, PostgresTarget, run
from headrace.benchmarks.tasks import app, held, nap, nothing, stamp
from headrace.core.block import Coalescer
from headrace.core.run import COMPLETED
from headrace.core.span import Key
from headrace.foundation.errors import EngineFault
from headrace.foundation.ids import new_batch_id
from headrace.handles import Batch
from headrace.runtime.engine import Engine
from headrace.runtime.sessions.session import StoreSession
from headrace.store.protocol import NewBatch, Release
from headrace.task import Task

PAD: Final = "x" * 79
NAP_CONCURRENCY: Final = 1_000
MIB: Final = 2**20
POLL_S: Final = 0.05
TIMEOUT_MS: Final = 5_000
GAP_S: Final = (0.01, 0.03)
CLAIMS: Final = 1_000
SORTED_ITEMS: Final = 16_384
STRIDE: Final = 7_919_239
"""A prime: its multiples modulo a size that it does not divide are all indexes, once each."""
ALL_STORES: Final = ("sqlite", "postgres")
POSTGRES_ONLY: Final = ("postgres",)
Measured = tuple[float, float | None]


class Scenario(NamedTuple):
    """A scenario: its unit, its number of runs, and the function; `is_slow` is measured once; `kinds` of stores it runs
    on.
    """

    name: str
    unit: str
    size: int
    measure: Callable[[int, Any], Measured]
    kinds: tuple[str, ...] = ALL_STORES
    is_slow: bool = False


def append(size: int, target: BenchmarkTarget) -> Measured:
    """Items per second from Python objects to durable runs."""

    async def timed() -> float:
        async with app:
            started = perf_counter()
            await nothing.map(_items(size))
            return size / (perf_counter() - started)

    with target.fresh():
        return run(timed()), None


def drain(size: int, target: BenchmarkTarget) -> Measured:
    """Runs per second from claim to durable outcome, in one process, with tasks that do nothing."""
    with target.fresh():
        return run(_drain(nothing, size, concurrency=100)), None


def sleep100ms(size: int, target: BenchmarkTarget) -> Measured:
    """Runs per second of tasks that wait 100 ms, 1,000 at a time: the limit is 10,000."""
    with target.fresh():
        return run(_drain(nap, size, concurrency=NAP_CONCURRENCY)), None


def drain4(size: int, target: BenchmarkTarget) -> Measured:
    """Runs per second of no-op tasks with four worker processes; the baseline is one worker process."""
    return _by_processes(size, target, 4), _by_processes(size, target, 1)


def snapshot(size: int, target: PostgresTarget) -> Measured:
    """`drain` while a reader holds a snapshot open; the baseline is without the reader."""

    async def held() -> float:
        connection = await target.connect()
        try:
            await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await connection.fetchval("SELECT count(*) FROM pg_class")
            return await _drain(nothing, size, concurrency=100)
        finally:
            await connection.close()

    with target.fresh():
        value = run(held())
    return value, drain(size, target)[0]


def dead_rows(size: int, target: PostgresTarget) -> Measured:
    """Row versions that `size` runs leave behind, from append to outcome; the baseline is the bound, one per 50
    runs.
    """
    with target.fresh():
        return run(_footprint(size, target, 0))[1], size / 50


def wal(size: int, target: PostgresTarget) -> Measured:
    """Bytes of WAL per run of 100 bytes, from append to outcome; the baseline is the bound."""
    with target.fresh():
        return run(_footprint(size, target, 0))[0], 250


def wal_small_claims(size: int, target: PostgresTarget) -> Measured:
    """Bytes of WAL per run if every claim is for 8 runs; the baseline is the bound."""
    with target.fresh():
        return run(_footprint(size, target, 8))[0], 800


def large_batch(size: int, target: BenchmarkTarget) -> Measured:
    """Items per second in the last tenth of one batch; the baseline is its first tenth."""
    return _growth(size, target).rates


def large_batch_memory(size: int, target: BenchmarkTarget) -> Measured:
    """Memory in MiB of the process after the last item of one batch; the baseline is after its first tenth."""
    return _growth(size, target).memory


def shuffled_batch(size: int, target: BenchmarkTarget) -> Measured:
    """Items per second in the last tenth of one batch with items in random order; the baseline is its first tenth."""
    with target.fresh():
        return run(_shuffled(size))


def claim_latency(size: int, target: BenchmarkTarget) -> Measured:
    """The 99th percentile in ms of claims of 8 runs with `size` waiting; the baseline is with a tenth of them."""

    async def measured() -> Measured:
        async with app:
            await nothing.map(_items(size // 10))
            base = await _claim_p99()
            await nothing.map(_items(size - size // 10))
            return await _claim_p99(), base

    with target.fresh():
        return run(measured())


def start_latency(size: int, target: BenchmarkTarget) -> Measured:
    """The median in ms from the call of `enqueue` to the start of the run in another process; the goal is 5."""
    return _started_after_ms(size, target)[size // 2], 5.0


def start_latency_p99(size: int, target: BenchmarkTarget) -> Measured:
    """The 99th percentile from the call of `enqueue` to the start in another process, in ms; the goal is 20."""
    return _started_after_ms(size, target)[size * 99 // 100], 20.0


def recovery(size: int, target: BenchmarkTarget) -> Measured:
    """Seconds from the kill -9 of a worker until all it had begun has begun in another that can't see it die.

    The base is the bound: the time after which a silent session counts as dead, and a second.
    """
    with target.fresh() as url, tempfile.TemporaryDirectory(prefix="bench-") as folder:
        return run(_recovered(size, url, Path(folder)))


def map_memory(size: int, target: BenchmarkTarget) -> Measured:
    """Peak memory in MiB of `headrace map` over `size` items; the baseline is the peak over a tenth of them."""
    return _map_peak(size, target), _map_peak(size // 10, target)


SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario("append", "items/s", 500_000, append),
        Scenario("drain", "runs/s", 500_000, drain),
        Scenario("sleep100ms", "runs/s", 50_000, sleep100ms),
        Scenario("map_memory", "MiB", 1_000_000, map_memory, is_slow=True),
        Scenario("large_batch", "items/s", 10_000_000, large_batch, is_slow=True),
        Scenario("large_batch_memory", "MiB", 10_000_000, large_batch_memory, is_slow=True),
        Scenario("shuffled_batch", "items/s", 10_000_000, shuffled_batch, is_slow=True),
        Scenario("claim_latency", "ms", 10_000_000, claim_latency, is_slow=True),
        Scenario("start_latency", "ms", 500, start_latency),
        Scenario("start_latency_p99", "ms", 500, start_latency_p99),
        Scenario("recovery", "s", 100, recovery, POSTGRES_ONLY),
        Scenario("drain4", "runs/s", 1_000_000, drain4, POSTGRES_ONLY),
        Scenario("snapshot", "runs/s", 500_000, snapshot, POSTGRES_ONLY),
        Scenario("dead_rows", "rows", 1_000_000, dead_rows, POSTGRES_ONLY, is_slow=True),
        Scenario("wal", "B/run", 1_000_000, wal, POSTGRES_ONLY, is_slow=True),
        Scenario("wal_small_claims", "B/run", 100_000, wal_small_claims, POSTGRES_ONLY, is_slow=True),
    )
}


def _items(size: int) -> Iterator[dict[str, object]]:
    return ({"n": number, "pad": PAD} for number in range(size))


async def _drain(task: Task[Any, Any], size: int, *, concurrency: int) -> float:
    async with app:
        batch = await task.map(_items(size))
        started = perf_counter()
        async with app.worker(tasks=[task.name], concurrency=concurrency):
            await _completed(batch, size)
            return size / (perf_counter() - started)


async def _completed(batch: Batch[Any], size: int) -> None:
    summary = await batch.wait()
    if summary.ledger.completed != size:
        raise EngineFault(f"expected {size} completed runs, got {summary.ledger.completed}")


async def _footprint(size: int, target: PostgresTarget, claim_runs: int) -> tuple[float, int]:
    """Return the bytes of WAL per run and the row versions left behind; `claim_runs`: runs per claim, instead of
    many.
    """
    async with app:
        await app.open()
        before = await target.footprint()
        batch = await nothing.map(_items(size))
        if claim_runs:
            await _settled_by(claim_runs)
        else:
            async with app.worker(tasks=[nothing.name], concurrency=100):
                await _completed(batch, size)
    after = await target.footprint()
    return (after.wal_bytes - before.wal_bytes) / size, after.dead_rows - before.dead_rows


class _Growth(NamedTuple):
    """Rate and memory in the last tenth of a batch, and in the first."""

    rates: tuple[float, float]
    memory: tuple[float, float]


def _growth(size: int, target: BenchmarkTarget) -> _Growth:
    """Map one batch of `size` items, measured at each tenth."""
    marks: list[tuple[float, float]] = []

    def watched() -> Iterator[dict[str, object]]:
        for number, item in enumerate(_items(size)):
            if number % (size // 10) == 0:
                marks.append((perf_counter(), _memory_mib()))
            yield item

    async def mapped() -> None:
        async with app:
            await nothing.map(watched())

    with target.fresh():
        run(mapped())
    marks.append((perf_counter(), _memory_mib()))
    seconds = [after[0] - before[0] for before, after in pairwise(marks)]
    return _Growth((size / 10 / seconds[-1], size / 10 / seconds[0]), (marks[-1][1], marks[1][1]))


def _memory_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


async def _shuffled(size: int) -> Measured:
    """Append items sorted by 16,384 at a time, as an ingest does; each index comes once, in pseudo-random order."""
    async with app:
        engine = await app.open()
        now_us = engine.clock.now_us()
        new = NewBatch(id=new_batch_id(now_us), expected_count=size)
        batch, _ = await engine.store.create_batch(new, now_us=now_us)
        payload, key = msgspec.json.encode({"n": 0, "pad": PAD}), Key(nothing.name)
        seconds = [0.0, 0.0]
        step = min(SORTED_ITEMS, size // 10)
        for first in range(0, size, step):
            coalescer = Coalescer(runs_max=engine.limits.chunk_runs_max, bytes_max=engine.limits.chunk_bytes_max)
            for index in sorted(n * STRIDE % size for n in range(first, min(first + step, size))):
                coalescer.add(index, payload, key)
            started = perf_counter()
            await engine.store.append(batch.id, coalescer.flush(), now_us=engine.clock.now_us())
            tenth = first * 10 // size
            if tenth in (0, 9):
                seconds[tenth // 9] += perf_counter() - started
        await engine.store.seal(batch.id, size, now_us=engine.clock.now_us())
    return size / 10 / seconds[1], size / 10 / seconds[0]


async def _claim_p99() -> float:
    session = StoreSession(await app.open(), kind="worker")
    await session.start()
    taken_s = []
    for _ in range(CLAIMS):
        started = perf_counter()
        leases = await session.claim([nothing.name], None, 8)
        taken_s.append(perf_counter() - started)
        for work in leases:
            await session.end_lease(work, [Release(span_id=work.lease.span_id, token=work.lease.token)])
    await session.stop()
    return sorted(taken_s)[CLAIMS * 99 // 100] * 1_000


def _started_after_ms(size: int, target: BenchmarkTarget) -> list[float]:
    """Return the sorted start latencies of runs that are enqueued one by one while another process waits for them."""

    async def measured() -> list[float]:
        async with app:
            engine = await app.open()
            await _wait_for_workers(engine, 1)
            await (await stamp.enqueue(time.monotonic_ns())).result()
            runs = []
            for _ in range(size):
                await engine.clock.sleep(random.uniform(*GAP_S))  # noqa: S311 - so that no two clocks keep step
                runs.append(await stamp.enqueue(time.monotonic_ns()))
            return sorted([await handle.result() / 1_000_000 for handle in runs])

    with target.fresh() as url, _workers(url, 1):
        return run(measured())


async def _settled_by(claim_runs: int) -> None:
    """Claim and settle `claim_runs` at a time, until no run is left."""
    session = StoreSession(await app.open(), kind="worker")
    await session.start()
    while leases := await session.claim([nothing.name], None, claim_runs):
        for work in leases:
            for _ in range(work.count):
                work.end(work.begin(), COMPLETED, b"null")
            settlement = work.take_settlement()
            assert settlement is not None
            await session.end_lease(work, [settlement])
    await session.stop()


def _by_processes(size: int, target: BenchmarkTarget, processes: int) -> float:
    """Runs per second of worker processes that are idle when the runs are published."""

    async def timed() -> float:
        async with app:
            engine = await app.open()
            await engine.store.pause_queue("default", "default", paused=True)
            batch = await nothing.map(_items(size))
            await _wait_for_workers(engine, processes)
            started = perf_counter()
            await engine.store.pause_queue("default", "default", paused=False)
            engine.wakeup.notify()
            await _completed(batch, size)
            return size / (perf_counter() - started)

    with target.fresh() as url, _workers(url, processes):
        return run(timed())


async def _recovered(size: int, url: str, folder: Path) -> Measured:
    """Kill one of two workers whose in-flight marks are in separate folders, as on two machines."""
    log = folder / "held.log"
    log.touch()

    def worker(name: str) -> subprocess.Popen[bytes]:
        runtime = folder / name
        runtime.mkdir()
        times = {"HEADRACE_HEARTBEAT_MS": "1000", "HEADRACE_SESSION_TIMEOUT_MS": str(TIMEOUT_MS)}
        command = [sys.executable, "-m", "headrace", "worker", "headrace.benchmarks.tasks:app"]
        return subprocess.Popen(  # noqa: S603 - our own command
            [*command, "--store", url, "--concurrency", str(2 * size)],
            env={**os.environ, **times, "HELD_LOG": str(log), "XDG_RUNTIME_DIR": str(runtime)},
            stderr=subprocess.DEVNULL,
        )

    async def begun(engine: Engine, pid: int) -> None:
        while len({line for line in log.read_text(encoding="ascii").splitlines() if line.endswith(f" {pid}")}) < size:
            await engine.clock.sleep(POLL_S / 5)

    workers: list[subprocess.Popen[bytes]] = []
    async with app:
        engine = await app.open()
        try:
            await held.map(range(size))
            for name in ("first", "second"):
                workers.append(worker(name))
                await _wait_for_workers(engine, len(workers))
                await begun(engine, workers[0].pid)
            started = perf_counter()
            workers[0].kill()
            await begun(engine, workers[1].pid)
            return perf_counter() - started, TIMEOUT_MS / 1_000 + 1
        finally:
            for process in workers:
                process.kill()
                process.wait()


async def _wait_for_workers(engine: Engine, workers_count: int) -> None:
    """Return when this many workers have a session."""
    while len([session for session in await engine.maintenance.sessions() if session.kind == "worker"]) < workers_count:
        await engine.clock.sleep(POLL_S)


@contextmanager
def _workers(url: str, processes: int) -> Iterator[None]:
    command = [sys.executable, "-m", "headrace", "worker", "headrace.benchmarks.tasks:app"]
    command += ["--store", url, "--processes", str(processes), "--concurrency", "100"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603 - our own command
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def _map_peak(size: int, target: BenchmarkTarget) -> float:
    """Run the command alone and return the peak memory of it and its children, from the kernel."""
    with target.fresh() as url, tempfile.TemporaryDirectory(prefix="bench-") as folder:
        source, output = Path(folder) / "items.ndjson", Path(folder) / "results.ndjson"
        with source.open("w") as file:
            for number in range(size):
                file.write(f'{{"n":{number},"pad":"{PAD}"}}\n')
        command = [sys.executable, "-m", "headrace", "map", "headrace.benchmarks.tasks:nothing", str(source)]
        command += ["-o", str(output), "--store", url, "--no-progress"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)  # noqa: S603 - our own command
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        lines_count = sum(piece.count(b"\n") for piece in _pieces(output))
        if process.returncode or lines_count != size:
            raise EngineFault(f"map exited with code {process.returncode} after {lines_count} of {size} results")
        return usage.ru_maxrss * 1024 / MIB


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(MIB):
            yield piece
