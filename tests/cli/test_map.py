"""`headrace map` from its arguments to its exit code."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.cli.conftest import Shell


def test_every_item_has_its_line_in_order(shell: Shell) -> None:
    shell.items(1_000)
    ran = shell.map()
    assert ran.code == 0
    assert (shell.place / "out.ndjson").read_bytes() == b"".join(
        b'{"index":%d,"ok":true,"output":%d}\n' % (n, 2 * n) for n in range(1_000)
    )
    assert "1,000 runs: 1,000 completed" in ran.err


def test_failed_runs_have_error_lines_and_exit_code_3(shell: Shell) -> None:
    shell.items(10)
    ran = shell.map(task="picky")
    assert ran.code == 3
    assert shell.lines()[3] == {
        "index": 3,
        "ok": False,
        "error": {"type": "ValueError", "message": "no 3", "attempts": 1},
    }
    assert [line["ok"] for line in shell.lines()].count(False) == 2
    assert "2 failed" in ran.err
    assert "headrace run list --state failed" in ran.err


def test_results_go_to_standard_output_by_default(shell: Shell) -> None:
    shell.items(3)
    ran = shell("map", "tasks.py:double", "in.ndjson")
    assert [json.loads(line)["output"] for line in ran.out.splitlines()] == [0, 2, 4]


def test_a_task_s_delay_and_expiry_apply_to_a_map(shell: Shell) -> None:
    shell.write(
        "late.py",
        """
from headrace import Headrace

app = Headrace("late")


@app.task(delay_s=0.2, expires_s=3600)
async def late(item):
    return item
