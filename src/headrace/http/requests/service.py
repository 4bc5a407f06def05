"""What every endpoint shares: the engine, who is let in, how fast, and whether the house is closing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

from starlette.requests import Request

from headrace.core.admission import Bucket
from headrace.core.batch import Batch, Ledger
from headrace.core.span import Key
from headrace.foundation.errors import HeadraceError, InvalidInput, NotFound
from headrace.foundation.ids import check_batch_id
from headrace.http.requests.auth import Doorkeeper, Principal
from headrace.http.requests.error_responses import Busy, Throttled
from headrace.http.requests.metrics import Metrics
from headrace.runtime.engine import Engine
from headrace.runtime.maintenance.upkeep import Upkeep
from headrace.runtime.producing.producer import Producer
from headrace.runtime.tasks.task_registry import Registry
from headrace.store.client_uploads import Packets

CHECK_S: Final = 2.0
MINUTE_US: Final = 60_000_000
QUEUES_EACH_US: Final = 5_000_000
QUEUES_S: Final = 2.0
LEFT: Final = "headrace.rate"
"""Where a request keeps the rate headers of its answer."""


@dataclass(slots=True)
class Caller:
    """Who asks, by whatever door, and the engine as their environment sees it."""

    principal: Principal
    engine: Engine

    @property
    def environment(self) -> str:
        """The tenant that asks."""
        return self.principal.environment


@dataclass(slots=True)
class Call(Caller):
    """One request."""

    request: Request

    async def own_batch(self, batch_id: str) -> tuple[Batch, Ledger]:
        """A batch of this environment; that of another is not there. Raises `NotFound`."""
        try:
            batch, ledger = await self.engine.store.batch(check_batch_id(batch_id))
        except InvalidInput:
            raise NotFound("there is no such batch", batch_id=batch_id) from None
        if batch.environment != self.environment:
            raise NotFound("there is no such batch", batch_id=batch_id)
        return batch, ledger


class Service:
    """One server's side of the engine. Owned by one event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        registry: Registry | None = None,
        api_key: str | None = None,
        is_open: bool = False,
    ) -> None:
        """`registry`: tasks whose queue and priority are known here. `is_open`: nobody has to show a key."""
        self.engine = engine
        self.limits = engine.limits
        self.registry = registry
        self.doorkeeper = Doorkeeper(engine, static_key=api_key, is_open=is_open)
        self.packets = Packets(engine.payloads)
        self.metrics = Metrics(engine.duties)
        self.is_draining = False
        self.draining = asyncio.Event()
        self._deadlines: set[asyncio.Timeout] = set()
        self._producers: dict[str, Producer] = {}
        self._queues_until_us = 0

    # -- who, and how fast

    async def call(self, request: Request, scope: str, *, batch_id: str = "", is_free: bool = False) -> Call:
        """Let a request in. Raises `Unauthorized`, `Forbidden`, `Throttled`. `is_free`: no request limit counts it."""
        principal = await self.doorkeeper.admit(request.headers.get("authorization"))
        principal.check(scope, batch_id)
        if not is_free and scope != "work":
            await self.spend_request(request, principal)
        return Call(principal, self._engine_of(principal), request)

    async def call_any(self, request: Request, scopes: Sequence[str], *, is_free: bool = False) -> Call:
        """Let a request in that any of some scopes covers."""
        principal = await self.doorkeeper.admit(request.headers.get("authorization"))
        if not any(principal.may(scope) for scope in scopes):
            principal.check(scopes[0])
        if not is_free:
            await self.spend_request(request, principal)
        return Call(principal, self._engine_of(principal), request)

    async def caller(self, authorization: str | None, scope: str) -> Caller:
        """Let somebody in who made no request. Raises `Unauthorized`, `Forbidden`."""
        principal = await self.doorkeeper.admit(authorization)
        principal.check(scope)
        return Caller(principal, self._engine_of(principal))

    def signed(self, scope: str) -> Caller:
        """Whoever knows a secret of the server, in the server's own environment."""
        principal = Principal(self.engine.environment, frozenset((scope,)), "signed")
        return Caller(principal, self.engine)

    def _engine_of(self, principal: Principal) -> Engine:
        return replace(self.engine, environment=principal.environment)

    async def why_not_ready(self) -> str:
        """Why the server can't work now; empty when it can."""
        if self.is_draining:
            return "stopping"
        try:
            async with asyncio.timeout(CHECK_S):
                await self.engine.store.check()
        except (HeadraceError, TimeoutError) as error:
            return error.code if isinstance(error, HeadraceError) else "STORE_UNAVAILABLE"
        return ""

    async def spend_request(self, request: Request, principal: Principal) -> None:
        """Count a request against its environment's limit. Raises `Throttled`."""
        limits = self.limits
        if limits.requests_per_minute_max:
            bucket = Bucket(limits.requests_burst_max, max(1, MINUTE_US // limits.requests_per_minute_max))
            await self._spend(request, principal.environment, "requests", bucket, 1)

    async def spend_runs(self, request: Request, environment: str, count: int) -> None:
        """Count announced runs against their environment's limit. Raises `Throttled`."""
        limits = self.limits
        if limits.batch_runs_per_minute_max:
            bucket = Bucket(limits.batch_runs_burst_max, max(1, MINUTE_US // limits.batch_runs_per_minute_max))
            await self._spend(request, environment, "runs", bucket, count)

    async def _spend(self, request: Request, environment: str, name: str, bucket: Bucket, cost: int) -> None:
        now_us = self.engine.clock.now_us()
        spent = await self.engine.store.spend(environment, name, bucket, cost, now_us=now_us)
        reset_ms = (now_us + spent.wait_us if spent.wait_us else spent.full_us) // 1_000
        headers = {
            "x-ratelimit-limit": str(bucket.capacity),
            "x-ratelimit-remaining": str(spent.remaining),
            "x-ratelimit-reset": str(reset_ms),
        }
        request.scope[LEFT] = headers
        if not spent.is_granted:
            seconds = max(1, -(-spent.wait_us // 1_000_000))
            what = "Batch rate limit exceeded." if name == "runs" else "Rate limit exceeded."
            raise Throttled(
                f"{what} Retry in {seconds} seconds.",
                headers=headers | {"retry-after": str(seconds)},
                hint="wait, then send the same request again",
                limit=bucket.capacity,
                remaining=spent.remaining,
                reset=reset_ms,
                secondsUntilReset=seconds,
            )

    async def spend_grant(self, environment: str, batch: Batch) -> bool:
        """Whether a stream of a batch that was let in may pass the request limit, if there is one: some may."""
        if not self.limits.requests_per_minute_max:
            return True
        bucket = Bucket(self.limits.stream_grants_max, self.limits.seal_timeout_ms * 1_000)
        name = f"grant:{batch.id}"
        now_us = self.engine.clock.now_us()
        return (await self.engine.store.spend(environment, name, bucket, 1, now_us=now_us)).is_granted

    # -- streams and life

    @property
    def streams_count(self) -> int:
        """Streams that are taken in now."""
        return len(self._deadlines)

    @asynccontextmanager
    async def stream(self) -> AsyncGenerator[None, None]:
        """A place among the streams that are taken in. Raises `Busy`."""
        if self.is_draining:
            raise Busy("the server is stopping", hint="send it to another one, or again in a moment")
        if self.streams_count >= self.limits.streams_max:
            raise Busy("the server has its hands full", hint="send it again in a moment; streams_max is the bound")
        self.metrics.streams.inc()
        try:
            async with asyncio.timeout(None) as deadline:
                self._deadlines.add(deadline)
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            raise Busy("the server is stopping", hint="send what is missing to another one, or in a moment") from None
        finally:
            self._deadlines.discard(deadline)
            self.metrics.streams.dec()

    @asynccontextmanager
    async def upkeep(self) -> AsyncGenerator[None, None]:
        """Upkeep while the block lasts, for a server without a worker, whose upkeep would do."""
        rounds = asyncio.create_task(Upkeep(self.engine).run(), name="headrace-upkeep")
        try:
            yield
        finally:
            rounds.cancel()
            await asyncio.gather(rounds, return_exceptions=True)

    async def look_at_queues(self) -> None:
        """Let the metrics tell what stands in the queues, as of some seconds ago; without an answer nothing changes."""
        engine = self.engine
        now_us = engine.clock.now_us()
        if now_us < self._queues_until_us:
            return
        self._queues_until_us = now_us + QUEUES_EACH_US
        try:
            async with asyncio.timeout(QUEUES_S):
                views = await engine.store.queues(engine.environment)
        except (HeadraceError, TimeoutError):
            return
        self.metrics.depths.tell(views, names_max=self.limits.metrics_queues_max, now_us=now_us)

    def drain(self) -> None:
        """Take no new streams, and end those that wait for news; what is under way may end."""
        self.is_draining = True
        self.draining.set()

    def cut(self) -> None:
        """End the streams under way: what they brought is flushed, and their senders are told to come again."""
        now_s = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            deadline.reschedule(now_s)

    async def close(self) -> None:
        """Write what single enqueues left, and let go."""
        producers, self._producers = self._producers, {}
        for producer in producers.values():
            with suppress(HeadraceError):
                await producer.close()

    def producer(self, call: Call) -> Producer:
        """What enqueues single runs of an environment."""
        producer = self._producers.get(call.environment)
        if producer is None:
            producer = self._producers[call.environment] = Producer(call.engine)
        return producer

    def defaults(self, task: str) -> Key:
        """How runs of a task are kept unless an item says otherwise."""
        if self.registry is None or task not in self.registry:
            return Key(task)
        return self.registry.get(task).key
