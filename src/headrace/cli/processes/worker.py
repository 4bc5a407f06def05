"""`headrace worker`: run an app's tasks until a signal stops it, in this process or in several."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Final

import typer

from headrace.cli.invocation.opening import ServerOption, StoreOption

if TYPE_CHECKING:
    from headrace.app import Headrace
    from headrace.foundation.settings import Settings

REPORT_S: Final = 10
LEAVE_S: Final = 10.0
"""Seconds that a worker may need beyond its two grace periods before its supervisor kills it."""


def command(
    app: Annotated[str, typer.Argument(metavar="MODULE_OR_FILE:APP", help="The app whose tasks to run.")],
    store: StoreOption = None,
    server: ServerOption = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Run at most N tasks at a time in each process.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Keep N worker processes alive; 0 works in this process.")
    ] = None,
    queues: Annotated[str, typer.Option(metavar="A,B", help="Take runs from these queues only. Default: all.")] = "",
    number: Annotated[int, typer.Option(hidden=True)] = 0,
    lifeline: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Run an app's tasks until SIGINT or SIGTERM: running tasks finish, others are requeued. A second signal stops now.

    With --processes N there are N workers, each with its own session. A worker that crashes is replaced, and its runs
    are recovered.
    """
    from headrace.cli.invocation.opening import place_of, run_async, settings_of
    from headrace.cli.invocation.target_loader import load_app

    store = place_of(store, server)
    loaded = load_app(app)
    settings = settings_of(loaded, store=store, concurrency=concurrency, processes=processes)
    queue_names = [queue for queue in queues.split(",") if queue] or None
    if not settings.processes:
        run_async(_work(loaded, settings, queue_names, number, lifeline))
        return
    flags = [app, "--processes", "0", "--queues", queues]
    flags += [] if store is None else ["--store", store]
    flags += [] if concurrency is None else ["--concurrency", str(concurrency)]
    code = run_async(_supervise(settings, flags))
    if code:
        raise typer.Exit(code)


async def _supervise(settings: Settings, flags: list[str]) -> int:
    from headrace.cli.invocation.opening import shown_store
    from headrace.cli.invocation.stopping import supervised

    grace_s = 2 * settings.limits.shutdown_grace_s + LEAVE_S
    count = settings.processes
    return await supervised(
        ["worker", *flags], count=count, noun="worker", grace_s=grace_s, where=shown_store(settings)
    )


async def _work(app: Headrace, settings: Settings, queues: list[str] | None, number: int, lifeline: int) -> None:
    from headrace.cli.invocation.opening import shown_store
    from headrace.cli.invocation.printing import note
    from headrace.cli.invocation.stopping import stopping

    who = f"worker {number}: " if number else ""
    promise = "running tasks may finish, the others are requeued"
    with stopping(who, promise, lifeline=lifeline) as stop:
        async with app, app.worker(queues=queues, processes=0) as worker:
            tasks = ", ".join(app.registry.names) or "none"
            note(f"{who}working on {shown_store(settings)}, queues: {', '.join(queues or ['all'])}, tasks: {tasks}")
            stats = worker.stats
            while not stop.is_set():
                next_report = asyncio.wait_for(stop.wait(), REPORT_S)
                await asyncio.gather(next_report, return_exceptions=True)
                if worker.stats != stats:
                    stats = worker.stats
                    note(f"{who}{stats.completed:,} completed, {stats.failed:,} failed, {stats.in_flight:,} running")
        note(f"{who}{worker.stats.completed:,} completed, {worker.stats.failed:,} failed")
