"""`headrace index`: run an indexer, show indexers, roll one back, reset one."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from headrace.cli.invocation.opening import JsonOption, NoServerOption, StoreOption

if TYPE_CHECKING:
    from headrace.core.sequencer import Position
    from headrace.indexer import Indexer
    from headrace.runtime.indexing.definition import IndexerProgress
    from headrace.runtime.indexing.pipeline import IndexerPipeline

SHOW_S: Final = 0.5
GC_THRESHOLDS: Final = (300_000, 20, 100)
"""A batch whose rows are all read ahead holds some 100,000 live objects, which a collection would only traverse."""


class _Group(TyperGroup):
    """`headrace index job.py:transfers` is short for `headrace index run job.py:transfers`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Run an indexer (MODULE_OR_FILE:INDEXER), show indexers, roll one back, reset one.",
)

Target = Annotated[
    str, typer.Argument(metavar="MODULE_OR_FILE:INDEXER", help="The module or file and the name of the indexer in it.")
]


@app.command("run")
def run(
    indexer: Target,
    store: StoreOption = None,
    server: NoServerOption = None,
    until: Annotated[
        str,
        typer.Option(
            metavar="POSITION", help="Stop after the event at this position. Default: the end of the sources."
        ),
    ] = "",
    depth: Annotated[
        int | None,
        typer.Option(metavar="K", help="Batches that may wait for their commit; 0 commits each before the next."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Events per batch.")] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Fail when another process holds the indexer, instead of waiting for it.")
    ] = False,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show or hide the progress.")] = True,
) -> None:
    """Run an indexer until its sources end. SIGINT and SIGTERM commit the handled events first; a second signal stops
    now.
    """
    from headrace.cli.invocation.opening import place_of, run_async, settings_of
    from headrace.cli.invocation.target_loader import load_indexer

    loaded = load_indexer(indexer)
    settings_of(loaded.app, store=place_of(store, server), index_depth_max=depth, index_batch_events_max=batch_size)
    run_async(_run(loaded, position_of(until), wait=not no_wait, shows=progress))


async def _run(indexer: Indexer, until: Position | None, *, wait: bool, shows: bool) -> None:
    from headrace.cli.invocation.printing import note
    from headrace.cli.invocation.stopping import stopping

    # Rows are long-lived and have no cycles: frequent collections would find nothing.
    gc.set_threshold(*GC_THRESHOLDS)
    owner: Any = indexer.app
    try:
        async with indexer.open(
            wait=wait, on_waiting=lambda who: note(f"waiting for {who}, which holds the indexer")
        ) as pipeline:
            with stopping("", "handled events are committed") as stop:
                background_tasks = [
                    asyncio.ensure_future(_show_progress(indexer.name, pipeline, shows=shows)),
                    asyncio.ensure_future(_stop_when(stop, pipeline)),
                ]
                try:
                    progress = await pipeline.run(until=until)
                finally:
                    for task in background_tasks:
                        task.cancel()
                    await asyncio.gather(*background_tasks, return_exceptions=True)
            note(summary(indexer.name, progress))
    finally:
        await owner.close()


async def _stop_when(stop: asyncio.Event, pipeline: IndexerPipeline) -> None:
    await stop.wait()
    pipeline.stop()


async def _show_progress(name: str, pipeline: IndexerPipeline, *, shows: bool) -> None:
    """Show a progress bar on a terminal, or a line now and then elsewhere."""
    from headrace.cli.invocation.progress import ProgressState, display

    progress_display = display(is_wanted=shows, label=name)
    first = pipeline.progress.no
    try:
        await pipeline.look_ahead()
        while True:
            progress = pipeline.progress_now()
            progress_display.update(
                ProgressState(
                    done=progress.no - first, failed=0, total=_total(progress, first), note=where_time_goes(progress)
                )
            )
            await asyncio.sleep(SHOW_S)
    finally:
        progress_display.close()


def _total(progress: IndexerProgress, first: int) -> int | None:
    """Return the number of events, where positions count them."""
    if len(progress.heads) != 1 or len(progress.positions) != 1:
        return None
    (name, head), (source, position) = *progress.heads.items(), *progress.positions.items()
    if name != source or not isinstance(head, int) or not isinstance(position, int):
        return None
    return max(head - position, 0) + progress.no - first


def where_time_goes(progress: IndexerProgress) -> str:
    """Return where the time went: `compute 61 %, waiting for sources 2 %, for commits 37 %; 0 not committed yet`."""
    whole_s = progress.compute_s + progress.fetch_wait_s + progress.commit_wait_s
    if not whole_s:
        return ""
    shares = [
        f"{100 * part / whole_s:.0f} %" for part in (progress.compute_s, progress.fetch_wait_s, progress.commit_wait_s)
    ]
    lag = progress.no - progress.committed_no
    return f"compute {shares[0]}, waiting for sources {shares[1]}, for commits {shares[2]}; {lag:,} not committed yet"


