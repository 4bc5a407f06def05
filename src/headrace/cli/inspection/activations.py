"""`headrace activations`: load activations for the task broker's workers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

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
from headrace.cli.invocation.printing import counted, note, say, say_json

if TYPE_CHECKING:
    from headrace.grpc.taskbroker.activation_intake import IntakeResult

app = typer.Typer(no_args_is_help=True, help="Load activations for the task broker's workers.")

PIECE_BYTES: Final = 256 * 1024
SOME_REFUSED: Final = 3


@app.callback()
def group() -> None:
    """Load activations for the task broker's workers."""


@app.command("load")
def load(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A file of TaskActivation messages, each after its length as a varint; - is standard input.",
        ),
    ],
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Store the activations of a file, each once by its id; a load that was cut off can be repeated.

    Exit code 3: some activations were refused, the others are stored.
    """
    from headrace.foundation.errors import InvalidInput, InvalidSetting

    try:
        from headrace.grpc.taskbroker.activation_intake import ActivationIntake
    except ModuleNotFoundError as error:
        raise InvalidSetting(
            f"activations require the package {error.name}", hint="pip install 'headrace[grpc]'"
        ) from None
    from headrace.runtime.producing.producer import Producer

    settings = settings_of(store=place_of(store, server))
    try:
        source = sys.stdin.buffer if file == "-" else Path(file).open("rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InvalidInput(
            f"{file} can't be read: {error.strerror or error}", hint="FILE is a readable file, or - for standard input"
        ) from None

    async def load_all() -> IntakeResult:
        async with opened(settings) as engine:
            producer = Producer(engine)
            try:
                return await ActivationIntake(engine, producer).take(_pieces(source))
            finally:
                await producer.close()

    with source:
        intake = run_async(load_all())
    if json:
        say_json(
            {
                "accepted": intake.accepted,
                "duplicates": intake.duplicates,
                "dropped": intake.dropped,
                "refused": intake.refused_count,
                "refusals": [
                    {"number": refusal.number, "id": refusal.id, "reason": refusal.reason} for refusal in intake.refused
                ],
            }
        )
    else:
        for refusal in intake.refused:
            note(f"activation {refusal.number} ({refusal.id}) refused: {refusal.reason}")
        counts = [counted(intake.accepted, "activation"), f"{intake.duplicates} stored before"]
        counts += [f"{intake.dropped} dropped by the killswitch"] if intake.dropped else []
        counts += [f"{intake.refused_count} refused"] if intake.refused_count else []
        say(", ".join(counts))
    if intake.refused_count:
        raise typer.Exit(SOME_REFUSED)


async def _pieces(source: BinaryIO) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(source.read, PIECE_BYTES):
        yield piece
