"""`headrace run enqueue`: store one run of a task, and wait for it if asked to."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from headrace.cli.inspection.run import seconds_of, show_view
from headrace.cli.invocation.opening import (
    RUNS_FAILED,
    JsonOption,
    ServerOption,
    StoreOption,
    opened,
    place_of,
    run_async,
    settings_of,
)
from headrace.cli.invocation.printing import note, say, say_json

if TYPE_CHECKING:
    from headrace.app import Headrace
    from headrace.core.serving import StalledLane
    from headrace.core.span import Key
    from headrace.runtime.engine import Engine
    from headrace.runtime.tasks.call_options import Options
    from headrace.runtime.tasks.task_spec import TaskSpec
    from headrace.views import RunView

STDIN: Final = "-"


def enqueue(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="A task's name, or MODULE_OR_FILE:TASK to check the item first.")
    ],
    item: Annotated[
        str, typer.Argument(metavar="JSON", help="The item, as a line of headrace map; - reads it.")
    ] = "{}",
    queue: Annotated[str | None, typer.Option(metavar="QUEUE", help="The queue. Default: that of the task.")] = None,
    priority: Annotated[int | None, typer.Option(metavar="N", help="Runs with a larger value start first.")] = None,
    delay: Annotated[str, typer.Option(metavar="10m", help="Start it after this time: 90s, 15m, 2h, 3d.")] = "",
    idempotency_key: Annotated[
        str, typer.Option(metavar="KEY", help="If this key names a run of the task, enqueue nothing.")
    ] = "",
    tag: Annotated[
        list[str] | None, typer.Option(metavar="TAG", help="A label to find the run by; repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the run has ended, and show it.")] = False,
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Store one run of a task; a worker executes it.

    A task by its name alone is not known here: its queue, at-most-once and dead-letter options are the defaults. With
    MODULE_OR_FILE:TASK they are those of the code. Exit codes: 0, and with --wait 3 if the run did not complete.
    """
    from headrace.runtime.tasks.call_options import Options

    owner, spec = _spec_of(task)
    settings = settings_of(owner, store=place_of(store, server))
    payload = _payload_of(item, spec)
    options = Options(
        queue=queue,
        priority=priority,
        delay_s=seconds_of(delay, "--delay") if delay else 0,
        idempotency_key=idempotency_key,
        tags=tuple(tag or ()),
    )

    async def store_it() -> tuple[RunView, bool]:
        async with opened(settings) as engine:
            batch_id, index, is_new = await _stored(engine, spec, payload, options)
            for lane in await _stalled(engine, spec.key):
                note(f"warning: no live worker takes it: {lane.reason}; {lane.hint}")
            return await _view(engine, batch_id, index, wait=wait), is_new

    view, is_new = run_async(store_it())
    if json:
        say_json({"new": is_new, "run": view})
    elif wait:
        show_view(view)
    else:
        say(f"{view.id} is enqueued" if is_new else f"{view.id} has this idempotency key already; nothing was enqueued")
    if wait and view.state != "completed":
        raise typer.Exit(RUNS_FAILED)


async def _any(item: Any) -> None:
    """Stand for a task of which only the name is known."""


def _spec_of(task: str) -> tuple[Headrace | None, TaskSpec]:
    """Return the app of a task, if the task names its module, and its declaration."""
    from headrace.cli.maps.mapping import load_task
    from headrace.runtime.tasks.task_spec import TaskSpec

    if ":" not in task:
        return None, TaskSpec(name=task, function=_any)
    owner, loaded = load_task(task)
    return owner, loaded.spec


def _payload_of(item: str, spec: TaskSpec) -> bytes:
    """Return the payload of an item. Raises `InvalidInput` if it is not JSON or does not fit the task."""
    import msgspec

    from headrace.core import pack
    from headrace.foundation.errors import InvalidInput

    text = sys.stdin.read() if item == STDIN else item
    try:
        value = msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise InvalidInput(
            f"expected one JSON value, got {text[:60]!r}: {error}",
            hint="""quote it for the shell: '{"title": "a"}'; a text is '"a"'""",
        ) from None
    payload: bytes = spec.codec.encode_value(value)
    spec.codec.decode(payload, pack.JSON)
    return payload


async def _stored(engine: Engine, spec: TaskSpec, payload: bytes, options: Options) -> tuple[str, int, bool]:
    """Store a run; return `(batch_id, index, is_new)`."""
    from headrace.runtime.producing.producer import Producer

    producer = Producer(engine)
    try:
        return await producer.enqueue_new(spec, payload, options)
    finally:
        await producer.close()


async def _view(engine: Engine, batch_id: str, index: int, *, wait: bool) -> RunView:
    """Return the run, with `wait` once it has ended."""
    from contextlib import suppress

    from headrace.app import Headrace
    from headrace.foundation.ids import run_id
    from headrace.handles import RunFailed

    owner = Headrace("enqueue")
    owner.use_engine(engine)
    run = await owner.get_run(run_id(batch_id, index))
    if wait:
        with suppress(RunFailed):  # the view shows why
            await run.result()
    return await run.view()


async def _stalled(engine: Engine, key: Key) -> list[StalledLane]:
    """Return why no live worker takes the runs of a key, if that is so."""
    lanes = await engine.store.stalled_lanes(engine.environment, batch_id="", now_us=engine.clock.now_us())
    return [lane for lane in lanes if lane.task == key.task]
