"""Input and summary of `headrace demo`: the modules of this machine's standard library, and figures about them."""

from __future__ import annotations

import io
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

INLINE_BYTES_MAX: Final = 64 * 1024
"""A low limit, so that large modules go through the object store."""

LARGEST: Final = 5
COMMONEST: Final = 8
SKIPPED: Final = frozenset({"site-packages", "dist-packages", "__pycache__"})


class Items(NamedTuple):
    """Figures of the input that was written."""

    path: Path
    modules_count: int
    bytes_count: int
    large_count: int


class Digest(NamedTuple):
    """Figures of all outlines."""

    modules: int
    lines: int
    functions: int
    classes: int
    largest: list[tuple[str, int]]
    commonest: list[tuple[str, int]]
    failed: list[tuple[str, str]]


def write_items(path: Path, root: Path | None = None) -> Items:
    """Write one line for each module of the standard library, `{"path": …, "source": …}`, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    count = bytes_count = large_count = 0
    with path.open("wb") as file:
        for module in _modules(root):
            line = msgspec.json.encode({"path": module.relative_to(root).as_posix(), "source": _source(module)})
            file.write(line + b"\n")
            count += 1
            bytes_count += len(line) + 1
            large_count += len(line) >= INLINE_BYTES_MAX
    return Items(path, count, bytes_count, large_count)


def digest(results: Iterable[bytes], paths: Iterable[str]) -> Digest:
    """Sum up the results of the map; `paths` are those of its input, in the same order."""
    modules = lines = functions = classes = 0
    sizes: list[tuple[int, str]] = []
    names: Counter[str] = Counter()
    failed: list[tuple[str, str]] = []
    for result, path in zip(results, paths, strict=True):
        outcome = msgspec.json.decode(result)
        if not outcome["ok"]:
            failed.append((path, f"{outcome['error']['type']}: {outcome['error']['message']}"))
            continue
        output = outcome["output"]
        modules += 1
        lines += output["lines"]
        functions += output["functions"]
        classes += output["classes"]
        sizes.append((output["lines"], output["path"]))
        names.update(set(output["names"]))
    largest = [(path, count) for count, path in sorted(sizes, key=lambda entry: (-entry[0], entry[1]))[:LARGEST]]
    return Digest(modules, lines, functions, classes, largest, names.most_common(COMMONEST), failed)


def paths_of(items: Path) -> Iterator[str]:
    """Return the paths in an input that `write_items` wrote, in order."""
    with items.open("rb") as file:
        for line in file:
            yield str(msgspec.json.decode(line)["path"])


def _modules(root: Path) -> list[Path]:
    return sorted(
        path for path in root.rglob("*.py") if path.is_file() and SKIPPED.isdisjoint(path.relative_to(root).parts)
    )


def _source(path: Path) -> str:
    """Return a module's text in the encoding that it declares, else in Latin-1."""
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return io.TextIOWrapper(io.BytesIO(data), encoding).read()
    except (SyntaxError, UnicodeError, LookupError):
        return data.decode("latin-1")
