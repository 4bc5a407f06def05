"""Runs in the caller's own PostgreSQL transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.store.caller_transaction import CallerTransaction, Steps
from headrace.store.notifications import WORK
from headrace.store.postgres.id_ranges import IdRange
from headrace.store.postgres.notifier import channel_of
from headrace.store.postgres.pool import Prepared
from headrace.store.transactions.sql_script import Query, Rows


class PostgresCallerTransaction(CallerTransaction):
    """Scripts in a caller's transaction. Ids come from the ranges of this process; a fetched range stays if the caller
    rolls back.

    Listeners are notified with the caller's commit, which makes commits of such transactions wait for each other a
    little. The engine's own transactions notify after their commit (R11, notifications follow the commit); here
    Headrace does not run after the commit.
    """

    def __init__(
        self,
        connection: Any,
        sql: Mapping[str, Prepared],
        schema: str,
        *,
        store_id: str,
        block_ids: IdRange,
        span_ids: IdRange,
    ) -> None:
        super().__init__(connection, sql.__getitem__, is_sqlite=False, store_id=store_id)
        self._ids = {"next_block_ids": block_ids, "next_span_ids": span_ids}
        self._notification = {"channel": channel_of(schema), "words": WORK}

    def _rows(self, ask: Query) -> Steps[Rows]:
        if ask.name != "take_ids":
            return (yield from super()._rows(ask))
        first_block = yield from self._first("next_block_ids", ask.values["blocks_count"])
        first_span = yield from self._first("next_span_ids", ask.values["spans_count"])
        return [(first_block, first_span)]

    def _first(self, name: str, count: int) -> Steps[int]:
        id_range = self._ids[name]
        while (first := id_range.take(count)) is None:
            ((start,),) = yield from super()._rows(Query(name, {}))
            id_range.start(start)
        return first

    def _check_store(self) -> Steps[None]:
        """Check the store, and notify waiting workers with the caller's commit, in one statement."""
        ((store_id, _),) = yield from super()._rows(Query("join_transaction", self._notification))
        self._check_id(store_id)
