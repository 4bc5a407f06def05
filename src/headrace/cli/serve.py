"""`headrace serve`: the engine on the network, and an app's tasks run beside it; one command is a whole system."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import urlsplit

import typer

from headrace.cli.opening import StoreOption

if TYPE_CHECKING:
    from headrace.app import Headrace
    from headrace.foundation.settings import Settings

STOPPED_NOW: Final = 130
LEAVE_S: Final = 20.0
"""What a server may need beyond its graces for streams, runs and outcomes, before its supervisor kills it."""


def command(
    app: Annotated[
        str, typer.Argument(metavar="[MODULE_OR_FILE:APP]", help="The Headrace whose tasks are run here too.")
    ] = "",
    store: StoreOption = None,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Where to listen. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(metavar="N", help="The port. Default: 8000; 0 is any.")] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, max=256, help="Processes that serve and work.")] = 1,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="Runs under way at once, a process.")] = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Serve only; run no tasks here.")] = False,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let in who shows no key; on loopback only.")] = False,
    number: Annotated[int, typer.Option(hidden=True)] = 0,
    lifeline: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Serve batches over HTTP until SIGINT or SIGTERM, and run an app's tasks in the same process.

    A stop takes no new streams, lets those under way end, and flushes everything. A second signal stops now.
    """
    from headrace.cli.opening import run_async, settings_of
    from headrace.runtime.loading import load_app

    settings = settings_of(store=store, host=host, port=port, concurrency=concurrency)
    _check(settings, no_auth=no_auth, workers=workers)
    if workers > 1 and not number:
        code = run_async(_supervise(settings, workers))
        if code:
            raise typer.Exit(code)
        return
    loaded = load_app(app) if app else None
    if loaded is not None:
        loaded.use(settings)
    run_async(
        _serve(
            settings,
            loaded,
            works=not no_worker,
            is_open=no_auth,
            who=f"server {number}: " if number else "",
            lifeline=lifeline,
        )
    )


def _check(settings: Settings, *, no_auth: bool, workers: int) -> None:
    from headrace.foundation.errors import InvalidSetting

    if no_auth and not _is_loopback(settings.host):
        raise InvalidSetting(
            f"--no-auth lets anybody in who can reach {settings.host}",
            hint="listen on 127.0.0.1, or make a key with `headrace key create`",
        )
    if urlsplit(settings.store).scheme in ("http", "https"):
        raise InvalidSetting("a server keeps a store of its own", hint="name a database with --store")
    if workers > 1 and not settings.port:
        raise InvalidSetting("several processes need one port to share", hint="name it with --port")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _supervise(settings: Settings, workers: int) -> int:
    from headrace.cli.printing import note
    from headrace.cli.signals import Signals
    from headrace.runtime.supervisor import Supervisor

    def child(number: int, lifeline: int) -> list[str]:
        own = ["--number", str(number), "--lifeline", str(lifeline)]
        return [sys.executable, "-m", "headrace", *sys.argv[1:], *own]

    supervisor = Supervisor(child, count=workers, grace_s=2 * settings.limits.shutdown_grace_s + LEAVE_S, say=note)

    def stopped() -> None:
        note("stopping every server" if supervisor.stops_count == 0 else "stopping every server now")
        supervisor.stop()

    with Signals(stopped):
        note(f"keeping {workers} servers on port {settings.port}")
        code = await supervisor.run()
    return STOPPED_NOW if supervisor.stops_count > 1 else code


async def _serve(
    settings: Settings, app: Headrace | None, *, works: bool, is_open: bool, who: str, lifeline: int
) -> None:
    from headrace.cli.opening import opened, shown_store
    from headrace.cli.printing import note
    from headrace.cli.signals import Signals
    from headrace.foundation.errors import InvalidSetting

    try:
        from headrace.http.server import serving
        from headrace.http.service import Service
    except ModuleNotFoundError as error:
        raise InvalidSetting(f"serving needs {error.name}", hint="pip install 'headrace[server]'") from None

    stop = asyncio.Event()

    def stopped() -> None:
        if stop.is_set():
            note(f"{who}stopped")
            os._exit(STOPPED_NOW)  # what was under way is recovered by whoever looks first
        note(f"{who}stopping: streams under way may end, and so may runs (again: stop now)")
        stop.set()

    def orphaned() -> None:
        asyncio.get_running_loop().remove_reader(lifeline)
        if not stop.is_set():
            stopped()

    async with AsyncExitStack() as stack:
        stack.enter_context(Signals(stopped))
        if lifeline >= 0:
            asyncio.get_running_loop().add_reader(lifeline, orphaned)
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
        )
        if app is not None and works:
            await stack.enter_async_context(app.worker())
        else:
            await stack.enter_async_context(service.upkeep())
        server = await stack.enter_async_context(serving(service, settings.host, settings.port, is_shared=bool(who)))
        if not is_open and settings.api_key is None and not await engine.store.keys(settings.environment):
            note(f"{who}no key lets anybody in yet: `headrace key create` makes one")
        tasks = ", ".join(app.registry.names) if app is not None and works else "none"
        note(f"{who}serving {shown_store(settings)} on {server.url}, tasks run here: {tasks or 'none'}")
        await stop.wait()
