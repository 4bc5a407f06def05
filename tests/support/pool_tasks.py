"""Tasks that child processes run, in a module that they can import."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

from headrace import Context, Headrace, Retry

app = Headrace("crew")
EVIL = re.compile(r"(a+)+b")


def note(path: str, line: str) -> None:
    """One line, whole, into a file that several processes share."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


@app.task(pool="process")
def double(item: int) -> int:
    return item * 2


@app.task(pool="process")
def pid(item: int) -> int:
    return os.getpid()


@app.task(pool="process")
def noted(path: str, item: int, poison: int = -1) -> int:
    note(path, f"{item}")
    if item == poison:
        os._exit(7)
    return item


@app.task(pool="process", at_most_once=True)
def noted_once(path: str, item: int, poison: int = -1) -> int:
    note(path, f"{item}")
    if item == poison:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@app.task(pool="process", retry=Retry(attempts=2, delay_s=0))
def killed_once(path: str, context: Context | None = None) -> int:
    assert context is not None
    note(path, f"{context.attempt}")
    if Path(path).read_text().count("\n") == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return context.attempt


@app.task(pool="process", timeout_s=0.2)
def stuck_in_c(item: int) -> object:
    return EVIL.match("a" * 60) if item else 0


@app.task(pool="process", timeout_s=0.2)
def stuck_in_python(item: int) -> int:
    while item:
        pass
    return item


@app.task(pool="process", timeout_s=0.2)
async def stuck_in_a_coroutine(item: int) -> int:
    while item:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
    return item


@app.task(pool="process")
async def async_double(item: int) -> int:
    await asyncio.sleep(0)
    return item * 2


@app.task(pool="process")
def large(item: int) -> str:
    return "x" * item


@app.task(pool="process")
async def waits(path: str, item: int, context: Context | None = None) -> int:
    note(path, f"began {item}")
    try:
        await asyncio.Event().wait()
    finally:
        assert context is not None
        note(path, f"heard {item} {context.cancelled}")
    return item


@app.task(pool="process")
def blocks(path: str, item: int) -> int:
    note(path, f"{item} {os.getpid()}")
    while True:
        signal.pause()


@app.task(pool="process")
def raises(item: int) -> int:
    if item == 1:
        raise SystemExit(3)
    if item == 2:
        raise KeyboardInterrupt
    if item == 3:
        raise ValueError("three")
    return item


@app.task(retry=Retry(attempts=2, delay_s=0))
def in_a_thread_of_a_child(item: int, context: Context | None = None) -> list[int]:
    assert context is not None
    if context.attempt == 1:
        raise ValueError("first")
    return [os.getpid(), context.attempt]


@app.task(pool="process")
def size(text: str) -> int:
    return len(text)


def _plain(item: int) -> int:
    if item == 0:
        raise ValueError("again")
    return item


renamed = app.task(name="renamed", retry=Retry(attempts=3, delay_s=0), pool="process")(_plain)


@app.task(pool="process")
def enqueues(count: int) -> int:
    """A task of a child process that enqueues others with blocking calls, and runs an event loop of its own."""
    runs = [pid.enqueue_sync(number) for number in range(count)]
    return asyncio.run(_sum([run.result_sync(timeout_s=60) > 0 for run in runs]))


async def _sum(numbers: list[bool]) -> int:
    return sum(numbers)


@app.task(pool="process", retry=Retry(attempts=5, delay_s=0))
def wrong_result(item: int) -> int:
    return str(item)  # type: ignore[return-value]  # what the test is about
