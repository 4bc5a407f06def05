"""A forked child process never uses its parent's connections: it opens an engine of its own."""

from __future__ import annotations

import asyncio
import faulthandler
import fcntl
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import Headrace
from headrace.foundation.errors import InvalidSetting
from headrace.runtime.background_loop import BackgroundLoop
from headrace.testing import in_memory
from tests.support.store_rig import fresh_schema

CHILD_S = 30
FORK = multiprocessing.get_context("fork")


def made(store: str) -> tuple[Headrace, Any]:
    app = Headrace("forked", store=store)

    @app.task
    def double(n: int) -> int:
        return n * 2

    return app, double


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/headrace.db" if request.param == "sqlite" else fresh_schema(tmp_path)


@pytest.fixture(autouse=True)
def _forking_beside_threads_is_what_is_tested() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def in_child(work: Callable[[], object]) -> object:
    """Fork, call `work` in the child, and return its value. A child that hangs ends, and prints where."""
    reader, writer = FORK.Pipe(duplex=False)

    def call() -> None:
        faulthandler.dump_traceback_later(CHILD_S, exit=True, file=2)
        try:
            writer.send(work())
        except BaseException as error:  # noqa: BLE001 - the parent fails with it
            writer.send(repr(error))
        os._exit(0)

    process = FORK.Process(target=call)
    process.start()
    writer.close()
    try:
        return reader.recv()
    finally:
        process.join()


def test_a_child_forked_after_a_blocking_call_gets_an_engine_of_its_own(store: str) -> None:
    app, double = made(store)
    first = double.enqueue_sync(1)

    def work() -> object:
        second = double.enqueue_sync(2)
        assert second.batch_id != first.batch_id, "the stream of the parent's session is the parent's"
        assert first.view_sync().input == 1, "a handle from before the fork works in the child"
        with app.within_sync(app.worker()):
            results = [first.result_sync(timeout_s=20), second.result_sync(timeout_s=20)]
        app.close_sync()
        return results

    assert in_child(work) == [2, 4]
    third = double.enqueue_sync(3)
    assert third.batch_id == first.batch_id, "the parent goes on with its own engine"
    with app.within_sync(app.worker()):
        assert third.result_sync(timeout_s=30) == 6
    app.close_sync()


def test_a_child_forked_inside_an_event_loop_gets_an_engine_of_its_own(store: str) -> None:
    app, double = made(store)

    async def main() -> None:
        async with app:
            first = await double.enqueue(1)

            def work() -> object:
                sync = double.enqueue_sync(2).index
                app.close_sync()
                return [asyncio.run(again()), sync]

            async def again() -> int:
                async with app:
                    return int((await double.enqueue(3)).index)

            assert in_child(work) == [0, 0]
            assert (await double.enqueue(4)).batch_id == first.batch_id

    asyncio.run(main())


def test_workers_of_a_preloading_server_do_not_share_the_store_s_connections(store: str) -> None:
    app, double = made(store)
    double.enqueue_sync(0)

    def work() -> object:
        runs = [double.enqueue_sync(n) for n in range(50)]
        return sorted({run.batch_id for run in runs})

    batches = [in_child(work) for _ in range(3)]
    assert len({str(batch) for batch in batches}) == 3
    assert sum(view.received for view in app.batches_sync()) == 151
    app.close_sync()


async def test_a_child_forked_in_testing_mode_is_refused() -> None:
    app, double = made("sqlite:////nowhere/at/all.db")
    async with in_memory(app):

        def work() -> object:
            try:
                double.enqueue_sync(1)
            except InvalidSetting as error:
                return error.message
            return "no error"

        assert "testing mode" in str(await asyncio.to_thread(in_child, work))


def test_the_parent_s_marks_are_unlocked_when_it_ends_although_a_child_lives(tmp_path: Path) -> None:
    _, double = made(f"sqlite:///{tmp_path}/headrace.db")
    started, ended = FORK.Pipe(), FORK.Pipe()

    def middle() -> None:
        double.enqueue_sync(1)
        if os.fork() == 0:
            started[1].send(os.getpid())
            ended[0].recv()
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=middle)
    process.start()
    started[0].recv()
    process.join()
    (marks,) = (tmp_path / "headrace.db.live").iterdir()
    with marks.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ended[1].send(None)


def test_a_large_payload_in_a_child_is_refused_after_its_parent_used_the_object_store(tmp_path: Path) -> None:
    app = Headrace("forked", store=f"sqlite:///{tmp_path}/headrace.db", inline_bytes_max=1_024)

    @app.task
    def length(text: str) -> int:
        return len(text)

    length.enqueue_sync("x" * 2_000)

    def work() -> object:
        length.enqueue_sync("small")
        try:
            length.enqueue_sync("x" * 2_000)
        except InvalidSetting as error:
            return [error.message, error.hint]
        return "no error"

    assert "the object store can't be used" in str(in_child(work))
    app.close_sync()


def test_the_blocking_client_of_a_parent_is_refused_in_a_child() -> None:
    background = BackgroundLoop()  # what `SyncClient` runs its calls on

    def work() -> object:
        try:
            background.run(asyncio.sleep(0))
        except InvalidSetting as error:
            return error.message
        return "no error"

    assert f"belongs to process {os.getpid()}" in str(in_child(work))
    background.stop()
