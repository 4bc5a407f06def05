"""README and documents: every Python block runs, every command line exists, every link leads somewhere."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
import typer.main

from headrace.cli.main import app as command_line
from tests.support.postgres_server import server

ROOT: Final = Path(__file__).parents[1]
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES: Final = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
KEY: Final = "a key of the documents' own"


def blocks(language: str, page: str = "README.md") -> list[str]:
    """Return the fenced blocks of one language in a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


PYTHON: Final = [(page, number) for page in PAGES for number in range(len(blocks("python", page)))]


# -- the README's commands


def test_the_readme_gives_two_commands_of_one_line() -> None:
    commands = blocks("sh")
    assert len(commands) == 2
    assert all(command.count("\n") == 1 for command in commands)
    assert "headrace demo" in commands[0]
    assert "pytest" in commands[1]


def test_ci_runs_the_readme_s_two_commands_and_no_others() -> None:
    bash = shutil.which("bash")
    assert bash, "CI is a bash script"
    printed = subprocess.run(
        [bash, str(ROOT / ".ci" / "run"), "--print-commands"],
        capture_output=True,
        check=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
    assert printed.stdout == "".join(blocks("sh"))
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r'^suite "README: \w+" \d+ "(.*)"$', script, re.MULTILINE) == ["$first", "$second"]
    assert "headrace demo" not in script
    assert "pytest -q" not in script


# -- Python


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without settings of Headrace, and `more`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")} | more


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve the README's app over HTTP; yields the URL."""
    (folder / "tasks.py").write_text(blocks("python")[0], encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", "tasks.py:app", "--port", "0"],
        cwd=folder,
        env=environment(HEADRACE_API_KEY=KEY),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving" in line)
        yield re.findall(r"http://\S+?(?=,)", line)[0]
    finally:
        process.terminate()
        process.communicate(timeout=30)


async def new_database(folder: Path) -> str:
    """Create a database for one example, so that tables of other tests don't exist in it. Returns its DSN."""
    name = f"shown_{hashlib.sha256(str(folder).encode()).hexdigest()[:24]}"
    connection = await asyncpg.connect(server().dsn)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return server().dsn.removesuffix("postgres") + name


@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_the_python_that_is_shown_runs_nothing_when_it_is_imported(page: str, number: int) -> None:
    assert re.findall(r"^(?:asyncio\.run|main)\(.*$", blocks("python", page)[number], re.MULTILINE) == []


@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_the_python_that_is_shown_runs(page: str, number: int, tmp_path: Path) -> None:
    code = blocks("python", page)[number]
    script = tmp_path / "shown.py"
    script.write_text(code, encoding="utf-8")
    settings = {"RESIZE_SECRET": "a secret of the example's own"}
    if "DATABASE_URL" in code:
        settings["DATABASE_URL"] = asyncio.run(new_database(tmp_path))

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            capture_output=True,
            check=False,
            cwd=tmp_path,
            encoding="utf-8",
            env=environment(**settings, **more),
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    if "HEADRACE_URL" in code:
        with serving(tmp_path) as url:
            done = run(HEADRACE_URL=url, HEADRACE_API_KEY=KEY)
    else:
        done = run()
    assert done.returncode == 0, done.stderr
    if (page, number) == ("README.md", 0):
        assert done.stdout.splitlines() == [f"{n} {n}" for n in range(1_000)]
    if (page, number) == ("docs/transactions.md", 0):
        assert done.stdout == "order 7 shipped\n"


def test_every_page_with_code_is_known() -> None:
    assert {page for page, _ in PYTHON} >= {
        "README.md",
        "docs/endpoints.md",
        "docs/http.md",
        "docs/indexer.md",
        "docs/schedules.md",
        "docs/testing.md",
        "docs/transactions.md",
    }


def test_the_quick_start_runs_as_copied_and_its_import_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(blocks("python")[0], encoding="utf-8")
    imported = subprocess.run([sys.executable, "-c", "import tasks"], cwd=tmp_path, capture_output=True, check=True)
    assert imported.stdout == b""
    assert list(tmp_path.glob("headrace.db*")) == []
    (tmp_path / "items.ndjson").write_text('{"title": "a", "text": "one two"}\n{"title": "b", "text": "x"}\n')
    (line,) = [line for line in blocks("console")[0].splitlines() if "headrace map" in line]
    command = [sys.executable, "-m", *shlex.split(line.removeprefix("$ "))]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, env=environment(), timeout=60)
    results = (tmp_path / "results.ndjson").read_text().splitlines()
    assert results == ['{"index":0,"ok":true,"output":2}', '{"index":1,"ok":true,"output":1}']


# -- command lines


def command_lines() -> list[tuple[str, str]]:
    """Return every line of a console block that runs `headrace`, with its page."""
    return [
        (page, line.removeprefix("$ "))
        for page in PAGES
        for block in blocks("console", page)
        for line in block.splitlines()
        if line.startswith("$ headrace ")
    ]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_a_command_line_that_is_shown_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    command: Any = typer.main.get_command(command_line)
    parent = None
    while hasattr(command, "commands"):
        parent = command.context_class(command, info_name=command.name, parent=parent)
        command = command.commands[words.pop(0) if words[0] in command.commands else "run"]
    command.make_context(command.name, words, parent=parent)


# -- links


@pytest.mark.parametrize("page", [*PAGES, "ARCHITECTURE.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_document_is_linked_from_the_readme() -> None:
    assert [page for page in PAGES if page.startswith("docs/") and f"({page})" not in README] == []


def test_make_help_lists_at_most_eight_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", makefile, re.MULTILINE)
    assert 0 < len(targets) <= 8
    assert targets == re.findall(r"^([a-z]+): +## \S", makefile, re.MULTILINE), "each says what it is for"
