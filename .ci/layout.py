"""Prints the layout of the source: modules, lines and imports of each package. Fails on an import cycle.

Imports inside functions count as imports, those under `if TYPE_CHECKING` do not: they never run.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).parents[1] / "src"
ROOT: Final = "headrace"


def module_name(path: Path) -> str:
    """Return the dotted name of a file below the source folder."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(node: ast.AST, modules: Collection[str]) -> Iterator[str]:
    """Yield the modules that a module imports, as dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                yield submodule if submodule in modules else child.module
        else:
            yield from imported_names(child, modules)


def read_imports() -> tuple[dict[str, set[str]], dict[str, int]]:
    """Return the modules that each module imports, and the lines of each module."""
    paths = {module_name(path): path for path in sorted(SOURCE.rglob("*.py")) if not path.stem.endswith("_pb2")}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in paths.items()}
    imports: dict[str, set[str]] = {}
    for name, path in paths.items():
        targets: set[str] = set()
        for dotted in imported_names(ast.parse(path.read_text(encoding="utf-8")), paths):
            if dotted in paths and dotted != ROOT:
                targets.add(dotted)
        imports[name] = targets - {name}
    return imports, lines


def package_of(module: str) -> str:
    """Return the package of a module; modules of the root package stand for themselves."""
    package = module.rpartition(".")[0]
    return package if package not in ("", ROOT) else module


def unit_of(module: str, packages: set[str]) -> str:
    """Return the unit that cycles are looked for in: a package without sub-packages, otherwise the module itself."""
    package = package_of(module)
    has_packages = any(other.startswith(package + ".") for other in packages)
    return module if has_packages else package


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def main() -> int:
    """Print the table; return 1 if modules or packages import each other in a cycle."""
    imports, lines = read_imports()
    members: dict[str, list[str]] = defaultdict(list)
    for module in imports:
        members[package_of(module)].append(module)
    package_imports: dict[str, set[str]] = defaultdict(set)
    importers: dict[str, set[str]] = defaultdict(set)
    for module, targets in imports.items():
        for target in targets:
            source_package, target_package = package_of(module), package_of(target)
            if source_package != target_package:
                package_imports[source_package].add(target_package)
                importers[target_package].add(source_package)
    print(f"{'package':38} {'modules':>7} {'lines':>7} {'imports':>7} {'imported by':>11}")
    for package in sorted(members):
        modules = members[package]
        counts = (len(modules), sum(lines[module] for module in modules))
        print(
            f"{package:38} {counts[0]:7} {counts[1]:7} {len(package_imports[package]):7} {len(importers[package]):11}"
        )
    arrows = sum(map(len, package_imports.values()))
    print(f"{len(members)} packages, {len(imports)} modules, {arrows} arrows between packages")
    module_cycles = cycles(imports)
    units: dict[str, set[str]] = defaultdict(set)
    for module, targets in imports.items():
        unit = unit_of(module, set(members))
        units[unit] |= {unit_of(target, set(members)) for target in targets} - {unit}
    package_cycles = cycles(units)
    for cycle in package_cycles:
        print(f"packages that import each other: {', '.join(cycle)}")
    for cycle in module_cycles:
        print(f"modules that import each other: {', '.join(cycle)}")
    print(f"import cycles: {len(module_cycles) + len(package_cycles) or 'none'}")
    return 1 if module_cycles or package_cycles else 0


if __name__ == "__main__":
    raise SystemExit(main())
