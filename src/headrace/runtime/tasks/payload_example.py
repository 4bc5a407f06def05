"""Examples of payloads that fit a task, made from its signature, for error messages."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import inspect as types_of

from headrace.runtime.tasks.payload_codec import Codec

DEPTH_MAX: Final = 4
_PLAIN: Final[dict[type[Any], object]] = {
    types_of.NoneType: None,
    types_of.BoolType: True,
    types_of.IntType: 1,
    types_of.FloatType: 1.5,
    types_of.StrType: "text",
    types_of.BytesType: "AAEC",
    types_of.ByteArrayType: "AAEC",
    types_of.MemoryViewType: "AAEC",
    types_of.DateTimeType: "2030-01-31T08:00:00Z",
    types_of.DateType: "2030-01-31",
    types_of.TimeType: "08:00:00",
    types_of.TimeDeltaType: "PT1H",
    types_of.UUIDType: "00000000-0000-4000-8000-000000000000",
    types_of.DecimalType: "1.5",
    types_of.AnyType: {"any": "JSON value"},
    types_of.RawType: {"any": "JSON value"},
}


def examples(codec: Codec) -> list[str]:
    """Return one or two items that fit a task: of one parameter the value itself first, then an object of arguments."""
    required = [parameter for parameter in codec.parameters if not parameter.has_default] or codec.parameters
    values = {parameter.name: _value(types_of.type_info(parameter.annotation), 0) for parameter in required}
    forms: list[object] = [values]
    if len(codec.parameters) == 1:
        forms.insert(0, *values.values())
    return [text for text in dict.fromkeys(map(_json, forms)) if _fits(codec, text)]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _fits(codec: Codec, text: str) -> bool:
    """True if the task takes the example: a constraint (a least length, a pattern) may refuse it."""
    from headrace.core.pack import JSON
    from headrace.runtime.tasks.superjson import PayloadRefused

    try:
        args, kwargs = codec.decode(text.encode(), JSON)
    except PayloadRefused:
        return False
    return bool(args or kwargs) or not codec.parameters


def _value(info: Any, depth: int) -> object:
    """Return a small value of a type; None for a type of which nothing is known."""
    if type(info) in _PLAIN:
        return _PLAIN[type(info)]
    if depth > DEPTH_MAX:
        return None
    if isinstance(info, types_of.UnionType):
        return _value(next(kind for kind in info.types if not isinstance(kind, types_of.NoneType)), depth)
    if isinstance(info, types_of.LiteralType):
        return info.values[0]
    if isinstance(info, types_of.EnumType):
        return next(iter(info.cls)).value
    if isinstance(info, types_of.TupleType):
        return [_value(kind, depth + 1) for kind in info.item_types]
    if isinstance(info, types_of.DictType):
        return {str(_value(info.key_type, depth + 1)): _value(info.value_type, depth + 1)}
    if isinstance(info, types_of.CollectionType):
        return [_value(info.item_type, depth + 1)]
    return _object(info, depth) if hasattr(info, "fields") else None


def _object(info: Any, depth: int) -> object:
    fields = [field for field in info.fields if field.required] or list(info.fields)
    values: dict[str, object] = {field.encode_name: _value(field.type, depth + 1) for field in fields}
    tag = getattr(info, "tag_field", None)
    if tag:
        values = {tag: info.tag, **values}
    return (
        list(values.values())
        if getattr(info, "array_like", False) or info.__class__.__name__ == "NamedTupleType"
        else values
    )
