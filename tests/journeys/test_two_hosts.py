"""Two hosts share one PostgreSQL and nothing else: payloads and results of any size reach the other one.

A host is a working directory with a home, a temporary directory and a runtime directory of its own. The worker's
home does not exist, and no object store is configured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support.store_rig import fresh_schema

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

SIZES: Final = (1_000, 600_000, 20_000_000)
JOBS: Final = """
from headrace import Headrace

app = Headrace("two-hosts")


@app.task
async def shout(text: str) -> str:
    return text.upper()


@app.task
def repeat(text: str, times: int) -> str:
    return text * times


@app.task(pool="process")
def count(text: str) -> int:
    return len(text)
"""
PRODUCE: Final = """
import asyncio, json
from jobs import app, count, repeat, shout

SIZES = (1_000, 600_000, 20_000_000)


async def main():
    async with app:
        shouted = [await shout.enqueue("a" * size) for size in SIZES]
        repeated = [await repeat.enqueue("ab", size // 2) for size in SIZES]
        counted = [await count.enqueue("é" * (size // 2)) for size in SIZES]
        print(json.dumps({
            "shouted": [(await run.result(timeout_s=120) == "A" * size) for run, size in zip(shouted, SIZES)],
            "repeated": [(await run.result(timeout_s=120) == "ab" * (size // 2)) for run, size in zip(repeated, SIZES)],
            "counted": [await run.result(timeout_s=120) for run in counted],
        }))


asyncio.run(main())
"""


def host(folder: Path, name: str, store: str, *, has_home: bool) -> tuple[Path, dict[str, str]]:
    """Make a host. Returns its working directory and its environment."""
    root = folder / name
    for part in ("work", "tmp", "run", *(["home"] if has_home else [])):
        (root / part).mkdir(parents=True)
    (root / "work" / "jobs.py").write_text(JOBS)
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "PYTHONPATH", "LANG")}
    return root / "work", kept | {
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
        "XDG_RUNTIME_DIR": str(root / "run"),
        "HEADRACE_STORE": store,
        "HEADRACE_ITEM_BYTES_MAX": str(32 << 20),
    }


def headrace(place: Path, environ: dict[str, str], *words: str, text: str | None = None) -> str:
    """Run a command to its end, and return its output."""
    ran = subprocess.run(
        [sys.executable, "-m", "headrace", *words],
        cwd=place, env=environ, input=text, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_payloads_and_results_of_any_size_reach_the_other_host_without_an_object_store(tmp_path: Path) -> None:
    store = fresh_schema(tmp_path)
    producer, producer_environ = host(tmp_path, "producer", store, has_home=True)
    worker, worker_environ = host(tmp_path, "worker", store, has_home=False)
    headrace(producer, producer_environ, "migrate")
    command = [sys.executable, "-m", "headrace", "worker", "jobs.py:app"]
    with subprocess.Popen(command, cwd=worker, env=worker_environ, stderr=subprocess.DEVNULL) as process:
        try:
            produced = subprocess.run(
                [sys.executable, "-c", PRODUCE],
                cwd=producer, env=producer_environ, capture_output=True, text=True, check=False, timeout=240,
            )  # fmt: skip
            assert produced.returncode == 0, produced.stderr
            assert json.loads(produced.stdout) == {
                "shouted": [True] * len(SIZES),
                "repeated": [True] * len(SIZES),
                "counted": [size // 2 for size in SIZES],
            }
        finally:
            process.terminate()
    lines = "".join(json.dumps("b" * size) + "\n" for size in SIZES)
    words = ("map", "jobs.py:shout", "-", "--batch-key", "lines", "-o", "out.ndjson", "--json")
    (batch_id,) = json.loads(headrace(worker, worker_environ, *words, text=lines))["batches"]
    written = (worker / "out.ndjson").read_text().splitlines()
    assert [json.loads(line)["output"] for line in written] == ["B" * size for size in SIZES]
    read = headrace(producer, producer_environ, "batch", "results", batch_id)
    assert [len(json.loads(line)["output"]) for line in read.splitlines()] == list(SIZES)
    for place in (producer, worker):
        left = {path.name for path in place.iterdir()} - {"__pycache__", "out.ndjson"}
        assert left == {"jobs.py"}, "nothing is stored beside a process"
    assert "read it in another process" in headrace(producer, producer_environ, "doctor")
    headrace(producer, producer_environ, "prune", "--retention-ms", "0")
