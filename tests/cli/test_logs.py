"""Log lines of `headrace worker`: failed attempts, the user's lines with the ids of their run, JSON on every line."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace import Headrace, Retry, RunIdFilter
from headrace.foundation.logs import LineFormatter
from tests.cli.conftest import Shell

APP = """
import asyncio, gc, logging, threading, warnings
import structlog
from headrace import Headrace, Retry

app = Headrace("logs")
LOG = logging.getLogger("shop.orders")


@app.task(retry=Retry(attempts=2, delay_s=0.01))
async def fails(n: int) -> None:
    raise ValueError(f"no {n}\\nat all")


@app.task
async def asynchronous(n: int) -> None:
    LOG.info("first step of %s", n)
    await asyncio.gather(*(step(n) for _ in range(2)))
    LOG.info("last step of %s", n)


async def step(n: int) -> None:
    await asyncio.sleep(0)
    LOG.info("inner step of %s", n)


@app.task
def threaded(n: int) -> None:
    LOG.info("thread of %s", n)
    structlog.get_logger().info("structured", n=n)


@app.task(pool="process")
def pooled(n: int) -> None:
    LOG.warning("process of %s", n)


class Broken:
    def __del__(self):
        raise OSError("ignored")


@app.task
def noisy() -> None:
    warnings.warn("old")
    Broken()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    logging.getLogger("uvicorn.access").info("GET /")
"""


@contextmanager
def worker(folder: Path, *, app: str | None = APP, **settings: str) -> Iterator[subprocess.Popen[str]]:
    if app is not None:
        (folder / "shop.py").write_text(app)
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "worker", "shop.py:app", "--store", "sqlite:///logs.db"],
        cwd=folder,
        env={**os.environ, **settings},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lines_after(folder: Path, calls: str, **settings: str) -> list[str]:
    """Run some calls to their end under a worker, stop it, and return its lines on standard error."""
    code = f"import shop; app = shop.app; runs = [shop.{calls}]\nfor run in runs:\n    run.wait_sync(timeout_s=60)\n"
    with worker(folder, **settings) as process:
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            check=True,
            env={**os.environ, "HEADRACE_STORE": "sqlite:///logs.db"},
        )
        process.send_signal(signal.SIGTERM)
        return process.communicate(timeout=60)[1].splitlines()


def test_a_failed_attempt_is_one_line_with_its_ids_and_what_follows(tmp_path: Path) -> None:
    lines = lines_after(tmp_path, "fails.map_sync([7])", HEADRACE_LOG_FORMAT="json")
    attempts = [line for line in map(json.loads, lines) if line["event"] == "attempt.failed"]
    assert [(line["attempt"], line["next"], line["error"], line["message"]) for line in attempts] == [
        (1, "retry", "ValueError", "no 7\nat all"),
        (2, "failed", "ValueError", "no 7\nat all"),
    ]
    assert attempts[0]["retry_at"].endswith("Z")
    assert {(line["task"], line["run"].rpartition("_")[2], line["batch"][:6]) for line in attempts} == {
        ("fails", "0", "batch_")
    }
    assert "Traceback" not in "".join(lines)


def test_the_traceback_of_a_failed_attempt_is_logged_at_debug(tmp_path: Path) -> None:
    lines = lines_after(tmp_path, "fails.map_sync([7])", HEADRACE_LOG_LEVEL="debug")
    assert sum("attempt.failed" in line and "no 7\\nat all" in line for line in lines) == 2
    assert sum("shop.py" in line and "in fails" in line for line in lines) == 2


@pytest.mark.parametrize(("task", "expected_count"), [("asynchronous", 4), ("threaded", 2), ("pooled", 1)])
def test_lines_of_the_user_s_code_have_the_ids_of_their_run(task: str, expected_count: int, tmp_path: Path) -> None:
    lines = lines_after(tmp_path, f"{task}.map_sync([0, 1, 2])", HEADRACE_LOG_FORMAT="json")
    user_lines = [line for line in map(json.loads, lines) if line.get("task") == task]
    assert len(user_lines) == 3 * expected_count
    for line in user_lines:
        index = line["run"].rpartition("_")[2]
        assert str(line.get("n", line["event"].rpartition(" ")[2])) == index
        assert (line["attempt"], line["batch"].removeprefix("batch_")) == (1, line["run"].split("_")[1])


def test_every_line_is_json_in_json_mode(tmp_path: Path) -> None:
    lines = lines_after(tmp_path, "noisy.map_sync([{}])", HEADRACE_LOG_FORMAT="json")
    text = "\n".join(line["event"] for line in map(json.loads, lines))
    for part in (
        "working on",
        "UserWarning: old",
        "GET /",
        "error.uncaught in thread",
        "error.ignored",
        "1 completed",
    ):
        assert part in text, text


def test_errors_of_commands_are_json_in_json_mode(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LOG_FORMAT", "json")
    ran = shell("batch", "list", "--store", "sqlite:///missing.db")
    lines = [json.loads(line) for line in ran.err.splitlines()]
    assert (ran.code != 0, lines[-1]["level"], "missing.db" in lines[-1]["event"]) == (True, "error", True)


@pytest.mark.parametrize("fault", ["module", "setting"])
def test_errors_before_the_settings_are_loaded_are_json_too(
    fault: str, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_LOG_FORMAT", "json")
    if fault == "setting":
        monkeypatch.setenv("HEADRACE_CONCURRENCY", "many")
    shell.write("broken.py", "import no_such_module\n")
    ran = shell("worker", "broken.py:app" if fault == "module" else "tasks.py:app")
    lines = [json.loads(line) for line in ran.err.splitlines()]
    assert (ran.code, lines[-1]["level"]) == (2, "error")


IMPORTED = """
import logging, warnings
warnings.warn("old")
logging.getLogger("x").info("first info")
logging.warning("implicit basicConfig")
logging.getLogger("x").info("second info")
"""
ENDS = {
    "broken": "import no_such_module",
    "whole": """