""",
    )
    shell.items(2)
    assert shell("map", "late.py:late", "in.ndjson", "-o", "out.ndjson").code == 0
    runs = shell("run", "list", "--json").json["runs"]
    shown = [shell("run", "show", listed["id"], "--json").json for listed in runs]
    assert [view["state"] for view in shown] == ["completed"] * 2
    for view in shown:
        due_at, expires_at = (datetime.fromisoformat(view[name]) for name in ("due_at", "expires_at"))
        assert expires_at - due_at > timedelta(seconds=3_599)


def test_the_summary_is_one_json_object(shell: Shell) -> None:
    shell.items(20)
    ran = shell.map("--json", task="picky")
    summary = ran.json
    assert ran.code == 3
    assert (summary["state"], summary["runs"], summary["completed"], summary["failed"]) == ("completed", 20, 16, 4)
    assert summary["resumed"] is False
    assert summary["output"] == "out.ndjson"
    assert len(summary["batches"]) == 1


def test_a_finished_map_runs_nothing_again(shell: Shell) -> None:
    shell.items(50)
    first = shell.map("--json").json
    before = (shell.place / "out.ndjson").read_bytes()
    again = shell.map("--json").json
    assert again["batches"] == first["batches"]
    assert (again["resumed"], again["done_before"]) == (True, 50)
    assert (shell.place / "out.ndjson").read_bytes() == before


def test_another_key_is_another_batch(shell: Shell) -> None:
    shell.items(5)
    first = shell.map("--json").json["batches"]
    second = shell.map("--json", "--batch-key", "second").json["batches"]
    assert first != second
    assert shell.map("--json", "--batch-key", "second").json["batches"] == second


def test_the_same_file_by_another_path_is_the_same_input(shell: Shell) -> None:
    shell.items(5)
    first = shell.map("--json").json["batches"]
    assert shell.map("--json", input_=str(shell.place / "in.ndjson")).json["batches"] == first


def test_a_map_resumes_after_its_input_has_grown(shell: Shell) -> None:
    shell.items(30)
    shell.map()
    for more in (45, 60):
        shell.items(more)
        ran = shell.map("--json")
        assert ran.code == 0
        assert [line["output"] for line in shell.lines()] == [2 * n for n in range(more)]
        assert [line["index"] for line in shell.lines()] == list(range(more))
    assert len(ran.json["batches"]) == 3
    assert (ran.json["runs"], ran.json["done_before"]) == (60, 45)
    again = shell.map("--json")
    assert (again.code, again.json["done_before"]) == (0, 60)


def test_an_input_of_more_items_than_a_batch_holds_is_several_batches(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_BATCH_RUNS_MAX", "300")
    shell.items(1_000)
    ran = shell.map("--json")
    assert (ran.code, ran.json["runs"], len(ran.json["batches"])) == (0, 1_000, 4)
    assert [line["index"] for line in shell.lines()] == list(range(1_000))
    assert shell.map("--json").json["done_before"] == 1_000


def test_a_changed_input_is_refused_without_fresh(shell: Shell) -> None:
    shell.items(30)
    shell.map()
    shell.write("in.ndjson", '{"n":7}\n' * 30)
    ran = shell.map()
    assert ran.code == 2
    assert "the input changed" in ran.err
    assert "--fresh to start over" in ran.err
    assert shell.map("--fresh").code == 0
    assert {line["output"] for line in shell.lines()} == {14}
    assert shell.map("--json").json["done_before"] == 30


def test_each_fresh_starts_over(shell: Shell) -> None:
    shell.items(5)
    seen = {shell.map("--json", *flags).json["batches"][0] for flags in ([], ["--fresh"], ["--fresh"], [])}
    assert len(seen) == 3


def test_a_fresh_start_works_after_the_old_batches_were_pruned(shell: Shell) -> None:
    shell.items(5)
    shell.map()
    shell("prune", "--retention-ms", "0")
    first = shell.map("--json").json
    assert first["done_before"] == 0
    second = shell.map("--json", "--fresh").json
    assert second["batches"] != first["batches"]
    assert shell.map("--json").json["batches"] == second["batches"]


def test_a_chain_whose_beginning_was_pruned_starts_over(shell: Shell) -> None:
    shell.items(5)
    first = shell.map("--json").json["batches"][0]
    shell.items(9)
    shell.map()
    import sqlite3

    with sqlite3.connect("headrace.db") as connection:
        connection.execute("UPDATE headrace_batch SET finished_us = 1 WHERE id = ?", (first,))
    connection.close()
    assert shell("prune", "--json").json["batches"] == 1
    assert shell.map("--json").json["done_before"] == 0
    assert [line["output"] for line in shell.lines()] == [2 * n for n in range(9)]


def test_a_cancelled_map_says_how_to_start_over(shell: Shell) -> None:
    shell.items(5)
    batch = shell.map("--json").json["batches"][0]
    import sqlite3

    with sqlite3.connect("headrace.db") as connection:
        connection.execute("UPDATE headrace_batch SET state = 'cancelled' WHERE id = ?", (batch,))
    connection.close()
    ran = shell.map()
    assert ran.code == 2
    assert "--fresh to start over" in ran.err


# -- the output


@pytest.mark.parametrize(
    "damage",
    [
        lambda right: b"",
        lambda right: right[: len(right) // 2],
        lambda right: right[: right.rfind(b"\n", 0, len(right) // 2) + 1],
        lambda right: right + b'{"index":1000',
        lambda right: right + b"more\nthan there should be\n",
        lambda right: b"something else entirely\n" * 100,
        lambda right: right[:500] + b"X" + right[501:],
        lambda right: right[:-1],
        lambda right: b"\n" * 10,
        lambda right: b"no newline at all",
    ],
)
def test_an_output_with_other_content_is_corrected(shell: Shell, damage: Callable[[bytes], bytes]) -> None:
    shell.items(200)
    shell.map()
    right = (shell.place / "out.ndjson").read_bytes()
    shell.write("out.ndjson", damage(right))
    assert shell.map().code == 0
    assert (shell.place / "out.ndjson").read_bytes() == right


@pytest.mark.parametrize("name", ["nowhere/out.ndjson", ".", "tasks.py/out"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(shell: Shell, name: str) -> None:
    shell.items(5)
    ran = shell("map", "tasks.py:double", "in.ndjson", "-o", name)
    assert ran.code == 2
    assert "can't be written" in ran.err
    assert not (shell.place / "headrace.db").exists()


def test_the_input_is_never_overwritten(shell: Shell) -> None:
    path = shell.items(5)
    before = path.read_bytes()
    ran = shell("map", "tasks.py:double", "in.ndjson", "-o", str(path))
    assert ran.code == 2
    assert "is the input" in ran.err
    assert path.read_bytes() == before


def test_an_output_on_a_full_disk_is_one_error_and_nothing_is_lost(shell: Shell) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this machine has no /dev/full")
    shell.items(5)
    ran = shell("map", "tasks.py:double", "in.ndjson", "-o", "/dev/full")
    assert ran.code == 1
    assert "No space left" in ran.err
    assert "repeat the command" in ran.err
    assert shell.map("--json").json["runs"] == 5


def test_large_results_are_fetched_into_the_output(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_INLINE_BYTES_MAX", "1000")
    shell.write("in.ndjson", '{"n":10}\n{"n":5000}\n{"n":999}\n{"n":998}\n')
    assert shell.map(task="large").code == 0
    assert [len(line["output"]) for line in shell.lines()] == [10, 5000, 999, 998]


# -- the input


def test_an_empty_input_is_an_empty_batch(shell: Shell) -> None:
    for name, data in (("empty", b""), ("blank", b"\n \r\n"), ("mark", b"\xef\xbb\xbf")):
        shell.write(name, data)
        ran = shell.map("--json", input_=name)
        assert (ran.code, ran.json["runs"]) == (0, 0)
        assert (shell.place / "out.ndjson").read_bytes() == b""


def test_bad_lines_fail_alone_with_their_reason_and_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_ITEM_BYTES_MAX", "1024")
    rows: list[tuple[bytes, str]] = [
        (b'{"n":1}', ""),
        (b"", ""),
        (b'{"n":2}\r', ""),
        (b'{"n":', "Invalid JSON at line 4"),
        (b'{"n":"\xff"}', "Invalid UTF-8 at line 5"),
        (b'{"n":NaN}', "Invalid JSON at line 6"),
        (b'"a\x00b"', "Invalid JSON at line 7"),
        (rb'"\ud800"', "half a surrogate pair"),
        (b'"' + b"x" * 2_000 + b'"', "expected at most 1,024 bytes"),
        (b"[" * 500 + b"]" * 500, ""),
        (b"9" * 100, ""),
        (b'{"n":1,"n":3}', ""),
        (b'{"n":4}', ""),
    ]
    shell.write("in.ndjson", b"\xef\xbb\xbf" + b"\n".join(line for line, _ in rows))
    ran = shell.map(task="echo")
    assert ran.code == 3
    lines = shell.lines()
    expected = [why for line, why in rows if line.strip()]
    assert len(lines) == len(expected)
    for index, (line, why) in enumerate(zip(lines, expected, strict=True)):
        assert line["index"] == index
        if why:
            assert why in line["error"]["message"]
            assert line["error"]["attempts"] == 0
    assert lines[9]["output"] == int("9" * 100)
    assert lines[10]["output"] == {"n": 3}
    assert lines[11]["output"] == {"n": 4}


def test_items_that_do_not_fit_the_task_fail_alone(shell: Shell) -> None:
    shell.write("in.ndjson", '{"a":1}\n{"a":"x"}\n[1,2]\n{"b":1}\n{"a":1,"c":2}\n5\n{"a":2,"b":3}\n')
    assert shell.map(task="add").code == 3
    assert [line.get("output") for line in shell.lines()] == [11, None, 3, None, None, None, 5]
    assert "$.a" in shell.lines()[1]["error"]["message"]


def packed_gzip(data: bytes) -> bytes:
    return gzip.compress(data[:500]) + gzip.compress(data[500:])


def packed_zstandard(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return compressor.compress(data[:500]) + compressor.compress(data[500:])


@pytest.mark.parametrize(("suffix", "packed"), [(".gz", packed_gzip), (".zst", packed_zstandard)])
def test_compressed_inputs_are_read_and_corrupt_ones_reported(
    shell: Shell, suffix: str, packed: Callable[[bytes], bytes]
) -> None:
    data = "".join(f'{{"n":{n}}}\n' for n in range(5_000)).encode()
    name = f"in.ndjson{suffix}"
    whole = packed(data)
    shell.write(name, whole[: len(whole) * 2 // 3])
    ran = shell.map(input_=name)
    assert ran.code == 2
    assert "can't be decompressed: it is truncated" in ran.err
    shell.write(name, whole)
    assert shell.map(input_=name).code == 0
    assert [line["output"] for line in shell.lines()] == [2 * n for n in range(5_000)]
    shell.write(f"bad{suffix}", b"this is no archive\n")
    ran = shell.map(input_=f"bad{suffix}")
    assert ran.code == 2
    assert "can't be decompressed" in ran.err
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 255
    shell.write(f"hurt{suffix}", bytes(damaged))
    assert shell.map(input_=f"hurt{suffix}").code == 2


@pytest.mark.parametrize(("name", "why"), [("nowhere.ndjson", "No such file"), (".", "Is a directory")])
def test_an_input_that_cannot_be_read_is_refused(shell: Shell, name: str, why: str) -> None:
    ran = shell("map", "tasks.py:double", name)
    assert ran.code == 2
    assert why in ran.err
    assert not (shell.place / "headrace.db").exists()


def headrace(shell: Shell, *arguments: str, stdin: bytes = b"", **environ: str) -> subprocess.CompletedProcess[bytes]:
    """Start the command as a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        cwd=shell.place,
        env={**{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}, **environ},
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_an_empty_device_is_an_empty_input(shell: Shell) -> None:
    for source, stdin in (("/dev/null", subprocess.PIPE), ("-", subprocess.DEVNULL)):
        ran = subprocess.run(
            [sys.executable, "-m", "headrace", "map", "tasks.py:double", source],
            cwd=shell.place,
            stdin=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (ran.returncode, ran.stdout) == (0, b""), ran.stderr
        assert b"Traceback" not in ran.stderr


def test_a_map_of_standard_input_says_that_resuming_requires_a_key(shell: Shell) -> None:
    ran = headrace(shell, "map", "tasks.py:double", "-", stdin=b'{"n":1}\n{"n":2}')
    assert ran.returncode == 0
    assert ran.stdout == b'{"index":0,"ok":true,"output":2}\n{"index":1,"ok":true,"output":4}\n'
    assert ran.stderr.splitlines()[0] == b"reading standard input, which can be resumed only with --batch-key KEY"


def test_standard_input_with_a_key_resumes(shell: Shell) -> None:
    command = ("map", "tasks.py:double", "-", "--batch-key", "k", "--json", "-o", "out.ndjson")
    first = json.loads(headrace(shell, *command, stdin=b'{"n":1}\n').stdout)
    again = json.loads(headrace(shell, *command, stdin=b'{"n":1}\n').stdout)
    assert (again["batches"], again["done_before"]) == (first["batches"], 1)
    more = json.loads(headrace(shell, *command, stdin=b'{"n":1}\n{"n":5}\n').stdout)
    assert (more["runs"], more["done_before"]) == (2, 1)
    changed = headrace(shell, *command, stdin=b'{"n":2}\n')
    assert changed.returncode == 2
    assert b"--fresh" in changed.stderr


def test_a_map_is_interrupted_when_the_reader_of_its_output_goes_away(shell: Shell) -> None:
    shell.items(50_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "map", "tasks.py:double", "in.ndjson"],
        cwd=shell.place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b'{"index":0,"ok":true,"output":0}\n'
    process.stdout.close()
    stderr = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 130, stderr
    assert "To resume" in stderr
    assert "Traceback" not in stderr
    assert shell.map("--json").json["runs"] == 50_000


def test_two_concurrent_maps_of_one_batch_both_complete(shell: Shell) -> None:
    shell.items(20_000)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "headrace", "map", "tasks.py:double", "in.ndjson", "-o", name, "--json"],
            cwd=shell.place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in ("one.ndjson", "two.ndjson", "two.ndjson")
    ]
    summaries: list[Any] = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()
        summaries.append(json.loads(out))
    assert len({tuple(summary["batches"]) for summary in summaries}) == 1
    right = b"".join(b'{"index":%d,"ok":true,"output":%d}\n' % (n, 2 * n) for n in range(20_000))
    assert (shell.place / "one.ndjson").read_bytes() == right
    assert (shell.place / "two.ndjson").read_bytes() == right
    assert shell("verify").code == 0


