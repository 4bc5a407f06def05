"""A directory with tasks and items, and commands run in this process as the shell would run them."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from headrace.cli.invocation import printing
from headrace.cli.main import run
from headrace.foundation import logs

TASKS = """
import os

from headrace.app import Headrace

app = Headrace("tests")


@app.task
async def double(item):
    return 2 * item["n"]


@app.task(name="sums")
async def add(a: int, b: int = 10) -> int:
    return a + b


@app.task
async def picky(item):
    if item["n"] % 5 == 3:
        raise ValueError(f"no {item['n']}")
    return item["n"]


@app.task
async def echo(item):
    return item


@app.task
async def large(item):
    return "x" * item["n"]


@app.task(queue="slow")
async def queued(item):
    return item


def plain(item):
    return [item]
"""


class Ran(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return the one JSON object on standard output."""
        return json.loads(self.out)


class Shell:
    """A working directory in which commands run."""

    def __init__(self, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.place = place
        self._capfd = capfd

    def __call__(self, *arguments: str) -> Ran:
        self._capfd.readouterr()
        code = run(list(arguments))
        out, err = self._capfd.readouterr()
        return Ran(code, out, err)

    def write(self, name: str, data: str | bytes) -> Path:
        path = self.place / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def items(self, count: int, name: str = "in.ndjson") -> Path:
        return self.write(name, "".join(f'{{"n":{n}}}\n' for n in range(count)))

    def lines(self, name: str = "out.ndjson") -> list[Any]:
        return [json.loads(line) for line in (self.place / name).read_text().splitlines()]

    def map(self, *arguments: str, task: str = "double", input_: str = "in.ndjson") -> Ran:
        return self("map", f"tasks.py:{task}", input_, "-o", "out.ndjson", *arguments)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    """Provide a fresh directory with `tasks.py`; modules, settings and logs of a test are removed after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(name)
    (tmp_path / "tasks.py").write_text(TASKS)
    modules_before = set(sys.modules)
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    yield Shell(tmp_path, capfd)
    sys.setswitchinterval(interval)
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    logs.reset()
    printing.notes_are_logged(are_logged=False)
    for name in set(sys.modules) - modules_before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)):
            del sys.modules[name]
