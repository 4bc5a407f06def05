"""Rules about the source itself: its size, names, language and safety.

Each rule is a function from a parsed file to its faults. `RULES` lists it beside code that it must catch, so that a
rule that catches nothing fails.
"""

from __future__ import annotations

import ast
import io
import re
import shutil
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).parents[1]
FILE_LINES_MAX: Final = 600
FUNCTION_LINES_MAX: Final = 70
EMPTY_NAMES: Final = re.compile(r"(?:.*_)?(?:util|helper|common|manager|base)s?")
UNSAFE_MODULES: Final = {"pickle", "shelve", "marshal", "dill", "cloudpickle"}
UNSAFE_CALLS: Final = {"eval", "exec"}

# Written so that this file does not contain what the patterns match.
IGNORE: Final = re.compile(r"#\s*type:\s*[i]gnore(?:\[[^\]]*\])?(?P<rest>.*)")
OPEN_END: Final = re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b(?!\([a-z][\w.-]*\))")
MACHINE_PATH: Final = re.compile(r"(?<![\w.~$}*])/(?:wor[k]|roo[t]|hom[e]/\w+|User[s]/\w+|tm[p]/(?!\*))/?")
REGISTRY_HOST: Final = re.compile(
    r"pyp[i]\.org|pythonhoste[d]\.org|registry\.npmj[s]|npmj[s]\.com|crate[s]\.io|proxy\.golan[g]|deb\.debia[n]"
)


LOG_OF_USERS: Final = "context.py"
"""The module of `ctx.log`, whose lines are the user's: they go where the user's structlog sends them."""


class File(NamedTuple):
    """A source file, read and parsed once."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        """The lines of the file, the first at 0."""
        return self.text.splitlines()


Faults = Iterator[tuple[int, str]]


class Rule(NamedTuple):
    """A rule: the files it applies to, and code that breaks it."""

    applies_to: Callable[[Path], bool]
    faults: Callable[[File], Faults]
    broken_by: str
    broken_at: str = "src/headrace/core/run.py"


def in_src(path: Path) -> bool:
    """True for files of the package."""
    return path.parts[0] == "src"


def in_src_outside_cli(path: Path) -> bool:
    """True for files of the package that must not print."""
    return in_src(path) and "cli" not in path.parts


def in_tests(path: Path) -> bool:
    """True for tests and their rigs."""
    return path.parts[0] == "tests"


def anywhere(path: Path) -> bool:
    """True for every Python file."""
    return path.suffix == ".py"


def long_files(file: File) -> Faults:
    """Find files over the bound of lines."""
    if len(file.lines) > FILE_LINES_MAX:
        yield len(file.lines), f"{len(file.lines)} lines, more than {FILE_LINES_MAX}"


def long_functions(file: File) -> Faults:
    """Find functions that don't fit on a screen."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines_count = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines_count > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name} has {lines_count} lines, more than {FUNCTION_LINES_MAX}"


def empty_names(file: File) -> Faults:
    """Find modules whose name says nothing about their content."""
    names = [file.path.stem if file.path.name != "__init__.py" else file.path.parent.name]
    for name in names:
        if EMPTY_NAMES.fullmatch(name):
            yield 1, f"the module name {name} says nothing about its content"


def unexplained_ignores(file: File) -> Faults:
    """Find silenced type errors without a reason."""
    for number, line in enumerate(file.lines, 1):
        match = IGNORE.search(line)
        if match and not re.match(r"\s*#\s*\S.{7,}", match["rest"]):
            yield number, "a silenced type error without a reason after it"


def unowned_notes(file: File) -> Faults:
    """Find notes about open work without an owner."""
    for number, line in enumerate(file.lines, 1):
        if OPEN_END.search(line):
            yield number, "open work without an owner in brackets"


def sleeps(file: File) -> Faults:
    """Find sleeps in tests, which wait for signals and use a manual clock."""
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "time.sleep":
            yield node.lineno, "sleeps; wait for a signal"
        elif name in {"asyncio.sleep", "sleep"} and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and argument.value:
                yield node.lineno, "sleeps by wall-clock time; wait for a signal"


