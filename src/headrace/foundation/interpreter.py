"""Interpreter settings of processes that belong to Headrace: commands, and child processes that run tasks."""

from __future__ import annotations

import gc
import sys
from typing import Final

SWITCH_INTERVAL_S: Final = 0.0005
"""Longest time after which a thread that waits for the interpreter gets it, in seconds."""

GC_THRESHOLDS: Final = (10_000, 20, 100)
"""A hundred running calls hold some thousand live objects, which frequent collections would only traverse."""


def tune() -> None:
    """Apply the settings, and exclude the objects that exist by now from garbage collection."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