def test_two_concurrent_maps_of_a_growing_input_both_complete(shell: Shell) -> None:
    """Two maps of one input: each may seal a batch that the other still feeds, or find the next batch created."""
    command = [sys.executable, "-m", "headrace", "map", "tasks.py:double", "in.ndjson"]
    count = 0
    running: list[subprocess.Popen[bytes]] = []
    for number in range(8):
        count += 2_000
        shell.items(count, "longer").replace("in.ndjson")  # replaced as a whole, so that no reader sees half a line
        running.append(
            subprocess.Popen([*command, "-o", f"{number % 2}.ndjson"], cwd=shell.place, stderr=subprocess.PIPE)
        )
        if len(running) == 3:
            first = running.pop(0)
            _, err = first.communicate(timeout=60)
            assert first.returncode == 0, err.decode()
    for process in running:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()
    assert shell.map("--json").json["completed"] == count
    assert [line["output"] for line in shell.lines()] == [2 * n for n in range(count)]
    assert shell("verify").code == 0


# -- the task, the store, the rest


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("nowhere.py:f", "is missing"),
        ("nowhere:f", "no module is named 'nowhere'"),
        ("tasks.py:nothing", "tasks.py has no 'nothing'"),
        ("tasks.py", "expected MODULE:TASK or path/to/file.py:TASK, got"),
        ("tasks.py:app", "expected a task at"),
        ("broken.py:f", "ZeroDivisionError: division by zero (line 1 of"),
    ],
)
def test_a_missing_task_is_one_clear_error(shell: Shell, target: str, why: str) -> None:
    shell.items(3)
    shell.write("broken.py", "1 / 0\n")
    ran = shell("map", target, "in.ndjson")
    assert ran.code == 2
    assert why in ran.err
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err


