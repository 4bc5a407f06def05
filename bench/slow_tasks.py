"""Tasks of 100 ms through the task broker over gRPC: `python -m bench.slow_tasks [sqlite|postgresql://… …]`.

A server runs in another process. Workers fetch a task, wait 100 ms and report; each response has the next task. Reports
are written (a) one by one, each in its own transaction; (b) by the flusher, 500 at a time or every 100 ms, and
acknowledged at once; (c) by default: acknowledged after the commit that holds them. The figures are medians of three
alternating rounds. The baseline is arithmetic: without any server, the workers complete `workers / 0.1 s`. Transactions
and rows are those of claims and reports.
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

from bench.activations import CountingStore, append_activations
from bench.grpc import GET, SET, process
from headrace.foundation import interpreter
from headrace.foundation.access import open_to_all

WORKERS: Final = 500
CHANNELS: Final = 8
TASK_S: Final = 0.1
ROUNDS: Final = 3
TASKS: Final = {"a": 5_000, "b": 25_000, "c": 25_000}
MODES: Final = {
    "a": "(a) singly",
    "b": "(b) batched, acknowledged at once",
    "c": "(c) default: acknowledged after the commit",
}


class ClaimCountingStore(CountingStore):
    """A store that counts claims too: a row for each leased span."""

    async def claim(self, claim: Any, **options: Any) -> Any:
        """Count a transaction, and a row for each lease."""
        leases = await self._store.claim(claim, **options)
        if leases:
            self.transactions += 1
            self.rows += len(leases)
        return leases


async def serve(mode: str, store: str, count: int) -> None:
    """Serve the task broker over a store with `count` activations."""
    from headrace.compose import open_engine
    from headrace.foundation.settings import load
    from headrace.grpc.messages import taskbroker_pb2 as wire
    from headrace.grpc.taskbroker.broker import dispatching
    from headrace.grpc.transport.server import GrpcServer, ServerProtocol
    from headrace.grpc.transport.service_methods import Method

    with tempfile.TemporaryDirectory() as folder:
        url = store or f"sqlite:///{folder}/bench.db"
        engine = await open_engine(load({"store": url}, {}, Path(folder)))
        await append_activations(engine, count, application="app", parameters_bytes=b"x" * 96)
        store_counts = ClaimCountingStore(engine.store)
        engine.store = store_counts
        limits = engine.limits.replaced(flush_size=1) if mode == "a" else engine.limits

        async def counts(_message: Any, _call: Any) -> Any:
            return wire.PushTaskRequest(callback_url=f"{store_counts.transactions / count} {store_counts.rows / count}")

        async with dispatching(
            engine.with_limits(limits),
            ack="received" if mode == "b" else "committed",
            flush_interval_ms=limits.flush_interval_ms if mode == "b" else None,
        ) as broker:
            methods = broker.consumer.methods | {"/e/Counts": Method(wire.PushTaskRequest, counts, open_to_all())}
            server = GrpcServer(methods, limits=engine.limits)
            listener = await asyncio.get_running_loop().create_server(lambda: ServerProtocol(server), "127.0.0.1", 0)
            print(listener.sockets[0].getsockname()[1], flush=True)
            over = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
            await over.wait()
            listener.close()
        await engine.close()


async def drain(port: int, count: int) -> tuple[float, str]:
    """Return the tasks a second of all workers together, and the counts of the server."""
    from headrace.foundation.targets import PushTarget
    from headrace.grpc.messages import taskbroker_pb2 as wire
    from headrace.grpc.transport.bounds import Bounds
    from headrace.grpc.transport.budget import Budget
    from headrace.grpc.transport.client import Channel

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
            response = wire.SetTaskStatusResponse.FromString(body)
            if not response.HasField("task"):
                return
            task = response.task

    began = time.perf_counter()
    await asyncio.gather(*(work(number) for number in range(WORKERS)))
    seconds = time.perf_counter() - began
    assert len(done) == count, (len(done), count)
    counts = wire.PushTaskRequest.FromString(await channels[0].call("/e/Counts", b"", timeout_s=60)).callback_url
    for channel in channels:
        channel.close()
    return count / seconds, counts


def main() -> None:
    """Print a table for each store."""
    import uvloop

    words = sys.argv[1:]
    interpreter.tune()
    if words[:1] == ["serve"]:
        uvloop.run(serve(words[1], words[2], int(words[3])))
        return
    print("| store | reports written | tasks/s | of workers / 0.1 s | transactions a task | rows a task |")
    print("|---|---|--:|--:|--:|--:|")
    for store in words or ["sqlite"]:
        url = "" if store == "sqlite" else store
        results: dict[str, list[tuple[float, ...]]] = {mode: [] for mode in MODES}
        for _ in range(ROUNDS):  # alternating: a slow phase of the machine affects all modes
            for mode, rounds in results.items():
                command = ("-m", "bench.slow_tasks", "serve", mode, url, str(TASKS[mode]))
                with process(*command, pattern=r"^(\d+)$") as server:
                    rate, counts = uvloop.run(drain(server.port, TASKS[mode]))
                rounds.append((rate, *map(float, counts.split())))
        kind = store.partition(":")[0]
        for mode, rounds in results.items():
            rate, transactions, rows = (statistics.median(column) for column in zip(*rounds, strict=True))
            share = rate / (WORKERS / TASK_S)
            print(
                f"| {kind} | {MODES[mode]} | {rate:,.0f} | {share:.2f} | {transactions:.4f} | {rows:.3f} |", flush=True
            )


if __name__ == "__main__":
    main()
