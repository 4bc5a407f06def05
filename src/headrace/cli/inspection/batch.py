"""`headrace batch`: list and show batches, write their results, cancel them, redrive their failed runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from headrace.cli.inspection.batch_lookup import find_batch
from headrace.cli.invocation.opening import (
    RUNS_FAILED,
    JsonOption,
    ServerOption,
    StoreOption,
    opened,
    place_of,
    run_async,
    settings_of,
)
from headrace.cli.invocation.printing import counted, duration, moment, note, pairs, say, say_json, table

if TYPE_CHECKING:
    from headrace.runtime.engine import Engine
    from headrace.views import BatchView, StalledView

app = typer.Typer(
    no_args_is_help=True, help="List and show batches, write their results, cancel them, redrive their failed runs."
)

RANGES_MAX: Final = 1_000
BatchArgument = Annotated[
    str, typer.Argument(metavar="BATCH", help="The batch's id, its key, or the --batch-key of its map.")
]


@app.command("list")
def list_(
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help="Only batches in this state, such as open or completed.")
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="List streams and batches of single runs too, each in a row of its own.")
    ] = False,
    before: Annotated[str, typer.Option(metavar="BATCH", help="Continue a list with batches older than this id.")] = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="Show at most N batches.")] = 50,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """List batches, newest first. Runs that were enqueued one by one are summed up in the last row.

    State `failed`: no run completed. State `partly failed`: some runs completed, and some did not.
    """
    from headrace.cli.inspection.batch_list import BatchPage, print_page, read_page
    from headrace.foundation.ids import check_batch_id
    from headrace.store.projections import check_batch_state

    if state is not None:
        check_batch_state(state)
    if before:
        check_batch_id(before)
    settings = settings_of(store=place_of(store, server))

    async def read() -> BatchPage:
        async with opened(settings, must_exist=True) as engine:
            states = None if state is None else [state]
            return await read_page(engine, states=states, before_id=before, limit=limit, folds=not all_)

    page = run_async(read())
    if json:
        say_json({"batches": page.views, "folded": page.folded, "next": page.next_id or None})
        return
    if not page.views and not page.folded:
        say("no batches")
        return
    print_page(page)
    if page.next_id:
        note(f"there are more than {counted(limit, 'batch')}: --before {page.next_id} continues, --limit N shows more")
    if page.folded:
        note(f"{counted(len(page.folded), 'batch')} of single runs in one row: --all lists each")


@app.command("show")
def show(
    batch: BatchArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False
) -> None:
    """Show one batch: its state, its times and the counts of its runs."""
    from headrace.cli.inspection.batch_list import shown_key, shown_metadata, shown_state

    settings = settings_of(store=place_of(store, server))

    async def read() -> tuple[BatchView, list[str]]:
        async with opened(settings, must_exist=True) as engine:
            view = await _view(engine, batch)
            if view.task:
                return view, [view.task]
            return view, (await engine.store.tasks_of_batches(engine.environment, [view.id])).get(view.id, [])

    view, tasks = run_async(read())
    if json:
        say_json(view)
        return
    pairs(
        f"{view.id}  {shown_state(view)}",
        [
            ("task", ", ".join(tasks) or "-"),
            ("key", shown_key(view) or "-"),
            ("environment", view.environment),
            ("created (UTC)", moment(view.created_at)),
            ("last item (UTC)", moment(view.appended_at)),
            ("sealed (UTC)", moment(view.sealed_at)),
            ("finished (UTC)", moment(view.finished_at)),
            ("duration", "-" if view.duration_s is None else duration(view.duration_s)),
            *((f"metadata {name}", value) for name, value in shown_metadata(view).items()),
            *((name, f"{count:,}") for name, count in view.ledger._asdict().items()),
            ("ledger", "balances" if view.ledger.balances else "DOES NOT BALANCE: run headrace verify"),
            *(("stalled", f"{stalled_words(lane)}; {lane.hint}") for lane in view.stalled),
        ],
    )


@app.command("results")
def results(
    batch: BatchArgument,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="The file to write. Default: standard output.")
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
) -> None:
    """Write the results of ended runs in index order, one JSON line each, as `headrace map` does."""
    from headrace.cli.maps.output import open_output

    settings = settings_of(store=place_of(store, server))

    async def write() -> tuple[int, BatchView]:
        async with opened(settings, must_exist=True) as engine:
            batch_id = (await find_batch(engine, batch)).id
            target = open_output(output, input_path=None)
            try:
                count = await _write_all(engine, batch_id, target)
            finally:
                target.close()
            return count, await _view(engine, batch_id)

    count, view = run_async(write())
    written = f"{counted(count, 'result')} written to {output}" if output else counted(count, "result")
    if view.is_finished and count == view.received:
        note(written)
        return
    note(f"{written}; run {count:,} has not ended yet, so the results after it are left out")
    for lane in view.stalled:
        note(f"warning: {stalled_words(lane)}; {lane.hint}")


async def _write_all(engine: Engine, batch_id: str, target: Any) -> int:
    from headrace.cli.maps.output import lines_of

    index = 0
    while outcomes := await engine.store.outcomes(batch_id, index, 4_096):
        async for lines in lines_of(engine, outcomes, 0):
            await target.put(lines)
        index = outcomes[-1].index + 1
    await target.finish()
    return index


@app.command("wait")
def wait(
    batch: BatchArgument,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", metavar="S", min=0, help="Wait at most S seconds. Default: no limit.")
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Wait until every run of a batch has ended. A warning names runs that no live worker takes.

    Exit codes: 0 all runs completed, 3 some did not, 2 the time is over.
    """
    from headrace.app import Headrace

    settings = settings_of(store=place_of(store, server))

    async def until_finished() -> BatchView:
        async with opened(settings, must_exist=True) as engine:
            owner = Headrace("batch")
            owner.use_engine(engine)
            handle = await owner.get_batch((await find_batch(engine, batch)).id)
            return await handle.wait(timeout_s=timeout_s)

    view = run_async(until_finished())
    bad_count = view.failed + view.cancelled + view.expired
    if json:
        say_json(view)
    else:
        say(f"{view.id} is {view.state}: {counted(view.completed, 'run')} completed, {bad_count:,} did not")
    if bad_count:
        raise typer.Exit(RUNS_FAILED)


