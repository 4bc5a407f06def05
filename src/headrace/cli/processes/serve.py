"""`headrace serve`: serve the HTTP and gRPC APIs, and run an app's tasks in the same process."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import urlsplit

import typer

from headrace.cli.invocation.opening import StoreOption
from headrace.foundation.addresses import is_loopback

if TYPE_CHECKING:
    from headrace.app import Headrace
    from headrace.foundation.settings import Settings
    from headrace.grpc.transport.server import GrpcServer
    from headrace.http.requests.service import Service

LEAVE_S: Final = 20.0
"""Seconds that a server may need beyond its grace periods before its supervisor kills it."""


def command(
    app: Annotated[
        str,
        typer.Argument(metavar="[MODULE_OR_FILE:APP]", help="The app whose tasks run in this process. Default: none."),
    ] = "",
    store: StoreOption = None,
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The address to listen on. Default: 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="N", help="The port to listen on; 0 takes a free one. Default: 8000.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, max=256, help="Run N server processes on one port.")] = 1,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Run at most N tasks at a time in each process.")
    ] = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Serve only; run no tasks.")] = False,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Disable authentication (loopback addresses only).")
    ] = False,
    delivery: Annotated[
        str | None,
        typer.Option(
            metavar="pull|push|both",
            help="How gRPC workers get activations. Default: pull, on loopback or signed.",
        ),
    ] = None,
    ack: Annotated[
        str | None,
        typer.Option(
            metavar="committed|received",
            help="Answer a gRPC report after its commit, or when it is received. Default: committed.",
        ),
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(metavar="FILE", help="The server's certificate with its chain, PEM.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="The certificate's private key, PEM.")] = None,
    number: Annotated[int, typer.Option(hidden=True)] = 0,
    lifeline: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Serve batches over HTTP and gRPC until SIGINT or SIGTERM, and run an app's tasks in the same process.

    On a signal the server refuses new streams, finishes open ones and writes all outcomes. A second signal stops now.
    """
    from headrace.cli.invocation.opening import run_async, settings_of
    from headrace.cli.invocation.target_loader import load_app

    loaded = load_app(app) if app else None
    settings = settings_of(
        loaded,
        store=store,
        host=host,
        port=port,
        concurrency=concurrency,
        delivery=delivery,
        ack=ack,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    _check(settings, no_auth=no_auth, workers=workers)
    if workers > 1 and not number:
        code = run_async(_supervise(settings, workers))
        if code:
            raise typer.Exit(code)
        return
    who = f"server {number}: " if number else ""
    run_async(_serve(settings, loaded, works=not no_worker, is_open=no_auth, who=who, lifeline=lifeline))


def _check(settings: Settings, *, no_auth: bool, workers: int) -> None:
    from headrace.foundation.errors import InvalidSetting
    from headrace.foundation.settings import hidden

    if no_auth and not is_loopback(settings.host):
        raise InvalidSetting(
            f"--no-auth on {settings.host} would give access without a key to everyone who can reach it",
            hint="listen on 127.0.0.1, or make a key with `headrace key create`",
        )
    if urlsplit(settings.store).scheme in ("http", "https"):
        raise InvalidSetting(
            f"expected a database for --store, got {hidden('store', settings.store)}",
            hint="a server keeps its own store: name a SQLite file or PostgreSQL",
        )
    if (settings.tls_cert is None) != (settings.tls_key is None):
        missing = "tls_key" if settings.tls_key is None else "tls_cert"
        raise InvalidSetting(
            f"expected tls_cert and tls_key together, but {missing} is not set", hint="set both, or neither"
        )
    if settings.delivery is not None and not settings.grpc_secrets and not is_loopback(settings.host):
        raise InvalidSetting(
            f"grpc_secrets is not set: every host that can reach {settings.host} could take activations",
            hint="set HEADRACE_GRPC_SECRETS, or listen on 127.0.0.1",
        )
    if settings.delivery in ("push", "both") and not settings.push:
        raise InvalidSetting(
            f"--delivery {settings.delivery} requires push, which is not set",
            hint="HEADRACE_PUSH=application=http://host:port",
        )
    if workers > 1 and not settings.port:
        raise InvalidSetting("several processes share one port, and none is set", hint="name it with --port")


async def _supervise(settings: Settings, workers: int) -> int:
    from headrace.cli.invocation.stopping import supervised

    grace_s = 2 * settings.limits.shutdown_grace_s + LEAVE_S
    return await supervised(sys.argv[1:], count=workers, noun="server", grace_s=grace_s, where=f"port {settings.port}")


async def _serve(
    settings: Settings, app: Headrace | None, *, works: bool, is_open: bool, who: str, lifeline: int
) -> None:
    from headrace.cli.invocation.opening import opened, shown_store
    from headrace.cli.invocation.printing import note
    from headrace.cli.invocation.stopping import stopping
    from headrace.foundation.errors import InvalidSetting

    try:
        from headrace.http.requests.service import Service
        from headrace.http.server.server import Tls, serving
    except ModuleNotFoundError as error:
        raise InvalidSetting(
            f"the server requires the package {error.name}", hint="pip install 'headrace[server]'"
        ) from None

    tls = None
    if settings.tls_cert and settings.tls_key:  # an invalid certificate is refused before anything is opened
        tls = Tls(settings.tls_cert, settings.tls_key).context()
    if settings.push and settings.delivery not in ("push", "both"):
        note(f"{who}HEADRACE_PUSH is set but not used: add --delivery push or both")
    async with AsyncExitStack() as stack:
        promise = "open streams and running tasks may finish"
        stop = stack.enter_context(stopping(who, promise, lifeline=lifeline))
        if app is None:
            engine = await stack.enter_async_context(opened(settings))
        else:
            await stack.enter_async_context(app)
            engine = await app.open()
        service = Service(
            engine,
            registry=None if app is None else app.registry,
            api_key=settings.api_key,
            is_open=is_open,
            hosts=(settings.host, *settings.allowed_hosts),
        )
        if app is not None and works:
            await stack.enter_async_context(app.worker())
        else:
            await stack.enter_async_context(service.upkeep())
        grpc = await stack.enter_async_context(_grpc(service, settings))
        server = await stack.enter_async_context(
            serving(service, settings.host, settings.port, is_shared=bool(who), grpc=grpc, tls=tls)
        )
        if not is_open and settings.api_key is None and not await engine.administration.keys(settings.environment):
            note(f"{who}there is no API key yet: create one with `headrace key create`")
        tasks = ", ".join(app.registry.names) if app is not None and works else "none"
        note(f"{who}serving {shown_store(settings)} on {server.url}, tasks run here: {tasks or 'none'}")
        await stop.wait()


@asynccontextmanager
async def _grpc(service: Service, settings: Settings) -> AsyncIterator[GrpcServer | None]:
    """Make the gRPC server for the same port; None when its packages are missing and no gRPC setting is set."""
    from headrace.foundation.errors import InvalidSetting

    try:
        from headrace.grpc.taskbroker.broker import dispatching
        from headrace.grpc.taskbroker.dispatcher_deliveries import DispatcherDeliveries
        from headrace.http.grpc_mount.mounting import grpc_server, pushing
    except ModuleNotFoundError as error:
        if settings.delivery is not None or settings.grpc_secrets:
            raise InvalidSetting(
                f"gRPC requires the package {error.name}", hint="pip install 'headrace[grpc]'"
            ) from None
        yield None
        return
    delivery = settings.delivery
    if delivery is None and (settings.grpc_secrets or is_loopback(settings.host)):
        delivery = "pull"
    async with AsyncExitStack() as stack:
        consumer = None
        if delivery is not None:
            is_timed = settings.sources["flush_interval_ms"] != "default"
            interval_ms = settings.limits.flush_interval_ms if is_timed else None
            dispatching_broker = dispatching(
                service.engine,
                delivery=delivery,
                ack=settings.ack,
                flush_interval_ms=interval_ms,
                is_fenced=settings.delivery_ids == "fenced",
            )
            broker = await stack.enter_async_context(dispatching_broker)
            consumer = broker.consumer.methods
            if delivery != "pull":
                deliveries = DispatcherDeliveries(broker.dispatcher)
                secrets = settings.grpc_secrets
                await stack.enter_async_context(pushing(service, deliveries, settings.push, secrets=secrets))
        yield await stack.enter_async_context(grpc_server(service, secrets=settings.grpc_secrets, consumer=consumer))
