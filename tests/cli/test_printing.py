"""Tables and lists fit the terminal, and no word of them is broken."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.invocation.printing import counted, note, pairs, say, table
from headrace.foundation.logs import FIELDS, LineFormatter, printable
from tests.cli.conftest import Shell
from tests.cli.test_schedule import make_known, scheduled
from tests.support.broker import DEADLETTER, FAILURE, BrokerRig, engine_on

WIDTH = 80
LONG_TASK = """
from headrace import Headrace

app = Headrace("tests")

@app.task(name="reports.monthly_statement_of_one_customer", queue="long-running-reports")
async def statement(item):
    if item["n"] % 2:
        raise ValueError("the statement of a customer without any orders can't be made " + "as it has no lines " * 5)
    return item
"""


async def bury_one(folder: Path) -> None:
    """Leave one dead letter in the folder's store."""
    engine = await engine_on("sqlite", folder)
    broker = BrokerRig(engine)
    await broker.dispatcher.start()
    await broker.add_many(1, retry={"on_attempts_exceeded": DEADLETTER})
    await broker.drain(2, FAILURE)
    await broker.dispatcher.stop()
    await broker.producer.close()
    await engine.close()


@pytest.fixture
def used(shell: Shell) -> str:
    """A store with batches, failed runs, a dead letter, schedules and a killswitch rule; the batch's id."""
    asyncio.run(bury_one(shell.place))
    shell.write("long.py", LONG_TASK)
    shell.items(6)
    shell("map", "long.py:statement", "in.ndjson", "-o", "out.ndjson")
    make_known(scheduled("30 6 * * MON-FRI"))
    shell("killswitch", "add", "send", "--kwarg", 'to="somebody@example.org"', "--arg", "0=17")
    batch: str = shell("batch", "list", "--json").json["batches"][0]["id"]
    return batch


COMMANDS = [
    ("batch", "list"),
    ("batch", "show", "BATCH"),
    ("batch", "missing", "BATCH"),
    ("run", "list", "--batch", "BATCH"),
    ("run", "show", "RUN"),
    ("queue", "list"),
    ("schedule", "list"),
    ("dead", "list"),
    ("killswitch", "list"),
    ("config", "show"),
    ("key", "list"),
    ("index", "status"),
    ("doctor",),
]


def on_terminal(arguments: list[str], width: int) -> str:
    """Run a command on a terminal of a width and return what it showed."""
    controller, terminal = pty.openpty()
    os.environ.pop("COLUMNS", None)
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "dumb"}
    with subprocess.Popen(
        [sys.executable, "-m", "headrace", *arguments], stdout=terminal, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(controller, 65_536):
                shown += piece
        except OSError:  # Linux reports the end of a terminal as an error
            pass
        assert process.wait() == 0, shown.decode()
    os.close(controller)
    return shown.decode().replace("\r\n", "\n")


def words_of(shown: str) -> set[str]:
    """Return the words of an output, with 0 for every number: free space and times change from call to call."""
    return set(re.sub(r"\d[\d.,]*", "0", shown.replace("─", "")).split())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_a_command_shows_fits_80_columns_without_breaking_a_word(
    shell: Shell, used: str, command: tuple[str, ...]
) -> None:
    run = f"run_{used.removeprefix('batch_')}_1"
    arguments = [{"BATCH": used, "RUN": run}.get(word, word) for word in command]
    narrow, wide = on_terminal(arguments, WIDTH), "".join(shell(*arguments)[1:])
    too_long = [line for line in narrow.splitlines() if len(line) > WIDTH and " " in line.strip()]
    if command != ("doctor",):
        assert too_long == []
    assert words_of(narrow) <= words_of(wide) | {"-"}
    if command[0] == "batch":
        assert used in narrow


def test_columns_that_do_not_fit_continue_on_an_indented_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    table(
        ("name", "state", "runs", "reason"), [("first", "completed", 1_000, "a b c d e f g h i j k")], numbers=("runs",)
    )
    assert capsys.readouterr().out.splitlines() == [
        "name   state",
        "  runs",
        "  reason",
        "────────────────────",
        "first  completed",
        "  1,000",
        "  a b c d e f g h i",
        "  j k",
    ]


def test_a_table_that_is_not_shown_on_a_terminal_has_one_line_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table(("name", "reason"), [("x", "word " * 100)])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_counts_have_their_plural() -> None:
    assert [counted(count, "batch") for count in (0, 1, 2_000)] == ["0 batches", "1 batch", "2,000 batches"]
    assert counted(2, "class") == "2 classes"


def test_views_are_json_with_times_in_utc(shell: Shell, used: str) -> None:
    shown = json.loads(shell("batch", "show", used, "--json").out)
    assert shown["created_at"].endswith("Z")
    assert shown["duration_s"] > 0


HOSTILE = "a\x1b[2J\x1b]0;owned\x07\x00\x9b31m\u202eb\r"


def test_control_characters_of_a_client_are_escaped_in_all_that_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (None, "30"):
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        say(HOSTILE)
        note(HOSTILE)
        table((HOSTILE, "state"), [("first", HOSTILE), (HOSTILE + "\nforged", 1)])
        pairs(HOSTILE, [(HOSTILE, HOSTILE + "\n" + HOSTILE)])
        shown = "".join(capsys.readouterr())
        assert "\\x1b[2J" in shown
        assert "\nforged" not in shown
        assert all(line.isprintable() for line in shown.split("\n"))


def test_control_characters_are_escaped_in_log_lines_for_people_only() -> None:
    failure = (ValueError, ValueError(HOSTILE), None)
    record = logging.LogRecord("shop", logging.ERROR, "", 1, "failed: %s", (HOSTILE,), failure)
    setattr(record, FIELDS, {"event": record.getMessage(), "error": HOSTILE, "tags": Tags()})
    line = LineFormatter(is_json=False).format(record)
    assert "\\x1b[2J" in line
    assert "ValueError: a\\x1b" in line
    assert all(part.isprintable() for part in line.split("\n"))
    assert json.loads(LineFormatter(is_json=True).format(record))["error"] == HOSTILE
    assert printable(HOSTILE + "\n").isprintable()


class Tags:
    """A value of a log line whose representation has control characters."""

    def __repr__(self) -> str:
        return HOSTILE


def test_a_run_whose_error_holds_an_escape_sequence_is_shown_escaped(shell: Shell) -> None:
    shell.write(
        "tasks.py",
        "from headrace import Headrace\napp = Headrace('tests')\n@app.task\nasync def bad(item):\n"
        "    raise ValueError(item['text'])\n",
    )
    shell.write("in.ndjson", json.dumps({"text": HOSTILE}) + "\n")
    shell.map(task="bad")
    batch = shell("batch", "list", "--json").json["batches"][0]["id"]
    run = f"run_{batch.removeprefix('batch_')}_0"
    for command in (("run", "show", run), ("run", "list"), ("batch", "show", batch), ("queue", "list"), ("doctor",)):
        shown = shell(*command).out
        assert all(line.isprintable() for line in shown.split("\n")), command
    assert "\\x1b[2J" in shell("run", "show", run).out
    assert HOSTILE in json.loads(shell("run", "show", run, "--json").out)["error"]["message"]
