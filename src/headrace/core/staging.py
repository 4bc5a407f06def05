"""The staged entity store: rows as the handlers see them, while their writes are on the way into SQL.

    table.write / delete … -> cut() -> (the committer) -> committed()

Rule 1: memory takes precedence. A row in memory, present or known to be absent, is the newest version. A SELECT returns
an older one, whether the commit in flight was written or not. Every uncommitted change is therefore in memory, and only
committed rows may be evicted. Rule 2: a row may be evicted only after every read that began before its commit has
ended, because the SELECT of that read may not have seen the row. During a read nothing is evicted. Rule 3: the writes
of one batch are one dict per table, with the last change of each row. The committer merges several with `update`.
Superseded changes are kept only for history.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias

from headrace.core.condition import Condition, Range, all_hold
from headrace.core.entity import Entity, EntityType
from headrace.foundation.errors import InvalidInput

MISSING: Final = object()
"""Marks an unknown row; None means that the row is known to be absent."""
STEP_ROWS: Final = 4_096
"""Rows checked between two checks of whether enough were evicted."""

Rows: TypeAlias = dict[Any, Any]


class Index:
    """An index over one field of the rows in memory. `complete`: the values whose rows are all in memory."""

    __slots__ = ("_ordered", "by_value", "complete", "field")

    def __init__(self, field: str, rows: Rows) -> None:
        self.field = field
        self.by_value: dict[Any, dict[Any, None]] = {}
        self.complete: set[Any] = set()
        self._ordered: list[Any] | None = None
        for row_id, row in rows.items():
            if row is not None:
                self._add(row_id, getattr(row, field))

    def move(self, row_id: Any, old: Any, new: Any) -> None:
        """Note that a row replaced another one; either may be None."""
        before = MISSING if old is None else getattr(old, self.field)
        after = MISSING if new is None else getattr(new, self.field)
        if before is after or (before == after and old is not None and new is not None):
            return
        if old is not None:
            self._remove(row_id, before)
        if new is not None:
            self._add(row_id, after)

    def forget(self, row_id: Any, row: Any) -> None:
        """Note that a row was evicted: the rows of its value are not complete any more."""
        value = getattr(row, self.field)
        self._remove(row_id, value)
        self.complete.discard(value)

    def ids(self, condition: Condition) -> Iterator[Any]:
        """Yield the ids of rows in memory that match a condition on this field."""
        values = self._values_in(condition.range) if condition.range is not None else condition.values or ()
        for value in values:
            yield from self.by_value.get(value, ())

    def _add(self, row_id: Any, value: Any) -> None:
        ids = self.by_value.get(value)
        if ids is None:
            self.by_value[value] = {row_id: None}
            if self._ordered is not None and value is not None:
                insort(self._ordered, value)
        else:
            ids[row_id] = None

    def _remove(self, row_id: Any, value: Any) -> None:
        ids = self.by_value[value]
        del ids[row_id]
        if not ids:
            del self.by_value[value]
            if self._ordered is not None and value is not None:
                del self._ordered[bisect_left(self._ordered, value)]

    def _values_in(self, value_range: Range) -> Sequence[Any]:
        if self._ordered is None:
            self._ordered = sorted(value for value in self.by_value if value is not None)
        first, end = 0, len(self._ordered)
        if value_range.least is not None:
            first = (bisect_right if value_range.is_above_least else bisect_left)(self._ordered, value_range.least)
        if value_range.most is not None:
            end = (bisect_left if value_range.is_below_most else bisect_right)(self._ordered, value_range.most)
        return self._ordered[first:end]


class StagedTable:
    """The rows of one entity type in memory. `rows` has the newest version of each, None if it is known to be absent.

    `is_read`: rows of this type have been requested. Rows of a type that is only written are not in `rows` but only
    among the changes, and none is kept after its commit.
    """

    __slots__ = (
        "changes", "delta", "entity", "extra", "extra_bytes", "indexes", "is_plain", "is_read", "is_usual",
        "keeps_history", "pending", "rows",
    )  # fmt: skip

    def __init__(self, entity: EntityType, *, keeps_history: bool) -> None:
        self.entity = entity
        self.is_usual = entity.is_usual
        self.keeps_history = keeps_history
        self.is_plain = not keeps_history
        """True if a written row is known only to two dicts; see `write`."""
        self.rows: Rows = {}
        self.delta: Rows = {}
        self.changes: dict[tuple[Any, int], Any] = {}
        self.pending: deque[Rows] = deque()
        self.indexes: dict[str, Index] = {}
        self.extra: dict[Any, int] = {}
        self.extra_bytes = 0
        self.is_read = False

    @property
    def bytes(self) -> int:
        """Approximate bytes in memory, with staged changes counted again."""
        entries = len(self.rows) + len(self.delta) + 2 * len(self.changes) + sum(map(len, self.pending))
        return entries * self.entity.row_bytes + 2 * self.extra_bytes

    def write(self, row: Any, no: int) -> None:
        """Stage a row written by the event of checkpoint `no`. Raises `InvalidInput` for a row that can't be stored."""
        if self.is_plain and self.is_usual(row):
            row_id = row.id
            self.delta[row_id] = row
            if self.is_read:
                self.rows[row_id] = row
            return
        row, extra = self.entity.checked(row)
        self._change(row.id, row, extra, no)

    def delete(self, row_id: Any, no: int) -> None:
        """Stage the deletion of a row by the event of checkpoint `no`, whether the row exists or not."""
        self._change(self.entity.checked_id(row_id), None, 0, no)

    def _change(self, row_id: Any, row: Any, extra: int, no: int) -> None:
        if self.is_read:
            self.put(row_id, row, extra)
        elif extra or self.extra:
            self._weigh(row_id, extra)
        self.delta[row_id] = row
        if self.keeps_history:
            self.changes[row_id, no] = row

    def begin_reading(self) -> None:
        """Start to keep rows for reads: uncommitted writes are their newest versions."""
        self.is_read = True
        for delta in (*self.pending, self.delta):
            self.rows.update(delta)

    def put(self, row_id: Any, row: Any, extra: int) -> None:
        """Store a row as the newest version."""
        rows = self.rows
        if self.indexes:
            old = rows.get(row_id)
            for index in self.indexes.values():
                index.move(row_id, old, row)
        rows[row_id] = row
        if extra or self.extra:
            self._weigh(row_id, extra)

    def index(self, field: str) -> Index:
        """Return the index over a field; created at its first use."""
        index = self.indexes.get(field)
        if index is None:
            if not self.is_read:
                self.begin_reading()
            self.is_plain = False
            index = self.indexes[field] = Index(field, self.rows)
        return index

    def clean(self, row_ids: Iterable[Any]) -> set[Any]:
        """Return the ids whose every change is committed."""
        return set(row_ids).difference(self.delta, *self.pending)

    def committed(self, batches_count: int) -> None:
        """Note that the oldest cut batches are durable; rows of a type that is not read are dropped."""
        committed = [self.pending.popleft() for _ in range(batches_count)]
        if self.extra and not self.is_read:
            for row_id in self.clean(row_id for delta in committed for row_id in delta):
                self._weigh(row_id, 0)

    def drop(self, row_ids: Iterable[Any]) -> None:
        """Evict rows."""
        if not self.extra and not self.indexes:
            rows = self.rows
            for row_id in row_ids:
                del rows[row_id]
            return
        for row_id in row_ids:
            row = self.rows.pop(row_id)
            if self.extra:
                self._weigh(row_id, 0)
            if row is not None:
                for index in self.indexes.values():
                    index.forget(row_id, row)

    def _weigh(self, row_id: Any, extra: int) -> None:
        self.extra_bytes += extra - self.extra.pop(row_id, 0)
        if extra:
            self.is_plain = False
            self.extra[row_id] = extra


