"""Listings for people: single runs folded, outcomes in words, keys, and the way to the next page."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from headrace import Headrace
from headrace.core.failure import crashed
from headrace.core.span import Span
from headrace.store.projections import view_of
from headrace.views import listed_view
from tests.cli.conftest import Shell


@pytest.fixture
def mixed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Provide a store with three maps (all, some and none of whose runs fail) and single runs."""
    monkeypatch.delenv("COLUMNS", raising=False)
    shell.items(3)
    shell.write("bad.ndjson", '{"n":3}\n{"n":8}\n')
    shell.write("half.ndjson", '{"n":3}\n{"n":1}\n')
    for name in ("in", "bad", "half"):
        shell.map("--batch-key", f"key-{name}", task="picky", input_=f"{name}.ndjson")

    async def singles() -> None:
        async with Headrace("app", store=f"sqlite:///{shell.place}/headrace.db") as app:

            @app.task(queue="mail")
            async def send(n: int) -> int:
                return n

            for n in range(3):
                await send.enqueue(n)
            await send.options(idempotency_key="once").enqueue(9)

    asyncio.run(singles())
    return shell


def test_a_list_of_batches_tells_failed_from_completed_and_folds_single_runs(mixed: Shell) -> None:
    lines = mixed("batch", "list").out.splitlines()
    assert lines[0].split() == [
        "batch", "key", "task", "state", "created", "(UTC)", "runs", "waiting", "completed", "failed",
    ]  # fmt: skip
    assert [re.split(r"\s{2,}", line)[3] for line in lines[2:5]] == ["partly failed", "failed", "completed"]
    assert lines[5].startswith("single runs")
    assert "send" in lines[5]
    assert "key-bad" in lines[3]
    assert len(lines) == 6
    listed = mixed("batch", "list", "--json").json
    assert [view["outcome"] for view in listed["batches"]] == ["partly_failed", "failed", "completed"]
    assert [view["expected"] for view in listed["folded"]] == [4]
    everything = mixed("batch", "list", "--all", "--json").json
    assert (len(everything["batches"]), everything["folded"]) == (4, [])
    assert mixed("batch", "list", "--all").out.count("send") == 1, "the task of a stream is known from its runs"


def test_a_list_that_stops_at_its_limit_says_how_to_continue(mixed: Shell) -> None:
    ran = mixed("batch", "list", "--limit", "2")
    first = mixed("batch", "list", "--limit", "2", "--json").json
    assert f"--before {first['next']} continues" in ran.err
    rest = mixed("batch", "list", "--before", first["next"], "--json").json
    assert [view["outcome"] for view in (*first["batches"], *rest["batches"])] == [
        "partly_failed",
        "failed",
        "completed",
    ]
    assert rest["next"] is None
    ran = mixed("run", "list", "--limit", "4")
    page = mixed("run", "list", "--limit", "4", "--json").json
    assert f"--after {page['next']} continues" in ran.err
    whole = [run["id"] for run in mixed("run", "list", "--json").json["runs"]]
    behind = mixed("run", "list", "--after", page["next"], "--json").json
    assert [run["id"] for run in (*page["runs"], *behind["runs"])] == whole
    assert behind["next"] is None
    assert mixed("run", "list", "--limit", str(len(whole))).err == ""


def test_listed_runs_have_keys_attempts_and_times(mixed: Shell) -> None:
    runs: list[Any] = mixed("run", "list", "--json").json["runs"]
    assert [run["idempotency_key"] for run in runs if run["task"] == "send"] == [None, None, None, "once"]
    ended = [run for run in runs if run["is_finished"]]
    assert {run["state"] for run in ended} == {"completed", "failed"}
    assert all(run["ended_at"] and run["attempts"][-1]["state"] == run["state"] for run in ended)
    assert {run["task"] for run in mixed("run", "list", "--queue", "mail", "--json").json["runs"]} == {"send"}


def test_runs_are_listed_by_the_time_since_they_arrived(mixed: Shell) -> None:
    everything = mixed("run", "list", "--json").json["runs"]
    assert mixed("run", "list", "--since", "2h", "--json").json["runs"] == everything
    assert mixed("run", "list", "--since", "0s", "--json").json["runs"] == []
    for wrong in ("2", "h", "2w", "-1h", "1234567d"):
        ran = mixed("run", "list", f"--since={wrong}")
        assert (ran.code, "write a number and s, m, h or d" in ran.err) == (2, True), wrong


def test_a_batch_is_found_by_the_batch_key_of_its_map(mixed: Shell) -> None:
    shown = mixed("batch", "show", "key-bad")
    assert shown.code == 0
    assert "  failed\n" in shown.out
    assert "key-bad" in shown.out
    assert mixed("batch", "show", "key-none").code == 2


def test_one_batch_key_can_not_name_two_maps(mixed: Shell) -> None:
    mixed.write("other.ndjson", '{"n":1}\n')
    ran = mixed.map("--batch-key", "key-in", task="picky", input_="other.ndjson")
    assert ran.code == 2
    assert "--batch-key key-in names the map of picky over " in ran.err
    assert mixed.map("--batch-key", "key-in", task="picky").code == 0, "the same map again"


def test_crashes_in_a_view_and_in_its_error_agree() -> None:
    span = Span(
        block_id=1,
        batch_id=f"batch_{'0' * 26}",
        environment="default",
        queue="q",
        task="t",
        states=b"f",
        unsettled_count=0,
        crashes_count=2,
    )
    record = view_of(span, 0, ord("f"))
    record.result = crashed(crashes=3, attempts=1, evidence="killed").encode()
    view = listed_view(record)
    assert (view.crashes, "crashed 3 times" in str(view.error and view.error.message)) == (3, True)
