"""Store operations for Headrace's own remote processes: `POST /v1/store/{verb}` in MessagePack.

Each operation works as on the store itself, but within the environment of the API key: batches of other environments
are not found, and a lease is settled only with its token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from headrace.core.span import LOST
from headrace.foundation.access import Access
from headrace.foundation.errors import Conflict, InvalidInput, NotFound
from headrace.http.requests.error_responses import UnsupportedType
from headrace.http.requests.lease_tokens import LeaseTokens
from headrace.http.requests.long_poll import RemoteWork, check_session
from headrace.http.requests.request_body import parse_int, read_body
from headrace.http.requests.service import RequestContext, Service
from headrace.http.v1.chunk_validation import (
    check_chunk,
    check_object_key,
    check_schedules,
    validated_batch,
    validated_serving,
    validated_tick,
)
from headrace.runtime.tasks.bounds import check_name, check_text
from headrace.store.protocol import Heartbeat, Lease
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
        "stalled_lanes",
        "start_session",
        "end_session",
        "keep_schedules",
        "tick",
    )
)
"""Operations that get the server's time as `now_us`."""

OPERATION_ACCESS: Final = {
    operation.name: Access(
        credential="key",
        scopes=tuple(operation.scope.split("|")),
        body_bytes_max=operation.bytes_max,
        is_metered="work" not in operation.scope.split("|") and operation.name != "append",
    )
    for operation in OPERATIONS.values()
}
"""Access to each operation."""
ACCESS: Final = Access(
    credential="key",
    scopes=tuple(sorted({scope for access in OPERATION_ACCESS.values() for scope in access.scopes})),
    body_bytes_max=max(operation.bytes_max for operation in OPERATIONS.values()),
)
"""Access to the route; `perform` narrows it to that of the operation."""
_DECODERS: Final = {name: decoder(verb.request) for name, verb in OPERATIONS.items()}