@app.command("missing")
def missing(
    batch: BatchArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False
) -> None:
    """List the index ranges whose items are announced but not stored yet."""
    settings = settings_of(store=place_of(store, server))

    async def read() -> tuple[str, list[tuple[int, int]]]:
        async with opened(settings, must_exist=True) as engine:
            batch_id = (await find_batch(engine, batch)).id
            return batch_id, await engine.store.missing(batch_id, RANGES_MAX)

    batch_id, ranges = run_async(read())
    if json:
        say_json({"batch": batch_id, "ranges": [[start, end - 1] for start, end in ranges]})
    elif not ranges:
        say(f"no item of {batch_id} is missing")
    else:
        rows = [(start, end - 1, end - start) for start, end in ranges]
        table(("first", "last", "items"), rows, numbers=("first", "last", "items"))


@app.command("cancel")
def cancel(
    batch: BatchArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False
) -> None:
    """Cancel a batch: its waiting runs are cancelled, its running ones are asked to stop."""
    from headrace.core.batch import CANCELLED

    settings = settings_of(store=place_of(store, server))

    async def stop() -> tuple[bool, BatchView]:
        async with opened(settings, must_exist=True) as engine:
            row = await find_batch(engine, batch)
            is_over = row.is_finished or row.is_stopped
            if not is_over:
                await engine.stop_batch(row.id, CANCELLED)
            return not is_over, await _view(engine, row.id)

    has_changed, view = run_async(stop())
    if json:
        say_json({"changed": has_changed, "batch": view})
    elif not has_changed:
        say(f"{view.id} is {view.state} already; nothing was changed")
    else:
        running = f", {counted(view.leased, 'running run')} may still finish" if view.leased else ""
        say(f"{view.id} is cancelled: {counted(view.cancelled + view.waiting, 'run')} will not run{running}")


@app.command("redrive")
def redrive(
    batch: BatchArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False
) -> None:
    """Run the failed runs of a batch again, from their first attempt.

    Runs of items that are not valid, such as lines that are not JSON, can't run again.
    """
    settings = settings_of(store=place_of(store, server))

    async def again() -> tuple[int, int, BatchView]:
        async with opened(settings, must_exist=True) as engine:
            before = await _view(engine, batch)
            count = await engine.store.redrive(before.id, None)
            engine.wakeup.notify()
            return count, before.failed - count, await _view(engine, before.id)

    count, invalid_count, view = run_async(again())
    if json:
        say_json({"redriven": count, "invalid": invalid_count, "batch": view})
        return
    is_map = "map" in view.metadata
    if count:
        hint = "; repeat its `headrace map` command to run them" if is_map else ""
        say(f"{counted(count, 'failed run')} of {view.id} will run again{hint}")
    elif not invalid_count:
        say(f"no run of {view.id} has failed; nothing was changed")
    if invalid_count:
        remedy = (
            "correct the input, and repeat its `headrace map` command with --fresh" if is_map else "send them again"
        )
        say(f"{counted(invalid_count, 'failed run')} can't run again, because the items are not valid: {remedy}")


async def _view(engine: Engine, batch: str) -> BatchView:
    from headrace.views import full_batch_view

    return await full_batch_view(engine, *await engine.store.batch((await find_batch(engine, batch)).id))


def stalled_words(lane: StalledView) -> str:
    """Return a queue and task that no live worker takes, with the reason, as a clause."""
    from headrace.core.serving import stalled_clause

    return stalled_clause(lane.queue, lane.task, lane.reason)
