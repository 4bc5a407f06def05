"""`headrace index`: run, status, rollback, reset, as a user types them."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

JOB = """
import msgspec
from headrace import Headrace
from headrace.indexer import HandlerContext, Entity, ndjson

app = Headrace("bank")

class Pay(msgspec.Struct, tag_field="type", tag="pay"):
    to: str
    amount: int

class Account(Entity):
    id: str
    balance: int = 0

bank = app.indexer("bank", source=ndjson("pays.ndjson"), entities=[Account], history="all")

@bank.on("pay")
async def on_pay(event: Pay, ctx: HandlerContext) -> None:
    account = await ctx.get_or_create(Account, event.to)
    ctx.set(Account(account.id, account.balance + event.amount))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job and its events."""
    (tmp_path / "job.py").write_text(JOB)
    lines = [json.dumps({"type": "pay", "to": f"a{n % 3}", "amount": n}) for n in range(1, 101)]
    (tmp_path / "pays.ndjson").write_text("\n".join(lines) + "\n")
    return tmp_path


def headrace(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one command in a folder."""
    command = [sys.executable, "-m", "headrace", "index", *arguments, "--store", "sqlite:///bank.db"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


def balances(folder: Path) -> dict[str, int]:
    """Read the indexer's table with SQL."""
    with sqlite3.connect(folder / "bank.db") as db:
        return dict(db.execute("SELECT id, balance FROM account"))


def expected_balances(count: int) -> dict[str, int]:
    by_account: dict[str, int] = {}
    for n in range(1, count + 1):
        by_account[f"a{n % 3}"] = by_account.get(f"a{n % 3}", 0) + n
    return by_account


def test_an_indexer_runs_resumes_rolls_back_and_is_reset(folder: Path) -> None:
    done = headrace(folder, "job.py:bank", "--until", "40", "--depth", "2", "--batch-size", "7", "--no-progress")
    assert done.returncode == 0, done.stderr
    assert re.search(r"bank: 40 events, [\d,]+/s, \d+ rows in \d+ commits; main at 40; compute \d+ %", done.stderr)
    assert balances(folder) == expected_balances(40)
    status = headrace(folder, "status", "--json")
    (shown,) = json.loads(status.stdout)["indexers"]
    assert (shown["name"], shown["checkpoint"], shown["positions"], shown["caught_up"]) == (
        "bank",
        40,
        {"main": 40},
        False,
    )
    assert headrace(folder, "job.py:bank").returncode == 0
    assert balances(folder) == expected_balances(100)
    assert re.search(r"bank +100 +main 100 +yes", headrace(folder, "status").stdout)
    back = headrace(folder, "rollback", "job.py:bank", "25")
    assert "checkpoint 25" in back.stderr
    assert balances(folder) == expected_balances(25)
    assert "checkpoint 0" in headrace(folder, "rollback", "job.py:bank", "begin").stderr
    assert balances(folder) == {}
    assert "dropped account, account_history" in headrace(folder, "reset", "bank", "--yes").stderr
    assert json.loads(headrace(folder, "status", "--json").stdout) == {"indexers": []}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("job.py:nope",), "has no 'nope'"),
        (("job.py:bnk",), "its indexers: bank"),
        (("job.py:app",), "expected an indexer at job.py:app, got a Headrace"),
        (("job.py:bank", "--depth", "-1"), "flag --index-depth-max: expected"),
        (("job.py:bank", "--until", "x"), "expected a position like"),
        (("rollback", "job.py:bank", "7", "--source", "other"), "expected the name of a source"),
        (("reset", "other", "--yes"), "no indexer is named 'other'"),
        (("reset", "bnak", "--yes"), "did you mean bank? indexers: bank"),
    ],
    ids=str,
)
def test_an_invalid_index_command_is_explained_and_changes_nothing(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    headrace(folder, "job.py:bank", "--until", "10")
    done = headrace(folder, *arguments)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert balances(folder) == expected_balances(10)


def test_an_invalid_event_stops_the_indexer_and_the_next_start_resumes(folder: Path) -> None:
    lines = (folder / "pays.ndjson").read_text().splitlines()
    bad = [*lines[:50], '{"type":"pay","to":5}', *lines[51:]]
    (folder / "pays.ndjson").write_text("\n".join(bad) + "\n")
    done = headrace(folder, "job.py:bank", "--batch-size", "10")
    assert done.returncode == 2
    assert "event at 51 is invalid" in done.stderr
    (folder / "pays.ndjson").write_text("\n".join(lines) + "\n")
    assert headrace(folder, "job.py:bank").returncode == 0
    assert balances(folder) == expected_balances(100)


def test_a_signal_commits_the_handled_events(folder: Path) -> None:
    slow = JOB.replace(
        "    account = await",
        "    import asyncio; await asyncio.sleep(0.01 if event.amount > 20 else 0)\n    account = await",
    )
    (folder / "job.py").write_text(slow)
    command = [
        sys.executable,
        "-m",
        "headrace",
        "index",
        "job.py:bank",
        "--store",
        "sqlite:///bank.db",
        "--batch-size",
        "5",
    ]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    while not (folder / "bank.db").exists() or not _has_rows(folder):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "stopping: handled events are committed" in stderr
    with sqlite3.connect(folder / "bank.db") as db:
        ((no, holder),) = db.execute("SELECT no, holder FROM headrace_indexer")
    assert (balances(folder), holder) == (expected_balances(no), "")


def _has_rows(folder: Path) -> bool:
    try:
        return bool(balances(folder))
    except sqlite3.OperationalError:
        return False


def test_the_help_of_index_lists_its_run_command(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "index", "--help"], capture_output=True, text=True, check=True
    )
    assert re.search(r"run +Run an indexer until its sources end", done.stdout)
