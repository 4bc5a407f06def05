"""Invariant monitor: checks the store after every request, and each execution of a run.

The monitor reads the tables of the store from inside after each request, cheaply: only changed spans are checked. After
`REQUESTS_BETWEEN_FULL_CHECKS` requests it also runs `tests.support.invariants`, which uses the store operations.
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
from headrace.store.paging import outcomes_from
from headrace.store.protocol import Lease
from tests.support import invariants
from tests.support.invariants import Record

REQUESTS_BETWEEN_FULL_CHECKS: Final = 60
"""Requests between two checks of all invariants."""

RunLocation = tuple[int, int]


class InvariantMonitor:
    """Observer of all requests and executions; `fault` is called with each violation."""

    def __init__(self, store: MemoryStore, fault: Callable[[str], None]) -> None:
        self.store = store
        self.executions: Counter[int] = Counter()
        self.late_executions_count = 0
        self.acknowledged: dict[str, set[int]] = {}
        self._fault = fault
        self._record = Record()
        self._spans: dict[int, Span] = {}
        self._blocks_seen = 0
        self._states: dict[RunLocation, int] = {}
        self._location_of: dict[int, RunLocation] = {}
        self._run_of: dict[RunLocation, tuple[str, int]] = {}
        self._location_by_run: dict[tuple[str, int], RunLocation] = {}
        self._finished: dict[str, int] = {}
        self._tokens: dict[int, int] = {}
        self.requests_count = 0

    # -- after each request

    def delivered(self, operation: str, args: Sequence[Any], response: Any) -> None:
        """Check the effects of an operation that the store has performed."""
        self.requests_count += 1
        if operation == "claim":
            self._claimed(response)
        elif operation == "settle":
            self._settled(args[0], response)
        elif operation == "create_batch" and response[1]:
            self._created(response[0])
        self._check_blocks()
        self._check_spans(is_redrive=operation == "redrive")
        self._check_batches(is_redrive=operation == "redrive")
        if self.requests_count % REQUESTS_BETWEEN_FULL_CHECKS == 0:
            self.check_all()

    def _claimed(self, leases: list[Lease]) -> None:
        for lease in leases:
            is_repeated = self._tokens.get(lease.span_id) == lease.token
            if not is_repeated and self.store._tables.batches[lease.batch_id].is_stopped:
                self._fault(f"span {lease.span_id} of a stopped batch was delivered")
            self._tokens[lease.span_id] = max(self._tokens.get(lease.span_id, 0), lease.token)
            for index in lease.indexes:
                if self.is_final(lease.batch_id, index):
                    self._fault(f"run {lease.batch_id}/{index} was delivered again after it had ended")

    def _created(self, batch: BatchRecord) -> None:
        session = self.store._tables.sessions.get(batch.session_id)
        if session is not None and session.ended_us:
            self._fault(f"{batch.id} was created for a session that had ended")

    def _settled(self, settlements: Sequence[Settlement], outcomes: list[str]) -> None:
        for settlement, outcome in zip(settlements, outcomes, strict=True):
            if outcome == SETTLED and settlement.token < self._tokens.get(settlement.span_id, 0):
                self._fault(f"span {settlement.span_id} was settled under the stale token {settlement.token}")

    def _check_blocks(self) -> None:
        tables = self.store._tables
        while self._blocks_seen < tables.next_block_id - 1:
            self._blocks_seen += 1
            block = tables.blocks[self._blocks_seen]
            payloads, kinds = unpack(block.chunk.items)
            for block_offset, index in enumerate(indexes_of(block.chunk)):
                location = block.id, block_offset
                self._run_of[location] = block.batch_id, index
                if (block.batch_id, index) in self._location_by_run:
                    self._fault(f"run {block.batch_id}/{index} is stored twice")
                self._location_by_run[block.batch_id, index] = location
                extra = block.chunk.extras.get(block_offset)
                if extra is not None and extra.link:
                    continue  # its key belonged to an earlier run: it is received, and has the outcome of that run
                if not kinds or kinds[block_offset] != REFERENCE:
                    self._record_value(int(payloads[block_offset]), location)

    def _record_value(self, value: int, location: RunLocation) -> None:
        before = self._location_of.get(value)
        if before is not None and self._states[before] not in run.ENDED_BADLY:  # otherwise its key was free again
            self._fault(f"item {value} became two runs: {self._run_of[before]} and {self._run_of[location]}")
        self._location_of[value] = location

    def _check_spans(self, *, is_redrive: bool) -> None:
        seen, states = self._spans, self._states
        for span_id, span in self.store._tables.spans.items():
            if seen.get(span_id) is span:
                continue
            seen[span_id] = span
            for block_offset, state in zip(block_offsets_of(span), span.states, strict=True):
                if state == run.MOVED:
                    continue
                location = span.block_id, block_offset
                before = states.get(location)
                if before is not None and before != state and before in run.FINAL:
                    if not is_redrive:
                        self._fault(f"run {self._run_of[location]} was {run.NAMES[before]} and is {run.NAMES[state]}")
                    self._record.forget(*self._run_of[location])
                states[location] = state

    def _check_batches(self, *, is_redrive: bool) -> None:
        for batch in self.store._tables.batches.values():
            finished_us = self._finished.get(batch.id, 0)
            if finished_us and batch.finished_us != finished_us and not is_redrive:
                self._fault(f"batch {batch.id} ended at {finished_us} and again at {batch.finished_us}")
            if batch.finished_us and batch.unsettled_count:
                self._fault(f"batch {batch.id} has ended with {batch.unsettled_count} unsettled runs")
            self._finished[batch.id] = batch.finished_us

    # -- periodic checks, and the check at the end

    def check_all(self) -> None:
        """Check all invariants of all batches, and all acknowledgements so far."""
        for fault in result_of(invariants.faults(self.store)):
            self._fault(fault)
        tables = self.store._tables
        for batch in tables.batches.values():
            for fault in self._record.note(
                batch.id, result_of(outcomes_from(self.store, batch.id, runs_max=invariants.ALL))
            ):
                self._fault(fault)
        for batch_id, indexes in self.acknowledged.items():
            received = tables.received[batch_id]
            if missing := [index for index in indexes if index not in received]:
                self._fault(f"batch {batch_id} lost acknowledged runs: {missing[:5]}")

    def acknowledge(self, batch_id: str, chunks: Sequence[Chunk], existing: dict[int, tuple[str, int]]) -> None:
        """Record that a process received the acknowledgement of these runs."""
        for chunk in chunks:
            for index in indexes_of(chunk):
                owner, owner_index = existing.get(index, (batch_id, index))
                self.acknowledged.setdefault(owner, set()).add(owner_index)

    def unfinished(self) -> list[str]:
        """Return what is still pending: at the end of a simulation nothing may be."""
        unfinished = [
            f"batch {batch.id} ({batch.kind}) is {batch.state} with {batch.unsettled_count} unsettled runs"
            for batch in self.batches()
            if not batch.is_finished
        ]
        unfinished += [f"span {span.id} is leased to {span.session_id}" for span in self.leased()]
        return unfinished

    def leased(self) -> list[Span]:
        """Return the leased spans."""
        return [span for span in self.store._tables.spans.values() if span.state == LEASED]

    def batches(self) -> list[BatchRecord]:
        """Return all batches."""
        return list(self.store._tables.batches.values())

    def is_final(self, batch_id: str, index: int) -> bool:
        """Return True if a run has ended."""
        location = self._location_by_run.get((batch_id, index))
        return location is not None and self._states.get(location, run.WAITING) in run.FINAL

    # -- executions

    def started(self, value: int, session_id: str, *, at_most_once: bool) -> None:
        """Record that a process began to run the item `value`, at the first line of the task."""
        self.executions[value] += 1
        if at_most_once and self.executions[value] > 1:
            self._fault(f"the at-most-once item {value} ran {self.executions[value]} times")
        location = self._location_of.get(value)
        if location is None:
            return
        if self._states[location] in run.FINAL:
            session = self.store._tables.sessions.get(session_id)
            if session is not None and not session.ended_us:
                self._fault(f"run {self._run_of[location]} ran again after it had ended, in a live session")
            self.late_executions_count += 1


def result_of(coroutine: Any) -> Any:
    """Return the result of a coroutine that never suspends, like all operations of `MemoryStore`."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("expected the operation not to suspend")
