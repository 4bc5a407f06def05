"""The race that trigger.dev had: a worker faster than the stream, in a thousand seeded rounds."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.worker.worker import Worker
from tests.support.http_server import AUTH, LIMITS, NDJSON, HttpPeer, line, running_server

ROUNDS = {"memory": 700, "sqlite": 200, "postgres": 100}


async def quick(item: dict[str, int]) -> int:
    return item["i"]


@pytest.mark.parametrize("kind", ROUNDS)
async def test_a_worker_faster_than_the_stream_never_costs_a_seal(tmp_path: Path, kind: str) -> None:
    registry = Registry()
    registry.add(TaskSpec("task", quick))
    limits = LIMITS.replaced(chunk_runs_max=4, poll_interval_ms=5)
    async with running_server(tmp_path, kind, limits=limits, registry=registry) as server:
        worker = Worker(server.engine, registry, concurrency=8)
        await worker.start()
        peer = await server.peer().connect()
        for seed in range(ROUNDS[kind]):
            await one_round(peer, random.Random(seed), seed)
            if kind == "memory" and seed % 50 == 49:  # its operations copy every table: keep them small
                await server.engine.maintenance.prune(2**62, batches_max=1_000, rows_max=10**6)
        await worker.stop()


async def one_round(peer: HttpPeer, dice: random.Random, seed: int) -> None:
    """Stream a batch in pieces with random pauses, some of it twice: it is sealed and completed, and nothing is
    doubled.
    """
    count = dice.randint(1, 12)
    created = await peer.ask("POST", "/api/v3/batches", b'{"runCount":%d}' % count)
    batch_id = created.json["id"]
    lines = [line(index) for index in range(count)]
    dice.shuffle(lines)
    repeated = lines + dice.sample(lines, dice.randint(0, count))
    cut = dice.randint(0, len(repeated))
    sealed, accepted = False, 0
    for portion in (repeated[:cut], repeated[cut:], lines):
        await peer.head("POST", f"/api/v3/batches/{batch_id}/items", {**AUTH, **NDJSON, "transfer-encoding": "chunked"})
        for item in portion:
            await peer.chunk(item)
            for _ in range(dice.choice((0, 0, 1, 5, 20))):
                await asyncio.sleep(0)
        await peer.end()
        answer = await peer.answer()
        assert answer.status == 200, (seed, answer)
        accepted += answer.json["itemsAccepted"]
        sealed = answer.json["sealed"]
    assert (sealed, accepted) == (True, count), seed
    results = await peer.ask("GET", f"/v1/batches/{batch_id}/results")
    assert results.body.count(b'"ok":true') == count, seed
    batch = (await peer.ask("GET", f"/api/v2/batches/{batch_id}")).json
    assert (batch["status"], len(batch["runs"])) == ("COMPLETED", count), seed
