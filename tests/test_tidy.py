"""The shape of the code itself, as a test.

Each rule is a function from a parsed file to the faults in it, and stands in `RULES` beside a piece of code
that must be caught: a rule that catches nothing is no rule.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).parents[1]
FILE_LINES_MAX: Final = 600
FUNCTION_LINES_MAX: Final = 70
EMPTY_NAMES: Final = re.compile(r"(?:.*_)?(?:util|helper|common|manager|base)s?")
UNSAFE_MODULES: Final = {"pickle", "shelve", "marshal", "dill", "cloudpickle"}
UNSAFE_CALLS: Final = {"eval", "exec"}

# Written so that this file does not hold what it looks for.
IGNORE: Final = re.compile(r"#\s*type:\s*[i]gnore(?:\[[^\]]*\])?(?P<rest>.*)")
OPEN_END: Final = re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b(?!\([a-z][\w.-]*\))")
MACHINE_PATH: Final = re.compile(r"(?<![\w.~$}*])/(?:wor[k]|roo[t]|hom[e]/\w+|User[s]/\w+|tm[p]/(?!\*))/?")
REGISTRY_HOST: Final = re.compile(
    r"pyp[i]\.org|pythonhoste[d]\.org|registry\.npmj[s]|npmj[s]\.com|crate[s]\.io|proxy\.golan[g]|deb\.debia[n]"
)


class File(NamedTuple):
    """One source file, read and parsed once."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        """The file's lines, the first at 0."""
        return self.text.splitlines()


Faults = Iterator[tuple[int, str]]


class Rule(NamedTuple):
    """One rule: where it holds, and code that breaks it."""

    holds_in: Callable[[Path], bool]
    faults: Callable[[File], Faults]
    broken_by: str
    broken_at: str = "src/headrace/core/run.py"


def in_src(path: Path) -> bool:
    """Whether the product itself is meant."""
    return path.parts[0] == "src"


def in_src_outside_cli(path: Path) -> bool:
    """Where nobody reads standard output."""
    return in_src(path) and "cli" not in path.parts


def in_tests(path: Path) -> bool:
    """Whether a test or what serves one is meant."""
    return path.parts[0] == "tests"


def anywhere(path: Path) -> bool:
    """Every Python file that is kept."""
    return path.suffix == ".py"


def long_files(file: File) -> Faults:
    """A file over the bound wants a second room."""
    if len(file.lines) > FILE_LINES_MAX:
        yield len(file.lines), f"{len(file.lines)} lines, more than {FILE_LINES_MAX}"


def long_functions(file: File) -> Faults:
    """A function that no longer fits on a screen."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines_count = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines_count > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name} has {lines_count} lines, more than {FUNCTION_LINES_MAX}"


def empty_names(file: File) -> Faults:
    """A module's name says what is in it."""
    names = [file.path.stem if file.path.name != "__init__.py" else file.path.parent.name]
    for name in names:
        if EMPTY_NAMES.fullmatch(name):
            yield 1, f"a module called {name} says nothing about what is in it"


def unexplained_ignores(file: File) -> Faults:
    """A silenced type error says why."""
    for number, line in enumerate(file.lines, 1):
        found = IGNORE.search(line)
        if found and not re.match(r"\s*#\s*\S.{7,}", found["rest"]):
            yield number, "a silenced type error without a reason after it"


def unowned_notes(file: File) -> Faults:
    """What is left to do belongs to someone."""
    for number, line in enumerate(file.lines, 1):
        if OPEN_END.search(line):
            yield number, "something left open without an owner in brackets"


def sleeps(file: File) -> Faults:
    """Tests wait for signals, and hold their own clock."""
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "time.sleep":
            yield node.lineno, "sleeps; wait for a signal"
        elif name in {"asyncio.sleep", "sleep"} and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and argument.value:
                yield node.lineno, "sleeps by the clock on the wall; wait for a signal"


def silent_skips(file: File) -> Faults:
    """A skipped test says what was missing."""
    called: set[ast.expr] = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call):
            called.add(node.func)
            name = ast.unparse(node.func)
            reasons = [keyword.value for keyword in node.keywords if keyword.arg in {"reason", "msg"}]
            if name in {"pytest.mark.skip", "pytest.skip"}:
                reasons += node.args
            elif name != "pytest.mark.skipif":
                continue
            if not reasons or any(isinstance(said, ast.Constant) and not said.value for said in reasons):
                yield node.lineno, "skips without a reason"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and node not in called and ast.unparse(node) == "pytest.mark.skip":
            yield node.lineno, "skips without a reason"


def prints(file: File) -> Faults:
    """A library does not write to its user's standard output."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "prints; return it, log it, or move it to cli"


def unsafe_code(file: File) -> Faults:
    """Stored bytes never become code."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            yield node.lineno, f"calls {ast.unparse(node.func)}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported = [alias.name for alias in node.names]
            for module in [node.module or ""] if isinstance(node, ast.ImportFrom) else imported:
                if module.partition(".")[0] in UNSAFE_MODULES:
                    yield node.lineno, f"imports {module}"


