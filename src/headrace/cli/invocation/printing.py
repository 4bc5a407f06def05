"""Output of commands: lines, tables that fit the terminal, one JSON object."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from headrace.foundation.errors import HeadraceError
from headrace.foundation.escaping import escaped, escaped_line

GAP: Final = "  "
WIDTH_MIN: Final = 20


def say(text: str) -> None:
    """Write a line of the answer to standard output, its control characters escaped."""
    sys.stdout.write(escaped(text) + "\n")


class _Notes:
    """The form of notes: lines for people, or lines of the log."""

    are_logged = False


def notes_are_logged(*, are_logged: bool) -> None:
    """Write notes as lines of the log from now on, so that each line has the log's format."""
    _Notes.are_logged = are_logged


def notes_are_json() -> bool:
    """True if notes are lines of a JSON log."""
    return _Notes.are_logged


def note(text: str) -> None:
    """Write a line beside the answer to standard error, its control characters escaped."""
    if _Notes.are_logged:
        import logging

        logging.getLogger("headrace.command").log(
            logging.ERROR if text.startswith("error: ") else logging.INFO, "%s", text
        )
        return
    sys.stderr.write(escaped(text) + "\n")
    sys.stderr.flush()


def say_json(value: Any) -> None:
    """Write the answer as one JSON object on one line."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def note_json(value: Any) -> None:
    """Write one JSON object beside the answer, unchanged: a JSON parser reads it."""
    sys.stderr.write(msgspec.json.encode(value).decode() + "\n")
    sys.stderr.flush()


def error_lines(error: HeadraceError) -> str:
    """Return an error as the command line shows it: message, ids and hint."""
    return f"error: {error}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """Write rows under headings; columns named in `numbers` are aligned right.

    Where a row is wider than the terminal, its last columns continue on indented lines, and long text wraps between
    words. An id is never broken.
    """
    cells = [[f"{cell:,}" if isinstance(cell, int) else escaped_line(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    bound = line_width()
    lines = _columns_by_line(widths, bound)
    for row in (columns, None, *cells):
        if row is None:
            say("─" * min(bound or sys.maxsize, max(_width_of(line, widths) for line in lines)))
            continue
        for number, line in enumerate(lines):
            _say_cells(
                row, line, widths, [columns[at] in numbers for at in line], indent=GAP if number else "", bound=bound
            )


def pairs(heading: str, values: Sequence[tuple[str, object]]) -> None:
    """Write a heading and values by name below it; long values wrap, and long words get lines of their own."""
    say(heading)
    texts = [(escaped_line(name), escaped(str(value))) for name, value in values]
    width = max(len(name) for name, _ in texts)
    bound = line_width()
    for name, value in texts:
        left = None if bound is None else bound - width - 2 * len(GAP)
        if left is not None and bound is not None and any(len(word) > left for word in value.split()):
            say(f"{GAP}{name}")
            for line in _wrapped(value, bound - 2 * len(GAP)):
                say(f"{GAP}{GAP}{line}".rstrip())
            continue
        first, *rest = _wrapped(value, left)
        say(f"{GAP}{name:<{width}}{GAP}{first}".rstrip())
        for line in rest:
            say(f"{GAP}{'':<{width}}{GAP}{line}".rstrip())


def line_width() -> int | None:
    """Return the columns of the terminal, or those that COLUMNS sets; None where output goes to a file or pipe."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdecimal():
        return None
    return max(WIDTH_MIN, shutil.get_terminal_size().columns)


def moment(at: int | datetime | None) -> str:
    """Return a time in UTC to the second; a dash for none. A number is microseconds since 1970."""
    if not at:
        return "-"
    return f"{datetime.fromtimestamp(at / 1_000_000, UTC) if isinstance(at, int) else at:%Y-%m-%d %H:%M:%S}"


def duration(seconds: float) -> str:
    """Return a length of time in the unit that fits."""
    if seconds < 1:
        return f"{seconds * 1_000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(count_bytes: float) -> str:
    """Return a number of bytes in the unit that fits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count_bytes < 1_024:
            return f"{count_bytes:,.0f} {unit}" if unit == "bytes" else f"{count_bytes:,.1f} {unit}"
        count_bytes /= 1_024
    return f"{count_bytes:,.1f} TiB"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: `1 run`, `2,000 runs`."""
    plural = f"{noun}es" if noun.endswith(("ch", "s")) else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def silence_stdout() -> None:
    """Discard standard output after its reader went away, so that the interpreter's last flush does not fail."""
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
    except (OSError, ValueError):
        return


def _columns_by_line(widths: Sequence[int], bound: int | None) -> list[list[int]]:
    """Distribute columns over as few lines as fit; lines after the first are indented."""
    lines: list[list[int]] = [[]]
    for column in range(len(widths)):
        indent = len(GAP) if len(lines) > 1 else 0
        if lines[-1] and bound is not None and indent + _width_of([*lines[-1], column], widths) > bound:
            lines.append([])
        lines[-1].append(column)
    return lines


def _width_of(line: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[column] for column in line) + len(GAP) * (len(line) - 1)


def _say_cells(
    row: Sequence[str],
    line: Sequence[int],
    widths: Sequence[int],
    are_numbers: Sequence[bool],
    *,
    indent: str,
    bound: int | None,
) -> None:
    """Write one line of a row; a column that is alone on its line wraps."""
    if len(line) == 1:
        for part in _wrapped(row[line[0]], None if bound is None else bound - len(indent)):
            say(f"{indent}{part}".rstrip())
        return
    cells = [
        row[column].rjust(widths[column]) if is_number else row[column].ljust(widths[column])
        for column, is_number in zip(line, are_numbers, strict=True)
    ]
    say(f"{indent}{GAP.join(cells)}".rstrip())


def _wrapped(text: str, width: int | None) -> list[str]:
    if width is None:
        return [text]
    wrapped = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]
    ]
    return wrapped or [""]
