"""Who watches: what must hold after every request that reached the store, and what processes may never do.

The watch sees the store's tables from inside, cheaply, after each request: only spans that changed are looked at.
Every so many requests it also asks `tests.support.invariants`, which goes through the verbs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from headrace.core import run
from headrace.core.batch import BatchRecord
from headrace.core.block import Chunk
from headrace.core.pack import REFERENCE, unpack
from headrace.core.span import LEASED, SETTLED, Settlement, Span, block_offsets_of
from headrace.store.memory import MemoryStore
from headrace.store.memory.reads import indexes_of
from headrace.store.protocol import Lease
from tests.support import invariants
from tests.support.invariants import Record

FULL_EVERY: Final = 60
"""Requests between two looks with every invariant."""

Home = tuple[int, int]


class Watch:
    """Sees every request and every execution; `fault` is told of whatever must not be."""

    def __init__(self, store: MemoryStore, fault: Callable[[str], None]) -> None:
        self.store = store
        self.executions: Counter[int] = Counter()
        self.late_executions_count = 0
        self.acknowledged: dict[str, set[int]] = {}
        self._fault = fault
        self._record = Record()
        self._spans: dict[int, Span] = {}
        self._blocks_seen = 0
        self._states: dict[Home, int] = {}
        self._home_of: dict[int, Home] = {}
        self._names: dict[Home, tuple[str, int]] = {}
        self._by_name: dict[tuple[str, int], Home] = {}
        self._finished: dict[str, int] = {}
        self._tokens: dict[int, int] = {}
        self.requests_count = 0

    # -- after each request

    def delivered(self, verb: str, args: Sequence[Any], answer: Any) -> None:
        """The store did `verb`; look at what became of it."""
        self.requests_count += 1
        if verb == "claim":
            self._claimed(answer)
        elif verb == "settle":
            self._settled(args[0], answer)
        elif verb == "create_batch" and answer[1]:
            self._created(answer[0])
        self._look_at_blocks()
        self._look_at_spans(is_redrive=verb == "redrive")
        self._look_at_batches(is_redrive=verb == "redrive")
        if self.requests_count % FULL_EVERY == 0:
            self.look_at_all()

    def _claimed(self, leases: list[Lease]) -> None:
        for lease in leases:
            is_repeated = self._tokens.get(lease.span_id) == lease.token
            if not is_repeated and self.store._tables.batches[lease.batch_id].is_stopped:
                self._fault(f"span {lease.span_id} of a stopped batch was handed out")
            self._tokens[lease.span_id] = max(self._tokens.get(lease.span_id, 0), lease.token)
            for index in lease.indexes:
                if self.is_final(lease.batch_id, index):
                    self._fault(f"run {lease.batch_id}/{index} was handed out again after it had ended")

    def _created(self, batch: BatchRecord) -> None:
        session = self.store._tables.sessions.get(batch.session_id)
        if session is not None and session.ended_us:
            self._fault(f"{batch.id} was created for a session that had ended")

    def _settled(self, settlements: Sequence[Settlement], words: list[str]) -> None:
        for settlement, word in zip(settlements, words, strict=True):
            if word == SETTLED and settlement.token < self._tokens.get(settlement.span_id, 0):
                self._fault(f"span {settlement.span_id} was settled under token {settlement.token}, which is stale")

    def _look_at_blocks(self) -> None:
        tables = self.store._tables
        while self._blocks_seen < tables.next_block_id - 1:
            self._blocks_seen += 1
            block = tables.blocks[self._blocks_seen]
            payloads, kinds = unpack(block.chunk.items)
            for block_offset, index in enumerate(indexes_of(block.chunk)):
                home = block.id, block_offset
                self._names[home] = block.batch_id, index
                if (block.batch_id, index) in self._by_name:
                    self._fault(f"run {block.batch_id}/{index} is stored twice")
                self._by_name[block.batch_id, index] = home
                extra = block.chunk.extras.get(block_offset)
                if extra is not None and extra.link:
                    continue  # its key named a run already: it is received, and has that run's outcome
                if not kinds or kinds[block_offset] != REFERENCE:
                    self._know(int(payloads[block_offset]), home)

    def _know(self, value: int, home: Home) -> None:
        before = self._home_of.get(value)
        if before is not None and self._states[before] not in run.ENDED_BADLY:  # else its key was free again
            self._fault(f"item {value} became two runs: {self._names[before]} and {self._names[home]}")
        self._home_of[value] = home

    def _look_at_spans(self, *, is_redrive: bool) -> None:
        seen, states = self._spans, self._states
        for span_id, span in self.store._tables.spans.items():
            if seen.get(span_id) is span:
                continue
            seen[span_id] = span
            for block_offset, state in zip(block_offsets_of(span), span.states, strict=True):
                if state == run.MOVED:
                    continue
                home = span.block_id, block_offset
                before = states.get(home)
                if before is not None and before != state and before in run.FINAL:
                    if not is_redrive:
                        self._fault(f"run {self._names[home]} was {run.NAMES[before]} and is {run.NAMES[state]}")
                    self._record.forget(*self._names[home])
                states[home] = state

    def _look_at_batches(self, *, is_redrive: bool) -> None:
        for batch in self.store._tables.batches.values():
            finished_us = self._finished.get(batch.id, 0)
            if finished_us and batch.finished_us != finished_us and not is_redrive:
                self._fault(f"batch {batch.id} ended at {finished_us} and again at {batch.finished_us}")
            if batch.finished_us and batch.unsettled_count:
                self._fault(f"batch {batch.id} has ended with {batch.unsettled_count} runs to go")
            self._finished[batch.id] = batch.finished_us

    # -- now and then, and at the end

    def look_at_all(self) -> None:
        """Every invariant of every batch, and every promise given so far."""
        for fault in done_at_once(invariants.faults(self.store)):
            self._fault(fault)
        tables = self.store._tables
        for batch in tables.batches.values():
            for fault in self._record.note(batch.id, done_at_once(self.store.outcomes(batch.id, 0, invariants.ALL))):
                self._fault(fault)
        for batch_id, indexes in self.acknowledged.items():
            received = tables.received[batch_id]
            if lost := [index for index in indexes if index not in received]:
                self._fault(f"batch {batch_id} lost runs it had acknowledged: {lost[:5]}")

    def acknowledge(self, batch_id: str, chunks: Sequence[Chunk], existing: dict[int, tuple[str, int]]) -> None:
        """A process was told that these runs are durable."""
        for chunk in chunks:
            for index in indexes_of(chunk):
                owner, own = existing.get(index, (batch_id, index))
                self.acknowledged.setdefault(owner, set()).add(own)

    def rest(self) -> list[str]:
        """What still waits for something: nothing may in the end."""
        left = [
            f"batch {batch.id} ({batch.kind}) is {batch.state} with {batch.unsettled_count} runs to go"
            for batch in self.batches()
            if not batch.is_finished
        ]
        left += [f"span {span.id} is leased to {span.session_id}" for span in self.leased()]
        return left

    def leased(self) -> list[Span]:
        """Spans under a lease."""
        return [span for span in self.store._tables.spans.values() if span.state == LEASED]

    def batches(self) -> list[BatchRecord]:
        """Every batch there is."""
        return list(self.store._tables.batches.values())

    def is_final(self, batch_id: str, index: int) -> bool:
        """Whether a run has ended."""
        home = self._by_name.get((batch_id, index))
        return home is not None and self._states.get(home, run.WAITING) in run.FINAL

    # -- executions

    def started(self, value: int, session_id: str, *, at_most_once: bool) -> None:
        """A process begins to run the item `value`, at its first line."""
        self.executions[value] += 1
        if at_most_once and self.executions[value] > 1:
            self._fault(f"the at-most-once item {value} ran {self.executions[value]} times")
        home = self._home_of.get(value)
        if home is None:
            return
        if self._states[home] in run.FINAL:
            session = self.store._tables.sessions.get(session_id)
            if session is not None and not session.ended_us:
                self._fault(f"run {self._names[home]} ran again after it had ended, in a live session")
            self.late_executions_count += 1


def done_at_once(coroutine: Any) -> Any:
    """The answer of a coroutine that never waits, as no verb of a `MemoryStore` does."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")
