"""Invariants of every store after every operation.

Tests of stores, simulations and journeys use them. Each function returns a list of sentences, empty if all hold.
"""

from __future__ import annotations

from headrace.core.batch import COMPLETED, LISTED, OPEN, SEALED, BatchRecord, Ledger
from headrace.core.run import FINAL, NAMES
from headrace.store.paging import listed_batches, listed_runs, outcomes_from
from headrace.store.protocol import QueryStore, RunOutcome

ALL = 1_000_000
FINAL_NAMES = {NAMES[state] for state in FINAL}


async def faults(store: QueryStore, environment: str = "default") -> list[str]:
    """Return everything that is wrong in an environment, as far as operations of the store can show."""
    faulty = []
    for batch, ledger in await listed_batches(store, environment, limit=ALL):
        faulty += [f"{batch.id}: {fault}" for fault in await batch_faults(store, batch, ledger)]
    return faulty


async def batch_faults(store: QueryStore, batch: BatchRecord, ledger: Ledger) -> list[str]:
    """Check that the ledger balances, that completion is right, and that counters, chunks, runs and outcomes agree."""
    faulty = []
    if not ledger.balances or min(ledger) < 0:
        faulty.append(f"the ledger does not balance: {ledger}")
    verification = await store.verify(batch.id)
    faulty += verification.differences
    if verification.ledger != ledger:
        faulty.append(f"the chunks tell {verification.ledger}, the counters {ledger}")
    faulty += completion_faults(batch, ledger)
    runs = await listed_runs(store, batch.environment, batch_id=batch.id, limit=ALL)
    if [run.index for run in runs] != sorted({run.index for run in runs}):
        faulty.append("runs are listed twice or out of order")
    states = [run.state for run in runs]
    counted = {name: states.count(name) for name in FINAL_NAMES}
    if any(counted[name] != getattr(ledger, name) for name in FINAL_NAMES):
        faulty.append(f"the runs tell {counted}, the ledger {ledger}")
    outcomes = await outcomes_from(store, batch.id, runs_max=ALL)
    wanted: list[tuple[int, str]] = []
    for run in runs:
        if run.state not in FINAL_NAMES or (batch.kind == LISTED and run.index != len(wanted)):
            break
        wanted.append((run.index, run.state))
    if [(outcome.index, NAMES[outcome.state]) for outcome in outcomes] != wanted:
        faulty.append(
            f"outcomes begin with {outcomes[:3]} of {len(outcomes)}, the runs with {wanted[:3]} of {len(wanted)}"
        )
    return faulty


def completion_faults(batch: BatchRecord, ledger: Ledger) -> list[str]:
    """Check that a batch is finished exactly when nothing is unsettled and no run can be added."""
    unsettled_count = ledger.waiting + ledger.leased
    faulty = []
    if batch.is_finished and (unsettled_count or batch.state in (OPEN, SEALED)):
        faulty.append(f"finished while {batch.state} with {unsettled_count} runs to go")
    if not batch.is_finished and not unsettled_count and batch.state != OPEN:
        faulty.append(f"nothing is left to do, yet it is {batch.state} and not finished")
    if batch.state == COMPLETED and ledger.missing:
        faulty.append(f"completed with {ledger.missing} runs missing")
    return faulty


class Record:
    """Record of runs that were seen to be final, so that a later change is found. Only `redrive` may change an
    outcome.
    """

    def __init__(self) -> None:
        self._final: dict[tuple[str, int], tuple[int, bytes]] = {}

    def note(self, batch_id: str, outcomes: list[RunOutcome]) -> list[str]:
        """Compare with what was seen before, and store it."""
        faulty = []
        for outcome in outcomes:
            name, now = (batch_id, outcome.index), (outcome.state, outcome.result)
            if self._final.setdefault(name, now) != now:
                faulty.append(f"run {name} was {self._final[name]} and is {now}")
        return faulty

    def forget(self, batch_id: str, index: int) -> None:
        """Forget the outcome of a run that was redriven."""
        self._final.pop((batch_id, index), None)

    def lost(self, batch_id: str, final_indexes: set[int]) -> list[str]:
        """Return the runs that were final and are not final any more."""
        return [
            f"run {index} was final and is not"
            for owner, index in self._final
            if owner == batch_id and index not in final_indexes
        ]
