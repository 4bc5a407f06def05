"""Checks of values that JSON would change silently: `nan` and `inf` become null, bytes become base64 text.

The checks cost little where there is nothing to find. Only a text with `null` can come from a number that is not
finite, and only what is no plain scalar can hide bytes. What is left is encoded as MessagePack, which keeps both apart.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from typing import Any, Final

import msgspec

_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_NOT_FINITE: Final = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]", re.DOTALL)
"""A float of MessagePack whose exponent is all ones. Other bytes may look the same, so the value itself decides."""

_to_msgpack: Final = msgspec.msgpack.Encoder().encode


class ValueRefused(ValueError):
    """A value would arrive as another one. The text names what was expected, what was found, and the path."""


def check_finite(value: Any, data: bytes) -> None:
    """Raise `ValueRefused` if a value, whose JSON is `data`, has a number that is not finite."""
    if b"null" not in data or value is None:
        return
    with suppress(Exception):  # MessagePack can't hold every value that JSON can
        if not _NOT_FINITE.search(_to_msgpack(value)):
            return
    place = _not_finite(msgspec.to_builtins(value), "$")
    if place is not None:
        number, path = place
        raise ValueRefused(f"Expected a finite number, got {number}{'' if path == '$' else f' - at `{path}`'}")


def _not_finite(value: Any, path: str) -> tuple[float, str] | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else (value, path)
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        items = ((f"{path}.{name}", item) for name, item in value.items())
    elif isinstance(value, list | tuple):
        items = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    return next((place for item_path, item in items if (place := _not_finite(item, item_path)) is not None), None)


class BytesCheck:
    """The check that no bytes are where a type expects text. Does nothing for a type without text."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode if _has_text(kind) else None

    @property
    def is_needed(self) -> bool:
        """True if the type has text somewhere."""
        return self._decode is not None

    def check(self, value: Any) -> None:
        """Raise `ValueRefused` if there are bytes in place of text."""
        if self._decode is None or type(value) in _SCALARS:
            return
        if type(value) is dict and _SCALARS.issuperset(map(type, value.values())):
            return
        try:
            self._decode(_to_msgpack(value))
        except msgspec.ValidationError as error:
            if "got `bytes`" in str(error):
                raise ValueRefused(str(error)) from None
        except Exception:  # noqa: BLE001 - MessagePack can't hold every value that JSON can
            return

    def are_plain(self, values: Iterable[Any]) -> bool:
        """True if many values can be seen at a glance to have no bytes: scalars, or dicts of scalars."""
        if self._decode is None:
            return True
        kinds = set(map(type, values))
        if kinds <= _SCALARS:
            return True
        return kinds == {dict} and _SCALARS.issuperset(map(type, chain.from_iterable(map(dict.values, values))))


def _has_text(kind: Any) -> bool:
    """True if a type may contain text, other than in the keys of objects."""
    return _contains(kind, msgspec.inspect.StrType)


def _may_be_null(kind: Any) -> bool:
    """True if a type may contain null."""
    return _contains(kind, msgspec.inspect.NoneType, msgspec.inspect.AnyType)


def _contains(kind: Any, *kinds: type[msgspec.inspect.Type]) -> bool:
    """True if a type contains one of some types of values, or can't be inspected."""
    seen: set[Any] = set()
    try:
        waiting: list[Any] = [msgspec.inspect.type_info(kind)]
        while waiting:
            info = waiting.pop()
            if isinstance(info, kinds):
                return True
            named_class = getattr(info, "cls", None)
            if not isinstance(info, msgspec.Struct) or (named_class is not None and named_class in seen):
                continue
            seen.add(named_class)
            waiting += [getattr(info, field, None) for field in ("type", "item_type", "value_type")]
            for field in ("types", "item_types", "fields"):
                waiting += getattr(info, field, None) or ()
    except Exception:  # noqa: BLE001 - it may contain anything
        return True
    return False


class ResultCodec:
    """Decoder and check of the results of a task, by its return annotation.

    The check has three parts, so that most results need none or only the first, a call into C. Values whose type is one
    of `plain_types` need no check. `validate` decodes the JSON of others as the annotated type; None without one.
    `checks_values`: 0 if no more is needed, 1 if the JSON has `null` in it, 2 always: then call `check_values`.
    """

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation
        self._bytes = BytesCheck(int)
        self._scalars: tuple[Any, ...] = ()
        self.validate: Callable[[bytes], Any] | None = None
        self.checks_values = 1
        self.plain_types: frozenset[Any] = _SCALARS - {float}
        if annotation in (Any, object):
            return
        try:
            self.validate = msgspec.json.Decoder(annotation).decode
        except (TypeError, RuntimeError):  # an annotation that nothing decodes
            return
        members = _members(annotation)
        self.plain_types = frozenset(members & self.plain_types)
        self._bytes = BytesCheck(annotation)
        if members <= _SCALARS:
            self._scalars = (*members, int) if float in members else (*members,)
            self.checks_values = 2
        elif self._bytes.is_needed:
            self.checks_values = 2
        else:
            self.checks_values = int(_may_be_null(annotation))

    def decode(self, result: bytes) -> Any:
        """Decode a stored result into the annotated type; into plain JSON values if it does not fit, since an older
        version of the task may have stored it.
        """
        if self.validate is not None and self._annotation not in (None, type(None)):
            try:
                return self.validate(result)
            except msgspec.ValidationError:
                pass
        return _decode_plain(result)

    def check(self, value: Any, result: bytes) -> None:
        """Raise `ValueRefused` if a value, whose JSON is `result`, is not what the annotation says."""
        self.check_values(value, result)
        if self.validate is not None:
            try:
                self.validate(result)
            except msgspec.ValidationError as error:
                raise ValueRefused(str(error)) from None

    def check_values(self, value: Any, result: bytes) -> None:
        """Raise `ValueRefused` for what JSON changed silently, and for a scalar of another type."""
        check_finite(value, result)
        if self._scalars and not isinstance(value, self._scalars):
            raise ValueRefused(f"Expected `{_name(self._annotation)}`, got `{type(value).__name__}`")
        self._bytes.check(value)


_decode_plain: Final = msgspec.json.Decoder().decode


def _members(annotation: Any) -> set[Any]:
    """Return the members of a union, or the one type."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*map(_members, typing.get_args(annotation)))
    return {type(None) if annotation is None else annotation}


def _name(annotation: Any) -> str:
    return " | ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in _members(annotation)))
