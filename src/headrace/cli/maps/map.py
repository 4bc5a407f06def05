"""`headrace map`: run a task over a stream of items, durably."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from headrace.cli.invocation.opening import JsonOption, ServerOption, StoreOption


def command(
    task: Annotated[str, typer.Argument(metavar="MODULE_OR_FILE:TASK", help="A task, or any function of one item.")],
    input_: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="A file of one JSON value a line, also .gz or .zst; - is standard input."),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="OUTPUT", help="The file for the results. Default: standard output."),
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="Run at most N items at a time.")] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Run the task in N child processes, to use more CPU cores.")
    ] = None,
    batch_key: Annotated[
        str, typer.Option(metavar="KEY", help="Name the batch; required to resume from standard input.")
    ] = "",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over, and cancel an earlier batch of this map.")
    ] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Hide the progress bar.")] = False,
    json: JsonOption = False,
) -> None:
    """Run a task over every item of INPUT; repeat the command to resume after an interruption.

    OUTPUT gets one line for each item, in order: {"index":0,"ok":true,"output":…} or {"index":0,"ok":false,"error":…}.
    Exit codes: 0 all runs completed, 3 some runs failed, 2 usage or input error, 130 interrupted.
    """
    from headrace.cli.invocation.opening import place_of, run_async, settings_of
    from headrace.cli.maps.mapping import Mapping, load_task

    app, loaded_task = load_task(task)
    settings = settings_of(app, store=place_of(store, server), concurrency=concurrency, processes=processes)
    if settings.log_level != "debug":  # each failed item is in the output, and counted in the summary
        logging.getLogger("headrace.attempts").setLevel(logging.CRITICAL)
    mapping = Mapping.prepare(
        settings,
        app,
        loaded_task,
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
