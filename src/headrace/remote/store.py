"""`RemoteStore`: a store kept by a server, accessed over HTTP with one request for each operation.

Apps, handles, maps and workers use it like any store. Upkeep, recovery and API keys are the server's: here these
operations do nothing or are refused.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from functools import cache
from typing import Any, Final

import msgspec

from headrace.core.batch import BatchRecord, Ledger
from headrace.core.block import Chunk
from headrace.core.serving import Serving, StalledLane
from headrace.core.span import Settlement
from headrace.foundation.errors import ClientFault, StoreBroken, StoreUnavailable, StoreUnreachable
from headrace.foundation.limits import Limits
from headrace.remote.connection import REQUEST_S, SETTLE_S, ServerConnection
from headrace.runtime.outage import Outage
from headrace.store.payloads import PayloadStore, ReadObject, StoredObject
from headrace.store.protocol import (
    Appended,
    Claim,
    DeadLetter,
    Heartbeat,
    Lease,
    NewBatch,
    QueueView,
    Release,
    RunOutcome,
    RunRecord,
    Schedule,
    Session,
    SessionOwner,
    Tick,
    Ticked,
    Verification,
)
from headrace.store.reachability import Reachability
from headrace.store.rpc import (
    BEAT,
    CONTENT_TYPE,
    OPERATIONS,
    HeartbeatWithTokens,
    LeaseWithToken,
    ReleaseRequest,
    ServerInfo,
    SettleRequest,
    decoder,
    encode,
    parts_of,
)

ATTEMPTS: Final = 3
"""Attempts of one operation whose response was lost. Callers that can wait longer retry by themselves."""

PROBE_TIMEOUTS_S: Final = (2.0, 5.0, 15.0)
WAIT_S: Final = 10
CANCEL_WAIT_S: Final = 25
"""How long the server holds a request for cancellations."""
LEASE_TOKENS_MAX: Final = 200_000
_HEADERS: Final = {"content-type": CONTENT_TYPE}


@cache
def _response_decoder(name: str) -> msgspec.msgpack.Decoder[Any]:
    return decoder(OPERATIONS[name].answer)


class RemoteStore:
    """The part of a server's store that belongs to the API key's environment."""

    def __init__(self, connection: ServerConnection, limits: Limits, *, wait_s: int = WAIT_S) -> None:
        """`wait_s`: how long the server holds a claim that finds no work."""
        self.connection = connection
        self.about: ServerInfo | None = None
        self._limits = limits
        self._wait_s = wait_s
        self._lease_tokens: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._is_open = False
        self._probes_failed_count = 0
        self.outage = Outage(Reachability(self._probe, has_connections=True))

    async def _probe(self) -> None:
        """Ask the server whether it can reach its store. A proxy may hide that path: then any answer will do."""
        timeout_s = PROBE_TIMEOUTS_S[self._probes_failed_count % len(PROBE_TIMEOUTS_S)]
        self._probes_failed_count += 1
        response = await self.connection.send_once("GET", "/readyz", timeout_s=timeout_s)
        if response.status >= 500:
            raise StoreUnreachable(f"{self.connection.url} is not ready", url=self.connection.url)
        self._probes_failed_count = 0

    async def open(self) -> None:
        """Verify the API key. Raises `StoreUnavailable`, and `ClientFault` for an invalid key or a URL of another
        server.
        """
        response = await self.connection.ask("GET", "/v1/about", attempts=ATTEMPTS)
        try:
            self.about = msgspec.json.decode(response.body, type=ServerInfo)
        except msgspec.DecodeError as error:
            raise StoreBroken(
                f"{self.connection.url} is not a Headrace server: /v1/about returned no description of one",
                url=self.connection.url,
            ) from error
        self._is_open = True
        self.connection.follow(self.outage)

    async def close(self) -> None:
        """Close the store: later operations raise `StoreUnavailable`."""
        self._is_open = False
        await asyncio.sleep(SETTLE_S)

    async def check(self) -> dict[str, object]:
        """Measure a round trip and return the server's description."""
        response = await self.connection.ask("GET", "/v1/about", attempts=1)
        about = msgspec.json.decode(response.body, type=ServerInfo)
        return {
            "store": "remote",
            "url": self.connection.url,
            "environment": about.environment,
            "version": about.version,
        }

    async def _ask(self, verb: str, message: Any = None, /, *, wait_s: int = 0, query: str = "", **values: Any) -> Any:
        if not self._is_open:
            raise StoreUnavailable("the store is closed")
        body = encode(OPERATIONS[verb].request(**values) if message is None else message)
        path = f"/v1/store/{verb}" + (f"?wait={wait_s}{query}" if wait_s else "")
        response = await self.connection.ask(
            "POST", path, body, _HEADERS, attempts=ATTEMPTS, timeout_s=REQUEST_S + wait_s
        )
        try:
            return _response_decoder(verb).decode(response.body.lstrip(BEAT) if wait_s else response.body)
        except msgspec.DecodeError as error:
            raise StoreBroken(
                f"can't decode the server's response to {verb}: {error}", url=self.connection.url
            ) from error

    # -- batches

    async def create_batch(self, new: NewBatch, *, now_us: int) -> tuple[BatchRecord, bool]:
        """Create a batch, or return the existing one with the same key."""
        del now_us
        result: tuple[BatchRecord, bool] = await self._ask("create_batch", new=new)
        return result

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None, seals: bool = False
    ) -> Appended:
        """Store runs, each index once. The cursor is stored with the last of them."""
        del now_us
        total = Appended(accepted_count=0, duplicates_count=0, conflicts=[], existing={})
        parts = parts_of(chunks, [len(chunk.items) + 1_024 for chunk in chunks])
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            appended: Appended = await self._ask(
                "append",
                batch_id=batch_id,
                chunks=part,
                cursor=cursor if is_last else None,
                seals=seals and is_last,
            )
            total.accepted_count += appended.accepted_count
            total.duplicates_count += appended.duplicates_count
            total.conflicts += appended.conflicts
            total.existing |= appended.existing
            total.sealed = appended.sealed
        return total

    async def seal(self, batch_id: str, expected_count: int | None, *, now_us: int) -> BatchRecord:
        """Seal a batch."""
        del now_us
        result: BatchRecord = await self._ask("seal", batch_id=batch_id, expected_count=expected_count)
        return result

    async def stop_batch(self, batch_id: str, state: str, *, now_us: int) -> BatchRecord:
        """Set a batch to `cancelled` or `abandoned`."""
        del now_us
        result: BatchRecord = await self._ask("stop_batch", batch_id=batch_id, state=state)
        return result

    async def cancel_runs(self, batch_id: str, indexes: Sequence[int], *, now_us: int) -> int:
        """Cancel single runs."""
        del now_us
        count: int = await self._ask("cancel_runs", batch_id=batch_id, indexes=list(indexes))
        return count

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None) -> int:
        """Run failed runs again."""
        count: int = await self._ask("redrive", batch_id=batch_id, indexes=indexes)
        return count

    # -- sessions and work

    async def start_session(self, session: Session, *, now_us: int) -> None:
        """Start a session."""
        del now_us
        await self._ask("start_session", session=session)

    async def heartbeat(
        self, session_id: str, *, now_us: int, owner: SessionOwner | None = None, serves: Serving | None = None
    ) -> Heartbeat:
        """Keep a session alive. Returns its leases. The server knows the owner by its API key, and what it serves."""
        del now_us, owner, serves
        beaten: HeartbeatWithTokens = await self._ask("heartbeat", session_id=session_id)
        for held, lease_token in zip(beaten.heartbeat.leases, beaten.tickets, strict=True):
            self._store_token(held.span_id, held.token, lease_token)
        return beaten.heartbeat

    async def unwanted_runs(self, session_id: str, *, owner: SessionOwner | None = None) -> Heartbeat:
        """Return which runs of a session are cancelled."""
        del owner
        reply: Heartbeat = await self._ask("unwanted_runs", session_id=session_id)
        return reply

    async def next_unwanted_runs(self, session_id: str, *, seen: int) -> Heartbeat:
        """Return the same when it is not what was `seen`; the server waits for that."""
        reply: Heartbeat = await self._ask(
            "unwanted_runs", wait_s=CANCEL_WAIT_S, query=f"&seen={seen}", session_id=session_id
        )
        return reply

    async def end_session(self, session_id: str, *, now_us: int, owner: SessionOwner | None = None) -> None:
        """End a session and release its leases."""
        del now_us, owner
        await self._ask("end_session", session_id=session_id)

    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease spans. The server waits a while if there are none."""
        del now_us
        result: list[LeaseWithToken] = await self._ask("claim", wait_s=self._wait_s, claim=claim)
        for leased in result:
            self._store_token(leased.lease.span_id, leased.lease.token, leased.ticket)
        return [leased.lease for leased in result]

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes, in several requests if they are large."""
        del now_us
        words: list[str] = []
        for part in parts_of(settlements, [len(lease.results) + len(lease.codes) + 256 for lease in settlements]):
            if part:
                tokens = [self._lease_tokens.get((lease.span_id, lease.token), b"") for lease in part]
                words += await self._ask("settle", SettleRequest(settlements=part, tickets=tokens))
        return words

    async def release(self, releases: Sequence[Release], *, crashes_max: int, now_us: int) -> list[str]:
        """Release leases."""
        del crashes_max, now_us
        tokens = [self._lease_tokens.get((lease.span_id, lease.token), b"") for lease in releases]
        words: list[str] = await self._ask("release", ReleaseRequest(releases=list(releases), tickets=tokens))
        return words

    def _store_token(self, span_id: int, token: int, lease_token: bytes) -> None:
        self._lease_tokens[span_id, token] = lease_token
        self._lease_tokens.move_to_end((span_id, token))
        if len(self._lease_tokens) > LEASE_TOKENS_MAX:
            self._lease_tokens.popitem(last=False)

    # -- reading

    async def batch(self, batch_id: str) -> tuple[BatchRecord, Ledger]:
        """Return a batch and its ledger."""
        result: tuple[BatchRecord, Ledger] = await self._ask("batch", batch_id=batch_id)
        return result

    async def find_batch(self, environment: str, key: str) -> BatchRecord | None:
        """Return the batch with a key."""
        result: BatchRecord | None = await self._ask("find_batch", environment=environment, key=key)
        return result

    async def batches(
        self, environment: str, *, states: Sequence[str] | None = None, before_id: str = "", limit: int = 50
    ) -> list[tuple[BatchRecord, Ledger]]:
        """List batches, newest first."""
        result: list[tuple[BatchRecord, Ledger]] = await self._ask(
            "batches", environment=environment, states=states, before_id=before_id, limit=limit
        )
        return result

    async def missing(self, batch_id: str, ranges_max: int) -> list[tuple[int, int]]:
        """Return the announced index ranges that are not stored yet."""
        result: list[tuple[int, int]] = await self._ask("missing", batch_id=batch_id, ranges_max=ranges_max)
        return result

    async def outcomes(
        self, batch_id: str, from_index: int, runs_max: int, *, passing: bool = False
    ) -> list[RunOutcome]:
        """Return final outcomes in index order."""
        result: list[RunOutcome] = await self._ask(
            "outcomes", batch_id=batch_id, from_index=from_index, runs_max=runs_max, passing=passing
        )
        return result

    async def run(self, batch_id: str, index: int) -> RunRecord:
        """Return a run."""
        result: RunRecord = await self._ask("run", batch_id=batch_id, index=index)
        return result

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
        """List matching runs."""
        result: list[RunRecord] = await self._ask(
            "runs",
            environment=environment,
            batch_id=batch_id,
            state=state,
            task=task,
            queue=queue,
            tag=tag,
            since_us=since_us,
            after=after,
            limit=limit,
        )
        return result

    async def queues(self, environment: str) -> list[QueueView]:
        """List the queues that were ever used or paused."""
        result: list[QueueView] = await self._ask("queues", environment=environment)
        return result

    async def tasks_of_batches(self, environment: str, batch_ids: Sequence[str]) -> dict[str, list[str]]:
        """Return the tasks of the first and the last runs of some batches."""
        tasks: dict[str, list[str]] = await self._ask("tasks_of_batches", environment=environment, batch_ids=batch_ids)
        return tasks

    async def stalled_lanes(self, environment: str, *, batch_id: str = "", now_us: int) -> list[StalledLane]:
        """Return the lanes with waiting runs that no live worker takes."""
        del now_us
        lanes: list[StalledLane] = await self._ask("stalled_lanes", environment=environment, batch_id=batch_id)
        return lanes

    async def pause_queue(self, environment: str, name: str, *, paused: bool) -> None:
        """Pause or resume a queue."""
        await self._ask("pause_queue", environment=environment, name=name, paused=paused)

    async def dead_letters(
        self, environment: str, *, queue: str = "", before_us: int = 0, after: DeadLetter | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """List dead letters, oldest first."""
        result: list[DeadLetter] = await self._ask(
            "dead_letters", environment=environment, queue=queue, before_us=before_us, after=after, limit=limit
        )
        return result

    async def purge_dead(self, environment: str, runs: Sequence[tuple[str, int]]) -> int:
        """Remove runs from the dead-letter list. They remain failed runs."""
        result: int = await self._ask("purge_dead", environment=environment, runs=list(runs))
        return result

    async def rules(self, environment: str) -> dict[str, bytes]:
        """Return the stored rules by name."""
        result: dict[str, bytes] = await self._ask("rules", environment=environment)
        return result

    async def keep_rules(self, environment: str, name: str, value: bytes, *, before: bytes | None) -> bool:
        """Store rules, unless they were changed since `before` was read."""
        is_stored: bool = await self._ask("keep_rules", environment=environment, name=name, value=value, before=before)
        return is_stored

    async def verify(self, batch_id: str) -> Verification:
        """Recount a batch from its chunks."""
        result: Verification = await self._ask("verify", batch_id=batch_id)
        return result

    async def next_due_us(self, environment: str, tasks: Sequence[str]) -> int | None:
        """Return the time when the next delayed span becomes claimable."""
        result: int | None = await self._ask("next_due_us", environment=environment, tasks=list(tasks))
        return result

    async def keep_schedules(
        self, environment: str, app: str, schedules: Sequence[Schedule], *, now_us: int
    ) -> list[Schedule]:
        """Store the schedules of an app."""
        del now_us
        result: list[Schedule] = await self._ask(
            "keep_schedules", environment=environment, app=app, schedules=list(schedules)
        )
        return result

    async def tick(self, environment: str, tick: Tick, *, now_us: int) -> Ticked:
        """Enqueue the runs of a tick, once."""
        del now_us
        result: Ticked = await self._ask("tick", environment=environment, tick=tick)
        return result

    async def schedules(self, environment: str) -> list[Schedule]:
        """List the schedules ever stored."""
        result: list[Schedule] = await self._ask("schedules", environment=environment)
        return result


class RemoteObjects:
    """Objects that a server keeps. Only payloads are read and written here; the server lists and deletes them."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection

    async def write(self, key: str, data: bytes) -> None:
        """Store a payload under its key."""
        await self._connection.ask("PUT", f"/v1/objects/{key}", data, attempts=ATTEMPTS)

    async def read(self, key: str, _bytes_max: int) -> ReadObject | None:
        """Return the payload under a key; the server has its own bound. Raises `NotFound` as the server does."""
        response = await self._connection.retry(
            lambda: self._connection.send_once("GET", f"/v1/objects/{key}"), attempts=ATTEMPTS
        )
        return ReadObject(response.body)

    async def write_stream(self, _key: str, _pieces: AsyncIterator[bytes]) -> None:
        """Refuse: clients upload packets to the server itself."""
        raise _kept_by_the_server()

    async def delete(self, _keys: Sequence[str]) -> None:
        """Refuse: the server deletes objects."""
        raise _kept_by_the_server()

    def pages(self, _prefix: str, _page_objects: int) -> AsyncIterator[list[StoredObject]]:
        """Refuse: the server lists objects."""
        raise _kept_by_the_server()

    async def delete_unfinished(self, _before_us: int) -> int:
        """Refuse: the server deletes objects."""
        raise _kept_by_the_server()

    async def delete_folder(self, _prefix: str) -> None:
        """Refuse: the server deletes objects."""
        raise _kept_by_the_server()


def _kept_by_the_server() -> ClientFault:
    return ClientFault(
        "objects of a remote store can only be listed and deleted by its server", hint="run the command there"
    )


class RemotePayloads(PayloadStore):
    """Payloads and results over the inline limit, kept by a server."""

    def __init__(self, connection: ServerConnection) -> None:
        super().__init__(RemoteObjects(connection), url=connection.url)

    async def check(self) -> None:
        """Do nothing: the server checks its object store."""