class Staged(NamedTuple):
    """The writes of some consecutive events: `deltas` and `changes` by table, in the order of the types.

    `changes` are the rows of history, `(id, checkpoint) -> row or None`; empty without history.
    """

    deltas: list[Rows]
    changes: list[dict[tuple[Any, int], Any]]

    @property
    def rows_count(self) -> int:
        """Number of rows that a commit of this writes."""
        return sum(map(len, self.deltas)) + sum(map(len, self.changes))


def merged(parts: Sequence[Staged]) -> Staged:
    """Merge consecutive batches: the last change of each row, and all changes of history."""
    if len(parts) == 1:
        return parts[0]
    deltas: list[Rows] = [{} for _ in parts[0].deltas]
    changes: list[dict[tuple[Any, int], Any]] = [{} for _ in parts[0].changes]
    for part in parts:
        for delta_of_table, delta in zip(deltas, part.deltas, strict=True):
            delta_of_table.update(delta)
        for changes_of_table, changed in zip(changes, part.changes, strict=True):
            changes_of_table.update(changed)
    return Staged(deltas, changes)


class Staging:
    """All tables of one indexer. Owned by one event loop."""

    def __init__(self, entities: Sequence[EntityType], *, keeps_history: Collection[str] = ()) -> None:
        """`keeps_history`: names of the tables with history."""
        self.tables = [StagedTable(entity, keeps_history=entity.table in keeps_history) for entity in entities]
        self.by_class: dict[type[Entity], StagedTable] = {table.entity.cls: table for table in self.tables}
        self._reads_count = 0
        self._hand = 0

    @property
    def bytes(self) -> int:
        """Approximate memory of all tables."""
        return sum(table.bytes for table in self.tables)

    @property
    def pending_count(self) -> int:
        """Number of batches that were cut and are not committed."""
        return len(self.tables[0].pending) if self.tables else 0

    # -- rows from the store

    def begin_read(self) -> None:
        """Begin a SELECT; until `end_read` nothing is evicted (rule 2)."""
        self._reads_count += 1

    def end_read(self) -> None:
        """End a SELECT and the use of its rows."""
        self._reads_count -= 1

    def adopt(self, table: StagedTable, row_id: Any, row: Any) -> Any:
        """Take over a row from a SELECT; return its newest version (rule 1)."""
        if not table.is_read:
            table.begin_reading()
        newest = table.rows.get(row_id, MISSING)
        if newest is not MISSING:
            return newest
        table.put(row_id, row, 0 if row is None else table.entity.extra_bytes(row))
        return row

    def merged(self, table: StagedTable, conditions: Sequence[Condition], rows: Iterable[Any]) -> list[Any]:
        """Return the rows that match the conditions, by id: those of a SELECT in their newest version, and those only
        in memory.
        """
        first = conditions[0]
        index = table.index(first.field)
        for row in rows:
            self.adopt(table, row.id, row)
        if len(conditions) == 1 and first.values is not None:
            index.complete.update(first.values)
        return self.staged(table, conditions)

    def staged(self, table: StagedTable, conditions: Sequence[Condition]) -> list[Any]:
        """Return the rows in memory that match the conditions, by id."""
        rows = table.rows
        first, rest = conditions[0], conditions[1:]
        ids = sorted(table.index(first.field).ids(first))
        matching = [rows[row_id] for row_id in ids]
        return [row for row in matching if all_hold(rest, row)] if rest else matching

    # -- batches

    def cut(self) -> Staged:
        """Close the batch and return its writes, for the committer."""
        staged = Staged([table.delta for table in self.tables], [table.changes for table in self.tables])
        for table in self.tables:
            table.pending.append(table.delta)
            table.delta, table.changes = {}, {}
        return staged

    def committed(self, batches_count: int) -> None:
        """Note that the oldest cut batches are durable."""
        for table in self.tables:
            table.committed(batches_count)

    def evict(self, bytes_max: int) -> bool:
        """Evict committed rows, oldest first, until at most `bytes_max` are held; False if that is not possible."""
        if self._reads_count:
            return self.bytes <= bytes_max
        for _ in range(len(self.tables)):
            table = self.tables[self._hand % len(self.tables)]
            while self.bytes > bytes_max:
                if not self._evict_some(table):
                    break
            else:
                return True
            self._hand += 1
        return self.bytes <= bytes_max

    def _evict_some(self, table: StagedTable) -> bool:
        """Evict one step; False if this table has no row to evict."""
        for start in range(0, len(table.rows), STEP_ROWS):
            clean = table.clean(islice(table.rows, start, start + STEP_ROWS))
            if clean:
                table.drop(clean)
                return True
        return False

    def clear(self) -> None:
        """Forget everything: the database was rolled back."""
        for table in self.tables:
            table.rows.clear()
            table.delta, table.changes = {}, {}
            table.pending.clear()
            table.indexes.clear()
            table.extra.clear()
            table.extra_bytes = 0


def table_of(tables: dict[type[Entity], StagedTable], kind: Any) -> StagedTable:
    """Return the table of a class. Raises `InvalidInput`."""
    table = tables.get(kind)
    if table is None:
        names = ", ".join(sorted(cls.__name__ for cls in tables))
        name = getattr(kind, "__name__", repr(kind))
        raise InvalidInput(f"{name} is not an entity of this indexer", hint=f"its entities are: {names}")
    return table
