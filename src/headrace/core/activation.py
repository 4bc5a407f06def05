"""Activations: runs that workers in any language fetch one by one, by an id and nothing else.

Rule 1: all activations of an environment are runs of one task, `LANE`, so that their ids are unique whatever they are
called, a claim walks one lane a queue, and one row holds activations of many task names. What each is called is in
its `Extra`.
Rule 2: the queue says application and namespace.
Rule 3: a report carries an id only, so the id says which attempt it is of, and how often that was not heard of in
time: what an earlier holder reports names something else, and is told apart wherever it arrives.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import msgspec

from headrace.foundation.errors import InvalidInput, StoreBroken

LANE: Final = "headrace.activation"
SEPARATOR: Final = ":"
MARK: Final = "~"
_MARKED: Final = re.compile(r"(?s)(.+)~([1-9][0-9]{0,9})\.(0|[1-9][0-9]{0,9})\Z")


class Delivery(NamedTuple):
    """Which hand-out an id on the wire names: `attempt` from 1, and how often that attempt was overdue before."""

    id: str
    attempt: int = 1
    overdue_count: int = 0


class Note(msgspec.Struct, omit_defaults=True, frozen=True):
    """What a span's note says of activations. `attempts_max` and `delay_s`: as a report changed them, None if none."""

    overdue_count: int = 0
    attempts_max: int | None = None
    delay_s: int | None = None

    def encode(self) -> str:
        """The note as text; none at all when it says nothing."""
        return "" if self == NO_NOTE else _encoder.encode(self).decode()


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(Note)
NO_NOTE: Final = Note()


def note_of(text: str) -> Note:
    """What `Note.encode` wrote."""
    if not text:
        return NO_NOTE
    try:
        return _decoder.decode(text)
    except msgspec.DecodeError as error:
        raise StoreBroken("the note of a span of activations is not one") from error


def queue_of(application: str, namespace: str) -> str:
    """The queue of an application's namespace. Raises `InvalidInput` for an application that can't be told apart."""
    if SEPARATOR in application:
        raise InvalidInput(
            f"an application's name has no {SEPARATOR!r}: {application!r}", hint="it parts application and namespace"
        )
    return f"{application}{SEPARATOR}{namespace}"


def wire_id(delivery: Delivery) -> str:
    """The id under which a run is handed out: its own the first time, a marked one from then on."""
    if delivery.attempt == 1 and not delivery.overdue_count:
        return delivery.id
    return f"{delivery.id}{MARK}{delivery.attempt}.{delivery.overdue_count}"


def delivery_of(name: str) -> Delivery:
    """What `wire_id` was made from."""
    found = _MARKED.match(name)
    return Delivery(name) if found is None else Delivery(found[1], int(found[2]), int(found[3]))
