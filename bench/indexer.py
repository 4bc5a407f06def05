"""Figures of the indexer, each beside its baseline in the same run.

    python -m bench.indexer transfers overlap where [--store postgresql://user@host/database]
    python -m bench.indexer memory [--events 10000000]

`transfers`: 200,000 events over 20,000 accounts. `overlap`: wall time beside compute and commit time, at several ratios
of the two. `where`: cost of a condition as their number in a batch grows. `memory`: 10 M events with 5 M entities;
fails if memory exceeds its bound.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import uvloop
from msgspec.structs import replace

from headrace import Headrace
from headrace.benchmarks.baselines import transfers as baseline
from headrace.cli.processes.index import GC_THRESHOLDS
from headrace.foundation import interpreter
from headrace.foundation.settings import load
from headrace.indexer import Arrived, Entity, HandlerContext, Indexed, Indexer, IndexerProgress, Position

MIB: Final = 2**20
RUNS: Final = 3
OVERLAP_EVENTS: Final = 200_000
OVERLAP_ACCOUNTS: Final = 2_000
OVERLAP_TURNS: Final = 3
RATIO_TOLERANCE: Final = 0.15
UNIT_US: Final = 40
MEMORY_MIB: Final = 256
TURN_EVENTS: Final = 500_000
ALLOWED_MIB: Final = 150


class Transfer(msgspec.Struct, tag_field="type", tag="transfer"):
    """An event of a transfer."""

    sender: str
    receiver: str
    amount: int


class Account(Entity):
    """An entity that is read and written twice in each event."""

    id: str
    balance: int = 0
    country: Indexed[str] = ""


class Moved(Entity):
    """An entity that is inserted once in each event."""

    id: int
    sender: str
    receiver: str
    amount: int


class LineSource:
    """A source of JSON lines in memory."""

    def __init__(self, lines: Sequence[Any]) -> None:
        self._lines = lines

    async def arrivals(self, after: Position | None) -> Any:
        """Yield all lines in pieces."""
        for start in range(int(after or 0), len(self._lines), 5_000):
            piece = self._lines[start : start + 5_000]
            yield Arrived(range(start + 1, start + len(piece) + 1), piece)

    async def head(self) -> Position | None:
        """Return the number of lines."""
        return len(self._lines)


def transfers_of(app: Headrace, source: Any, extra: Callable[[], None] | None = None) -> Indexer:
    """Return an indexer of the shape of HyperIndex's benchmark, with `extra` computation for each event."""
    indexer = app.indexer("transfers", source=source, entities=[Account, Moved])

    @indexer.on("transfer")
    async def on_transfer(event: Transfer, ctx: HandlerContext) -> None:
        sender = await ctx.get_or_create(Account, event.sender)
        ctx.set(replace(sender, balance=sender.balance - event.amount))
        receiver = await ctx.get_or_create(Account, event.receiver)
        ctx.set(replace(receiver, balance=receiver.balance + event.amount))
        ctx.set(Moved(int(ctx.position), event.sender, event.receiver, event.amount))
        if extra is not None:
            extra()

    return indexer


def run(
    make: Callable[[Headrace], Indexer],
    store: str,
    *,
    commit_us: float = 0.0,
    keeps_tables: bool = False,
    **limits: int,
) -> tuple[float, IndexerProgress]:
    """Return the seconds of a run and its progress. The tables are dropped afterwards, unless `keeps_tables` is set."""

    async def main(url: str) -> tuple[float, IndexerProgress]:
        app = Headrace("bench")
        app.use(load({"store": url}, {}, Path()))
        indexer = make(app)
        engine = await app.open()
        if commit_us:
            engine.entities = DelayedCommits(engine.entities, commit_us)
        async with app, indexer.open(wait=True, on_waiting=None, **limits) as pipeline:
            started = time.perf_counter()
            progress = await pipeline.run()
            elapsed_s = time.perf_counter() - started
        if not keeps_tables:
            async with app:
                await indexer.reset()
        return elapsed_s, progress

    gc.collect()
    interpreter.tune()
    gc.set_threshold(*GC_THRESHOLDS)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main(store or f"sqlite:///{folder}/bench.db"))


