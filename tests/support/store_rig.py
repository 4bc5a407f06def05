"""A store under test, with a clock that the test advances, and short methods with defaults for long arguments.

It uses only operations of the protocols, and knows no concrete store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from headrace.core.block import Chunk, Coalescer, Extra
from headrace.core.failure import Failure
from headrace.core.pack import JSON, pack
from headrace.core.serving import Serving
from headrace.core.span import Key, Settlement, encode_uint16s
from headrace.foundation.ids import new_batch_id, new_session_id
from headrace.foundation.limits import DEFAULT, Limits
from headrace.store.memory import MemoryStore
from headrace.store.postgres import PostgresStore
from headrace.store.protocol import (
    Appended,
    Claim,
    ClientStore,
    Lease,
    NewBatch,
    Release,
    RunOutcome,
    Session,
    Store,
    Suspects,
)
from headrace.store.sqlite import SqliteStore
from tests.support import invariants
from tests.support.connection_pooler import pooled_dsn
from tests.support.postgres_server import server

SECOND_US = 1_000_000
START_US = 1_700_000_000 * SECOND_US
BOOM = Failure(type="Boom", message="it broke").encode()
PLAIN = Key("task")
UNKNOWN_SUSPECTS = Suspects(span_slots=None, evidence="killed by signal 9")
NO_SUSPECTS = Suspects(span_slots={}, evidence="")


def fresh_schema(folder: Path, dsn: str | None = None) -> str:
    """Return the URL of a schema that no other test uses."""
    return f"{dsn or server().dsn}?schema=test_{hashlib.sha256(str(folder).encode()).hexdigest()[:24]}"


def pooled_store(folder: Path, limits: Limits) -> PostgresStore:
    """Make a store behind a pooler that gives each transaction another session; migrations bypass the pooler."""
    return PostgresStore(fresh_schema(folder, pooled_dsn()), limits, direct_url=fresh_schema(folder))


FACTORIES: Mapping[str, Callable[[Path, Limits], Store]] = {
    "memory": lambda _, limits: MemoryStore(limits),
    "sqlite": lambda folder, limits: SqliteStore(folder / "headrace.db", limits),
    "postgres": lambda folder, limits: PostgresStore(fresh_schema(folder), limits),
    "pooled": pooled_store,
}


def payload_of(index: int) -> bytes:
    """Return the default payload of the run at an index."""
    return f"[{index}]".encode()


def chunks_of(
    indexes: Iterable[int],
    *,
    payload: Callable[[int], bytes] = payload_of,
    kind: int = JSON,
    key: Key | Callable[[int], Key] = PLAIN,
    extras: Mapping[int, Extra] | None = None,
    runs_max: int = 256,
) -> list[Chunk]:
    """Return runs as chunks of at most `runs_max`, in the given order."""
    coalescer = Coalescer(runs_max=runs_max, bytes_max=DEFAULT.chunk_bytes_max)
    for index in indexes:
        run_key = key if isinstance(key, Key) else key(index)
        coalescer.add(index, payload(index), run_key, kind=kind, extra=(extras or {}).get(index))
    return coalescer.flush()


def settlement_of(
    lease: Lease,
    codes: str | None = None,
    *,
    span_slots: Sequence[int] | None = None,
    part_no: int = 0,
    results: Sequence[bytes] | None = None,
    dues_us: Sequence[int] = (),
    object_keys: Sequence[str] = (),
) -> Settlement:
    """Return a worker's settlement: `codes` for the runs of a lease, or for those at `span_slots`."""
    named = list(lease.span_slots if span_slots is None else span_slots)
    words = "c" * len(named) if codes is None else codes * (len(named) if len(codes) == 1 else 1)
    index_at = dict(zip(lease.span_slots, lease.indexes, strict=True))
    default = [
        b"%d" % index_at.get(place, 0) if word == "c" else BOOM for place, word in zip(named, words, strict=True)
    ]
    return Settlement(
        span_id=lease.span_id,
        token=lease.token,
        part_no=part_no,
        span_slots=None if span_slots is None and lease.whole else encode_uint16s(named),
        codes=words.encode(),
        results=pack(default if results is None else results),
        dues_us=tuple(dues_us),
        object_keys=tuple(object_keys),
    )


