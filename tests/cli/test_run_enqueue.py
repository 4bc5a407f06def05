"""`headrace run enqueue`."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from headrace import Headrace
from tests.cli.conftest import Shell


@contextmanager
def working(shell: Shell) -> Iterator[None]:
    """Work on the store of the directory in a thread while the block lasts."""
    app = Headrace("tests", store=f"sqlite:///{shell.place}/headrace.db")
    over = threading.Event()

    @app.task(name="sums")
    async def add(a: int, b: int) -> int:
        if not a:
            raise ValueError("nothing to add")
        return a + b

    async def work() -> None:
        async with app, app.worker():
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_run_is_enqueued_by_the_name_of_its_task(shell: Shell) -> None:
    ran = shell("run", "enqueue", "sums", '{"a": 1, "b": 2}', "--tag", "by hand", "--json")
    assert ran.code == 0
    assert (ran.json["new"], ran.json["run"]["state"], ran.json["run"]["tags"]) == (True, "waiting", ["by hand"])
    shown = shell("run", "show", ran.json["run"]["id"], "--json").json
    assert shown == ran.json["run"]


def test_wait_shows_the_run_once_it_has_ended(shell: Shell) -> None:
    with working(shell):
        ran = shell("run", "enqueue", "sums", '{"a": 1, "b": 2}', "--wait")
        assert (ran.code, "completed" in ran.out, "output" in ran.out) == (0, True, True)
        failed = shell("run", "enqueue", "sums", '{"a": 0, "b": 2}', "--wait", "--json")
        assert (failed.code, failed.json["run"]["state"]) == (3, "failed")
        assert failed.json["run"]["error"]["message"] == "nothing to add"


def test_a_task_of_a_module_brings_its_options_and_checks_the_item(shell: Shell) -> None:
    ran = shell("run", "enqueue", "tasks.py:queued", "{}", "--json")
    assert ran.json["run"]["queue"] == "slow"
    refused = shell("run", "enqueue", "tasks.py:add", '{"a": "x"}')
    assert refused.code == 2
    assert "the arguments don't fit task sums" in refused.err
    assert [run["id"] for run in shell("run", "list", "--json").json["runs"]] == [ran.json["run"]["id"]]


def test_an_idempotency_key_enqueues_once(shell: Shell) -> None:
    first, again = (shell("run", "enqueue", "echo", "1", "--idempotency-key", "k", "--json").json for _ in range(2))
    assert (first["new"], again["new"]) == (True, False)
    assert first["run"]["id"] == again["run"]["id"]
    assert "nothing was enqueued" in shell("run", "enqueue", "echo", "1", "--idempotency-key", "k").out


def test_a_run_without_a_worker_is_warned_about(shell: Shell) -> None:
    ran = shell("run", "enqueue", "echo", "1")
    assert ran.code == 0
    assert "is enqueued" in ran.out
    assert "no live worker" in ran.err


def test_the_item_is_read_from_standard_input(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"n": 4}\n'))
    ran = shell("run", "enqueue", "double", "-", "--delay", "2h", "--json")
    assert (ran.json["run"]["input"], ran.json["run"]["state"]) == ({"n": 4}, "delayed")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("echo", "{"), "expected one JSON value"),
        (("echo", "NaN"), "expected one JSON value"),
        (("echo", "1", "--delay", "soon"), "--delay"),
        (("echo", "1", "--queue", ""), "queue"),
        (("", "1"), "task"),
        (("x" * 300, "1"), "task"),
        (("nothing.py:echo", "1"), "nothing.py"),
        (("echo", f'"{"x" * 3_200_000}"'), "item_bytes_max"),
    ],
)
def test_a_bad_call_is_refused_and_enqueues_nothing(arguments: tuple[str, ...], reason: str, shell: Shell) -> None:
    assert shell("run", "enqueue", "echo", "1").code == 0
    ran = shell("run", "enqueue", *arguments)
    assert (ran.code, reason in ran.err) == (2, True), ran.err
    assert len(shell("run", "list", "--json").json["runs"]) == 1
