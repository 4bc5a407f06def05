"""`headrace map`: a task over a stream of items, durably. The main job."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.opening import JsonOption, ServerOption, StoreOption


def command(
    task: Annotated[str, typer.Argument(metavar="MODULE_OR_FILE:TASK", help="A task, or any function of one item.")],
    input_: Annotated[
        str, typer.Argument(metavar="INPUT", help="One JSON value a line; - is standard input; .gz and .zst are read.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="OUTPUT", help="Default: standard output.")
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="Runs under way at once.")] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Child processes that run the task, for what needs more cores.")
    ] = None,
    batch_key: Annotated[
        str, typer.Option(metavar="KEY", help="Tells maps of one task over one input apart, and lets - resume.")
    ] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, whatever an earlier start had done.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress.")] = False,
    json: JsonOption = False,
) -> None:
    """Run a task over every item of INPUT, and go on where it was when it is run again.

    OUTPUT gets a line for each item, in order: {"index":0,"ok":true,"output":…} or {"index":0,"ok":false,"error":…}.
    Exit codes: 0 all ok, 3 some runs failed, 2 bad usage, 130 interrupted.
    """
    from headrace.cli.mapping import Mapping
    from headrace.cli.opening import place_of, run_async, settings_of

    settings = settings_of(store=place_of(store, server), concurrency=concurrency, processes=processes)
    mapping = Mapping.prepare(
        settings,
        target=task,
        input_name=input_,
        output_name=output,
        batch_key=batch_key,
        fresh=fresh,
        shows_progress=not no_progress,
    )
    with mapping:
        summary = run_async(mapping.run())
    mapping.report(summary, as_json=json)
    raise typer.Exit(summary.exit_code)
