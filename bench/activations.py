"""The task broker without its wire: `python -m bench.activations [sqlite|postgres …]`.

The field's own store bench, in its shape (contract, section 8): 4,096 activations wait; 64 claimers fetch them one by
one until there are none, then 64 reporters report on them one by one. Reports are written (a) singly, (b) by the
flusher and answered at once, (c) as they are by default, answered after the commit that holds them. The floor is the
database alone: one connection that updates a row and commits, again and again. Transactions and rows are counted.
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
WISH: Final = QueueFilter("sentry", ("benchmark",))


class Counted:
    """A store that counts settlements: transactions, and rows written in them (a span and a part for each)."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.transactions = self.rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def settle(self, settlements: Any, **more: Any) -> Any:
        """One transaction: a span updated and a part inserted for each settlement, and each batch's counters."""
        self.transactions += 1
        self.rows += 2 * len(settlements) + 1
        return await self._store.settle(settlements, **more)


async def filled(engine: Engine, count: int, **fields: Any) -> None:
    """What waits: so many activations, with these fields and an id each."""
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


async def side_by_side(work: Callable[[int], Awaitable[None]]) -> float:
    """Calls a second of 64 who each do a share of them."""
    began = perf_counter()
    await asyncio.gather(*(work(number) for number in range(WORKERS)))
    return COUNT / (perf_counter() - began)


async def once(engine: Engine, way: str) -> tuple[float, float, float, float]:
    """`(claims/s, reports/s, transactions and rows a report)`."""
    counted = Counted(engine.store)
    engine.store = counted
    limits = engine.limits.replaced(flush_size=1) if way == "a" else engine.limits
    dispatcher = Dispatcher(engine.with_limits(limits))
    await filled(engine, COUNT, application="sentry")
    await dispatcher.start()
    names: list[str] = []

    async def claim(_number: int) -> None:
        while (handout := await dispatcher.fetch(WISH)) is not None:
            names.append(handout.name)

    claims = await side_by_side(claim)
    assert len(set(names)) == COUNT, len(names)

    async def report(number: int) -> None:
        for name in names[number::WORKERS]:
            await dispatcher.report([ActivationReport(name, "completed")], is_awaited=way != "b")

    began = perf_counter()
    await side_by_side(report)
    await dispatcher.report([ActivationReport("nothing", "completed")])  # what was answered before is durable now
    reports = COUNT / (perf_counter() - began)
    await dispatcher.stop()
    return claims, reports, counted.transactions / COUNT, counted.rows / COUNT


def floor_sqlite(folder: Path) -> float:
    """Commits a second of one updated row."""
    connection = sqlite3.connect(folder / "floor.db", isolation_level=None)
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


async def floor_postgres(dsn: str) -> float:
    """Commits a second of one updated row."""
    import asyncpg

    connection = await asyncpg.connect(dsn)
    await connection.execute("DROP TABLE IF EXISTS bench_floor; CREATE TABLE bench_floor (id int PRIMARY KEY, s int)")
    await connection.execute("INSERT INTO bench_floor VALUES (1, 0)")
    began = perf_counter()
    for number in range(500):
        await connection.execute("UPDATE bench_floor SET s = $1 WHERE id = 1", number)
    rate = 500 / (perf_counter() - began)
    await connection.execute("DROP TABLE bench_floor")
    await connection.close()
    return rate


async def measured(kind: str) -> None:
    """All ways on one kind of database."""
    from tests.support.postgres_server import server
    from tests.support.store_rig import fresh_schema

    floors: list[float] = []
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for _ in range(ROUNDS):
        for way in "abc":
            with tempfile.TemporaryDirectory(dir=".") as name:
                folder = Path(name).resolve()
                store = fresh_schema(folder) if kind == "postgres" else f"sqlite:///{folder / 'bench.db'}"
                floors.append(await floor_postgres(server().dsn) if kind == "postgres" else floor_sqlite(folder))
                engine = await open_engine(load({"store": store, "objects": str(folder / "objects")}, {}, folder))
                try:
                    found.setdefault(way, []).append(await once(engine, way))
                finally:
                    await engine.close()
    floor = statistics.median(floors)
    print(f"{kind}: {floor:,.0f} commits/s of one row alone")
    for way, rounds in found.items():
        claims, reports, transactions, rows = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"  ({way}) {claims:>9,.0f} claims/s  {reports:>9,.0f} reports/s = {reports / floor:5.1f} x floor  "
            f"{transactions:.4f} transactions and {rows:.3f} rows a report"
        )


def main() -> None:
    """Measure what was named, or both."""
    import uvloop

    interpreter.tune()
    for kind in sys.argv[1:] or ("sqlite", "postgres"):
        if kind not in ("sqlite", "postgres"):
            sys.exit(f"{kind}: sqlite or postgres")
        uvloop.run(measured(kind))


if __name__ == "__main__":
    main()
