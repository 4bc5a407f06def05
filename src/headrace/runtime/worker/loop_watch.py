"""A thread that notices when code blocks the event loop of a worker, and names the run.

It asks the loop for a sign of life twice a second while runs are in flight, so it costs a run nothing. A loop that does
not answer for a second is blocked; the thread reads from outside which task is running, and where.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, Final

from headrace.foundation.logs import CURRENT_RUN, get_logger

LOG: Any = get_logger("headrace.worker")
BLOCKED_S: Final = 1.0
ASK_S: Final = 0.5
_OTHERS_CODE: Final = (str(Path(__file__).parents[2]), str(Path(threading.__file__).parent))
"""Directories of Headrace and of the standard library: the line to show is in neither."""


class LoopWatch:
    """Watches the running event loop until `stop`. `is_busy`: True if runs are in flight. `ids_of`: the ids of the run
    that a task executes, empty if it executes none.
    """

    def __init__(
        self, *, is_busy: Callable[[], bool], ids_of: Callable[[asyncio.Task[Any]], Mapping[str, object]]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop_thread_id = threading.get_ident()
        self._is_busy = is_busy
        self._ids_of = ids_of
        self._stopped = threading.Event()
        self._answered = threading.Event()
        threading.Thread(target=self._watch, name="headrace-loop-watch", daemon=True).start()

    def stop(self) -> None:
        """End the thread. Returns at once."""
        self._stopped.set()
        self._answered.set()

    def _watch(self) -> None:
        while not self._stopped.wait(ASK_S):
            if not self._is_busy():
                continue
            self._answered.clear()
            asked_s = monotonic()
            try:
                self._loop.call_soon_threadsafe(self._answered.set)
            except RuntimeError:  # the loop was closed
                return
            if not self._answered.wait(BLOCKED_S) and (blocker := self._blocker()) is not None:
                LOG.warning("loop.blocked", **blocker, seconds=round(monotonic() - asked_s, 1))
                self._answered.wait()
                LOG.warning("loop.released", **blocker, seconds=round(monotonic() - asked_s, 1))

    def _blocker(self) -> dict[str, object] | None:
        """Return what blocks the loop: the ids of the run, and the line. None if no task is running."""
        task = asyncio.current_task(self._loop)
        if task is None:
            return None
        ids = self._ids_of(task) or _ids_in_context(task)
        frame = sys._current_frames().get(self._loop_thread_id)  # noqa: SLF001 - the public way to another thread's stack
        return {**(ids or {"task": task.get_name()}), "at": _line_of(frame)}


def _ids_in_context(task: asyncio.Task[Any]) -> Mapping[str, object]:
    """Return the ids of the run that started a task, where Python tells the context of a task (from 3.12 on)."""
    context: Any = getattr(task, "get_context", dict)()
    current = context.get(CURRENT_RUN)
    return {} if current is None else current.run_ids()


def _line_of(frame: FrameType | None) -> str:
    """Return the innermost line of a stack that is neither Headrace's nor the standard library's."""
    innermost = frame
    while frame is not None and frame.f_code.co_filename.startswith(_OTHERS_CODE):
        frame = frame.f_back
    shown = frame or innermost
    if shown is None:
        return ""
    return f"{shown.f_code.co_filename}:{shown.f_lineno} in {shown.f_code.co_name}"