def test_a_plain_function_is_a_task_too(shell: Shell) -> None:
    shell.items(3)
    assert shell.map(task="plain").code == 0
    assert [line["output"] for line in shell.lines()] == [[{"n": n}] for n in range(3)]


def test_child_processes_run_the_task(shell: Shell) -> None:
    shell.items(200)
    shell.write("apart.py", "import os\n\n\ndef work(item):\n    return os.getpid()\n")
    ran = shell("map", "apart.py:work", "in.ndjson", "-o", "out.ndjson", "--processes", "2")
    assert ran.code == 0, ran.err
    assert os.getpid() not in {line["output"] for line in shell.lines()}


def test_a_file_that_is_not_a_database_is_one_clear_error(shell: Shell) -> None:
    shell.items(3)
    shell.write("headrace.db", b"this is a letter to my grandmother, not a database " * 100)
    ran = shell.map()
    assert ran.code == 1
    assert "not an SQLite database" in ran.err
    assert "hint: " in ran.err


def test_a_database_of_a_newer_version_is_refused(shell: Shell) -> None:
    import sqlite3

    shell.items(3)
    shell("migrate")
    with sqlite3.connect("headrace.db") as connection:
        connection.execute("UPDATE headrace_version SET number = 999")
    connection.close()
    ran = shell.map()
    assert ran.code == 1
    assert "got 999 in headrace.db" in ran.err
    assert "upgrade" in ran.err


