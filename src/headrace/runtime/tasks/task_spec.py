"""Tasks by name, and the one table by which payloads decode, whatever door they came through.

application/json         a task of one parameter takes the value whole; of several, an object as keyword
                         arguments or an array as positional ones; a `Context` parameter does not count
application/super+json   its `json` part, with its `meta` types where Python has them, then as JSON
text/plain               a string
application/store        a reference, fetched first (by the executor), then as what it refers to
application/msgpack      `{args, kwargs}`
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import msgspec

from headrace.core import pack
from headrace.core.activation import LANE
from headrace.core.block import Extra
from headrace.core.retry import NO_RETRY, Retry, is_number_within
from headrace.core.span import Key
from headrace.foundation.errors import InvalidInput, InvalidSetting, NotFound
from headrace.foundation.limits import DEFAULT
from headrace.runtime.tasks.context import Context
from headrace.runtime.tasks.superjson import PayloadRefused, revived

if TYPE_CHECKING:
    from headrace.runtime.tasks.schedule_spec import ScheduleSpec

Pool = Literal["auto", "loop", "thread", "process"]

OnExhausted = Literal["discard", "dead_letter"]
"""What becomes of a run whose last attempt failed: a failed run and no more, or one that is kept for a person."""

SECONDS_MAX: Final = 3_650 * 86_400
TIMEOUT_S_MAX: Final = 365 * 86_400.0
PRIORITY_MAX: Final = 1_000_000
SCHEDULES_MAX: Final = 1_000
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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
    delay_s: float = 0
    expires_s: float = 0
    on_exhausted: OnExhausted = "discard"
    codec: Codec = field(init=False)
    is_async: bool = field(init=False)

    def __post_init__(self) -> None:
        check_name("task", self.name)
        if self.name == LANE:
            raise InvalidSetting(f"{LANE} is what activations are runs of", hint="call the task something else")
        check_name("queue", self.queue)
        check_priority(self.priority)
        _check_function(self.name, self.function)
        if not isinstance(self.retry, Retry):
            raise InvalidSetting(f"retry takes a Retry, not {self.retry!r}", hint="write Retry(attempts=3)")
        timeout_s = self.timeout_s
        if timeout_s is not None and (not timeout_s or not is_number_within(timeout_s, 0, TIMEOUT_S_MAX)):
            raise InvalidSetting(f"timeout_s must be over 0 and at most {TIMEOUT_S_MAX:.0f}, not {self.timeout_s!r}")
        for option in ("delay_s", "expires_s"):
            if not is_number_within(getattr(self, option), 0, SECONDS_MAX):
                raise InvalidSetting(
                    f"{option} must be from 0 to {SECONDS_MAX}, not {getattr(self, option)!r}", task=self.name
                )
        if self.on_exhausted not in get_args(OnExhausted):
            raise InvalidSetting(
                f"on_exhausted must be one of {', '.join(get_args(OnExhausted))}, not {self.on_exhausted!r}",
                task=self.name,
            )
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
    def key(self) -> Key:
        """What its runs are queued by when nobody says more; `delay_s` and `expires_s` count from each call."""
        return Key(
            self.name,
            queue=self.queue,
            priority=self.priority,
            at_most_once=self.at_most_once,
            dead_letter=self.on_exhausted == "dead_letter",
        )

    def bounded(self, extra: Extra | None) -> TaskSpec:
        """The task as one run asks for it: other attempts, another timeout, and all else as it is."""
        if extra is None or not (extra.attempts_max or extra.timeout_ms):
            return self
        own = copy.copy(self)
        if extra.attempts_max:
            object.__setattr__(own, "retry", dataclasses.replace(self.retry, attempts=extra.attempts_max))
        if extra.timeout_ms:
            object.__setattr__(own, "timeout_s", extra.timeout_ms / 1_000)
        return own

    @property
    def target(self) -> Target:
        """Where another process finds this task."""
        module = sys.modules.get(self.function.__module__)
        spec = getattr(module, "__spec__", None) if self.function.__module__ == "__main__" else None
        name = spec.name if spec is not None else self.function.__module__  # `python -m package.module`
        return Target(name, getattr(module, "__file__", "") or "", self.function.__qualname__)

    @property
    def options(self) -> str:
        """What another process must find with the task, in words that two processes write the same way."""
        classes = [[one.__qualname__ for one in found] for found in (self.retry.retry_on, self.retry.give_up_on)]
        retry = dataclasses.replace(self.retry, retry_on=(), give_up_on=())
        return (
            f"timeout_s={self.timeout_s}, at_most_once={self.at_most_once}, {retry}, on={classes[0]}, not={classes[1]}"
        )


class Registry:
    """The tasks of one app, and its schedules, by name."""

    def __init__(self, app: str = "app") -> None:
        self.app = app
        self._specs: dict[str, TaskSpec] = {}
        self.schedules: dict[str, ScheduleSpec] = {}

    def add(self, spec: TaskSpec) -> None:
        """Raises `InvalidSetting` when another task has the name."""
        if spec.name in self._specs:
            raise InvalidSetting(f"two tasks are called {spec.name}", hint="give one of them name='…'")
        self._specs[spec.name] = spec

    def add_schedule(self, spec: ScheduleSpec) -> None:
        """Raises `InvalidSetting` when another schedule has the name, or there are too many."""
        if spec.name in self.schedules:
            raise InvalidSetting(f"two schedules are called {spec.name}", hint="give one of them name='…'")
        if len(self.schedules) >= SCHEDULES_MAX:
            raise InvalidSetting(f"an app has at most {SCHEDULES_MAX} schedules", schedule=spec.name)
        self.schedules[spec.name] = spec

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


def _result_decoder(annotation: Any) -> Callable[[bytes], Any]:
    """What turns a stored result into what the task is annotated to return.

    A result that does not fit (an older version of the task wrote it), or an annotation that nothing decodes, comes
    as plain JSON values.
    """
    plain = msgspec.json.Decoder().decode
    try:
        typed = msgspec.json.Decoder(annotation).decode
    except (TypeError, RuntimeError):
        return plain

    def result_of(result: bytes) -> Any:
        try:
            return typed(result)
        except msgspec.ValidationError:
            return plain(result)

    return plain if annotation in (Any, object, None, type(None)) else result_of


class _Parameter(NamedTuple):
    """One parameter of a task that payloads fill."""

    name: str
    annotation: Any
    default: Any
    kind: Any

    @property
    def has_default(self) -> bool:
        return self.default is not inspect.Parameter.empty

    @property
    def field(self) -> Any:
        """As a field of a struct; left out where there is a default, so that the function's own holds."""
        if not self.has_default:
            return (self.name, self.annotation)
        return (self.name, typing.Union[self.annotation, msgspec.UnsetType], msgspec.UNSET)  # noqa: UP007 - any hint


