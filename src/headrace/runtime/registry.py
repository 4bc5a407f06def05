"""Tasks by name, and the one table by which payloads decode, whatever door they came through.

application/json         a task of one parameter takes the value whole; of several, an object as keyword
                         arguments or an array as positional ones; a `Context` parameter does not count
application/super+json   its `json` part, with its `meta` types where Python has them, then as JSON
text/plain               a string
application/store        a reference, fetched first (by the executor), then as what it refers to
application/msgpack      `{args, kwargs}`
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, get_args

import msgspec

from headrace.core import pack
from headrace.core.retry import NO_RETRY, Retry
from headrace.foundation.errors import InvalidInput, InvalidSetting, NotFound
from headrace.foundation.limits import DEFAULT
from headrace.runtime.context import Context

Pool = Literal["auto", "loop", "thread", "process"]

TIMEOUT_S_MAX: Final = 365 * 86_400.0
PRIORITY_MAX: Final = 1_000_000
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class PayloadRefused(Exception):
    """An input does not fit its task; another attempt would fail the same way."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where another process finds a task: a module by name or by file, and the attribute in it."""

    module: str
    file: str
    attribute: str


@dataclass(frozen=True, slots=True, eq=False)
class TaskSpec:
    """All that is known of a task but its handle."""

    name: str
    function: Callable[..., Any]
    retry: Retry = NO_RETRY
    timeout_s: float | None = None
    queue: str = "default"
    priority: int = 0
    pool: Pool = "auto"
    at_most_once: bool = False
    codec: Codec = field(init=False)
    is_async: bool = field(init=False)

    def __post_init__(self) -> None:
        check_name("task", self.name)
        check_name("queue", self.queue)
        check_priority(self.priority)
        if self.timeout_s is not None and not 0 < self.timeout_s <= TIMEOUT_S_MAX:
            raise InvalidSetting(f"timeout_s must be over 0 and at most {TIMEOUT_S_MAX:.0f}, not {self.timeout_s!r}")
        if self.pool not in get_args(Pool):
            raise InvalidSetting(f"pool must be one of {', '.join(get_args(Pool))}, not {self.pool!r}", task=self.name)
        is_async = inspect.iscoroutinefunction(self.function)
        if self.pool == "loop" and not is_async:
            raise InvalidSetting(
                "pool='loop' is for async tasks: a plain function would block every other run",
                hint="write `async def`, or leave pool out",
                task=self.name,
            )
        if self.pool == "thread" and is_async:
            raise InvalidSetting("pool='thread' is for plain functions", hint="leave pool out", task=self.name)
        object.__setattr__(self, "is_async", is_async)
        object.__setattr__(self, "codec", Codec(self.name, self.function))

    @property
    def target(self) -> Target:
        """Where another process finds this task."""
        module = inspect.getmodule(self.function)
        return Target(self.function.__module__, getattr(module, "__file__", "") or "", self.function.__qualname__)