def test_a_database_in_a_missing_directory_is_refused(shell: Shell) -> None:
    shell.items(3)
    ran = shell.map("--store", "sqlite:///nowhere/x.db")
    assert ran.code == 1
    assert "nowhere" in ran.err


@pytest.mark.parametrize("store", ["mysql://x/y", "sqlite://", "what", "sqlite:///"])
def test_an_unknown_kind_of_store_is_refused(shell: Shell, store: str) -> None:
    shell.items(3)
    assert shell.map("--store", store).code == 2


@pytest.mark.parametrize(
    "flags",
    [("--concurrency", "0"), ("--concurrency", "many"), ("--processes", "-1"), ("--batch-key", "x" * 300), ("--what",)],
)
def test_a_flag_out_of_its_bounds_is_bad_usage(shell: Shell, flags: tuple[str, ...]) -> None:
    shell.items(3)
    ran = shell.map(*flags)
    assert ran.code == 2
    assert not (shell.place / "headrace.db").exists()


def test_a_traceback_is_shown_at_log_level_debug(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = shell("map", "nowhere:f", "in.ndjson")
    assert "Traceback" not in ran.err
    monkeypatch.setenv("HEADRACE_LOG_LEVEL", "debug")
    assert "Traceback" in shell("map", "nowhere:f", "in.ndjson").err


def test_a_map_works_on_a_store_in_memory(shell: Shell) -> None:
    shell.items(30)
    assert shell.map("--store", "memory://", "--json").json["completed"] == 30


def test_a_zstandard_stream_that_was_written_in_blocks_is_read(shell: Shell) -> None:
    packed = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(packed, closefd=False) as writer:
        for n in range(1_000):
            writer.write(b'{"n":%d}\n' % n)
            if n % 100 == 0:
                writer.flush()
    shell.write("in.ndjson.zst", packed.getvalue())
    assert shell.map("--json", input_="in.ndjson.zst").json["runs"] == 1_000


@pytest.mark.parametrize("pool", ["auto", "process"])
def test_output_printed_by_a_task_does_not_mix_with_results(shell: Shell, pool: str) -> None:
    (shell.place / "noisy.py").write_text(
        f"""
from headrace import Headrace
app = Headrace("noisy")
@app.task(pool={pool!r})
def loud(item: int) -> int:
    print("this is not a result", flush=True)
    return item
""",
        encoding="utf-8",
    )
    (shell.place / "in.ndjson").write_text("1\n2\n", encoding="utf-8")
    ran = shell("map", "noisy.py:loud", "in.ndjson")
    assert ran.out == '{"index":0,"ok":true,"output":1}\n{"index":1,"ok":true,"output":2}\n'
    assert ran.err.count("this is not a result") == 2
