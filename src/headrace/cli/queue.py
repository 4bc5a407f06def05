"""`headrace queue`: look at queues, pause one, let it go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.opening import JsonOption, StoreOption, opened, run_async, settings_of
from headrace.cli.printing import duration, say, say_json, table

if TYPE_CHECKING:
    from headrace.store.protocol import QueueView

app = typer.Typer(no_args_is_help=True, help="Look at queues, pause one, let it go on.")

QueueArgument = Annotated[str, typer.Argument(metavar="QUEUE", help="A queue's name.")]


@app.command("list")
def list_(store: StoreOption = None, json: JsonOption = False) -> None:
    """The queues that were ever used or paused."""
    import msgspec

    settings = settings_of(store=store)

    async def look() -> tuple[list[QueueView], int]:
        async with opened(settings, must_exist=True) as engine:
            return await engine.store.queues(engine.environment), engine.clock.now_us()

    found, now_us = run_async(look())
    if json:
        say_json({"queues": [msgspec.structs.asdict(view) for view in found]})
        return
    if not found:
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
            for view in found
        ],
        numbers=numbers,
    )


@app.command("pause")
def pause(queue: QueueArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Hand out nothing more of a queue; what is under way goes on."""
    _set(queue, store, paused=True, json=json)


@app.command("resume")
def resume(queue: QueueArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Hand out a paused queue's runs again."""
    _set(queue, store, paused=False, json=json)


@app.command("demote")
def demote(
    queue: QueueArgument,
    to: Annotated[str, typer.Option("--to", metavar="QUEUE", help="The queue that takes its place.")],
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Send a queue's activations to another queue: those that come in at once, those that wait by and by.

    A queue of activations is called application:namespace.
    """
    from headrace.runtime.tasks.bounds import check_name

    check_name("queue", to)
    _demote(queue, to, store, json=json)


@app.command("restore")
def restore(queue: QueueArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Let a demoted queue's activations stay where they belong; those that were moved stay where they are."""
    _demote(queue, None, store, json=json)


def _demote(queue: str, target: str | None, store: str | None, *, json: bool) -> None:
    from headrace.core.rules import DEMOTIONS, Rules, demotions_encoded
    from headrace.runtime.dispatch.rule_cache import decide
    from headrace.runtime.tasks.bounds import check_name

    check_name("queue", queue)
    settings = settings_of(store=store)

    def changed(rules: Rules) -> bytes:
        after = {name: to for name, to in rules.demotions.items() if name != queue}
        return demotions_encoded(after if target is None else after | {queue: target})

    async def change() -> dict[str, str]:
        async with opened(settings, must_exist=True) as engine:
            return (await decide(engine, DEMOTIONS, changed)).demotions

    demotions = run_async(change())
    if json:
        say_json({"demotions": demotions})
    else:
        say(f"{queue} goes to {target}" if target is not None else f"{queue} stays where it belongs")


def _set(queue: str, store: str | None, *, paused: bool, json: bool) -> None:
    from headrace.runtime.tasks.bounds import check_name

    check_name("queue", queue)
    settings = settings_of(store=store)

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
