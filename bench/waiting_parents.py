"""Parents that wait for their children, beside the same batches sent from outside.

    python -m bench.waiting_parents [--parents 10000] [--children 10] [--store URL] [--json]

Each parent is a run that maps a batch of children and waits for it, in one process with the default concurrency. The
base is the time of the same batches, made by the program itself, with as many single runs in place of the parents.
`latency` is the time from the end of a parent's only child to the moment at which the parent goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from headrace import Headrace
from headrace.foundation.settings import load

RATIO_MAX: Final = 1.3
LATENCY_MS: Final = 10.0
PINGS: Final = 200

app = Headrace("waiting-parents")
ended_s: list[float] = []
latencies_ms: list[float] = []


@app.task
async def child(item: int) -> int:
    """Return the item."""
    return item


@app.task
async def parent(item: int) -> int:
    """Wait for a batch of children; return how many completed."""
    batch = await child.map(range(item))
    return (await batch.wait()).ledger.completed


@app.task
async def stamped_child(_item: int) -> None:
    """Note the time."""
    ended_s.append(time.perf_counter())


@app.task
async def stamped_parent(item: int) -> None:
    """Wait for one child, and note how long after it this run goes on."""
    run = await stamped_child.enqueue(item)
    await run.result()
    latencies_ms.append(1_000 * (time.perf_counter() - ended_s[-1]))


async def measure(store: str, folder: Path, parents_count: int, children_count: int) -> dict[str, float]:
    """Return the figures."""
    app.use(load({"store": store}, {}, folder))
    async with app, app.worker():
        began_s = time.perf_counter()
        singles = await child.map(range(parents_count))
        batches = await asyncio.gather(*(child.map(range(children_count)) for _ in range(parents_count)))
        for batch in (singles, *batches):
            await batch.wait()
        base_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        waiting = await parent.map([children_count] * parents_count)
        async for outcome in waiting.results():
            assert outcome.output == children_count, outcome
        parents_s = time.perf_counter() - began_s
        for number in range(PINGS):
            await (await stamped_parent.enqueue(number)).result()
    return {
        "base_s": base_s,
        "parents_s": parents_s,
        "ratio": parents_s / base_s,
        "latency_p50_ms": statistics.median(latencies_ms),
    }


def main() -> int:
    """Measure, and return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", type=int, default=10_000)
    parser.add_argument("--children", type=int, default=10)
    parser.add_argument("--store", help="default: a SQLite file")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = given.store or f"sqlite:///{name}/parents.db"
        figures = asyncio.run(measure(store, Path(name), given.parents, given.children))
    if given.json:
        print(json.dumps(figures))
    else:
        print(
            f"{given.parents:,} parents with {given.children} children: {figures['parents_s']:.1f} s, "
            f"base {figures['base_s']:.1f} s, ratio {figures['ratio']:.2f} (goal {RATIO_MAX})\n"
            f"latency from the child to its parent: p50 {figures['latency_p50_ms']:.1f} ms (goal {LATENCY_MS:g})"
        )
    return int(figures["ratio"] > RATIO_MAX or figures["latency_p50_ms"] > LATENCY_MS)


if __name__ == "__main__":
    sys.exit(main())
