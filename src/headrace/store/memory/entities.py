"""`MemoryEntities`: the tables of indexers as plain dicts, as the specification of the tables on databases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from headrace.core.condition import Condition, all_hold
from headrace.core.entity import EntityType
from headrace.core.sequencer import Position, is_after
from headrace.foundation.errors import Conflict, NotFound, StoreBroken
from headrace.store.entities.protocol import Commit, Enqueued, EntityPlan, HistoryGone, IndexerState, LeaseLost, Write
from headrace.store.entities.schema import StoredTable, changes_of, check_names, tables_of
from headrace.store.memory.store import MemoryStore
from headrace.store.protocol import NewBatch


class _Checkpoint(NamedTuple):
    no: int
    source: str
    position: Position


class MemoryEntities:
    """Tables of indexers in this process, beside the batches of a `MemoryStore`, on its event loop."""

    works_beside = False

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._states: dict[tuple[str, str], IndexerState] = {}
        self._kept: dict[str, StoredTable] = {}
        self._rows: dict[str, dict[Any, Any]] = {}
        self._history: dict[str, dict[tuple[Any, int], Any]] = {}
        self._checkpoints: dict[tuple[str, str], list[_Checkpoint]] = {}

    async def close(self) -> None:
        """Do nothing: no connection is open."""

    async def prepare(self, plan: EntityPlan) -> IndexerState:
        """Create or extend the tables, and return the state of the indexer."""
        check_names(plan.entities)
        changes = changes_of(plan, self._kept, set(tables_of(self._kept)))
        key = (plan.environment, plan.indexer)
        state = self._states.setdefault(key, IndexerState(environment=plan.environment, name=plan.indexer))
        log = self._checkpoints.setdefault(key, [])
        if any(change.creates_history for change in changes):
            log.clear()
            state.floor_no, state.floor_positions = state.no, state.positions
        for change in changes:
            entity, keeps = change.entity, plan.keeps_history(change.entity)
            rows = self._rows.setdefault(entity.table, {})
            if change.drops_history or change.creates_history:
                self._history.pop(entity.table, None)
            past = self._history.setdefault(entity.table, {}) if keeps else {}
            for kept in (rows, past):
                for row_key, row in kept.items():
                    kept[row_key] = row and entity.cls(**{name: getattr(row, name) for name in row.__struct_fields__})
            columns = {column.name: column.form for column in entity.columns}
            self._kept[entity.table] = StoredTable(plan.environment, plan.indexer, columns, keeps)
        return msgspec.structs.replace(state)

    async def indexer_states(self, environment: str) -> list[IndexerState]:
        """List the indexers of an environment, by name."""
        return [msgspec.structs.replace(state) for key, state in sorted(self._states.items()) if key[0] == environment]

    async def take(self, seen: IndexerState, holder: str) -> int | None:
        """Lease an indexer as it was seen."""
        state = self._find(seen.environment, seen.name)
        if (state.token, state.beats) != (seen.token, seen.beats):
            return None
        state.token += 1
        state.beats += 1
        state.holder = holder
        return state.token

    async def beat(self, environment: str, name: str, token: int) -> bool:
        """Renew the lease."""
        state = self._find(environment, name)
        state.beats += state.token == token
        return state.token == token

    async def leave(self, environment: str, name: str, token: int) -> None:
        """Release the lease."""
        state = self._find(environment, name)
        if state.token == token:
            state.holder = ""
            state.beats += 1

    async def commit(self, commit: Commit, *, now_us: int) -> None:
        """Commit: the guard first, then what may still be refused (the runs), then the rows."""
        plan = commit.plan
        state = self._held(plan, commit.token)
        if state.no != commit.old_no:
            if (state.no, state.positions) == (commit.no, commit.positions):
                return
            raise StoreBroken(f"the indexer {plan.indexer!r} is at checkpoint {state.no}, expected {commit.old_no}")
        if commit.enqueued is not None:
            await self._enqueue(plan, commit.enqueued, now_us)
        state.no, state.positions = commit.no, dict(commit.positions)
        state.is_caught_up, state.moved_us = commit.is_caught_up, now_us
        state.beats += 1
        log = self._checkpoints[plan.environment, plan.indexer]
        log += [_Checkpoint(*checkpoint) for checkpoint in commit.checkpoints]
        for write in commit.writes:
            self._write(write, keeps_history=plan.keeps_history(write.entity))
        if commit.floor_no is not None:
            self._prune(plan, state, commit.floor_no)

    async def _enqueue(self, plan: EntityPlan, enqueued: Enqueued, now_us: int) -> None:
        batch_id, chunks = enqueued
        new = NewBatch(id=batch_id, environment=plan.environment, kind="stream", metadata={"indexer": plan.indexer})
        await self._store.create_batch(new, now_us=now_us)
        appended = await self._store.append(batch_id, chunks, now_us=now_us)
        if appended.accepted_count:
            await self._store.seal(batch_id, None, now_us=now_us)
        else:
            self._store.forget(batch_id)

    def _write(self, write: Write, *, keeps_history: bool) -> None:
        rows = self._rows[write.entity.table]
        if keeps_history:
            past = self._history[write.entity.table]
            with_history = {row_id for row_id, _ in past}
            for row_id in {row_id for row_id, _, _ in write.changes} - with_history:
                if row_id in rows:
                    past[row_id, 0] = rows[row_id]
            past.update({(row_id, no): row for row_id, no, row in write.changes})
        rows.update({row.id: row for row in write.rows})
        for row_id in write.deleted:
            rows.pop(row_id, None)

    def _prune(self, plan: EntityPlan, state: IndexerState, floor_no: int) -> None:
        state.floor_positions = self._positions_at(state, floor_no)
        state.floor_no = floor_no
        log = self._checkpoints[plan.environment, plan.indexer]
        log[:] = [checkpoint for checkpoint in log if checkpoint.no > floor_no]
        for entity in plan.entities:
            if plan.keeps_history(entity):
                past = self._history[entity.table]
                later = {row_id for row_id, no in past if no > floor_no}
                newest: dict[Any, int] = {}
                for row_id, no in past:
                    if no <= floor_no:
                        newest[row_id] = max(no, newest.get(row_id, no))
                for row_id, no in list(past):
                    if no <= floor_no and (no < newest[row_id] or row_id not in later):
                        del past[row_id, no]

    async def rollback(
        self, plan: EntityPlan, token: int, *, old_no: int, source: str, to: Position | None
    ) -> IndexerState:
        """Roll back to the last checkpoint at or before a position."""
        state = self._held(plan, token)
        if state.no != old_no:
            raise StoreBroken(
                f"the indexer {plan.indexer!r} is at checkpoint {state.no}, expected {old_no}", indexer=plan.indexer
            )
        if not plan.history:
            raise HistoryGone(
                "a rollback needs the history, and this indexer keeps none",
                hint="give the indexer history=…",
                indexer=plan.indexer,
            )
        oldest, last = state.floor_positions.get(source), state.positions.get(source)
        if to is not None and last is not None and type(to) is not type(last):
            raise Conflict(f"expected a position of {source} like {last!r}, got {to!r}", indexer=plan.indexer)
        if oldest is not None and (to is None or is_after(oldest, to)):
            raise HistoryGone(
                f"can't roll back to {to!r}: the history of {source} begins at {oldest!r}", indexer=plan.indexer
            )
        log = self._checkpoints[plan.environment, plan.indexer]
        after = [
            checkpoint.no
            for checkpoint in log
            if checkpoint.source == source and (to is None or is_after(checkpoint.position, to))
        ]
        no = min(after) - 1 if after else state.no
        state.positions = self._positions_at(state, no)
        state.no, state.is_caught_up = no, False
        log[:] = [checkpoint for checkpoint in log if checkpoint.no <= no]
        for entity in plan.entities:
            if plan.keeps_history(entity):
                self._restore(entity, no)
        return msgspec.structs.replace(state)

    def _restore(self, entity: EntityType, no: int) -> None:
        rows, past = self._rows[entity.table], self._history[entity.table]
        for row_id in {row_id for row_id, at in past if at > no}:
            before = max((at for changed_id, at in past if changed_id == row_id and at <= no), default=None)
            row = None if before is None else past[row_id, before]
            rows.pop(row_id, None)
            if row is not None:
                rows[row_id] = row
        for key in [key for key in past if key[1] > no]:
            del past[key]

    def _positions_at(self, state: IndexerState, no: int) -> dict[str, Position]:
        if no == state.no:
            return state.positions
        positions = dict(state.floor_positions)
        for checkpoint in self._checkpoints[state.environment, state.name]:
            if checkpoint.no <= no:
                positions[checkpoint.source] = checkpoint.position
        return positions

    async def load(self, entity: EntityType, ids: Sequence[Any]) -> list[Any]:
        """Return the rows with these ids."""
        rows = self._rows[entity.table]
        return [rows[row_id] for row_id in ids if row_id in rows]

    async def find(self, entity: EntityType, conditions: Sequence[Condition]) -> list[Any]:
        """Return at least the rows that fulfil the conditions, by id."""
        return [row for row in self.rows(entity) if all_hold(conditions, row)]

    def rows(self, entity: EntityType) -> list[Any]:
        """Return all rows, by id."""
        return [row for _, row in sorted(self._rows[entity.table].items())]

    async def history(self, entity: EntityType) -> list[tuple[Any, int, Any]]:
        """Return all rows of the history."""
        past = self._history[entity.table]
        return [(row_id, no, past[row_id, no]) for row_id, no in sorted(past)]

    async def checkpoints(self, environment: str, name: str) -> list[tuple[int, str, Position]]:
        """Return the events that are kept."""
        return [
            (checkpoint.no, checkpoint.source, checkpoint.position)
            for checkpoint in self._checkpoints[environment, name]
        ]

    async def build_index(self, entity: EntityType, field: str) -> None:
        """Do nothing: reads of dicts use no index."""

    async def reset(self, environment: str, name: str) -> list[str]:
        """Drop all tables of an indexer, and return their names."""
        self._find(environment, name)
        tables = {
            table: kept for table, kept in self._kept.items() if (kept.environment, kept.indexer) == (environment, name)
        }
        for table in tables:
            del self._kept[table], self._rows[table]
            self._history.pop(table, None)
        del self._states[environment, name], self._checkpoints[environment, name]
        return tables_of(tables)

    def _find(self, environment: str, name: str) -> IndexerState:
        state = self._states.get((environment, name))
        if state is None:
            raise NotFound(f"no indexer is called {name!r}", environment=environment)
        return state

    def _held(self, plan: EntityPlan, token: int) -> IndexerState:
        state = self._find(plan.environment, plan.indexer)
        if state.token != token:
            raise LeaseLost(
                f"the lease of the indexer {plan.indexer!r} was lost to {state.holder}", indexer=plan.indexer
            )
        return state
