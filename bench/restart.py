"""Recovery of the throughput after an immediate shutdown and restart of the database, without a restart of the worker.

    python -m bench.restart

A worker process drains tasks that wait 10 ms, 100 at a time; completed runs are counted every 100 ms. The script prints
the rate before the shutdown, and how long after the server responds again a whole second reaches 95 % of that rate.
"""

from __future__ import annotations

import asyncio
import tempfile
from time import perf_counter

from tests.support.postgres_server import Server

from headrace import Headrace
from headrace.foundation.errors import HeadraceError

TICK_S = 0.1
BEFORE_S = 4.0
AFTER_S = 12.0
NAP_S = 0.01
ITEMS = 200_000


async def main() -> None:
    """Print the figures of a restart."""
    server = Server()
    with tempfile.TemporaryDirectory() as folder:
        app = Headrace("restart", store=f"{server.dsn}?schema=restart", objects=folder, objects_shared=True)

        @app.task
        async def nap(_item: int) -> None:
            await asyncio.sleep(NAP_S)

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
                await asyncio.to_thread(server.start)
                up_s = perf_counter()
                await count(up_s + AFTER_S)
        recovered_s = next(
            (time_s for time_s, _ in ended if time_s >= up_s and _rate(ended, time_s, time_s + 1) >= 0.95 * before),
            None,
        )
        print(f"before: {before:,.0f} runs/s")
        recovery = (
            "never within the time"
            if recovered_s is None
            else f"{max(0.0, recovered_s - up_s):.1f} s after the server answered"
        )
        print(f"a whole second at 95 % of that: {recovery}")
    server.remove()


def _rate(ended: list[tuple[float, int]], first_s: float, last_s: float) -> float:
    within = [pair for pair in ended if first_s <= pair[0] <= last_s]
    return (within[-1][1] - within[0][1]) / (within[-1][0] - within[0][0]) if len(within) > 1 else 0.0


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except HeadraceError as error:
        print(error)