def silent_skips(file: File) -> Faults:
    """Find skipped tests without a reason."""
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
            if not reasons or any(isinstance(reason, ast.Constant) and not reason.value for reason in reasons):
                yield node.lineno, "skips without a reason"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and node not in called and ast.unparse(node) == "pytest.mark.skip":
            yield node.lineno, "skips without a reason"


def prints(file: File) -> Faults:
    """Find prints, and loggers of structlog itself, which print: a library does not write to standard output."""
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "prints; return it, log it, or move it to cli"
        if ast.unparse(node.func) == "structlog.get_logger" and file.path.name != LOG_OF_USERS:
            yield node.lineno, "use get_logger of headrace.foundation.logs"


def unsafe_code(file: File) -> Faults:
    """Find code that could turn stored bytes into code."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            yield node.lineno, f"calls {ast.unparse(node.func)}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported = [alias.name for alias in node.names]
            for module in [node.module or ""] if isinstance(node, ast.ImportFrom) else imported:
                if module.partition(".")[0] in UNSAFE_MODULES:
                    yield node.lineno, f"imports {module}"


def missing_docstrings(file: File) -> Faults:
    """Find modules, public classes and functions, and methods of protocols without a docstring."""
    if not ast.get_docstring(file.tree):
        yield 1, "the module has no docstring"
    for node in file.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _undocumented(node, node.name)
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases):
            for method in node.body:
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _undocumented(method, f"{node.name}.{method.name}")


def _undocumented(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> Faults:
    overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
    if not node.name.startswith("_") and not overload and not ast.get_docstring(node):
        yield node.lineno, f"{name} has no docstring"


# -- language (the project's style: plain technical English)

BANNED_PROSE: Final = re.compile(
    r"(?i)\b(?:houses?|rooms?|floors?|seams?|doorbell|crumbs|doomed|wish(?:es)?|handouts?|news|told|whoever|somebody"
    r"|nobody|anybody|under way|by and by|let go|go on where)\b"
)
BANNED_PARTS: Final = re.compile(
    r"(?:houses?|rooms?|doorbell|crumbs|doomed|harm|wish(?:es)?|handouts?|news|told|said|whoever|somebody|nobody|anybody"
    r"|crew)"
)
BANNED_NAMES: Final = frozenset(["own", "one", "found", "there", "known"])
OPENINGS: Final = re.compile(r"(?:What|Whether|How|Let|Who|Whom|Whose|Where|When)\b")
BARE_RULE_NUMBER: Final = re.compile(r"\bR(?:1[0-9]|[1-9])\b(?!,\s| \(|:\s| to R| \|)")
EVENT: Final = re.compile(r"[a-z][a-z_]*(?:\.[a-z][a-z_]*)+")
LOG_LEVELS: Final = {"debug", "info", "warning", "error", "exception", "critical"}
FAILURE: Final = re.compile(
    r"(?i)expected|n't\b"
    r"|\b(?:not|no|none|never|only|must|cannot|without|out of|both|twice|two|more than|too|got|other|another)\b"
    r"|accept|already|ambiguous|asked for|belong|broke|busy|cancel|chang|clos|conflict|conta|crash|damag|delet|deni"
    r"|died|differ|empty|end(?:s|ed) (?:in|before)|ended|exceed|exit|expired|fail|full|held by|holds|invalid|killed"
    r"|large|lost|malformed|missing|need|older|outside|overlap|raised|reach|read-only|refus|reject|reported|requir"
    r"|reserved|respond|rolled|stop|time[ds]? out|truncat|unavailable|undefined|unknown|unread|unsupported|unused"
    r"|would|wrong"
)
ERROR_CLASSES: Final = re.compile(
    r"(?:\w*(?:Error|Fault|Refused|Failed|Missing|Unavailable|Broken|Invalid\w*|Conflict|Lost|Full|Busy|Ended|Closed)"
    r"|InvalidInput|InvalidSetting|NotFound|IllegalTransition|UpdatesUnflushed)\Z"
)


def in_src_or_tests(path: Path) -> bool:
    """True for the package, its tests and its benchmarks."""
    return path.parts[0] in {"src", "tests", "bench"} and not path.stem.endswith("_pb2") and path.name != "test_tidy.py"


@cache
def tokens_of(text: str) -> tuple[tokenize.TokenInfo, ...]:
    """Return the tokens of a file; several rules read them."""
    return tuple(tokenize.generate_tokens(io.StringIO(text).readline))


def prose_of(file: File) -> Iterator[tuple[int, str]]:
    """Yield the docstrings, comments and worded strings of a file, by line."""
    for token in tokens_of(file.text):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and " " in token.string):
            yield token.start[0], token.string


def private_language(file: File) -> Faults:
    """Find metaphors and indefinite actors in prose."""
    for number, text in prose_of(file):
        if match := BANNED_PROSE.search(text):
            yield number + text[: match.start()].count("\n"), f"uses the word {match[0]!r}"


def private_names(file: File) -> Faults:
    """Find identifiers that are metaphors, or that don't say what they hold."""
    for token in tokens_of(file.text):
        if token.type != tokenize.NAME:
            continue
        parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", token.string).lower().split("_")
        if any(map(BANNED_PARTS.fullmatch, parts)) or token.string in BANNED_NAMES:
            yield token.start[0], f"uses the name {token.string}"


