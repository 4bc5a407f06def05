"""Operations that Headrace calls on a store, as one protocol for each kind of user.

- `ProduceStore`: create batches, append runs, seal, and enqueue the runs of schedules.
- `WorkStore`: keep a session alive, claim spans, settle and release leases.
- `QueryStore`: read batches, runs, queues, dead letters, rules and schedules.
- `OperateStore`: stop, cancel, redrive, pause, purge, and change rules, as an operator asks.
- `MaintainStore`: recover sessions, move on what is overdue, delete what is old.
- `AdministerStore`: API keys, signing keys and rate limits.

A `ClientStore` is the first four: a server's client has these. A `Store` is all of them. Every operation is one
transaction, answered after its commit, and safe to repeat. No store reads a clock (`now_us`).

Errors: after a `ClientFault` or `StoreUnavailable` nothing has changed; the same call may succeed after the latter.
`SessionEnded` means that the process must start a new session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec

from headrace.core.admission import Bucket, Spent
from headrace.core.batch import BatchRecord, Ledger
from headrace.core.block import Chunk, Extra
from headrace.core.serving import Serving, StalledLane
from headrace.core.span import Settlement


class NewBatch(msgspec.Struct, kw_only=True):
    """A batch to create. In its environment a `key` names one batch: creating it again returns that batch."""

    id: str
    environment: str = "default"
    key: str | None = None
    kind: str = "batch"
    task: str = ""
    expected_count: int | None = None
    metadata: dict[str, object] = {}
    session_id: str = ""
    seal_timeout_ms: int = 0


class Appended(msgspec.Struct, kw_only=True):
    """The result of an append: how many runs are new, and how many were durable before.

    `conflicts`: indexes that were sent again with other content; the first content is kept. `existing`: by index, the
    `(batch_id, index)` of the run that an idempotency key already names. `sealed`: the batch, if this append sealed it.
    """

    accepted_count: int
    duplicates_count: int
    conflicts: list[int] = []
    existing: dict[int, tuple[str, int]] = {}
    sealed: BatchRecord | None = None


class Session(msgspec.Struct, kw_only=True):
    """A live process. `kind` is worker, producer, dispatcher or cli; `host` and `pid` are shown to operators.

    `serves`: the lanes that it claims from, None for none. `key_id`: the API key that started it, empty without one.
    """

    id: str
    kind: str
    host: str
    pid: int
    started_us: int
    heartbeat_us: int = 0
    ended_us: int = 0
    serves: Serving | None = None
    environment: str = "default"
    key_id: str = ""


class SessionOwner(NamedTuple):
    """The environment and the API key of a network client. Sessions of other owners do not exist for it."""

    environment: str
    key_id: str


class Claim(msgspec.Struct, kw_only=True):
    """A request for work: at most `runs_max` runs of these tasks, in claim order.

    `claim_no` counts the claims of the session: a repeat after a lost answer returns the same spans (R1, claims are
    repeatable by number). `queues` is None for all queues whose names begin with `queue_prefix`. The session must
    belong to `environment` and `key_id`.
    """

    session_id: str
    claim_no: int
    environment: str
    tasks: Sequence[str]
    queues: Sequence[str] | None
    runs_max: int
    queue_prefix: str = ""
    key_id: str = ""


class Lease(msgspec.Struct, kw_only=True):
    """A claimed span with the inputs of its runs, to be settled or released under `token`.

    `span_slots`, `indexes` and `payloads` describe the same runs in the same order: entry `lease_offset` of each is one
    run, by its slot in the span, its index in the batch, and its input. `kinds` is None when all payloads are JSON.
    `extras` is by span slot. `whole`: the lease holds every run of its block.
    """

    span_id: int
    token: int
    batch_id: str
    task: str
    queue: str
    attempt: int
    crashes_count: int
    at_most_once: bool
    due_us: int
    expires_us: int
    whole: bool
    span_slots: Sequence[int]
    indexes: Sequence[int]
    payloads: list[bytes]
    kinds: bytes | None
    extras: Mapping[int, Extra]
    runs_count: int
    note: str = ""
    dead_letter: bool = False


class HeldLease(NamedTuple):
    """A lease as the store has it, for a session to compare with the leases in its memory."""

    span_id: int
    token: int
    claim_no: int


class Heartbeat(msgspec.Struct, kw_only=True):
    """The answer to a heartbeat: the session's leases, and which of its runs are not wanted any more.

    `stopped`: batches that were cancelled or abandoned. `cancelled`: `(batch_id, index)` of single runs.
    `database_us`: the time of the machine that the database runs on; 0 when that is this machine.
    """

    leases: list[HeldLease]
    stopped: list[str]
    cancelled: list[tuple[str, int]]
    database_us: int = 0


class Release(msgspec.Struct, kw_only=True):
    """A lease to release. `suspects`: span slots of runs that had started when their worker crashed, else empty.

    With `span_slots` only those runs are released, none of which has started; the lease keeps the others.
    """

    span_id: int
    token: int
    span_slots: tuple[int, ...] | None = None
    suspects: tuple[int, ...] = ()
    evidence: str = ""


class Suspects(msgspec.Struct, kw_only=True):
    """Runs of a crashed session that had started: `span_slots` by (span id, token), or None when that is unknown."""

    span_slots: dict[tuple[int, int], tuple[int, ...]] | None
    evidence: str


class RunOutcome(msgspec.Struct, kw_only=True):
    """The final state of one run. `result` is a result, a failure or empty; `kind` as in `headrace.core.pack`."""

    index: int
    state: int
    result: bytes
    kind: int


class RunRecord(msgspec.Struct, kw_only=True):
    """One run as the store has it. `kept`: options that are echoed, as JSON.

    `name`: the task name of an activation. `session_id`: the session that has leased the run. `created_us` and
    `started_us` are 0 where the store does not know them.
    """

    batch_id: str
    index: int
    environment: str
    task: str
    queue: str
    priority: int
    state: str
    attempt: int
    crashes_count: int
    due_us: int
    expires_us: int
    payload: bytes
    kind: int
    headers: dict[str, str]
    tags: list[str]
    idempotency_key: str
    result: bytes
    result_kind: int
    attempts: list[dict[str, object]]
    kept: bytes = b""
    name: str = ""
    created_us: int = 0
    started_us: int = 0
    session_id: str = ""


class LeaseLoad(NamedTuple):
    """Runs that a session has leased and not settled, and the time of its last claim."""

    runs_count: int
    claimed_us: int


class QueueView(msgspec.Struct, kw_only=True):
    """A queue and its numbers of waiting, delayed and leased runs. `oldest_us`: since when its oldest run waits."""

    name: str
    environment: str
    paused: bool
    waiting_count: int
    delayed_count: int
    leased_count: int
    oldest_us: int


class NamedLease(msgspec.Struct, kw_only=True):
    """A running run that an idempotency key names: its slot in a leased span, and its last note."""

    key: str
    span_id: int
    token: int
    span_slot: int
    attempt: int
    at_most_once: bool
    note: str
    extra: Extra


class DeadLetter(msgspec.Struct, kw_only=True):
    """A run that failed finally and is kept for an operator to inspect. `died_us`: the time of the failure."""

    batch_id: str
    index: int
    queue: str
    task: str
    died_us: int


class Verification(msgspec.Struct, kw_only=True):
    """The ledger of one batch, counted from its chunks, and each difference from its counters."""

    batch_id: str
    ledger: Ledger
    differences: list[str]


class Swept(msgspec.Struct, kw_only=True):
    """The result of one bounded sweep. `more`: something overdue may be left."""

    expired_count: int = 0
    abandoned: list[str] = []
    cancelled_count: int = 0
    more: bool = False


class Pruned(msgspec.Struct, kw_only=True):
    """Deleted batches, and those whose objects are still to be deleted, as `(environment, batch_id)`."""

    batches: list[tuple[str, str]]
    with_objects: list[tuple[str, str]]
    more: bool


class ApiKey(msgspec.Struct, kw_only=True):
    """An API key of an environment and its scopes. `digest` is the SHA-256 of the key, which is not stored."""

    id: str
    environment: str
    digest: str
    scopes: tuple[str, ...]
    name: str = ""
    created_us: int = 0
    revoked_us: int = 0


class Schedule(msgspec.Struct, kw_only=True):
    """A schedule, which enqueues a run of a task at each tick. `expression` and `zone` as in `headrace.core.schedule`.

    `last_us`: all ticks up to this time are processed; it only grows. `ticked_us`: the last tick that became a run; 0
    for none. `gone_us`: the time when the code of `app` stopped declaring the schedule; 0 while it declares it.
    """

    environment: str
    name: str
    app: str
    task: str
    expression: str
    zone: str
    last_us: int = 0
    ticked_us: int = 0
    gone_us: int = 0


class Tick(msgspec.Struct, kw_only=True):
    """Ticks of a schedule after `last_us` up to `until_us`. `runs`: a run for each, empty to skip them."""

    name: str
    expression: str
    zone: str
    last_us: int
    until_us: int
    runs: list[tuple[NewBatch, Chunk]]


class Ticked(NamedTuple):
    """True if this call enqueued the runs of the ticks, and the schedule after the call."""

    is_ours: bool
    schedule: Schedule | None


class ConnectableStore(Protocol):
    """A connection to a store."""

    async def open(self) -> None:
        """Connect, and migrate an empty database to the current schema. Raises `StoreBroken` for a newer schema."""

    async def close(self) -> None:
        """Finish the requests that were accepted, then disconnect. A second close does nothing."""

    async def check(self) -> dict[str, object]:
        """Make a round trip, and return the settings that durability depends on, by name."""


class SessionStore(Protocol):
    """The sessions of processes. A server names the `owner` for which it acts; others' sessions are unknown to it."""

    async def start_session(self, session: Session, *, now_us: int) -> None:
        """Register a process."""

    async def heartbeat(
        self, session_id: str, *, now_us: int, owner: SessionOwner | None = None, serves: Serving | None = None
    ) -> Heartbeat:
        """Renew a session, and add `serves` to its lanes. Raises `SessionEnded` if another process has recovered it."""

    async def end_session(self, session_id: str, *, now_us: int, owner: SessionOwner | None = None) -> None:
        """End a session in good order: release its leases and seal its stream. A repeat does nothing."""


