"""`MemoryStore`: all operations of a store on plain dicts, for tests and as the specification of the other stores.

Rule 1: it uses the same decisions of `core` as every store, and no index, no SQL, and no bound that only a database
needs. Where two stores differ, this one is right. Rule 2: an operation works on a copy of the tables, which replaces
them when the operation is done. An error that is raised changes nothing; since no operation waits inside, each is one
transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from headrace.core import admission
from headrace.core import batch as batches
from headrace.core import span as spans
from headrace.core.admission import Bucket, Spent
from headrace.core.batch import BatchRecord, Ledger
from headrace.core.block import Chunk
from headrace.core.page import count_within
from headrace.core.run import UNSETTLED
from headrace.core.serving import Serving, StalledLane, stalled_lanes
from headrace.core.span import Counts, Policy, Settlement
from headrace.foundation.errors import Conflict, InvalidInput, NotFound, StoreUnavailable
from headrace.foundation.limits import Limits
from headrace.store.memory import reads, writes
from headrace.store.memory.reads import Queue, Tables
from headrace.store.projections import RunFilter, serving_since
from headrace.store.protocol import (
    ApiKey,
    Appended,
    Claim,
    DeadLetter,
    Heartbeat,
    HeldLease,
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


class MemoryStore:
    """A store in the memory of this process."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tables = Tables()
        self._is_open = False

    @contextmanager
    def _changing(self) -> Iterator[Tables]:
        tables = self._now().copied()
        yield tables
        self._tables = tables

    def _now(self) -> Tables:
        if not self._is_open:
            raise StoreUnavailable("the store is closed")
        return self._tables

    async def open(self) -> None:
        """Open the store. Batches from before a close are still there."""
        self._is_open = True

    async def close(self) -> None:
        """Close the store."""
        self._is_open = False

    async def check(self) -> dict[str, object]:
        """Return the settings that durability depends on: nothing is durable."""
        self._now()
        return {"store": "memory", "durable": False}

    # batches

    async def create_batch(self, new: NewBatch, *, now_us: int) -> tuple[BatchRecord, bool]:
        """Create a batch, or return the one that its key names."""
        batches.check_created(expected_count=new.expected_count, runs_max=self._limits.batch_runs_max)
        with self._changing() as tables:
            if new.key is not None and (batch := reads.named(tables, new.environment, new.key)):
                return batch, False
            if new.id in tables.batches:
                return tables.batches[new.id], False
            if new.session_id:
                writes.live(tables, new.session_id, environment=new.environment)
            return writes.create(tables, new, now_us), True

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None, seals: bool = False
    ) -> Appended:
        """Make runs durable, each index once."""
        with self._changing() as tables:
            runs_max = self._limits.batch_runs_max
            return writes.append(tables, batch_id, chunks, cursor, runs_max, now_us, seals=seals)

    async def seal(self, batch_id: str, expected_count: int | None, *, now_us: int) -> BatchRecord:
        """Seal a batch; complete it if all its runs have ended."""
        with self._changing() as tables:
            return writes.seal(tables, batch_id, expected_count, now_us)

    async def stop_batch(self, batch_id: str, state: str, *, now_us: int) -> BatchRecord:
        """Cancel or abandon a batch; a bounded part of its waiting runs is cancelled at once."""
        with self._changing() as tables:
            writes.stop(tables, batch_id, state, now_us)
        return self._tables.batches[batch_id]

    async def cancel_runs(self, batch_id: str, indexes: Sequence[int], *, now_us: int) -> int:
        """Cancel single runs: waiting runs at once, leased runs when their worker's heartbeat is answered."""
        with self._changing() as tables:
            batch = reads.find(tables, batch_id)
            leased_count = 0
            change = Counts()
            for block_id, block_offsets in writes.by_block(tables, batch, indexes).items():
                for span in reads.spans_of_block(tables, block_id):
                    live = [
                        block_offset
                        for block_offset, state in writes.states_by_offset(span)
                        if state in UNSETTLED and block_offset in block_offsets
                    ]
                    if span.state == spans.LEASED:
                        tables.cancellations |= {(batch_id, block_offsets[block_offset]) for block_offset in live}
                        leased_count += len(live)
                    elif live:
                        tables.spans[span.id], counts = spans.cancel(span, live)
                        change = change.plus(counts)
            writes.count_in(tables, batch_id, change, now_us)
        return change.settled + leased_count

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None) -> int:
        """Run all failed runs again, or at `indexes` those that failed, were cancelled or expired."""
        with self._changing() as tables:
            batch = reads.find(tables, batch_id)
            if batch.is_stopped:
                raise Conflict(f"the batch is {batch.state}; its runs can't run again", batch_id=batch_id)
            offsets_by_block = None if indexes is None else writes.by_block(tables, batch, indexes)
            change = Counts()
            for span in reads.spans_of_batch(tables, batch_id):
                block_offsets = None if offsets_by_block is None else offsets_by_block.get(span.block_id, {})
                extras = tables.blocks[span.block_id].chunk.extras
                after, taken, counts = spans.redrive(
                    span,
                    block_offsets,
                    clock=writes.clock(tables, span),
                    unrunnable={block_offset for block_offset, extra in extras.items() if extra.failure},
                )
                if taken is not None:
                    tables.spans[span.id] = after
                    writes.add_span(tables, taken)
                    redriven = {(batch_id, index) for index in reads.indexes_of_span(tables, taken)}
                    tables.cancellations -= redriven
                    tables.dead = {run: dead for run, dead in tables.dead.items() if run not in redriven}
                    change = change.plus(counts)
            if change.settled:
                tables.batches[batch_id] = batches.redriven(batch, change)
        return -change.settled

    # sessions

    async def start_session(self, session: Session, *, now_us: int) -> None:
        """Register a process."""
        with self._changing() as tables:
            if session.id in tables.sessions:
                writes.live(tables, session.id, environment=session.environment, key_id=session.key_id)
            else:
                tables.sessions[session.id] = msgspec.structs.replace(session, heartbeat_us=now_us, ended_us=0)

    async def heartbeat(
        self, session_id: str, *, now_us: int, owner: SessionOwner | None = None, serves: Serving | None = None
    ) -> Heartbeat:
        """Renew a session, and return the leases that the store has for it."""
        with self._changing() as tables:
            session = writes.live(tables, session_id)
            if owner is not None and not reads.is_owned(tables, session_id, owner):
                raise writes.ended(session_id)
            seen_us = max(session.heartbeat_us, now_us)
            if serves is not None and session.serves is not None:
                session = msgspec.structs.replace(session, serves=session.serves.widened(serves))
            tables.sessions[session_id] = msgspec.structs.replace(session, heartbeat_us=seen_us)
        return self._leases_of(session_id)

    async def unwanted_runs(self, session_id: str, *, owner: SessionOwner | None = None) -> Heartbeat:
        """Return which runs of a session are cancelled."""
        if owner is not None and not reads.is_owned(self._now(), session_id, owner):
            return Heartbeat(leases=[], stopped=[], cancelled=[])
        reply = self._leases_of(session_id)
        return reply if reply.stopped or reply.cancelled else Heartbeat(leases=[], stopped=[], cancelled=[])

    def _leases_of(self, session_id: str) -> Heartbeat:
        tables = self._now()
        leased = reads.spans_of_session(tables, session_id)
        batch_ids = {span.batch_id for span in leased}
        return Heartbeat(
            leases=[HeldLease(span.id, span.token, span.claim_no) for span in leased],
            stopped=sorted(batch_id for batch_id in batch_ids if tables.batches[batch_id].is_stopped),
            cancelled=sorted(cancellation for cancellation in tables.cancellations if cancellation[0] in batch_ids),
        )

    async def end_session(self, session_id: str, *, now_us: int, owner: SessionOwner | None = None) -> None:
        """End a session in good order: release its leases and seal its stream."""
        with self._changing() as tables:
            session = tables.sessions.get(session_id)
            is_owned = owner is None or reads.is_owned(tables, session_id, owner)
            if session is not None and not session.ended_us and is_owned:
                writes.end(tables, session, Suspects(span_slots={}, evidence=""), self._limits.crashes_max, now_us)

    async def sessions(self) -> list[Session]:
        """List the sessions that have not ended."""
        rows = self._now().sessions
        return [rows[name] for name in sorted(rows) if not rows[name].ended_us]

    async def lease_loads(self) -> dict[str, LeaseLoad]:
        """Return how many runs each session has leased and not settled."""
        return reads.lease_loads(self._now())

    async def stalled_lanes(self, environment: str, *, batch_id: str = "", now_us: int) -> list[StalledLane]:
        """Return the lanes with waiting runs that no live worker takes."""
        serving = serving_since(await self.sessions(), now_us - self._limits.session_timeout_ms * 1_000)
        return stalled_lanes(reads.waiting_lanes(self._now(), environment, batch_id), serving, environment)

    async def recover(
        self, session_id: str, suspects: Suspects, *, silent_since_us: int, crashes_max: int, now_us: int
    ) -> int:
        """End a lapsed session, once, and release its leases."""
        with self._changing() as tables:
            session = tables.sessions.get(session_id)
            if session is None or session.ended_us or session.heartbeat_us > silent_since_us:
                return 0
            return writes.end(tables, session, suspects, crashes_max, now_us)

    # work

    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease the first spans in claim order to a live session; a repeated claim returns the same spans."""
        if claim.runs_max < 1:
            raise InvalidInput(f"a claim requests at least one run, got runs_max={claim.runs_max}")
        with self._changing() as tables:
            writes.live(tables, claim.session_id, environment=claim.environment, key_id=claim.key_id)
            leased = reads.spans_of_session(tables, claim.session_id)
            taken = [span for span in sorted(leased, key=reads.claim_order) if span.claim_no == claim.claim_no]
            if not taken:
                writes.promote(tables, now_us)
                taken = writes.take(tables, claim, self._limits.claim_bytes_max, now_us)
        return [reads.lease(tables, span) for span in taken]

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes."""
        words = []
        with self._changing() as tables:
            for settlement in settlements:
                span = tables.spans.get(settlement.span_id)
                verdict = spans.settle(
                    span,
                    settlement,
                    recorded=(settlement.span_id, settlement.token, settlement.part_no) in tables.parts,
                    policy=Policy() if span is None else writes.policy(tables, span),
                    clock=0 if span is None else writes.clock(tables, span),
                    now_us=now_us,
                )
                writes.apply(tables, verdict, now_us)
                words.append(verdict.word)
                if span is not None and verdict.word != spans.LOST:
                    for key in settlement.object_keys:
                        tables.objects.setdefault(key, span.batch_id)
        return words

    async def release(self, releases: Sequence[Release], *, crashes_max: int, now_us: int) -> list[str]:
        """Release leases before their runs have ended."""
        with self._changing() as tables:
            return [writes.release(tables, released, crashes_max, now_us) for released in releases]

    # reading

    async def batch(self, batch_id: str) -> tuple[BatchRecord, Ledger]:
        """Return a batch and its ledger."""
        tables = self._now()
        return reads.with_ledger(tables, reads.find(tables, batch_id))

    async def find_batch(self, environment: str, key: str) -> BatchRecord | None:
        """Return the batch that a key names."""
        return reads.named(self._now(), environment, key)

    async def batches(
        self, environment: str, *, states: Sequence[str] | None = None, before_id: str = "", limit: int = 50
    ) -> list[tuple[BatchRecord, Ledger]]:
        """List batches, newest first."""
        tables = self._now()
        matching = [
            batch
            for batch_id, batch in sorted(tables.batches.items(), reverse=True)
            if batch.environment == environment
            and (states is None or batch.state in states)
            and (not before_id or batch_id < before_id)
        ]
        sizes = (len(msgspec.json.encode(batch.metadata)) + len(batch.cursor) for batch in matching)
        listed = matching[: min(limit, count_within(sizes, self._limits.results_page_bytes_max))]
        return [reads.with_ledger(tables, batch) for batch in listed]

    async def missing(self, batch_id: str, ranges_max: int) -> list[tuple[int, int]]:
        """Return ranges of announced indexes that are not durable yet."""
        tables = self._now()
        batch, received = reads.find(tables, batch_id), tables.received[batch_id]
        expected = received.end if batch.expected_count is None else batch.expected_count
        return received.missing(expected, ranges_max)

    async def outcomes(
        self, batch_id: str, from_index: int, runs_max: int, *, passing: bool = False
    ) -> list[RunOutcome]:
        """Return final outcomes from `from_index` on, in index order."""
        bytes_max = self._limits.results_page_bytes_max
        return reads.outcomes(self._now(), batch_id, from_index, runs_max, bytes_max=bytes_max, passing=passing)

    async def run(self, batch_id: str, index: int) -> RunRecord:
        """Return one run."""
        return reads.run(self._now(), batch_id, index)

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
        run_filter = RunFilter(state, task, queue, tag, since_us)
        bytes_max = self._limits.results_page_bytes_max
        return reads.runs(self._now(), environment, batch_id, run_filter, after, limit, bytes_max)

    async def tasks_of_batches(self, environment: str, batch_ids: Sequence[str]) -> dict[str, list[str]]:
        """Return the tasks of the first and the last runs of some batches."""
        return reads.tasks_of_batches(self._now(), environment, batch_ids)

    async def queues(self, environment: str) -> list[QueueView]:
        """List the queues that were ever used or paused."""
        return reads.queues(self._now(), environment)

    async def pause_queue(self, environment: str, name: str, *, paused: bool) -> None:
        """Stop or resume claims from a queue."""
        with self._changing() as tables:
            queue = tables.queues.get((environment, name), Queue())
            tables.queues[environment, name] = queue._replace(paused=paused)

    async def named_leases(self, environment: str, task: str, keys: Sequence[str]) -> list[NamedLease]:
        """Return the leases of the runs that keys name."""
        return reads.named_leases(self._now(), environment, task, keys)

    async def complete_waiting(
        self, environment: str, task: str, keys: Sequence[str], result: bytes, *, now_us: int
    ) -> int:
        """Complete the runs that keys name and that wait."""
        with self._changing() as tables:
            return writes.complete_waiting(tables, environment, task, keys, result, now_us)

    async def dead_letters(
        self, environment: str, *, queue: str = "", before_us: int = 0, after: DeadLetter | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """List dead letters, oldest first."""
        return reads.dead_letters(self._now(), environment, queue, before_us, after)[:limit]

    async def purge_dead(self, environment: str, runs: Sequence[tuple[str, int]]) -> int:
        """Remove runs from the dead letters."""
        with self._changing() as tables:
            purged = [run for run in set(runs) if run in tables.dead and tables.dead[run][0] == environment]
            for run in purged:
                del tables.dead[run]
        return len(purged)

    async def rules(self, environment: str) -> dict[str, bytes]:
        """Return the rules of an environment by name."""
        stored = self._now().rules
        return {name: stored[environment, name] for owner, name in sorted(stored) if owner == environment}

    async def keep_rules(self, environment: str, name: str, value: bytes, *, before: bytes | None) -> bool:
        """Store a rule, unless another process changed it since it was read."""
        with self._changing() as tables:
            if tables.rules.get((environment, name)) not in (before, value):
                return False
            tables.rules[environment, name] = value
            return True

    async def move_waiting(self, environment: str, task: str, source: str, target: str, *, spans_max: int) -> int:
        """Move waiting spans to another queue, at most `spans_max`."""
        with self._changing() as tables:
            return writes.move_waiting(tables, environment, task, source, target, spans_max)

    async def size_bytes(self) -> int:
        """Return the size of the stored data."""
        tables = self._now()
        inputs = sum(len(block.chunk.items) for block in tables.blocks.values())
        return inputs + sum(len(part.results) for part in tables.parts.values())

    async def verify(self, batch_id: str) -> Verification:
        """Count a batch from its chunks, and compare with its counters."""
        return reads.verify(self._now(), batch_id)

    # upkeep

    async def sweep(self, *, now_us: int, rows_max: int) -> Swept:
        """Expire, abandon and cancel what is overdue, and release leases without a live session."""
        swept = Swept()
        with self._changing() as tables:
            late = [span for span in reads.waiting(tables) if 0 < span.expires_us <= now_us]
            for span in late[:rows_max]:
                tables.spans[span.id], counts = spans.expire(span)
                swept.expired_count += counts.settled
                writes.count_in(tables, span.batch_id, counts, now_us)
            overdue = [batch for batch in tables.batches.values() if writes.is_overdue(batch, now_us)]
            for batch in overdue[:rows_max]:
                writes.stop(tables, batch.id, batches.ABANDONED, now_us)
                swept.abandoned.append(batch.id)
            stopping = [batch for batch in tables.batches.values() if batch.is_stopped and not batch.is_finished]
            left = rows_max
            for batch in stopping:
                spans_count, runs_count = writes.sweep_stopped(tables, batch.id, left, now_us)
                left -= spans_count
                swept.cancelled_count += runs_count
            live = {session.id for session in tables.sessions.values() if not session.ended_us}
            lost = [
                span for span in tables.spans.values() if span.state == spans.LEASED and span.session_id not in live
            ]
            for span in lost[:rows_max]:
                unknown = writes.release_of_session(span, Suspects(span_slots=None, evidence="its session is gone"))
                writes.release(tables, unknown, self._limits.crashes_max, now_us)
            swept.more = max(len(late), len(overdue), rows_max - left, len(lost)) >= rows_max
        return swept

    def forget(self, batch_id: str) -> None:
        """Delete a batch that turned out to be empty; for `MemoryEntities` beside this store."""
        with self._changing() as tables:
            tables.forget(batch_id)

    async def prune(self, finished_before_us: int, *, batches_max: int, rows_max: int) -> Pruned:
        """Delete whole batches that finished before a time, all in one step."""
        del rows_max
        with self._changing() as tables:
            due = sorted(
                (batch.finished_us, batch.id, batch.environment)
                for batch in tables.batches.values()
                if 0 < batch.finished_us <= finished_before_us
                if all(batch.id != batch_id for batch_id, _ in tables.dead)
            )
            owners_of_objects = set(tables.objects.values())
            for _, batch_id, _ in due[:batches_max]:
                tables.forget(batch_id)
            owners = {span.session_id for span in tables.spans.values() if span.state == spans.LEASED}
            owners |= {batch.session_id for batch in tables.batches.values() if not batch.is_finished}
            for session in list(tables.sessions.values()):
                if 0 < session.ended_us < finished_before_us and session.id not in owners:
                    del tables.sessions[session.id]
            tables.buckets = {name: at for name, at in tables.buckets.items() if at >= finished_before_us}
        pruned = [(environment, batch_id) for _, batch_id, environment in due[:batches_max]]
        with_objects = [(environment, batch_id) for environment, batch_id in pruned if batch_id in owners_of_objects]
        return Pruned(batches=pruned, with_objects=with_objects, more=len(due) > batches_max)

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        """Return those of these object keys that no row names."""
        named = self._now().objects
        return [key for key in keys if key not in named]

    async def duties(self) -> dict[str, int]:
        """Return when each duty can be taken again."""
        return {name: free_us for name, (_, free_us) in self._now().duties.items()}

    async def take_duty(self, name: str, holder: str, *, free_us: int, now_us: int) -> bool:
        """Take a duty that no other process holds."""
        with self._changing() as tables:
            is_free = tables.duties.get(name, ("", 0))[1] <= now_us
            if is_free:
                tables.duties[name] = (holder, free_us)
        return is_free

    async def end_duty(self, name: str, holder: str, *, free_us: int) -> None:
        """End a duty, if this holder still has it."""
        with self._changing() as tables:
            if tables.duties.get(name, ("", 0))[0] == holder:
                tables.duties[name] = (holder, free_us)

    async def next_due_us(self, environment: str, tasks: Sequence[str]) -> int | None:
        """Return when the next delayed span becomes claimable."""
        return min(
            (
                span.due_us
                for span in reads.waiting(self._now())
                if span.state == spans.DELAYED and span.environment == environment and span.task in tasks
            ),
            default=None,
        )

    # schedules

    async def keep_schedules(
        self, environment: str, app: str, schedules: Sequence[Schedule], *, now_us: int
    ) -> list[Schedule]:
        """Store all schedules of an app, and mark its others as gone."""
        with self._changing() as tables:
            return writes.keep_schedules(tables, environment, app, schedules, now_us)

    async def tick(self, environment: str, tick: Tick, *, now_us: int) -> Ticked:
        """Enqueue the runs of ticks, once."""
        with self._changing() as tables:
            return writes.tick(tables, environment, tick, now_us)

    async def schedules(self, environment: str) -> list[Schedule]:
        """List all schedules by name."""
        stored = self._now().schedules
        return [stored[name] for name in sorted(stored) if name[0] == environment]

    # API keys and rate limits

    async def add_key(self, key: ApiKey, *, now_us: int) -> None:
        """Add an API key."""
        with self._changing() as tables:
            if key.id in tables.api_keys or any(key.digest == other.digest for other in tables.api_keys.values()):
                raise Conflict("an API key with this id or digest exists already", key_id=key.id)
            tables.api_keys[key.id] = msgspec.structs.replace(key, created_us=now_us, revoked_us=0)

    async def find_key(self, digest: str) -> ApiKey | None:
        """Return the API key with this digest."""
        return next((key for key in self._now().api_keys.values() if key.digest == digest), None)

    async def has_keys(self) -> bool:
        """True if an API key was ever created, in any environment."""
        return bool(self._now().api_keys)

    async def keys(self, environment: str) -> list[ApiKey]:
        """List the API keys of an environment, oldest first."""
        stored = self._now().api_keys
        return [stored[name] for name in sorted(stored) if stored[name].environment == environment]

    async def revoke_key(self, environment: str, key_id: str, *, now_us: int) -> bool:
        """Revoke an API key."""
        with self._changing() as tables:
            key = tables.api_keys.get(key_id)
            if key is None or key.environment != environment:
                raise NotFound(
                    f"no API key has the id {key_id!r}",
                    hint="`headrace key list` shows the keys of an environment",
                    key_id=key_id,
                )
            if not key.revoked_us:
                tables.api_keys[key_id] = msgspec.structs.replace(key, revoked_us=now_us)
        return not key.revoked_us

    async def find_signing_key(self, environment: str) -> bytes | None:
        """Return the signing key of an environment, if it has one."""
        return self._now().signing_keys.get(environment)

    async def signing_key(self, environment: str, offered: bytes) -> bytes:
        """Return the signing key of an environment; the first one that was offered is kept."""
        with self._changing() as tables:
            return tables.signing_keys.setdefault(environment, offered)

    async def spend(self, environment: str, name: str, bucket: Bucket, cost: int, *, now_us: int) -> Spent:
        """Take tokens from a bucket, all of the cost or none."""
        with self._changing() as tables:
            spent = admission.spend(bucket, cost, full_us=tables.buckets.get((environment, name), 0), now_us=now_us)
            if spent.is_granted:
                tables.buckets[environment, name] = spent.full_us
        return spent
