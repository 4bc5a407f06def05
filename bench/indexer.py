"""The indexer's figures, each beside its floor in one run.

    python -m bench.indexer transfers overlap where [--store postgresql://user@host/database]
    python -m bench.indexer memory [--events 10000000]

`transfers`: 200,000 events over 20,000 accounts; `overlap`: wall beside compute and commit, over ratios of the two;
`where`: cost of one as their number in a batch grows; `memory`: 10 M events with 5 M entities, fails over its bound.
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
from headrace.cli.index import GC_THRESHOLDS
from headrace.foundation import interpreter
from headrace.foundation.settings import load
from headrace.indexer import Arrived, Entity, HandlerContext, Indexed, Indexer, IndexerProgress, Position

MIB: Final = 2**20
RUNS: Final = 3
OVERLAP_EVENTS: Final = 200_000
OVERLAP_ACCOUNTS: Final = 2_000
OVERLAP_TURNS: Final = 3
NEAR: Final = 0.15
UNIT_US: Final = 40
MEMORY_MIB: Final = 256
TURN_EVENTS: Final = 500_000
ALLOWED_MIB: Final = 150


class Transfer(msgspec.Struct, tag_field="type", tag="transfer"):
    """One event."""

    sender: str
    receiver: str
    amount: int


class Account(Entity):
    """Read and written twice an event."""

    id: str
    balance: int = 0
    country: Indexed[str] = ""


class Moved(Entity):
    """Inserted once an event."""

    id: int
    sender: str
    receiver: str
    amount: int


class Lines:
    """A source of JSON lines in memory."""

    def __init__(self, lines: Sequence[Any]) -> None:
        self._lines = lines

    async def arrivals(self, after: Position | None) -> Any:
        """All of them, in pieces."""
        for start in range(int(after or 0), len(self._lines), 5_000):
            piece = self._lines[start : start + 5_000]
            yield Arrived(range(start + 1, start + len(piece) + 1), piece)

    async def head(self) -> Position | None:
        """How many there are."""
        return len(self._lines)


def transfers_of(app: Headrace, source: Any, more: Callable[[], None] | None = None) -> Indexer:
    """The reference's shape, and more to compute for each event."""
    indexer = app.indexer("transfers", source=source, entities=[Account, Moved])

    @indexer.on("transfer")
    async def on_transfer(event: Transfer, ctx: HandlerContext) -> None:
        sender = await ctx.get_or_create(Account, event.sender)
        ctx.set(replace(sender, balance=sender.balance - event.amount))
        receiver = await ctx.get_or_create(Account, event.receiver)
        ctx.set(replace(receiver, balance=receiver.balance + event.amount))
        ctx.set(Moved(int(ctx.position), event.sender, event.receiver, event.amount))
        if more is not None:
            more()

    return indexer


def run(
    make: Callable[[Headrace], Indexer], store: str, *, commit_us: float = 0.0, keeps: bool = False, **limits: int
) -> tuple[float, IndexerProgress]:
    """Seconds of one run, and what it says of itself; what it made is dropped again, unless it `keeps` it."""

    async def main(url: str) -> tuple[float, IndexerProgress]:
        app = Headrace("bench")
        app.use(load({"store": url}, {}, Path()))
        indexer = make(app)
        engine = await app.open()
        if commit_us:
            engine.entities = Far(engine.entities, commit_us)
        async with app, indexer.open(wait=True, on_waiting=None, **limits) as own:
            started = time.perf_counter()
            told = await own.run()
            elapsed_s = time.perf_counter() - started
        if not keeps:
            async with app:
                await indexer.reset()
        return elapsed_s, told

    gc.collect()
    interpreter.tune()
    gc.set_threshold(*GC_THRESHOLDS)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main(store or f"sqlite:///{folder}/bench.db"))


