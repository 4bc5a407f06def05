"""`headrace worker`: run an app's tasks until somebody stops it."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Annotated, Final

import typer

from headrace.cli.opening import StoreOption

if TYPE_CHECKING:
    from headrace.app import Headrace
    from headrace.foundation.settings import Settings

TELL_S: Final = 10
STOPPED_NOW: Final = 130


def command(
    app: Annotated[str, typer.Argument(metavar="MODULE_OR_FILE:APP", help="The Headrace whose tasks are run.")],
    store: StoreOption = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="Runs under way at once.")] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Child processes that run the tasks, for what needs more cores.")
    ] = None,
    queues: Annotated[str, typer.Option(metavar="A,B", help="Only these queues; all without it.")] = "",
) -> None:
    """Run an app's tasks as they come, until SIGINT or SIGTERM: what is under way may end, the rest goes back.

    A second signal stops now.
    """
    from headrace.cli.opening import run_async, settings_of
    from headrace.runtime.loading import load_app

    settings = settings_of(store=store, concurrency=concurrency, processes=processes)
    loaded = load_app(app)
    loaded.use(settings)
    run_async(_work(loaded, settings, [queue for queue in queues.split(",") if queue] or None))


async def _work(app: Headrace, settings: Settings, queues: list[str] | None) -> None:
    from headrace.cli.opening import shown_store
    from headrace.cli.printing import note
    from headrace.cli.signals import Signals

    stop = asyncio.Event()

    def stopped() -> None:
        if stop.is_set():
            note("stopped")
            os._exit(STOPPED_NOW)  # what was under way is recovered by whoever looks first
        note("stopping: what is under way may end, what has not begun goes back (again: stop now)")
        stop.set()

    with Signals(stopped):
        async with app, app.worker(queues=queues) as worker:
            tasks = ", ".join(app.registry.names) or "none"
            note(f"working on {shown_store(settings)}, queues: {', '.join(queues or ['all'])}, tasks: {tasks}")
            told = worker.stats
            while not stop.is_set():
                with_news = asyncio.wait_for(stop.wait(), TELL_S)
                await asyncio.gather(with_news, return_exceptions=True)
                if worker.stats != told:
                    told = worker.stats
                    note(f"{told.completed:,} completed, {told.failed:,} failed, {told.in_flight:,} under way")
        note(f"{worker.stats.completed:,} completed, {worker.stats.failed:,} failed")
