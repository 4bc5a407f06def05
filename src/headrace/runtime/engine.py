"""The engine: the store, object store, clock and limits that all loops of a process share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from headrace.core.batch import BatchRecord
from headrace.core.pack import CONTENT_TYPES, JSON, KINDS
from headrace.foundation.errors import ClientFault, InvalidSetting, ObjectMissing
from headrace.foundation.limits import Limits
from headrace.runtime.clock import Clock
from headrace.runtime.outage import Outage
from headrace.runtime.wakeup import Wakeup
from headrace.store.entities.protocol import EntityStore
from headrace.store.notifications import Notifier
from headrace.store.payloads import PayloadStore, Reference, payload_key
from headrace.store.protocol import AdministerStore, ClientStore, MaintainStore


@dataclass(slots=True)
class DutyStats:
    """Counters of one duty of upkeep in this process. `moved_count`: rows, batches or objects that the duty changed."""

    done_count: int = 0
    failed_count: int = 0
    moved_count: int = 0
    seconds: float = 0.0


class Offload(NamedTuple):
    """Payloads and results of one environment that are too large for a row."""

    payloads: PayloadStore
    environment: str

    async def offloaded(self, batch_id: str, payload: bytes, kind: int = JSON) -> tuple[bytes, str]:
        """Store a large payload or result as an object, before any row refers to it; return `(reference, key)`."""
        key = payload_key(self.environment, batch_id, hashlib.sha256(payload).hexdigest())
        await self.payloads.put(key, payload)
        return Reference(key, len(payload), CONTENT_TYPES[kind]).encode(), key

    async def fetch(self, reference: bytes) -> tuple[bytes, int]:
        """Return the payload that a reference names, and its kind. Raises `ObjectMissing` if it is missing or has
        changed.
        """
        named = Reference.decode(reference)
        kind = KINDS.get(named.content_type)
        if kind is None:
            raise ObjectMissing(
                f"expected a content type out of {', '.join(KINDS)}, got {named.content_type!r}", key=named.key
            )
        return await self.payloads.get(named.key), kind

    async def put_result(self, batch_id: str, result: bytes) -> tuple[bytes, str]:
        """Store a result over the inline limit; return `(reference, key)`."""
        return await self.offloaded(batch_id, result)


@dataclass(slots=True, kw_only=True)
class Engine:
    """Shared state of the loops of a process. Made by `headrace.compose`; closed by the code that opened it.

    `live_directory`: folder of the in-flight marks of live processes; None if no other process shares the store.
    `beats_beside`: True if heartbeats may be sent from another thread. `wakeup` is notified when runs were appended,
    `recorded` when outcomes were recorded, `cancelled` when leased runs may have been cancelled; `notifier` carries
    them to other processes. `entities`: the tables of indexers. `duties`: counters of upkeep in this process.
    `outage`: what tasks wait for while the store is away. `is_lent`: True in testing mode, where the test closes it.
    """

    store: ClientStore
    payloads: PayloadStore
    clock: Clock
    limits: Limits
    environment: str
    live_directory: Path | None
    beats_beside: bool
    wakeup: Wakeup
    recorded: Wakeup = field(default_factory=Wakeup)
    cancelled: Wakeup = field(default_factory=Wakeup)
    duties: dict[str, DutyStats] = field(default_factory=dict)
    notifier: Notifier | None = None
    entities: EntityStore | None = None
    outage: Outage = field(default_factory=Outage)
    is_lent: bool = False

    @property
    def tables(self) -> EntityStore:
        """Return the tables of indexers. Raises `InvalidSetting` if this engine was opened without them."""
        if self.entities is None:
            raise InvalidSetting(
                "this store has no tables of indexers",
                hint="use a SQLite file or PostgreSQL: --store sqlite:///file.db or postgresql://user@host/database",
            )
        return self.entities

    @property
    def is_maintained_here(self) -> bool:
        """True if this process has access to the database itself: then it may do upkeep, else a server does it."""
        return isinstance(self.store, MaintainStore)

    @property
    def maintenance(self) -> MaintainStore:
        """The operations of upkeep. Raises `ClientFault` if a server keeps the store."""
        if not isinstance(self.store, MaintainStore):
            raise ClientFault(
                "a client of a server can't maintain its store: the server does that itself",
                hint="run the command where the database is, with --store",
            )
        return self.store

    @property
    def administration(self) -> AdministerStore:
        """The operations on API keys and rate limits. Raises `ClientFault` if a server keeps the store."""
        if not isinstance(self.store, AdministerStore):
            raise ClientFault(
                "a client of a server can't manage its API keys and limits",
                hint="run the command where the database is, with --store",
            )
        return self.store

    def with_limits(self, limits: Limits) -> Engine:
        """Return this engine with other limits; the code that opened the original closes it."""
        return replace(self, limits=limits)

    async def stop_batch(self, batch_id: str, state: str) -> BatchRecord:
        """Set a batch to `cancelled` or `abandoned`, and notify the workers that have its runs."""
        batch = await self.store.stop_batch(batch_id, state, now_us=self.clock.now_us())
        self._notify_cancelled(batch_id, None)
        return batch

    async def cancel_runs(self, batch_id: str, indexes: Sequence[int]) -> int:
        """Cancel single runs, and notify the workers that have them. Returns how many had not ended."""
        count = await self.store.cancel_runs(batch_id, indexes, now_us=self.clock.now_us())
        self._notify_cancelled(batch_id, indexes)
        return count

    def _notify_cancelled(self, batch_id: str, indexes: Sequence[int] | None) -> None:
        self.cancelled.notify()
        self.recorded.notify({batch_id: indexes})

    async def close(self) -> None:
        """Close the notifier, the indexers' tables and the store."""
        await self.outage.close()
        if self.notifier is not None:
            await self.notifier.close()
        if self.entities is not None:
            await self.entities.close()
        await self.store.close()

    async def offloaded(self, batch_id: str, payload: bytes, kind: int = JSON) -> tuple[bytes, str]:
        """Store a large payload or result as an object, before any row refers to it; return `(reference, key)`."""
        return await Offload(self.payloads, self.environment).offloaded(batch_id, payload, kind)

    async def fetch(self, reference: bytes) -> tuple[bytes, int]:
        """Return the payload that a reference names, and its kind. Raises `ObjectMissing` if it is missing or has
        changed.
        """
        return await Offload(self.payloads, self.environment).fetch(reference)

    async def put_result(self, batch_id: str, result: bytes) -> tuple[bytes, str]:
        """Store a result over the inline limit; return `(reference, key)`."""
        return await self.offloaded(batch_id, result)
