"""Tasks of 100 ms through the task broker, over real gRPC: `python -m bench.slow_tasks [sqlite|postgresql://… …]`.

A server in another process, and workers that fetch, wait 100 ms and report, each report answered with the next task.
Reports are written (a) singly, each in a transaction of its own; (b) by the flusher, 500 at a time or every 100 ms, and
answered at once; (c) as they are by default, answered after the commit that holds them. Medians of three rounds, in
turns. The floor is arithmetic: that many workers do `workers / 0.1 s` without any server. Transactions and rows are
those of claims and reports.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from bench.activations import Counted, filled
from bench.grpc import GET, SET, process
from headrace.foundation import interpreter

WORKERS: Final = 500
CHANNELS: Final = 8
TASK_S: Final = 0.1
ROUNDS: Final = 3
TASKS: Final = {"a": 5_000, "b": 25_000, "c": 25_000}
WAYS: Final = {
    "a": "(a) singly",
    "b": "(b) batched, answered at once",
    "c": "(c) default: answered after the commit",
}


class Told(Counted):
    """Counts claims too: a row for each span that is leased."""

    async def claim(self, claim: Any, **more: Any) -> Any:
        """One transaction."""
        leases = await self._store.claim(claim, **more)
        if leases:
            self.transactions += 1
            self.rows += len(leases)
        return leases


async def serve(way: str, store: str, count: int) -> None:
    """The task broker over a store with so many activations."""
    from headrace.compose import open_engine
    from headrace.foundation.settings import load
    from headrace.grpc.messages import taskbroker_pb2 as wire
    from headrace.grpc.taskbroker.broker import dispatching
    from headrace.grpc.transport.server import GrpcServer, ServerProtocol
    from headrace.grpc.transport.service_methods import Method

    with tempfile.TemporaryDirectory() as folder:
        place = store or f"sqlite:///{folder}/bench.db"
        engine = await open_engine(load({"store": place, "objects": f"{folder}/objects"}, {}, Path(folder)))
        await filled(engine, count, application="app", parameters_bytes=b"x" * 96)
        told = Told(engine.store)
        engine.store = told
        limits = engine.limits.replaced(flush_size=1) if way == "a" else engine.limits

        async def counts(_message: Any, _call: Any) -> Any:
            return wire.PushTaskRequest(callback_url=f"{told.transactions / count} {told.rows / count}")

        async with dispatching(
            engine.with_limits(limits),
            ack="received" if way == "b" else "committed",
            flush_interval_ms=limits.flush_interval_ms if way == "b" else None,
        ) as broker:
            methods = broker.consumer.methods | {"/e/Counts": Method(wire.PushTaskRequest, counts)}
            server = GrpcServer(methods, limits=engine.limits)
            listener = await asyncio.get_running_loop().create_server(lambda: ServerProtocol(server), "127.0.0.1", 0)
            print(listener.sockets[0].getsockname()[1], flush=True)
            over = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
            await over.wait()
            listener.close()
        await engine.close()


async def drained(port: int, count: int) -> tuple[float, str]:
    """Tasks a second of all workers together, and what the server counted."""
    from headrace.foundation.targets import PushTarget
    from headrace.grpc.messages import taskbroker_pb2 as wire
    from headrace.grpc.transport.client import Channel
    from headrace.grpc.transport.connection import Bounds
    from headrace.grpc.transport.sender import Budget

    target = PushTarget("app", "127.0.0.1", port, is_tls=False)
    channels = [Channel(target, Bounds(1 << 26, 256), Budget(1 << 28)) for _ in range(CHANNELS)]
    filters = wire.FetchNextTask(application="app")
    done: set[str] = set()

    async def work(number: int) -> None:
        channel = channels[number % CHANNELS]
        body = await channel.call(GET, wire.GetTaskRequest(application="app").SerializeToString(), timeout_s=60)
        task = wire.GetTaskResponse.FromString(body).task
        while True:
            await asyncio.sleep(TASK_S)
            done.add(task.id)
            report = wire.SetTaskStatusRequest(
                id=task.id, status=wire.TASK_ACTIVATION_STATUS_COMPLETE, fetch_next_task=filters
            )
            body = await channel.call(SET, report.SerializeToString(), timeout_s=60)
            answer = wire.SetTaskStatusResponse.FromString(body)
            if not answer.HasField("task"):
                return
            task = answer.task

    began = time.perf_counter()
    await asyncio.gather(*(work(number) for number in range(WORKERS)))
    seconds = time.perf_counter() - began
    assert len(done) == count, (len(done), count)
    said = wire.PushTaskRequest.FromString(await channels[0].call("/e/Counts", b"", timeout_s=60)).callback_url
    for channel in channels:
        channel.close()
    return count / seconds, said


def main() -> None:
    """A table for each store."""
    import uvloop

    words = sys.argv[1:]
    interpreter.tune()
    if words[:1] == ["serve"]:
        uvloop.run(serve(words[1], words[2], int(words[3])))
        return
    print("| store | reports written | tasks/s | of workers / 0.1 s | transactions a task | rows a task |")
    print("|---|---|--:|--:|--:|--:|")
    for store in words or ["sqlite"]:
        place = "" if store == "sqlite" else store
        found: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):  # in turns: a machine that is slow for a while is slow for all
            for way, rounds in found.items():
                command = ("-m", "bench.slow_tasks", "serve", way, place, str(TASKS[way]))
                with process(*command, said=r"^(\d+)$") as server:
                    rate, said = uvloop.run(drained(server.port, TASKS[way]))
                rounds.append((rate, *map(float, said.split())))
        kind = store.partition(":")[0]
        for way, rounds in found.items():
            rate, transactions, rows = (statistics.median(column) for column in zip(*rounds, strict=True))
            share = rate / (WORKERS / TASK_S)
            print(f"| {kind} | {WAYS[way]} | {rate:,.0f} | {share:.2f} | {transactions:.4f} | {rows:.3f} |", flush=True)


if __name__ == "__main__":
    main()
