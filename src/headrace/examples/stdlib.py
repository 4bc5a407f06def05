"""Example of `headrace demo`: outlines of the modules of the standard library.

headrace map examples/stdlib.py:outline modules.ndjson -o outlines.ndjson
"""

from __future__ import annotations

import ast
import warnings

import msgspec

from headrace import Headrace

app = Headrace("stdlib")


class Outline(msgspec.Struct):
    """Figures of a module, and its public names."""

    path: str
    lines: int
    functions: int
    classes: int
    names: list[str]


@app.task(pool="process")
def outline(path: str, source: str) -> Outline:
    """Parse a module, count its lines, functions and classes, and list its public names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have escapes that newer compilers warn about
        tree = ast.parse(source, filename=path)
    functions = classes = 0
    for node in ast.walk(tree):
        functions += isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        classes += isinstance(node, ast.ClassDef)
    defined = [
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    names = [name for name in defined if not name.startswith("_")]
    return Outline(path, source.count("\n") + 1, functions, classes, names)
