"""What an indexer's commit shares with every database: its row, its lease, its guard, and the runs it enqueues.

The user's own tables are written beside these scripts, in the same transaction (see `headrace.store.entities`).
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
"""Checkpoints in one statement."""

_decode: Final = msgspec.json.decode


def find(environment: str, name: str) -> Script[IndexerState]:
    """An indexer's row. Raises `NotFound`."""
    row = yield from fetch_one("indexer", environment=environment, name=name)
    if row is None:
        raise NotFound(
            f"there is no indexer {name!r}", hint="`headrace index status` lists them", environment=environment
        )
    return _standing(row)


def found_or_made(environment: str, name: str) -> Script[IndexerState]:
    """An indexer's row; a new one stands before its first event."""
    yield from fetch("insert_indexer", environment=environment, name=name)
    return (yield from find(environment, name))


def standings(environment: str) -> Script[list[IndexerState]]:
    """Every indexer of an environment."""
    return [_standing(row) for row in (yield from fetch("indexers", environment=environment))]


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


def _standing(columns: Sequence[Any]) -> IndexerState:
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


def kept_tables() -> Script[dict[str, StoredTable]]:
    """Every table that an indexer made, by name."""
    rows = yield from fetch("indexer_tables")
    return {
        name: StoredTable(environment, indexer, _decode(columns), bool(has_history))
        for name, environment, indexer, columns, has_history in rows
    }


def keep_table(plan: EntityPlan, entity: EntityType) -> Script[None]:
    """Remember what a table was made for."""
    yield from fetch(
        "put_indexer_table",
        name=entity.table,
        environment=plan.environment,
        indexer=plan.indexer,
        columns=form_of(entity),
        has_history=plan.keeps_history(entity),
    )


def start_history(plan: EntityPlan, standing: IndexerState) -> Script[None]:
    """History begins here: to before this nobody can go back."""
    yield from fetch("delete_checkpoints", environment=plan.environment, indexer=plan.indexer, from_no=-1, to_no=2**62)
    yield from fetch(
        "move_floor",
        environment=plan.environment,
        name=plan.indexer,
        floor_no=standing.no,
        floor_positions=as_json(standing.positions),
    )


def take(seen: IndexerState, holder: str) -> Script[int | None]:
    """Lease an indexer that nobody has moved or renewed since it was seen."""
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
    """A sign of life of the holder."""
    return bool((yield from fetch("beat_indexer", environment=environment, name=name, token=token)))


def leave(environment: str, name: str, token: int) -> Script[None]:
    """The holder goes."""
    yield from fetch("leave_indexer", environment=environment, name=name, token=token)


def move(commit: Commit, now_us: int) -> Script[bool]:
    """The guard of a commit, first of all: False when it has landed already. Raises `LeaseLost`."""
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
    standing = yield from find(plan.environment, plan.indexer)
    _check_token(standing, commit.token)
    if (standing.no, standing.positions) == (commit.no, commit.positions):
        return False
    raise StoreBroken(
        f"the indexer {plan.indexer!r} stands at {standing.no}, where {commit.old_no} was left",
        hint="somebody changed its row by hand",
        indexer=plan.indexer,
    )


def _check_token(standing: IndexerState, token: int) -> None:
    if standing.token != token:
        raise LeaseLost(
            f"the indexer {standing.name!r} is worked on by {standing.holder or 'another process'} now",
            hint="one process an indexer; what this one had not committed is done again there",
            indexer=standing.name,
        )


def note(commit: Commit) -> Script[None]:
    """What else of Headrace's own a commit writes: its checkpoints, and the runs it enqueues."""
    plan = commit.plan
    for start in range(0, len(commit.checkpoints), LOG_ROWS):
        rows = [(no, source, *_columns_of(own)) for no, source, own in commit.checkpoints[start : start + LOG_ROWS]]
        yield from fetch("insert_checkpoints", environment=plan.environment, indexer=plan.indexer, rows=as_json(rows))


def enqueue(plan: EntityPlan, batch_id: str, chunks: Sequence[Chunk], runs_max: int, now_us: int) -> Script[None]:
    """Runs as one whole batch: created, filled and sealed in this transaction.

    A run whose key (position and ordinal) is known was enqueued before a rewind, and is that run. When all are, there
    is no batch: nobody would know what an empty one is for.
    """
    new = NewBatch(id=batch_id, environment=plan.environment, kind="stream", metadata={"indexer": plan.indexer})
    yield from append.create(new, now_us)
    appended = yield from append.append(batch_id, chunks, None, runs_max, now_us)
    if appended.accepted_count:
        yield from append.seal(batch_id, None, now_us)
    else:
        yield from fetch("delete_batch", batch_id=batch_id)


