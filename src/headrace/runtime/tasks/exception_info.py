"""The stored description of an exception: its class, its message, and the frames of the task's own code."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Final

_RUNTIME_FOLDER: Final = str(Path(__file__).parents[1])
FRAMES_MAX: Final = 20


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