class Codec:
    """Turns calls into payloads and payloads into calls, by a function's signature and annotations."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.context_name = ""
        self.decode_one: Callable[[bytes], Any] | None = None
        self.parameters = self._parameters(function)
        self._by_place_only = [one for one in self.parameters if one.kind == inspect.Parameter.POSITIONAL_ONLY]
        known = inspect.signature(function).parameters.values()
        self._signature = inspect.Signature([one for one in known if one.name != self.context_name])
        self._only = self.parameters[0] if len(self.parameters) == 1 else None
        self._checks_nothing = False
        self._many: msgspec.json.Decoder[Any] | None = None
        try:
            self._prepare()
        except (TypeError, RuntimeError) as error:
            raise InvalidSetting(f"no payload can hold the arguments of task {name}: {error}") from error

    def _prepare(self) -> None:
        if self._only is not None:
            annotation = self._only.annotation
            self._whole = msgspec.json.Decoder(annotation)
            if self._only.kind != inspect.Parameter.KEYWORD_ONLY:
                self.decode_one = self._whole.decode
            self._checks_nothing = annotation in (Any, object)
            self._many = msgspec.json.Decoder(list[annotation])  # type: ignore[valid-type]  # known only when it runs
            return
        placed = [one for one in self.parameters if one.kind != inspect.Parameter.KEYWORD_ONLY]
        fields = [one.field for one in self.parameters]
        self._by_name_type = msgspec.defstruct("Arguments", fields, forbid_unknown_fields=True, kw_only=True)
        self._by_place_type = msgspec.defstruct(
            "Arguments", [one.field for one in placed], array_like=True, forbid_unknown_fields=True
        )
        self._needs_names = [one.name for one in self.parameters if one not in placed and not one.has_default]
        if self.parameters:
            self._many = msgspec.json.Decoder(list[self._by_name_type])  # type: ignore[name-defined]  # made here
        self._by_name = msgspec.json.Decoder(self._by_name_type)
        self._by_place = msgspec.json.Decoder(self._by_place_type)

    def _parameters(self, function: Callable[..., Any]) -> list[_Parameter]:
        try:
            hints = typing.get_type_hints(function, include_extras=True)
            parameters = inspect.signature(function).parameters.values()
        except Exception as error:
            raise InvalidSetting(
                f"the annotations of task {self.name} can't be resolved: {error}", hint="import the names they use"
            ) from error
        self.result_of = _result_decoder(hints.get("return", Any))
        found = []
        for parameter in parameters:
            if _is_context(hints.get(parameter.name)):
                if self.context_name or parameter.kind == parameter.POSITIONAL_ONLY:
                    raise InvalidSetting(
                        f"task {self.name} takes its Context by name, and once", hint="write context: Context"
                    )
                self.context_name = parameter.name
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise InvalidSetting(
                    f"task {self.name} takes *{parameter.name}, which no payload can describe",
                    hint="name its parameters",
                )
            annotation = hints.get(parameter.name, Any)
            found.append(_Parameter(parameter.name, annotation, parameter.default, parameter.kind))
        return found

    # -- calls to payloads, results to values

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """A call as JSON, checked by decoding it as the worker will. Raises `InvalidInput`, naming the field."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidInput(
                f"task {self.name} can't be called so: {error}", hint=f"it takes {self._signature}"
            ) from None
        if self._only is None:
            return self._checked(bound.arguments)
        if self._only.name not in bound.arguments:
            return b""  # the one payload that is no value: the function's own default holds
        return self.encode_value(bound.arguments[self._only.name])

    def encode_value(self, value: Any) -> bytes:
        """An item of a batch as JSON: the value whole, or an object or array of arguments."""
        return self._checked(value)

    def _checked(self, value: Any) -> bytes:
        try:
            payload = _encode_json(value)
        except Exception as error:  # noqa: BLE001 - a value's own code may raise anything
            raise InvalidInput(
                f"the arguments of task {self.name} can't be written as JSON: {said(error)}",
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
        except Exception:  # noqa: BLE001 - the one that is refused will say why
            return None
        return payloads

    # -- payloads to calls

    def decode(self, payload: bytes, kind: int) -> Arguments:
        """The call that a payload describes. Raises `PayloadRefused`, naming the path of the field."""
        try:
            if kind == pack.JSON:
                return self._from_json(payload)
            return self._other(payload, kind)
        except PayloadRefused:
            raise
        except RecursionError:
            raise PayloadRefused("the payload is nested too deeply") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PayloadRefused(str(error)) from None
        except Exception as error:
            raise PayloadRefused(f"a type of the task refuses it: {said(error)}") from error

    def _from_json(self, payload: bytes) -> Arguments:
        if self._only is not None:
            if not payload and self._only.has_default:
                return (), {}
            return self._placed({self._only.name: self._whole.decode(payload)})
        first = payload.lstrip()[:1]
        if not self.parameters:
            return self.from_value(msgspec.json.decode(payload) if payload else None)
        if first == b"[":
            return self._filled(self._by_place.decode(payload), by_place=True)
        return self._filled(self._by_name.decode(payload))

    def _other(self, payload: bytes, kind: int) -> Arguments:
        if kind == pack.TEXT:
            return self.from_value(payload.decode("utf-8"))
        if kind == pack.SUPER_JSON:
            return self.from_value(revived(msgspec.json.decode(payload)))
        if kind == pack.MSGPACK:
            call = msgspec.msgpack.decode(payload, type=_Call)
            return self._from_named(self._named(call.args, call.kwargs))
        raise PayloadRefused(f"no payload has the kind {kind}")

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Positional and keyword arguments as keyword arguments."""
        names = [one.name for one in self.parameters if one.kind != inspect.Parameter.KEYWORD_ONLY]
        if len(args) > len(names):
            raise PayloadRefused(f"{len(args)} positional arguments for {len(names)} parameters")
        named = dict(zip(names, args, strict=False))
        if twice := named.keys() & kwargs.keys():
            raise PayloadRefused(f"{', '.join(sorted(twice))} is given by place and by name")
        return {**named, **kwargs}

    def _from_named(self, named: dict[str, Any]) -> Arguments:
        only = self._only
        if only is None:
            return self.from_value(named)
        if unknown := named.keys() - {only.name}:
            raise PayloadRefused(f"unknown arguments {', '.join(sorted(unknown))}")
        if only.name in named:
            return self.from_value(named[only.name])
        if only.has_default:
            return (), {}
        raise PayloadRefused(f"the argument {only.name} is missing")

    def from_value(self, value: Any) -> Arguments:
        """The call that a decoded value describes: the one argument, or an object or array of several."""
        if self._only is not None:
            return self._placed({self._only.name: msgspec.convert(value, self._only.annotation)})
        if not self.parameters:
            if value not in (None, {}, []):
                raise PayloadRefused(f"task {self.name} takes no arguments")
            return (), {}
        if isinstance(value, list | tuple):
            return self._filled(msgspec.convert(value, self._by_place_type), by_place=True)
        return self._filled(msgspec.convert(value, self._by_name_type))

    def _filled(self, found: Any, *, by_place: bool = False) -> Arguments:
        if by_place and self._needs_names:
            raise PayloadRefused(f"{', '.join(self._needs_names)} can only be given by name: send an object")
        values = ((one.name, getattr(found, one.name, msgspec.UNSET)) for one in self.parameters)
        return self._placed({name: value for name, value in values if value is not msgspec.UNSET})

    def _placed(self, values: dict[str, Any]) -> Arguments:
        """What a function takes by place only goes there; all else goes by name."""
        if not self._by_place_only:
            return (), values
        return tuple(values.pop(one.name, one.default) for one in self._by_place_only), values


_encode_json: Final = msgspec.json.Encoder().encode


class _Call(msgspec.Struct):
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


def said(error: BaseException) -> str:
    """An error in one line, whatever its class does with its words."""
    kind = type(error).__qualname__
    try:
        return f"{kind}: {error}"
    except Exception:  # noqa: BLE001 - an error that can't speak must not become another
        return kind


def _is_context(hint: Any) -> bool:
    """`Context`, or `Context | None`."""
    return hint is Context or (
        typing.get_origin(hint) in (typing.Union, types.UnionType) and Context in typing.get_args(hint)
    )


def _check_function(name: str, function: Any) -> None:
    if not inspect.isroutine(function):
        raise InvalidSetting(f"task {name} is made of {function!r}, which is no function", hint="write a def")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidSetting(
            f"task {name} is a generator, and a run has one result", hint="return a list, or map over its items"
        )


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
