"""`headrace schedule`: look at what runs by the clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from headrace.cli.opening import JsonOption, ServerOption, StoreOption, opened, place_of, run_async, settings_of
from headrace.cli.printing import moment, say, say_json, table

if TYPE_CHECKING:
    from headrace.store.protocol import Schedule

app = typer.Typer(no_args_is_help=True, help="Look at what runs by the clock.")


@app.callback()
def group() -> None:
    """Look at what runs by the clock."""


@app.command("list")
def list_(store: StoreOption = None, server: ServerOption = None, json: JsonOption = False) -> None:
    """The schedules that workers made known, and when they tick.

    One that is `gone` is not in its app's code any more; one that is `overdue` has no worker that runs.
    """
    settings = settings_of(store=place_of(store, server))

    async def look() -> tuple[list[Schedule], int]:
        async with opened(settings, must_exist=True) as engine:
            return await engine.store.schedules(engine.environment), engine.clock.now_us()

    found, now_us = run_async(look())
    grace_us = settings.limits.schedule_grace_ms * 1_000
    rows = [_row(one, now_us - grace_us) for one in found]
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


def _row(one: Schedule, late_us: int) -> dict[str, Any]:
    """A schedule as it is shown; `next_us` and `last_us` are None where there is no such tick."""
    from headrace.runtime.tasks.schedule_spec import rule_known_as

    next_us = None if one.gone_us else rule_known_as(one).after(one.last_us)
    state = "gone" if one.gone_us else "overdue" if next_us is not None and next_us < late_us else "on"
    return {
        "name": one.name,
        "app": one.app,
        "task": one.task,
        "expression": one.expression,
        "zone": one.zone,
        "state": state,
        "next_us": next_us,
        "last_us": one.ticked_us or None,
        "gone_us": one.gone_us or None,
    }
