"""The seam over the network, for Headrace's own remote processes: `POST /v1/store/{verb}` in MessagePack.

Each verb does what the store does, inside the environment of the key that is shown: a batch of another is not there, a
claim finds nothing of another's, a lease is settled by whoever was given it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from headrace.core.span import LOST
from headrace.foundation.errors import Conflict, InvalidInput, NotFound
from headrace.http.requests.error_responses import UnsupportedType
from headrace.http.requests.lease_tokens import LeaseTokens
from headrace.http.requests.long_poll import RemoteWork, check_session
from headrace.http.requests.request_body import parse_int, read_body
from headrace.http.requests.service import RequestContext, Service
from headrace.http.v1.chunk_validation import check_chunk, check_own, check_schedules, checked_batch, checked_tick
from headrace.runtime.tasks.bounds import check_name
from headrace.store.protocol import Lease
from headrace.store.rpc import (
    BEAT,
    BYTES_MAX,
    CONTENT_TYPE,
    VERBS,
    About,
    Beaten,
    GiveBack,
    Leased,
    Settle,
    decoder,
    encode,
)

LIST_MAX: Final = 10_000
RULES_BYTES_MAX: Final = 256 * 1024
_TIMED: Final = frozenset(
    (
        "create_batch",
        "append",
        "seal",
        "stop_batch",
        "cancel_runs",
        "start_session",
        "end_session",
        "keep_schedules",
        "tick",
    )
)
"""Verbs that are told what time it is here."""

_DECODERS: Final = {name: decoder(verb.request) for name, verb in VERBS.items()}


class RemoteStores:
    """The endpoints of `/v1/store` and `/v1/objects`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lease_tokens = LeaseTokens(service)
        self._remote_work = RemoteWork(service)
        self._special: dict[str, Callable[[RequestContext, Any], Awaitable[Any]]] = {
            "heartbeat": self._heartbeat,
            "settle": self._settle,
            "release": self._release,
        }

    async def about(self, request: Request) -> Response:
        """`GET /v1/about`: whose key this is, and what time it is here."""
        call = await self._service.authorize_any(request, ("work", "batches:write", "batches:read", "runs:read"))
        about = About(environment=call.environment, now_us=call.engine.clock.now_us(), version=version("headrace"))
        return Response(msgspec.json.encode(about), media_type="application/json")

    async def ask(self, request: Request) -> Response:
        """`POST /v1/store/{verb}`."""
        verb = VERBS.get(request.path_params["verb"])
        if verb is None:
            raise NotFound("no such verb")
        scopes = tuple(verb.scope.split("|"))
        call = await self._service.authorize_any(request, scopes, is_free="work" in scopes or verb.name == "append")
        if CONTENT_TYPE not in request.headers.get("content-type", ""):
            raise UnsupportedType(f"a verb's message is {CONTENT_TYPE}")
        body = await read_body(request, self._service.limits, bytes_max=BYTES_MAX)
        try:
            message = _DECODERS[verb.name].decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"not a message of {verb.name}: {error}") from None
        if verb.name == "claim":
            wait_s = parse_int(request.query_params.get("wait"), 0, "wait", 0, 30)
            check_session(message.claim.session_id)
            found = self._remote_work.claim(call, message.claim, wait_s)
            first = await anext(found)  # what is wrong with a claim is said with its status
            return StreamingResponse(self._claim(call, first, found), media_type=CONTENT_TYPE)
        if verb.name in self._special:
            answer = await self._special[verb.name](call, message)
        else:
            answer = await self._plain(call, verb.name, message)
        return Response(encode(answer), media_type=CONTENT_TYPE)

    # -- verbs that are the store's own, in one environment

    async def _plain(self, call: RequestContext, name: str, message: Any) -> Any:
        values = {field: getattr(message, field) for field in message.__struct_fields__}
        await self._within(call, name, values)
        if name == "append":
            await self._service.spend_runs(
                call.request, call.environment, sum(one.runs_count for one in message.chunks)
            )
        if name == "tick":
            await self._service.spend_runs(call.request, call.environment, len(message.tick.runs))
        if name in _TIMED:
            values["now_us"] = call.engine.clock.now_us()
        answer = await getattr(call.engine.store, name)(**values)
        if name == "create_batch" and answer[0].environment != call.environment:
            raise Conflict("a batch has this id already", batch_id=answer[0].id)
        if name in ("append", "redrive") or (name == "tick" and answer.is_ours):
            call.engine.wakeup.notify()
        elif name in ("seal", "stop_batch", "cancel_runs"):
            call.engine.recorded.notify()
        return answer

    async def _within(self, call: RequestContext, name: str, values: dict[str, Any]) -> None:
        """Keep a verb to the environment that asks, and to what a store holds. Raises `NotFound`, `InvalidInput`."""
        if values.get("batch_id"):
            await call.get_batch(values["batch_id"])
        elif "batch_id" in values and name != "runs":
            raise NotFound("there is no such batch")
        if "environment" in values:
            values["environment"] = call.environment
        if "session_id" in values:
            check_session(values["session_id"])
        for field in ("limit", "runs_max", "ranges_max"):
            if field in values and not 0 < values[field] <= LIST_MAX:
                raise InvalidInput(f"{field} is from 1 to {LIST_MAX}, not {values[field]}")
        if len(values.get("runs", ())) > LIST_MAX or len(values.get("value", b"")) > RULES_BYTES_MAX:
            raise InvalidInput(f"at most {LIST_MAX} runs, and {RULES_BYTES_MAX} bytes of rules at once")
        self._check_brought(call, name, values)

    def _check_brought(self, call: RequestContext, name: str, values: dict[str, Any]) -> None:
        """What a verb brings along is whole, bounded, and this environment's. Raises `InvalidInput`."""
        limits = self._service.limits
        if name == "create_batch":
            values["new"] = checked_batch(call, limits, values["new"])
        elif name == "append":
            for chunk in values["chunks"]:
                check_chunk(call, limits, values["batch_id"], chunk)
        elif name == "keep_schedules":
            check_name("app", values["app"])
            check_schedules(values["schedules"])
        elif name == "tick":
            values["tick"] = checked_tick(call, limits, values["tick"])
        elif name == "start_session":
            session = values["session"]
            check_session(session.id)
            values["session"] = msgspec.structs.replace(session, kind=session.kind[:20], host=session.host[:200])

    # -- leases

    async def _claim(
        self, call: RequestContext, first: list[Lease] | None, rest: AsyncIterator[list[Lease] | None]
    ) -> AsyncIterator[bytes]:
        key = await self._lease_tokens.signing_key(call)
        found = first
        while found is None:
            yield BEAT
            found = await anext(rest)
        yield encode([Leased(lease, self._lease_tokens.sign(key, lease.span_id, lease.token)) for lease in found])

    async def _heartbeat(self, call: RequestContext, message: Any) -> Beaten:
        check_session(message.session_id)
        reply = await call.engine.store.heartbeat(message.session_id, now_us=call.engine.clock.now_us())
        key = await self._lease_tokens.signing_key(call)
        return Beaten(reply, [self._lease_tokens.sign(key, held.span_id, held.token) for held in reply.leases])

    async def _settle(self, call: RequestContext, message: Settle) -> list[str]:
        if len(message.settlements) != len(message.tickets):
            raise InvalidInput("each settlement has its ticket")
        for settlement in message.settlements:
            for object_key in settlement.object_keys:
                check_own(call, "", object_key)
        return await self._with_tickets(
            call, message.settlements, message.tickets, lambda found: self._remote_work.settle(call, found)
        )

    async def _release(self, call: RequestContext, message: GiveBack) -> list[str]:
        if len(message.releases) != len(message.tickets):
            raise InvalidInput("each release has its ticket")
        return await self._with_tickets(
            call, message.releases, message.tickets, lambda found: self._remote_work.release(call, found)
        )

    async def _with_tickets(
        self,
        call: RequestContext,
        items: Sequence[Any],
        tickets: Sequence[bytes],
        do: Callable[[list[Any]], Awaitable[list[str]]],
    ) -> list[str]:
        """Do it with what was given out here; the rest is lost."""
        key = await self._lease_tokens.signing_key(call)
        good = [
            self._lease_tokens.verify(key, item.span_id, item.token, ticket)
            for item, ticket in zip(items, tickets, strict=True)
        ]
        words = iter(await do([item for item, is_good in zip(items, good, strict=True) if is_good]))
        return [next(words) if is_good else LOST for is_good in good]

    # -- objects

    async def put_object(self, request: Request) -> Response:
        """`PUT /v1/objects/{key}`: a payload or result over the inline limit."""
        call = await self._service.authorize_any(request, ("work", "batches:write"), is_free=True)
        key = check_own(call, "", request.path_params["key"])
        most = self._service.limits.item_bytes_max + self._service.limits.packet_bytes_max
        await call.engine.payloads.put(key, await read_body(request, self._service.limits, bytes_max=most))
        return Response(status_code=204)

    async def get_object(self, request: Request) -> Response:
        """`GET /v1/objects/{key}`."""
        call = await self._service.authorize_any(request, ("work", "batches:read"), is_free=True)
        key = check_own(call, "", request.path_params["key"])
        return Response(await call.engine.payloads.get(key), media_type="application/octet-stream")
