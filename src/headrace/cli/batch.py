"""`headrace batch`: look at batches, take their results, stop them, run again what failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.opening import JsonOption, StoreOption, find_batch, opened, run_async, settings_of
from headrace.cli.printing import counted, moment, note, say, say_json, table

if TYPE_CHECKING:
    from headrace.core.batch import Batch, Ledger
    from headrace.runtime.engine import Engine

app = typer.Typer(no_args_is_help=True, help="Look at batches, take their results, stop them, run again what failed.")

BatchArgument = Annotated[str, typer.Argument(metavar="BATCH", help="A batch id, or its key.")]


@app.command("list")
def list_(
    store: StoreOption = None,
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help="open, sealed, completed, cancelled or abandoned.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="At most so many.")] = 50,
    json: JsonOption = False,
) -> None:
    """The batches there are, newest first."""
    from headrace.core.batch import STATES
    from headrace.foundation.errors import InvalidInput

    if state is not None and state not in STATES:
        raise InvalidInput(f"no batch is ever {state!r}", hint=f"a state is one of {', '.join(STATES)}")
    settings = settings_of(store=store)

    async def look() -> list[tuple[Batch, Ledger]]:
        async with opened(settings, must_exist=True) as engine:
            states = None if state is None else [state]
            return await engine.store.batches(engine.environment, states=states, limit=limit)

    found = run_async(look())
    if json:
        say_json({"batches": [described(batch, ledger) for batch, ledger in found]})
        return
    if not found:
        say("no batches")
        return
    numbers = ("runs", "waiting", "leased", "completed", "failed")
    table(
        ("batch", "task", "state", *numbers, "created (UTC)"),
        [
            (
                batch.id,
                batch.task or "-",
                batch.state,
                ledger.expected,
                ledger.waiting,
                ledger.leased,
                ledger.completed,
                ledger.failed,
                moment(batch.created_us),
            )
            for batch, ledger in found
        ],
        numbers=numbers,
    )


@app.command("show")
def show(batch: BatchArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """One batch: its state, its ledger and where it came from."""
    settings = settings_of(store=store)

    async def look() -> tuple[Batch, Ledger]:
        async with opened(settings, must_exist=True) as engine:
            found = await find_batch(engine, batch)
            return await engine.store.batch(found.id)

    found, ledger = run_async(look())
    if json:
        say_json(described(found, ledger))
        return
    say(f"{found.id}  {found.state}")
    lines: list[tuple[str, object]] = [
        ("task", found.task or "-"),
        ("key", found.key or "-"),
        ("environment", found.environment),
        ("created (UTC)", moment(found.created_us)),
        ("last item (UTC)", moment(found.appended_us)),
        ("sealed (UTC)", moment(found.sealed_us)),
        ("finished (UTC)", moment(found.finished_us)),
        *((f"metadata {name}", value) for name, value in found.metadata.items() if name != "start"),
        *((name, f"{count:,}") for name, count in ledger._asdict().items()),
        ("ledger", "balances" if ledger.balances else "DOES NOT BALANCE: run headrace verify"),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        say(f"  {name:<{width}}  {value}")


@app.command("results")
def results(
    batch: BatchArgument,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Default: standard output.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """The results that are final, in index order, as `headrace map` writes them."""
    from headrace.cli.output import open_output

    settings = settings_of(store=store)

    async def write() -> tuple[int, Batch]:
        async with opened(settings, must_exist=True) as engine:
            found = await find_batch(engine, batch)
            target = open_output(output, input_path=None)
            try:
                count = await _write_all(engine, found.id, target)
            finally:
                target.close()
            return count, (await engine.store.batch(found.id))[0]

    count, found = run_async(write())
    where = f" written to {output}" if output else ""
    if found.is_finished and count == found.received_count:
        note(f"{counted(count, 'result')}{where}")
    else:
        note(f"{counted(count, 'result')}{where}; run {count:,} is not final yet, so those behind it wait")


async def _write_all(engine: Engine, batch_id: str, target: Any) -> int:
    from headrace.cli.output import lines_of

    index = 0
    while outcomes := await engine.store.outcomes(batch_id, index, 4_096):
        async for lines in lines_of(engine, outcomes, 0):
            await target.put(lines)
        index = outcomes[-1].index + 1
    await target.finish()
    return index


@app.command("cancel")
def cancel(batch: BatchArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Stop a batch: what waits is cancelled, what is under way may still end."""
    from headrace.core.batch import CANCELLED

    settings = settings_of(store=store)

    async def stop() -> tuple[bool, Batch, Ledger]:
        async with opened(settings, must_exist=True) as engine:
            found = await find_batch(engine, batch)
            was_over = found.is_finished or found.is_stopped
            if not was_over:
                await engine.store.stop_batch(found.id, CANCELLED, now_us=engine.clock.now_us())
            return was_over, *await engine.store.batch(found.id)

    was_over, found, ledger = run_async(stop())
    if json:
        say_json({"cancelled": not was_over, **described(found, ledger)})
    elif was_over:
        say(f"{found.id} is {found.state} already; nothing was changed")
    else:
        rest = f", {counted(ledger.leased, 'run')} under way may still end" if ledger.leased else ""
        say(f"{found.id} is cancelled: {counted(ledger.cancelled + ledger.waiting, 'run')} will not run{rest}")


@app.command("redrive")
def redrive(batch: BatchArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Run the failed runs of a batch again, from their first attempt."""
    settings = settings_of(store=store)

    async def again() -> tuple[int, Batch, Ledger]:
        async with opened(settings, must_exist=True) as engine:
            found = await find_batch(engine, batch)
            count = await engine.store.redrive(found.id, None)
            return count, *await engine.store.batch(found.id)

    count, found, ledger = run_async(again())
    if json:
        say_json({"redriven": count, **described(found, ledger)})
    elif count:
        hint = "; run its `headrace map` command again to work on them" if "map" in found.metadata else ""
        say(f"{counted(count, 'failed run')} of {found.id} will run again{hint}")
    else:
        say(f"no run of {found.id} has failed; nothing was changed")


def described(batch: Batch, ledger: Ledger) -> dict[str, Any]:
    """A batch as JSON."""
    return {
        "batch": batch.id,
        "key": batch.key,
        "kind": batch.kind,
        "task": batch.task,
        "environment": batch.environment,
        "state": batch.state,
        "finished": batch.is_finished,
        "created_us": batch.created_us,
        "appended_us": batch.appended_us,
        "sealed_us": batch.sealed_us,
        "finished_us": batch.finished_us,
        "metadata": batch.metadata,
        "ledger": ledger._asdict(),
    }