def transfers(store: str) -> None:
    """Measure events a second in the shape of HyperIndex's benchmark and of the baseline, alternately."""
    lines = baseline.lines_of(200_000)
    headrace_rates, baselines, busy = [], [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            baseline_rate = (
                baseline.measure_postgres(lines, store) if store else baseline.measure_sqlite(lines, Path(folder))
            )
        cpu_s = time.process_time()
        elapsed_s, progress = run(lambda app: transfers_of(app, LineSource(lines)), store)
        busy.append((time.process_time() - cpu_s) / len(lines) * 1e6)
        headrace_rates.append(len(lines) / elapsed_s)
        baselines.append(baseline_rate)
        print(
            f"  {headrace_rates[-1]:,.0f} events/s, baseline {baseline_rate:,.0f}, "
            f"{busy[-1]:.1f} us of CPU an event; {_summary_of(progress)}"
        )
    value, base = statistics.median(headrace_rates), statistics.median(baselines)
    print(f"transfers on {_name(store)}: {value:,.0f} events/s, baseline {base:,.0f}, ratio {value / base:.2f}")


def overlap(store: str) -> None:
    """Measure wall time beside the larger of compute and commit time at several ratios, and the gain over serial
    processing.

    Each handler keeps the interpreter busy, and each commit waits (like a remote database), so that the larger of the
    two takes `UNIT_US` an event. This measures how well they overlap, not what they cost. A commit waits for the rest
    of its time after its own work; the time follows the compute time of the turn before. There are few accounts, so
    that all are in memory after the first batches: with slow handlers at the beginning and slow commits at the end, no
    overlap could help. Of the turns whose ratio is close to the intended ratio, the best is printed.
    """
    lines = baseline.lines_of(OVERLAP_EVENTS, OVERLAP_ACCOUNTS)
    _, alone = run(lambda app: transfers_of(app, LineSource(lines)), store, index_depth_max=0)
    handler_us = alone.compute_s / len(lines) * 1e6
    spin = Spin()
    print(
        f"overlap on {_name(store)}: a handler takes {handler_us:.1f} us itself, commits "
        f"{alone.commit_s / len(lines) * 1e6:.1f} us an event, the larger is extended to {UNIT_US} us"
    )
    print("  commit/compute  compute  commit  serial   wall  wall/max  faster  stalled on commit, fetch")
    for ratio in (0.5, 1.0, 2.0):
        compute_us, commit_us = UNIT_US / max(ratio, 1.0), UNIT_US * min(ratio, 1.0)
        make = partial(_spinning, lines, spin, compute_us - handler_us)
        turns = []
        for _ in range(OVERLAP_TURNS):
            serial_s, _ = run(make, store, commit_us=commit_us, index_depth_max=0)
            wall_s, progress = run(make, store, commit_us=commit_us)
            turns.append(Turn(serial_s, wall_s, progress))
            # relative to the present compute time of handlers
            commit_us = ratio * progress.compute_s / len(lines) * 1e6
        turn = max(turns, key=lambda turn: (abs(turn.ratio / ratio - 1) < RATIO_TOLERANCE, turn.faster))
        progress = turn.progress
        print(
            f"  {turn.ratio:14.2f} {progress.compute_s:8.2f} {progress.commit_s:7.2f} "
            f"{turn.serial_s:7.2f} {turn.wall_s:6.2f} "
            f"{turn.wall_s / max(progress.compute_s, progress.commit_s):9.2f} {turn.faster:7.2f} "
            f"{progress.commit_wait_s:10.2f} s, {progress.fetch_wait_s:.2f} s"
        )


class Turn(NamedTuple):
    """The same events processed serially and at the default depth, one run right after the other."""

    serial_s: float
    wall_s: float
    progress: IndexerProgress

    @property
    def ratio(self) -> float:
        """Commit time divided by compute time."""
        return self.progress.commit_s / self.progress.compute_s

    @property
    def faster(self) -> float:
        """Factor by which the default depth is faster than serial processing."""
        return self.serial_s / self.wall_s


class Spin:
    """Busy loop for a number of microseconds; its speed is measured once."""

    def __init__(self) -> None:
        self._steps_a_us = 1 / min(self._timed(100_000) / 100_000 * 1e6 for _ in range(20))

    def _timed(self, steps: int) -> float:
        started = time.perf_counter()
        self(steps)
        return time.perf_counter() - started

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            pass

    def steps(self, us: float) -> int:
        """Return the number of steps that take `us` microseconds."""
        return max(0, int(us * self._steps_a_us))


def _spinning(lines: Sequence[bytes], spin: Spin, us: float, app: Headrace) -> Indexer:
    return transfers_of(app, LineSource(lines), partial(spin, spin.steps(us)))


class DelayedCommits:
    """Entity tables whose commits take `us` microseconds an event: their own time, then a wait for the rest."""

    def __init__(self, tables: Any, us: float) -> None:
        self._tables = tables
        self._us = us

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)

    async def commit(self, commit: Any, *, now_us: int) -> None:
        """Commit, then wait for the rest of the time."""
        until = time.perf_counter() + self._us / 1e6 * (commit.no - commit.old_no)
        await self._tables.commit(commit, now_us=now_us)
        await asyncio.sleep(max(0.0, until - time.perf_counter()))


def where(store: str) -> None:
    """Measure a `where` in each event, each for another value: its cost must not grow with their number in a batch."""
    costs = []
    for count in (2_500, 5_000, 10_000):
        lines = [
            b'{"type":"transfer","sender":"s%d","receiver":"c%d","amount":1}' % (n, n % count) for n in range(2 * count)
        ]
        elapsed_s, _ = run(partial(_asking, lines), store, index_batch_events_max=count)
        costs.append(elapsed_s / len(lines) * 1e6)
        print(f"  {count:,} distinct values a batch: {costs[-1]:.1f} us an event")
    print(f"where on {_name(store)}: four times the values cost {costs[-1] / costs[0]:.2f} times as much each")


