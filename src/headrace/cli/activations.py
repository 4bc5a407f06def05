"""`headrace activations`: bring in what the task broker's workers are to do."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

import typer

from headrace.cli.opening import JsonOption, ServerOption, StoreOption, opened, place_of, run_async, settings_of
from headrace.cli.printing import counted, note, say, say_json

if TYPE_CHECKING:
    from headrace.grpc.taskbroker.activation_intake import IntakeResult

app = typer.Typer(no_args_is_help=True, help="Bring in what the task broker's workers are to do.")

PIECE_BYTES: Final = 256 * 1024
SOME_REFUSED: Final = 3


@app.callback()
def group() -> None:
    """Bring in what the task broker's workers are to do."""


@app.command("load")
def load(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="TaskActivation messages, each after its length; - is stdin.")
    ],
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Make a file's activations durable, each once by its id: a file that was cut off is loaded again whole.

    Exit code 3: some were refused, and the others are in.
    """
    from headrace.foundation.errors import InvalidInput, InvalidSetting

    try:
        from headrace.grpc.taskbroker.activation_intake import ActivationIntake
    except ModuleNotFoundError as error:
        raise InvalidSetting(f"activations need {error.name}", hint="pip install 'headrace[grpc]'") from None
    from headrace.runtime.producing.producer import Producer

    settings = settings_of(store=place_of(store, server))
    try:
        source = sys.stdin.buffer if file == "-" else Path(file).open("rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InvalidInput(f"{file} can't be read: {error.strerror or error}", hint="name a file, or -") from None

    async def loaded() -> IntakeResult:
        async with opened(settings) as engine:
            producer = Producer(engine)
            try:
                return await ActivationIntake(engine, producer).take(_pieces(source))
            finally:
                await producer.close()

    with source:
        taken = run_async(loaded())
    if json:
        say_json(
            {
                "accepted": taken.accepted,
                "duplicates": taken.duplicates,
                "dropped": taken.dropped,
                "refused": taken.refused_count,
                "refusals": [{"number": one.number, "id": one.id, "reason": one.reason} for one in taken.refused],
            }
        )
    else:
        for one in taken.refused:
            note(f"number {one.number} {one.id}: {one.reason}")
        told = [counted(taken.accepted, "activation"), f"{taken.duplicates} known already"]
        told += [f"{taken.dropped} switched off"] if taken.dropped else []
        told += [f"{taken.refused_count} refused"] if taken.refused_count else []
        say(", ".join(told))
    if taken.refused_count:
        raise typer.Exit(SOME_REFUSED)


async def _pieces(source: BinaryIO) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(source.read, PIECE_BYTES):
        yield piece
