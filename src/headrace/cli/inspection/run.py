"""`headrace run`: list and show runs, cancel one, redrive one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.inspection.batch_lookup import find_batch
from headrace.cli.invocation.opening import (
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
    from headrace.views import AttemptView, RunView

app = typer.Typer(no_args_is_help=True, help="Enqueue a run, list and show runs, cancel one, redrive one.")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `headrace run list` shows it.")]
SHOWN_CHARS = 2_000
REASON_CHARS = 80
UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
UNIT_DIGITS_MAX = 6


@app.command("list")
def list_(
    batch: Annotated[str, typer.Option(metavar="BATCH", help="Only runs of this batch (id or key).")] = "",
    state: Annotated[str, typer.Option(metavar="STATE", help="Only runs in this state, such as failed.")] = "",
    task: Annotated[str, typer.Option(metavar="TASK", help="Only runs of this task.")] = "",
    queue: Annotated[str, typer.Option(metavar="QUEUE", help="Only runs in this queue.")] = "",
    tag: Annotated[str, typer.Option(metavar="TAG", help="Only runs with this tag.")] = "",
    since: Annotated[
        str, typer.Option(metavar="2h", help="Only runs that arrived or were retried in this time: 90s, 15m, 2h, 3d.")
    ] = "",
    after: Annotated[str, typer.Option(metavar="RUN", help="Continue a list behind this run.")] = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="Show at most N runs.")] = 50,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """List runs, those of the newest batch first and by index inside a batch."""
    from headrace.foundation.ids import parse_run_id
    from headrace.store.paging import listed_runs
    from headrace.store.projections import check_run_state
    from headrace.views import listed_views

    check_run_state(state)
    settings = settings_of(store=place_of(store, server))
    behind = parse_run_id(after) if after else None
    since_s = seconds_of(since) if since else None

    async def read() -> list[RunView]:
        async with opened(settings, must_exist=True) as engine:
            batch_id = (await find_batch(engine, batch)).id if batch else ""
            records = await listed_runs(
                engine.store,
                engine.environment,
                batch_id=batch_id,
                state=state,
                task=task,
                queue=queue,
                tag=tag,
                since_us=0 if since_s is None else engine.clock.now_us() - since_s * 1_000_000,
                after=behind,
                limit=limit + 1,  # so that the end of the list is known
            )
            return await listed_views(engine, records)

    views = run_async(read())
    views, has_more = views[:limit], len(views) > limit
    if json:
        say_json({"runs": views, "next": views[-1].id if has_more else None})
        return
    if not views:
        say("no runs")
        return
    numbers = ("attempt", "crashes")
    table(
        ("run", "task", "queue", "state", *numbers, "reason"),
        [
            (view.id, view.activation or view.task, view.queue, view.state, view.attempt, view.crashes, _reason(view))
            for view in views
        ],
        numbers=numbers,
    )
    if has_more:
        note(f"there are more than {counted(limit, 'run')}: --after {views[-1].id} continues, --limit N shows more")


@app.command("show")
def show(run: RunArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False) -> None:
    """Show one run: its times, its input, its attempts and its output."""
    settings = settings_of(store=place_of(store, server))

    async def read() -> RunView:
        async with opened(settings, must_exist=True) as engine:
            return await _view(engine, run)

    view = run_async(read())
    if json:
        say_json(view)
    else:
        show_view(view)


def show_view(view: RunView) -> None:
    """Print one run."""
    lines: list[tuple[str, object]] = [
        ("task", view.activation or view.task),
        ("batch", view.batch_id),
        ("index", view.index),
        ("queue", f"{view.queue}, priority {view.priority}"),
        ("created (UTC)", moment(view.created_at)),
        ("due (UTC)", moment(view.due_at)),
        ("expires (UTC)", moment(view.expires_at)),
        ("started (UTC)", moment(view.started_at)),
        ("ended (UTC)", moment(view.ended_at)),
        ("duration", "-" if view.duration_s is None else duration(view.duration_s)),
        ("worker", view.worker or "-"),
        ("attempt", view.attempt),
        ("crashes", view.crashes),
        ("tags", ", ".join(view.tags) or "-"),
        ("idempotency key", view.idempotency_key or "-"),
        *((f"header {name}", value) for name, value in view.headers.items()),
        ("input", _shown(view.input)),
    ]
    if view.state == "completed":
        lines.append(("output", _shown(view.output)))
    if view.error is not None:
        lines.append(("error", f"{view.error.type}: {view.error.message}"[:SHOWN_CHARS]))
    for position, attempt in enumerate(view.attempts):
        if position and attempt.number == 1:
            lines.append(("redriven", "from the first attempt"))
        lines.append((f"attempt {attempt.number}", _attempt(attempt)))
    pairs(f"{view.id}  {view.state}", lines)


@app.command("cancel")
def cancel(run: RunArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False) -> None:
    """Cancel a run that has not ended."""
    from headrace.foundation.ids import parse_run_id

    settings = settings_of(store=place_of(store, server))
    batch_id, index = parse_run_id(run)

    async def stop() -> tuple[bool, RunView]:
        async with opened(settings, must_exist=True) as engine:
            await engine.store.run(batch_id, index)  # so that an unknown run is named as such
            count = await engine.cancel_runs(batch_id, [index])
            return count > 0, await _view(engine, run)

    has_changed, view = run_async(stop())
    if json:
        say_json({"changed": has_changed, "run": view})
    elif not has_changed:
        say(f"{run} is {view.state} already; nothing was changed")
    elif view.state == "cancelled":
        say(f"{run} is cancelled")
    else:
        say(f"{run} is {view.state}; its worker is asked to stop it")


@app.command("redrive")
def redrive(run: RunArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False) -> None:
    """Run a failed, cancelled or expired run again, from its first attempt."""
    from headrace.foundation.errors import Conflict
    from headrace.foundation.ids import parse_run_id

    settings = settings_of(store=place_of(store, server))
    batch_id, index = parse_run_id(run)

    async def again() -> RunView:
        async with opened(settings, must_exist=True) as engine:
            before = await engine.store.run(batch_id, index)
            if not await engine.store.redrive(batch_id, [index]):
                if before.state == "failed":
                    raise Conflict(
                        "the run can't run again: its item is not valid",
                        hint="`headrace run show` shows why; correct the item, and send or map it again (--fresh)",
                        run=run,
                    )
                raise Conflict(
                    f"expected a run that failed, was cancelled or expired, got one that is {before.state}",
                    hint="`headrace run list --state failed` shows failed runs",
                    run=run,
                )
            engine.wakeup.notify()
            return await _view(engine, run)

    view = run_async(again())
    if json:
        say_json({"redriven": True, "run": view})
    else:
        say(f"{run} will run again")


def seconds_of(text: str, option: str = "--since") -> int:
    """Return a length of time such as 90s, 15m, 2h or 3d in seconds. Raises `InvalidInput`."""
    from headrace.foundation.errors import InvalidInput

    number, unit = text[:-1], text[-1:]
    if not number.isdecimal() or unit not in UNITS or len(number) > UNIT_DIGITS_MAX:
        raise InvalidInput(
            f"expected a length of time for {option}, got {text[:40]!r}", hint="write a number and s, m, h or d: 2h"
        )
    return int(number) * UNITS[unit]


async def _view(engine: Engine, run: str) -> RunView:
    from headrace.foundation.ids import parse_run_id
    from headrace.views import run_view

    return await run_view(engine, await engine.store.run(*parse_run_id(run)))


def _reason(view: RunView) -> str:
    """Return the error of a failed run, shortened."""
    if view.error is None:
        return ""
    text = f"{view.error.type}: {view.error.message}".replace("\n", " ")
    return text if len(text) <= REASON_CHARS else text[: REASON_CHARS - 1] + "…"


def _shown(value: Any) -> str:
    import msgspec

    text = msgspec.json.encode(value).decode()
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}… ({len(text):,} characters)"


def _attempt(attempt: AttemptView) -> str:
    text = f"{attempt.state} at {moment(attempt.ended_at)}"
    if attempt.error is None:
        return text
    trace = f"\n{attempt.error.trace.rstrip()}" if attempt.error.trace else ""
    return f"{text}, {attempt.error.type}: {attempt.error.message}{trace}"
