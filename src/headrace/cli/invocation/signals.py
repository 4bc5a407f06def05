"""SIGINT and SIGTERM as calls on a command's event loop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


class Signals:
    """Call a function on the loop for SIGINT and SIGTERM while the block lasts."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._loop.add_signal_handler(number, self._call)
            except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, which gets no signals
                return

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._loop.remove_signal_handler(number)
            except (NotImplementedError, RuntimeError, ValueError):
                return
