"""Print a random sample of docstrings and error texts, and all help texts, for a review of the language.

    python .ci/language_sample.py [--seed 12] [--docstrings 60] [--errors 30] [SOURCE]

The same seed draws the same sample from the same source. Output is a Markdown table.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
ERROR_NAME: Final = re.compile(
    r"\w*(?:Error|Fault|Refused|Failed|Missing|Unavailable|Broken|Invalid\w*|Conflict|Lost|Full|Busy|Ended|Closed)"
    r"|NotFound|IllegalTransition|UpdatesUnflushed"
)
HELP_DECORATOR: Final = re.compile(r"\.(?:command|callback)\b")


def text_of(node: ast.expr) -> str:
    """Return a string expression as a reader sees it, with {…} for values; empty for another expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "{…}" for part in node.values)
    return ""


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of a module and of its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            docstring := ast.get_docstring(node)
        ):
            yield docstring


def error_texts(tree: ast.Module) -> Iterator[str]:
    """Yield the texts of errors, with their hints."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and ERROR_NAME.fullmatch(ast.unparse(node.func)):
            text = text_of(node.args[0])
            hints = [text_of(keyword.value) for keyword in node.keywords if keyword.arg == "hint"]
            if " " in text:
                yield f"{text} [hint: {hints[0]}]" if hints and hints[0] else text


def help_texts(tree: ast.Module) -> Iterator[str]:
    """Yield the help of commands, arguments and options."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (text_of(keyword.value) for keyword in node.keywords if keyword.arg == "help")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and any(
            HELP_DECORATOR.search(ast.unparse(decorator)) for decorator in node.decorator_list
        ):
            yield ast.get_docstring(node) or ""


def main() -> None:
    """Print the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=ROOT / "src" / "headrace")
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--docstrings", type=int, default=60)
    parser.add_argument("--errors", type=int, default=30)
    options = parser.parse_args()
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(options.source.rglob("*.py"))]
    commands = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((options.source / "cli").rglob("*.py"))]
    draw = random.Random(options.seed)  # noqa: S311 - a sample, not a secret
    kinds = {
        "docstring": ([text for tree in trees for text in docstrings(tree)], options.docstrings),
        "error": ([text for tree in trees for text in error_texts(tree)], options.errors),
        "help": (list(dict.fromkeys(text for tree in commands for text in help_texts(tree) if text)), None),
    }
    print("| kind | text |\n|---|---|")
    for kind, (texts, count) in kinds.items():
        for text in texts if count is None else draw.sample(texts, min(count, len(texts))):
            words = " ".join(text.split()).replace("|", "\\|")
            print(f"| {kind} | {words} |")


if __name__ == "__main__":
    main()