def summary(name: str, progress: IndexerProgress) -> str:
    """Return a summary of a run."""
    from headrace.cli.invocation.printing import counted

    seconds = progress.compute_s + progress.fetch_wait_s + progress.commit_wait_s
    rate = f", {progress.events_count / seconds:,.0f}/s" if seconds > 0 else ""
    at = ", ".join(f"{source} at {position}" for source, position in sorted(progress.positions.items())) or "no events"
    return (
        f"{name}: {counted(progress.events_count, 'event')}{rate}, {counted(progress.rows_count, 'row')} in "
        f"{counted(progress.commits_count, 'commit')}; {at}; {where_time_goes(progress)}"
    )


@app.command("status")
def status(store: StoreOption = None, server: NoServerOption = None, as_json: JsonOption = False) -> None:
    """Show the checkpoint and state of every indexer."""
    from headrace.cli.invocation.opening import opened, place_of, run_async, settings_of
    from headrace.cli.invocation.printing import moment, say, say_json, table
    from headrace.runtime.indexing.indexer_lease import describe_holder

    settings = settings_of(store=place_of(store, server))

    async def work() -> None:
        async with opened(settings, must_exist=True) as engine:
            indexer_states = await engine.tables.indexer_states(engine.environment)
        if as_json:
            shown = [
                {
                    "name": state.name,
                    "checkpoint": state.no,
                    "positions": state.positions,
                    "caught_up": state.is_caught_up,
                    "history_from": state.floor_no,
                    "holder": describe_holder(state.holder) if state.holder else "",
                }
                for state in indexer_states
            ]
            say_json({"indexers": shown})
            return
        if not indexer_states:
            say("no indexers")
            return
        table(
            ("indexer", "checkpoint", "positions", "caught up", "last commit", "held by"),
            [
                (
                    state.name, state.no,
                    ", ".join(f"{key} {value}" for key, value in sorted(state.positions.items())) or "-",
                    "yes" if state.is_caught_up else "no", moment(state.moved_us),
                    describe_holder(state.holder) if state.holder else "-",
                )
                for state in indexer_states
            ],
            numbers=("checkpoint",),
        )  # fmt: skip

    run_async(work())


@app.command("rollback")
def rollback(
    indexer: Target,
    to: Annotated[str, typer.Argument(metavar="POSITION", help="The last event to keep; 'begin' is before the first.")],
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="The source of the position, where there are several.")
    ] = None,
    store: StoreOption = None,
    server: NoServerOption = None,
) -> None:
    """Roll the tables back to the state after an event. Requires history: `app.indexer(…, history=…)`."""
    from headrace.cli.invocation.opening import place_of, run_async, settings_of
    from headrace.cli.invocation.printing import note
    from headrace.cli.invocation.target_loader import load_indexer

    loaded = load_indexer(indexer)
    settings_of(loaded.app, store=place_of(store, server))

    async def work() -> None:
        owner: Any = loaded.app
        try:
            state = await loaded.rollback(None if to == "begin" else position_of(to), source=source)
        finally:
            await owner.close()
        note(f"{loaded.name} is at checkpoint {state.no:,}, positions {state.positions or 'none'}")

    run_async(work())


@app.command("reset")
def reset(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The indexer's name, as `headrace index status` shows it.")
    ],
    store: StoreOption = None,
    server: NoServerOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Drop all tables of an indexer and forget its checkpoint."""
    from headrace.cli.invocation.opening import opened, place_of, run_async, settings_of
    from headrace.cli.invocation.printing import note
    from headrace.foundation.errors import NotFound
    from headrace.foundation.suggestions import hint_of

    settings = settings_of(store=place_of(store, server))
    if not yes:
        typer.confirm(f"Drop all tables of {name}?", abort=True)

    async def work() -> None:
        async with opened(settings, must_exist=True) as engine:
            names = [state.name for state in await engine.tables.indexer_states(engine.environment)]
            if name not in names:
                raise NotFound(f"no indexer is named {name!r}", hint=hint_of(name, names, "indexers"))
            tables = await engine.tables.reset(engine.environment, name)
        note(f"dropped {', '.join(tables)}")

    run_async(work())


def position_of(text: str) -> Position | None:
    """Return a position as typed: an integer where the text is one."""
    if not text:
        return None
    return int(text) if text.lstrip("-").isdecimal() else text