def docstring_openings(file: File) -> Faults:
    """Find docstrings that begin with a question word or with Let."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            if OPENINGS.match(docstring):
                yield getattr(node, "lineno", 1), f"a docstring begins with {docstring.split()[0]}"


def bare_rule_numbers(file: File) -> Faults:
    """Find rules of the design that are written as a number without a name."""
    for number, text in prose_of(file):
        if match := BARE_RULE_NUMBER.search(text):
            yield number + text[: match.start()].count("\n"), f"writes {match[0]} without the name of the rule"


def log_sentences(file: File) -> Faults:
    """Find log events that are not short dotted names."""
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        is_log = isinstance(node.func.value, ast.Name) and node.func.value.id == "LOG" and node.func.attr in LOG_LEVELS
        event = node.args[0]
        if is_log and not (isinstance(event, ast.Constant) and EVENT.fullmatch(str(event.value))):
            yield node.lineno, f"logs {ast.unparse(event)}; write an event such as lease.lost, and fields"


def bare_rules(file: File) -> Faults:
    """Find error texts that only state a rule: without "expected" and without a verb of failure."""
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        text = node.args[0]
        if not isinstance(text, ast.Constant | ast.JoinedStr) or not ERROR_CLASSES.match(ast.unparse(node.func)):
            continue
        values = text.values if isinstance(text, ast.JoinedStr) else [text]
        words = " ".join(str(value.value) for value in values if isinstance(value, ast.Constant))
        if len(words.split()) > 2 and not FAILURE.search(words):
            yield node.lineno, f"says neither what was expected nor what failed: {words}"


DOC: Final = '"""A module."""\n'
RULES: Final = [
    Rule(in_src_or_tests, long_files, DOC + "\n" * FILE_LINES_MAX),
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
    Rule(in_src_outside_cli, prints, "LOG = structlog.get_logger('headrace.x')\n"),
    Rule(in_src, unsafe_code, "import pickle\n"),
    Rule(in_src, unsafe_code, "def f():\n    from marshal import loads\n"),
    Rule(in_src, unsafe_code, "eval('1')\n"),
    Rule(in_src_or_tests, private_language, DOC + "# the house has a room\n"),
    Rule(in_src_or_tests, private_language, DOC + "def f():\n    raise ValueError('nobody was told')\n"),
    Rule(in_src_or_tests, private_names, DOC + "told = 1\n"),
    Rule(in_src_or_tests, private_names, DOC + "class DoomedStore: ...\n"),
    Rule(in_src_or_tests, private_names, DOC + "for one in range(3): ...\n"),
    Rule(in_src_or_tests, docstring_openings, '"""What it is for."""\n'),
    Rule(in_src_or_tests, docstring_openings, DOC + 'def f():\n    """Whether it is."""\n'),
    Rule(in_src_or_tests, bare_rule_numbers, DOC + "# a claim is repeated (R1)\n"),
    Rule(in_src, log_sentences, DOC + "LOG.warning(f'lease {x} was lost')\n"),
    Rule(in_src, log_sentences, DOC + "LOG.info('the lease was lost', id=1)\n"),
    Rule(in_src, bare_rules, DOC + "raise InvalidInput('the first frame is SETTINGS')\n"),
    Rule(in_src, bare_rules, DOC + "raise NotFound(f'{name} is a name of a task')\n"),
    Rule(in_src, missing_docstrings, "x = 1\n"),
    Rule(in_src, missing_docstrings, DOC + "class X: ...\n"),
    Rule(in_src, missing_docstrings, DOC + "async def x(): ...\n"),
    Rule(in_src, missing_docstrings, f"{DOC}class X(Protocol):\n    {DOC}    def verb(self): ...\n"),
]
FINE: Final = (
    DOC
    + "x = 1  # type: "
    + "ignore[misc]  # the stubs of the library are wrong\n# TO"
    + "DO(ada): later\nasync def _f(): await asyncio.sleep(0)\n"
)


def repository_files() -> list[Path]:
    """Return the files of the repository; without git, all files of its folders."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, encoding="utf-8")
        if listed.returncode == 0:
            return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    tops = [ROOT / name for name in ("src", "tests", "bench", "examples", "docs", ".ci")]
    files = [path for top in tops for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml"} or path.name == "Makefile"]
    return [path.relative_to(ROOT) for path in files]


FILES: Final = repository_files()
PYTHON: Final = [path for path in FILES if path.suffix == ".py"]


@cache
def parsed(path: Path, text: str) -> File:
    """Parse a file for the rules."""
    return File(path, text, ast.parse(text))


@pytest.mark.parametrize("faults", dict.fromkeys(rule.faults for rule in RULES), ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(faults: Callable[[File], Faults]) -> None:
    applies_to = next(rule.applies_to for rule in RULES if rule.faults is faults)
    files = [parsed(path, (ROOT / path).read_text(encoding="utf-8")) for path in PYTHON if applies_to(path)]
    assert [f"{file.path}:{line}: {fault}" for file in files for line, fault in faults(file)] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.faults.__name__)
def test_the_rule_catches_planted_code(rule: Rule) -> None:
    path = Path(rule.broken_at)
    assert rule.applies_to(path)
    assert list(rule.faults(parsed(path, rule.broken_by)))
    assert not list(rule.faults(parsed(Path("src/headrace/core/run.py"), FINE)))


def test_class_names_are_unique() -> None:
    classes: dict[str, list[str]] = {}
    for path in PYTHON:
        if in_src(path) and not path.stem.endswith("_pb2"):
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    classes.setdefault(node.name, []).append(str(path))
    assert {name: paths for name, paths in classes.items() if len(paths) > 1} == {}


def test_documents_are_written_in_plain_language() -> None:
    faults = []
    for path in FILES:
        if path.suffix == ".md":
            for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
                faults += [
                    f"{path}:{number}: {match[0]!r}"
                    for pattern in (BANNED_PROSE, BARE_RULE_NUMBER)
                    for match in pattern.finditer(line)
                ]
    assert faults == []


def test_the_rules_read_the_source() -> None:
    assert Path("src/headrace/foundation/limits.py") in PYTHON


def machine_names(text: str) -> list[str]:
    """Return the paths of a machine and the hosts of registries in a text."""
    return [match[0] for pattern in (MACHINE_PATH, REGISTRY_HOST) for match in pattern.finditer(text)]


def test_no_file_names_a_path_of_a_machine_or_a_registry() -> None:
    named = {}
    for path in FILES:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        if names := machine_names(text):
            named[str(path)] = names
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
def test_paths_of_a_machine_are_recognised(text: str, caught: bool) -> None:
    assert bool(machine_names(text)) is caught