class ProduceStore(SessionStore, Protocol):
    """Operations of producers and of schedules."""

    async def create_batch(self, new: NewBatch, *, now_us: int) -> tuple[BatchRecord, bool]:
        """Create a batch, or return the one that its key names: `(batch, created)`."""

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None, seals: bool = False
    ) -> Appended:
        """Make runs durable, each index once. `cursor`, the position of their source after them, is stored with them.

        Runs may be sent again, also at the same time as another stream of the batch: none is added twice. `seals` seals
        the batch when all announced runs are durable then, in the same transaction if the store can.
        Raises `Conflict` for a cancelled or abandoned batch, `InvalidInput` for an index outside the batch.
        """

    async def seal(self, batch_id: str, expected_count: int | None, *, now_us: int) -> BatchRecord:
        """Seal a batch; this completes it if all its runs have ended. Raises `Conflict` while a run is missing."""

    async def keep_schedules(
        self, environment: str, app: str, schedules: Sequence[Schedule], *, now_us: int
    ) -> list[Schedule]:
        """Store all schedules of an app, and mark its others as gone. Returns the stored schedules.

        A schedule begins now if it is new, was gone, or has another expression or time zone. Others keep
        their `last_us`.
        """

    async def tick(self, environment: str, tick: Tick, *, now_us: int) -> Ticked:
        """Enqueue the runs of ticks, in the transaction that advances the schedule from `last_us`.

        Nothing changes if the schedule is not at `last_us` any more (another process was first, or this call is a
        repeat) or has another expression. Raises `Conflict` if a batch already has the id of one of the runs.
        """