class StoreRpc:
    """Endpoints of `/v1/store` and `/v1/objects`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lease_tokens = LeaseTokens(service)
        self._remote_work = RemoteWork(service)
        self._special: dict[str, Callable[[RequestContext, Any], Awaitable[Any]]] = {
            "heartbeat": self._heartbeat,
            "unwanted_runs": self._unwanted_runs,
            "settle": self._settle,
            "release": self._release,
        }

    async def about(self, request: Request) -> Response:
        """`GET /v1/about`: return the environment of the API key, the server's version and its time."""
        context = await self._service.authorize(request)
        about = ServerInfo(
            environment=context.environment, now_us=context.engine.clock.now_us(), version=version("headrace")
        )
        return Response(msgspec.json.encode(about), media_type="application/json")

    async def perform(self, request: Request) -> Response:
        """`POST /v1/store/{verb}`: perform a store operation."""
        verb = OPERATIONS.get(request.path_params["verb"])
        if verb is None:
            raise NotFound(f"unknown store operation {request.path_params['verb'][:60]!r}")
        context = await self._service.authorize(request, narrowed=OPERATION_ACCESS[verb.name])
        if CONTENT_TYPE not in request.headers.get("content-type", ""):
            raise UnsupportedType(f"expected a message of type {CONTENT_TYPE}")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise UnsupportedType("expected an uncompressed message", hint="send it without content-encoding")
        body = await read_body(request, self._service.limits)
        try:
            message = _DECODERS[verb.name].decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"expected a {verb.name} message, got one that can't be decoded: {error}") from None
        if verb.name == "claim":
            wait_s = parse_int(request.query_params.get("wait"), 0, "wait", 0, 30)
            check_session(message.claim.session_id)
            leases = self._remote_work.claim(context, message.claim, wait_s)
            first = await anext(leases)  # an invalid claim fails here, before the status line is sent
            return StreamingResponse(self._claim(context, first, leases), media_type=CONTENT_TYPE)
        if verb.name in self._special:
            answer = await self._special[verb.name](context, message)
        else:
            answer = await self._call_store(context, verb.name, message)
        return Response(encode(answer), media_type=CONTENT_TYPE)

    # -- operations passed on to the store, restricted to one environment

    async def _call_store(self, context: RequestContext, name: str, message: Any) -> Any:
        values = {field: getattr(message, field) for field in message.__struct_fields__}
        await self._restrict(context, name, values)
        if name == "append":
            await self._service.spend_runs(
                context.request, context.environment, sum(chunk.runs_count for chunk in message.chunks)
            )
        if name == "tick":
            await self._service.spend_runs(context.request, context.environment, len(message.tick.runs))
        if name in _TIMED:
            values["now_us"] = context.engine.clock.now_us()
        if name == "end_session":
            values["owner"] = context.owner
        answer = await getattr(context.engine.store, name)(**values)
        if name == "create_batch" and answer[0].environment != context.environment:
            raise Conflict("a batch of another environment has this id", batch_id=answer[0].id)
        if name in ("append", "redrive") or (name == "tick" and answer.is_ours):
            context.engine.wakeup.notify()
        elif name in ("seal", "stop_batch", "cancel_runs"):
            context.engine.recorded.notify()
            if name != "seal":
                context.engine.cancelled.notify()
        return answer

    async def _restrict(self, context: RequestContext, name: str, values: dict[str, Any]) -> None:
        """Restrict an operation to the client's environment and to the store's bounds. Raises `NotFound`,
        `InvalidInput`.
        """
        if values.get("batch_id"):
            await context.get_batch(values["batch_id"])
        elif "batch_id" in values and name not in ("runs", "stalled_lanes"):
            raise NotFound("expected a batch id, got none")
        if "environment" in values:
            values["environment"] = context.environment
        if "session_id" in values:
            check_session(values["session_id"])
        for field in ("limit", "runs_max", "ranges_max"):
            if field in values and not 0 < values[field] <= LIST_MAX:
                raise InvalidInput(f"expected {field} from 1 to {LIST_MAX}, got {values[field]}")
        if len(values.get("batch_ids", ())) > LIST_MAX:
            raise InvalidInput(f"expected at most {LIST_MAX} batch ids, got {len(values['batch_ids'])}")
        if len(values.get("runs", ())) > LIST_MAX or len(values.get("value", b"")) > RULES_BYTES_MAX:
            raise InvalidInput(f"expected at most {LIST_MAX} runs and {RULES_BYTES_MAX} bytes of rules")
        self._validate_new_data(context, name, values)

    def _validate_new_data(self, context: RequestContext, name: str, values: dict[str, Any]) -> None:
        """Validate the new data of an operation: complete, bounded, of this environment. Raises `InvalidInput`."""
        limits = self._service.limits
        if name == "create_batch":
            values["new"] = validated_batch(context, limits, values["new"])
        elif name == "append":
            for chunk in values["chunks"]:
                check_chunk(context, limits, values["batch_id"], chunk)
        elif name == "keep_schedules":
            check_name("app", values["app"])
            check_schedules(values["schedules"])
        elif name == "tick":
            values["tick"] = validated_tick(context, limits, values["tick"])
        elif name == "start_session":
            session = values["session"]
            check_session(session.id)
            values["session"] = msgspec.structs.replace(
                session,
                kind=check_text("kind", session.kind[:20]),
                host=check_text("host", session.host[:200]),
                serves=validated_serving(context, session.serves),
                **context.owner._asdict(),
            )

    # -- leases

    async def _claim(
        self, context: RequestContext, first: list[Lease] | None, rest: AsyncIterator[list[Lease] | None]
    ) -> AsyncIterator[bytes]:
        key = await self._lease_tokens.signing_key(context)
        leases = first
        while leases is None:
            yield BEAT
            leases = await anext(rest)
        yield encode(
            [LeaseWithToken(lease, self._lease_tokens.sign(key, lease.span_id, lease.token)) for lease in leases]
        )

    async def _heartbeat(self, context: RequestContext, message: Any) -> HeartbeatWithTokens:
        check_session(message.session_id)
        now_us = context.engine.clock.now_us()
        reply = await context.engine.store.heartbeat(message.session_id, now_us=now_us, owner=context.owner)
        key = await self._lease_tokens.signing_key(context)
        return HeartbeatWithTokens(
            reply, [self._lease_tokens.sign(key, held.span_id, held.token) for held in reply.leases]
        )

    async def _unwanted_runs(self, context: RequestContext, message: Any) -> Heartbeat:
        params = context.request.query_params
        return await self._remote_work.unwanted_runs(
            context,
            check_session(message.session_id),
            seen=parse_int(params.get("seen"), 0, "seen", 0, 2**32),
            wait_s=parse_int(params.get("wait"), 0, "wait", 0, 30),
        )

    async def _settle(self, context: RequestContext, message: SettleRequest) -> list[str]:
        if len(message.settlements) != len(message.tickets):
            raise InvalidInput(
                f"expected a token for each of {len(message.settlements)} settlements, got {len(message.tickets)}"
            )
        for settlement in message.settlements:
            for object_key in settlement.object_keys:
                check_object_key(context, "", object_key)
        return await self._with_valid_tokens(
            context, message.settlements, message.tickets, lambda leases: self._remote_work.settle(context, leases)
        )

    async def _release(self, context: RequestContext, message: ReleaseRequest) -> list[str]:
        if len(message.releases) != len(message.tickets):
            raise InvalidInput(
                f"expected a token for each of {len(message.releases)} releases, got {len(message.tickets)}"
            )
        return await self._with_valid_tokens(
            context, message.releases, message.tickets, lambda leases: self._remote_work.release(context, leases)
        )

    async def _with_valid_tokens(
        self,
        context: RequestContext,
        items: Sequence[Any],
        tokens: Sequence[bytes],
        operation: Callable[[list[Any]], Awaitable[list[str]]],
    ) -> list[str]:
        """Apply `operation` to the items whose tokens are valid. The others are answered with `lost`."""
        key = await self._lease_tokens.signing_key(context)
        valid = [
            self._lease_tokens.verify(key, item.span_id, item.token, token)
            for item, token in zip(items, tokens, strict=True)
        ]
        words = iter(await operation([item for item, is_valid in zip(items, valid, strict=True) if is_valid]))
        return [next(words) if is_valid else LOST for is_valid in valid]

    # -- objects

    async def put_object(self, request: Request) -> Response:
        """`PUT /v1/objects/{key}`: store a payload or result that exceeds the inline limit."""
        context = await self._service.authorize(request)
        key = check_object_key(context, "", request.path_params["key"])
        await context.engine.payloads.put(key, await read_body(request, self._service.limits))
        return Response(status_code=204)

    async def get_object(self, request: Request) -> Response:
        """`GET /v1/objects/{key}`: return a stored payload or result."""
        context = await self._service.authorize(request)
        key = check_object_key(context, "", request.path_params["key"])
        return Response(await context.engine.payloads.get(key), media_type="application/octet-stream")
