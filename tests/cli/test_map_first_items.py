"""`headrace map` over items that don't fit the task: it stops before anything is stored, or says how to go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from enum import Enum
from typing import Annotated, Any

import msgspec
import pytest

from headrace.cli.maps.first_items import CHECKED_ITEMS
from headrace.runtime.tasks.payload_codec import Codec
from headrace.runtime.tasks.payload_example import examples
from tests.cli.conftest import Shell

TYPED = """
from headrace import Headrace

app = Headrace("typed")


@app.task
async def square(n: int) -> int:
    return n * n


@app.task
def sums(a: int, b: int = 10) -> int:
    return a + b
"""


@pytest.fixture
def typed(shell: Shell) -> Shell:
    """Provide `typed.py`, whose tasks have annotated parameters."""
    shell.write("typed.py", TYPED)
    return shell


def mapped(shell: Shell, *arguments: str, task: str = "square", input_: str = "in.ndjson") -> Any:
    return shell("map", f"typed.py:{task}", input_, "-o", "out.ndjson", *arguments)


def test_a_map_stops_when_the_first_hundred_items_all_fail_to_fit(typed: Shell) -> None:
    typed.write("in.ndjson", '{"number":1}\n' * 20_000)
    ran = mapped(typed)
    assert ran.code == 2
    assert "none of the first 100 items of in.ndjson fits the task square(n: int): Expected `int`" in ran.err
    assert 'a line of the input looks like 1 or {"n":1}; nothing was stored' in ran.err
    assert typed("batch", "list", "--json").json["batches"] == []
    typed.items(20)
    assert mapped(typed).code == 0, "no --fresh is needed after the correction"


def test_a_map_of_a_task_of_several_parameters_shows_an_object(typed: Shell) -> None:
    typed.write("in.ndjson", "7\n" * CHECKED_ITEMS)
    ran = mapped(typed, task="sums")
    assert (ran.code, 'looks like {"a":1}; nothing was stored' in ran.err) == (2, True), ran.err


def test_nothing_more_than_the_first_items_of_a_stream_is_read(typed: Shell) -> None:
    read, write = os.pipe()
    os.write(write, b'"a"\n' * CHECKED_ITEMS)  # the writer stays open: the map must not wait for more
    try:
        done = subprocess.run(
            [sys.executable, "-m", "headrace", "map", "typed.py:square", "-"],
            cwd=typed.place,
            stdin=read,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 2
    assert "standard input fits the task square" in done.stderr


def test_a_signal_during_the_wait_for_the_first_item_ends_the_map(typed: Shell) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "map", "typed.py:square", "-", "--json"],
        cwd=typed.place,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("reading standard input")
        while not (typed.place / "headrace.db").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode in (130, -signal.SIGTERM)  # the signal may come before the map listens to it
    assert "Traceback" not in err


def test_one_item_that_fits_lets_the_map_go_on(typed: Shell) -> None:
    typed.write("in.ndjson", '"a"\n' * (CHECKED_ITEMS - 1) + "2\n" + '"b"\n' * 10)
    ran = mapped(typed)
    assert ran.code == 3
    assert typed.lines()[CHECKED_ITEMS - 1]["output"] == 4


def test_an_input_of_fewer_items_has_an_error_line_for_each(typed: Shell) -> None:
    typed.write("in.ndjson", '"a"\n' * (CHECKED_ITEMS - 1))
    assert mapped(typed).code == 3
    assert len(typed.lines()) == CHECKED_ITEMS - 1


def test_a_csv_file_is_refused_with_the_form_of_a_line(typed: Shell) -> None:
    typed.write("in.csv", "name;amount\r\n" + "ann;3\r\n" * 200)
    ran = mapped(typed, input_="in.csv")
    assert ran.code == 2
    assert "Invalid JSON at line 1" in ran.err
    assert "a line of the input looks like 1" in ran.err


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_and_utf_32_are_refused_before_anything_is_stored(typed: Shell, encoding: str) -> None:
    typed.write("in.ndjson", ('{"n":1}\n' * 3).encode(encoding))
    ran = mapped(typed)
    assert ran.code == 2
    assert f"in.ndjson: expected UTF-8, got {encoding[:6].upper()}" in ran.err
    assert "iconv -f UTF-" in ran.err
    assert typed("batch", "list", "--json").json["batches"] == []


def test_a_file_written_on_windows_is_read(typed: Shell) -> None:
    typed.write("in.ndjson", b"\xef\xbb\xbf1\r\n2\r\n")
    assert mapped(typed).code == 0
    assert [line["output"] for line in typed.lines()] == [1, 4]


def test_a_repeated_map_says_that_failed_runs_need_a_redrive_or_a_fresh_start(typed: Shell) -> None:
    typed.write("in.ndjson", '1\n"a"\n')
    assert mapped(typed).code == 3
    ran = mapped(typed)
    assert ran.code == 3
    assert "1 run failed in an earlier command and did not run again" in ran.err
    assert "headrace batch redrive" in ran.err
    assert "--fresh" in ran.err


class Colour(Enum):
    RED = "red"


class Order(msgspec.Struct):
    id: int
    tags: list[str]
    colour: Colour
    note: str = ""


def one_order(order: Order) -> None: ...


def optional(n: int | None = None) -> None: ...


def nested(by_name: dict[str, tuple[int, float]], flag: bool) -> None: ...


def short(word: Annotated[str, msgspec.Meta(max_length=2)]) -> None: ...


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (
            one_order,
            [
                '{"id":1,"tags":["text"],"colour":"red"}',
                '{"order":{"id":1,"tags":["text"],"colour":"red"}}',
            ],
        ),
        (optional, ["1", '{"n":1}']),
        (nested, ['{"by_name":{"text":[1,1.5]},"flag":true}']),
        (short, []),
    ],
)
def test_examples_fit_their_task(function: Any, shapes: list[str]) -> None:
    codec = Codec("task", function)
    assert examples(codec) == shapes
    for shape in shapes:
        json.loads(shape)


def test_the_text_of_a_line_that_is_not_valid_is_kept_and_shown(typed: Shell) -> None:
    typed.write("in.ndjson", "1\n{not json}\n" + "x" * 5_000 + "\n")
    ran = mapped(typed, "--json")
    batch = ran.json["batches"][0]
    prefix = batch.replace("batch_", "run_")
    assert typed("run", "show", f"{prefix}_1", "--json").json["input"] == "{not json}"
    assert typed("run", "show", f"{prefix}_2", "--json").json["input"] == "x" * 1_024
    assert "{not json}" in typed("run", "show", f"{prefix}_1").out


def test_runs_of_lines_that_are_not_valid_can_not_be_redriven_and_the_answer_says_so(typed: Shell) -> None:
    typed.write("in.ndjson", '1\n{not json}\n"fits not"\n')
    batch = mapped(typed, "--json").json["batches"][0]
    invalid = f"{batch.replace('batch_', 'run_')}_1"
    printed = typed("batch", "redrive", batch).out.splitlines()
    assert printed[0] == f"1 failed run of {batch} will run again; repeat its `headrace map` command to run them"
    assert printed[1].startswith("1 failed run can't run again, because the items are not valid: correct the input")
    assert "--fresh" in printed[1]
    refused = typed("run", "redrive", invalid)
    assert refused.code == 2
    assert "its item is not valid" in refused.err


def test_attempts_after_a_redrive_count_from_one_again(typed: Shell) -> None:
    typed.write("in.ndjson", '1\n"a"\n')
    batch = mapped(typed, "--json").json["batches"][0]
    run_id = f"{batch.replace('batch_', 'run_')}_1"
    assert typed("run", "redrive", run_id).code == 0
    assert mapped(typed).code == 3
    view = typed("run", "show", run_id, "--json").json
    assert [attempt["number"] for attempt in view["attempts"]] == [1, 1]
    assert "redriven" in typed("run", "show", run_id).out
