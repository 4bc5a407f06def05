"""`headrace queue`: list queues, pause and resume one, reroute its activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
from headrace.cli.invocation.printing import duration, say, say_json, table

if TYPE_CHECKING:
    from headrace.store.protocol import QueueView

app = typer.Typer(no_args_is_help=True, help="List queues, pause and resume one, reroute its activations.")

QueueArgument = Annotated[str, typer.Argument(metavar="QUEUE", help="The queue's name.")]


@app.command("list")
def list_(store: StoreOption = None, server: ServerOption = None, json: JsonOption = False) -> None:
    """List every queue that was ever used or paused, with its waiting runs."""
    import msgspec

    settings = settings_of(store=place_of(store, server))

    async def read() -> tuple[list[QueueView], int]:
        async with opened(settings, must_exist=True) as engine:
            return await engine.store.queues(engine.environment), engine.clock.now_us()

    views, now_us = run_async(read())
    if json:
        say_json({"queues": [msgspec.structs.asdict(view) for view in views]})
        return
    if not views:
        say("no queues")
        return
    numbers = ("waiting", "delayed", "leased")
    table(
        ("queue", "state", *numbers, "oldest waits"),
        [
            (
                view.name,
                "paused" if view.paused else "running",
                view.waiting_count,
                view.delayed_count,
                view.leased_count,
                duration(max(0, now_us - view.oldest_us) / 1_000_000) if view.oldest_us else "-",
            )
            for view in views
        ],
        numbers=numbers,
    )


@app.command("pause")
def pause(
    queue: QueueArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False
) -> None:
    """Pause a queue: its runs are no longer given to workers; running ones finish."""
    _set_paused(queue, place_of(store, server), paused=True, json=json)


@app.command("resume")
def resume(
    queue: QueueArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False
) -> None:
    """Resume a paused queue."""
    _set_paused(queue, place_of(store, server), paused=False, json=json)


@app.command("demote")
def demote(
    queue: QueueArgument,
    to: Annotated[str, typer.Option("--to", metavar="QUEUE", help="The queue that receives its activations.")],
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Reroute a queue's activations to another queue: new ones at once, waiting ones gradually.

    A queue of activations is called application:namespace.
    """
    from headrace.runtime.tasks.bounds import check_name

    check_name("queue", to)
    _set_demotion(queue, to, place_of(store, server), json=json)


@app.command("restore")
def restore(
    queue: QueueArgument, store: StoreOption = None, server: ServerOption = None, json: JsonOption = False
) -> None:
    """Stop rerouting a queue's activations; those that were moved stay in the other queue."""
    _set_demotion(queue, None, place_of(store, server), json=json)


def _set_demotion(queue: str, target: str | None, place: str | None, *, json: bool) -> None:
    from headrace.core.rules import DEMOTIONS, Rules, demotions_encoded
    from headrace.runtime.dispatch.rule_cache import change_rules
    from headrace.runtime.tasks.bounds import check_name

    check_name("queue", queue)
    settings = settings_of(store=place)

    def changed(rules: Rules) -> bytes:
        kept_demotions = {name: to for name, to in rules.demotions.items() if name != queue}
        return demotions_encoded(kept_demotions if target is None else kept_demotions | {queue: target})

    async def change() -> dict[str, str]:
        async with opened(settings, must_exist=True) as engine:
            return (await change_rules(engine, DEMOTIONS, changed)).demotions

    demotions = run_async(change())
    if json:
        say_json({"demotions": demotions})
    else:
        say(f"{queue} is rerouted to {target}" if target is not None else f"{queue} is no longer rerouted")


def _set_paused(queue: str, place: str | None, *, paused: bool, json: bool) -> None:
    from headrace.runtime.tasks.bounds import check_name

    check_name("queue", queue)
    settings = settings_of(store=place)

    async def change() -> bool:
        async with opened(settings, must_exist=True) as engine:
            before = {view.name: view.paused for view in await engine.store.queues(engine.environment)}
            await engine.store.pause_queue(engine.environment, queue, paused=paused)
            return before.get(queue, False) != paused

    has_changed = run_async(change())
    if json:
        say_json({"queue": queue, "paused": paused, "changed": has_changed})
    else:
        say(f"{queue} is {'paused' if paused else 'running'}{'' if has_changed else ' already'}")
