"""`headrace dead`: list dead letters, redrive them, or remove them from the list."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from headrace.cli.invocation.opening import (
    JsonOption,
    ServerOption,
    StoreOption,
    opened,
    place_of,
    run_async,
    settings_of,
)
from headrace.cli.invocation.printing import counted, moment, say, say_json, table

if TYPE_CHECKING:
    from headrace.runtime.engine import Engine
    from headrace.store.protocol import DeadLetter

app = typer.Typer(no_args_is_help=True, help="List dead letters, redrive them, or remove them from the list.")

PAGE: Final = 500
REASON_CHARS: Final = 200
RunKey = tuple[str, int]
QueueOption = Annotated[str, typer.Option("--queue", metavar="QUEUE", help="Only dead letters of this queue.")]
RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN...]", help="Run ids, as `headrace dead list` shows them.")
]
AllOption = Annotated[bool, typer.Option("--all", help="All dead letters, or all of the queue.")]


@app.command("list")
def list_(
    queue: QueueOption = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="Show at most N dead letters.")] = 50,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """List dead letters with their errors, oldest first."""
    settings = settings_of(store=place_of(store, server))

    async def read() -> list[dict[str, Any]]:
        async with opened(settings, must_exist=True) as engine:
            letters = await engine.store.dead_letters(engine.environment, queue=queue, limit=limit)
            return [await _described(engine, letter) for letter in letters]

    rows = run_async(read())
    if json:
        say_json({"dead": rows})
        return
    if not rows:
        say("no dead letters")
        return
    table(
        ("run", "task", "queue", "failed (UTC)", "attempt", "reason"),
        [
            (row["id"], row["task"], row["queue"], moment(row["died_us"]), row["attempt"], row["why"][:REASON_CHARS])
            for row in rows
        ],
        numbers=("attempt",),
    )


async def _described(engine: Engine, letter: DeadLetter) -> dict[str, Any]:
    from headrace.core.failure import decode
    from headrace.foundation.ids import run_id

    record = await engine.store.run(letter.batch_id, letter.index)
    failure = decode(record.result) if record.result else None
    return {
        "id": run_id(letter.batch_id, letter.index),
        "task": record.name or letter.task,
        "activation": record.idempotency_key if record.name else "",
        "queue": letter.queue,
        "died_us": letter.died_us,
        "attempt": record.attempt,
        "why": "" if failure is None else f"{failure.type}: {failure.message}",
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

    async def redrive_page(engine: Engine, page: list[RunKey]) -> int:
        by_batch: dict[str, list[int]] = {}
        for batch_id, index in page:
            by_batch.setdefault(batch_id, []).append(index)
        count = 0
        for batch_id, indexes in by_batch.items():
            count += await engine.store.redrive(batch_id, indexes)
        engine.wakeup.notify()
        return count

    count = _for_each_page(runs, queue, redrive_page, all_=all_, place=place_of(store, server))
    if json:
        say_json({"redriven": count})
    else:
        say(f"{counted(count, 'run')} will run again")


@app.command("purge")
def purge(
    runs: RunsArgument = None,
    queue: QueueOption = "",
    all_: AllOption = False,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Remove runs from the dead-letter list; they stay failed, and are deleted with their batches."""

    async def purge_page(engine: Engine, page: list[RunKey]) -> int:
        return await engine.store.purge_dead(engine.environment, page)

    count = _for_each_page(runs, queue, purge_page, all_=all_, place=place_of(store, server))
    if json:
        say_json({"purged": count})
    else:
        say(f"{counted(count, 'dead letter')} purged")


def _for_each_page(
    runs: list[str] | None,
    queue: str,
    change: Callable[[Engine, list[RunKey]], Awaitable[int]],
    *,
    all_: bool,
    place: str | None,
) -> int:
    """Change the named dead letters, or all of them page by page; return how many were changed."""
    from headrace.foundation.errors import InvalidInput
    from headrace.foundation.ids import parse_run_id

    if bool(runs) == all_:
        raise InvalidInput("expected run ids or --all", hint="--all --queue QUEUE selects those of one queue")
    named = [parse_run_id(run) for run in runs or ()]
    settings = settings_of(store=place)

    async def work() -> int:
        async with opened(settings, must_exist=True) as engine:
            if named:
                await _check_dead(engine, named)
                return await change(engine, named)
            count, after = 0, None
            while page := await engine.store.dead_letters(engine.environment, queue=queue, after=after, limit=PAGE):
                count += await change(engine, [(letter.batch_id, letter.index) for letter in page])
                after = page[-1]
            return count

    return run_async(work())


async def _check_dead(engine: Engine, runs: list[RunKey]) -> None:
    """Raise `NotFound` unless all of these runs are dead letters."""
    from headrace.foundation.errors import NotFound

    unmatched, after = set(runs), None
    while unmatched and (page := await engine.store.dead_letters(engine.environment, after=after, limit=PAGE)):
        unmatched -= {(letter.batch_id, letter.index) for letter in page}
        after = page[-1]
    if unmatched:
        raise NotFound(
            f"{len(unmatched)} of these runs are not on the dead-letter list", hint="see `headrace dead list`"
        )
