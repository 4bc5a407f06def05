"""`headrace config`: show the effective settings and their sources."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.invocation.opening import JsonOption, ServerOption, StoreOption, place_of, settings_of
from headrace.cli.invocation.printing import say_json, table

app = typer.Typer(no_args_is_help=True, help="Show the effective settings and their sources.")


@app.callback()
def root() -> None:
    """Show the effective settings and their sources."""


@app.command("show")
def show(
    target: Annotated[
        str,
        typer.Argument(metavar="[MODULE_OR_FILE:APP]", help="The app whose settings to show. Default: none."),
    ] = "",
    store: StoreOption = None,
    server: ServerOption = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Override the setting, as in `headrace map`.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Override the setting, as in `headrace map`.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show every setting with its value and its source; secrets are hidden.

    A flag overrides an environment variable, which overrides `Headrace(…)` in the app's code, which overrides
    headrace.toml.
    """
    from headrace.cli.invocation.target_loader import load_app

    target_app = load_app(target) if target else None
    place = place_of(store, server)
    settings = settings_of(target_app, store=place, concurrency=concurrency, processes=processes)
    lines = settings.shown()
    if json:
        say_json({"settings": [line._asdict() for line in lines]})
    else:
        table(("setting", "value", "from"), lines)
