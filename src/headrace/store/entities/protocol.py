"""The seam between an indexer and the database that keeps its tables.

Every changing verb is one transaction. `commit` and `rollback` name the checkpoint they start from and the token of
the lease they work under: when the row says otherwise nothing happens, so neither a late process nor a repeat after
a lost answer can do anything twice.
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
    """Another process works on this indexer now; what this one had not committed is dropped."""

    code = "LEASE_LOST"
    status = 409
    retryable = False


class SchemaChanged(Conflict):
    """The entities are not what the tables were made for; nothing was changed."""

    code = "SCHEMA_CHANGED"


class HistoryGone(Conflict):
    """Nothing is kept of what that rollback would need; nothing was changed."""

    code = "HISTORY_GONE"


class EntityPlan(NamedTuple):
    """What an indexer keeps. `history`: every change is kept, so that it can be taken back."""

    environment: str
    indexer: str
    entities: Sequence[EntityType]
    history: bool
    defer_indexes: bool = False

    def keeps_history(self, entity: EntityType) -> bool:
        """Whether changes of a type can be taken back; what an effect answered stays true."""
        return self.history and not entity.table.endswith(EFFECT_SUFFIX)


EFFECT_SUFFIX = "_effect"


class IndexerState(msgspec.Struct, kw_only=True):
    """An indexer's row. `no` counts its events since the beginning; the tables are what they made them.

    `positions` are of each source's last event. `floor_no` is the oldest checkpoint that can be gone back to.
    `token` fences its holder; `beats` grows while the holder lives.
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
    """What a commit does to one table: rows to put, ids to delete, and rows of history `(id, checkpoint, row)`."""

    entity: EntityType
    rows: Sequence[Any]
    deleted: Sequence[Any]
    changes: Sequence[tuple[Any, int, Any]]


class Enqueued(NamedTuple):
    """Runs that handlers asked for, as one batch that is whole: created, filled and sealed with the commit."""

    batch_id: str
    chunks: Sequence[Chunk]


class Commit(NamedTuple):
    """From checkpoint `old_no` to `no`. `checkpoints` are `(no, source, position)` of each event, where history is."""

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
    """The tables of indexers. `works_beside`: its verbs may be called from several threads, each with its loop."""

    works_beside: bool

    async def prepare(self, plan: EntityPlan) -> IndexerState:
        """Make or extend the tables and answer where the indexer stands. Raises `SchemaChanged`, changing nothing."""

    async def standings(self, environment: str) -> list[IndexerState]:
        """Every indexer of an environment, by name."""

    async def take(self, seen: IndexerState, holder: str) -> int | None:
        """Lease an indexer as it was `seen`, whoever held it; answers the token, None when it has moved since."""

    async def beat(self, environment: str, name: str, token: int) -> bool:
        """A sign of life; False when another holds it now."""

    async def leave(self, environment: str, name: str, token: int) -> None:
        """Give the lease back."""

    async def commit(self, commit: Commit, *, now_us: int) -> None:
        """Make a commit durable. A repeat of the one that landed last does nothing. Raises `LeaseLost`."""

    async def rollback(
        self, plan: EntityPlan, token: int, *, old_no: int, source: str, to: Position | None
    ) -> IndexerState:
        """Go back to the last checkpoint at or before a position of a source, None to before the first event.

        Raises `HistoryGone` where nothing is kept of it, `LeaseLost` when another process holds the indexer.
        """

    async def load(self, entity: EntityType, ids: Sequence[Any]) -> list[Any]:
        """The rows of these ids, those that exist, in any order."""

    async def find(self, entity: EntityType, conditions: Sequence[Condition]) -> list[Any]:
        """At least the rows that fulfil the conditions (all rows for none), by id; the caller looks at them again."""

    async def history(self, entity: EntityType) -> list[tuple[Any, int, Any]]:
        """All rows of history `(id, checkpoint, row)`, in that order; the row is None for a deletion."""

    async def checkpoints(self, environment: str, name: str) -> list[tuple[int, str, Position]]:
        """`(no, source, position)` of the events that are kept."""

    async def build_index(self, entity: EntityType, field: str) -> None:
        """Make the index over a field now, if it is not there."""

    async def reset(self, environment: str, name: str) -> list[str]:
        """Drop all tables of an indexer and forget it; answers their names."""

    async def close(self) -> None:
        """Let go of the connections; a second close does nothing."""
