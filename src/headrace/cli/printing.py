"""What people and programs read: lines, tables, one JSON object."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from headrace.foundation.errors import HeadraceError


def say(text: str) -> None:
    """A line of the answer, on standard output."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """A line beside the answer, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_json(value: Any) -> None:
    """The answer as one JSON object on one line."""
    say(msgspec.json.encode(value).decode())


def error_lines(error: HeadraceError) -> str:
    """What went wrong, about what, and what to do."""
    return f"error: {error}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """Rows under headings, whole however narrow the terminal is; columns named in `numbers` end on the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    # As wide as it needs to be: half an id helps nobody, and a terminal wraps what does not fit.
    Console(file=sys.stdout, width=10_000, highlight=False).print(shown)


def moment(at_us: int) -> str:
    """A moment as people write it, in UTC; a dash for never."""
    return f"{datetime.fromtimestamp(at_us / 1_000_000, UTC):%Y-%m-%d %H:%M:%S}" if at_us else "-"


def duration(seconds: float) -> str:
    """A length of time in the unit that fits."""
    if seconds < 1:
        return f"{seconds * 1_000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(count_bytes: float) -> str:
    """A number of bytes in the unit that fits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count_bytes < 1_024:
            return f"{count_bytes:,.0f} {unit}" if unit == "bytes" else f"{count_bytes:,.1f} {unit}"
        count_bytes /= 1_024
    return f"{count_bytes:,.1f} TiB"


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 run`, `2,000 runs`."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def silence_stdout() -> None:
    """Nobody reads standard output any more: let the interpreter's last flush go nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        return
