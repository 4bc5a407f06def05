"""Activations: runs that workers in any language fetch one by one, knowing only an id.

Rule 1: all activations of an environment are runs of one task, `LANE`. Their ids are therefore unique for all
task names, a claim reads one lane per queue, and one row holds activations of many task names. The task name of
each is in its `Extra`. Rule 2: the queue's name contains application and namespace. Rule 3: a report carries only an
id. By default that is the activation's own on every delivery, since workers use it as idempotency key. A fenced id also
names the lease, whose token grows with every lease of the run: the report of an earlier holder then names another
delivery, and is recognised on every server.
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
    """One delivery of an activation: its lease's `token`, from 1, and how often that lease put the run back before,
    because it could not tell whether a worker had received it.
    """

    id: str
    token: int = 1
    returns_count: int = 0


class Note(msgspec.Struct, omit_defaults=True, frozen=True):
    """The note of a span of activations. `attempts_max` and `delay_s`: as changed by a report, otherwise None."""

    overdue_count: int = 0
    attempts_max: int | None = None
    delay_s: int | None = None

    def encode(self) -> str:
        """Encode the note as text; empty for an empty note."""
        return "" if self == NO_NOTE else _encoder.encode(self).decode()


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(Note)
NO_NOTE: Final = Note()


def note_of(text: str) -> Note:
    """Decode what `Note.encode` wrote."""
    if not text:
        return NO_NOTE
    try:
        return _decoder.decode(text)
    except msgspec.DecodeError as error:
        raise StoreBroken("the note of a span of activations is invalid") from error


def queue_of(application: str, namespace: str) -> str:
    """Return the queue of an application's namespace. Raises `InvalidInput` for an ambiguous application name."""
    if SEPARATOR in application:
        raise InvalidInput(
            f"application: expected a name without {SEPARATOR!r}, got {application!r}",
            hint="the character separates application and namespace",
        )
    return f"{application}{SEPARATOR}{namespace}"


def fenced_id(delivery: Delivery) -> str:
    """Return the id that names a delivery: the activation's own for the first one, with a suffix for later ones."""
    if delivery.token == 1 and not delivery.returns_count:
        return delivery.id
    return f"{delivery.id}{MARK}{delivery.token}.{delivery.returns_count}"


def delivery_of(name: str) -> Delivery:
    """Return the delivery from which `fenced_id` made an id."""
    match = _MARKED.match(name)
    return Delivery(name) if match is None else Delivery(match[1], int(match[2]), int(match[3]))


def is_fenced(name: str) -> bool:
    """True if an id names a later delivery."""
    return _MARKED.match(name) is not None