class WorkStore(SessionStore, Protocol):
    """Operations of workers."""

    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease spans to a live session. Raises `SessionEnded`."""

    async def unwanted_runs(self, session_id: str, *, owner: SessionOwner | None = None) -> Heartbeat:
        """Return which of a session's runs are cancelled, as a heartbeat does; without its leases if none is."""

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes. Returns for each, in order: `settled`, `recorded` (a repeat) or `lost` (a stale token)."""

    async def release(self, releases: Sequence[Release], *, crashes_max: int, now_us: int) -> list[str]:
        """Release leases before their runs have ended. Returns `settled` or `lost` for each, in order."""

    async def next_due_us(self, environment: str, tasks: Sequence[str]) -> int | None:
        """Return when the next delayed span of these tasks becomes claimable; None if none is delayed."""


class QueryStore(Protocol):
    """Operations that only read."""

    async def batch(self, batch_id: str) -> tuple[BatchRecord, Ledger]:
        """Return a batch and its ledger. Raises `NotFound`."""

    async def find_batch(self, environment: str, key: str) -> BatchRecord | None:
        """Return the batch that a key names."""

    async def batches(
        self, environment: str, *, states: Sequence[str] | None = None, before_id: str = "", limit: int = 50
    ) -> list[tuple[BatchRecord, Ledger]]:
        """List batches, newest first; `before_id` continues a list. Metadata is bounded by `results_page_bytes_max`."""

    async def missing(self, batch_id: str, ranges_max: int) -> list[tuple[int, int]]:
        """Return half-open ranges of announced indexes that are not durable yet."""

    async def outcomes(
        self, batch_id: str, from_index: int, runs_max: int, *, passing: bool = False
    ) -> list[RunOutcome]:
        """Return consecutive final outcomes from `from_index` on, up to the first run that has none.

        An index without a run is skipped; only streams have such gaps. With `passing`, so are runs without an outcome,
        and of a batch `runs_max` indexes are looked at. Results are bounded by `results_page_bytes_max`.
        """

    async def run(self, batch_id: str, index: int) -> RunRecord:
        """Return one run. Raises `NotFound`."""

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
        """List runs that match, newest batch first and by index inside it; without payloads, and results but errors.

        `after` continues a list behind that run. `since_us`: see `RunFilter`. Details are bounded by
        `results_page_bytes_max`, so only an empty page is the end of a list.
        """

    async def queues(self, environment: str) -> list[QueueView]:
        """List the queues that were ever used or paused."""

    async def tasks_of_batches(self, environment: str, batch_ids: Sequence[str]) -> dict[str, list[str]]:
        """Return the tasks of the first and the last runs of some batches, by batch; a batch without runs has none."""

    async def stalled_lanes(self, environment: str, *, batch_id: str = "", now_us: int) -> list[StalledLane]:
        """Return the lanes with waiting runs that no live worker takes, of an environment or of one batch.

        Of a batch, a bounded number of waiting spans is looked at.
        """

    async def dead_letters(
        self, environment: str, *, queue: str = "", before_us: int = 0, after: DeadLetter | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """List the dead letters of an environment, oldest first, those before `before_us` if it is given.

        `after` continues a list. `redrive` and `purge_dead` remove dead letters.
        """

    async def rules(self, environment: str) -> dict[str, bytes]:
        """Return the rules of an environment by name (see `headrace.core.rules`)."""

    async def schedules(self, environment: str) -> list[Schedule]:
        """List all schedules by name, also those that are gone."""

    async def verify(self, batch_id: str) -> Verification:
        """Count a batch from its chunks, and compare with its counters, results and received indexes."""


class OperateStore(Protocol):
    """Operations that an operator asks for."""

    async def stop_batch(self, batch_id: str, state: str, *, now_us: int) -> BatchRecord:
        """Set a batch to `cancelled` or `abandoned`: waiting runs are cancelled, leased runs may still end."""

    async def cancel_runs(self, batch_id: str, indexes: Sequence[int], *, now_us: int) -> int:
        """Cancel single runs: waiting runs at once, leased runs when their worker learns of it."""

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None) -> int:
        """Run all failed runs again, or at `indexes` those that failed, were cancelled or expired. Returns how many."""

    async def pause_queue(self, environment: str, name: str, *, paused: bool) -> None:
        """Stop or resume claims from a queue."""

    async def purge_dead(self, environment: str, runs: Sequence[tuple[str, int]]) -> int:
        """Remove runs from the dead letters; they stay failed runs of their batches. Returns how many there were."""

    async def keep_rules(self, environment: str, name: str, value: bytes, *, before: bytes | None) -> bool:
        """Store a rule, unless it changed since `before` was read (None: there was none); then return False.

        A repeat of a change that was stored returns True.
        """


@runtime_checkable
class MaintainStore(Protocol):
    """Operations of upkeep, for processes that have access to the database itself."""

    async def sessions(self) -> list[Session]:
        """List the sessions that have not ended."""

    async def lease_loads(self) -> dict[str, LeaseLoad]:
        """Return how many runs each session has leased and not settled."""

    async def recover(
        self, session_id: str, suspects: Suspects, *, silent_since_us: int, crashes_max: int, now_us: int
    ) -> int:
        """End a session without a heartbeat since `silent_since_us`, once, and release its leases.

        Returns how many spans were released; 0 if the session is alive or another process recovered it first.
        """

    async def named_leases(self, environment: str, task: str, keys: Sequence[str]) -> list[NamedLease]:
        """Return the leases of the runs that these keys name; runs that are not leased are left out."""

    async def complete_waiting(
        self, environment: str, task: str, keys: Sequence[str], result: bytes, *, now_us: int
    ) -> int:
        """Complete the runs that keys name and that wait, each with `result`. Returns how many."""

    async def move_waiting(self, environment: str, task: str, source: str, target: str, *, spans_max: int) -> int:
        """Move waiting spans of a task to another queue, at most `spans_max`. Returns how many were moved."""

    async def size_bytes(self) -> int:
        """Return the size of the database."""

    async def duties(self) -> dict[str, int]:
        """Return when each duty of upkeep can be taken again, of those that were ever taken."""

    async def take_duty(self, name: str, holder: str, *, free_us: int, now_us: int) -> bool:
        """Take a duty that no other process holds, until `free_us`. Returns False if another process was first."""

    async def end_duty(self, name: str, holder: str, *, free_us: int) -> None:
        """End a duty, which can be taken again at `free_us`. Does nothing if another process holds it by now."""

    async def sweep(self, *, now_us: int, rows_max: int) -> Swept:
        """Expire runs, abandon batches and cancel the runs of stopped batches, at most about `rows_max` spans."""

    async def prune(self, finished_before_us: int, *, batches_max: int, rows_max: int) -> Pruned:
        """Delete whole batches that finished before a time, in bounded steps."""

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        """Return those of these object keys that no row names."""


@runtime_checkable
class AdministerStore(Protocol):
    """Operations of a server's authentication and rate limits."""

    async def add_key(self, key: ApiKey, *, now_us: int) -> None:
        """Add an API key. Raises `Conflict` if its id or digest exists."""

    async def find_key(self, digest: str) -> ApiKey | None:
        """Return the API key with this digest, also a revoked one."""

    async def has_keys(self) -> bool:
        """True if an API key was ever created, in any environment; revoked ones count."""

    async def keys(self, environment: str) -> list[ApiKey]:
        """List the API keys of an environment, oldest first, also revoked ones."""

    async def revoke_key(self, environment: str, key_id: str, *, now_us: int) -> bool:
        """Revoke an API key. Returns False if it was revoked before. Raises `NotFound`."""

    async def find_signing_key(self, environment: str) -> bytes | None:
        """Return the key that an environment signs tokens with; None if it has none yet."""

    async def signing_key(self, environment: str, offered: bytes) -> bytes:
        """Return the key that an environment signs tokens with; the first `offered` key is kept for all."""

    async def spend(self, environment: str, name: str, bucket: Bucket, cost: int, *, now_us: int) -> Spent:
        """Take tokens from a bucket of an environment, all of `cost` or none."""


class ClientStore(ConnectableStore, ProduceStore, WorkStore, QueryStore, OperateStore, Protocol):
    """A store as a server's client has it: without maintenance and administration, which belong to the server."""


class Store(ClientStore, MaintainStore, AdministerStore, Protocol):
    """A whole store. `MemoryStore` is its specification; the stores on databases are compared with it."""
