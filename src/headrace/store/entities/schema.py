"""Changes that make tables fit the entities: none, additions, or an error that names the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from headrace.core.entity import Column, EntityType
from headrace.foundation.errors import Conflict, InvalidSetting
from headrace.store.entities.protocol import EFFECT_SUFFIX, EntityPlan, SchemaChanged
from headrace.store.entities.sql import HISTORY_SUFFIX, RESERVED, RESERVED_COLUMNS, RESERVED_PREFIX


class StoredTable(NamedTuple):
    """A table as the database has it: its owner, and the form of each column."""

    environment: str
    indexer: str
    columns: dict[str, str]
    has_history: bool


class Change(NamedTuple):
    """The changes to one table."""

    entity: EntityType
    creates: bool
    creates_history: bool
    drops_history: bool
    adds: Sequence[Column]

    @property
    def form(self) -> str:
        """The columns of the entity as they are stored."""
        return form_of(self.entity)


def form_of(entity: EntityType) -> str:
    """Encode the columns of an entity as they are stored."""
    return msgspec.json.encode({column.name: column.form for column in entity.columns}).decode()


def check_names(entities: Sequence[EntityType]) -> None:
    """Raise `InvalidSetting` for a name that two tables would share, or that belongs to Headrace."""
    taken: dict[str, str] = {}
    for entity in entities:
        name = entity.cls.__name__
        if entity.table in RESERVED or entity.table.startswith(RESERVED_PREFIX):
            raise InvalidSetting(
                f"the table name {entity.table!r} of {name} belongs to Headrace",
                hint=f'give it another name: class {name}(Entity, table="…")',
            )
        for table in (entity.table, entity.table + HISTORY_SUFFIX):
            if table in taken:
                raise InvalidSetting(
                    f"{name} and {taken[table]} would share the table {table!r}", hint='give one of them table="…"'
                )
            taken[table] = name
        if clash := RESERVED_COLUMNS & set(entity.names):
            raise InvalidSetting(f"{name}.{min(clash)}: the name is reserved for the history", hint="rename the field")


def changes_of(plan: EntityPlan, stored_tables: Mapping[str, StoredTable], existing: set[str]) -> list[Change]:
    """Return the changes that make the tables fit the plan. Raises `SchemaChanged` or `Conflict`, changing nothing.

    `existing`: the names of all tables, of any owner.
    """
    return [_change(plan, entity, stored_tables.get(entity.table), existing) for entity in plan.entities]


def _change(plan: EntityPlan, entity: EntityType, stored: StoredTable | None, existing: set[str]) -> Change:
    name = entity.cls.__name__
    keeps = plan.keeps_history(entity)
    if stored is None:
        for table in (entity.table, *([entity.table + HISTORY_SUFFIX] if keeps else [])):
            if table in existing:
                raise Conflict(
                    f"the table {table!r} exists, and no indexer created it", table=table,
                    hint=f'rename the table, or give the entity another: class {name}(Entity, table="…")',
                )  # fmt: skip
        return Change(entity, creates=True, creates_history=keeps, drops_history=False, adds=())
    if (stored.environment, stored.indexer) != (plan.environment, plan.indexer):
        raise Conflict(
            f"the table {entity.table!r} belongs to the indexer {stored.indexer!r} of {stored.environment!r}",
            hint=f'give it another name: class {name}(Entity, table="…")',
            table=entity.table,
        )
    differences = _differences(entity, stored.columns)
    if differences:
        raise SchemaChanged(
            f"{name} does not fit its existing table: {'; '.join(differences)}",
            hint="undo the change, or run `headrace index reset`; only new fields with a default are added",
            indexer=plan.indexer,
        )
    adds = [column for column in entity.columns if column.name not in stored.columns]
    return Change(
        entity,
        creates=False,
        creates_history=keeps and not stored.has_history,
        drops_history=stored.has_history and not keeps,
        adds=adds,
    )


def _differences(entity: EntityType, stored_columns: Mapping[str, str]) -> list[str]:
    differences = []
    columns = {column.name: column for column in entity.columns}
    for name, form in stored_columns.items():
        if name not in columns:
            differences.append(f"the field {name} ({_described(form)}) is missing")
        elif columns[name].form != form:
            differences.append(f"{name} was {_described(form)} and is {_described(columns[name].form)}")
    for name, column in columns.items():
        if name not in stored_columns and column.default is msgspec.NODEFAULT and not column.is_optional:
            differences.append(f"{name} is new and has no default for the existing rows")
    return differences


def _described(form: str) -> str:
    return f"an optional {form[:-1]}" if form.endswith("?") else form


def tables_of(stored_tables: Mapping[str, StoredTable]) -> list[str]:
    """Return the names of all tables that were created, also of histories."""
    return [
        name
        for table, stored in stored_tables.items()
        for name in ([table, table + HISTORY_SUFFIX] if stored.has_history else [table])
    ]


assert EFFECT_SUFFIX != HISTORY_SUFFIX