def _asking(lines: Sequence[bytes], app: Headrace) -> Indexer:
    indexer = app.indexer("asking", source=LineSource(lines), entities=[Account])

    @indexer.on("transfer")
    async def on_transfer(event: Transfer, ctx: HandlerContext) -> None:
        same = await ctx.where(Account, country=event.receiver)
        ctx.set(Account(event.sender, len(same), event.receiver))

    return indexer


class NumberSource:
    """A source that generates its events: number n touches entity n // 2, both times soon after another event did."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.marks: list[float] = []

    async def arrivals(self, after: Position | None) -> Any:
        """Yield events in pieces, and record the processor time at each million."""
        for start in range(int(after or 0), self._count, 5_000):
            if not start % 1_000_000:
                self.marks.append(time.process_time())
            yield Arrived(range(start + 1, start + 5_001), list(_numbered(start)))
        self.marks.append(time.process_time())

    async def head(self) -> Position | None:
        """Return the number of events."""
        return self._count


def _numbered(start: int) -> Iterator[Transfer]:
    for number in range(start, start + 5_000):
        yield Transfer(f"account{number // 2:08}", f"account{max(0, number // 2 - 50):08}", 1)


def memory(store: str, events: int) -> int:
    """Measure peak memory over many entities, then the cost of an event at the end and at the start. Return 1 if memory
    exceeds its bound.

    The cost is measured alternately on the grown tables and on empty tables, and the best of each counts: over the
    minutes of a long run, other load on the machine changes more than the cost of an event does.
    """
    source = NumberSource(events)
    with tempfile.TemporaryDirectory() as folder:
        grown = _store_url(store, folder, "grown")
        elapsed_s, progress = run(
            lambda app: _counting(app, source), grown, keeps_tables=True, index_memory_mib=MEMORY_MIB
        )
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        costs = [later - before for before, later in zip(source.marks, source.marks[1:], strict=False)]
        print(
            f"memory on {_name(store)}: {events:,} events, {events // 2:,} entities in {elapsed_s:.0f} s; "
            f"{_summary_of(progress)}"
        )
        print(f"  peak {peak_mib:.0f} MiB, allowed {MEMORY_MIB + ALLOWED_MIB} MiB")
        print(f"  CPU of each million: {', '.join(f'{cost:.1f}' for cost in costs)} s")
        firsts, lasts = [], []
        for turn in range(RUNS):
            firsts.append(_cost(_store_url(store, folder, f"first{turn}"), 0))
            lasts.append(_cost(grown, events + turn * TURN_EVENTS, keeps_tables=turn < RUNS - 1))
    event_costs = f"{min(lasts):.1f} us of CPU, on empty tables {min(firsts):.1f} us"
    print(f"  an event on the grown tables takes {event_costs}: {min(lasts) / min(firsts):.2f} times as much")
    return int(peak_mib > MEMORY_MIB + ALLOWED_MIB)


def _store_url(store: str, folder: str, name: str) -> str:
    """Return the URL of a separate store for a part of a scenario."""
    return f"{store}?schema=bench_{name}" if store else f"sqlite:///{folder}/{name}.db"


def _cost(url: str, first: int, *, keeps_tables: bool = False) -> float:
    """Return the processor time of an event after `first` events, in microseconds."""
    started = time.process_time()
    source = NumberSource(first + TURN_EVENTS)
    run(lambda app: _counting(app, source), url, keeps_tables=keeps_tables, index_memory_mib=MEMORY_MIB)
    return (time.process_time() - started) / TURN_EVENTS * 1e6


def _counting(app: Headrace, source: NumberSource) -> Indexer:
    indexer = app.indexer("counting", source=source, entities=[Account])

    @indexer.on("transfer")
    async def on_transfer(event: Transfer, ctx: HandlerContext) -> None:
        account = await ctx.get_or_create(Account, event.sender)
        ctx.set(replace(account, balance=account.balance + event.amount))
        other = await ctx.get_or_create(Account, event.receiver)
        ctx.set(replace(other, balance=other.balance - event.amount))

    return indexer


def _summary_of(progress: IndexerProgress) -> str:
    return (
        f"compute {progress.compute_s:.2f} s, commit {progress.commit_s:.2f} s in {progress.commits_count}, "
        f"stalled on commit {progress.commit_wait_s:.2f} s, on fetch {progress.fetch_wait_s:.2f} s"
    )


def _name(store: str) -> str:
    return "PostgreSQL" if store else "SQLite"


def main() -> int:
    """Run the scenarios given as arguments, in order."""
    parser = argparse.ArgumentParser(prog="python -m bench.indexer")
    parser.add_argument("scenarios", nargs="+", choices=["transfers", "overlap", "where", "memory"])
    parser.add_argument("--store", default="", help="URL of a PostgreSQL database (default: a new SQLite file)")
    parser.add_argument("--events", type=int, default=10_000_000, help="number of events of the memory scenario")
    options = parser.parse_args()
    failed = 0
    for scenario in options.scenarios:
        if scenario == "memory":
            failed |= memory(options.store, options.events)
        else:
            {"transfers": transfers, "overlap": overlap, "where": where}[scenario](options.store)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
