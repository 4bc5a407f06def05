"""`headrace killswitch`: drop the activations of a task, all of them or some, while things run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.opening import JsonOption, ServerOption, StoreOption, opened, place_of, run_async, settings_of
from headrace.cli.printing import say, say_json, table

if TYPE_CHECKING:
    from headrace.core.rules import Kill

app = typer.Typer(no_args_is_help=True, help="Drop the activations of a task, all of them or some.")

TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="The name of a task.")]


@app.command("list")
def list_(store: StoreOption = None, server: ServerOption = None, json: JsonOption = False) -> None:
    """What is dropped."""
    kills = _changed(place_of(store, server), lambda kills: kills)
    if json:
        say_json({"killswitch": [_shown(kill) for kill in kills]})
    elif not kills:
        say("nothing is dropped")
    else:
        table(("task", "by place", "by name"), [(kill.name, _said(kill.args), _said(kill.kwargs)) for kill in kills])


@app.command("add")
def add(
    task: TaskArgument,
    arg: Annotated[
        list[str] | None, typer.Option(metavar="N=JSON", help="Only with this argument at place N, from 0.")
    ] = None,
    kwarg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=JSON", help="Only with this argument by name.")
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Drop activations of a task as they come in and before they are handed out.

    With arguments only those of which any one is just this value, of this type; others run.
    """
    from headrace.core.rules import Kill
    from headrace.runtime.tasks.bounds import check_name

    check_name("task", task)
    kill = Kill(name=task, args=_values(arg), kwargs=_values(kwarg))
    kills = _changed(place_of(store, server), lambda kills: kills if kill in kills else [*kills, kill])
    _tell(kills, f"{task} is dropped" if not kill.is_selective else f"{task} is dropped with these arguments", json)


@app.command("remove")
def remove(
    task: TaskArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False
) -> None:
    """Let activations of a task run again."""
    kills = _changed(place_of(store, server), lambda kills: [kill for kill in kills if kill.name != task])
    _tell(kills, f"{task} runs", json)


def _tell(kills: list[Kill], said: str, json: bool) -> None:
    if json:
        say_json({"killswitch": [_shown(kill) for kill in kills]})
    else:
        say(said)


def _changed(place: str | None, change: Callable[[list[Kill]], list[Kill]]) -> list[Kill]:
    """The killswitch after a change."""
    from headrace.core.rules import KILLSWITCH, kills_encoded
    from headrace.runtime.dispatch.rule_cache import decide

    settings = settings_of(store=place)

    async def work() -> list[Kill]:
        async with opened(settings, must_exist=True) as engine:
            return (await decide(engine, KILLSWITCH, lambda rules: kills_encoded(change(rules.kills)))).kills

    return run_async(work())


def _values(given: list[str] | None) -> dict[str, Any]:
    import msgspec

    from headrace.foundation.errors import InvalidInput

    found = {}
    for one in given or ():
        name, separator, value = one.partition("=")
        try:
            found[name] = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeError):
            separator = ""
        if not separator or not name:
            raise InvalidInput(f"{one!r} is no argument", hint="write 0=17, or to='\"a@b\"': the value is JSON")
    return found


def _shown(kill: Kill) -> dict[str, Any]:
    return {"task": kill.name, "args": kill.args, "kwargs": kill.kwargs}


def _said(values: dict[str, Any]) -> str:
    import msgspec

    return ", ".join(f"{name}={msgspec.json.encode(value).decode()}" for name, value in values.items())
