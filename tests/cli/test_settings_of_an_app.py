"""Settings that an app's code gives: commands that name the app use them, below flags and environment variables."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace import Headrace, InvalidInput
from headrace.foundation.errors import InvalidSetting
from headrace.foundation.settings import load
from tests.cli.conftest import Shell

APP = """
from headrace import Headrace

app = Headrace("jobs", store="sqlite:///own.db", objects="own.objects", environment="prod", flush_size=7)


@app.task
async def double(n: int) -> int:
    return 2 * n
"""

INDEX = """
import msgspec
from headrace import Headrace
from headrace.indexer import Entity, HandlerContext, ndjson

app = Headrace("jobs", store="sqlite:///own.db")

class Seen(msgspec.Struct, tag_field="type", tag="seen"):
    n: int

class Count(Entity):
    id: str

numbers = app.indexer("numbers", source=ndjson("events.ndjson"), entities=[Count])

@numbers.on("seen")
async def on_seen(event: Seen, ctx: HandlerContext) -> None:
    ctx.set(Count(str(event.n)))
"""


@pytest.fixture
def jobs(shell: Shell) -> Shell:
    """Provide `jobs.py`, whose app names its own store, beside a `headrace.toml` that names others."""
    shell.write("jobs.py", APP)
    shell.write("headrace.toml", 'store = "sqlite:///file.db"\nconcurrency = 3\n[limits]\nflush_size = 9\n')
    return shell


def settings_shown(shell: Shell, *arguments: str) -> dict[str, tuple[str, str]]:
    lines = shell("config", "show", "jobs.py:app", *arguments, "--json").json["settings"]
    return {line["name"]: (line["value"], line["source"]) for line in lines}


def test_a_setting_comes_from_the_flag_then_the_environment_then_the_code_then_the_file(
    jobs: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = settings_shown(jobs)
    assert shown["store"] == ("sqlite:///own.db", "Headrace(store=…)")
    assert shown["objects"] == ("own.objects", "Headrace(objects=…)")
    assert shown["environment"] == ("prod", "Headrace(environment=…)")
    assert shown["flush_size"] == ("7", "Headrace(flush_size=…)")
    assert shown["concurrency"] == ("3", "headrace.toml")
    assert shown["flush_interval_ms"][1] == "default"
    monkeypatch.setenv("HEADRACE_STORE", "sqlite:///environment.db")
    shown = settings_shown(jobs)
    assert shown["store"] == ("sqlite:///environment.db", "environment HEADRACE_STORE")
    assert shown["objects"] == ("own.objects", "Headrace(objects=…)"), "each setting is decided by itself"
    assert settings_shown(jobs, "--store", "sqlite:///flag.db")["store"] == ("sqlite:///flag.db", "flag --store")


def test_an_app_opened_in_plain_code_uses_the_same_order(jobs: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Headrace("jobs", store="sqlite:///own.db", flush_size=7)
    assert (made.settings.store, made.settings.concurrency, made.settings.limits.flush_size) == (
        "sqlite:///own.db",
        3,
        7,
    )
    monkeypatch.setenv("HEADRACE_STORE", "sqlite:///environment.db")
    assert Headrace("jobs", store="sqlite:///own.db").settings.store == "sqlite:///environment.db"


def test_every_setting_of_the_code_is_used_when_nothing_above_it_is_set(tmp_path: Path) -> None:
    values: dict[str, object] = {"port": 1234, "log_level": "debug", "crashes_max": 5, "api_key": "k" * 20}
    settings = load({}, {}, tmp_path, code=values)
    assert {name: settings.value(name) for name in values} == values
    assert settings.sources["port"] == "Headrace(port=…)"


def test_a_map_stores_its_batch_in_the_app_s_own_store(jobs: Shell) -> None:
    jobs.write("in.ndjson", "1\n2\n")
    assert jobs("map", "jobs.py:double", "in.ndjson", "-o", "out.ndjson").code == 0
    assert (jobs.place / "own.db").exists()
    assert not (jobs.place / "file.db").exists()
    assert not (jobs.place / "headrace.db").exists()
    assert jobs("doctor", "jobs.py:app").code == 0


@pytest.mark.parametrize("command", ["worker", "serve"])
def test_a_worker_and_a_server_work_on_the_app_s_own_store(jobs: Shell, command: str) -> None:
    more = ["--port", "0", "--no-auth"] if command == "serve" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", command, "jobs.py:app", *more],
        cwd=jobs.place,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        first_line = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert "sqlite:///own.db" in first_line
    assert not (jobs.place / "headrace.db").exists()


def test_the_workers_of_a_supervisor_open_the_app_s_own_store(jobs: Shell) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "worker", "jobs.py:app", "--processes", "1"],
        cwd=jobs.place,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        keeping, working = process.stderr.readline(), process.stderr.readline()
    finally:
        process.kill()
        process.communicate()
    assert "sqlite:///own.db" in keeping
    assert "sqlite:///own.db" in working


def test_an_indexer_writes_to_the_app_s_own_store(shell: Shell) -> None:
    shell.write("events.ndjson", '{"type":"seen","n":1}\n')
    shell.write("job.py", INDEX)
    assert shell("index", "run", "job.py:numbers").code == 0
    assert (shell.place / "own.db").exists()
    assert not (shell.place / "headrace.db").exists()


def test_a_missing_database_says_how_an_app_s_own_store_is_found(shell: Shell) -> None:
    assert "headrace config show FILE:APP" in shell("batch", "list").err


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda: Headrace("app", stoer="x"), "Headrace() has no setting 'stoer'", "did you mean store?"),
        (
            lambda: Headrace("app").task(retires=3),  # type: ignore[call-overload]
            "app.task() has no option 'retires'",
            "did you mean retry?",
        ),
    ],
)
def test_a_misspelt_keyword_is_refused_at_construction(make: Any, message: str, hint: str) -> None:
    with pytest.raises((InvalidSetting, InvalidInput)) as caught:
        make()
    assert caught.value.message == message
    assert hint in caught.value.hint
    assert "TaskSpec" not in str(caught.value)
