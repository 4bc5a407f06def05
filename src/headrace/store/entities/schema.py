"""What must be done so that tables fit the entities: nothing, something added, or a refusal that says what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from headrace.core.entity import Column, EntityType
from headrace.foundation.errors import Conflict, InvalidSetting
from headrace.store.entities.protocol import EFFECT_SUFFIX, EntityPlan, SchemaChanged
from headrace.store.entities.sql import HISTORY_SUFFIX, RESERVED, RESERVED_COLUMNS


class StoredTable(NamedTuple):
    """A table as the database remembers it: whose it is, and the form of each column."""

    environment: str
    indexer: str
    columns: dict[str, str]
    has_history: bool


class Change(NamedTuple):
    """What to do to one table."""

    entity: EntityType
    creates: bool
    creates_history: bool
    drops_history: bool
    adds: Sequence[Column]

    @property
    def form(self) -> str:
        """What the database is to remember of it."""
        return form_of(self.entity)


def form_of(entity: EntityType) -> str:
    """The columns of an entity, as they are remembered."""
    return msgspec.json.encode({column.name: column.form for column in entity.columns}).decode()


def check_names(entities: Sequence[EntityType]) -> None:
    """Raise `InvalidSetting` for names that two tables would share, or that are Headrace's own."""
    taken: dict[str, str] = {}
    for entity in entities:
        name = entity.cls.__name__
        if entity.table in RESERVED:
            raise InvalidSetting(
                f"the table {entity.table!r} of {name} is Headrace's own",
                hint=f'name another: class {name}(Entity, table="…")',
            )
        for table in (entity.table, entity.table + HISTORY_SUFFIX):
            if table in taken:
                raise InvalidSetting(
                    f"{name} and {taken[table]} would share the table {table!r}", hint='give one table="…"'
                )
            taken[table] = name
        if clash := RESERVED_COLUMNS & set(entity.names):
            raise InvalidSetting(f"{name}.{min(clash)} is a column of the history", hint="call it something else")


def changes_of(plan: EntityPlan, kept: Mapping[str, StoredTable], existing: set[str]) -> list[Change]:
    """What fits the tables to the plan. Raises `SchemaChanged` or `Conflict`; then nothing must be changed.

    `existing`: names of all tables there are, of whomever.
    """
    return [_change(plan, entity, kept.get(entity.table), existing) for entity in plan.entities]


def _change(plan: EntityPlan, entity: EntityType, kept: StoredTable | None, existing: set[str]) -> Change:
    name = entity.cls.__name__
    keeps = plan.keeps_history(entity)
    if kept is None:
        for table in (entity.table, *([entity.table + HISTORY_SUFFIX] if keeps else [])):
            if table in existing:
                raise Conflict(
                    f"there is a table {table!r} that no indexer made", table=table,
                    hint=f'rename it, or name another: class {name}(Entity, table="…")',
                )  # fmt: skip
        return Change(entity, creates=True, creates_history=keeps, drops_history=False, adds=())
    if (kept.environment, kept.indexer) != (plan.environment, plan.indexer):
        raise Conflict(
            f"the table {entity.table!r} belongs to the indexer {kept.indexer!r} of environment {kept.environment!r}",
            hint=f'name another: class {name}(Entity, table="…")',
            table=entity.table,
        )
    differences = _differences(entity, kept.columns)
    if differences:
        raise SchemaChanged(
            f"{name} is not what its table was made for: {'; '.join(differences)}",
            hint="change it back, or `headrace index reset` to begin anew; only new fields with a default are added",
            indexer=plan.indexer,
        )
    adds = [column for column in entity.columns if column.name not in kept.columns]
    return Change(
        entity,
        creates=False,
        creates_history=keeps and not kept.has_history,
        drops_history=kept.has_history and not keeps,
        adds=adds,
    )


def _differences(entity: EntityType, known: Mapping[str, str]) -> list[str]:
    found = []
    now = {column.name: column for column in entity.columns}
    for name, form in known.items():
        if name not in now:
            found.append(f"the field {name} ({_said(form)}) is gone")
        elif now[name].form != form:
            found.append(f"{name} was {_said(form)} and is {_said(now[name].form)}")
    for name, column in now.items():
        if name not in known and column.default is msgspec.NODEFAULT and not column.is_optional:
            found.append(f"{name} is new and has no default for the rows there are")
    return found


def _said(form: str) -> str:
    return f"an optional {form[:-1]}" if form.endswith("?") else form


def tables_of(kept: Mapping[str, StoredTable]) -> list[str]:
    """The names of all tables that were made, histories too."""
    return [
        name
        for table, own in kept.items()
        for name in ([table, table + HISTORY_SUFFIX] if own.has_history else [table])
    ]


assert EFFECT_SUFFIX != HISTORY_SUFFIX
