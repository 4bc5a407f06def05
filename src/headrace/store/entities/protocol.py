"""The interface between an indexer and the database that holds its tables.

Every operation that changes something is one transaction. `commit` and `rollback` name the checkpoint they start from,
and the token of their lease. If the indexer's row has other values, nothing changes: neither a late process nor a
repeat after a lost answer can do anything twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from headrace.core.block import Chunk
from headrace.core.condition import Condition
from headrace.core.entity import EntityType
from headrace.core.sequencer import Position
from headrace.foundation.errors import Conflict, EngineFault


class LeaseLost(EngineFault):
    """Another process has leased the indexer; what this one had not committed is dropped."""

    code = "LEASE_LOST"
    status = 409
    retryable = False


class SchemaChanged(Conflict):
    """The entities do not fit the existing tables; nothing was changed."""

    code = "SCHEMA_CHANGED"


class HistoryGone(Conflict):
    """The history does not go back far enough for this rollback; nothing was changed."""

    code = "HISTORY_GONE"


class EntityPlan(NamedTuple):
    """The tables of an indexer. `history`: every change is kept, so that a rollback can take it back."""

    environment: str
    indexer: str
    entities: Sequence[EntityType]
    history: bool
    defer_indexes: bool = False

    def keeps_history(self, entity: EntityType) -> bool:
        """True if changes of an entity can be taken back. Cached results of effects stay valid after a rollback."""
        return self.history and not entity.table.endswith(EFFECT_SUFFIX)


EFFECT_SUFFIX = "_effect"


class IndexerState(msgspec.Struct, kw_only=True):
    """The state of an indexer. `no` counts its events since the beginning; its tables contain exactly these events.

    `positions`: the last event of each source. `floor_no`: the oldest checkpoint that a rollback can reach. `token`:
    the fencing token of the holder's lease; `beats` grows as long as the holder renews it.
    """

    environment: str
    name: str
    no: int = 0
    positions: dict[str, Position] = {}
    token: int = 0
    beats: int = 0
    holder: str = ""
    floor_no: int = 0
    floor_positions: dict[str, Position] = {}
    is_caught_up: bool = False
    moved_us: int = 0


class Write(NamedTuple):
    """The changes of a commit to one table: rows to upsert, ids to delete, and rows of history `(id, checkpoint,
    row)`.
    """

    entity: EntityType
    rows: Sequence[Any]
    deleted: Sequence[Any]
    changes: Sequence[tuple[Any, int, Any]]


class Enqueued(NamedTuple):
    """Runs that handlers enqueued, as one complete batch that is created, filled and sealed by the commit."""

    batch_id: str
    chunks: Sequence[Chunk]


class Commit(NamedTuple):
    """A commit from checkpoint `old_no` to `no`. `checkpoints`: `(no, source, position)` of each event, if a history is
    kept.
    """

    plan: EntityPlan
    token: int
    old_no: int
    no: int
    positions: dict[str, Position]
    writes: Sequence[Write]
    checkpoints: Sequence[tuple[int, str, Position]] = ()
    enqueued: Enqueued | None = None
    floor_no: int | None = None
    is_caught_up: bool = False


class EntityStore(Protocol):
    """The tables of indexers. `works_beside`: operations may be called from several threads, each with its own event
    loop.
    """

    works_beside: bool

    async def prepare(self, plan: EntityPlan) -> IndexerState:
        """Create or extend the tables, and return the indexer's state. Raises `SchemaChanged`, changing nothing."""

    async def indexer_states(self, environment: str) -> list[IndexerState]:
        """List the indexers of an environment, by name."""

    async def take(self, seen: IndexerState, holder: str) -> int | None:
        """Lease an indexer as it was `seen`, from any holder. Returns the token, or None if it has changed
        since.
        """

    async def beat(self, environment: str, name: str, token: int) -> bool:
        """Renew the lease. Returns False if another process has it now."""

    async def leave(self, environment: str, name: str, token: int) -> None:
        """Release the lease."""

    async def commit(self, commit: Commit, *, now_us: int) -> None:
        """Make a commit durable. A repeat of the last commit does nothing. Raises `LeaseLost`."""

    async def rollback(
        self, plan: EntityPlan, token: int, *, old_no: int, source: str, to: Position | None
    ) -> IndexerState:
        """Roll back to the last checkpoint at or before a position of a source; None is before the first event.

        Raises `HistoryGone` if the history does not go back far enough, `LeaseLost` if another process has the lease.
        """

    async def load(self, entity: EntityType, ids: Sequence[Any]) -> list[Any]:
        """Return the rows with these ids, those that exist, in any order."""

    async def find(self, entity: EntityType, conditions: Sequence[Condition]) -> list[Any]:
        """Return at least the rows that fulfil the conditions (all rows for none), by id; the caller checks them
        again.
        """

    async def history(self, entity: EntityType) -> list[tuple[Any, int, Any]]:
        """Return all rows of the history `(id, checkpoint, row)`, in that order; the row is None for a deletion."""

    async def checkpoints(self, environment: str, name: str) -> list[tuple[int, str, Position]]:
        """Return `(no, source, position)` of the events that are kept."""

    async def build_index(self, entity: EntityType, field: str) -> None:
        """Create the index over a field, unless it exists."""

    async def reset(self, environment: str, name: str) -> list[str]:
        """Drop all tables of an indexer and delete its state. Returns the names of the tables."""

    async def close(self) -> None:
        """Close the connections. A second close does nothing."""
