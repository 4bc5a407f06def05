"""Decoding of `application/super+json`: JSON with a `meta` tree that names the types which JSON lacks.

The tree is an object of paths where only inner values have types, `[type]` for a typed value, and `[type, inner]` for a
typed value with typed inner values. A path joins keys by dots; a dot inside a key is escaped by a backslash. Inner
values are converted first, since a path leads through a set or map in its written form, a list.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Final

_KEY: Final = re.compile(r"(?:[^.\\]|\\.)*", re.DOTALL)
_NUMBERS: Final = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf"), "-0": -0.0}


class PayloadRefused(Exception):
    """A payload does not fit its task; another attempt would fail the same way."""


def revive_types(document: Any) -> Any:
    """Return the value of a decoded document, with the types that Python has; other types stay JSON."""
    if not isinstance(document, dict) or "json" not in document:
        raise PayloadRefused("expected an object with `json` and `meta` as super+json payload")
    meta = document.get("meta") or {}
    tree = meta.get("values") if isinstance(meta, dict) else meta
    try:
        return _convert(document["json"], tree) if tree else document["json"]
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise PayloadRefused(f"the `meta` of a super+json payload does not fit its `json`: {error!r}") from error


def _convert(value: Any, tree: Any) -> Any:
    kind, below = (None, tree) if isinstance(tree, dict) else (tree[0], tree[1] if len(tree) > 1 else {})
    for path, inner in below.items():
        keys = [re.sub(r"\\([.\\])", r"\1", key) for key in _split(path)]
        holder = value
        for key in keys[:-1]:
            holder = holder[_key_in(holder, key)]
        last = _key_in(holder, keys[-1])
        holder[last] = _convert(holder[last], inner)
    return value if kind is None else _typed(value, kind)


def _split(path: str) -> list[str]:
    keys, start = [], 0
    while True:
        match = _KEY.match(path, start)
        end = match.end() if match is not None else len(path)
        keys.append(path[start:end])
        if end >= len(path):
            return keys
        start = end + 1


def _key_in(holder: Any, key: str) -> Any:
    return int(key) if isinstance(holder, list) else key


def _typed(value: Any, kind: Any) -> Any:
    match kind:
        case "Date":
            return datetime.fromisoformat(value)
        case "bigint":
            return int(value)
        case "number":
            return _NUMBERS[value]
        case "set":
            return _as_set(value)
        case "map":
            return {key: item for key, item in value}  # noqa: C416 - each pair must be one
        case "undefined":
            return None
    return value


def _as_set(value: Any) -> Any:
    try:
        return set(value)
    except TypeError:  # JavaScript sets may hold objects and arrays; those stay a list
        return list(value)
