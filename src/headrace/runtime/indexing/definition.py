"""The declaration of an indexer, and its progress while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from headrace.core.entity import Entity, EntityType
from headrace.core.sequencer import Position
from headrace.foundation.errors import InvalidSetting
from headrace.foundation.limits import MIB, Limits
from headrace.runtime.indexing.effects import Effect, EffectResult
from headrace.runtime.indexing.handler_registry import HandlerRegistry
from headrace.runtime.indexing.sources.source import Source
from headrace.store.entities.protocol import EFFECT_SUFFIX, EntityPlan

ALL: Final = 2**62
"""History setting that keeps every checkpoint."""

Where = Literal["overlay", "drain"]


@dataclass(slots=True, kw_only=True)
class IndexerDefinition:
    """The declaration of an indexer."""

    name: str
    sources: Mapping[str, Source]
    entities: Sequence[type[Entity]]
    handlers: HandlerRegistry
    effects: list[Effect] = field(default_factory=list)
    history: int = 0
    where: Where = "overlay"
    defer_indexes: bool = False
    preload: bool = True

    def plan(self, environment: str, limits: Limits) -> EntityPlan:
        """Return the tables that it needs. Raises `InvalidSetting` for entities that can't be tables."""
        types = [EntityType(cls, row_bytes_max=limits.index_row_bytes_max) for cls in self.entities]
        if any(effect.cache for effect in self.effects):
            name = self.name.replace("-", "_") + EFFECT_SUFFIX
            types.append(EntityType(EffectResult, row_bytes_max=2 * MIB, name=name))
        if not types:
            raise InvalidSetting(f"the indexer {self.name!r} has no entities", hint="entities=[…]")
        return EntityPlan(environment, self.name, tuple(types), bool(self.history), self.defer_indexes)


@dataclass(slots=True)
class IndexerProgress:
    """Progress of an indexer, and where its time went, in seconds since its start."""

    no: int = 0
    committed_no: int = 0
    events_count: int = 0
    rows_count: int = 0
    runs_count: int = 0
    commits_count: int = 0
    fetch_wait_s: float = 0.0
    commit_wait_s: float = 0.0
    compute_s: float = 0.0
    query_s: float = 0.0
    commit_s: float = 0.0
    memory_bytes: int = 0
    positions: dict[str, Position] = field(default_factory=dict)
    heads: dict[str, Position] = field(default_factory=dict)