def transfers(store: str) -> None:
    """Events a second of the reference's shape, beside the floor, taking turns."""
    lines = baseline.lines_of(200_000)
    ours, floors, busy = [], [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            floor = baseline.measure_postgres(lines, store) if store else baseline.measure_sqlite(lines, Path(folder))
        cpu_s = time.process_time()
        elapsed_s, told = run(lambda app: transfers_of(app, Lines(lines)), store)
        busy.append((time.process_time() - cpu_s) / len(lines) * 1e6)
        ours.append(len(lines) / elapsed_s)
        floors.append(floor)
        print(f"  {ours[-1]:,.0f} events/s, floor {floor:,.0f}, {busy[-1]:.1f} us of CPU an event; {_said(told)}")
    value, base = statistics.median(ours), statistics.median(floors)
    print(f"transfers on {_name(store)}: {value:,.0f} events/s, floor {base:,.0f}, ratio {value / base:.2f}")


def overlap(store: str) -> None:
    """Wall beside the larger of compute and commit, over ratios of the two, and how much faster than one by one.

    Each handler keeps the interpreter for as long, and each commit waits for as long (a database far away), as makes
    the larger of the two `UNIT_US` an event: what is measured is how well they hide each other, not what they cost.
    A wait is what is left of its time when the commit itself is done, and follows what handlers took in the turn
    before. There are few accounts, so that all are known after the first batches: were handlers slow at the beginning
    and commits at the end, no overlap could help. Of the turns whose ratio came near the one that is wanted the best
    is told.
    """
    lines = baseline.lines_of(OVERLAP_EVENTS, OVERLAP_ACCOUNTS)
    _, alone = run(lambda app: transfers_of(app, Lines(lines)), store, index_depth_max=0)
    own_us = alone.compute_s / len(lines) * 1e6
    spin = Spin()
    print(
        f"overlap on {_name(store)}: a handler takes {own_us:.1f} us itself, commits "
        f"{alone.commit_s / len(lines) * 1e6:.1f} us an event, the larger is made {UNIT_US} us"
    )
    print("  commit/compute  compute  commit  serial   wall  wall/max  faster  stalled on commit, fetch")
    for ratio in (0.5, 1.0, 2.0):
        compute_us, commit_us = UNIT_US / max(ratio, 1.0), UNIT_US * min(ratio, 1.0)
        make = partial(_spinning, lines, spin, compute_us - own_us)
        turns = []
        for _ in range(OVERLAP_TURNS):
            serial_s, _ = run(make, store, commit_us=commit_us, index_depth_max=0)
            wall_s, told = run(make, store, commit_us=commit_us)
            turns.append(Turn(serial_s, wall_s, told))
            commit_us = ratio * told.compute_s / len(lines) * 1e6  # of what handlers take here and now
        turn = max(turns, key=lambda turn: (abs(turn.ratio / ratio - 1) < NEAR, turn.faster))
        told = turn.told
        print(
            f"  {turn.ratio:14.2f} {told.compute_s:8.2f} {told.commit_s:7.2f} {turn.serial_s:7.2f} {turn.wall_s:6.2f} "
            f"{turn.wall_s / max(told.compute_s, told.commit_s):9.2f} {turn.faster:7.2f} "
            f"{told.commit_wait_s:10.2f} s, {told.fetch_wait_s:.2f} s"
        )


class Turn(NamedTuple):
    """The same events one by one and at the default depth, right after one another."""

    serial_s: float
    wall_s: float
    told: IndexerProgress

    @property
    def ratio(self) -> float:
        """What commits took beside what handlers did."""
        return self.told.commit_s / self.told.compute_s

    @property
    def faster(self) -> float:
        """How many times."""
        return self.serial_s / self.wall_s


class Spin:
    """Keeps the interpreter busy for some microseconds: a count of steps, measured once."""

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
        """How many steps that is."""
        return max(0, int(us * self._steps_a_us))


def _spinning(lines: Sequence[bytes], spin: Spin, us: float, app: Headrace) -> Indexer:
    return transfers_of(app, Lines(lines), partial(spin, spin.steps(us)))


class Far:
    """Tables whose commits take so many microseconds an event: their own, and the rest of it waiting."""

    def __init__(self, tables: Any, us: float) -> None:
        self._tables = tables
        self._us = us

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)

    async def commit(self, commit: Any, *, now_us: int) -> None:
        """Commit, and wait."""
        until = time.perf_counter() + self._us / 1e6 * (commit.no - commit.old_no)
        await self._tables.commit(commit, now_us=now_us)
        await asyncio.sleep(max(0.0, until - time.perf_counter()))


def where(store: str) -> None:
    """One `where` an event, each for another value: its cost must not grow with their number in a batch."""
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
    indexer = app.indexer("asking", source=Lines(lines), entities=[Account])

    @indexer.on("transfer")
    async def on_transfer(event: Transfer, ctx: HandlerContext) -> None:
        same = await ctx.where(Account, country=event.receiver)
        ctx.set(Account(event.sender, len(same), event.receiver))

    return indexer


