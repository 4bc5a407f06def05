"""`RemoteStore`: the seam kept by a server far away, one request a verb.

Everything that stands on a store (apps, handles, maps, workers) works over it as it is. Upkeep, recovery and keys
belong to whoever keeps the store: here they do nothing, or are refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NoReturn

import msgspec

from headrace.core.admission import Bucket, Spent
from headrace.core.batch import Batch, Ledger
from headrace.core.block import Chunk
from headrace.core.span import Settlement
from headrace.foundation.errors import ClientFault, StoreBroken, StoreUnavailable
from headrace.foundation.limits import Limits
from headrace.remote.connection import REQUEST_S, Connection
from headrace.store.payloads import PayloadStore
from headrace.store.protocol import (
    ApiKey,
    Appended,
    Claim,
    DeadLetter,
    Heartbeat,
    Lease,
    NamedLease,
    NewBatch,
    Outcome,
    Pruned,
    QueueView,
    Release,
    RunRecord,
    Schedule,
    Session,
    Suspects,
    Swept,
    Tick,
    Ticked,
    Verification,
)
from headrace.store.rpc import (
    BEAT,
    CONTENT_TYPE,
    VERBS,
    About,
    Beaten,
    GiveBack,
    Leased,
    Settle,
    decoder,
    encode,
    parts_of,
)

ATTEMPTS: Final = 3
"""Repeats of a verb whose answer was lost; whoever waits longer does so by itself."""

WAIT_S: Final = 10
TICKETS_MAX: Final = 200_000
_HEADERS: Final = {"content-type": CONTENT_TYPE}


@cache
def _answers(name: str) -> msgspec.msgpack.Decoder[Any]:
    return decoder(VERBS[name].answer)


class RemoteStore:
    """One environment of a server: that of the key."""

    def __init__(self, connection: Connection, limits: Limits, *, wait_s: int = WAIT_S) -> None:
        """`wait_s`: how long a claim waits at the server for work."""
        self.connection = connection
        self.about: About | None = None
        self._limits = limits
        self._wait_s = wait_s
        self._tickets: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._is_open = False

    async def open(self) -> None:
        """Ask who this key is. Raises `StoreUnavailable`, `ClientFault` for a key nobody knows."""
        answer = await self.connection.ask("GET", "/v1/about", attempts=ATTEMPTS)
        try:
            self.about = msgspec.json.decode(answer.body, type=About)
        except msgspec.DecodeError as error:
            raise StoreBroken("what answers there is no Headrace server", url=self.connection.url) from error
        self._is_open = True

    async def close(self) -> None:
        """Ask no more."""
        self._is_open = False

    async def check(self) -> dict[str, object]:
        """A round trip, and who answers."""
        answer = await self.connection.ask("GET", "/v1/about", attempts=1)
        about = msgspec.json.decode(answer.body, type=About)
        return {
            "store": "remote",
            "url": self.connection.url,
            "environment": about.environment,
            "version": about.version,
        }

    async def _ask(self, verb: str, message: Any = None, /, *, wait_s: int = 0, **values: Any) -> Any:
        if not self._is_open:
            raise StoreUnavailable("the store is closed")
        body = encode(VERBS[verb].request(**values) if message is None else message)
        path = f"/v1/store/{verb}" + (f"?wait={wait_s}" if wait_s else "")
        answer = await self.connection.ask(
            "POST", path, body, _HEADERS, attempts=ATTEMPTS, timeout_s=REQUEST_S + wait_s
        )
        try:
            return _answers(verb).decode(answer.body.lstrip(BEAT) if wait_s else answer.body)
        except msgspec.DecodeError as error:
            raise StoreBroken(
                f"the server's answer to {verb} can't be read: {error}", url=self.connection.url
            ) from error

    # -- batches

    async def create_batch(self, new: NewBatch, *, now_us: int) -> tuple[Batch, bool]:
        """Open a batch, or answer the one its key names."""
        del now_us
        found: tuple[Batch, bool] = await self._ask("create_batch", new=new)
        return found

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None, seals: bool = False
    ) -> Appended:
        """Make runs durable, each index once; the cursor goes with the last of them."""
        del now_us
        told = Appended(accepted_count=0, duplicates_count=0, conflicts=[], existing={})
        parts = parts_of(chunks, [len(chunk.items) + 1_024 for chunk in chunks])
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            own: Appended = await self._ask(
                "append",
                batch_id=batch_id,
                chunks=part,
                cursor=cursor if is_last else None,
                seals=seals and is_last,
            )
            told.accepted_count += own.accepted_count
            told.duplicates_count += own.duplicates_count
            told.conflicts += own.conflicts
            told.existing |= own.existing
            told.sealed = own.sealed
        return told

    async def seal(self, batch_id: str, expected_count: int | None, *, now_us: int) -> Batch:
        """Close the batch."""
        del now_us
        found: Batch = await self._ask("seal", batch_id=batch_id, expected_count=expected_count)
        return found

    async def stop_batch(self, batch_id: str, state: str, *, now_us: int) -> Batch:
        """Move to `cancelled` or `abandoned`."""
        del now_us
        found: Batch = await self._ask("stop_batch", batch_id=batch_id, state=state)
        return found

    async def cancel_runs(self, batch_id: str, indexes: Sequence[int], *, now_us: int) -> int:
        """Cancel single runs."""
        del now_us
        count: int = await self._ask("cancel_runs", batch_id=batch_id, indexes=list(indexes))
        return count

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None) -> int:
        """Run again what failed."""
        count: int = await self._ask("redrive", batch_id=batch_id, indexes=indexes)
        return count

    # -- sessions and work

    async def start_session(self, session: Session, *, now_us: int) -> None:
        """Make a process known."""
        del now_us
        await self._ask("start_session", session=session)

    async def heartbeat(self, session_id: str, *, now_us: int) -> Heartbeat:
        """A sign of life."""
        del now_us
        beaten: Beaten = await self._ask("heartbeat", session_id=session_id)
        for held, ticket in zip(beaten.heartbeat.leases, beaten.tickets, strict=True):
            self._keep(held.span_id, held.token, ticket)
        return beaten.heartbeat

    async def end_session(self, session_id: str, *, now_us: int) -> None:
        """Leave in good order."""
        del now_us
        await self._ask("end_session", session_id=session_id)

    async def sessions(self) -> list[Session]:
        """None that are this process's business."""
        return []

    async def recover(
        self, session_id: str, suspects: Suspects, *, silent_since_us: int, crashes_max: int, now_us: int
    ) -> int:
        """The server does that."""
        del session_id, suspects, silent_since_us, crashes_max, now_us
        return 0

    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease spans; the server waits a while for some."""
        del now_us
        found: list[Leased] = await self._ask("claim", wait_s=self._wait_s, claim=claim)
        for leased in found:
            self._keep(leased.lease.span_id, leased.lease.token, leased.ticket)
        return [leased.lease for leased in found]

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes, in as many requests as their size asks for."""
        del now_us
        words: list[str] = []
        for part in parts_of(settlements, [len(one.results) + len(one.codes) + 256 for one in settlements]):
            if part:
                tickets = [self._tickets.get((one.span_id, one.token), b"") for one in part]
                words += await self._ask("settle", Settle(settlements=part, tickets=tickets))
        return words

    async def release(self, releases: Sequence[Release], *, crashes_max: int, now_us: int) -> list[str]:
        """Give leases back."""
        del crashes_max, now_us
        tickets = [self._tickets.get((one.span_id, one.token), b"") for one in releases]
        words: list[str] = await self._ask("release", GiveBack(releases=list(releases), tickets=tickets))
        return words

    def _keep(self, span_id: int, token: int, ticket: bytes) -> None:
        self._tickets[span_id, token] = ticket
        self._tickets.move_to_end((span_id, token))
        if len(self._tickets) > TICKETS_MAX:
            self._tickets.popitem(last=False)

    # -- reading

    async def batch(self, batch_id: str) -> tuple[Batch, Ledger]:
        """One batch and its ledger."""
        found: tuple[Batch, Ledger] = await self._ask("batch", batch_id=batch_id)
        return found

    async def find_batch(self, environment: str, key: str) -> Batch | None:
        """The batch that a key names."""
        found: Batch | None = await self._ask("find_batch", environment=environment, key=key)
        return found

    async def batches(
        self, environment: str, *, states: Sequence[str] | None = None, before_id: str = "", limit: int = 50
    ) -> list[tuple[Batch, Ledger]]:
        """Batches, newest first."""
        found: list[tuple[Batch, Ledger]] = await self._ask(
            "batches", environment=environment, states=states, before_id=before_id, limit=limit
        )
        return found

    async def missing(self, batch_id: str, ranges_max: int) -> list[tuple[int, int]]:
        """Ranges of announced indexes that are not durable yet."""
        found: list[tuple[int, int]] = await self._ask("missing", batch_id=batch_id, ranges_max=ranges_max)
        return found

    async def outcomes(self, batch_id: str, from_index: int, runs_max: int, *, passing: bool = False) -> list[Outcome]:
        """Final outcomes in index order."""
        found: list[Outcome] = await self._ask(
            "outcomes", batch_id=batch_id, from_index=from_index, runs_max=runs_max, passing=passing
        )
        return found

    async def run(self, batch_id: str, index: int) -> RunRecord:
        """One run."""
        found: RunRecord = await self._ask("run", batch_id=batch_id, index=index)
        return found

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
        """Runs that match."""
        found: list[RunRecord] = await self._ask(
            "runs",
            environment=environment,
            batch_id=batch_id,
            state=state,
            task=task,
            tag=tag,
            after=after,
            limit=limit,
        )
        return found

    async def queues(self, environment: str) -> list[QueueView]:
        """The queues that were ever used or paused."""
        found: list[QueueView] = await self._ask("queues", environment=environment)
        return found

    async def pause_queue(self, environment: str, name: str, *, paused: bool) -> None:
        """Stop or go on handing out a queue's runs."""
        await self._ask("pause_queue", environment=environment, name=name, paused=paused)

    async def dead_letters(
        self, environment: str, *, queue: str = "", before_us: int = 0, after: DeadLetter | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """Dead letters, oldest first."""
        found: list[DeadLetter] = await self._ask(
            "dead_letters", environment=environment, queue=queue, before_us=before_us, after=after, limit=limit
        )
        return found

    async def purge_dead(self, environment: str, runs: Sequence[tuple[str, int]]) -> int:
        """Let dead letters be as other failed runs."""
        found: int = await self._ask("purge_dead", environment=environment, runs=list(runs))
        return found

    async def rules(self, environment: str) -> dict[str, bytes]:
        """What people decided, by name."""
        found: dict[str, bytes] = await self._ask("rules", environment=environment)
        return found

    async def keep_rules(self, environment: str, name: str, value: bytes, *, before: bytes | None) -> bool:
        """Decide anew, unless others did meanwhile."""
        kept: bool = await self._ask("keep_rules", environment=environment, name=name, value=value, before=before)
        return kept

    async def verify(self, batch_id: str) -> Verification:
        """Count a batch from its chunks."""
        found: Verification = await self._ask("verify", batch_id=batch_id)
        return found

    async def next_due_us(self, environment: str, tasks: Sequence[str]) -> int | None:
        """When the next delayed span becomes claimable."""
        found: int | None = await self._ask("next_due_us", environment=environment, tasks=list(tasks))
        return found

    async def keep_schedules(
        self, environment: str, app: str, schedules: Sequence[Schedule], *, now_us: int
    ) -> list[Schedule]:
        """Make the schedules of an app known."""
        del now_us
        found: list[Schedule] = await self._ask(
            "keep_schedules", environment=environment, app=app, schedules=list(schedules)
        )
        return found

    async def tick(self, environment: str, tick: Tick, *, now_us: int) -> Ticked:
        """Enqueue the runs of ticks, once."""
        del now_us
        found: Ticked = await self._ask("tick", environment=environment, tick=tick)
        return found

    async def schedules(self, environment: str) -> list[Schedule]:
        """The schedules that were ever known."""
        found: list[Schedule] = await self._ask("schedules", environment=environment)
        return found

    # -- what belongs to whoever keeps the store

    async def duties(self) -> dict[str, int]:
        """None of them is this process's."""
        return {}

    async def take_duty(self, name: str, holder: str, *, free_us: int, now_us: int) -> bool:
        """The server does them."""
        del name, holder, free_us, now_us
        return False

    async def end_duty(self, name: str, holder: str, *, free_us: int) -> None:
        """The server does them."""
        del name, holder, free_us

    async def sweep(self, *, now_us: int, rows_max: int) -> Swept:
        """The server does that."""
        del now_us, rows_max
        return Swept()

    async def prune(self, finished_before_us: int, *, batches_max: int, rows_max: int) -> Pruned:
        """Refused: what a server keeps is the server's to delete."""
        del finished_before_us, batches_max, rows_max
        _refuse("delete batches")

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        """The server knows."""
        del keys
        return []

    async def move_waiting(self, environment: str, task: str, source: str, target: str, *, spans_max: int) -> int:
        """The server does that."""
        del environment, task, source, target, spans_max
        return 0

    async def size_bytes(self) -> int:
        """The server knows, and keeps its own bounds."""
        return 0

    async def named_leases(self, environment: str, task: str, keys: Sequence[str]) -> list[NamedLease]:
        """Refused: a lease of the server's own is the server's to settle."""
        del environment, task, keys
        _refuse("look at leases by key")

    async def add_key(self, key: ApiKey, *, now_us: int) -> None:
        """Refused."""
        del key, now_us
        _refuse("make keys")

    async def find_key(self, digest: str) -> ApiKey | None:
        """Refused."""
        del digest
        _refuse("look at keys")

    async def keys(self, environment: str) -> list[ApiKey]:
        """Refused."""
        del environment
        _refuse("look at keys")

    async def revoke_key(self, environment: str, key_id: str, *, now_us: int) -> bool:
        """Refused."""
        del environment, key_id, now_us
        _refuse("revoke keys")

    async def signing_key(self, environment: str, offered: bytes) -> bytes:
        """Refused."""
        del environment, offered
        _refuse("sign for the server")

    async def spend(self, environment: str, name: str, bucket: Bucket, cost: int, *, now_us: int) -> Spent:
        """Refused."""
        del environment, name, bucket, cost, now_us
        _refuse("spend for the server")


class RemotePayloads(PayloadStore):
    """Payloads and results over the inline limit, kept by the server beside its store."""

    def __init__(self, connection: Connection) -> None:
        from obstore.store import MemoryStore

        super().__init__(MemoryStore(), url=connection.url)
        self._connection = connection

    async def put(self, key: str, data: bytes) -> None:
        """Store a payload durably under its key."""
        await self._connection.ask("PUT", f"/v1/objects/{key}", data, attempts=ATTEMPTS)

    async def get(self, key: str) -> bytes:
        """The bytes under a key, checked there."""
        answer = await self._connection.retried(
            lambda: self._connection.once("GET", f"/v1/objects/{key}"), attempts=ATTEMPTS
        )
        return answer.body

    async def check(self) -> None:
        """The server looks after its own."""


def _refuse(what: str) -> NoReturn:
    raise ClientFault(f"a server's client can't {what}", hint="run the command where the store is")
