"""What the loops share: one store, one object store, one clock, one set of bounds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from headrace.core.pack import CONTENT_TYPES, JSON, KINDS
from headrace.foundation.errors import InvalidSetting, ObjectMissing
from headrace.foundation.limits import Limits
from headrace.runtime.clock import Clock
from headrace.runtime.wakeup import Wakeup
from headrace.store.entities.protocol import EntityStore
from headrace.store.payloads import PayloadStore, Reference, payload_key
from headrace.store.protocol import Notifier, Store


@dataclass(slots=True)
class DutyStats:
    """What became of one duty of upkeep in this process. `moved_count`: rows, batches or objects that it moved on."""

    done_count: int = 0
    failed_count: int = 0
    moved_count: int = 0
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Engine:
    """Made by `headrace.compose`; closed by whoever opened it.

    `live_directory`: where the marks of live processes lie, None when the store is not shared between processes.
    `beats_beside`: whether heartbeats may come from another thread. `wakeup` rings when work was appended,
    `recorded` when outcomes were; `notifier` carries both to other processes. `entities` are the tables of indexers.
    `duties`: what this process did of upkeep.
    """

    store: Store
    payloads: PayloadStore
    clock: Clock
    limits: Limits
    environment: str
    live_directory: Path | None
    beats_beside: bool
    wakeup: Wakeup
    recorded: Wakeup = field(default_factory=Wakeup)
    duties: dict[str, DutyStats] = field(default_factory=dict)
    notifier: Notifier | None = None
    entities: EntityStore | None = None

    @property
    def tables(self) -> EntityStore:
        """The tables of indexers."""
        if self.entities is None:
            raise InvalidSetting("this engine keeps no tables of indexers", hint="open it with headrace.compose")
        return self.entities

    def with_limits(self, limits: Limits) -> Engine:
        """The same engine for somebody with other bounds; whoever opened it closes it."""
        return replace(self, limits=limits)

    async def close(self) -> None:
        """Let go of the store."""
        if self.notifier is not None:
            await self.notifier.close()
        if self.entities is not None:
            await self.entities.close()
        await self.store.close()

    async def offloaded(self, batch_id: str, payload: bytes, kind: int = JSON) -> tuple[bytes, str]:
        """Put a large payload or result where objects live, before any row names it: `(reference, key)`."""
        key = payload_key(self.environment, batch_id, hashlib.sha256(payload).hexdigest())
        await self.payloads.put(key, payload)
        return Reference(key, len(payload), CONTENT_TYPES[kind]).encode(), key

    async def fetch(self, reference: bytes) -> tuple[bytes, int]:
        """What a reference refers to, and its kind. Raises `ObjectMissing` when it is gone or not what it was."""
        named = Reference.decode(reference)
        kind = KINDS.get(named.content_type)
        if kind is None:
            raise ObjectMissing(f"nothing decodes {named.content_type!r}", key=named.key)
        return await self.payloads.get(named.key), kind

    async def put_result(self, batch_id: str, result: bytes) -> tuple[bytes, str]:
        """Store a result over the inline limit."""
        return await self.offloaded(batch_id, result)