def raise_floor(commit: Commit, floor_no: int) -> Script[None]:
    """Of checkpoints before this one nothing is kept any more."""
    plan = commit.plan
    standing = yield from find(plan.environment, plan.indexer)
    positions = yield from _positions_at(standing, floor_no)
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


def go_back(plan: EntityPlan, token: int, old_no: int, source: str, to: Position | None) -> Script[IndexerState]:
    """Put the row where it stood after the last event at or before a position; the tables follow."""
    if not plan.history:
        raise HistoryGone(
            "nothing is kept of what a rollback would need",
            hint="keep it: history=… of the indexer; `headrace index reset` begins anew",
            indexer=plan.indexer,
        )
    standing = yield from find(plan.environment, plan.indexer)
    _check_token(standing, token)
    if standing.no != old_no:
        raise StoreBroken(f"the indexer stands at {standing.no}, where {old_no} was left", indexer=plan.indexer)
    no = yield from _no_at(standing, source, to)
    positions = yield from _positions_at(standing, no)
    yield from fetch(
        "move_checkpoint",
        environment=plan.environment,
        name=plan.indexer,
        token=token,
        old_no=old_no,
        no=no,
        positions=as_json(positions),
        is_caught_up=False,
        now_us=standing.moved_us,
    )
    yield from fetch("delete_checkpoints", environment=plan.environment, indexer=plan.indexer, from_no=no, to_no=2**62)
    return (yield from find(plan.environment, plan.indexer))


def _no_at(standing: IndexerState, source: str, to: Position | None) -> Script[int]:
    """The checkpoint before the first event of `source` after `to`: that event and all after it must go."""
    number, text = _columns_of(to) if to is not None else (-(2**63), "")
    (first_no,) = yield from fetch_first(
        "first_checkpoint_after",
        environment=standing.environment,
        indexer=standing.name,
        source=source,
        number=number,
        text=text,
    )
    last = standing.positions.get(source)
    if to is not None and last is not None and type(to) is not type(last):
        raise Conflict(f"positions of {source} are like {last!r}, not like {to!r}", indexer=standing.name)
    floor = standing.floor_positions.get(source)
    if floor is not None and (to is None or is_after(floor, to)):
        where = "before the first event" if to is None else f"to {to!r}"
        raise HistoryGone(
            f"can't go back {where}: history is kept back to {floor!r}",
            hint="keep more: history=… of the indexer; `headrace index reset` begins anew",
            indexer=standing.name,
            source=source,
        )
    return standing.no if first_no is None else int(first_no) - 1


def _positions_at(standing: IndexerState, no: int) -> Script[dict[str, Position]]:
    """Where each source stood at a checkpoint."""
    if no == standing.no:
        return standing.positions
    rows = yield from fetch("last_checkpoints", environment=standing.environment, indexer=standing.name, no=no)
    found = dict(standing.floor_positions)
    found.update({source: _position(number, text) for source, number, text in rows})
    return found


def checkpoints(environment: str, name: str) -> Script[list[tuple[int, str, Position]]]:
    """The events that are kept."""
    rows = yield from fetch("checkpoints", environment=environment, indexer=name)
    return [(no, source, _position(number, text)) for no, source, number, text in rows]


def forget(environment: str, name: str) -> Script[dict[str, StoredTable]]:
    """Forget an indexer; answers the tables that are to be dropped."""
    yield from find(environment, name)
    tables = {
        table: kept
        for table, kept in (yield from kept_tables()).items()
        if (kept.environment, kept.indexer) == (environment, name)
    }
    yield from fetch("delete_checkpoints", environment=environment, indexer=name, from_no=-1, to_no=2**62)
    yield from fetch("delete_indexer_tables", environment=environment, indexer=name)
    yield from fetch("delete_indexer", environment=environment, name=name)
    return tables


def _columns_of(position: Position) -> tuple[int, str]:
    """A position as two columns that compare as it does."""
    return (position, "") if isinstance(position, int) else (0, position)


def _position(number: int, text: str) -> Position:
    return text or int(number)
