"""Threads that run one function at a time, for tests: plain functions in the order in which they began.

A function that waits in a blocking call of its app lets the next one run, since it may wait for that one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from headrace.runtime.background_loop import pauses

P = ParamSpec("P")
T = TypeVar("T")


class SequentialThreads(Executor):
    """An executor whose functions run one after the other, each in a thread."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._turn = threading.Condition()
        self._is_busy = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function when the functions before it have ended or wait."""
        future: Future[T] = Future()
        with self._turn:
            self._waiting.append((future, lambda: fn(*args, **kwargs)))
            self._start_next()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - never waits
        """Begin no function that has not begun, with `cancel_futures`."""
        if cancel_futures:
            with self._turn:
                while self._waiting:
                    self._waiting.popleft()[0].cancel()

    def _start_next(self) -> None:
        if self._waiting and not self._is_busy:
            self._is_busy = True
            threading.Thread(target=self._run, name="headrace-run", daemon=True).start()

    def _run(self) -> None:
        pauses.paused = self._paused
        while True:
            with self._turn:
                if not self._waiting:
                    self._is_busy = False
                    self._turn.notify()
                    return
                future, call = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - the future carries it to the run
                future.set_exception(error)
            else:
                future.set_result(result)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Allow other functions to run while this thread waits for its app."""
        with self._turn:
            self._is_busy = False
            self._turn.notify()
            self._start_next()
        try:
            yield
        finally:
            with self._turn:
                while self._is_busy:
                    self._turn.wait()
                self._is_busy = True
