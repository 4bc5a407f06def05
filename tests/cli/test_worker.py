"""`headrace worker`: a separate process that runs what others enqueue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.cli.conftest import Shell
from tests.support.store_rig import fresh_schema

APP = """
import asyncio, os, threading
from headrace import Headrace

app = Headrace("tests")

@app.task
async def double(n: int) -> int:
    return 2 * n

@app.task(queue="other")
async def elsewhere(n: int) -> int:
    return n

@app.task
async def gathered(n: int, wanted: int) -> int:
    # ends when as many processes as are wanted have begun one of these
    os.makedirs("pids", exist_ok=True)
    open(f"pids/{os.getpid()}", "w").close()
    while len(os.listdir("pids")) < wanted:
        await asyncio.sleep(0.02)
    return os.getpid()

@app.task
async def held(n: int) -> int:
    # says that it began, and waits until it may end
    open(f"begun-{n}-{os.getpid()}", "w").close()
    while not os.path.exists("open"):
        await asyncio.sleep(0.02)
    return n

@app.task
def stuck(path: str) -> None:
    with open(path, "w") as pipe:
        pipe.write("running")
    threading.Event().wait()
"""


@contextmanager
def worker(shell: Shell, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a worker and wait until it reports that it works."""
    (shell.place / "app.py").write_text(APP, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "worker", "app.py:app", *arguments],
        cwd=shell.place,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        first_line = next(line for line in process.stderr if "recovered" not in line)
        assert first_line.startswith(("working on", "keeping"))
        yield process
    finally:
        process.kill()  # the workers of a supervisor end by themselves when it is gone
        process.communicate()


def enqueue(shell: Shell, call: str) -> str:
    """Enqueue in a separate process, and return what the call printed."""
    code = (
        "import asyncio; from app import *\n"
        "async def _all(batch):\n    return ' '.join([str(outcome.output) async for outcome in batch.results()])\n"
        f"async def main():\n    async with app:\n        print({call})\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=shell.place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_worker_runs_what_another_process_enqueues_and_stops_gracefully(shell: Shell) -> None:
    with worker(shell) as process:
        assert enqueue(shell, "await (await double.enqueue(21)).result(timeout_s=30)") == "42"
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "1 completed, 0 failed" in stderr
    assert shell("verify").code == 0


def test_a_worker_can_be_limited_to_some_queues(shell: Shell) -> None:
    with worker(shell, "--queues", "other,third"):
        left = enqueue(shell, "(await double.enqueue(1)).id")
        assert enqueue(shell, "await (await elsewhere.enqueue(5)).result(timeout_s=30)") == "5"
        assert shell("run", "show", left, "--json").json["state"] == "waiting"


def test_a_second_signal_stops_now_and_the_run_is_recovered(shell: Shell) -> None:
    pipe = shell.place / "pipe"
    os.mkfifo(pipe)
    with worker(shell) as process:
        run_id = enqueue(shell, "(await stuck.enqueue('pipe')).id")
        assert pipe.read_text() == "running"
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("stopping")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 130
    with worker(shell, "--queues", "none"):
        assert shell("run", "show", run_id, "--json").json["state"] == "waiting", "it was requeued"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.py:app", "nowhere.py is missing"),
        ("tasks.py:double", "expected an app at tasks.py:double"),
        ("tasks.py:nothing", "has no 'nothing'"),
        ("tasks.py", "expected MODULE:APP or"),
    ],
)
def test_a_target_that_is_not_an_app_is_refused(shell: Shell, target: str, message: str) -> None:
    ran = shell("worker", target)
    assert ran.code == 2
    assert message in ran.err


@pytest.fixture(params=["sqlite", "postgres"])
def stored(request: pytest.FixtureRequest, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell whose commands all work on one store."""
    url = "sqlite:///headrace.db" if request.param == "sqlite" else fresh_schema(shell.place)
    monkeypatch.setenv("HEADRACE_STORE", url)
    monkeypatch.setenv("HEADRACE_SHUTDOWN_GRACE_S", "2")
    return shell


def test_four_workers_share_one_chunk_of_slow_runs(stored: Shell) -> None:
    with worker(stored, "--processes", "4", "--concurrency", "4") as process:
        call = "await _all(await gathered.map([{'n': n, 'wanted': 4} for n in range(256)]))"
        pids = enqueue(stored, call).split()
        assert len(pids) == 256
        assert len(set(pids)) == 4
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        ended = [line for line in stderr.splitlines() if line.endswith("completed, 0 failed")]
        assert sum(int(line.split()[2]) for line in ended) == 256, stderr
    assert stored("verify").code == 0


def test_only_started_runs_of_a_killed_worker_are_suspected(stored: Shell) -> None:
    with worker(stored, "--processes", "2", "--concurrency", "3"):
        batch_id = enqueue(stored, "(await held.map(range(40))).id")
        begun = _begun(stored, lambda started: len(started) >= 6 and len({pid for _, pid in started}) == 2)
        victim = begun[0][1]
        os.kill(int(victim), signal.SIGKILL)
        suspects = {int(n) for n, pid in begun if pid == victim}
        _begun(stored, lambda started: len({pid for _, pid in started}) == 3)  # another worker has replaced it
        (stored.place / "open").touch()
        assert enqueue(stored, f"(await (await app.get_batch('{batch_id}')).wait()).ledger.completed") == "40"
    views = [stored("run", "show", f"run_{batch_id.removeprefix('batch_')}_{n}", "--json").json for n in range(40)]
    assert {n for n, view in enumerate(views) if view["crashes"]} == suspects
    assert stored("verify").code == 0


def _begun(shell: Shell, enough: Callable[[list[tuple[str, str]]], bool]) -> list[tuple[str, str]]:
    """Wait for enough started runs, and return `(n, pid)` of each."""
    while True:
        names = [path.name.split("-") for path in shell.place.glob("begun-*")]
        started = sorted((n, pid) for _, n, pid in names)
        if enough(started):
            return started
        os.sched_yield()
