"""`headrace run`: look at single runs, cancel one, run one again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.opening import JsonOption, StoreOption, find_batch, opened, run_async, settings_of
from headrace.cli.printing import moment, say, say_json, table

if TYPE_CHECKING:
    from headrace.store.protocol import RunRecord

app = typer.Typer(no_args_is_help=True, help="Look at single runs, cancel one, run one again.")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run id, as `headrace run list` shows it.")]
STATES = ("waiting", "delayed", "leased", "completed", "failed", "cancelled", "expired")
SHOWN_BYTES = 2_000


@app.command("list")
def list_(
    store: StoreOption = None,
    batch: Annotated[str, typer.Option(metavar="B", help="Only of this batch (id or key).")] = "",
    state: Annotated[str, typer.Option(metavar="S", help="Only in this state, such as failed.")] = "",
    task: Annotated[str, typer.Option(metavar="T", help="Only of this task.")] = "",
    tag: Annotated[str, typer.Option(metavar="TAG", help="Only with this tag.")] = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="At most so many.")] = 50,
    json: JsonOption = False,
) -> None:
    """Runs, of the newest batch first and by index inside it."""
    from headrace.foundation.errors import InvalidInput
    from headrace.foundation.ids import run_id

    if state and state not in STATES:
        raise InvalidInput(f"no run is ever {state!r}", hint=f"a state is one of {', '.join(STATES)}")
    settings = settings_of(store=store)

    async def look() -> list[RunRecord]:
        async with opened(settings, must_exist=True) as engine:
            batch_id = (await find_batch(engine, batch)).id if batch else ""
            views = await engine.store.runs(
                engine.environment, batch_id=batch_id, state=state, task=task, tag=tag, limit=limit
            )
            # A listing leaves results out; of those that failed, the reason is what people look for.
            return [
                await engine.store.run(view.batch_id, view.index) if view.state == "failed" else view for view in views
            ]

    found = run_async(look())
    if json:
        say_json({"runs": [described(view) for view in found]})
        return
    if not found:
        say("no runs")
        return
    numbers = ("attempt", "crashes")
    table(
        ("run", "task", "queue", "state", *numbers, "why"),
        [
            (
                run_id(view.batch_id, view.index),
                view.task,
                view.queue,
                view.state,
                view.attempt,
                view.crashes_count,
                _why(view),
            )
            for view in found
        ],
        numbers=numbers,
    )


@app.command("show")
def show(run: RunArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """One run: its input, its attempts, its result."""
    from headrace.foundation.ids import parse_run_id

    settings = settings_of(store=store)
    batch_id, index = parse_run_id(run)

    async def look() -> RunRecord:
        async with opened(settings, must_exist=True) as engine:
            return await engine.store.run(batch_id, index)

    view = run_async(look())
    if json:
        say_json(described(view) | {"payload": _value(view.payload), "result": _value(view.result)})
        return
    say(f"{run}  {view.state}")
    lines: list[tuple[str, object]] = [
        ("task", view.task),
        ("batch", view.batch_id),
        ("index", view.index),
        ("queue", f"{view.queue}, priority {view.priority}"),
        ("attempt", view.attempt),
        ("crashes", view.crashes_count),
        ("due (UTC)", moment(view.due_us)),
        ("expires (UTC)", moment(view.expires_us)),
        ("tags", ", ".join(view.tags) or "-"),
        ("idempotency key", view.idempotency_key or "-"),
        *((f"header {name}", value) for name, value in view.headers.items()),
        ("payload", _shown(view.payload)),
        ("result" if view.state == "completed" else "error", _shown(view.result)),
        *((f"attempt {number}", _shown_attempt(attempt)) for number, attempt in enumerate(view.attempts, 1)),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        say(f"  {name:<{width}}  {value}")


@app.command("cancel")
def cancel(run: RunArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Cancel a run that has not ended."""
    from headrace.foundation.ids import parse_run_id

    settings = settings_of(store=store)
    batch_id, index = parse_run_id(run)

    async def stop() -> tuple[int, RunRecord]:
        async with opened(settings, must_exist=True) as engine:
            count = await engine.store.cancel_runs(batch_id, [index], now_us=engine.clock.now_us())
            return count, await engine.store.run(batch_id, index)

    count, view = run_async(stop())
    if json:
        say_json({"cancelled": bool(count), **described(view)})
    elif not count:
        say(f"{run} is {view.state} already; nothing was changed")
    elif view.state == "cancelled":
        say(f"{run} is cancelled")
    else:
        say(f"{run} is {view.state}; its worker is asked to stop it")


@app.command("retry")
def retry(run: RunArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Run again one run that failed, was cancelled or expired, from its first attempt."""
    from headrace.foundation.errors import Conflict
    from headrace.foundation.ids import parse_run_id

    settings = settings_of(store=store)
    batch_id, index = parse_run_id(run)

    async def again() -> RunRecord:
        async with opened(settings, must_exist=True) as engine:
            before = await engine.store.run(batch_id, index)
            if not await engine.store.redrive(batch_id, [index]):
                raise Conflict(
                    f"{run} is {before.state}: only a run that failed, was cancelled or expired can run again",
                    hint="`headrace run list --state failed` shows those that failed",
                )
            return await engine.store.run(batch_id, index)

    view = run_async(again())
    if json:
        say_json({"retried": True, **described(view)})
    else:
        say(f"{run} will run again")


def described(view: RunRecord) -> dict[str, Any]:
    """A run as JSON, without its payload."""
    from headrace.foundation.ids import run_id

    return {
        "run": run_id(view.batch_id, view.index),
        "batch": view.batch_id,
        "index": view.index,
        "environment": view.environment,
        "task": view.task,
        "queue": view.queue,
        "priority": view.priority,
        "state": view.state,
        "attempt": view.attempt,
        "crashes": view.crashes_count,
        "due_us": view.due_us,
        "expires_us": view.expires_us,
        "headers": view.headers,
        "tags": view.tags,
        "idempotency_key": view.idempotency_key,
        "attempts": view.attempts,
        **({"activation": view.name} if view.name else {}),
    } | ({"error": _value(view.result)} if view.state == "failed" else {})


def _why(view: RunRecord) -> str:
    """A failed run's error, short."""
    value = _value(view.result) if view.state == "failed" else None
    if not isinstance(value, dict):
        return ""
    text = f"{value.get('type')}: {value.get('message')}".replace("\n", " ")
    return text if len(text) <= 80 else text[:79] + "…"


def _value(data: bytes) -> Any:
    """JSON bytes as a value that can be part of other JSON; text where they are none."""
    import msgspec

    if not data:
        return None
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data.decode("utf-8", "backslashreplace")


def _shown(data: bytes) -> str:
    text = data.decode("utf-8", "backslashreplace")
    return text[:SHOWN_BYTES] + (f"… ({len(data):,} bytes)" if len(text) > SHOWN_BYTES else "") or "-"


def _shown_attempt(attempt: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in attempt.items())
