"""One `headrace map`, from its arguments to its summary.

Four tasks run concurrently: the feed stores items, a worker runs them, the writer writes results in order, and the
display shows the progress. Each can be killed at any moment: the store knows how far all of them came.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Coroutine
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from headrace.app import Headrace
from headrace.cli.invocation.opening import RUNS_FAILED, shown_store
from headrace.cli.invocation.printing import counted, duration, note, note_json, say_json
from headrace.cli.invocation.progress import ProgressState, display
from headrace.cli.invocation.signals import Signals
from headrace.cli.invocation.target_loader import load_target
from headrace.cli.maps.chain import Chain, ChainBatch, MapIdentity, open_chain
from headrace.cli.maps.first_items import check_first_items
from headrace.cli.maps.input import Input
from headrace.cli.maps.output import FileOutput, Output, lines_of, open_output
from headrace.core.batch import CANCELLED, Ledger
from headrace.foundation.errors import InvalidInput
from headrace.foundation.settings import Settings
from headrace.runtime.engine import Engine
from headrace.runtime.producing.sequential_feed import SealedElsewhere, SequentialFeed
from headrace.runtime.retrying import through_outages
from headrace.runtime.tasks.call_options import Options, key_of
from headrace.task import Task

PAGE_RUNS: Final = 4_096
LINGER_S: Final = 0.05
"""Seconds between two reads of the store while results come slower than they are written."""

LOOK_S: Final = 0.25
SHOW_S: Final = 0.25
INTERRUPTED: Final = 130


class Summary(msgspec.Struct, kw_only=True):
    """Outcome of a map. `batches` has more than one id when the input had grown after an earlier command."""

    state: str
    task: str
    input: str
    output: str
    store: str
    batches: list[str]
    runs: int
    completed: int
    failed: int
    cancelled: int
    expired: int
    resumed: bool
    done_before: int
    failed_before: int
    seconds: float
    runs_per_s: float

    @property
    def bad(self) -> int:
        """Return the number of runs without a result."""
        return self.failed + self.cancelled + self.expired

    @property
    def exit_code(self) -> int:
        """Return the command's exit code."""
        if self.state == "interrupted":
            return INTERRUPTED
        return RUNS_FAILED if self.bad else 0


def load_task(target: str) -> tuple[Headrace, Task[Any, Any]]:
    """Import the task that `target` names, with its app; a plain function gets an app of its own."""
    loaded = load_target(target)
    if isinstance(loaded.handle, Task) and isinstance(loaded.handle.app, Headrace):
        return loaded.handle.app, loaded.handle
    app = Headrace("map")
    return app, app.task(loaded.function)


