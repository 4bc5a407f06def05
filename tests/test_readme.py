"""The README keeps its word: CI runs its two commands, its Python is Python, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")


TESTING: Final = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
INDEXER: Final = (ROOT / "docs" / "indexer.md").read_text(encoding="utf-8")
ENDPOINTS: Final = (ROOT / "docs" / "endpoints.md").read_text(encoding="utf-8")
PAGES: Final = {"README": README, "testing": TESTING, "indexer": INDEXER, "endpoints": ENDPOINTS}


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize(
    ("page", "number"), [("README", 0), ("README", 1), ("testing", 0), ("indexer", 0), ("endpoints", 0)]
)
def test_the_python_that_is_shown_runs(page: str, number: int, tmp_path: Path) -> None:
    code = blocks("python", PAGES[page])[number]
    script = tmp_path / "shown.py"
    script.write_text(code, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    environment["RESIZE_SECRET"] = "a secret of the example's own"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        encoding="utf-8",
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    if (page, number) == ("README", 0):
        assert done.stdout.splitlines() == [f"{n} {n}" for n in range(1_000)]


def test_every_block_of_python_that_is_shown_is_run() -> None:
    assert [len(blocks("python", page)) for page in PAGES.values()] == [2, 1, 1, 1]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_help_lists_at_most_eight_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", makefile, re.MULTILINE)
    assert 0 < len(targets) <= 8
    assert targets == re.findall(r"^([a-z]+): +## \S", makefile, re.MULTILINE), "each says what it is for"
