"""Outages of PostgreSQL under load, without a restart of any process of Headrace.

    python -m bench.restart [pickup] [throughput] [--outage-s 10] [--json]

`pickup`: two worker processes and a producer that enqueues 150 single runs a second. The database is stopped as by a
power failure and started again after the outage. The figures are the time from the moment at which the server accepts
connections to the first run that starts, and the latency from `enqueue` to start before the outage and from two seconds
after it on. Runs that were enqueued during the outage are not part of a latency.

`throughput`: a worker drains tasks that wait 10 ms, 100 at a time. The figure is the time until a whole second reaches
95 % of the rate before an immediate shutdown and restart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from time import perf_counter
from typing import Final, NamedTuple

import asyncpg
from tests.support.postgres_server import Server

from headrace import Headrace
from headrace.foundation.errors import HeadraceError
from headrace.foundation.settings import load

TICK_S: Final = 0.1
BEFORE_S: Final = 4.0
AFTER_S: Final = 12.0
NAP_S: Final = 0.01
ITEMS: Final = 200_000
RATE: Final = 150
WORKERS: Final = 2
LOG: Final = "RESTART_LOG"
FIRST_RUN_S: Final = 1.0
NORMAL_AFTER_S: Final = 2.0
LATENCY_MS: Final = 50.0
THROUGHPUT_S: Final = 5.0

app = Headrace("restart")


@app.task
async def stamp(number: int) -> None:
    """Log when the run started, on the clock that all processes of a machine share."""
    with open(os.environ[LOG], "a", encoding="ascii") as log:
        log.write(f"{number} {time.monotonic_ns()}\n")


@app.task
async def nap(_item: int) -> None:
    """Wait 10 ms."""
    await asyncio.sleep(NAP_S)


class Figure(NamedTuple):
    """A measured value beside its limit. `limit` is None for a value that is only shown."""

    name: str
    value: float | None
    limit: float | None
    unit: str

    def line(self) -> str:
        """Return the figure as a line of text."""
        value = "never" if self.value is None else f"{self.value:,.2f} {self.unit}"
        if self.limit is None:
            return f"{self.name}: {value}"
        is_met = self.value is not None and self.value <= self.limit
        return f"{self.name}: {value} (limit {self.limit:g} {self.unit}: {'met' if is_met else 'MISSED'})"


async def accepting(server: Server) -> float:
    """Start the server, and return the time at which it first accepts a connection."""
    starting = asyncio.create_task(asyncio.to_thread(server.start))
    while True:
        try:
            connection = await asyncpg.connect(server.dsn)
        except (OSError, asyncpg.PostgresError):
            await asyncio.sleep(0.005)
        else:
            up_ns = time.monotonic_ns()
            await connection.close()
            await starting
            return up_ns / 1e9


async def pickup(server: Server, folder: Path, outage_s: float) -> list[Figure]:
    """Measure the first run and the latencies after an outage."""
    log = folder / "started"
    log.touch()
    url = f"{server.dsn}?schema=pickup"
    app.use(load({"store": url}, {}, folder))
    environment = {**os.environ, LOG: str(log)}
    sent_s: list[float] = []
    async with app:
        await app.open()
        command = [sys.executable, "-m", "headrace", "worker", "bench.restart:app", "--store", url]
        workers = [
            subprocess.Popen(command, env=environment, stderr=(folder / f"worker-{number}.log").open("w"))
            for number in range(WORKERS)
        ]
        try:
            producing = asyncio.create_task(produce(sent_s))
            await started(log, 1)
            await asyncio.sleep(BEFORE_S)
            lost_s = time.monotonic()
            await asyncio.to_thread(server.stop, "immediate")
            await asyncio.sleep(outage_s)
            up_s = await accepting(server)
            await asyncio.sleep(AFTER_S)
            producing.cancel()
            await asyncio.gather(producing, return_exceptions=True)
            started_s = dict(lines(log))
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
            for worker in workers:
                worker.wait()
    first_s = min((at_s for at_s in started_s.values() if at_s >= up_s), default=None)

    def latencies_ms(from_s: float, to_s: float) -> list[float]:
        return sorted(
            1_000 * (started_s[number] - at_s)
            for number, at_s in enumerate(sent_s)
            if from_s <= at_s < to_s and number in started_s
        )

    before = latencies_ms(lost_s - 3, lost_s - 0.5)
    after = latencies_ms(up_s + NORMAL_AFTER_S, up_s + AFTER_S - 1)
    lost_count = len(sent_s) - len(started_s)
    return [
        Figure("pickup: first run after the server accepts connections", first_s and first_s - up_s, FIRST_RUN_S, "s"),
        Figure("pickup: latency before, p50", quantile(before, 50), None, "ms"),
        Figure("pickup: latency before, p99", quantile(before, 99), None, "ms"),
        Figure("pickup: latency from 2 s after, p50", quantile(after, 50), LATENCY_MS, "ms"),
        Figure("pickup: latency from 2 s after, p99", quantile(after, 99), None, "ms"),
        Figure("pickup: enqueued and not started yet", lost_count, None, "runs"),
    ]


async def produce(sent_s: list[float]) -> None:
    """Enqueue single runs at a steady rate, without waiting for their results."""
    pending: set[asyncio.Task[object]] = set()
    began = time.monotonic()
    try:
        while True:
            number = len(sent_s)
            await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))
            sent_s.append(time.monotonic())
            enqueueing: asyncio.Task[object] = asyncio.create_task(stamp.enqueue(number))
            pending.add(enqueueing)
            enqueueing.add_done_callback(pending.discard)
    finally:
        await asyncio.gather(*pending, return_exceptions=True)


async def started(log: Path, count: int) -> None:
    """Return when this many runs have started."""
    while len(lines(log)) < count:
        await asyncio.sleep(TICK_S)


def lines(log: Path) -> list[tuple[int, float]]:
    """Return the number and time of each start in the log."""
    pairs = [line.split() for line in log.read_text(encoding="ascii").splitlines()]
    return [(int(pair[0]), int(pair[1]) / 1e9) for pair in reversed(pairs) if len(pair) == 2]


def quantile(sorted_values: list[float], percent: int) -> float | None:
    """Return a quantile of sorted values; None without values."""
    return sorted_values[len(sorted_values) * percent // 100] if sorted_values else None


async def throughput(server: Server, folder: Path, outage_s: float) -> list[Figure]:
    """Measure how long the rate of a worker needs to recover; the outage lasts as long as a restart."""
    del outage_s
    app.use(load({"store": f"{server.dsn}?schema=throughput"}, {}, folder))
    async with app:
        await nap.map(range(ITEMS))
        async with app.worker(concurrency=100) as worker:
            ended: list[tuple[float, int]] = []

            async def count(until_s: float) -> None:
                while perf_counter() < until_s:
                    ended.append((perf_counter(), worker.stats.completed))
                    await asyncio.sleep(TICK_S)

            await count(perf_counter() + BEFORE_S)
            before = _rate(ended, ended[-1][0] - 2, ended[-1][0])
            await asyncio.to_thread(server.stop, "immediate")
            await accepting(server)
            up_s = perf_counter()
            await count(up_s + AFTER_S)
    recovered_s = next(
        (time_s for time_s, _ in ended if time_s >= up_s and _rate(ended, time_s, time_s + 1) >= 0.95 * before),
        None,
    )
    return [
        Figure("throughput: before", before, None, "runs/s"),
        Figure(
            "throughput: a whole second at 95 % of that, after the server accepts connections",
            None if recovered_s is None else recovered_s - up_s,
            THROUGHPUT_S,
            "s",
        ),
    ]


def _rate(ended: list[tuple[float, int]], first_s: float, last_s: float) -> float:
    within = [pair for pair in ended if first_s <= pair[0] <= last_s]
    return (within[-1][1] - within[0][1]) / (within[-1][0] - within[0][0]) if len(within) > 1 else 0.0


MODES: Final = {"pickup": pickup, "throughput": throughput}


def main() -> None:
    """Measure what the command line names, and print it."""
    parser = argparse.ArgumentParser(prog="python -m bench.restart")
    parser.add_argument("modes", nargs="*", choices=[*MODES, []], help="what to measure (default: everything)")
    parser.add_argument("--outage-s", type=float, default=10.0, help="length of the outage of `pickup`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    server = Server()
    figures: list[Figure] = []
    try:
        for mode in arguments.modes or MODES:
            with tempfile.TemporaryDirectory() as folder:
                figures += asyncio.run(MODES[mode](server, Path(folder), arguments.outage_s))
    except HeadraceError as error:
        sys.exit(str(error))
    finally:
        server.remove()
    if arguments.json:
        print(json.dumps([figure._asdict() for figure in figures], indent=2))
    else:
        print("\n".join(figure.line() for figure in figures))


if __name__ == "__main__":
    main()