class StoreRig:
    """One store and one clock. As a context manager, it opens the store, and checks every invariant at the end."""

    def __init__(self, store: ClientStore) -> None:
        self.store = cast("Store", store)  # a test of a remote store calls no operation that it lacks
        self.now_us = START_US
        self.environments = {"default"}
        self.was_tampered_with = False
        self._claims_count = 0

    async def __aenter__(self) -> Self:
        await self.store.open()
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and not self.was_tampered_with:
                await self.check()
        finally:
            await self.store.close()

    async def check(self) -> None:
        """Check every invariant of every batch."""
        for environment in sorted(self.environments):
            assert await invariants.faults(self.store, environment) == []

    def later(self, seconds: float) -> int:
        """Advance the clock."""
        self.now_us += int(seconds * SECOND_US)
        return self.now_us

    async def batch(self, expected_count: int | None = None, *, kind: str = "batch", **more: Any) -> str:
        """Create a batch, and return its id."""
        self.now_us += 1_000  # ids sort by creation to the millisecond
        self.environments.add(str(more.get("environment", "default")))
        new = NewBatch(id=new_batch_id(self.now_us), kind=kind, expected_count=expected_count, **more)
        batch, _ = await self.store.create_batch(new, now_us=self.now_us)
        return batch.id

    async def append(
        self, batch_id: str, indexes: Iterable[int], cursor: bytes | None = None, *, seals: bool = False, **more: Any
    ) -> Appended:
        """Append runs; `more` as for `chunks_of`."""
        chunks = chunks_of(indexes, **more)
        return await self.store.append(batch_id, chunks, now_us=self.now_us, cursor=cursor, seals=seals)

    async def filled(self, count: int, **more: Any) -> str:
        """Create a sealed batch of `count` runs."""
        batch_id = await self.batch(count)
        await self.append(batch_id, range(count), **more)
        await self.store.seal(batch_id, None, now_us=self.now_us)
        return batch_id

    async def session(
        self, kind: str = "worker", *, serves: Serving | None = None, environment: str = "default"
    ) -> str:
        """Start a session, and return its id. `serves`: what it records that it claims."""
        session_id = new_session_id(self.now_us)
        session = Session(
            id=session_id,
            kind=kind,
            host="host",
            pid=1,
            started_us=self.now_us,
            serves=serves,
            environment=environment,
        )
        await self.store.start_session(session, now_us=self.now_us)
        return session_id

    async def claim(
        self,
        session_id: str,
        runs_max: int = 10_000,
        *,
        claim_no: int | None = None,
        tasks: Sequence[str] = ("task",),
        queues: Sequence[str] | None = None,
        queue_prefix: str = "",
        environment: str = "default",
    ) -> list[Lease]:
        """Claim leases; without a `claim_no` this is a new claim."""
        self._claims_count += 1
        request = Claim(
            session_id=session_id,
            claim_no=self._claims_count if claim_no is None else claim_no,
            environment=environment,
            tasks=tasks,
            queues=queues,
            queue_prefix=queue_prefix,
            runs_max=runs_max,
        )
        return await self.store.claim(request, now_us=self.now_us)

    async def settle(self, lease: Lease, codes: str | None = None, **more: Any) -> str:
        """Settle one lease; `more` as for `settlement_of`."""
        settlement = settlement_of(lease, codes, **more)
        (word,) = await self.store.settle([settlement], now_us=self.now_us)
        return word

    async def release(
        self, lease: Lease, suspects: Sequence[int] = (), *, evidence: str = "killed", crashes_max: int = 3
    ) -> str:
        """Release one lease."""
        given = Release(span_id=lease.span_id, token=lease.token, suspects=tuple(suspects), evidence=evidence)
        (word,) = await self.store.release([given], crashes_max=crashes_max, now_us=self.now_us)
        return word

    async def recover(self, session_id: str, suspects: Suspects = UNKNOWN_SUSPECTS, *, crashes_max: int = 3) -> int:
        """End a session that is silent now."""
        return await self.store.recover(
            session_id, suspects, silent_since_us=self.now_us, crashes_max=crashes_max, now_us=self.now_us
        )

    async def states(self, batch_id: str) -> list[str]:
        """Return the state of each run, by index."""
        return [run.state for run in await self.store.runs("default", batch_id=batch_id, limit=invariants.ALL)]

    async def outcomes(self, batch_id: str, from_index: int = 0, runs_max: int = 10_000) -> list[RunOutcome]:
        """Return final outcomes from an index on."""
        return await self.store.outcomes(batch_id, from_index, runs_max)

    async def run_all(self, session_id: str, **more: Any) -> list[int]:
        """Claim and complete until nothing is left. Returns the indexes in the order of delivery."""
        order: list[int] = []
        while leases := await self.claim(session_id, **more):
            for lease in leases:
                order += lease.indexes
                assert await self.settle(lease) == "settled"
        return order


def indexes_of(leases: Iterable[Lease]) -> list[int]:
    """Return the batch indexes of some leases, in the order of delivery."""
    return [index for lease in leases for index in lease.indexes]
