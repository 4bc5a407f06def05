"""Every command but map: its output, its JSON, its exit code."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from headrace.core.batch import Ledger
from tests.cli.conftest import Shell


@pytest.fixture
def done(shell: Shell) -> str:
    """A finished batch of ten runs, two of them failed."""
    shell.items(10)
    batch: str = shell.map("--json", task="picky").json["batches"][0]
    return batch


def open_batch(shell: Shell, *, waiting: int = 5, queue: str = "default", delay_s: float = 0) -> str:
    """Create a batch of waiting runs with the library, without running them."""
    command = (
        "import asyncio, sys; sys.path.insert(0, '.')\n"
        "from tasks import echo, app\n"
        "async def main():\n"
        f"    batch = await echo.options(queue={queue!r}, delay_s={delay_s}).map(range({waiting}))\n"
        "    print(batch.id)\n"
        "    await app.close()\n"
        "asyncio.run(main())\n"
    )
    made = subprocess.run([sys.executable, "-c", command], cwd=shell.place, capture_output=True, text=True, check=True)
    return made.stdout.strip()


def change(statement: str, *values: object) -> None:
    """Change the database outside Headrace."""
    with closing(sqlite3.connect("headrace.db")) as connection:
        connection.execute(statement, values)
        connection.commit()


# -- all commands


def test_the_version_is_shown_without_importing_heavy_packages(shell: Shell) -> None:
    code = (
        "import sys; sys.argv = ['headrace', '--version']\n"
        "from headrace.cli import main; main()\n"
        "heavy = {'typer', 'rich', 'asyncio', 'msgspec', 'obstore', 'structlog', 'sqlite3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("headrace 0.")
    assert shell("--version").out == ran.stdout


COMMANDS = [
    ("map",),
    ("batch", "list"),
    ("batch", "show"),
    ("batch", "results"),
    ("batch", "missing"),
    ("batch", "cancel"),
    ("batch", "redrive"),
    ("run", "list"),
    ("run", "show"),
    ("run", "cancel"),
    ("run", "redrive"),
    ("queue", "list"),
    ("schedule", "list"),
    ("queue", "pause"),
    ("queue", "resume"),
    ("verify",),
    ("prune",),
    ("migrate",),
    ("doctor",),
    ("config", "show"),
    ("demo",),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_takes_a_store(shell: Shell, command: tuple[str, ...]) -> None:
    ran = shell(*command, "--help")
    assert ran.code == 0
    assert "--store" in ran.out
    if command != ("batch", "results"):
        assert "--json" in ran.out


def test_a_flag_with_a_wrong_value_is_named_once(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = shell("worker", "tasks.py:app", "--concurrency", "0")
    assert (ran.code, "flag --concurrency: expected an integer from 1" in ran.err) == (2, True), ran.err
    monkeypatch.setenv("HEADRACE_API_KEY", "hunter2")
    ran = shell("batch", "list")
    assert "environment HEADRACE_API_KEY: expected 8 to 4096 printable characters, got 7" in " ".join(ran.err.split())
    assert "hunter2" not in ran.err


def test_a_target_of_the_wrong_kind_or_without_a_name_lists_what_the_file_has(shell: Shell) -> None:
    ran = shell("worker", "tasks.py:double")
    assert (ran.code, "expected an app at tasks.py:double, got the task double" in ran.err) == (2, True), ran.err
    assert "write tasks.py:app" in ran.err
    shell.items(1)
    ran = shell("map", "tasks.py", "in.ndjson")
    assert (ran.code, "its tasks: double, add, picky" in ran.err) == (2, True), ran.err


def test_help_shows_no_type_of_flags_and_the_demo_s_own_default_store(shell: Shell) -> None:
    ran = shell("demo", "--help")
    assert (ran.code, "<bool>" in ran.out, "HEADRACE_STORE" in ran.out) == (0, False, False), ran.out
    assert "a SQLite file in the directory" in " ".join(ran.out.replace("│", " ").split())
    for command in (("batch", "list"), ("map",), ("index", "run"), ()):
        assert "<bool>" not in shell(*command, "--help").out, command


def test_states_and_runs_that_do_not_exist_are_named(shell: Shell, done: str) -> None:
    ran = shell("run", "list", "--state", "faild")
    assert (ran.code, "expected a state of a run, got 'faild'" in ran.err) == (2, True)
    assert "did you mean failed?" in ran.err
    ran = shell("batch", "list", "--state", "failed")
    assert (ran.code, "`headrace run list --state failed` lists runs" in " ".join(ran.err.split())) == (2, True)
    assert shell("run", "list", "--state", "started").code == 0
    missing = f"run_{done.removeprefix('batch_')}_99"
    for verb in ("show", "cancel", "redrive"):
        ran = shell("run", verb, missing)
        assert (ran.code, f"no run has the id '{missing}'" in " ".join(ran.err.split())) == (2, True), ran.err


@pytest.mark.parametrize(
    "arguments", [("nothing",), ("batch", "nothing"), ("batch", "show"), ("map",), ("verify", "--x")]
)
def test_bad_usage_is_exit_2(shell: Shell, arguments: tuple[str, ...]) -> None:
    assert shell(*arguments).code == 2


@pytest.mark.parametrize(
    "command",
    [
        ("batch", "list"),
        ("run", "list"),
        ("queue", "list"),
        ("schedule", "list"),
        ("verify",),
        ("prune",),
        ("queue", "pause", "q"),
    ],
)
def test_read_commands_create_no_database(shell: Shell, command: tuple[str, ...]) -> None:
    ran = shell(*command)
    assert ran.code == 2
    assert "there is no database at headrace.db" in ran.err
    assert list(shell.place.glob("headrace.db*")) == []


def test_an_invalid_setting_is_named_with_its_source(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_FLUSH_SIZE", "0")
    ran = shell("batch", "list")
    assert ran.code == 2
    assert "environment HEADRACE_FLUSH_SIZE" in ran.err


# -- batches


def test_batches_are_listed_newest_first(shell: Shell, done: str) -> None:
    second = open_batch(shell)
    listed = shell("batch", "list", "--json").json["batches"]
    assert [batch["id"] for batch in listed] == [second, done]
    assert listed[1]["failed"] == 2
    assert listed[0]["waiting"] == 5
    text = shell("batch", "list").out
    assert text.index(second) < text.index(done)
    only = shell("batch", "list", "--state", "completed", "--json").json["batches"]
    assert [batch["id"] for batch in only] == [done]
    assert shell("batch", "list", "--state", "gone").code == 2
    assert len(shell("batch", "list", "--limit", "1", "--json").json["batches"]) == 1


def test_a_batch_is_shown_by_its_id_or_its_key(shell: Shell, done: str) -> None:
    shown = shell("batch", "show", done, "--json").json
    assert shown["id"] == done
    assert shown["state"] == "completed"
    assert {name: shown[name] for name in Ledger._fields} == {
        "expected": 10,
        "missing": 0,
        "waiting": 0,
        "leased": 0,
        "completed": 8,
        "failed": 2,
        "cancelled": 0,
        "expired": 0,
    }
    assert shell("batch", "show", shown["key"], "--json").json == shown
    text = shell("batch", "show", done).out
    assert text.startswith(f"{done}  partly failed\n")
    assert "balances" in text


@pytest.mark.parametrize("verb", ["show", "results", "missing", "cancel", "redrive"])
@pytest.mark.parametrize("name", ["nothing", "batch_", "batch_" + "0" * 26, "run_x_1"])
def test_an_unknown_batch_is_named(shell: Shell, done: str, verb: str, name: str) -> None:
    ran = shell("batch", verb, name)
    assert ran.code == 2
    assert name in ran.err


def test_results_are_as_the_map_wrote_them(shell: Shell, done: str) -> None:
    right = (shell.place / "out.ndjson").read_text()
    ran = shell("batch", "results", done)
    assert (ran.code, ran.out) == (0, right)
    assert "10 results" in ran.err
    assert shell("batch", "results", done, "-o", "again.ndjson").code == 0
    assert (shell.place / "again.ndjson").read_text() == right


def test_results_of_an_unfinished_batch_end_at_the_first_running_one(shell: Shell) -> None:
    ran = shell("batch", "results", open_batch(shell))
    assert (ran.code, ran.out) == (0, "")
    assert "run 0 has not ended yet" in ran.err


def test_missing_items_of_an_announced_batch_are_listed_as_ranges(shell: Shell) -> None:
    batch = open_batch(shell)
    assert shell("batch", "missing", batch).out == f"no item of {batch} is missing\n"
    change("UPDATE headrace_batch SET state = 'open', expected_count = 9 WHERE id = ?", batch)
    assert shell("batch", "missing", batch, "--json").json == {"batch": batch, "ranges": [[5, 8]]}
    assert shell("batch", "missing", batch).out.splitlines()[-1].split() == ["5", "8", "4"]


def test_a_batch_is_cancelled_once(shell: Shell) -> None:
    batch = open_batch(shell)
    ran = shell("batch", "cancel", batch)
    assert "is cancelled: 5 runs will not run" in ran.out
    assert "already" in shell("batch", "cancel", batch).out
    assert shell("batch", "cancel", batch, "--json").json["changed"] is False
    assert [json.loads(line)["error"]["type"] for line in shell("batch", "results", batch).out.splitlines()] == [
        "Cancelled"
    ] * 5
    assert shell("verify").code == 0


def test_a_redriven_batch_corrects_its_output(shell: Shell, done: str) -> None:
    shell.write("tasks.py", (shell.place / "tasks.py").read_text().replace("% 5 == 3", "% 5 == 9"))
    sys.modules.pop("tasks")
    assert "2 failed runs" in shell("batch", "redrive", done).out
    ran = shell.map("--json", task="picky")
    assert ran.code == 0
    assert (ran.json["done_before"], ran.json["failed"]) == (8, 0)
    assert [line["output"] for line in shell.lines()] == list(range(10))
    assert "nothing was changed" in shell("batch", "redrive", done).out
    assert shell("batch", "redrive", done, "--json").json["redriven"] == 0


# -- runs


def run_of(batch: str, index: int) -> str:
    return f"run_{batch.removeprefix('batch_')}_{index}"


def test_runs_are_listed_by_state_task_and_batch(shell: Shell, done: str) -> None:
    other = open_batch(shell)
    failed = shell("run", "list", "--state", "failed", "--json").json["runs"]
    assert [(run["batch_id"], run["index"]) for run in failed] == [(done, 3), (done, 8)]
    assert failed[0]["error"]["message"] == "no 3"
    assert "ValueError: no 3" in shell("run", "list", "--state", "failed").out
    assert len(shell("run", "list", "--batch", other, "--json").json["runs"]) == 5
    assert len(shell("run", "list", "--task", "picky", "--json").json["runs"]) == 10
    assert shell("run", "list", "--task", "nobody").out == "no runs\n"
    assert shell("run", "list", "--state", "asleep").code == 2
    assert shell("run", "list", "--batch", "nothing").code == 2


def test_a_run_is_shown_with_its_input_and_its_error(shell: Shell, done: str) -> None:
    run = run_of(done, 3)
    shown = shell("run", "show", run, "--json").json
    assert shown["input"] == {"n": 3}
    assert shown["error"]["type"] == "ValueError"
    assert (shown["state"], shown["attempt"]) == ("failed", 1)
    text = shell("run", "show", run).out
    assert '{"n":3}' in text
    assert "no 3" in text
    good = shell("run", "show", run_of(done, 4), "--json").json
    assert (good["state"], good["output"]) == ("completed", 4)


@pytest.mark.parametrize("verb", ["show", "cancel", "redrive"])
@pytest.mark.parametrize("name", ["nothing", "run_x_1", "run_00000000000000000000000000_1"])
def test_an_unknown_run_is_named(shell: Shell, done: str, verb: str, name: str) -> None:
    assert shell("run", verb, name).code == 2
    assert shell("run", verb, run_of(done, 99)).code == 2


def test_a_run_is_cancelled_and_redriven(shell: Shell) -> None:
    batch = open_batch(shell)
    run = run_of(batch, 2)
    assert shell("run", "cancel", run).out == f"{run} is cancelled\n"
    assert "already" in shell("run", "cancel", run).out
    assert shell("run", "show", run, "--json").json["state"] == "cancelled"
    assert shell("run", "redrive", run).out == f"{run} will run again\n"
    assert shell("run", "show", run, "--json").json["state"] == "waiting"
    again = shell("run", "redrive", run)
    assert again.code == 2
    assert "is waiting" in again.err


# -- queues


def test_a_queue_is_paused_and_resumed(shell: Shell) -> None:
    open_batch(shell, queue="slow")
    listed = {queue["name"]: queue for queue in shell("queue", "list", "--json").json["queues"]}
    assert listed["slow"]["waiting_count"] == 5
    assert shell("queue", "pause", "slow").out == "slow is paused\n"
    assert shell("queue", "pause", "slow").out == "slow is paused already\n"
    assert "paused" in shell("queue", "list").out
    assert shell("queue", "resume", "slow", "--json").json == {"queue": "slow", "paused": False, "changed": True}
    assert shell("queue", "pause", "x" * 300).code == 2


# -- the ledger, maintenance


def test_a_ledger_that_balances_is_exit_0_and_one_that_does_not_is_4(shell: Shell, done: str) -> None:
    ran = shell("verify")
    assert (ran.code, ran.out) == (0, "1 batch, 10 runs: the ledger balances\n")
    assert shell("verify", done, "--json").json["balances"] is True
    change("UPDATE headrace_batch SET completed_count = completed_count + 1 WHERE id = ?", done)
    wrong = shell("verify")
    assert wrong.code == 4
    assert f"{done} does not balance" in wrong.out
    assert "completed" in wrong.out
    answer = shell("verify", done, "--json")
    assert answer.code == 4
    assert answer.json["batches"][0]["differences"]


def test_prune_deletes_batches_past_their_retention(shell: Shell, done: str) -> None:
    assert shell("prune", "--json").json == {"batches": 0, "objects": 0}
    assert shell("prune", "--retention-ms", "0", "--json").json["batches"] == 1
    assert shell("batch", "list").out == "no batches\n"
    assert shell("prune", "--retention-ms", "-1").code == 2


# -- settings


def test_flags_override_the_environment_which_overrides_the_file(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> dict[str, Any]:
        answer = shell("config", "show", "--json", *flags).json["settings"]
        return {line["name"]: (line["value"], line["source"]) for line in answer}

    flags: tuple[str, ...] = ()
    assert shown()["concurrency"] == ("100", "default")
    shell.write("headrace.toml", 'concurrency = 5\nstore = "sqlite:///file.db"\n[limits]\nflush_size = 7\n')
    assert shown()["concurrency"] == ("5", "headrace.toml")
    assert shown()["flush_size"] == ("7", "headrace.toml")
    monkeypatch.setenv("HEADRACE_CONCURRENCY", "6")
    assert shown()["concurrency"] == ("6", "environment HEADRACE_CONCURRENCY")
    flags = ("--concurrency", "8", "--store", "postgresql://ada:swordfish@host/db")
    assert shown()["concurrency"] == ("8", "flag --concurrency")
    value, source = shown()["store"]
    assert source == "flag --store"
    assert "swordfish" not in value
    assert "swordfish" not in shell("config", "show", *flags).out


def test_the_store_setting_of_the_environment_is_used(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.items(3)
    monkeypatch.setenv("HEADRACE_STORE", "sqlite:///elsewhere.db")
    assert shell.map().code == 0
    assert (shell.place / "elsewhere.db").exists()
    assert not (shell.place / "headrace.db").exists()


# -- the doctor


def checks(shell: Shell, *arguments: str) -> dict[str, tuple[bool, str]]:
    ran = shell("doctor", "--json", *arguments)
    by_name = {check["check"]: (check["ok"], check["detail"]) for check in ran.json["checks"]}
    assert ran.json["ok"] is all(ok for ok, _ in by_name.values())
    assert ran.code == (0 if ran.json["ok"] else 1)
    return by_name


def test_doctor_passes_with_a_store_in_use(shell: Shell, done: str) -> None:
    checked = checks(shell)
    assert list(checked) == [
        "store",
        "version",
        "durability",
        "clock",
        "disk",
        "access",
        "secrets",
        "exposure",
        "objects",
        "sessions",
        "workers",
        "batches",
    ]
    assert all(ok for ok, _ in checked.values()), checked
    text = shell("doctor").out
    assert text.count("ok  ") == 12


def test_doctor_reports_a_store_that_can_not_be_opened(shell: Shell) -> None:
    shell.write("headrace.db", b"no database at all, just words " * 100)
    checked = checks(shell)
    assert checked["store"][0] is False
    assert "not an SQLite database" in checked["store"][1]
    assert checks(shell, "--store", "sqlite:///nowhere/x.db")["store"][0] is False
    assert "hint:" in shell("doctor").out


def test_doctor_reports_a_newer_schema(shell: Shell, done: str) -> None:
    change("UPDATE headrace_version SET number = 999")
    assert checks(shell)["version"][0] is False


def test_doctor_reports_settings_that_may_lose_acknowledged_runs(
    shell: Shell, done: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.store.sqlite import SqliteStore

    async def check(self: SqliteStore) -> dict[str, object]:
        return {"store": "sqlite", "schema_version": 1, "journal_mode": "delete", "synchronous": "off"}

    monkeypatch.setattr(SqliteStore, "check", check)
    ok, detail = checks(shell)["durability"]
    assert not ok
    assert "power failure" in detail


def test_doctor_reports_a_wrong_clock(shell: Shell, done: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.runtime.clock import SystemClock

    right = SystemClock.now_us
    monkeypatch.setattr(SystemClock, "now_us", lambda self: right(self) - 90_000_000)
    ok, detail = checks(shell)["clock"]
    assert not ok
    assert "differ by 90.0 s" in detail


def test_doctor_reports_a_nearly_full_disk(shell: Shell, done: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.cli.administration import doctor

    monkeypatch.setattr(doctor, "FREE_BYTES_MIN", 1 << 60)
    ok, detail = checks(shell)["disk"]
    assert not ok
    assert "only" in detail


def test_doctor_reports_a_session_without_heartbeats(shell: Shell, done: str) -> None:
    change(
        "INSERT INTO headrace_session (id, environment, key_id, kind, host, pid, started_us, heartbeat_us, ended_us)"
        " VALUES ('session_x', 'default', '', 'worker', 'mill', 4711, 1, 1, 0)"
    )
    ok, detail = checks(shell)["sessions"]
    assert not ok
    assert "worker 4711 on mill" in detail


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (
            lambda batch: change("UPDATE headrace_batch SET state = 'open', appended_us = 1, created_us = 1"),
            "got no item for",
        ),
        (lambda batch: change("UPDATE headrace_batch SET appended_us = 1, created_us = 1"), "no worker is alive"),
    ],
)
def test_doctor_reports_a_stuck_batch(shell: Shell, spoil: Callable[[str], None], why: str) -> None:
    spoil(open_batch(shell))
    ok, detail = checks(shell)["batches"]
    assert not ok
    assert why in detail


def test_doctor_reports_a_paused_queue_with_runs_and_a_far_delay(shell: Shell) -> None:
    open_batch(shell, queue="slow")
    shell("queue", "pause", "slow")
    assert "the queue slow is paused" in checks(shell)["batches"][1]
    shell("queue", "resume", "slow")
    assert checks(shell)["batches"][0] is True
    open_batch(shell, delay_s=30 * 86_400)
    ok, detail = checks(shell)["batches"]
    assert not ok
    assert "the next delayed run is due in " in detail


# -- the demo


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library."""
    root = tmp_path / "lib"
    (root / "pkg" / "site-packages").mkdir(parents=True)
    (root / "one.py").write_text("class A:\n    def f(self): ...\n\ndef g(): ...\ndef _hidden(): ...\n")
    (root / "pkg" / "bad.py").write_text("print 'two'\n")
    (root / "pkg" / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (root / "pkg" / "odd.py").write_bytes(b"# -*- coding: nothing -*-\nx = '\xff'\n")
    (root / "pkg" / "large.py").write_text("x = 1\n" * 20_000)
    (root / "pkg" / "site-packages" / "not_ours.py").write_text("")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    return root


def test_the_demo_outlines_a_library_and_ends_well(shell: Shell, library: Path) -> None:
    ran = shell("demo", "--dir", "there", "--no-progress")
    assert ran.code == 0, ran.err
    assert "5 modules of the standard library" in ran.err
    assert "1 are large" in ran.err
    assert "4 modules" in ran.out
    assert "pkg/bad.py: SyntaxError" in ran.out
    assert "the ledger balances: 4 completed, 1 failed, 5 in all" in ran.out
    lines = shell.lines("there/outlines.ndjson")
    assert lines[0]["output"]["names"] == ["A", "g"]
    again = shell("demo", "--dir", "there", "--no-progress", "--json")
    assert again.json["summary"]["done_before"] == 5
    assert again.json["balances"] is True
    assert "were done by an earlier command" in shell("demo", "--dir", "there", "--no-progress").out


def test_the_demo_works_in_a_temporary_directory_by_default(
    shell: Shell, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(shell.place))
    ran = shell("demo", "--no-progress", "--json")
    assert ran.code == 0
    assert Path(ran.json["directory"]).parent == shell.place
    assert shell("demo", "--dir", "tasks.py").code == 2


def test_the_repository_s_example_is_the_packaged_one() -> None:
    root = Path(__file__).parents[2]
    code = "import examples.stdlib as a, headrace.examples.stdlib as b; assert a.outline is b.outline"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, env={**os.environ, "PYTHONPATH": str(root)})
