"""Read commands with `--server URL` print what they print with the server's own store."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from headrace import Headrace, HeadraceError
from tests.cli.conftest import Shell
from tests.cli.test_printing import bury_one
from tests.cli.test_schedule import make_known, scheduled

KEY = "a key of this test's own"
COMMANDS = [
    ("batch", "list", "--json"),
    ("batch", "show", "BATCH", "--json"),
    ("batch", "results", "BATCH"),
    ("batch", "missing", "BATCH", "--json"),
    ("run", "list", "--json"),
    ("run", "list", "--state", "failed", "--json"),
    ("run", "show", "RUN", "--json"),
    ("queue", "list"),
    ("schedule", "list", "--json"),
    ("dead", "list", "--json"),
    ("killswitch", "list", "--json"),
    ("verify", "--json"),
]


@pytest.fixture
def served(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Serve a store with batches, failed runs, a dead letter and schedules; yields the URL and a batch's id."""
    asyncio.run(bury_one(shell.place))
    shell.items(10)
    batch = shell.map("--json", task="picky").json["batches"][0]
    make_known(scheduled("30 6 * * MON-FRI"))
    shell("killswitch", "add", "send")
    monkeypatch.setenv("HEADRACE_API_KEY", KEY)
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", "--no-worker", "--port", "0"],
        cwd=shell.place,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving" in line)
        yield re.findall(r"http://\S+?(?=,)", line)[0], batch
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_each_read_command_prints_the_same_from_a_server_as_from_its_store(
    shell: Shell, served: tuple[str, str]
) -> None:
    url, batch = served
    run = f"run_{batch.removeprefix('batch_')}_3"
    for command in COMMANDS:
        arguments = [{"BATCH": batch, "RUN": run}.get(word, word) for word in command]
        local, remote = shell(*arguments), shell(*arguments, "--server", url)
        assert (remote.code, remote.out) == (0, local.out), (command, remote.err)


def test_a_server_that_requires_a_key_names_the_variable_and_the_argument(
    shell: Shell, served: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = served
    monkeypatch.delenv("HEADRACE_API_KEY")
    ran = shell("batch", "list", "--server", url)
    assert (ran.code, "set HEADRACE_API_KEY" in ran.err) == (2, True), ran.err
    app = Headrace("app", store=url)
    with pytest.raises(HeadraceError, match="expected an Authorization header, got none") as raised:
        app.batches_sync()
    app.close_sync()
    assert "Headrace(api_key=…)" in raised.value.hint
    app = Headrace("app", store=url, api_key=KEY)
    assert app.batches_sync()
    app.close_sync()


def test_a_run_and_a_batch_are_cancelled_and_redriven_over_a_server(shell: Shell, served: tuple[str, str]) -> None:
    url, batch = served
    run = f"run_{batch.removeprefix('batch_')}_3"
    assert shell("run", "redrive", run, "--server", url).out == f"{run} will run again\n"
    assert shell("run", "cancel", run, "--server", url).out == f"{run} is cancelled\n"
    assert shell("batch", "redrive", batch, "--server", url, "--json").json["redriven"] == 1
    assert shell("batch", "cancel", batch, "--server", url, "--json").json["changed"] is True
    assert shell("queue", "pause", "default", "--server", url).out == "default is paused\n"
    assert shell("queue", "resume", "default", "--server", url).out == "default is running\n"


def test_commands_that_need_the_database_itself_say_so_about_a_server(shell: Shell, served: tuple[str, str]) -> None:
    url, _ = served
    for command in (("prune",), ("key", "list"), ("key", "revoke", "key_x"), ("index", "status")):
        ran = shell(*command, "--server", url)
        assert ran.code == 2, (command, ran)
        assert "--store" in ran.err
        assert "No such option" not in ran.err
    assert shell("config", "show", "--server", url, "--json").json["settings"][0]["value"] == url


def test_doctor_checks_what_a_client_can_see_of_a_server(shell: Shell, served: tuple[str, str]) -> None:
    url, _ = served
    checks = shell("doctor", "--server", url, "--json").json["checks"]
    assert [check["check"] for check in checks] == ["store", "version", "exposure", "workers", "batches"]
    assert all(check["ok"] for check in checks), checks


def test_a_schedule_is_run_now_over_a_server(shell: Shell, served: tuple[str, str]) -> None:
    url, _ = served
    shell.write(
        "scheduled.py",
        "from headrace import Headrace\n\napp = Headrace('tests')\n\n\n"
        "@app.schedule(every_s=3_600)\n@app.task\nasync def hourly() -> None: ...\n",
    )
    ran = shell("schedule", "run", "scheduled.py:app", "hourly", "--server", url, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert shell("run", "show", ran.json["run"], "--server", url, "--json").json["task"] == "hourly"
