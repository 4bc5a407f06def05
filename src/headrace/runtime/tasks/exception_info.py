"""The stored description of an exception: its class, its message, and the frames of the task's own code."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import CodeType
from typing import Final

_RUNTIME_FOLDER: Final = str(Path(__file__).parents[1])
FRAMES_MAX: Final = 20
FORMATTED_MAX: Final = 256
_formatted: Final[dict[tuple[tuple[CodeType, int], ...], str]] = {}
"""Texts of tracebacks by their instructions."""


def describe(error: BaseException, *, chars_max: int) -> tuple[str, str, str]:
    """Return `(type, message, trace)`, each at most `chars_max` characters. A failing `__str__` is reported in the
    message.
    """
    kind = type(error).__qualname__
    try:
        message = str(error)
    except BaseException as broken:  # noqa: BLE001 - a broken __str__ must not break the worker
        message = f"<{kind}.__str__ raised {type(broken).__qualname__}>"
    return kind, message[:chars_max], _trace(error)[-chars_max:]


def _trace(error: BaseException) -> str:
    """Return the formatted frames of the task. Errors from the same instructions share one text: formatting one reads
    its source files, and costs more than fifty runs.
    """
    places: list[tuple[CodeType, int]] = []
    frames = error.__traceback__
    while frames is not None:
        code = frames.tb_frame.f_code
        if not code.co_filename.startswith(_RUNTIME_FOLDER):
            places.append((code, frames.tb_lasti))
        frames = frames.tb_next
    key = tuple(places[-FRAMES_MAX:])
    text = _formatted.get(key)
    if text is None:
        if len(_formatted) >= FORMATTED_MAX:
            _formatted.clear()
        text = _formatted[key] = _format(error)
    return text


def _format(error: BaseException) -> str:
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_RUNTIME_FOLDER)
    ]
    return "".join(traceback.format_list(frames[-FRAMES_MAX:]))


def error_line(error: BaseException) -> str:
    """Return an error as one line, even if its `__str__` fails."""
    kind = type(error).__qualname__
    try:
        return f"{kind}: {error}"
    except Exception:  # noqa: BLE001 - an error whose text can't be made must not raise another
        return kind