class Registry:
    """The tasks of one app, by name."""

    def __init__(self) -> None:
        self._specs: dict[str, TaskSpec] = {}

    def add(self, spec: TaskSpec) -> None:
        """Raises `InvalidSetting` when another task has the name."""
        if spec.name in self._specs:
            raise InvalidSetting(f"two tasks are called {spec.name}", hint="give one of them name='…'")
        self._specs[spec.name] = spec

    def get(self, name: str) -> TaskSpec:
        """Raises `NotFound`."""
        try:
            return self._specs[name]
        except KeyError:
            raise NotFound(
                f"no task is called {name!r}", hint=f"there are: {', '.join(self.names) or 'none'}"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    @property
    def names(self) -> list[str]:
        """All task names, sorted."""
        return sorted(self._specs)


class Codec:
    """Turns calls into payloads and payloads into calls, by a function's signature and annotations."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.context_name = ""
        self.decode_one: Callable[[bytes], Any] | None = None
        self.parameters = self._parameters(function)
        self._signature = inspect.Signature(
            [
                parameter
                for parameter in inspect.signature(function).parameters.values()
                if parameter.name != self.context_name
            ]
        )
        if len(self.parameters) == 1:
            ((only, annotation, default),) = self.parameters
            self._only: str | None = only
            self._whole_type: Any = annotation
            self._has_default = default is not inspect.Parameter.empty
            self._whole = msgspec.json.Decoder(annotation)
            self.decode_one = self._whole.decode
            self._checks_nothing = annotation in (Any, object)
            self._many: msgspec.json.Decoder[Any] | None = msgspec.json.Decoder(list[annotation])
        else:
            self._only = None
            fields: list[Any] = [
                (name, annotation)
                if default is inspect.Parameter.empty
                else (name, annotation | msgspec.UnsetType, msgspec.UNSET)
                for name, annotation, default in self.parameters
            ]
            self._by_name_type = msgspec.defstruct("Arguments", fields, forbid_unknown_fields=True, kw_only=True)
            self._by_place_type = msgspec.defstruct(
                "Arguments", sorted(fields, key=len), array_like=True, forbid_unknown_fields=True
            )
            self._checks_nothing = False
            self._many = msgspec.json.Decoder(list[self._by_name_type]) if fields else None  # type: ignore[name-defined]  # made here
            self._by_name = msgspec.json.Decoder(self._by_name_type)
            self._by_place = msgspec.json.Decoder(self._by_place_type)

    def _parameters(self, function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except Exception as error:
            raise InvalidSetting(
                f"the annotations of task {self.name} can't be resolved: {error}", hint="import the names they use"
            ) from error
        found = []
        for parameter in inspect.signature(function).parameters.values():
            if hints.get(parameter.name) is Context:
                self.context_name = parameter.name
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise InvalidSetting(
                    f"task {self.name} takes *{parameter.name}, which no payload can describe",
                    hint="name its parameters",
                )
            found.append((parameter.name, hints.get(parameter.name, Any), parameter.default))
        return found

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """A call as JSON, checked by decoding it as the worker will. Raises `InvalidInput`, naming the field."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidInput(
                f"task {self.name} can't be called so: {error}", hint=f"it takes {self._signature}"
            ) from None
        if self._only is not None and self._only in bound.arguments:
            return self.encode_value(bound.arguments[self._only])
        return self._checked(bound.arguments)

    def encode_value(self, value: Any) -> bytes:
        """An item of a batch as JSON: the value whole, or an object or array of arguments."""
        return self._checked(value)

    def _checked(self, value: Any) -> bytes:
        try:
            payload = _encode_json(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(
                f"the arguments of task {self.name} can't be written as JSON: {error}",
                hint="use plain values, dataclasses, msgspec structs, dates, UUIDs, enums or bytes",
            ) from None
        try:
            self.decode(payload, pack.JSON)
        except PayloadRefused as error:
            raise InvalidInput(
                f"the arguments don't fit task {self.name}: {error}", hint=f"it takes {self._signature}"
            ) from None
        return payload

    def encode_values(self, values: Sequence[Any]) -> list[bytes] | None:
        """Many items as JSON, checked in one go; None when any of them is refused, so that each can be asked alone."""
        try:
            payloads = [_encode_json(value) for value in values]
            if self._checks_nothing:
                return payloads
            if self._many is None or any(payload[:1] == b"[" for payload in payloads if self._only is None):
                return [self._checked(value) for value in values]
            self._many.decode(b"[" + b",".join(payloads) + b"]")
        except (TypeError, ValueError, RecursionError, InvalidInput):
            return None
        return payloads

    def decode(self, payload: bytes, kind: int) -> Arguments:
        """The call that a payload describes. Raises `PayloadRefused`, naming the path of the field."""
        try:
            if kind == pack.JSON:
                if self._only is not None:
                    return self._one(payload)
                return self._several(payload)
            return self._other(payload, kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PayloadRefused(str(error)) from None
        except RecursionError:
            raise PayloadRefused("the payload is nested too deeply") from None

    def _one(self, payload: bytes) -> Arguments:
        if not payload and self._has_default:
            return (), {}
        return (self._whole.decode(payload),), {}

    def _several(self, payload: bytes) -> Arguments:
        first = payload.lstrip()[:1]
        if first == b"[":
            found = self._by_place.decode(payload)
        elif first == b"{" or self.parameters:
            found = self._by_name.decode(payload)
        else:
            return (), {}  # a task without parameters is called by anything that holds none, `null` too
        return (), {
            name: value for name, _, _ in self.parameters if (value := getattr(found, name)) is not msgspec.UNSET
        }

    def _other(self, payload: bytes, kind: int) -> Arguments:
        if kind == pack.TEXT:
            return self.from_value(payload.decode("utf-8"))
        if kind == pack.SUPER_JSON:
            return self.from_value(_revived(msgspec.json.decode(payload)))
        if kind == pack.MSGPACK:
            call = msgspec.msgpack.decode(payload, type=_Call)
            if call.args and call.kwargs:
                names = [name for name, _, _ in self.parameters]
                if len(call.args) > len(names):
                    raise PayloadRefused(f"{len(call.args)} positional arguments for {len(names)} parameters")
                return self.from_value(dict(zip(names, call.args, strict=False)) | call.kwargs, whole=False)
            if self._only is not None and len(call.args) == 1:
                return self.from_value(call.args[0])
            return self.from_value(call.kwargs or list(call.args), whole=False)
        raise PayloadRefused(f"no payload has the kind {kind}")

    def from_value(self, value: Any, *, whole: bool = True) -> Arguments:
        """The call that a decoded value describes."""
        if self._only is not None:
            if not whole and isinstance(value, dict):
                if value.keys() - {self._only}:
                    raise PayloadRefused(f"unknown arguments {', '.join(sorted(value.keys() - {self._only}))}")
                if self._only not in value and self._has_default:
                    return (), {}
                value = value.get(self._only)
            return (msgspec.convert(value, self._whole_type),), {}
        if not self.parameters and value in (None, {}, []):
            return (), {}
        kind = self._by_place_type if isinstance(value, list | tuple) else self._by_name_type
        found = msgspec.convert(value, kind)
        return (), {name: own for name, _, _ in self.parameters if (own := getattr(found, name)) is not msgspec.UNSET}


_encode_json: Final = msgspec.json.Encoder().encode


class _Call(msgspec.Struct):
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


def _revived(value: Any) -> Any:
    """The `json` part of a super+json document, its top-level-path `meta` types applied where Python has them."""
    if not isinstance(value, dict) or "json" not in value:
        raise PayloadRefused("a super+json payload is an object with `json` and `meta`")
    meta = value.get("meta") or {}
    types = meta.get("values") if isinstance(meta, dict) else None
    if isinstance(types, list):
        return _revive_one(value["json"], types)
    root = value["json"]
    for path, kinds in (types or {}).items():
        keys = [key.replace("\\.", ".") for key in path.replace("\\.", "\0").split(".")]
        holder = root
        for key in keys[:-1]:
            holder = holder[int(key)] if isinstance(holder, list) else holder[key.replace("\0", ".")]
        last: Any = int(keys[-1]) if isinstance(holder, list) else keys[-1].replace("\0", ".")
        holder[last] = _revive_one(holder[last], kinds)
    return root


def _revive_one(value: Any, kinds: Any) -> Any:
    kind = kinds[0] if isinstance(kinds, list) and kinds else kinds
    try:
        match kind:
            case "Date":
                return datetime.fromisoformat(value)
            case "bigint":
                return int(value)
            case "number":
                return float({"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}[value])
            case "set":
                return list(value)
            case "map":
                return dict(value)
            case "undefined":
                return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PayloadRefused(f"{value!r} is not a {kind}") from error
    return value


def check_name(what: str, name: object) -> str:
    """`name` when it can name a task, queue, key or tag: 1 to 200 characters, no control characters."""
    most = DEFAULT.name_chars_max
    if not isinstance(name, str) or not 0 < len(name) <= most or not name.isprintable():
        raise InvalidInput(f"a {what}'s name is 1 to {most} printable characters, not {name!r}")
    return name


def check_priority(priority: object) -> int:
    """`priority` when it is an integer from -1,000,000 to 1,000,000; larger goes first."""
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > PRIORITY_MAX:
        raise InvalidInput(f"priority is a whole number from -{PRIORITY_MAX} to {PRIORITY_MAX}, not {priority!r}")
    return priority
