"""Lists of any length, read from a store page by page: each page is bounded by entries and by bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.core.batch import BatchRecord, Ledger
from headrace.store.protocol import QueryStore, RunOutcome, RunRecord


async def listed_runs(
    store: QueryStore, environment: str, *, limit: int, after: tuple[str, int] | None = None, **filters: Any
) -> list[RunRecord]:
    """List at most `limit` runs; `filters` as for `QueryStore.runs`."""
    records: list[RunRecord] = []
    while len(records) < limit:
        page = await store.runs(environment, after=after, limit=limit - len(records), **filters)
        if not page:
            break
        records += page
        after = (page[-1].batch_id, page[-1].index)
    return records


async def listed_batches(
    store: QueryStore, environment: str, *, limit: int, states: Sequence[str] | None = None
) -> list[tuple[BatchRecord, Ledger]]:
    """List at most `limit` batches, newest first."""
    listed: list[tuple[BatchRecord, Ledger]] = []
    while len(listed) < limit:
        before_id = listed[-1][0].id if listed else ""
        page = await store.batches(environment, states=states, before_id=before_id, limit=limit - len(listed))
        if not page:
            break
        listed += page
    return listed


async def outcomes_from(store: QueryStore, batch_id: str, from_index: int = 0, *, runs_max: int) -> list[RunOutcome]:
    """Return at most `runs_max` consecutive final outcomes from an index on."""
    outcomes: list[RunOutcome] = []
    while len(outcomes) < runs_max:
        first = outcomes[-1].index + 1 if outcomes else from_index
        page = await store.outcomes(batch_id, first, runs_max - len(outcomes))
        if not page:
            break
        outcomes += page
    return outcomes
