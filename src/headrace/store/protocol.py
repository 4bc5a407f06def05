"""The seam: what the rest of Headrace asks of a store, in about twenty verbs.

Every verb is one transaction: it happens whole or not at all, and its answer comes after the commit. Time is an
argument (`now_us`, microseconds UTC); no store looks at a clock. Verbs answer with what really happened, so that
repeating one after a lost answer is always safe. Errors: `ClientFault` changed nothing and will not work again;
`StoreUnavailable` changed nothing and may work later; `SessionEnded` means start a new session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, Protocol

import msgspec

from headrace.core.admission import Bucket, Spent
from headrace.core.batch import Batch, Ledger
from headrace.core.block import Chunk, Extra
from headrace.core.span import Settlement

WORK: Final = "work"
"""News: work was appended, came due or came back."""
RECORDED: Final = "recorded"
"""News: outcomes were recorded, or a batch moved on without one."""


class NewBatch(msgspec.Struct, kw_only=True):
    """A batch to create. With a `key`, the same key answers the same batch in its environment."""

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
    """What an append did: how many runs are new, how many were durable before, and what did not fit.

    `conflicts`: indexes sent again with other content; the first content stands. `existing`: runs whose
    idempotency key already names a run, by index: `(batch_id, index)` of that run. `sealed`: the batch, when this
    append closed it.
    """

    accepted_count: int
    duplicates_count: int
    conflicts: list[int] = []
    existing: dict[int, tuple[str, int]] = {}
    sealed: Batch | None = None


class Session(msgspec.Struct, kw_only=True):
    """A live process. `kind` is worker, producer or cli; `host` and `pid` are for people."""

    id: str
    kind: str
    host: str
    pid: int
    started_us: int
    heartbeat_us: int = 0
    ended_us: int = 0


class Claim(msgspec.Struct, kw_only=True):
    """A wish for work: at most `runs_max` runs of these tasks, best first.

    `claim_no` counts this session's claims: repeated after a lost answer it returns the same spans. `queues` is
    None for all queues, or for all whose names begin with `queue_prefix`.
    """

    session_id: str
    claim_no: int
    environment: str
    tasks: Sequence[str]
    queues: Sequence[str] | None
    runs_max: int
    queue_prefix: str = ""


class Lease(msgspec.Struct, kw_only=True):
    """One claimed span with the inputs of its runs: run it, then settle or release it under `token`.

    `places` are the span's runs to run, `positions` where they are in the block, `indexes` in the batch, all in
    the same order as `payloads`; `kinds` is None when all payloads are JSON. `extras` is by place.
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


class Held(NamedTuple):
    """A lease as the store knows it, for a session to compare with its own memory."""

    span_id: int
    token: int
    claim_no: int


class Heartbeat(msgspec.Struct, kw_only=True):
    """The answer to a sign of life. `stopped` and `cancelled` tell which leased work nobody wants any more.

    `database_us`: the time of the machine that the database runs on; 0 when that is this one.
    """

    leases: list[Held]
    stopped: list[str]
    cancelled: list[tuple[str, int]]
    database_us: int = 0


class Release(msgspec.Struct, kw_only=True):
    """A lease given back. `suspects`: places that had started in a worker that died; empty in good order.

    With `places` only those runs go back, which nobody has begun, and the lease goes on with the others.
    """

    span_id: int
    token: int
    span_slots: tuple[int, ...] | None = None
    suspects: tuple[int, ...] = ()
    evidence: str = ""


class Suspects(msgspec.Struct, kw_only=True):
    """What a dead session left: `places` by (span id, token), or None when nothing of it is known."""

    span_slots: dict[tuple[int, int], tuple[int, ...]] | None
    evidence: str


class Outcome(msgspec.Struct, kw_only=True):
    """How one run stands. `result` is a result, a failure or empty; `kind` as in `headrace.core.pack`."""

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


