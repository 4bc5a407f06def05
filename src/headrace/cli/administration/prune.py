"""`headrace prune`: delete old batches and orphaned objects now."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.invocation.opening import (
    JsonOption,
    NoServerOption,
    StoreOption,
    opened,
    place_of,
    run_async,
    settings_of,
)
from headrace.cli.invocation.printing import counted, duration, say, say_json


def command(
    store: StoreOption = None,
    server: NoServerOption = None,
    retention_ms: Annotated[
        int | None,
        typer.Option(
            metavar="MS",
            help="Keep finished batches for MS milliseconds; 0 keeps none. Default: the setting retention_ms.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Delete batches that finished before the retention period, and orphaned objects."""
    from headrace.runtime.maintenance.upkeep import Upkeep

    settings = settings_of(store=place_of(store, server), retention_ms=retention_ms)

    async def delete() -> tuple[int, int]:
        async with opened(settings, must_exist=True) as engine:
            upkeep = Upkeep(engine)
            return await upkeep.prune(), await upkeep.remove_orphans()

    batches_count, objects_count = run_async(delete())
    if json:
        say_json({"batches": batches_count, "objects": objects_count})
    else:
        age = duration(settings.limits.retention_ms / 1_000)
        say(
            f"{counted(batches_count, 'batch')} that finished more than {age} ago and "
            f"{counted(objects_count, 'object')} that nothing names: deleted"
        )
