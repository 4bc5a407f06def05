"""Maps that are interrupted, as separate processes: signals, a full disk, a locked database."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.cli.invocation import progress
from headrace.cli.invocation.progress import Lines, ProgressState, Rate, line_of
from headrace.store.sqlite import SqliteStore
from tests.cli.conftest import Shell

WAITING = """
import asyncio, os, sys


async def slow(item):
    with open("began", "a") as file:
        file.write(f"{item}\\n")
    await asyncio.sleep(60 if item else 0)
    return item


async def stubborn(item):
    while True:
        with open("began", "a") as file:
            file.write(f"{item}\\n")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue
"""


@contextmanager
def started(shell: Shell, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start `headrace map` as a process that does not outlive the test."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "map", *arguments],
        cwd=shell.place,
        env=environ | options.pop("environ", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=options.pop("stdin", subprocess.DEVNULL),
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_begun(shell: Shell, process: subprocess.Popen[bytes]) -> None:
    while not (shell.place / "began").exists():
        assert process.poll() is None, process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_map_gracefully_and_shows_how_to_resume(shell: Shell, number: signal.Signals) -> None:
    shell.write("waiting.py", WAITING)
    shell.write("in.ndjson", "0\n1\n2\n")
    with started(
        shell, "waiting.py:slow", "in.ndjson", "-o", "out.ndjson", environ={"HEADRACE_SHUTDOWN_GRACE_S": "1"}
    ) as process:
        wait_until_begun(shell, process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 130, stderr.decode()
    assert b"stopping: running items may finish" in stderr
    assert stderr.decode().splitlines()[-1].startswith("interrupted. To resume: headrace ")
    ledger = shell("batch", "list", "--json").json["batches"][0]
    assert ledger["leased"] == 0
    assert shell("verify").code == 0


def test_a_second_signal_stops_a_map_at_once(shell: Shell) -> None:
    shell.write("waiting.py", WAITING)
    shell.write("in.ndjson", "1\n2\n")
    with started(shell, "waiting.py:stubborn", "in.ndjson", "-o", "out.ndjson") as process:
        wait_until_begun(shell, process)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"stopping")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
        assert process.returncode == 130
        assert b"To resume" in stderr
    assert shell("verify").code == 0


def test_a_stream_that_cannot_be_read_again_is_cancelled_when_it_is_interrupted(shell: Shell) -> None:
    with started(shell, "tasks.py:double", "-", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"n":1}\n')
        process.stdin.flush()
        assert process.stdout.readline() == b'{"index":0,"ok":true,"output":2}\n', "written as soon as it is final"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 130
        assert b"--batch-key" in stderr.splitlines()[-1]
    assert [batch["state"] for batch in shell("batch", "list", "--json").json["batches"]] == ["cancelled"]


def test_a_full_disk_is_one_clear_error_and_nothing_acknowledged_is_lost(shell: Shell) -> None:
    shell.items(20_000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    with started(shell, "tasks.py:double", "in.ndjson", "-o", "out.ndjson", preexec_fn=limit) as process:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1, stderr.decode()
    assert b"Traceback" not in stderr
    assert b"error: " in stderr
    assert b"hint: " in stderr
    ran = shell.map("--json")
    assert (ran.code, ran.json["completed"]) == (0, 20_000)
    assert [line["output"] for line in shell.lines()] == [2 * n for n in range(20_000)]
    assert shell("verify").code == 0


def test_a_locked_database_is_one_clear_error(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SqliteStore.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(SqliteStore.__init__.__kwdefaults__, "busy_timeout_ms", 20)
    shell.items(3)
    shell("migrate")
    with closing(sqlite3.connect("headrace.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        ran = shell.map()
        assert ran.code == 1
        assert "locked" in ran.err
        assert "hint: end that process" in ran.err
    assert shell.map().code == 0


def test_the_summary_goes_to_standard_error_when_results_use_standard_output(shell: Shell) -> None:
    shell.items(2)
    ran = shell("map", "tasks.py:double", "in.ndjson", "--json")
    assert [json.loads(line)["output"] for line in ran.out.splitlines()] == [0, 2]
    assert json.loads(ran.err)["completed"] == 2


def test_a_named_pipe_is_a_stream(shell: Shell) -> None:
    os.mkfifo(shell.place / "pipe")
    with started(shell, "tasks.py:double", "pipe", "-o", "out.ndjson") as process:
        with (shell.place / "pipe").open("wb") as pipe:
            pipe.write(b'{"n":4}\n{"n":5}\n')
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 0, stderr.decode()
    assert b"can be resumed only with --batch-key" in stderr.splitlines()[0]
    assert [line["output"] for line in shell.lines()] == [8, 10]


# -- progress


@pytest.mark.parametrize(
    ("state", "rate", "line"),
    [
        (ProgressState(1_200, 3, 50_000), 800.0, "1,200 of 50,000 done, 800/s, 3 failed, 61.0 s left"),
        (ProgressState(5, 0, 1_000, is_estimate=True), 0.5, "5 of about 1,000 done, 0.5/s, 0 failed, 33 min 10 s left"),
        (ProgressState(7, 1, None), 0.0, "7 done, 0/s, 1 failed"),
        (ProgressState(20, 0, 10), 10.0, "20 of 10 done, 10/s, 0 failed, 0 ms left"),
    ],
)
def test_progress_is_one_line(state: ProgressState, rate: float, line: str) -> None:
    assert line_of(state, rate) == line


def test_the_rate_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now_s)
    pace = Rate()
    assert pace.add(1_000_000) == 0.0, "runs of an earlier command do not count for the rate"
    for second in range(1, 30):
        now_s = float(second)
        rate = pace.add(1_000_000 + 50 * second)
    assert rate == 50.0


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now_s)
    lines = Lines("double")
    for second in range(25):
        now_s = float(second)
        lines.update(ProgressState(second * 10, 0, 1_000))
    assert capfd.readouterr().err.splitlines() == [
        "double: 100 of 1,000 done, 10/s, 0 failed, 90.0 s left",
        "double: 200 of 1,000 done, 10/s, 0 failed, 80.0 s left",
    ]


def test_on_a_terminal_progress_is_a_bar(shell: Shell, tmp_path: Path) -> None:
    import pty

    shell.items(2_000)
    parent, child = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "headrace", "map", "tasks.py:double", "in.ndjson", "-o", "out.ndjson"],
            cwd=shell.place,
            stdin=subprocess.DEVNULL,
            stderr=child,
        )
        os.close(child)
        seen = b""
        while piece := read_pty(parent):
            seen += piece
        assert process.wait(30) == 0
    finally:
        os.close(parent)
    assert b"double" in seen
    assert b"done" in seen
    assert b"2,000 runs: 2,000 completed" in seen


def read_pty(descriptor: int) -> bytes:
    """Return what the other side wrote; empty once it is closed."""
    try:
        return os.read(descriptor, 65_536)
    except OSError:
        return b""
