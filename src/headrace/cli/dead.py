"""`headrace dead`: look at what failed for good, run it again, or let it be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from headrace.cli.opening import JsonOption, ServerOption, StoreOption, opened, place_of, run_async, settings_of
from headrace.cli.printing import counted, moment, say, say_json, table

if TYPE_CHECKING:
    from headrace.runtime.engine import Engine
    from headrace.store.protocol import DeadLetter

app = typer.Typer(no_args_is_help=True, help="Look at what failed for good, run it again, or let it be.")

PAGE: Final = 500
QueueOption = Annotated[str, typer.Option("--queue", metavar="QUEUE", help="Only of this queue.")]
RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN...]", help="Run ids, as `headrace dead list` shows them.")
]
AllOption = Annotated[bool, typer.Option("--all", help="All of them, or all of the queue.")]


@app.command("list")
def list_(
    queue: QueueOption = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="At most so many.")] = 50,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Runs that failed for good and are kept, oldest first, with why."""
    settings = settings_of(store=place_of(store, server))

    async def look() -> list[dict[str, Any]]:
        async with opened(settings, must_exist=True) as engine:
            found = await engine.store.dead_letters(engine.environment, queue=queue, limit=limit)
            return [await _described(engine, dead) for dead in found]

    found = run_async(look())
    if json:
        say_json({"dead": found})
        return
    if not found:
        say("no dead letters")
        return
    table(
        ("run", "task", "queue", "died (UTC)", "attempt", "why"),
        [
            (one["id"], one["task"], one["queue"], moment(one["died_us"]), one["attempt"], one["why"][:200])
            for one in found
        ],
        numbers=("attempt",),
    )


async def _described(engine: Engine, dead: DeadLetter) -> dict[str, Any]:
    from headrace.core.failure import decode
    from headrace.foundation.ids import run_id

    view = await engine.store.run(dead.batch_id, dead.index)
    error = decode(view.result) if view.result else None
    return {
        "id": run_id(dead.batch_id, dead.index),
        "task": view.name or dead.task,
        "activation": view.idempotency_key if view.name else "",
        "queue": dead.queue,
        "died_us": dead.died_us,
        "attempt": view.attempt,
        "why": "" if error is None else f"{error.type}: {error.message}",
    }


@app.command("redrive")
def redrive(
    runs: RunsArgument = None,
    queue: QueueOption = "",
    all_: AllOption = False,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Run dead letters again, from their first attempt."""

    async def again(engine: Engine, page: list[tuple[str, int]]) -> int:
        by_batch: dict[str, list[int]] = {}
        for batch_id, index in page:
            by_batch.setdefault(batch_id, []).append(index)
        count = 0
        for batch_id, indexes in by_batch.items():
            count += await engine.store.redrive(batch_id, indexes)
        engine.doorbell.ring()
        return count

    count = _each(runs, queue, again, all_=all_, place=place_of(store, server))
    if json:
        say_json({"redriven": count})
    else:
        say(f"{counted(count, 'run')} will be run again")


@app.command("purge")
def purge(
    runs: RunsArgument = None,
    queue: QueueOption = "",
    all_: AllOption = False,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Let dead letters be as other failed runs: nobody has to look at them, and they go with their batches."""

    async def away(engine: Engine, page: list[tuple[str, int]]) -> int:
        return await engine.store.purge_dead(engine.environment, page)

    count = _each(runs, queue, away, all_=all_, place=place_of(store, server))
    if json:
        say_json({"purged": count})
    else:
        say(f"{counted(count, 'dead letter')} purged")


def _each(runs: list[str] | None, queue: str, do: Any, *, all_: bool, place: str | None) -> int:
    """Do something with dead letters, a page at a time; answers how many it was done to."""
    from headrace.foundation.errors import InvalidInput, NotFound
    from headrace.foundation.ids import parse_run_id

    if bool(runs) == all_:
        raise InvalidInput("which dead letters?", hint="name runs, or give --all, with --queue for those of one queue")
    named = [parse_run_id(run) for run in runs or ()]
    settings = settings_of(store=place)

    async def work() -> int:
        async with opened(settings, must_exist=True) as engine:
            if named:
                await _check_dead(engine, named)
                return int(await do(engine, named))
            count, after = 0, None
            while page := await engine.store.dead_letters(engine.environment, queue=queue, after=after, limit=PAGE):
                count += await do(engine, [(dead.batch_id, dead.index) for dead in page])
                after = page[-1]
            return count

    async def _check_dead(engine: Engine, wanted: list[tuple[str, int]]) -> None:
        left, after = set(wanted), None
        while left and (page := await engine.store.dead_letters(engine.environment, after=after, limit=PAGE)):
            left -= {(dead.batch_id, dead.index) for dead in page}
            after = page[-1]
        if left:
            raise NotFound(f"{len(left)} of these runs are no dead letters", hint="see `headrace dead list`")

    return run_async(work())
