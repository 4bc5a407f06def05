"""`headrace schedule`: list schedules, run one now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
from headrace.cli.invocation.printing import moment, say, say_json, table

if TYPE_CHECKING:
    from headrace.store.protocol import Schedule

app = typer.Typer(no_args_is_help=True, help="List schedules, run one now.")


@app.callback()
def group() -> None:
    """List schedules, run one now."""


@app.command("list")
def list_(store: StoreOption = None, server: ServerOption = None, json: JsonOption = False) -> None:
    """List the schedules that workers have registered, with their next and last ticks.

    State `gone`: the app's code has no such schedule any more. State `overdue`: no worker of the app runs.
    """
    settings = settings_of(store=place_of(store, server))

    async def read() -> tuple[list[Schedule], int]:
        async with opened(settings, must_exist=True) as engine:
            return await engine.store.schedules(engine.environment), engine.clock.now_us()

    schedules, now_us = run_async(read())
    grace_us = settings.limits.schedule_grace_ms * 1_000
    rows = [_row(schedule, now_us - grace_us) for schedule in schedules]
    if json:
        say_json({"schedules": rows})
        return
    if not rows:
        say("no schedules")
        return
    table(
        ("schedule", "task", "expression", "zone", "state", "next (UTC)", "last (UTC)"),
        [
            (
                row["name"],
                row["task"],
                row["expression"],
                row["zone"],
                row["state"],
                moment(row["next_us"] or 0),
                moment(row["last_us"] or 0),
            )
            for row in rows
        ],
    )


@app.command("run")
def run(
    target: Annotated[str, typer.Argument(metavar="MODULE_OR_FILE:APP", help="The app that has the schedule.")],
    name: Annotated[str, typer.Argument(metavar="SCHEDULE", help="Its name, as `headrace schedule list` shows it.")],
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Enqueue a run of a schedule now, beside its ticks.

    The run is that of a tick at this moment. The next tick is not affected.
    """
    import msgspec

    from headrace.cli.invocation.target_loader import load_app
    from headrace.foundation.errors import NotFound
    from headrace.foundation.ids import run_id
    from headrace.foundation.suggestions import hint_of

    loaded = load_app(target)
    settings = settings_of(loaded, store=place_of(store, server))
    spec = loaded.registry.schedules.get(name)
    if spec is None:
        names = sorted(loaded.registry.schedules)
        raise NotFound(f"the app has no schedule {name[:60]!r}", hint=hint_of(name[:200], names, "its schedules"))

    async def enqueue() -> str:
        async with opened(settings) as engine:
            now_us = engine.clock.now_us()
            new, chunk = spec.run(engine, now_us)
            if not engine.is_maintained_here:  # a server takes batches, and no single runs
                new = msgspec.structs.replace(new, kind="batch")
            await engine.store.create_batch(new, now_us=now_us)
            await engine.store.append(new.id, [chunk], now_us=now_us, seals=True)
            engine.wakeup.notify()
            return run_id(new.id, 0)

    enqueued = run_async(enqueue())
    if json:
        say_json({"run": enqueued, "schedule": name})
    else:
        say(f"{enqueued} is enqueued")


def _row(schedule: Schedule, late_us: int) -> dict[str, Any]:
    """Return a schedule as shown; `next_us` and `last_us` are None where there is no such tick."""
    from headrace.runtime.tasks.schedule_spec import stored_rule

    next_us = None if schedule.gone_us else stored_rule(schedule).after(schedule.last_us)
    state = "gone" if schedule.gone_us else "overdue" if next_us is not None and next_us < late_us else "on"
    return {
        "name": schedule.name,
        "app": schedule.app,
        "task": schedule.task,
        "expression": schedule.expression,
        "zone": schedule.zone,
        "state": state,
        "next_us": next_us,
        "last_us": schedule.ticked_us or None,
        "gone_us": schedule.gone_us or None,
    }
