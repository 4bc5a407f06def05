"""SIGINT and SIGTERM as calls on the loop of a command."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


class Signals:
    """SIGINT and SIGTERM as calls on the loop, while the block lasts."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._loop.add_signal_handler(number, self._call)
            except (NotImplementedError, RuntimeError, ValueError):  # not the main thread: nobody sends it signals
                return

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._loop.remove_signal_handler(number)
            except (NotImplementedError, RuntimeError, ValueError):
                return
