"""The task, app or indexer that a command line names is loaded, or one clear error says what is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.cli.invocation.target_loader import load_target
from headrace.foundation import logs
from headrace.foundation.errors import InvalidInput
from headrace.runtime.tasks.task_spec import TaskSpec


@pytest.fixture(autouse=True)
def clean_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the modules and paths that a test has imported, and the configuration of logs."""
    modules_before = dict(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    logs.reset()
    for name in set(sys.modules) - set(modules_before):
        del sys.modules[name]


APP = """
from headrace.runtime.tasks.task_spec import TaskSpec


class Task:
    spec = TaskSpec("f", lambda x: x)


thing = Task()
"""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_plain_function_of_a_file_is_found(tmp_path: Path) -> None:
    place = write(tmp_path / "some_tasks.py", "def double(x):\n    return 2 * x\n")
    loaded = load_target(f"{place}:double")
    assert loaded.handle is None
    assert loaded.function(4) == 8
    assert load_target(f"{place}:double").function is loaded.function


def test_modules_beside_a_file_can_be_imported(tmp_path: Path) -> None:
    write(tmp_path / "beside_it.py", "FACTOR = 3\n")
    place = write(tmp_path / "triple_tasks.py", "from beside_it import FACTOR\ndef triple(x):\n    return FACTOR * x\n")
    assert load_target(f"{place}:triple").function(2) == 6


def test_a_task_of_an_app_is_found_with_its_handle(tmp_path: Path) -> None:
    text = APP
    loaded = load_target(write(tmp_path / "app_tasks.py", text) + ":thing")
    assert isinstance(loaded.handle.spec, TaskSpec)


@pytest.mark.parametrize("name", ["json.py", "not-a-name.py", "tasks.v2.py"])
def test_a_file_with_a_name_that_is_no_identifier_is_loaded(tmp_path: Path, name: str) -> None:
    assert load_target(write(tmp_path / name, "def f(x): return x\n") + ":f").function(1) == 1


def test_a_module_on_the_path_is_found_by_its_name() -> None:
    assert load_target("json:dumps").function([1]) == "[1]"
    assert load_target("os.path:basename").function("a/b") == "b"


@pytest.mark.parametrize(
    ("target", "message", "hint"),
    [
        ("tasks.py", "expected MODULE:TASK or path/to/file.py:TASK, got", ""),
        (":f", "expected MODULE:TASK or path/to/file.py:TASK, got", ""),
        ("tasks.py:", "expected MODULE:TASK or path/to/file.py:TASK, got", ""),
        ("nowhere/at_all.py:f", "is missing", "name a Python file"),
        ("nowhere.at.all:f", "no module is named 'nowhere.at.all'", "installed"),
        ("json.nothing:f", "no module is named", "installed"),
        ("json:nothing", "json has no 'nothing'", "its functions: "),
        ("json:decoder", "expected a task at json:decoder, got a module", "name a function"),
        ("json:JSONDecoder", "expected a task at json:JSONDecoder, got a class", "name a function"),
        ("json:__all__", "expected a task at json:__all__, got a list", "name a function"),
    ],
)
def test_an_invalid_target_is_explained(target: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        load_target(target)
    assert message in raised.value.message
    assert hint in raised.value.hint


def test_the_hint_for_a_module_names_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "lies_here.txt", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match="is a directory"):
        load_target(f"{tmp_path}/:f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all' (line 1 of"),
        ("x = 1\nraise RuntimeError('no license')\n", "RuntimeError: no license (line 2 of"),
        ("import sys\nsys.exit('usage')\n", "SystemExit: usage (line 2 of"),
        ("def f(:\n", "is not valid Python: "),
    ],
)
@pytest.mark.parametrize("by", ["file", "name"])
def test_a_module_that_fails_to_import_shows_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str, by: str
) -> None:
    place = write(tmp_path / "broken_tasks.py", text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput) as raised:
        load_target(f"{place if by == 'file' else 'broken_tasks'}:f")
    assert message in raised.value.message
    assert "broken_tasks.py" in raised.value.message


def test_tasks_of_a_module_are_named_where_one_is_missing(tmp_path: Path) -> None:
    text = APP
    with pytest.raises(InvalidInput) as raised:
        load_target(write(tmp_path / "some_app.py", text) + ":f2")
    assert raised.value.hint == "its tasks: thing"
