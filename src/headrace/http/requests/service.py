"""State that all endpoints share: the engine, authentication, rate limits, metrics, and the shutdown of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

from starlette.requests import Request

from headrace.core.admission import Bucket, StreamShares
from headrace.core.batch import BatchRecord, Ledger
from headrace.core.span import Key
from headrace.foundation.access import Access
from headrace.foundation.errors import HeadraceError, InvalidInput, NotFound, StoreUnreachable
from headrace.foundation.ids import check_batch_id
from headrace.http.requests.auth import ANONYMOUS, Authenticator, Principal
from headrace.http.requests.browser_guard import LOOPBACK_NAMES, check_host, check_not_foreign
from headrace.http.requests.declared_access import access_of, admit, declare
from headrace.http.requests.error_responses import RETRY_AFTER_S, Busy, Forbidden, Throttled, TooManyStreams
from headrace.http.requests.metrics import Metrics
from headrace.runtime.engine import Engine
from headrace.runtime.maintenance.upkeep import Upkeep
from headrace.runtime.producing.producer import Producer
from headrace.runtime.tasks.task_registry import Registry
from headrace.store.client_uploads import ClientUploads
from headrace.store.protocol import SessionOwner

CHECK_S: Final = 2.0
MINUTE_US: Final = 60_000_000
QUEUES_EACH_US: Final = 5_000_000
QUEUES_S: Final = 2.0
FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-real-ip")
"""Headers by which a proxy names its client: its request comes from another machine."""
RATE_HEADERS: Final = "headrace.rate"
"""Key in a request's scope for the rate-limit headers of its response."""


@dataclass(slots=True)
class Caller:
    """An authenticated client, and the engine restricted to the client's environment."""

    principal: Principal
    engine: Engine

    @property
    def environment(self) -> str:
        """The client's environment."""
        return self.principal.environment

    @property
    def owner(self) -> SessionOwner:
        """The owner of the sessions that the client starts."""
        return SessionOwner(self.principal.environment, self.principal.name)


@dataclass(slots=True)
class RequestContext(Caller):
    """An authenticated HTTP request."""

    request: Request

    async def get_batch(self, batch_id: str) -> tuple[BatchRecord, Ledger]:
        """Return a batch of this environment. Raises `NotFound`, also for a batch of another environment."""
        try:
            batch, ledger = await self.engine.store.batch(check_batch_id(batch_id))
        except InvalidInput:
            raise NotFound(f"batch {batch_id[:60]!r} not found", batch_id=batch_id) from None
        if batch.environment != self.environment:
            raise NotFound(f"batch {batch_id[:60]!r} not found", batch_id=batch_id)
        return batch, ledger


