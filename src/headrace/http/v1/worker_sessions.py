"""Work for workers of any language: sessions, claims, settlements, as JSON.

A session lives while it beats. A claim leases runs to it, and waits for some when asked to; a lease is settled under
its name, in one request or in several, and the answer comes after the commit. A name no longer known is `lost`:
somebody else has those runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Raw
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from headrace.core import pack, run
from headrace.core.failure import Failure
from headrace.core.span import LOST, RETRY, Settlement, encode_uint16s
from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import new_session_id, run_id
from headrace.http.requests.error_responses import json_response
from headrace.http.requests.item_codec import InvalidItem, ItemDecoder, ItemOptions, parse_time_us
from headrace.http.requests.lease_tokens import LeaseTokens
from headrace.http.requests.long_poll import RUNS_MAX, RemoteWork, check_session
from headrace.http.requests.request_body import decode_body
from headrace.http.requests.serializers import iso_time, json_value
from headrace.http.requests.service import RequestContext, Service
from headrace.store.protocol import Claim, Lease, Release, Session
from headrace.store.rpc import BYTES_MAX

WAIT_S_MAX: Final = 30
_Name = Annotated[str, Meta(min_length=1, max_length=200)]
_Lease = Annotated[str, Meta(min_length=1, max_length=128)]


class NewSession(msgspec.Struct, forbid_unknown_fields=True):
    """A worker becomes known."""

    host: Annotated[str, Meta(max_length=200)] = ""
    pid: Annotated[int, Meta(ge=0, le=2**31)] = 0


class NewClaim(msgspec.Struct, forbid_unknown_fields=True):
    """A wish for work. The same `claim_no` answers the same leases: repeat it after a lost answer."""

    session: _Name
    claim_no: Annotated[int, Meta(ge=0, le=2**53)]
    tasks: Annotated[list[_Name], Meta(min_length=1, max_length=10_000)]
    queues: Annotated[list[_Name], Meta(min_length=1, max_length=10_000)] | None = None
    runs_max: Annotated[int, Meta(ge=1, le=RUNS_MAX)] = 1
    wait_s: Annotated[float, Meta(ge=0, le=WAIT_S_MAX)] = 0


class Error(msgspec.Struct):
    """Why an attempt failed."""

    type: Annotated[str, Meta(max_length=200)] = "Error"
    message: Annotated[str, Meta(max_length=8_000)] = ""
    trace: Annotated[str, Meta(max_length=8_000)] = ""


class Ended(msgspec.Struct, forbid_unknown_fields=True):
    """How one run of a lease ended. `retry_at` of a failed one: it runs again then, a date or a duration."""

    place: Annotated[int, Meta(ge=0, lt=65_536)]
    state: Literal["completed", "failed", "cancelled"]
    output: Raw = Raw(b"null")
    error: Error | None = None
    retry_at: Annotated[str, Meta(max_length=64)] | None = None


class NewSettlement(msgspec.Struct, forbid_unknown_fields=True):
    """Outcomes of some runs of a lease. `part_no` counts a lease's settlements, so that a repeat is known as one."""

    lease: _Lease
    outcomes: Annotated[list[Ended], Meta(min_length=1, max_length=4_096)]
    part_no: Annotated[int, Meta(ge=0, le=2**31)] = 0


class Settlements(msgspec.Struct, forbid_unknown_fields=True):
    """Many settlements in one transaction."""

    settlements: Annotated[list[NewSettlement], Meta(min_length=1, max_length=1_000)]


class Releases(msgspec.Struct, forbid_unknown_fields=True):
    """Leases given back before their runs began."""

    leases: Annotated[list[_Lease], Meta(min_length=1, max_length=1_000)]


class NewRun(msgspec.Struct, forbid_unknown_fields=True):
    """One run, asked for by itself."""

    payload: Raw = Raw(b"null")
    options: ItemOptions | None = None


