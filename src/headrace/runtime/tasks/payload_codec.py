"""Tasks by name, and the one table by which payloads decode, however they were received.

application/json         a task of one parameter takes the value whole; where that does not fit, an object whose
                         only key is the parameter's name holds it; a task of several takes an object as keyword
                         arguments or an array as positional ones; a `Context` parameter does not count
application/super+json   its `json` part, with its `meta` types where Python has them, then as JSON
text/plain               a string
application/store        a reference, fetched first (by the executor), then as what it refers to
application/msgpack      `{args, kwargs}`
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from headrace.core import pack
from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.runtime.tasks.bounds import ENCODABLE
from headrace.runtime.tasks.context import Context
from headrace.runtime.tasks.exception_info import error_line
from headrace.runtime.tasks.superjson import PayloadRefused, revive_types
from headrace.runtime.tasks.value_checks import BytesCheck, ResultCodec, ValueRefused, check_finite

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Parameter(NamedTuple):
    """A parameter of a task that payloads fill."""

    name: str
    annotation: Any
    default: Any
    kind: Any

    @property
    def has_default(self) -> bool:
        return self.default is not inspect.Parameter.empty

    @property
    def field(self) -> Any:
        """The parameter as a struct field; left out if it has a default, so that the function's own default applies."""
        if not self.has_default:
            return (self.name, self.annotation)
        return (self.name, typing.Union[self.annotation, msgspec.UnsetType], msgspec.UNSET)  # noqa: UP007 - any hint


