"""States of a batch: in every order of events it completes in the same state, exactly once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Final

import pytest

from headrace.core import batch as batches
from headrace.core.batch import BatchRecord, ledger
from headrace.core.index_set import IndexSet
from headrace.core.span import Counts
from headrace.foundation.errors import ClientFault, Conflict, InvalidInput


class Life:
    """A batch with its received set, as a store keeps them; counts how often it completed."""

    def __init__(self, expected_count: int | None) -> None:
        self.batch = BatchRecord(id="batch", expected_count=expected_count)
        self.received = IndexSet()
        self.now_us = 0
        self.finishes_count = 0
        self.due_count = 0

    def keep(self, after: BatchRecord) -> None:
        self.finishes_count += after.is_finished and not self.batch.is_finished
        self.batch = after
        assert ledger(after, leased_count=0).balances
        assert after.is_finished == (after.state == batches.COMPLETED)

    def append(self, start: int, stop: int) -> None:
        batches.check_append(self.batch, first_index=start, last_index=stop - 1, runs_max=100)
        new = self.received.union(IndexSet())
        accepted_count = new.add_range(start, stop)
        self.now_us += 1
        self.keep(
            batches.appended(
                self.batch,
                accepted_count=accepted_count,
                created_with_outcome=Counts(),
                cursor=None,
                now_us=self.now_us,
            )
        )
        self.received = new
        self.due_count += accepted_count

    def seal(self) -> None:
        self.now_us += 1
        try:
            self.keep(batches.sealed(self.batch, self.received, expected_count=4, now_us=self.now_us))
        except Conflict:
            assert len(self.received) < 4

    def settle(self) -> None:
        """Settle some received runs; a worker can't settle others."""
        count = min(self.due_count, 2)
        self.due_count -= count
        self.now_us += 1
        self.keep(batches.settled(self.batch, Counts(completed=count), self.now_us))


Event = Callable[[Life], None]
EVENTS: Final[dict[str, Event]] = {
    "first half": lambda life: life.append(0, 2),
    "second half": lambda life: life.append(2, 4),
    "stream retried": lambda life: life.append(0, 4),
    "seal": Life.seal,
    "seal retried": Life.seal,
    "some settle": Life.settle,
    "others settle": Life.settle,
}


@pytest.mark.parametrize("expected_count", [4, None])
def test_every_interleaving_of_retry_seal_and_settlement_ends_the_same_and_once(expected_count: int | None) -> None:
    for order in permutations(EVENTS):
        life = Life(expected_count)
        for name in order:
            EVENTS[name](life)
        # The senders repeat what is not done: the client its seal, the workers their settlements.
        for _ in range(3):
            life.seal()
            life.settle()
        end = life.batch
        assert (end.state, end.received_count, end.expected_count, end.counts) == (
            "completed",
            4,
            4,
            Counts(completed=4),
        ), order
        assert life.finishes_count == 1, order


def test_a_batch_that_finishes_before_its_seal_is_completed_by_the_seal() -> None:
    life = Life(None)
    life.append(0, 4)
    life.settle()
    life.settle()
    assert life.batch.state == "open"
    life.seal()
    assert (life.batch.state, life.batch.finished_us) == ("completed", life.now_us)


@pytest.mark.parametrize("state", ["cancelled", "abandoned"])
@pytest.mark.parametrize("unsettled_count", [0, 2])
def test_a_stopped_batch_ends_with_its_last_run_and_takes_nothing(state: str, unsettled_count: int) -> None:
    life = Life(4)
    life.append(0, 2)
    if not unsettled_count:
        life.settle()
    stopped = batches.stopped(life.batch, state, 9)
    assert (stopped.state, stopped.is_finished) == (state, not unsettled_count)
    ended = batches.settled(stopped, Counts(cancelled=unsettled_count), 10)
    assert ended.is_finished
    assert batches.stopped(ended, "cancelled", 11) == ended
    for refused in (
        lambda: batches.check_append(ended, first_index=0, last_index=0, runs_max=9),
        lambda: batches.sealed(ended, IndexSet(), expected_count=None, now_us=12),
        lambda: batches.appended(ended, accepted_count=1, created_with_outcome=Counts(), cursor=None, now_us=12),
    ):
        with pytest.raises(Conflict):
            refused()


def test_redrive_opens_a_finished_batch_and_it_finishes_again() -> None:
    life = Life(4)
    life.append(0, 4)
    life.seal()
    failed = batches.settled(life.batch, Counts(completed=3, failed=1), 9)
    assert failed.state == "completed"
    again = batches.redriven(failed, Counts(failed=-1))
    assert (again.state, again.is_finished, again.unsettled_count) == ("sealed", False, 1)
    assert batches.settled(again, Counts(completed=1), 10).finished_us == 10


@pytest.mark.parametrize("expected_count", [-1, 11])
def test_an_impossible_size_is_refused(expected_count: int) -> None:
    with pytest.raises(InvalidInput):
        batches.check_created(expected_count=expected_count, runs_max=10)


@pytest.mark.parametrize("state", ["completed", "open", ""])
def test_a_batch_is_stopped_by_two_words_only(state: str) -> None:
    with pytest.raises(ClientFault):
        batches.stopped(BatchRecord(id="batch"), state, 1)


def test_a_sealed_stream_with_gaps_takes_what_it_has_and_no_more() -> None:
    stream = BatchRecord(id="batch", kind="stream", state="sealed", expected_count=2, received_count=2)
    batches.check_append(stream, first_index=7, last_index=7, runs_max=10)
    again = batches.appended(stream, accepted_count=0, created_with_outcome=Counts(), cursor=None, now_us=1)
    assert again.received_count == 2
    with pytest.raises(Conflict):
        batches.appended(stream, accepted_count=1, created_with_outcome=Counts(), cursor=None, now_us=1)


def test_the_seal_deadline_counts_from_the_last_append() -> None:
    batch = BatchRecord(id="batch", created_us=5, seal_timeout_ms=10)
    assert batches.seal_due_us(batch) == 10_005
    later = batches.appended(batch, accepted_count=1, created_with_outcome=Counts(), cursor=None, now_us=70)
    assert batches.seal_due_us(later) == 10_070
    assert batches.seal_due_us(batches.stopped(batch, "cancelled", 6)) is None
    assert batches.seal_due_us(BatchRecord(id="batch")) is None
