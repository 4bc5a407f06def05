"""`headrace config`: what is in force, and who said so."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.opening import JsonOption, StoreOption, settings_of
from headrace.cli.printing import say_json, table

app = typer.Typer(no_args_is_help=True, help="What is in force, and who said so.")


@app.callback()
def root() -> None:
    """What is in force, and who said so."""


@app.command("show")
def show(
    store: StoreOption = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="As for `headrace map`.")] = None,
    processes: Annotated[int | None, typer.Option(metavar="N", help="As for `headrace map`.")] = None,
    json: JsonOption = False,
) -> None:
    """Every setting with its value and where it came from; secrets are hidden."""
    settings = settings_of(store=store, concurrency=concurrency, processes=processes)
    shown = settings.shown()
    if json:
        say_json({"settings": [line._asdict() for line in shown]})
    else:
        table(("setting", "value", "from"), shown)
