"""How the interpreter is set in a process that is ours alone: one of a command, or a child that runs tasks."""

from __future__ import annotations

import gc
import sys
from typing import Final

SWITCH_INTERVAL_S: Final = 0.0005
"""A thread that waits for a database, and then for the interpreter, gets it after so long at the most."""

GC_THRESHOLDS: Final = (10_000, 20, 100)
"""A hundred calls or runs under way are some thousand objects: looking through them each time finds nothing."""


def tune() -> None:
    """Set it; what is there by now is never looked through again."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
