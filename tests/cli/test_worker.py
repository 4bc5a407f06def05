"""`headrace worker`: a process of its own that runs what others enqueue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cli.conftest import Shell

APP = """
import os, threading
from headrace import Headrace

app = Headrace("tests")

@app.task
async def double(n: int) -> int:
    return 2 * n

@app.task(queue="other")
async def elsewhere(n: int) -> int:
    return n

@app.task
def stuck(path: str) -> None:
    with open(path, "w") as pipe:
        pipe.write("running")
    threading.Event().wait()
"""


@contextmanager
def worker(shell: Shell, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A worker that has said that it works."""
    (shell.place / "app.py").write_text(APP, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "worker", "app.py:app", *arguments],
        cwd=shell.place,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "recovered" not in line)
        assert said.startswith("working on sqlite:///headrace.db")
        yield process
    finally:
        process.kill()
        process.communicate()


def enqueue(shell: Shell, call: str) -> str:
    """Ask for a run in a process of its own, and what came of it if that is awaited there."""
    code = (
        "import asyncio; from app import *\n"
        f"async def main():\n    async with app:\n        print({call})\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=shell.place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_worker_runs_what_another_process_enqueues_and_stops_in_good_order(shell: Shell) -> None:
    with worker(shell) as process:
        assert enqueue(shell, "await (await double.enqueue(21)).result(timeout_s=30)") == "42"
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "1 completed, 0 failed" in told
    assert shell("verify").code == 0


def test_a_worker_may_be_for_some_queues_only(shell: Shell) -> None:
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
        assert shell("run", "show", run_id, "--json").json["state"] == "waiting", "it went back to be run again"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere.py:app", "nowhere.py is not there"),
        ("tasks.py:double", "not an app"),
        ("tasks.py:nothing", "has no 'nothing'"),
        ("tasks.py", "does not name an app"),
    ],
)
def test_what_is_no_app_is_refused(shell: Shell, target: str, said: str) -> None:
    ran = shell("worker", target)
    assert ran.code == 2
    assert said in ran.err