from headrace import Headrace
app = Headrace("late")

@app.task
def double(n: int) -> int:
    logging.getLogger("x").info("at work")
    return 2 * n

@app.task(pool="process")
def pooled(n: int) -> int:
    return n
""",
}


def stderr_of(folder: Path, *arguments: str, stdin: str = "", **settings: str) -> tuple[int, list[str]]:
    """Run a command to its end; return its exit code and its lines on standard error."""
    ran = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        cwd=folder,
        env={**os.environ, **settings},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ran.returncode, ran.stderr.splitlines()


@pytest.mark.parametrize("place", ["environment", "file"])
@pytest.mark.parametrize(
    "command",
    [
        ["worker", "broken.py:app"],
        ["serve", "broken.py:app"],
        ["map", "broken.py:f", "-"],
        ["index", "run", "broken.py:i"],
        ["config", "show", "broken.py:app"],
        ["doctor", "broken.py:app"],
    ],
)
def test_lines_of_the_import_are_json_in_json_mode(command: list[str], place: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(IMPORTED + ENDS["broken"])
    if place == "file":
        (tmp_path / "headrace.toml").write_text('log_format = "json"')
    settings = {"HEADRACE_LOG_FORMAT": "json"} if place == "environment" else {}
    code, lines = stderr_of(tmp_path, *command, **settings)
    events = [json.loads(line)["event"] for line in lines]
    assert code == 2
    assert "UserWarning: old" in events[0]
    assert events[1:4] == ["first info", "implicit basicConfig", "second info"]
    assert events[4].startswith("error: broken.py failed to import: ModuleNotFoundError")
    assert len(events) == 5


def test_the_traceback_of_a_failed_command_is_json_at_debug(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(ENDS["broken"])
    (tmp_path / "headrace.toml").write_text('log_format = "json"\nlog_level = "debug"')
    _, lines = stderr_of(tmp_path, "worker", "broken.py:app")
    events = {line["event"].split()[0]: line for line in map(json.loads, lines)}
    assert "no_such_module" in events["command.failed"]["exception"]
    assert list(events)[-1] == "error:"


@pytest.mark.parametrize("arguments", [["worker"], ["worker", "x.py:app", "--nope"], ["nope"]])
def test_usage_errors_are_json_with_the_same_exit_code(arguments: list[str], tmp_path: Path) -> None:
    code, lines = stderr_of(tmp_path, *arguments, HEADRACE_LOG_FORMAT="json")
    (line,) = map(json.loads, lines)
    assert (code, line["level"], line["event"][:7]) == (2, "error", "error: ")
    assert stderr_of(tmp_path, *arguments, HEADRACE_LOG_FORMAT="console")[0] == 2


def test_a_success_and_a_version_keep_exit_code_0_in_json_mode(tmp_path: Path) -> None:
    for arguments in (["--version"], ["--help"], ["config", "show"]):
        assert stderr_of(tmp_path, *arguments, HEADRACE_LOG_FORMAT="json") == (0, [])


@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("log_format", ["console", "json"])
def test_an_implicit_basic_config_of_the_import_does_not_hide_lines_of_a_map(
    log_format: str, clears: bool, tmp_path: Path
) -> None:
    clear = "logging.getLogger().handlers.clear()\nlogging.warning('bare')\n" if clears else ""
    (tmp_path / "late.py").write_text(IMPORTED + clear + ENDS["whole"])
    (tmp_path / "headrace.toml").write_text(f'log_format = "{log_format}"')
    code, lines = stderr_of(tmp_path, "map", "late.py:double", "-", "-o", "out.ndjson", stdin="1\n")
    if clears:
        lines.remove("WARNING:root:bare")  # the module removed the handler before this line
    text = "\n".join(lines)
    assert (code, text.count("first info"), text.count("second info"), text.count("at work")) == (0, 1, 1, 1)
    assert "WARNING:root" not in text
    if log_format == "json":
        assert all(json.loads(line) for line in lines)


@pytest.mark.parametrize("processes", ["0", "1"])
def test_an_implicit_basic_config_of_the_import_does_not_hide_lines_of_a_worker(processes: str, tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text('log_format = "json"')
    (tmp_path / "shop.py").write_text(IMPORTED + ENDS["whole"])
    code = "import shop; [task.map_sync([1]).wait_sync(timeout_s=60) for task in (shop.double, shop.pooled)]"
    with worker(tmp_path, app=None, HEADRACE_PROCESSES=processes) as process:
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            check=True,
            env={**os.environ, "HEADRACE_STORE": "sqlite:///logs.db"},
        )
        process.send_signal(signal.SIGTERM)
        lines = process.communicate(timeout=60)[1].splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events.count("at work") == 1
    assert events.count("first info") == events.count("second info") >= 2, "of the worker and of its child process"


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_handler_that_the_module_chose_stays(log_format: str, tmp_path: Path) -> None:
    config = "logging.basicConfig(force=True, level=logging.DEBUG, format='own %(message)s')\n"
    (tmp_path / "late.py").write_text("import logging\n" + config + ENDS["whole"])
    (tmp_path / "headrace.toml").write_text(f'log_format = "{log_format}"')
    _, lines = stderr_of(tmp_path, "map", "late.py:double", "-", "-o", "out.ndjson", stdin="1\n")
    assert "own at work" in lines


async def test_an_application_s_own_logging_gets_failures_and_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    app = Headrace("own", store=f"sqlite:///{tmp_path}/headrace.db")

    @app.task(retry=Retry(attempts=1))
    def fails(n: int) -> None:
        logging.getLogger("mine").warning("about to fail")
        raise ValueError("no")

    caplog.handler.addFilter(RunIdFilter())
    async with app, app.worker():
        run = await fails.enqueue(1)
        await (await app.get_batch(run.batch_id)).results().__anext__()
    records: dict[str, Any] = {record.getMessage().split()[0]: record for record in caplog.records}
    assert (records["about"].run, records["about"].task) == (run.id, "fails")
    assert f"run={run.id}" in records["attempt.failed"].getMessage()
    assert "error=ValueError" in LineFormatter(is_json=False).format(records["attempt.failed"])
    assert capsys.readouterr().out == "", "standard output is the application's"
