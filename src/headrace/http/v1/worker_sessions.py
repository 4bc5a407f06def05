"""JSON API for workers in any language: sessions, claims, settlements.

A session stays alive by heartbeats. A claim leases runs to it, and may wait for some. A lease is settled by its token,
in one request or in several; the response follows the commit. A token that is no longer valid is answered with `lost`:
the runs may have been leased to another worker.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from headrace.core import pack, run
from headrace.core.failure import Failure
from headrace.core.serving import CLAIMS_DECIDE, Serving
from headrace.core.span import LOST, RETRY, Settlement, encode_uint16s
from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import new_session_id, run_id
from headrace.http.requests.error_responses import json_response
from headrace.http.requests.item_codec import HttpItemDecoder, InvalidItem, ItemOptions, parse_time_us
from headrace.http.requests.lease_tokens import LeaseTokens
from headrace.http.requests.long_poll import RUNS_MAX, RemoteWork, check_session
from headrace.http.requests.request_body import decode_body, parse_int
from headrace.http.requests.serializers import iso_time, json_value
from headrace.http.requests.service import RequestContext, Service
from headrace.runtime.sessions.cancel_watch import digest_of
from headrace.runtime.tasks.bounds import check_name, check_text
from headrace.store.protocol import Claim, Lease, Release, Session

WAIT_S_MAX: Final = 30
_Name = Annotated[str, Meta(min_length=1, max_length=200)]
_Lease = Annotated[str, Meta(min_length=1, max_length=128)]


class SessionBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/sessions`. `tasks` and `queues`: those that the worker will claim; default: as it claims."""

    host: Annotated[str, Meta(max_length=200)] = ""
    pid: Annotated[int, Meta(ge=0, le=2**31)] = 0
    tasks: Annotated[list[_Name], Meta(max_length=1_000)] | None = None
    queues: Annotated[list[_Name], Meta(max_length=1_000)] | None = None


class ClaimBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/claims`. The same `claim_no` returns the same leases: repeat it after a lost response."""

    session: _Name
    claim_no: Annotated[int, Meta(ge=0, le=2**53)]
    tasks: Annotated[list[_Name], Meta(min_length=1, max_length=10_000)]
    queues: Annotated[list[_Name], Meta(min_length=1, max_length=10_000)] | None = None
    runs_max: Annotated[int, Meta(ge=1, le=RUNS_MAX)] = 1
    wait_s: Annotated[float, Meta(ge=0, le=WAIT_S_MAX)] = 0


class AttemptError(msgspec.Struct):
    """Error of a failed attempt."""

    type: Annotated[str, Meta(max_length=200)] = "Error"
    message: Annotated[str, Meta(max_length=8_000)] = ""
    trace: Annotated[str, Meta(max_length=8_000)] = ""


class RunOutcomeBody(msgspec.Struct, forbid_unknown_fields=True):
    """Outcome of one run of a lease. With `retry_at`, a date or a duration, a failed run is attempted again then."""

    place: Annotated[int, Meta(ge=0, lt=65_536)]
    state: Literal["completed", "failed", "cancelled"]
    output: Raw | UnsetType = UNSET
    error: AttemptError | None = None
    retry_at: Annotated[str, Meta(max_length=64)] | None = None


class SettlementBody(msgspec.Struct, forbid_unknown_fields=True):
    """Outcomes of some runs of a lease. `part_no` numbers the lease's settlements, so that a repeat is recognised."""

    lease: _Lease
    outcomes: Annotated[list[RunOutcomeBody], Meta(min_length=1, max_length=4_096)]
    part_no: Annotated[int, Meta(ge=0, le=2**31)] = 0


class SettlementsBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/settlements`: settlements to record in one transaction."""

    settlements: Annotated[list[SettlementBody], Meta(min_length=1, max_length=1_000)]


class ReleasesBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/releases`: leases to release before their runs have started."""

    leases: Annotated[list[_Lease], Meta(min_length=1, max_length=1_000)]


class RunBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/tasks/{task}/runs`: a single run."""

    payload: Raw | UnsetType = UNSET
    options: ItemOptions | None = None


class RunIdResponse(msgspec.Struct):
    """Id of a run."""

    id: str


class SessionResponse(msgspec.Struct):
    """A session. The worker sends a heartbeat every `heartbeat_ms`; without any for `session_timeout_ms` it ends."""

    id: str
    heartbeat_ms: int
    session_timeout_ms: int


class SessionLease(msgspec.Struct):
    """A lease of a session, and the claim that it came from."""

    lease: str
    claim_no: int


class HeartbeatResponse(msgspec.Struct):
    """Leases of a session. `stopped`: batches that were cancelled or abandoned; `cancelled`: ids of cancelled runs."""

    leases: list[SessionLease]
    stopped: list[str]
    cancelled: list[str]


class ClaimedRun(msgspec.Struct):
    """A run of a lease. `place` names it in settlements."""

    place: int
    index: int
    id: str
    payload: Any
    headers: dict[str, str] | UnsetType = UNSET


class ClaimedLease(msgspec.Struct):
    """Runs of one task, leased together. `lease` is the token that settles or releases them."""

    lease: str
    batch_id: str
    task: str
    queue: str
    attempt: int
    at_most_once: bool
    expires_at: str | None
    runs: list[ClaimedRun]


class ClaimResponse(msgspec.Struct):
    """Leases of a claim; none if there was no work."""

    leases: list[ClaimedLease]


class WordsResponse(msgspec.Struct):
    """Results in the order of the request: `settled`, `recorded` for a repeat, `lost` for an invalid lease."""

    words: list[str]


class WorkerSessions:
    """Endpoints of `/v1/sessions`, `/v1/claims`, `/v1/settlements`, `/v1/releases` and `/v1/tasks`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._remote_work = RemoteWork(service)
        self._lease_tokens = LeaseTokens(service)

    async def enqueue(self, request: Request) -> Response:
        """`POST /v1/tasks/{task}/runs`: enqueue one run. If its idempotency key names a run, that run is returned."""
        service = self._service
        context = await service.authorize(request)
        params = await decode_body(request, service.limits, RunBody)
        decoder = HttpItemDecoder(
            defaults=service.default_key,
            limits=service.limits,
            now_us=context.engine.clock.now_us(),
            may_run=lambda _task: None,
            fetched=lambda name: service.packets.fetched(
                context.environment, name, bytes_max=service.limits.packet_bytes_max
            ),
        )
        entry = decoder.entry(request.path_params["task"], params.payload, params.options)
        payload, kind = entry.payload, entry.kind
        if kind == pack.REFERENCE:
            payload, kind = await decoder.fetched(payload)
        batch_id, index = await service.producer(context).put(entry.key, payload, kind, entry.extra)
        return json_response(RunIdResponse(run_id(batch_id, index)), 201)

    async def start(self, request: Request) -> Response:
        """`POST /v1/sessions`: start a worker's session. It must send heartbeats from now on."""
        context = await self._service.authorize(request)
        params = await decode_body(request, self._service.limits, SessionBody)
        check_text("host", params.host)
        for task in params.tasks or ():
            check_name("tasks", task)
        for queue in params.queues or ():
            check_name("queues", queue)
        now_us, limits = context.engine.clock.now_us(), self._service.limits
        session = Session(
            id=new_session_id(now_us),
            kind="remote",
            host=params.host,
            pid=params.pid,
            started_us=now_us,
            serves=Serving(
                environment=context.environment,
                tasks=CLAIMS_DECIDE.tasks if params.tasks is None else tuple(params.tasks),
                queues=_queues_of(params),
            ),
            **context.owner._asdict(),
        )
        await context.engine.store.start_session(session, now_us=now_us)
        return json_response(SessionResponse(session.id, limits.heartbeat_ms, limits.session_timeout_ms), 201)

    async def heartbeat(self, request: Request) -> Response:
        """`POST /v1/sessions/{id}/heartbeat`: keep a session alive. Returns its leases and cancelled runs.

        With `wait_s` and no cancelled run, the response comes when a run is cancelled, or after that time, at most
        `heartbeat_ms` later: then the next heartbeat is due.
        """
        context = await self._service.authorize(request)
        session_id = check_session(request.path_params["session_id"])
        wait_s = parse_int(request.query_params.get("wait_s"), 0, "wait_s", 0, WAIT_S_MAX)
        now_us = context.engine.clock.now_us()
        reply = await context.engine.store.heartbeat(session_id, now_us=now_us, owner=context.owner)
        if wait_s and not reply.stopped and not reply.cancelled:
            reply = await self._remote_work.unwanted_runs(
                context,
                session_id,
                seen=digest_of(reply),
                wait_s=min(wait_s, self._service.limits.heartbeat_ms / 1_000),
            )
        key = await self._lease_tokens.signing_key(context)
        response = HeartbeatResponse(
            leases=[
                SessionLease(self._lease_tokens.encode(key, held.span_id, held.token), held.claim_no)
                for held in reply.leases
            ],
            stopped=reply.stopped,
            cancelled=[run_id(batch_id, index) for batch_id, index in reply.cancelled],
        )
        return json_response(response)

    async def end(self, request: Request) -> Response:
        """`DELETE /v1/sessions/{id}`: end a session and release its leases."""
        context = await self._service.authorize(request)
        session_id = check_session(request.path_params["session_id"])
        now_us = context.engine.clock.now_us()
        await context.engine.store.end_session(session_id, now_us=now_us, owner=context.owner)
        context.engine.wakeup.notify()
        return Response(status_code=204)

    async def claim(self, request: Request) -> Response:
        """`POST /v1/claims`: lease runs, waiting up to `wait_s` for some.

        Blanks before the response keep the connection alive.
        """
        context = await self._service.authorize(request)
        params = await decode_body(request, self._service.limits, ClaimBody)
        claim = Claim(
            session_id=check_session(params.session),
            claim_no=params.claim_no,
            environment=context.environment,
            tasks=params.tasks,
            queues=params.queues,
            runs_max=params.runs_max,
        )
        bytes_max = self._service.limits.claim_bytes_max
        leases = self._remote_work.claim(context, claim, params.wait_s, bytes_max=bytes_max, states_lanes=True)
        first = await anext(leases)  # an invalid claim fails here, before the status line is sent
        return StreamingResponse(self._leases(context, first, leases), media_type="application/json")

    async def _leases(
        self, context: RequestContext, first: list[Lease] | None, rest: AsyncIterator[list[Lease] | None]
    ) -> AsyncIterator[bytes]:
        key = await self._lease_tokens.signing_key(context)
        leases = first
        while leases is None:
            yield b" "
            leases = await anext(rest)
        yield msgspec.json.encode(ClaimResponse([await self._lease(context, key, lease) for lease in leases]))

    async def _lease(self, context: RequestContext, key: bytes, lease: Lease) -> ClaimedLease:
        runs = []
        for lease_offset, place in enumerate(lease.span_slots):
            payload = lease.payloads[lease_offset]
            kind = lease.kinds[lease_offset] if lease.kinds is not None else pack.JSON
            if kind == pack.REFERENCE:
                payload, kind = await context.engine.fetch(payload)
            extra = lease.extras.get(place)
            index = lease.indexes[lease_offset]
            headers = extra.headers if extra is not None and extra.headers else UNSET
            runs.append(ClaimedRun(place, index, run_id(lease.batch_id, index), json_value(payload, kind), headers))
        return ClaimedLease(
            lease=self._lease_tokens.encode(key, lease.span_id, lease.token),
            batch_id=lease.batch_id,
            task=lease.task,
            queue=lease.queue,
            attempt=lease.attempt,
            at_most_once=lease.at_most_once,
            expires_at=iso_time(lease.expires_us),
            runs=runs,
        )

    async def settle(self, request: Request) -> Response:
        """`POST /v1/settlements`: record outcomes. Returns `settled`, `recorded` (a repeat) or `lost` for each."""
        context = await self._service.authorize(request)
        params = await decode_body(request, self._service.limits, SettlementsBody)
        key = await self._lease_tokens.signing_key(context)
        valid: list[Settlement] = []
        is_valid: list[bool] = []
        for settlement in params.settlements:
            lease = self._lease_tokens.decode(key, settlement.lease)
            is_valid.append(lease is not None)
            if lease is not None:
                valid.append(await self._settlement(context, lease, settlement))
        words = iter(await self._remote_work.settle(context, valid))
        return json_response(WordsResponse([next(words) if is_valid_lease else LOST for is_valid_lease in is_valid]))

    async def _settlement(self, context: RequestContext, lease: tuple[int, int], body: SettlementBody) -> Settlement:
        outcomes = sorted(body.outcomes, key=lambda outcome: outcome.place)
        if len({outcome.place for outcome in outcomes}) != len(outcomes):
            raise InvalidInput("expected each run of a settlement once", lease=body.lease)
        codes, results, dues = bytearray(), [], []
        now_us = context.engine.clock.now_us()
        for outcome in outcomes:
            codes.append(run.BY_NAME[outcome.state])
            output = bytes(outcome.output) if isinstance(outcome.output, Raw) else b"null"
            if outcome.state == "failed":
                error = outcome.error or AttemptError()
                output = Failure(type=error.type, message=error.message, trace=error.trace).encode()
                if outcome.retry_at is not None:
                    codes[-1] = RETRY
                    dues.append(_due_us(outcome.retry_at, now_us))
            elif outcome.state == "cancelled":
                output = b""
            bytes_max = self._service.limits.inline_bytes_max
            if len(output) >= bytes_max:
                raise InvalidInput(
                    f"expected an output of fewer than {bytes_max} bytes, got {len(output)}",
                    hint="store the output elsewhere and return a reference to it",
                )
            results.append(output)
        return Settlement(
            span_id=lease[0],
            token=lease[1],
            part_no=body.part_no,
            span_slots=encode_uint16s(outcome.place for outcome in outcomes),
            codes=bytes(codes),
            results=pack.pack(results),
            dues_us=tuple(dues),
        )

    async def release(self, request: Request) -> Response:
        """`POST /v1/releases`: release leases, whose runs then wait again."""
        context = await self._service.authorize(request)
        params = await decode_body(request, self._service.limits, ReleasesBody)
        key = await self._lease_tokens.signing_key(context)
        leases = [self._lease_tokens.decode(key, lease) for lease in params.leases]
        valid = [Release(span_id=lease[0], token=lease[1]) for lease in leases if lease is not None]
        words = iter(await self._remote_work.release(context, valid))
        return json_response(WordsResponse([LOST if lease is None else next(words) for lease in leases]))


def _queues_of(params: SessionBody) -> tuple[str, ...] | None:
    """Return the queues of a session. A worker that names its tasks only claims from all queues."""
    if params.queues is not None:
        return tuple(params.queues)
    return CLAIMS_DECIDE.queues if params.tasks is None else None


def _due_us(text: str, now_us: int) -> int:
    try:
        return parse_time_us("retry_at", text, now_us)
    except InvalidItem as error:
        raise InvalidInput(error.message) from None