class Numbers:
    """A source of events made as they are asked for: number n touches entity n // 2, both times soon after another."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.marks: list[float] = []

    async def arrivals(self, after: Position | None) -> Any:
        """Events in pieces, with a mark at each million."""
        for start in range(int(after or 0), self._count, 5_000):
            if not start % 1_000_000:
                self.marks.append(time.process_time())
            yield Arrived(range(start + 1, start + 5_001), list(_numbered(start)))
        self.marks.append(time.process_time())

    async def head(self) -> Position | None:
        """How many there will be."""
        return self._count


def _numbered(start: int) -> Iterator[Transfer]:
    for number in range(start, start + 5_000):
        yield Transfer(f"account{number // 2:08}", f"account{max(0, number // 2 - 50):08}", 1)


def memory(store: str, events: int) -> int:
    """Peak memory over many entities; answers 1 over the bound. Then what an event costs at the end, and at the start.

    Those take turns on the grown tables and on empty ones, and the best of each counts: what the machine does beside
    this changes more over the minutes of a long run than an event's cost does.
    """
    source = Numbers(events)
    with tempfile.TemporaryDirectory() as folder:
        grown = _place(store, folder, "grown")
        elapsed_s, told = run(lambda app: _counting(app, source), grown, keeps=True, index_memory_mib=MEMORY_MIB)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        costs = [later - before for before, later in zip(source.marks, source.marks[1:], strict=False)]
        print(
            f"memory on {_name(store)}: {events:,} events, {events // 2:,} entities in {elapsed_s:.0f} s; {_said(told)}"
        )
        print(f"  peak {peak_mib:.0f} MiB, allowed {MEMORY_MIB + ALLOWED_MIB} MiB")
        print(f"  CPU of each million: {', '.join(f'{cost:.1f}' for cost in costs)} s")
        firsts, lasts = [], []
        for turn in range(RUNS):
            firsts.append(_cost(_place(store, folder, f"first{turn}"), 0))
            lasts.append(_cost(grown, events + turn * TURN_EVENTS, keeps=turn < RUNS - 1))
    told_us = f"{min(lasts):.1f} us of CPU, on empty ones {min(firsts):.1f} us"
    print(f"  an event on the grown tables takes {told_us}: {min(lasts) / min(firsts):.2f} times as much")
    return int(peak_mib > MEMORY_MIB + ALLOWED_MIB)


def _place(store: str, folder: str, name: str) -> str:
    """A store of its own for a part of a scenario."""
    return f"{store}?schema=bench_{name}" if store else f"sqlite:///{folder}/{name}.db"


def _cost(place: str, first: int, *, keeps: bool = False) -> float:
    """CPU of an event after the first so many, in microseconds."""
    started = time.process_time()
    source = Numbers(first + TURN_EVENTS)
    run(lambda app: _counting(app, source), place, keeps=keeps, index_memory_mib=MEMORY_MIB)
    return (time.process_time() - started) / TURN_EVENTS * 1e6


def _counting(app: Headrace, source: Numbers) -> Indexer:
    indexer = app.indexer("counting", source=source, entities=[Account])

    @indexer.on("transfer")
    async def on_transfer(event: Transfer, ctx: HandlerContext) -> None:
        account = await ctx.get_or_create(Account, event.sender)
        ctx.set(replace(account, balance=account.balance + event.amount))
        other = await ctx.get_or_create(Account, event.receiver)
        ctx.set(replace(other, balance=other.balance - event.amount))

    return indexer


def _said(told: IndexerProgress) -> str:
    return (
        f"compute {told.compute_s:.2f} s, commit {told.commit_s:.2f} s in {told.commits_count}, stalled on commit "
        f"{told.commit_wait_s:.2f} s, on fetch {told.fetch_wait_s:.2f} s"
    )


def _name(store: str) -> str:
    return "PostgreSQL" if store else "SQLite"


def main() -> int:
    """What was asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m bench.indexer")
    parser.add_argument("scenarios", nargs="+", choices=["transfers", "overlap", "where", "memory"])
    parser.add_argument("--store", default="", help="a PostgreSQL URL; a fresh SQLite file without")
    parser.add_argument("--events", type=int, default=10_000_000, help="of the memory scenario")
    asked = parser.parse_args()
    failed = 0
    for scenario in asked.scenarios:
        if scenario == "memory":
            failed |= memory(asked.store, asked.events)
        else:
            {"transfers": transfers, "overlap": overlap, "where": where}[scenario](asked.store)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
