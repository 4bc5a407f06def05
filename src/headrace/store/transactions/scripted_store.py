"""Operations of a store, run as scripts: a database only adds how a script is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

from headrace.core.admission import Bucket, Spent
from headrace.core.batch import BatchRecord, Ledger, check_created
from headrace.core.block import Chunk
from headrace.core.serving import Serving, StalledLane
from headrace.core.span import Settlement, Span
from headrace.foundation.errors import InvalidInput
from headrace.foundation.limits import Limits
from headrace.store.projections import RunFilter, lease_of
from headrace.store.protocol import (
    ApiKey,
    Appended,
    Claim,
    DeadLetter,
    Heartbeat,
    Lease,
    LeaseLoad,
    NamedLease,
    NewBatch,
    Pruned,
    QueueView,
    Release,
    RunOutcome,
    RunRecord,
    Schedule,
    Session,
    SessionOwner,
    Suspects,
    Swept,
    Tick,
    Ticked,
    Verification,
)
from headrace.store.transactions import (
    api_keys,
    append,
    cancel_redrive,
    dead_letters,
    leases,
    listings,
    locate,
    maintenance,
    queries,
    rules,
)
from headrace.store.transactions import schedules as schedule_scripts
from headrace.store.transactions.row_mapping import BlockRow
from headrace.store.transactions.sql_script import Script

T = TypeVar("T")


class ScriptedStore(ABC):
    """A store whose operations are scripts. A subclass runs scripts that write, and scripts that only read."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    @abstractmethod
    async def _write(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in one transaction, and return after its commit. The script may be made and run more than
        once.
        """

    @abstractmethod
    async def _read(self, script: Callable[[], Script[T]]) -> T:
        """Run a script that changes nothing, on one snapshot."""

    async def _scan(self, script: Callable[[], Script[T]]) -> T:
        """Run a script that only reads, but rows of the whole store. It must not keep short reads waiting."""
        return await self._read(script)

    async def perform(self, script: Callable[[], Script[T]]) -> T:
        """Run a script that is no operation of the store (those of a store copy) in one transaction."""
        return await self._write(script)

    # -- batches

    async def create_batch(self, new: NewBatch, *, now_us: int) -> tuple[BatchRecord, bool]:
        """Create a batch, or return the one that its key names."""
        check_created(expected_count=new.expected_count, runs_max=self._limits.batch_runs_max)
        return await self._write(lambda: append.create(new, now_us))

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None, seals: bool = False
    ) -> Appended:
        """Make runs durable, each index once."""
        runs_max = self._limits.batch_runs_max
        return await self._write(lambda: append.append(batch_id, chunks, cursor, runs_max, now_us, seals=seals))

    async def seal(self, batch_id: str, expected_count: int | None, *, now_us: int) -> BatchRecord:
        """Seal a batch; complete it if all its runs have ended."""
        return await self._write(lambda: append.seal(batch_id, expected_count, now_us))

    async def stop_batch(self, batch_id: str, state: str, *, now_us: int) -> BatchRecord:
        """Cancel or abandon a batch; a bounded part of its waiting runs is cancelled at once."""
        return await self._write(lambda: cancel_redrive.stop(batch_id, state, now_us))

    async def cancel_runs(self, batch_id: str, indexes: Sequence[int], *, now_us: int) -> int:
        """Cancel single runs: waiting runs at once, leased runs when their worker's heartbeat is answered."""
        return await self._write(lambda: cancel_redrive.cancel_runs(batch_id, indexes, now_us))

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None) -> int:
        """Run all failed runs again, or at `indexes` those that failed, were cancelled or expired."""
        return await self._write(lambda: cancel_redrive.redrive(batch_id, indexes))

    # -- sessions

    async def start_session(self, session: Session, *, now_us: int) -> None:
        """Register a process."""
        await self._write(lambda: leases.start_session(session, now_us))

    async def heartbeat(
        self, session_id: str, *, now_us: int, owner: SessionOwner | None = None, serves: Serving | None = None
    ) -> Heartbeat:
        """Renew a session, and return the leases that the store has for it."""
        return await self._write(lambda: leases.heartbeat(session_id, now_us, owner, serves))

    async def unwanted_runs(self, session_id: str, *, owner: SessionOwner | None = None) -> Heartbeat:
        """Return which runs of a session are cancelled."""
        return await self._read(lambda: leases.unwanted_runs(session_id, owner))

    async def end_session(self, session_id: str, *, now_us: int, owner: SessionOwner | None = None) -> None:
        """End a session in good order: release its leases and seal its stream."""
        await self._write(lambda: leases.end_session(session_id, now_us, owner))

    async def sessions(self) -> list[Session]:
        """List the sessions that have not ended."""
        return await self._read(queries.sessions)

    async def lease_loads(self) -> dict[str, LeaseLoad]:
        """Return how many runs each session has leased and not settled."""
        return await self._read(queries.lease_loads)

    async def stalled_lanes(self, environment: str, *, batch_id: str = "", now_us: int) -> list[StalledLane]:
        """Return the lanes with waiting runs that no live worker takes."""
        silent_since_us = now_us - self._limits.session_timeout_ms * 1_000
        return await self._scan(lambda: queries.stalled_lanes(environment, batch_id, silent_since_us))

    async def recover(
        self, session_id: str, suspects: Suspects, *, silent_since_us: int, crashes_max: int, now_us: int
    ) -> int:
        """End a lapsed session, once, and release its leases."""
        return await self._write(lambda: leases.recover(session_id, suspects, silent_since_us, crashes_max, now_us))

    # -- work

    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease spans to a live session. Their inputs are unpacked here, outside the transaction."""
        if claim.runs_max < 1:
            raise InvalidInput(f"a claim requests at least one run, got runs_max={claim.runs_max}")
        taken = await self._write(lambda: leases.claim(claim, now_us, self._limits.claim_bytes_max))
        return [lease_of_row(span, taken.blocks[span.block_id]) for span in taken.spans]

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes."""
        return await self._write(lambda: leases.settle(settlements, now_us))

    async def release(self, releases: Sequence[Release], *, crashes_max: int, now_us: int) -> list[str]:
        """Release leases before their runs have ended."""
        return await self._write(lambda: leases.release(releases, crashes_max, now_us))

    # -- reading

    async def batch(self, batch_id: str) -> tuple[BatchRecord, Ledger]:
        """Return a batch and its ledger."""
        return await self._read(lambda: queries.batch_and_ledger(batch_id))

    async def find_batch(self, environment: str, key: str) -> BatchRecord | None:
        """Return the batch that a key names."""
        return await self._read(lambda: queries.find_by_key(environment, key))

    async def batches(
        self, environment: str, *, states: Sequence[str] | None = None, before_id: str = "", limit: int = 50
    ) -> list[tuple[BatchRecord, Ledger]]:
        """List batches, newest first."""
        bytes_max = self._limits.results_page_bytes_max
        return await self._read(lambda: queries.list_batches(environment, states, before_id, limit, bytes_max))

    async def missing(self, batch_id: str, ranges_max: int) -> list[tuple[int, int]]:
        """Return ranges of announced indexes that are not durable yet."""
        return await self._read(lambda: queries.missing(batch_id, ranges_max))

    async def outcomes(
        self, batch_id: str, from_index: int, runs_max: int, *, passing: bool = False
    ) -> list[RunOutcome]:
        """Return final outcomes from `from_index` on, in index order."""
        bytes_max = self._limits.results_page_bytes_max
        return await self._read(
            lambda: queries.outcomes(batch_id, from_index, runs_max, bytes_max=bytes_max, passing=passing)
        )

    async def run(self, batch_id: str, index: int) -> RunRecord:
        """Return one run."""
        return await self._read(lambda: queries.run(batch_id, index))

    async def runs(
        self,
        environment: str,
        *,
        batch_id: str = "",
        state: str = "",
        task: str = "",
        queue: str = "",
        tag: str = "",
        since_us: int = 0,
        after: tuple[str, int] | None = None,
        limit: int = 50,
    ) -> list[RunRecord]:
        """List runs that match, newest batch first and by index inside it."""
        bytes_max = self._limits.results_page_bytes_max
        return await self._read(
            lambda: listings.list_runs(
                environment, batch_id, RunFilter(state, task, queue, tag, since_us), after, limit, bytes_max
            )
        )

    async def tasks_of_batches(self, environment: str, batch_ids: Sequence[str]) -> dict[str, list[str]]:
        """Return the tasks of the first and the last runs of some batches."""
        return await self._read(lambda: listings.tasks_of_batches(environment, batch_ids))

    async def queues(self, environment: str) -> list[QueueView]:
        """List the queues that were ever used or paused."""
        return await self._scan(lambda: queries.queues(environment))

    async def pause_queue(self, environment: str, name: str, *, paused: bool) -> None:
        """Stop or resume claims from a queue."""
        await self._write(lambda: leases.pause_queue(environment, name, paused=paused))

    async def named_leases(self, environment: str, task: str, keys: Sequence[str]) -> list[NamedLease]:
        """Return the leases of the runs that keys name."""
        return await self._read(lambda: dead_letters.named_leases(environment, task, keys))

    async def complete_waiting(
        self, environment: str, task: str, keys: Sequence[str], result: bytes, *, now_us: int
    ) -> int:
        """Complete the runs that keys name and that wait."""
        return await self._write(lambda: leases.complete_waiting(environment, task, keys, result, now_us))

    async def dead_letters(
        self, environment: str, *, queue: str = "", before_us: int = 0, after: DeadLetter | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """List dead letters, oldest first."""
        return await self._read(lambda: dead_letters.dead_letters(environment, queue, before_us, after, limit))

    async def purge_dead(self, environment: str, runs: Sequence[tuple[str, int]]) -> int:
        """Remove runs from the dead letters."""
        return await self._write(lambda: dead_letters.purge_dead(environment, runs))

    async def rules(self, environment: str) -> dict[str, bytes]:
        """Return the rules of an environment by name."""
        return await self._read(lambda: rules.rules(environment))

    async def keep_rules(self, environment: str, name: str, value: bytes, *, before: bytes | None) -> bool:
        """Store a rule, unless another process changed it since it was read."""
        return await self._write(lambda: rules.keep_rules(environment, name, value, before))

    async def move_waiting(self, environment: str, task: str, source: str, target: str, *, spans_max: int) -> int:
        """Move waiting spans to another queue, at most `spans_max`."""
        return await self._write(lambda: leases.move_waiting(environment, task, source, target, spans_max))

    async def size_bytes(self) -> int:
        """Return the size of the stored data."""
        return await self._scan(queries.size_bytes)

    async def verify(self, batch_id: str) -> Verification:
        """Count a batch from its chunks, and compare with its counters."""
        return await self._scan(lambda: queries.verify(batch_id))

    # -- upkeep

    async def duties(self) -> dict[str, int]:
        """Return when each duty can be taken again."""
        return await self._read(queries.duties)

    async def take_duty(self, name: str, holder: str, *, free_us: int, now_us: int) -> bool:
        """Take a duty that no other process holds."""
        return await self._write(lambda: maintenance.take_duty(name, holder, free_us, now_us))

    async def end_duty(self, name: str, holder: str, *, free_us: int) -> None:
        """End a duty, if this holder still has it."""
        await self._write(lambda: maintenance.end_duty(name, holder, free_us))

    async def sweep(self, *, now_us: int, rows_max: int) -> Swept:
        """Expire, abandon and cancel what is overdue, and release leases without a live session."""
        crashes_max = self._limits.crashes_max
        return await self._write(lambda: maintenance.sweep(rows_max, crashes_max, now_us))

    async def prune(self, finished_before_us: int, *, batches_max: int, rows_max: int) -> Pruned:
        """Delete whole batches that finished before a time."""
        return await self._write(lambda: maintenance.prune(finished_before_us, batches_max, rows_max))

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        """Return those of these object keys that no row names."""
        return await self._scan(lambda: maintenance.unnamed(keys))

    async def next_due_us(self, environment: str, tasks: Sequence[str]) -> int | None:
        """Return when the next delayed span becomes claimable."""
        return await self._read(lambda: queries.next_due_us(environment, tasks))

    # -- schedules

    async def keep_schedules(
        self, environment: str, app: str, schedules: Sequence[Schedule], *, now_us: int
    ) -> list[Schedule]:
        """Store all schedules of an app, and mark its others as gone."""
        return await self._write(lambda: schedule_scripts.keep(environment, app, schedules, now_us))

    async def tick(self, environment: str, tick: Tick, *, now_us: int) -> Ticked:
        """Enqueue the runs of ticks, once."""
        return await self._write(lambda: schedule_scripts.tick(environment, tick, now_us))

    async def schedules(self, environment: str) -> list[Schedule]:
        """List all schedules by name."""
        return await self._read(lambda: schedule_scripts.schedules(environment))

    # -- API keys and rate limits

    async def add_key(self, key: ApiKey, *, now_us: int) -> None:
        """Add an API key."""
        await self._write(lambda: api_keys.add_key(key, now_us))

    async def find_key(self, digest: str) -> ApiKey | None:
        """Return the API key with this digest."""
        return await self._read(lambda: api_keys.find_key(digest))

    async def has_keys(self) -> bool:
        """True if an API key was ever created, in any environment."""
        return await self._read(api_keys.has_keys)

    async def keys(self, environment: str) -> list[ApiKey]:
        """List the API keys of an environment, oldest first."""
        return await self._read(lambda: api_keys.keys(environment))

    async def revoke_key(self, environment: str, key_id: str, *, now_us: int) -> bool:
        """Revoke an API key."""
        return await self._write(lambda: api_keys.revoke_key(environment, key_id, now_us))

    async def find_signing_key(self, environment: str) -> bytes | None:
        """Return the signing key of an environment, if it has one."""
        return await self._read(lambda: api_keys.find_signing_key(environment))

    async def signing_key(self, environment: str, offered: bytes) -> bytes:
        """Return the signing key of an environment; the first one that was offered is kept."""
        return await self._write(lambda: api_keys.signing_key(environment, offered))

    async def spend(self, environment: str, name: str, bucket: Bucket, cost: int, *, now_us: int) -> Spent:
        """Take tokens from a bucket, all of the cost or none."""
        return await self._write(lambda: api_keys.spend(environment, name, bucket, cost, now_us))


def lease_of_row(span: Span, block: BlockRow) -> Lease:
    """Make the lease of a claimed span from the row of its block."""
    return lease_of(span, block.first_index, block.gaps, locate.decode_extras(block.extras), block.items)