class QueueView(msgspec.Struct, kw_only=True):
    """One queue as it stands: runs that wait, are delayed or leased, and the age of the oldest that waits."""

    name: str
    environment: str
    paused: bool
    waiting_count: int
    delayed_count: int
    leased_count: int
    oldest_us: int


class NamedLease(msgspec.Struct, kw_only=True):
    """Where a run is under way that an idempotency key names: its place in a leased span, and its last note."""

    key: str
    span_id: int
    token: int
    span_slot: int
    attempt: int
    at_most_once: bool
    note: str
    extra: Extra


class DeadLetter(msgspec.Struct, kw_only=True):
    """A run that failed for good and is kept for a person to look at. `died_us`: when it did."""

    batch_id: str
    index: int
    queue: str
    task: str
    died_us: int


class Verification(msgspec.Struct, kw_only=True):
    """The ledger of one batch counted from its chunks, and every difference from its counters."""

    batch_id: str
    ledger: Ledger
    differences: list[str]


class Swept(msgspec.Struct, kw_only=True):
    """What one bounded round of upkeep moved on."""

    expired_count: int = 0
    abandoned: list[str] = []
    cancelled_count: int = 0
    more: bool = False


class Pruned(msgspec.Struct, kw_only=True):
    """Batches deleted (with their objects still to delete), and whether more are due."""

    batches: list[tuple[str, str]]
    more: bool


class ApiKey(msgspec.Struct, kw_only=True):
    """A key of an environment: what it may do, and never the key itself. `digest` is the SHA-256 of the key."""

    id: str
    environment: str
    digest: str
    scopes: tuple[str, ...]
    name: str = ""
    created_us: int = 0
    revoked_us: int = 0


