"""The scenarios, each a function from a size and a directory to a figure (and a base of its own, where it has one)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple

import uvloop

from headrace.app import Task
from headrace.benchmarks.tasks import app, nap, nothing
from headrace.foundation.errors import EngineFault
from headrace.foundation.settings import load

PAD: Final = "x" * 79
NAP_CONCURRENCY: Final = 1_000
MIB: Final = 2**20


class Scenario(NamedTuple):
    """What is measured, in which unit, over how many runs; `is_slow` is measured once."""

    name: str
    unit: str
    size: int
    measure: Callable[[int, Path], tuple[float, float | None]]
    is_slow: bool = False


def append(size: int, directory: Path) -> tuple[float, None]:
    """Items a second from Python objects to durable runs."""

    async def timed() -> float:
        started = perf_counter()
        await nothing.map(_items(size))
        return size / (perf_counter() - started)

    with _fresh_store(directory):
        return _run(_within_app(timed)), None


def drain(size: int, directory: Path) -> tuple[float, None]:
    """Runs a second from claim to durable outcome, one process, tasks that do nothing."""
    with _fresh_store(directory):
        return _run(_within_app(lambda: _drained(nothing, size, concurrency=100))), None


def sleep100ms(size: int, directory: Path) -> tuple[float, None]:
    """Runs a second of tasks that wait 100 ms, 1,000 at a time: the limit is 10,000."""
    with _fresh_store(directory):
        return _run(_within_app(lambda: _drained(nap, size, concurrency=NAP_CONCURRENCY))), None


def map_memory(size: int, directory: Path) -> tuple[float, float]:
    """Peak memory in MiB of `headrace map` over `size` items; the base is the peak over a tenth of them."""
    return _map_peak(size, directory), _map_peak(size // 10, directory)


SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario("append", "items/s", 500_000, append),
        Scenario("drain", "runs/s", 500_000, drain),
        Scenario("sleep100ms", "runs/s", 50_000, sleep100ms),
        Scenario("map_memory", "MiB", 1_000_000, map_memory, is_slow=True),
    )
}


def _items(size: int) -> Iterator[dict[str, object]]:
    return ({"n": number, "pad": PAD} for number in range(size))


async def _drained(task: Task[Any, Any], size: int, *, concurrency: int) -> float:
    batch = await task.map(_items(size))
    started = perf_counter()
    async with app.worker(tasks=[task.name], concurrency=concurrency):
        summary = await batch.wait()
        elapsed_s = perf_counter() - started
    if summary.ledger.completed != size:
        raise EngineFault(f"{summary.ledger.completed} of {size} runs completed")
    return size / elapsed_s


async def _within_app(work: Callable[[], Coroutine[Any, Any, float]]) -> float:
    async with app:
        return await work()


def _run(coroutine: Coroutine[Any, Any, float]) -> float:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


@contextmanager
def _fresh_store(directory: Path) -> Iterator[None]:
    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-") as folder:
        app.use(load({"store": f"sqlite:///{Path(folder).resolve()}/bench.db"}, os.environ, Path(folder)))
        yield


def _map_peak(size: int, directory: Path) -> float:
    """Run the command on its own and ask the kernel for the most memory it or a child of it ever held."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-") as folder:
        source, target = Path(folder) / "items.ndjson", Path(folder) / "results.ndjson"
        with source.open("w") as file:
            for number in range(size):
                file.write(f'{{"n":{number},"pad":"{PAD}"}}\n')
        command = [sys.executable, "-m", "headrace", "map", "headrace.benchmarks.tasks:nothing", str(source)]
        command += ["-o", str(target), "--store", f"sqlite:///{Path(folder).resolve()}/map.db", "--no-progress"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)  # noqa: S603 - our own command
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        lines_count = sum(piece.count(b"\n") for piece in _pieces(target))
        if process.returncode or lines_count != size:
            raise EngineFault(f"map ended with {process.returncode} after {lines_count} of {size} results")
        return usage.ru_maxrss * 1024 / MIB


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(MIB):
            yield piece
