"""An indexer's own rows, for both databases: its state, its lease, the guard of its commits, and the runs it enqueues.

The user's tables are written beside these scripts, in the same transaction (see `headrace.store.entities`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from headrace.core.block import Chunk
from headrace.core.entity import EntityType
from headrace.core.sequencer import Position, is_after
from headrace.foundation.errors import Conflict, NotFound, StoreBroken
from headrace.store.entities.protocol import Commit, EntityPlan, HistoryGone, IndexerState, LeaseLost
from headrace.store.entities.schema import StoredTable, form_of
from headrace.store.protocol import NewBatch
from headrace.store.transactions import append
from headrace.store.transactions.row_mapping import as_json
from headrace.store.transactions.sql_script import Script, fetch, fetch_column, fetch_first, fetch_one

LOG_ROWS: Final = 5_000
"""Checkpoints that one statement inserts."""

_decode: Final = msgspec.json.decode


def find(environment: str, name: str) -> Script[IndexerState]:
    """Return the state of an indexer. Raises `NotFound`."""
    row = yield from fetch_one("indexer", environment=environment, name=name)
    if row is None:
        raise NotFound(
            f"no indexer is called {name!r}", hint="`headrace index status` lists the indexers", environment=environment
        )
    return _state_of(row)


def find_or_create(environment: str, name: str) -> Script[IndexerState]:
    """Return the state of an indexer, created before its first event if it is new."""
    yield from fetch("insert_indexer", environment=environment, name=name)
    return (yield from find(environment, name))


def indexer_states(environment: str) -> Script[list[IndexerState]]:
    """List the indexers of an environment."""
    return [_state_of(row) for row in (yield from fetch("indexers", environment=environment))]


class IndexerRow(NamedTuple):
    """A row of the fragment `indexer_columns`. `positions` and `floor_positions` are JSON objects, by source."""

    environment: str
    name: str
    no: int
    positions: str
    token: int
    beats: int
    holder: str
    floor_no: int
    floor_positions: str
    is_caught_up: int
    moved_us: int


def _state_of(columns: Sequence[Any]) -> IndexerState:
    row = IndexerRow._make(columns)
    return IndexerState(
        environment=row.environment,
        name=row.name,
        no=row.no,
        positions=_decode(row.positions),
        token=row.token,
        beats=row.beats,
        holder=row.holder,
        floor_no=row.floor_no,
        floor_positions=_decode(row.floor_positions),
        is_caught_up=bool(row.is_caught_up),
        moved_us=row.moved_us,
    )


def stored_tables() -> Script[dict[str, StoredTable]]:
    """Return every table that an indexer created, by name."""
    rows = yield from fetch("indexer_tables")
    return {
        name: StoredTable(environment, indexer, _decode(columns), bool(has_history))
        for name, environment, indexer, columns, has_history in rows
    }


def store_table(plan: EntityPlan, entity: EntityType) -> Script[None]:
    """Store for which entity a table was created."""
    yield from fetch(
        "put_indexer_table",
        name=entity.table,
        environment=plan.environment,
        indexer=plan.indexer,
        columns=form_of(entity),
        has_history=plan.keeps_history(entity),
    )


def start_history(plan: EntityPlan, state: IndexerState) -> Script[None]:
    """Begin the history here: a rollback can't go back further."""
    yield from fetch("delete_checkpoints", environment=plan.environment, indexer=plan.indexer, from_no=-1, to_no=2**62)
    yield from fetch(
        "move_floor",
        environment=plan.environment,
        name=plan.indexer,
        floor_no=state.no,
        floor_positions=as_json(state.positions),
    )


def take(seen: IndexerState, holder: str) -> Script[int | None]:
    """Lease an indexer, unless it was leased or renewed since it was seen."""
    tokens = yield from fetch_column(
        "take_indexer",
        environment=seen.environment,
        name=seen.name,
        token=seen.token,
        beats=seen.beats,
        holder=holder,
    )
    return int(tokens[0]) if tokens else None


def beat(environment: str, name: str, token: int) -> Script[bool]:
    """Renew the holder's lease."""
    return bool((yield from fetch("beat_indexer", environment=environment, name=name, token=token)))


def leave(environment: str, name: str, token: int) -> Script[None]:
    """Release the holder's lease."""
    yield from fetch("leave_indexer", environment=environment, name=name, token=token)


def move(commit: Commit, now_us: int) -> Script[bool]:
    """Advance the checkpoint, as the guard of a commit. Returns False if this commit is durable already. Raises
    `LeaseLost`.
    """
    plan = commit.plan
    moved = yield from fetch(
        "move_checkpoint",
        environment=plan.environment,
        name=plan.indexer,
        token=commit.token,
        old_no=commit.old_no,
        no=commit.no,
        positions=as_json(commit.positions),
        is_caught_up=commit.is_caught_up,
        now_us=now_us,
    )
    if moved:
        return True
    state = yield from find(plan.environment, plan.indexer)
    _check_token(state, commit.token)
    if (state.no, state.positions) == (commit.no, commit.positions):
        return False
    raise StoreBroken(
        f"the indexer {plan.indexer!r} is at checkpoint {state.no}, expected {commit.old_no}",
        hint="its row was changed by something else than an indexer",
        indexer=plan.indexer,
    )


def _check_token(state: IndexerState, token: int) -> None:
    if state.token != token:
        raise LeaseLost(
            f"the lease of the indexer {state.name!r} was lost to {state.holder or 'another process'}",
            hint="run one process for each indexer; the other process repeats what this one had not committed",
            indexer=state.name,
        )


