"""`headrace killswitch`: drop activations of a task, all of them or those with certain arguments."""

from __future__ import annotations

from collections.abc import Callable
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
from headrace.cli.invocation.printing import say, say_json, table

if TYPE_CHECKING:
    from headrace.core.rules import Kill

app = typer.Typer(no_args_is_help=True, help="Drop activations of a task, all of them or those with certain arguments.")

TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")]


@app.command("list")
def list_(store: StoreOption = None, server: ServerOption = None, json: JsonOption = False) -> None:
    """List killswitch rules."""
    kills = _changed(place_of(store, server), lambda kills: kills)
    if json:
        say_json({"killswitch": [_shown(kill) for kill in kills]})
    elif not kills:
        say("no killswitch rules")
    else:
        table(
            ("task", "positional arguments", "keyword arguments"),
            [(kill.name, _shown_values(kill.args), _shown_values(kill.kwargs)) for kill in kills],
        )


@app.command("add")
def add(
    task: TaskArgument,
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="N=JSON", help="Drop only activations with this positional argument; N counts from 0."),
    ] = None,
    kwarg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=JSON", help="Drop only activations with this keyword argument.")
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Drop activations of a task when they arrive and before they are delivered.

    With arguments, an activation is dropped when any of them has this value and type.
    """
    from headrace.core.rules import Kill
    from headrace.runtime.tasks.bounds import check_name

    check_name("task", task)
    kill = Kill(name=task, args=_values(arg), kwargs=_values(kwarg))
    kills = _changed(place_of(store, server), lambda kills: kills if kill in kills else [*kills, kill])
    _report(
        kills,
        f"activations of {task} are dropped"
        if not kill.is_selective
        else f"activations of {task} with these arguments are dropped",
        json,
    )


@app.command("remove")
def remove(
    task: TaskArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False
) -> None:
    """Remove the killswitch rules of a task."""
    kills = _changed(place_of(store, server), lambda kills: [kill for kill in kills if kill.name != task])
    _report(kills, f"activations of {task} run", json)


def _report(kills: list[Kill], text: str, json: bool) -> None:
    if json:
        say_json({"killswitch": [_shown(kill) for kill in kills]})
    else:
        say(text)


def _changed(place: str | None, change: Callable[[list[Kill]], list[Kill]]) -> list[Kill]:
    """Apply a change and return the killswitch rules."""
    from headrace.core.rules import KILLSWITCH, kills_encoded
    from headrace.runtime.dispatch.rule_cache import change_rules

    settings = settings_of(store=place)

    async def work() -> list[Kill]:
        async with opened(settings, must_exist=True) as engine:
            return (await change_rules(engine, KILLSWITCH, lambda rules: kills_encoded(change(rules.kills)))).kills

    return run_async(work())


def _values(given: list[str] | None) -> dict[str, Any]:
    import msgspec

    from headrace.foundation.errors import InvalidInput

    values = {}
    for argument in given or ():
        name, separator, value = argument.partition("=")
        try:
            values[name] = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeError):
            separator = ""
        if not separator or not name:
            raise InvalidInput(
                f"expected NAME=JSON, got {argument!r}", hint="write 0=17, or to='\"a@b\"': the value is JSON"
            )
    return values


def _shown(kill: Kill) -> dict[str, Any]:
    return {"task": kill.name, "args": kill.args, "kwargs": kill.kwargs}


def _shown_values(values: dict[str, Any]) -> str:
    import msgspec

    return ", ".join(f"{name}={msgspec.json.encode(value).decode()}" for name, value in values.items())
