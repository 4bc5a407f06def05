"""Dead rows of single jobs at light load on PostgreSQL, while another connection holds a snapshot.

    python -m bench.dead_rows [--rate 150] [--seconds 10] [--json]

A producer enqueues single runs at a steady rate, and a worker in another process runs them. A held snapshot keeps every
row version that an update or a delete replaces, so the sum of updated and deleted rows is what vacuum finds later. The
figures are these sums for a job, by table, beside the limit for all tables together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import asyncpg
from tests.support.postgres_server import Server

from headrace import Headrace
from headrace.foundation.settings import load

LIMIT: Final = 0.3
SCHEMA: Final = "dead_rows"
COUNTS: Final = (
    "SELECT relname, n_tup_upd + n_tup_del AS changed, n_dead_tup FROM pg_stat_user_tables WHERE schemaname = $1"
)
SETTLE_S: Final = 2.0

app = Headrace("dead-rows")


@app.task
async def nothing(_number: int) -> None:
    """Do nothing."""


async def counts(connection: asyncpg.Connection) -> dict[str, tuple[int, int]]:
    """Return `(changed rows, dead rows)` by table, once the server processes have reported theirs."""
    await asyncio.sleep(SETTLE_S)  # a server process reports its counts at most once a second
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    return {name: (changed, dead) for name, changed, dead in await connection.fetch(COUNTS, SCHEMA)}


async def produce(rate: float, seconds: float) -> list[float]:
    """Enqueue single runs at a steady rate, then wait for the last one; return the sorted latencies in ms."""
    began, latencies_ms, pending = time.monotonic(), [], set()

    async def job(number: int) -> None:
        sent = time.monotonic()
        await (await nothing.enqueue(number)).result()
        latencies_ms.append(1_000 * (time.monotonic() - sent))

    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        task = asyncio.create_task(job(number))
        pending.add(task)
        task.add_done_callback(pending.discard)
    await asyncio.gather(*pending)
    return sorted(latencies_ms)


async def measure(server: Server, folder: Path, rate: float, seconds: float) -> dict[str, object]:
    """Return the figures."""
    url = f"{server.dsn}?schema={SCHEMA}"
    app.use(load({"store": url}, {}, folder))
    async with app:
        await (await nothing.enqueue(0)).view()
        command = [sys.executable, "-m", "headrace", "worker", "bench.dead_rows:app", "--store", url]
        worker = subprocess.Popen(command, stderr=(folder / "worker.log").open("w"))
        observer, holder = await asyncpg.connect(server.dsn), await asyncpg.connect(server.dsn)
        try:
            await produce(20, 1)
            async with holder.transaction(isolation="repeatable_read", readonly=True):
                await holder.execute("SELECT 1 FROM pg_class")
                before = await counts(observer)
                latencies_ms = await produce(rate, seconds)
                after = await counts(observer)
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait()
            await observer.close()
            await holder.close()
    jobs = int(rate * seconds)
    by_table = {
        name: round((after[name][0] - before.get(name, (0, 0))[0]) / jobs, 3)
        for name in sorted(after)
        if after[name][0] > before.get(name, (0, 0))[0]
    }
    return {
        "jobs": jobs,
        "changed_rows_a_job": by_table,
        "total": round(sum(by_table.values()), 3),
        "n_dead_tup_a_job": round(sum(a[1] - before.get(n, (0, 0))[1] for n, a in after.items()) / jobs, 3),
        "limit": LIMIT,
        "result_p50_ms": round(latencies_ms[len(latencies_ms) // 2], 1),
        "result_p99_ms": round(latencies_ms[len(latencies_ms) * 99 // 100], 1),
    }


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.dead_rows")
    parser.add_argument("--rate", type=float, default=150.0, help="single jobs a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the measurement")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    server = Server()
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = asyncio.run(measure(server, Path(folder), arguments.rate, arguments.seconds))
    finally:
        server.remove()
    print(json.dumps(figures, indent=2) if arguments.json else "\n".join(f"{k}: {v}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