class Mapping:
    """A map whose arguments were checked, with its output opened."""

    def __init__(
        self,
        settings: Settings,
        app: Headrace,
        task: Task[Any, Any],
        source: Input,
        output: Output,
        *,
        batch_key: str,
        fresh: bool,
        shows_progress: bool,
        command: str = "",
    ) -> None:
        self.settings = settings
        self.app = app
        self.task = task
        self.input = source
        self.output = output
        self.batch_key = batch_key
        self.fresh = fresh
        self.shows_progress = shows_progress
        self.command = command or shlex.join(["headrace", *sys.argv[1:]])
        self.chain: Chain | None = None
        self._is_fed = False
        self._stops_count = 0
        self._stop = asyncio.Event()
        self._before = Totals([])

    @classmethod
    def prepare(
        cls,
        settings: Settings,
        app: Headrace,
        task: Task[Any, Any],
        *,
        input_name: str,
        output_name: str | None,
        batch_key: str,
        fresh: bool,
        shows_progress: bool,
    ) -> Self:
        """Check all arguments before anything runs. Raises `InvalidInput`."""
        source = Input(input_name)
        if len(batch_key) > settings.limits.name_chars_max or (batch_key and not batch_key.isprintable()):
            raise InvalidInput(
                f"expected a --batch-key of at most {settings.limits.name_chars_max} printable characters, "
                f"got {batch_key[:50]!r}"
            )
        output = open_output(output_name, input_path=source.path)
        return cls(settings, app, task, source, output, batch_key=batch_key, fresh=fresh, shows_progress=shows_progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.output.close()

    @property
    def is_resumable(self) -> bool:
        """True if the same command finds this batch again."""
        return bool(self.batch_key) or not self.input.is_stream

    # -- running

    async def run(self) -> Summary:
        """Feed, run, write and show until all is done or a signal stops it."""
        if self.input.is_stream:
            note(
                f"reading {'standard input' if self.input.path is None else self.input.name}, "
                + (
                    "which the same --batch-key resumes"
                    if self.batch_key
                    else "which can be resumed only with --batch-key KEY"
                )
            )
        started_s = monotonic()
        async with self.app as app:
            engine = await app.open()
            source = MapIdentity(self.task.name, self.input.identity, self.batch_key)
            is_whole = False
            with Signals(self._stopped):
                self.chain = chain = await self._open(engine, source)
                if chain is not None:
                    self._before = await self._ledger()
                    is_whole = await self._all_at_once(engine, chain)
            if chain is not None:
                await self._leave(engine, chain, is_whole=is_whole)
            return await self._summary(is_whole=is_whole, seconds=monotonic() - started_s)

    async def _open(self, engine: Engine, source: MapIdentity) -> Chain | None:
        """Return the chain of this map; None if a signal came during the wait for the first items of a stream."""
        opening = self._start(
            open_chain(
                engine,
                source,
                fresh=self.fresh,
                is_resumable=self.is_resumable,
                before_new=lambda: check_first_items(self.input, self.task.spec, engine.limits),
            )
        )
        stop = self._start(self._stop.wait())
        try:
            await asyncio.wait({opening, stop}, return_when=asyncio.FIRST_COMPLETED)
            return opening.result() if opening.done() else None
        finally:
            for task in (opening, stop):
                task.cancel()
            await asyncio.wait({opening, stop})
            if opening.cancelled() or opening.exception() is not None:
                await self.input.close()

    async def _all_at_once(self, engine: Engine, chain: Chain) -> bool:
        """Run the four tasks; True when every result was written, False when the map was stopped."""
        needed, over = asyncio.Event(), asyncio.Event()
        if not chain.is_finished:
            needed.set()
        tasks = {
            "feed": self._start(self._feed(engine, chain, needed)),
            "work": self._start(self._work(needed, over)),
            "write": self._start(self._write_while_read(engine, chain)),
            "show": self._start(self._show(engine)),
            "stop": self._start(self._stop.wait()),
        }
        try:
            running = set(tasks.values())
            while not tasks["write"].done() and not tasks["stop"].done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    ended.result()
        finally:
            for name in ("feed", "show", "stop", "write"):
                tasks[name].cancel()
                await asyncio.wait((tasks[name],))
            over.set()
            needed.set()
            await asyncio.wait((tasks["work"],))
        for ended in tasks.values():
            if not ended.cancelled() and ended.exception() is not None:
                ended.result()
        return not tasks["write"].cancelled()

    @staticmethod
    def _start(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(coroutine)

    async def _feed(self, engine: Engine, chain: Chain, needed: asyncio.Event) -> None:
        """Store the input in the last batch of the chain, and in further batches where it is full or sealed."""
        while True:
            part = chain.last
            key = key_of(self.task.spec, Options(), engine.clock.now_us())
            feed = SequentialFeed(self.input.pieces(), engine=engine, key=key, start=part.position, waits_max=None)
            try:
                while not await feed.fill(part.batch, base_index=part.base_index):
                    part = await chain.extend(feed.position)
                    needed.set()
                break
            except SealedElsewhere:
                if self.input.is_stream:
                    raise
                await chain.catch_up()
            finally:
                await feed.close()
        await chain.catch_up()
        self._is_fed = True
        engine.recorded.notify()

    async def _work(self, needed: asyncio.Event, over: asyncio.Event) -> None:
        """Run a worker until `over` is set; a map that was complete before needs none."""
        await needed.wait()
        if not over.is_set():
            async with self.app.worker(tasks=[self.task.name]):
                await over.wait()

    async def _write(self, engine: Engine, chain: Chain) -> None:
        """Write results in the order of the input as their runs end."""
        number = 0
        while True:
            await self._write_part(engine, chain.parts[number])
            while number + 1 == len(chain.parts) and not self._is_fed:
                await engine.recorded.wait(engine.clock, LOOK_S)
            number += 1
            if number == len(chain.parts):
                break
        await self.output.finish()

    async def _write_while_read(self, engine: Engine, chain: Chain) -> None:
        """Write results; when the reader of the output goes away, stop the map."""
        try:
            await self._write(engine, chain)
        except BrokenPipeError:
            note(f"the reader of {self.output.name} has closed it")
            self._stop.set()
            await engine.clock.wait_for(asyncio.Event(), None)

    async def _write_part(self, engine: Engine, part: ChainBatch) -> None:
        index = 0
        while True:
            outcomes = await through_outages(engine, partial(engine.store.outcomes, part.batch.id, index, PAGE_RUNS))
            async for lines in lines_of(engine, outcomes, part.base_index):
                await self.output.put(lines)
            index += len(outcomes)
            page_bytes = sum(len(outcome.result) for outcome in outcomes)
            if len(outcomes) == PAGE_RUNS or page_bytes * 2 >= engine.limits.results_page_bytes_max:
                continue  # the page was full
            batch, _ = await through_outages(engine, partial(engine.store.batch, part.batch.id))
            if batch.expected_count is not None and index >= batch.expected_count:
                part.batch = batch
                return
            if batch.is_stopped and batch.is_finished and not outcomes:
                part.batch = batch
                return
            if outcomes:
                await engine.clock.sleep(LINGER_S)
            else:
                await engine.recorded.wait(engine.clock, LOOK_S)

    async def _show(self, engine: Engine) -> None:
        progress_display = display(is_wanted=self.shows_progress, label=self.task.name)
        alive_s = monotonic()
        try:
            while True:
                ledger = await self._ledger()
                progress_display.update(self._state_of(ledger))
                if not self.is_resumable and monotonic() - alive_s > engine.limits.seal_timeout_ms / 4_000:
                    await self._keep_open(engine)
                    alive_s = monotonic()
                await engine.clock.sleep(SHOW_S)
        finally:
            progress_display.close()

    async def _keep_open(self, engine: Engine) -> None:
        """Keep a batch open while its stream is silent; else it would be abandoned after `seal_timeout_ms`."""
        assert self.chain is not None
        if not self._is_fed:
            batch_id = self.chain.last.batch.id
            await through_outages(engine, lambda: engine.store.append(batch_id, [], now_us=engine.clock.now_us()))

    def _state_of(self, ledger: Totals) -> ProgressState:
        if self._is_fed:
            return ProgressState(ledger.settled, ledger.bad, ledger.received)
        if self.input.size_bytes and self.input.read_bytes:
            total = ledger.received * self.input.size_bytes // min(self.input.read_bytes, self.input.size_bytes)
            return ProgressState(ledger.settled, ledger.bad, max(total, ledger.received), is_estimate=True)
        return ProgressState(ledger.settled, ledger.bad, None)

    # -- ending

    def _stopped(self) -> None:
        """Handle a signal: the first stops the map, the second ends the process."""
        self._stops_count += 1
        if self._stops_count == 1:
            note("stopping: running items may finish, the others are left for a resume (repeat the signal to stop now)")
            self._stop.set()
        else:
            note(f"stopped. {self._hint()}")
            os._exit(INTERRUPTED)  # the store knows how far everything came

    async def _leave(self, engine: Engine, chain: Chain, *, is_whole: bool) -> None:
        """Cancel a batch that no later command can find."""
        if not is_whole and not self.is_resumable:
            for part in chain.parts:
                await engine.stop_batch(part.batch.id, CANCELLED)

    def _hint(self) -> str:
        if not self.is_resumable:
            return "This input can't be read again; with --batch-key KEY a map of a stream can be resumed."
        command = self.command.replace(" --fresh", "")
        return f"To resume: {command}"

    async def _ledger(self) -> Totals:
        chain = self.chain
        if chain is None:
            return Totals([])
        engine = chain.engine
        return Totals(
            [(await through_outages(engine, partial(engine.store.batch, part.batch.id)))[1] for part in chain.parts]
        )

    async def _summary(self, *, is_whole: bool, seconds: float) -> Summary:
        totals = await self._ledger()
        return Summary(
            state="completed" if is_whole else "interrupted",
            task=self.task.name,
            input=self.input.name,
            output=self.output.name,
            store=shown_store(self.settings),
            batches=[] if self.chain is None else [part.batch.id for part in self.chain.parts],
            runs=totals.received,
            completed=totals.completed,
            failed=totals.failed,
            cancelled=totals.cancelled,
            expired=totals.expired,
            resumed=self.chain is not None and not self.chain.is_new,
            done_before=self._before.settled,
            failed_before=self._before.failed,
            seconds=round(seconds, 3),
            runs_per_s=round((totals.settled - self._before.settled) / seconds, 1) if seconds else 0.0,
        )

    def report(self, summary: Summary, *, as_json: bool) -> None:
        """Print the summary, on standard error where standard output holds the results."""
        if as_json:
            if isinstance(self.output, FileOutput):
                say_json(summary)
            else:
                note_json(summary)
        else:
            note(self._words(summary))
        if summary.state == "interrupted":
            note(f"interrupted. {self._hint()}")

    def _words(self, summary: Summary) -> str:
        ends = [f"{summary.completed:,} completed"]
        ends += [
            f"{count:,} {name}"
            for name, count in (
                ("failed", summary.failed),
                ("cancelled", summary.cancelled),
                ("expired", summary.expired),
            )
            if count
        ]
        before = f", {summary.done_before:,} already done earlier" if summary.done_before else ""
        words = (
            f"{counted(summary.runs, 'run')}: {', '.join(ends)}{before}; {duration(summary.seconds)}, "
            f"{summary.runs_per_s:,.0f} runs/s; results in {summary.output}"
        )
        if summary.failed_before:
            words += f"\n{counted(summary.failed_before, 'run')} failed in an earlier command and did not run again"
        if summary.failed:
            words += (
                f"\nsee why: headrace run list --state failed --batch {summary.batches[-1]}"
                f"\nrun them again: headrace batch redrive {summary.batches[-1]}, then repeat this command"
                "\nafter a change of the input: repeat this command with --fresh, which starts over"
            )
        return words


class Totals:
    """Sums over the ledgers of a chain."""

    def __init__(self, ledgers: list[Ledger]) -> None:
        self.completed = sum(ledger.completed for ledger in ledgers)
        self.failed = sum(ledger.failed for ledger in ledgers)
        self.cancelled = sum(ledger.cancelled for ledger in ledgers)
        self.expired = sum(ledger.expired for ledger in ledgers)
        self.bad = self.failed + self.cancelled + self.expired
        self.settled = self.completed + self.bad
        self.received = sum(ledger.expected - ledger.missing for ledger in ledgers)