class Work:
    """The endpoints of `/v1/sessions`, `/v1/claims`, `/v1/settlements` and `/v1/tasks`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._remote_work = RemoteWork(service)
        self._lease_tokens = LeaseTokens(service)

    async def enqueue(self, request: Request) -> Response:
        """`POST /v1/tasks/{task}/runs`: one run; answers the one its idempotency key names, if there is one."""
        service = self._service
        call = await service.authorize(request, "runs:write")
        wish = await decode_body(request, service.limits, NewRun, bytes_max=service.limits.item_bytes_max)
        decoder = ItemDecoder(
            defaults=service.default_key,
            limits=service.limits,
            now_us=call.engine.clock.now_us(),
            may_run=lambda _task: None,
            fetched=lambda name: service.packets.fetched(
                call.environment, name, bytes_max=service.limits.packet_bytes_max
            ),
        )
        entry = decoder.entry(request.path_params["task"], wish.payload, wish.options)
        payload, kind = entry.payload, entry.kind
        if kind == pack.REFERENCE:
            payload, kind = await decoder.fetched(payload)
        batch_id, index = await service.producer(call).put(entry.key, payload, kind, entry.extra)
        return json_response({"id": run_id(batch_id, index)}, 201)

    async def start(self, request: Request) -> Response:
        """`POST /v1/sessions`: a worker becomes known, and beats from now on."""
        call = await self._service.authorize(request, "work")
        wish = await decode_body(request, self._service.limits, NewSession)
        now_us, limits = call.engine.clock.now_us(), self._service.limits
        session = Session(id=new_session_id(now_us), kind="remote", host=wish.host, pid=wish.pid, started_us=now_us)
        await call.engine.store.start_session(session, now_us=now_us)
        body = {
            "id": session.id,
            "heartbeat_ms": limits.heartbeat_ms,
            "session_timeout_ms": limits.session_timeout_ms,
        }
        return json_response(body, 201)

    async def beat(self, request: Request) -> Response:
        """`POST /v1/sessions/{id}/heartbeat`: a sign of life; answers what is leased and what nobody wants any more."""
        call = await self._service.authorize(request, "work")
        session_id = check_session(request.path_params["session_id"])
        reply = await call.engine.store.heartbeat(session_id, now_us=call.engine.clock.now_us())
        key = await self._lease_tokens.signing_key(call)
        body = {
            "leases": [
                {"lease": self._lease_tokens.encode(key, held.span_id, held.token), "claim_no": held.claim_no}
                for held in reply.leases
            ],
            "stopped": reply.stopped,
            "cancelled": [run_id(batch_id, index) for batch_id, index in reply.cancelled],
        }
        return json_response(body)

    async def end(self, request: Request) -> Response:
        """`DELETE /v1/sessions/{id}`: leave in good order; leases go back."""
        call = await self._service.authorize(request, "work")
        session_id = check_session(request.path_params["session_id"])
        await call.engine.store.end_session(session_id, now_us=call.engine.clock.now_us())
        call.engine.wakeup.notify()
        return Response(status_code=204)

    async def claim(self, request: Request) -> Response:
        """`POST /v1/claims`: lease runs, waiting up to `wait_s` for some; blanks before the answer only say: alive."""
        call = await self._service.authorize(request, "work")
        wish = await decode_body(request, self._service.limits, NewClaim)
        claim = Claim(
            session_id=check_session(wish.session),
            claim_no=wish.claim_no,
            environment=call.environment,
            tasks=wish.tasks,
            queues=wish.queues,
            runs_max=wish.runs_max,
        )
        found = self._remote_work.claim(call, claim, wish.wait_s)
        first = await anext(found)  # what is wrong with a claim is said with its status
        return StreamingResponse(self._leases(call, first, found), media_type="application/json")

    async def _leases(
        self, call: RequestContext, first: list[Lease] | None, rest: AsyncIterator[list[Lease] | None]
    ) -> AsyncIterator[bytes]:
        key = await self._lease_tokens.signing_key(call)
        found = first
        while found is None:
            yield b" "
            found = await anext(rest)
        shown = [await self._lease(call, key, lease) for lease in found]
        yield msgspec.json.encode({"leases": shown})

    async def _lease(self, call: RequestContext, key: bytes, lease: Lease) -> dict[str, Any]:
        runs = []
        for number_, place in enumerate(lease.span_slots):
            payload, kind = lease.payloads[number_], lease.kinds[number_] if lease.kinds is not None else pack.JSON
            if kind == pack.REFERENCE:
                payload, kind = await call.engine.fetch(payload)
            extra = lease.extras.get(place)
            index = lease.indexes[number_]
            shown: dict[str, Any] = {
                "place": place,
                "index": index,
                "id": run_id(lease.batch_id, index),
                "payload": json_value(payload, kind),
            }
            if extra is not None and extra.headers:
                shown["headers"] = extra.headers
            runs.append(shown)
        return {
            "lease": self._lease_tokens.encode(key, lease.span_id, lease.token),
            "batch_id": lease.batch_id,
            "task": lease.task,
            "queue": lease.queue,
            "attempt": lease.attempt,
            "at_most_once": lease.at_most_once,
            "expires_at": iso_time(lease.expires_us),
            "runs": runs,
        }

    async def settle(self, request: Request) -> Response:
        """`POST /v1/settlements`: record outcomes: `settled`, `recorded` (a repeat) or `lost` for each, in order."""
        call = await self._service.authorize(request, "work")
        wish = await decode_body(request, self._service.limits, Settlements, bytes_max=BYTES_MAX)
        key = await self._lease_tokens.signing_key(call)
        known: list[Settlement] = []
        is_known: list[bool] = []
        for one in wish.settlements:
            named = self._lease_tokens.decode(key, one.lease)
            is_known.append(named is not None)
            if named is not None:
                known.append(await self._settlement(call, named, one))
        words = iter(await self._remote_work.settle(call, known))
        return json_response({"words": [next(words) if is_good else LOST for is_good in is_known]})

    async def _settlement(self, call: RequestContext, named: tuple[int, int], one: NewSettlement) -> Settlement:
        outcomes = sorted(one.outcomes, key=lambda ended: ended.place)
        if len({ended.place for ended in outcomes}) != len(outcomes):
            raise InvalidInput("a settlement tells of each run once", lease=one.lease)
        codes, results, dues = bytearray(), [], []
        now_us = call.engine.clock.now_us()
        for ended in outcomes:
            codes.append(run.BY_NAME[ended.state])
            output = bytes(ended.output)
            if ended.state == "failed":
                told = ended.error or Error()
                output = Failure(type=told.type, message=told.message, trace=told.trace).encode()
                if ended.retry_at is not None:
                    codes[-1] = RETRY
                    dues.append(_due_us(ended.retry_at, now_us))
            elif ended.state == "cancelled":
                output = b""
            if len(output) >= self._service.limits.inline_bytes_max:
                raise InvalidInput(
                    f"an output has fewer than {self._service.limits.inline_bytes_max} bytes here",
                    hint="put it where your caller finds it, and return that",
                )
            results.append(output)
        return Settlement(
            span_id=named[0],
            token=named[1],
            part_no=one.part_no,
            span_slots=encode_uint16s(ended.place for ended in outcomes),
            codes=bytes(codes),
            results=pack.pack(results),
            dues_us=tuple(dues),
        )

    async def release(self, request: Request) -> Response:
        """`POST /v1/releases`: give leases back as they were."""
        call = await self._service.authorize(request, "work")
        wish = await decode_body(request, self._service.limits, Releases)
        key = await self._lease_tokens.signing_key(call)
        named = [self._lease_tokens.decode(key, lease) for lease in wish.leases]
        known = [Release(span_id=one[0], token=one[1]) for one in named if one is not None]
        words = iter(await self._remote_work.release(call, known))
        return json_response({"words": [LOST if one is None else next(words) for one in named]})


def _due_us(text: str, now_us: int) -> int:
    try:
        return parse_time_us("retry_at", text, now_us)
    except InvalidItem as error:
        raise InvalidInput(error.message) from None