def missing_docstrings(file: File) -> Faults:
    """Modules, public classes and functions, and every verb of a Protocol say what they are for."""
    if not ast.get_docstring(file.tree):
        yield 1, "the module has no docstring"
    for node in file.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _undocumented(node, node.name)
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases):
            for verb in node.body:
                if isinstance(verb, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _undocumented(verb, f"{node.name}.{verb.name}")


def _undocumented(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> Faults:
    overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
    if not node.name.startswith("_") and not overload and not ast.get_docstring(node):
        yield node.lineno, f"{name} has no docstring"


DOC: Final = '"""What it is for."""\n'
RULES: Final = [
    Rule(in_src, long_files, DOC + "\n" * FILE_LINES_MAX),
    Rule(in_src, long_functions, f"def long():\n{'    pass' + chr(10)}" + "    pass\n" * FUNCTION_LINES_MAX),
    Rule(in_src, empty_names, "", "src/headrace/core/helpers.py"),
    Rule(in_src, empty_names, "", "src/headrace/run_utils.py"),
    Rule(in_src, empty_names, "", "src/headrace/common/__init__.py"),
    Rule(in_src, unexplained_ignores, "x = 1  # type: " + "ignore[assignment]\n"),
    Rule(in_src, unexplained_ignores, "x = 1  # type: " + "ignore  # why\n"),
    Rule(anywhere, unowned_notes, "# TO" + "DO: later\n"),
    Rule(anywhere, unowned_notes, "x = 1  # FIX" + "ME\n"),
    Rule(in_tests, sleeps, "time.sleep(0)\n", "tests/test_x.py"),
    Rule(in_tests, sleeps, "async def f():\n    await asyncio.sleep(0.1)\n", "tests/test_x.py"),
    Rule(in_tests, silent_skips, "@pytest.mark.skip\ndef test_x(): pass\n", "tests/test_x.py"),
    Rule(in_tests, silent_skips, "@pytest.mark.skipif(True)\ndef test_x(): pass\n", "tests/test_x.py"),
    Rule(in_tests, silent_skips, "def test_x(): pytest.skip('')\n", "tests/test_x.py"),
    Rule(in_src_outside_cli, prints, "print(1)\n"),
    Rule(in_src, unsafe_code, "import pickle\n"),
    Rule(in_src, unsafe_code, "def f():\n    from marshal import loads\n"),
    Rule(in_src, unsafe_code, "eval('1')\n"),
    Rule(in_src, missing_docstrings, "x = 1\n"),
    Rule(in_src, missing_docstrings, DOC + "class X: ...\n"),
    Rule(in_src, missing_docstrings, DOC + "async def x(): ...\n"),
    Rule(in_src, missing_docstrings, f"{DOC}class X(Protocol):\n    {DOC}    def verb(self): ...\n"),
]
FINE: Final = (
    DOC
    + "x = 1  # type: "
    + "ignore[misc]  # the library's stubs say otherwise\n# TO"
    + "DO(ada): later\nasync def _f(): await asyncio.sleep(0)\n"
)


def kept_files() -> list[Path]:
    """What is in the repository; without git, what would be, so that nothing is skipped."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, encoding="utf-8")
        if listed.returncode == 0:
            return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    tops = [ROOT / name for name in ("src", "tests", "bench", "examples", "docs", ".ci")]
    found = [path for top in tops for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    found += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml"} or path.name == "Makefile"]
    return [path.relative_to(ROOT) for path in found]


KEPT: Final = kept_files()
PYTHON: Final = [path for path in KEPT if path.suffix == ".py"]


def parsed(path: Path, text: str) -> File:
    """A file as the rules see it."""
    return File(path, text, ast.parse(text))


@pytest.mark.parametrize("faults", dict.fromkeys(rule.faults for rule in RULES), ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(faults: Callable[[File], Faults]) -> None:
    holds_in = next(rule.holds_in for rule in RULES if rule.faults is faults)
    files = [parsed(path, (ROOT / path).read_text(encoding="utf-8")) for path in PYTHON if holds_in(path)]
    assert [f"{file.path}:{line}: {fault}" for file in files for line, fault in faults(file)] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.faults.__name__)
def test_the_rule_catches_what_breaks_it(rule: Rule) -> None:
    path = Path(rule.broken_at)
    assert rule.holds_in(path)
    assert list(rule.faults(parsed(path, rule.broken_by)))
    assert not list(rule.faults(parsed(Path("src/headrace/core/run.py"), FINE)))


def test_the_rules_see_the_code() -> None:
    assert Path("src/headrace/foundation/limits.py") in PYTHON


def places(text: str) -> list[str]:
    """Paths of one machine and hosts of registries that a text names."""
    return [found[0] for pattern in (MACHINE_PATH, REGISTRY_HOST) for found in pattern.finditer(text)]


def test_no_file_names_a_machine_s_paths_or_a_registry() -> None:
    named = {}
    for path in KEPT:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text
        if found := places(text):
            named[str(path)] = found
    assert named == {}


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("/wor" + "k/x", True),
        ("cd /roo" + "t/.cache", True),
        ("'/hom" + "e/ada/x'", True),
        ("https://pyp" + "i.org/simple", True),
        ("https://files.pythonhoste" + "d.org/x", True),
        ("src/wor" + "k/x", False),
        ("./roo" + "t/", False),
        ("runtime/worker/worker.py", False),
        ("sqlite:///headrace.db", False),
    ],
)
def test_a_machine_s_path_is_told_from_others(text: str, caught: bool) -> None:
    assert bool(places(text)) is caught
