"""The handlers of an indexer by kind of event, and the decoding of events for them.

The kind of an event is one of its fields (`type`, unless the events' own classes say otherwise). Bytes are decoded
once: in one step if every kind has a tagged class of its own, otherwise by kind.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Awaitable, Callable, Sequence
from itertools import repeat
from typing import Any, Final, Literal, TypeAlias, Union

import msgspec

from headrace.core.sequencer import Position
from headrace.foundation.errors import ClientFault, InvalidInput, InvalidSetting
from headrace.runtime.tasks.bounds import check_name

Handler: TypeAlias = Callable[[Any, Any], Awaitable[None]]
Unknown: TypeAlias = Literal["refuse", "skip"]

KIND_FIELD: Final = "type"
SHOWN_CHARS: Final = 200
UNUSED_TAG: Final = "\0nobody"
"""A tag that no event has."""


class HandlerFailed(ClientFault):
    """A handler raised, hung, or got an event that it can't take; nothing after the last checkpoint was written.

    `__cause__` is the handler's own error.
    """

    code = "HANDLER_FAILED"


class EventKind:
    """One kind of event: its handler and the type that the handler takes."""

    __slots__ = ("convert", "decode", "handler", "name", "type")

    def __init__(self, name: str, handler: Handler, event_type: Any) -> None:
        self.name = name
        self.handler = handler
        self.type = event_type
        self.decode = msgspec.json.Decoder(event_type).decode
        self.convert = None if event_type in (dict, Any) else event_type


class HandlerRegistry:
    """The handlers of one indexer by kind."""

    def __init__(self, *, unknown: Unknown = "refuse") -> None:
        if unknown not in ("refuse", "skip"):
            raise InvalidSetting(f"unknown: expected 'refuse' or 'skip', got {unknown!r}", hint='unknown="skip"')
        self._unknown = unknown
        self.kinds: dict[str, EventKind] = {}
        self.by_type: dict[type, Handler] = {}
        self._field = KIND_FIELD
        self._decode_union: Callable[[bytes], Any] | None = None
        self._decode_kind: Callable[[bytes], Any] | None = None

    def add(self, name: str, function: Any) -> None:
        """Register a handler. Raises `InvalidSetting`."""
        check_name("kind of event", name)
        if name in self.kinds:
            raise InvalidSetting(f"two handlers are registered for {name!r}", hint="register one handler per kind")
        if not inspect.iscoroutinefunction(function):
            raise InvalidSetting(f"the handler of {name!r} must be an async function", hint="write async def")
        parameters = list(inspect.signature(function).parameters.values())
        if len(parameters) != 2:
            raise InvalidSetting(
                f"the handler of {name!r}: expected 2 parameters, got {len(parameters)}", hint="write (event, ctx)"
            )
        hints = _hints(function)
        event_type = hints.get(parameters[0].name, dict)
        if typing.get_origin(event_type) is dict:
            event_type = dict
        try:
            kind = EventKind(name, function, event_type)
        except TypeError as error:
            raise InvalidSetting(f"the event type of the handler of {name!r} can't be decoded: {error}") from error
        config = getattr(event_type, "__struct_config__", None)
        if config is not None and config.tag is not None:
            if config.tag != name:
                raise InvalidSetting(
                    f"expected an event type with the tag {name!r}, got {event_type.__name__} with {config.tag!r}",
                    hint=f"write @….on({config.tag!r})",
                )
            tagged = [other for other in self.kinds.values() if _tag_of(other.type) is not None]
            if tagged and config.tag_field != self._field:
                raise InvalidSetting(
                    f"the kind is in the field {self._field!r} for other events, in {config.tag_field!r} for {name!r}"
                )
            self._field = config.tag_field
        if isinstance(event_type, type) and event_type is not dict:
            if event_type in self.by_type:
                raise InvalidSetting(
                    f"two kinds of event have the class {event_type.__name__}", hint="give each kind a class of its own"
                )
            self.by_type[event_type] = function
        self.kinds[name] = kind
        self._decode_union = self._decode_kind = None

    def build_decoders(self) -> None:
        """Create the decoders. Raises `InvalidSetting` if no handler is registered."""
        if not self.kinds:
            raise InvalidSetting("the indexer has no handlers", hint='write @….on("kind") above an async function')
        types = [kind.type for kind in self.kinds.values()]
        if all(_tag_of(event_type) == name for event_type, name in zip(types, self.kinds, strict=True)):
            # One more type, so that there are two: for a single class the decoder would not check the tag.
            types.append(msgspec.defstruct("_Nobody", [], tag_field=self._field, tag=UNUSED_TAG))
            self._decode_union = msgspec.json.Decoder(Union[tuple(types)]).decode  # noqa: UP007 - made of a list
        named = msgspec.defstruct("_Kind", [("kind", str, msgspec.field(name=self._field))])
        self._decode_kind = msgspec.json.Decoder(named).decode

    def decode_all(
        self, events: Sequence[Any], positions: Sequence[Position], sources: str | Sequence[str]
    ) -> list[Any]:
        """Decode events for their handlers; None for those that are skipped. Raises `InvalidInput` at an invalid
        one.
        """
        union = self._decode_union
        if union is not None:
            try:
                if type(events[0]) is bytes:
                    return [union(event) for event in events]
            except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
                pass  # one of them is invalid or of another type: it is found below, one by one
        source_names = repeat(sources, len(events)) if isinstance(sources, str) else sources
        return [self._decode(*event) for event in zip(events, positions, source_names, strict=True)]

    def handler_of(self, event: Any) -> Handler | None:
        """Return the handler of a decoded event; None for a skipped one."""
        handler = self.by_type.get(type(event))
        if handler is None and isinstance(event, dict):
            handler = self.kinds[event[self._field]].handler
        return handler

    def _decode(self, event: Any, position: Position, source: str) -> Any:
        ids = {"source": source, "position": position}
        if type(event) in self.by_type:
            return event
        if isinstance(event, bytes | bytearray | memoryview):
            return self._decode_bytes(bytes(event), ids)
        if not isinstance(event, dict):
            class_names = ", ".join(sorted(kind.__name__ for kind in self.by_type)) or "dict"
            raise InvalidInput(
                f"the event at {position!r} is {_shown(event)}, which no handler takes",
                hint=f"expected JSON, a dict, or one of: {class_names}",
                **ids,
            )
        name = event.get(self._field)
        kind = self.kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            return self._unknown_kind(name, event, ids)
        try:
            return event if kind.convert is None else msgspec.convert(event, kind.convert)
        except msgspec.ValidationError as error:
            raise self._malformed(event, error, ids) from error

    def _decode_bytes(self, event: bytes, ids: dict[str, Any]) -> Any:
        assert self._decode_kind is not None
        try:
            name = self._decode_kind(event).kind
            kind = self.kinds.get(name)
            if kind is None:
                return self._unknown_kind(name, event, ids)
            return kind.decode(event)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._malformed(event, error, ids) from error

    def _unknown_kind(self, name: object, event: object, ids: dict[str, Any]) -> None:
        if self._unknown == "skip":
            return
        description = (
            f"of the kind {name!r:.{SHOWN_CHARS}}" if isinstance(name, str) else f"without the field {self._field!r}"
        )
        raise InvalidInput(
            f"the event at {ids['position']!r} is {description}, which no handler takes: {_shown(event)}",
            hint=f'registered kinds: {", ".join(self.kinds)}; unknown="skip" skips others',
            **ids,
        )

    def _malformed(self, event: object, error: Exception, ids: dict[str, Any]) -> InvalidInput:
        return InvalidInput(f"the event at {ids['position']!r} is invalid: {error}: {_shown(event)}", **ids)


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError as error:
        raise InvalidSetting(
            f"an annotation of {function.__name__} is undefined when the handler is registered: {error}",
            hint="define the event's class at the top level of the module",
        ) from error


def _tag_of(event_type: Any) -> Any:
    config = getattr(event_type, "__struct_config__", None)
    return None if config is None else config.tag


def _shown(event: object) -> str:
    text = event.decode(errors="replace") if isinstance(event, bytes) else repr(event)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