def note(commit: Commit) -> Script[None]:
    """Write the checkpoints of a commit."""
    plan = commit.plan
    for start in range(0, len(commit.checkpoints), LOG_ROWS):
        rows = [
            (no, source, *_columns_of(position))
            for no, source, position in commit.checkpoints[start : start + LOG_ROWS]
        ]
        yield from fetch("insert_checkpoints", environment=plan.environment, indexer=plan.indexer, rows=as_json(rows))


def enqueue(plan: EntityPlan, batch_id: str, chunks: Sequence[Chunk], runs_max: int, now_us: int) -> Script[None]:
    """Enqueue runs as one complete batch: created, filled and sealed in this transaction.

    A run whose key (position and ordinal) exists was enqueued before a rewind, and is that run. If all runs exist, no
    batch is created.
    """
    new = NewBatch(id=batch_id, environment=plan.environment, kind="stream", metadata={"indexer": plan.indexer})
    yield from append.create(new, now_us)
    appended = yield from append.append(batch_id, chunks, None, runs_max, now_us)
    if appended.accepted_count:
        yield from append.seal(batch_id, None, now_us)
    else:
        yield from fetch("delete_batches", ids=as_json([batch_id]))


def move_floor(commit: Commit, floor_no: int) -> Script[None]:
    """Delete what is stored about checkpoints before this one."""
    plan = commit.plan
    state = yield from find(plan.environment, plan.indexer)
    positions = yield from _positions_at(state, floor_no)
    yield from fetch(
        "move_floor",
        environment=plan.environment,
        name=plan.indexer,
        floor_no=floor_no,
        floor_positions=as_json(positions),
    )
    yield from fetch(
        "delete_checkpoints", environment=plan.environment, indexer=plan.indexer, from_no=0, to_no=floor_no
    )


def roll_back(plan: EntityPlan, token: int, old_no: int, source: str, to: Position | None) -> Script[IndexerState]:
    """Set the state back to the last event at or before a position; the caller restores the tables."""
    if not plan.history:
        raise HistoryGone(
            "a rollback needs the history, and this indexer keeps none",
            hint="give the indexer history=…; `headrace index reset` starts it from the beginning",
            indexer=plan.indexer,
        )
    state = yield from find(plan.environment, plan.indexer)
    _check_token(state, token)
    if state.no != old_no:
        raise StoreBroken(
            f"the indexer {plan.indexer!r} is at checkpoint {state.no}, expected {old_no}", indexer=plan.indexer
        )
    no = yield from _no_at(state, source, to)
    positions = yield from _positions_at(state, no)
    yield from fetch(
        "move_checkpoint",
        environment=plan.environment,
        name=plan.indexer,
        token=token,
        old_no=old_no,
        no=no,
        positions=as_json(positions),
        is_caught_up=False,
        now_us=state.moved_us,
    )
    yield from fetch("delete_checkpoints", environment=plan.environment, indexer=plan.indexer, from_no=no, to_no=2**62)
    return (yield from find(plan.environment, plan.indexer))


def _no_at(state: IndexerState, source: str, to: Position | None) -> Script[int]:
    """Return the checkpoint before the first event of `source` after `to`; that event and all later ones are taken
    back.
    """
    number, text = _columns_of(to) if to is not None else (-(2**63), "")
    (first_no,) = yield from fetch_first(
        "first_checkpoint_after",
        environment=state.environment,
        indexer=state.name,
        source=source,
        number=number,
        text=text,
    )
    last = state.positions.get(source)
    if to is not None and last is not None and type(to) is not type(last):
        raise Conflict(f"expected a position of {source} like {last!r}, got {to!r}", indexer=state.name)
    oldest = state.floor_positions.get(source)
    if oldest is not None and (to is None or is_after(oldest, to)):
        where = "before the first event" if to is None else f"to {to!r}"
        raise HistoryGone(
            f"can't roll back {where}: the history of {source} begins at {oldest!r}",
            hint="keep a longer history=…; `headrace index reset` starts the indexer from the beginning",
            indexer=state.name,
            source=source,
        )
    return state.no if first_no is None else int(first_no) - 1


def _positions_at(state: IndexerState, no: int) -> Script[dict[str, Position]]:
    """Return the position of each source at a checkpoint."""
    if no == state.no:
        return state.positions
    rows = yield from fetch("last_checkpoints", environment=state.environment, indexer=state.name, no=no)
    positions = dict(state.floor_positions)
    positions.update({source: _position(number, text) for source, number, text in rows})
    return positions


def checkpoints(environment: str, name: str) -> Script[list[tuple[int, str, Position]]]:
    """Return the events that are kept."""
    rows = yield from fetch("checkpoints", environment=environment, indexer=name)
    return [(no, source, _position(number, text)) for no, source, number, text in rows]


def forget(environment: str, name: str) -> Script[dict[str, StoredTable]]:
    """Delete the state of an indexer, and return its tables, which are to be dropped."""
    yield from find(environment, name)
    tables = {
        table: kept
        for table, kept in (yield from stored_tables()).items()
        if (kept.environment, kept.indexer) == (environment, name)
    }
    yield from fetch("delete_checkpoints", environment=environment, indexer=name, from_no=-1, to_no=2**62)
    yield from fetch("delete_indexer_tables", environment=environment, indexer=name)
    yield from fetch("delete_indexer", environment=environment, name=name)
    return tables


def _columns_of(position: Position) -> tuple[int, str]:
    """Split a position into two columns that sort as it does."""
    return (position, "") if isinstance(position, int) else (0, position)


def _position(number: int, text: str) -> Position:
    return text or int(number)
