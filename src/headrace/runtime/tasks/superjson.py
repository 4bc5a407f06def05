"""Reading `application/super+json`: JSON beside a `meta` tree that says which values were more than JSON can say.

The tree has an object of paths where only what is below has a type, `[type]` for a value and `[type, below]` for a
value with typed values in it. A path joins keys by dots; a dot that belongs to a key has a backslash before it.
What is inside is revived first, since paths lead through a set or a map as it was written: a list.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Final

_KEY: Final = re.compile(r"(?:[^.\\]|\\.)*", re.DOTALL)
_NUMBERS: Final = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf"), "-0": -0.0}


class PayloadRefused(Exception):
    """An input does not fit its task; another attempt would fail the same way."""


def revive_types(document: Any) -> Any:
    """The value of a decoded document, its types applied where Python has them; the others stay JSON."""
    if not isinstance(document, dict) or "json" not in document:
        raise PayloadRefused("a super+json payload is an object with `json` and `meta`")
    meta = document.get("meta") or {}
    tree = meta.get("values") if isinstance(meta, dict) else meta
    try:
        return _revived(document["json"], tree) if tree else document["json"]
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise PayloadRefused(f"the `meta` of a super+json payload does not fit its `json`: {error!r}") from error


def _revived(value: Any, tree: Any) -> Any:
    kind, below = (None, tree) if isinstance(tree, dict) else (tree[0], tree[1] if len(tree) > 1 else {})
    for path, inner in below.items():
        keys = [re.sub(r"\\([.\\])", r"\1", key) for key in _split(path)]
        holder = value
        for key in keys[:-1]:
            holder = holder[_own(holder, key)]
        last = _own(holder, keys[-1])
        holder[last] = _revived(holder[last], inner)
    return value if kind is None else _typed(value, kind)


def _split(path: str) -> list[str]:
    keys, start = [], 0
    while True:
        found = _KEY.match(path, start)
        end = found.end() if found is not None else len(path)
        keys.append(path[start:end])
        if end >= len(path):
            return keys
        start = end + 1


def _own(holder: Any, key: str) -> Any:
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
            return {key: own for key, own in value}  # noqa: C416 - each pair must be one
        case "undefined":
            return None
    return value


def _as_set(value: Any) -> Any:
    try:
        return set(value)
    except TypeError:  # objects and arrays may be members there; here they stay a list
        return list(value)