class Codec:
    """Encodes calls as payloads and decodes payloads into calls, by a function's signature and annotations."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.context_name = ""
        self.decode_one: Callable[[bytes], Any] | None = None
        self.parameters = self._parameters(function)
        self._positional_only = [
            parameter for parameter in self.parameters if parameter.kind == inspect.Parameter.POSITIONAL_ONLY
        ]
        signature_parameters = inspect.signature(function, eval_str=True).parameters.values()
        self._signature = inspect.Signature(
            [parameter for parameter in signature_parameters if parameter.name != self.context_name]
        )
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
            named = msgspec.defstruct("Arguments", [(self._only.name, annotation)], forbid_unknown_fields=True)
            self._one_by_name = msgspec.json.Decoder(named)
            self._is_name_first = _ignores_key(self._whole, annotation, self._only.name)
            if self._only.kind != inspect.Parameter.KEYWORD_ONLY:
                self.decode_one = self._one_from_json if self._is_name_first else self._whole.decode
            self._checks_nothing = annotation in (Any, object)
            self._bytes = BytesCheck(annotation)
            self._many = msgspec.json.Decoder(list[annotation])  # type: ignore[valid-type]  # known only when it runs
            return
        positional = [parameter for parameter in self.parameters if parameter.kind != inspect.Parameter.KEYWORD_ONLY]
        fields = [parameter.field for parameter in self.parameters]
        self._by_name_type = msgspec.defstruct("Arguments", fields, forbid_unknown_fields=True, kw_only=True)
        self._by_position_type = msgspec.defstruct(
            "Arguments", [parameter.field for parameter in positional], array_like=True, forbid_unknown_fields=True
        )
        self._needs_names = [
            parameter.name for parameter in self.parameters if parameter not in positional and not parameter.has_default
        ]
        if self.parameters:
            self._many = msgspec.json.Decoder(list[self._by_name_type])  # type: ignore[name-defined]  # made here
        self._bytes = BytesCheck(self._by_name_type)
        self._bytes_by_position = BytesCheck(self._by_position_type)
        self._by_name = msgspec.json.Decoder(self._by_name_type)
        self._by_position = msgspec.json.Decoder(self._by_position_type)

    def _parameters(self, function: Callable[..., Any]) -> list[_Parameter]:
        try:
            hints = typing.get_type_hints(function, include_extras=True)
            parameters = inspect.signature(function).parameters.values()
        except Exception as error:
            raise InvalidSetting(
                f"the annotations of task {self.name} can't be resolved: {error}",
                hint="import the names that the annotations use",
            ) from error
        self.results = ResultCodec(hints.get("return", Any))
        payload_parameters = []
        for parameter in parameters:
            if _is_context(hints.get(parameter.name)):
                if self.context_name or parameter.kind == parameter.POSITIONAL_ONLY:
                    raise InvalidSetting(
                        f"task {self.name}: expected one Context parameter, passed by name",
                        hint="write context: Context",
                    )
                self.context_name = parameter.name
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise InvalidSetting(
                    f"task {self.name} takes *{parameter.name}, which a payload can't describe",
                    hint="declare each parameter by name",
                )
            annotation = hints.get(parameter.name, Any)
            payload_parameters.append(_Parameter(parameter.name, annotation, parameter.default, parameter.kind))
        return payload_parameters

    @property
    def result_of(self) -> Callable[[bytes], Any]:
        """The decoder of stored results."""
        return self.results.decode

    @property
    def signature(self) -> inspect.Signature:
        """The signature of the task without its `Context`."""
        return self._signature

    # -- calls to payloads, results to values

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """Encode a call as JSON, checked by decoding it as the worker will. Raises `InvalidInput`, naming the field."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidInput(
                f"task {self.name} was called with wrong arguments: {error}", hint=f"its signature is {self._signature}"
            ) from None
        if self._only is None:
            return self._checked(bound.arguments)
        if self._only.name not in bound.arguments:
            return b""  # an empty payload: the function's own default applies
        return self.encode_value(bound.arguments[self._only.name])

    def encode_value(self, value: Any) -> bytes:
        """Encode an item of a batch as JSON: the value whole, or an object or array of arguments."""
        return self._checked(value)

    def _checked(self, value: Any) -> bytes:
        try:
            payload = _encode_json(value)
        except Exception as error:  # noqa: BLE001 - a value's own code may raise anything
            raise InvalidInput(
                f"the arguments of task {self.name} can't be encoded as JSON: {error_line(error)}",
                hint=f"use {ENCODABLE}",
            ) from None
        try:
            check_finite(value, payload)
            self.decode(payload, pack.JSON)
            is_by_position = self._only is None and payload[:1] == b"["
            (self._bytes_by_position if is_by_position else self._bytes).check(value)
        except (PayloadRefused, ValueRefused) as error:
            place = "" if self._only is None else f"parameter {self._only.name}: "
            raise InvalidInput(
                f"the arguments don't fit task {self.name}: {place}{error}", hint=f"its signature is {self._signature}"
            ) from None
        return payload

    def encode_values(self, values: Sequence[Any]) -> list[bytes] | None:
        """Encode many items as JSON, checked together; None if one of them is invalid, so that each can be encoded
        alone.
        """
        try:
            payloads = [_encode_json(value) for value in values]
            joined = b"[" + b",".join(payloads) + b"]"
            check_finite(values, joined)
            if self._checks_nothing:
                return payloads
            is_by_position = self._only is None and any(payload[:1] == b"[" for payload in payloads)
            if self._many is None or is_by_position or not self._bytes.are_plain(values):
                return [self._checked(value) for value in values]
            self._many.decode(joined)
        except Exception:  # noqa: BLE001 - the one that is refused will say why
            return None
        return payloads

    # -- payloads to calls

    def decode(self, payload: bytes, kind: int) -> Arguments:
        """Decode a payload into a call. Raises `PayloadRefused`, naming the path of the field."""
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
            raise PayloadRefused(f"a type of the task refused the value: {error_line(error)}") from error

    def _from_json(self, payload: bytes) -> Arguments:
        if self._only is not None:
            if not payload and self._only.has_default:
                return (), {}
            return self._split_arguments({self._only.name: self._one_from_json(payload)})
        first = payload.lstrip()[:1]
        if not self.parameters:
            return self.from_value(msgspec.json.decode(payload) if payload else None)
        if first == b"[":
            return self._arguments_of(self._by_position.decode(payload), by_position=True)
        return self._arguments_of(self._by_name.decode(payload))

    def _one_from_json(self, payload: bytes) -> Any:
        """Return the argument of a task of one parameter: the value whole, or the value under the parameter's name."""
        assert self._only is not None
        name = self._only.name
        if not self._is_name_first:
            try:
                return self._whole.decode(payload)
            except msgspec.ValidationError:
                if payload.lstrip()[:1] != b"{" or not _has_only_key(msgspec.json.decode(payload), name):
                    raise
        elif not _has_only_key(msgspec.json.decode(payload), name):
            return self._whole.decode(payload)
        return getattr(self._one_by_name.decode(payload), name)

    def _other(self, payload: bytes, kind: int) -> Arguments:
        if kind == pack.TEXT:
            return self.from_value(payload.decode("utf-8"))
        if kind == pack.SUPER_JSON:
            return self.from_value(revive_types(msgspec.json.decode(payload)))
        if kind == pack.MSGPACK:
            call = msgspec.msgpack.decode(payload, type=_Call)
            return self._from_named(self._named(call.args, call.kwargs))
        raise PayloadRefused(f"unknown payload kind {kind}")

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return positional and keyword arguments as keyword arguments."""
        names = [parameter.name for parameter in self.parameters if parameter.kind != inspect.Parameter.KEYWORD_ONLY]
        if len(args) > len(names):
            raise PayloadRefused(f"expected at most {len(names)} positional arguments, got {len(args)}")
        named = dict(zip(names, args, strict=False))
        if duplicates := named.keys() & kwargs.keys():
            raise PayloadRefused(f"given both by position and by name: {', '.join(sorted(duplicates))}")
        return {**named, **kwargs}

    def _from_named(self, named: dict[str, Any]) -> Arguments:
        only = self._only
        if only is None:
            return self.from_value(named)
        if unknown := named.keys() - {only.name}:
            raise PayloadRefused(f"unknown arguments: {', '.join(sorted(unknown))}")
        if only.name in named:
            return self.from_value(named[only.name])
        if only.has_default:
            return (), {}
        raise PayloadRefused(f"missing argument: {only.name}")

    def from_value(self, value: Any) -> Arguments:
        """Return the call that a decoded value describes: the one argument, or an object or array of several."""
        if self._only is not None:
            return self._split_arguments({self._only.name: self._one_from_value(value)})
        if not self.parameters:
            if value not in (None, {}, []):
                raise PayloadRefused(f"expected no arguments for task {self.name}")
            return (), {}
        if isinstance(value, list | tuple):
            return self._arguments_of(msgspec.convert(value, self._by_position_type), by_position=True)
        return self._arguments_of(msgspec.convert(value, self._by_name_type))

    def _one_from_value(self, value: Any) -> Any:
        assert self._only is not None
        annotation, name = self._only.annotation, self._only.name
        if not (self._is_name_first and _has_only_key(value, name)):
            try:
                return msgspec.convert(value, annotation)
            except msgspec.ValidationError:
                if not _has_only_key(value, name):
                    raise
        return getattr(msgspec.convert(value, self._one_by_name.type), name)

    def _arguments_of(self, arguments: Any, *, by_position: bool = False) -> Arguments:
        if by_position and self._needs_names:
            raise PayloadRefused(f"keyword-only arguments need an object: {', '.join(self._needs_names)}")
        values = ((parameter.name, getattr(arguments, parameter.name, msgspec.UNSET)) for parameter in self.parameters)
        return self._split_arguments({name: value for name, value in values if value is not msgspec.UNSET})

    def _split_arguments(self, values: dict[str, Any]) -> Arguments:
        """Split values into positional-only and keyword arguments."""
        if not self._positional_only:
            return (), values
        return tuple(values.pop(parameter.name, parameter.default) for parameter in self._positional_only), values


_encode_json: Final = msgspec.json.Encoder().encode


class _Call(msgspec.Struct):
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


def _ignores_key(decoder: msgspec.json.Decoder[Any], annotation: Any, name: str) -> bool:
    """True if a type accepts an object with the key `name`, but has no field for it: it would be dropped silently."""
    if annotation in (Any, object):
        return False
    try:
        decoder.decode(msgspec.json.encode({name: None}))
    except Exception:  # noqa: BLE001 - the type's own code may raise anything
        return False
    from msgspec import inspect as types_of  # only here: few types accept such an object

    info = types_of.type_info(annotation)
    kinds = info.types if isinstance(info, types_of.UnionType) else (info,)
    objects = [kind for kind in kinds if hasattr(kind, "fields")]
    is_open = any(isinstance(kind, types_of.AnyType | types_of.DictType | types_of.CustomType) for kind in kinds)
    return bool(objects) and not is_open and all(name != field.encode_name for kind in objects for field in kind.fields)


def _has_only_key(value: Any, name: str) -> bool:
    return isinstance(value, dict) and value.keys() == {name}


def _is_context(hint: Any) -> bool:
    """`Context`, or `Context | None`."""
    return hint is Context or (
        typing.get_origin(hint) in (typing.Union, types.UnionType) and Context in typing.get_args(hint)
    )
