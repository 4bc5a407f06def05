"""Throughput of the task broker without gRPC: `python -m bench.activations [sqlite|postgres …]`.

The benchmark has the shape of the store benchmark of Sentry's taskbroker (contract, section 8). 4,096 activations wait;
64 claimers fetch them one by one until none is left; then 64 reporters report on them one by one. Reports are written
(a) one by one, (b) by the flusher and acknowledged at once, (c) by default: acknowledged after the commit that holds
them. The baseline is the database alone: one connection that updates a row and commits repeatedly. Transactions and
rows are counted.
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from headrace.compose import open_engine
from headrace.core.pack import ACTIVATION
from headrace.foundation import interpreter
from headrace.foundation.settings import load
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker.activation_codec import decode_entry
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.dispatch.lease_buffer import QueueFilter
from headrace.runtime.dispatch.report_outcome import ActivationReport
from headrace.runtime.engine import Engine
from headrace.runtime.producing.producer import Producer

COUNT: Final = 4_096
WORKERS: Final = 64
ROUNDS: Final = 5
FILTER: Final = QueueFilter("sentry", ("benchmark",))


class CountingStore:
    """A store that counts settlements: transactions, and the rows written in them (a span and a part for each
    settlement).
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self.transactions = self.rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def settle(self, settlements: Any, **options: Any) -> Any:
        """Count a transaction: a span updated and a part inserted for each settlement, and the counters of the
        batch.
        """
        self.transactions += 1
        self.rows += 2 * len(settlements) + 1
        return await self._store.settle(settlements, **options)


async def append_activations(engine: Engine, count: int, **fields: Any) -> None:
    """Append `count` activations with these fields and unique ids."""
    producer = Producer(engine)
    began_us, runs = engine.clock.now_us(), []
    for number in range(count):
        message = wire.TaskActivation(
            id=f"{began_us:016x}{number:016x}",
            namespace="benchmark",
            taskname="t",
            processing_deadline_duration=10,
            **fields,
        )
        data = message.SerializeToString()
        entry = decode_entry(data, engine.limits, engine.clock.now_us())
        runs.append((entry.key, data, ACTIVATION, entry.extra))
    for start in range(0, count, 1_024):
        await producer.put_all(runs[start : start + 1_024])
    await producer.close()


async def calls_per_second(work: Callable[[int], Awaitable[None]]) -> float:
    """Return the calls a second of 64 callers that share the calls between them."""
    began = perf_counter()
    await asyncio.gather(*(work(number) for number in range(WORKERS)))
    return COUNT / (perf_counter() - began)


async def measure_once(engine: Engine, mode: str) -> tuple[float, float, float, float]:
    """Return `(claims/s, reports/s, transactions a report, rows a report)`."""
    store = CountingStore(engine.store)
    engine.store = store
    limits = engine.limits.replaced(flush_size=1) if mode == "a" else engine.limits
    dispatcher = Dispatcher(engine.with_limits(limits))
    await append_activations(engine, COUNT, application="sentry")
    await dispatcher.start()
    names: list[str] = []

    async def claim(_number: int) -> None:
        while (delivered := await dispatcher.fetch(FILTER)) is not None:
            names.append(delivered.name)

    claims = await calls_per_second(claim)
    assert len(set(names)) == COUNT, len(names)

    async def report(number: int) -> None:
        for name in names[number::WORKERS]:
            await dispatcher.report([ActivationReport(name, "completed")], is_awaited=mode != "b")

    began = perf_counter()
    await calls_per_second(report)
    await dispatcher.report([ActivationReport("nothing", "completed")])  # returns when the earlier reports are durable
    reports = COUNT / (perf_counter() - began)
    await dispatcher.stop()
    return claims, reports, store.transactions / COUNT, store.rows / COUNT


def baseline_sqlite(folder: Path) -> float:
    """Return the commits a second that update one row."""
    connection = sqlite3.connect(folder / "baseline.db", isolation_level=None)
    connection.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE t (id INTEGER PRIMARY KEY, s)"
    )
    connection.execute("INSERT INTO t VALUES (1, 0)")
    began = perf_counter()
    for number in range(500):
        connection.execute("UPDATE t SET s = ? WHERE id = 1", (number,))
    rate = 500 / (perf_counter() - began)
    connection.close()
    return rate


async def baseline_postgres(dsn: str) -> float:
    """Return the commits a second that update one row."""
    import asyncpg

    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "DROP TABLE IF EXISTS bench_baseline; CREATE TABLE bench_baseline (id int PRIMARY KEY, s int)"
    )
    await connection.execute("INSERT INTO bench_baseline VALUES (1, 0)")
    began = perf_counter()
    for number in range(500):
        await connection.execute("UPDATE bench_baseline SET s = $1 WHERE id = 1", number)
    rate = 500 / (perf_counter() - began)
    await connection.execute("DROP TABLE bench_baseline")
    await connection.close()
    return rate


async def measure(kind: str) -> None:
    """Print the figures of all modes on a kind of database."""
    from tests.support.postgres_server import server
    from tests.support.store_rig import fresh_schema

    baselines: list[float] = []
    results: dict[str, list[tuple[float, float, float, float]]] = {}
    for _ in range(ROUNDS):
        for mode in "abc":
            with tempfile.TemporaryDirectory(dir=".") as name:
                folder = Path(name).resolve()
                url = fresh_schema(folder) if kind == "postgres" else f"sqlite:///{folder / 'bench.db'}"
                baselines.append(
                    await baseline_postgres(server().dsn) if kind == "postgres" else baseline_sqlite(folder)
                )
                engine = await open_engine(load({"store": url}, {}, folder))
                try:
                    results.setdefault(mode, []).append(await measure_once(engine, mode))
                finally:
                    await engine.close()
    baseline = statistics.median(baselines)
    print(f"{kind}: {baseline:,.0f} commits/s of one row alone")
    for mode, rounds in results.items():
        claims, reports, transactions, rows = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"  ({mode}) {claims:>9,.0f} claims/s  {reports:>9,.0f} reports/s = {reports / baseline:5.1f} x baseline  "
            f"{transactions:.4f} transactions and {rows:.3f} rows a report"
        )


def main() -> None:
    """Measure the databases given as arguments, or both."""
    import uvloop

    interpreter.tune()
    for kind in sys.argv[1:] or ("sqlite", "postgres"):
        if kind not in ("sqlite", "postgres"):
            sys.exit(f"{kind}: expected sqlite or postgres")
        uvloop.run(measure(kind))


if __name__ == "__main__":
    main()