class Service:
    """One server's state. Used by one event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        registry: Registry | None = None,
        api_key: str | None = None,
        is_open: bool = False,
        hosts: Sequence[str] = (),
    ) -> None:
        """`registry`: tasks whose default queue and priority apply to items. `is_open`: authentication is disabled.

        `hosts`: names of an open server, beside those of this machine.
        """
        self.engine = engine
        self.limits = engine.limits
        self.registry = registry
        self.authenticator = Authenticator(engine, static_key=api_key, is_open=is_open)
        self._hosts = LOOPBACK_NAMES.union(f"[{name}]" if _is_ipv6(name) else name.lower() for name in hosts)
        self.packets = ClientUploads(engine.payloads)
        self.metrics = Metrics(engine.duties)
        self.is_on_loopback = True
        self.is_draining = False
        self.draining = asyncio.Event()
        self._deadlines: set[asyncio.Timeout] = set()
        limits = engine.limits
        self._shares = StreamShares(places=limits.streams_max, places_each=limits.environment_streams_max)
        self._producers: dict[str, Producer] = {}
        self._queues_until_us = 0

    # -- authentication and rate limits

    async def authorize(
        self, request: Request, *, batch_id: str = "", narrowed: Access | None = None
    ) -> RequestContext:
        """Admit a request by the access declaration of its route.

        `batch_id`: the batch that a public token must name. `narrowed`: a stricter declaration. Raises
        `Unauthorized`, `Forbidden`, `TooLarge`, `Throttled`.
        """
        if narrowed is not None:
            declare(request, narrowed)
        access = access_of(request)
        principal = await self._authenticate(request)
        principal.check_any(access.scopes, batch_id)
        if access.is_of_server:
            self.check_is_of_server(principal)
        admit(request)
        if access.is_metered:
            await self.spend_request(request, principal)
        return RequestContext(principal, self._engine_of(principal), request)

    def check_is_of_server(self, principal: Principal) -> None:
        """Raise `Forbidden` for a client of another environment than the server's own."""
        if principal.environment != self.engine.environment:
            raise Forbidden(
                "the API key belongs to another environment than this server",
                hint="create a key with HEADRACE_ENVIRONMENT set as for the server",
            )

    async def authorize_off_loopback(self, request: Request) -> None:
        """Admit a request that needs a key unless it comes to a loopback address, and not through a proxy."""
        is_local = self.is_on_loopback and not any(name in request.headers for name in FORWARDED)
        self.check_host(request)
        if (is_local or self.authenticator.is_open) and "authorization" not in request.headers:
            admit(request)
        else:
            await self.authorize(request)

    async def _authenticate(self, request: Request) -> Principal:
        principal = await self.authenticator.authenticate(request.headers.get("authorization"))
        if principal.name == ANONYMOUS:
            self.check_host(request)
            check_not_foreign(request)
        return principal

    def check_host(self, request: Request) -> None:
        """Raise `WrongHost` if an open server is asked by a name that is not its own."""
        if self.authenticator.is_open:
            check_host(request, self._hosts)

    def caller(self, principal: Principal) -> Caller:
        """Return the caller of a client that sent no HTTP request."""
        return Caller(principal, self._engine_of(principal))

    def signed_caller(self, scope: str) -> Caller:
        """Return the caller of a call that was signed with a secret of the server: the server's own environment."""
        principal = Principal(self.engine.environment, frozenset((scope,)), "signed")
        return Caller(principal, self.engine)

    def _engine_of(self, principal: Principal) -> Engine:
        return replace(self.engine, environment=principal.environment)

    async def why_not_ready(self) -> str:
        """Return an error code if the server can't work now, else an empty string."""
        if self.is_draining:
            return "stopping"
        if not self.engine.outage.is_over:  # one task of this process probes, not each caller
            self.engine.outage.ensure_probing(self.engine.clock)
            return StoreUnreachable.code
        try:
            async with asyncio.timeout(CHECK_S):
                await self.engine.store.check()
        except (HeadraceError, TimeoutError) as error:
            return error.code if isinstance(error, HeadraceError) else "STORE_UNAVAILABLE"
        return ""

    async def spend_request(self, request: Request, principal: Principal) -> None:
        """Count a request against the rate limit of its environment. Raises `Throttled`."""
        limits = self.limits
        if limits.requests_per_minute_max:
            bucket = Bucket(limits.requests_burst_max, max(1, MINUTE_US // limits.requests_per_minute_max))
            await self._spend(request, principal.environment, "requests", bucket, 1)

    async def spend_runs(self, request: Request, environment: str, count: int) -> None:
        """Count the runs of a new batch against the rate limit of its environment. Raises `Throttled`."""
        limits = self.limits
        if limits.batch_runs_per_minute_max:
            bucket = Bucket(limits.batch_runs_burst_max, max(1, MINUTE_US // limits.batch_runs_per_minute_max))
            await self._spend(request, environment, "runs", bucket, count)

    async def _spend(self, request: Request, environment: str, name: str, bucket: Bucket, cost: int) -> None:
        now_us = self.engine.clock.now_us()
        spent = await self.engine.administration.spend(environment, name, bucket, cost, now_us=now_us)
        reset_ms = (now_us + spent.wait_us if spent.wait_us else spent.full_us) // 1_000
        headers = {
            "x-ratelimit-limit": str(bucket.capacity),
            "x-ratelimit-remaining": str(spent.remaining),
            "x-ratelimit-reset": str(reset_ms),
        }
        request.scope[RATE_HEADERS] = headers
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

    async def is_exempt_from_limit(self, environment: str, batch: BatchRecord) -> bool:
        """True if a stream is exempt from the request limit, as the first `stream_grants_max` of a batch are."""
        if not self.limits.requests_per_minute_max:
            return True
        bucket = Bucket(self.limits.stream_grants_max, self.limits.seal_timeout_ms * 1_000)
        name = f"grant:{batch.id}"
        now_us = self.engine.clock.now_us()
        return (await self.engine.administration.spend(environment, name, bucket, 1, now_us=now_us)).is_granted

    # -- streams and shutdown

    @property
    def streams_count(self) -> int:
        """Number of item streams in progress."""
        return len(self._deadlines)

    @asynccontextmanager
    async def stream(self, environment: str) -> AsyncGenerator[None, None]:
        """Occupy one of the places for item streams. Raises `Busy`, and `TooManyStreams` for an environment that has
        its share of them.
        """
        self._enter_stream(environment)
        self.metrics.streams.inc()
        try:
            async with asyncio.timeout(None) as deadline:
                self._deadlines.add(deadline)
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            raise Busy(
                "the server is stopping", hint="send the missing items to another server, or retry in a moment"
            ) from None
        finally:
            self._deadlines.discard(deadline)
            self._shares.leave(environment)
            self.metrics.streams.dec()

    def _enter_stream(self, environment: str) -> None:
        shares, limits = self._shares, self.limits
        if self.is_draining:
            raise Busy("the server is stopping", hint="retry, on another server or in a moment")
        if shares.is_full:
            raise Busy(
                f"the server is already receiving {limits.streams_max} streams",
                hint="retry in a moment, or raise streams_max",
            )
        if not shares.enter(environment):
            raise TooManyStreams(
                f"the environment already has {shares.held(environment)} streams to this server, its share",
                headers={"retry-after": str(RETRY_AFTER_S)},
                hint="send more items in each stream, or retry in a moment; the server's streams_max and "
                "environment_streams_max bound the share",
            )

    @asynccontextmanager
    async def upkeep(self) -> AsyncGenerator[None, None]:
        """Run upkeep while the block lasts. For a server without a worker, which would run it otherwise."""
        rounds = asyncio.create_task(Upkeep(self.engine).run(), name="headrace-upkeep")
        try:
            yield
        finally:
            rounds.cancel()
            await asyncio.gather(rounds, return_exceptions=True)

    async def refresh_queue_metrics(self) -> None:
        """Refresh the queue metrics, at most every 5 seconds. If the store does not answer they keep their values."""
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
        self.metrics.queues.update(views, names_max=self.limits.metrics_queues_max, now_us=now_us)

    def drain(self) -> None:
        """Stop accepting streams and end long polls. Requests in progress may finish."""
        self.is_draining = True
        self.draining.set()

    def cut(self) -> None:
        """Abort the streams in progress: received items are flushed, and the clients are asked to retry."""
        now_s = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            deadline.reschedule(now_s)

    async def close(self) -> None:
        """Flush single enqueues and close the producers."""
        producers, self._producers = self._producers, {}
        for producer in producers.values():
            with suppress(HeadraceError):
                await producer.close()

    def producer(self, context: RequestContext) -> Producer:
        """Return the producer of single runs for an environment."""
        producer = self._producers.get(context.environment)
        if producer is None:
            producer = self._producers[context.environment] = Producer(context.engine)
        return producer

    def default_key(self, task: str) -> Key:
        """Return the key of a task's runs if an item has no options: the task's default queue and priority."""
        if self.registry is None or task not in self.registry:
            return Key(task)
        return self.registry.get(task).key


def _is_ipv6(name: str) -> bool:
    return ":" in name and not name.startswith("[")