class Schedule(msgspec.Struct, kw_only=True):
    """What enqueues a run of a task at its ticks. `expression` and `zone` as in `headrace.core.schedule`.

    `last_us`: up to where its ticks are dealt with, which only goes forward. `ticked_us`: the last tick that became a
    run; 0 for none. `gone_us`: since when the code of `app` has no such schedule any more; 0 while it has.
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
    """The ticks of a schedule after `last_us` up to `until_us`, as the runs they come to; none passes them over."""

    name: str
    expression: str
    zone: str
    last_us: int
    until_us: int
    runs: list[tuple[NewBatch, Chunk]]


class Ticked(NamedTuple):
    """Whether the runs of a tick were enqueued by this call, and the schedule as it stands after it."""

    is_ours: bool
    schedule: Schedule | None


class Store(Protocol):
    """Where batches live. Two kinds of houses: `MemoryStore` is the specification, the others keep their word."""

    async def open(self) -> None:
        """Connect, and bring an empty database to the current schema. Raises `StoreBroken` on a newer one."""

    async def close(self) -> None:
        """Finish what was asked for and let go; a second close does nothing."""

    async def check(self) -> dict[str, object]:
        """A round trip and the settings that durability hangs on, by name."""

    # batches
    async def create_batch(self, new: NewBatch, *, now_us: int) -> tuple[Batch, bool]:
        """Open a batch, or answer the one its key names: `(batch, created)`."""

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None, seals: bool = False
    ) -> Appended:
        """Make runs durable, each index once. `cursor` is kept with them: where their source stood after them.

        `seals` closes the batch when all that it announced is there then, with the runs' own transaction if it can.
        Takes a re-stream of anything, alone or beside another stream of the batch, and adds nothing twice.
        Raises `Conflict` on a cancelled or abandoned batch, `InvalidInput` for an index outside it.
        """

    async def seal(self, batch_id: str, expected_count: int | None, *, now_us: int) -> Batch:
        """Close the batch; completes it when its runs have all ended. Raises `Conflict` while any is missing."""

    async def stop_batch(self, batch_id: str, state: str, *, now_us: int) -> Batch:
        """Move to `cancelled` or `abandoned`: what waits is cancelled, what is leased may still end."""

    async def cancel_runs(self, batch_id: str, indexes: Sequence[int], *, now_us: int) -> int:
        """Cancel single runs: those that wait at once, those leased when their worker hears of it."""

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None) -> int:
        """Run again what failed (all of it), or what ended badly at `indexes`; answers how many."""

    # sessions
    async def start_session(self, session: Session, *, now_us: int) -> None:
        """Make a process known."""

    async def heartbeat(self, session_id: str, *, now_us: int) -> Heartbeat:
        """A sign of life. Raises `SessionEnded` when others took the session for dead."""

    async def end_session(self, session_id: str, *, now_us: int) -> None:
        """Leave in good order: leases go back as they were, its stream is sealed. Repeating does nothing."""

    async def sessions(self) -> list[Session]:
        """The sessions that have not ended."""

    async def recover(
        self, session_id: str, suspects: Suspects, *, silent_since_us: int, crashes_max: int, now_us: int
    ) -> int:
        """End a session that fell silent before `silent_since_us`, once, and give its leases back.

        Answers how many spans came back; 0 when it lives, or when another was first.
        """

    # work
    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease spans to a live session. Raises `SessionEnded`."""

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes: `settled`, `recorded` (a repeat) or `lost` (a stale token) for each, in order."""

    async def release(self, releases: Sequence[Release], *, crashes_max: int, now_us: int) -> list[str]:
        """Give leases back before their runs ended: `settled` or `lost` for each."""

    # reading
    async def batch(self, batch_id: str) -> tuple[Batch, Ledger]:
        """One batch and its ledger. Raises `NotFound`."""

    async def find_batch(self, environment: str, key: str) -> Batch | None:
        """The batch that a key names."""

    async def batches(
        self, environment: str, *, states: Sequence[str] | None = None, before_id: str = "", limit: int = 50
    ) -> list[tuple[Batch, Ledger]]:
        """Batches, newest first; `before_id` continues a list."""

    async def missing(self, batch_id: str, ranges_max: int) -> list[tuple[int, int]]:
        """Half-open ranges of announced indexes that are not durable yet."""

    async def outcomes(self, batch_id: str, from_index: int, runs_max: int, *, passing: bool = False) -> list[Outcome]:
        """Consecutive final outcomes from `from_index` on, in index order; it stops at the first run not final.

        An index without a run (only streams have gaps) is passed over. `passing`: so are runs that are not final; of a
        batch it is then the `runs_max` indexes from the first on that are looked at.
        """

    async def run(self, batch_id: str, index: int) -> RunRecord:
        """One run. Raises `NotFound`."""

    async def runs(
        self,
        environment: str,
        *,
        batch_id: str = "",
        state: str = "",
        task: str = "",
        tag: str = "",
        after: tuple[str, int] | None = None,
        limit: int = 50,
    ) -> list[RunRecord]:
        """Runs that match, newest batch first and by index inside it, without payloads and attempts.

        `after`, the batch and index of a run, continues a list behind it.
        """

    async def queues(self, environment: str) -> list[QueueView]:
        """The queues that were ever used or paused."""

    async def pause_queue(self, environment: str, name: str, *, paused: bool) -> None:
        """Stop or go on handing out a queue's runs."""

    async def named_leases(self, environment: str, task: str, keys: Sequence[str]) -> list[NamedLease]:
        """Where the runs that these keys name are under way; those that are not are left out."""

    async def dead_letters(
        self, environment: str, *, queue: str = "", before_us: int = 0, after: DeadLetter | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """The dead letters of an environment, oldest first; those that died before a moment, when one is given.

        `after` continues a list. They are taken off it by `redrive` and by `purge_dead`.
        """

    async def purge_dead(self, environment: str, runs: Sequence[tuple[str, int]]) -> int:
        """Let dead letters be as the other failed runs of their batches; answers how many were some."""

    async def rules(self, environment: str) -> dict[str, bytes]:
        """What people decided about an environment's work, by name: see `headrace.core.rules`."""

    async def keep_rules(self, environment: str, name: str, value: bytes, *, before: bytes | None) -> bool:
        """Decide anew; False, and nothing changes, when others did since `before` was read (None: there was nothing).

        A repeat of what was decided is True.
        """

    async def move_waiting(self, environment: str, task: str, source: str, target: str, *, spans_max: int) -> int:
        """Let what waits of a task in one queue wait in another, a bounded step; answers how many spans moved."""

    async def size_bytes(self) -> int:
        """How much room the store takes where it is."""

    async def verify(self, batch_id: str) -> Verification:
        """Count a batch from its chunks and compare with its counters, results and received set."""

    # upkeep
    async def duties(self) -> dict[str, int]:
        """When each duty of upkeep is free to be taken, of those that ever were."""

    async def take_duty(self, name: str, holder: str, *, free_us: int, now_us: int) -> bool:
        """Take a duty that nobody does now: it is the holder's until `free_us`. False when another was first."""

    async def end_duty(self, name: str, holder: str, *, free_us: int) -> None:
        """The holder has done a duty, which is due again at `free_us`. Nothing when it is another's by now."""

    async def sweep(self, *, now_us: int, rows_max: int) -> Swept:
        """Expire, abandon and cancel what is due, at most about `rows_max` spans."""

    async def prune(self, finished_before_us: int, *, batches_max: int, rows_max: int) -> Pruned:
        """Delete batches that finished before then, whole, in bounded steps."""

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        """Those of these object keys that no row names."""

    async def next_due_us(self, environment: str, tasks: Sequence[str]) -> int | None:
        """When the next delayed span becomes claimable; None when none is delayed."""

    # schedules
    async def keep_schedules(
        self, environment: str, app: str, schedules: Sequence[Schedule], *, now_us: int
    ) -> list[Schedule]:
        """Make the schedules of an app known, all there are: its others are gone. Answers them as they stand.

        One that is new, has another expression or zone, or comes back, begins now; one that is known goes on where it
        stands.
        """

    async def tick(self, environment: str, tick: Tick, *, now_us: int) -> Ticked:
        """Enqueue the runs of ticks, in the transaction that moves the schedule on from `last_us`; else nothing.

        Nothing happens when it stands elsewhere (another process was first, or this call is a repeat) or is another
        schedule by now. Raises `Conflict` when a batch has the id of one of the runs already.
        """

    async def schedules(self, environment: str) -> list[Schedule]:
        """The schedules that were ever known, by name; those that are gone too."""

    # who may come in
    async def add_key(self, key: ApiKey, *, now_us: int) -> None:
        """Let a key in from now on. Raises `Conflict` when its id or digest is taken."""

    async def find_key(self, digest: str) -> ApiKey | None:
        """The key of this digest, also one that was revoked."""

    async def keys(self, environment: str) -> list[ApiKey]:
        """The keys of an environment, oldest first, revoked ones too."""

    async def revoke_key(self, environment: str, key_id: str, *, now_us: int) -> bool:
        """Let a key in no more; True when that changed anything. Raises `NotFound`."""

    async def signing_key(self, environment: str, offered: bytes) -> bytes:
        """What an environment signs its tokens with: `offered` for the first who asks, and the same for all others."""

    async def spend(self, environment: str, name: str, bucket: Bucket, cost: int, *, now_us: int) -> Spent:
        """Take tokens from a bucket of an environment, or nothing."""


class Notifier(Protocol):
    """News between the processes on one store, each a word: told after a commit, coalesced, waited for by nobody.

    Best effort: any of it may be late, doubled or lost, so whoever waits looks at the store from time to time all the
    same. Every method belongs to the event loop that waits; telling costs it nothing while news is on its way.
    """

    def listen(self, news: str, notify_local: Callable[[], None]) -> None:
        """Call `notify_local` when another process told `news`, or may have."""

    def tell(self, news: str) -> None:
        """Let the others know, soon."""

    def awaited(self) -> AbstractContextManager[object]:
        """While the block lasts somebody here waits for news."""

    async def close(self) -> None:
        """Send what is still to be told, if that is quick, and let go; a second close does nothing."""
