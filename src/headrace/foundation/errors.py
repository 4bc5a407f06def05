"""What can go wrong, as types.

Rule 1: whose fault it is *is* the type. `ClientFault`: the caller must change something before the same call
can work. `EngineFault`: the call was fine, the machine room was not.
Rule 2: an error says what was tried, which ids it was about, whether trying again can help, and what a person
can do next.
"""

from __future__ import annotations

from typing import ClassVar


class HeadraceError(Exception):
    """Base of every error Headrace raises on purpose.

    `retryable`: the same call may succeed later without any change. `code`: a stable word for machines.
    `status`: the HTTP status that fits. `exit_code`: what the CLI ends with.
    """

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", **ids: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.ids = ids

    def __str__(self) -> str:
        named = ", ".join(f"{name}={value!r}" for name, value in self.ids.items())
        text = f"{self.message} ({named})" if named else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class ClientFault(HeadraceError):
    """The caller asked for something that can't be; the same call will fail again."""

    code = "INVALID"
    status = 400
    exit_code = 2


class EngineFault(HeadraceError):
    """The call was fine; the store, the disk or the network was not."""

    retryable = True
    status = 503


class InvalidInput(ClientFault):
    """An argument, item or file breaks a stated bound or form."""


class InvalidSetting(ClientFault):
    """A setting is named wrongly or holds a value outside its bounds."""

    code = "INVALID_SETTING"


class NotFound(ClientFault):
    """Nothing of that id is in this environment."""

    code = "NOT_FOUND"
    status = 404


class Conflict(ClientFault):
    """The request contradicts what is already durable."""

    code = "CONFLICT"
    status = 409


class IllegalTransition(ClientFault):
    """A state change that the table of states does not list; nothing was changed."""

    code = "ILLEGAL_TRANSITION"
    status = 409


class SessionEnded(EngineFault):
    """The session lapsed or ended: its leases belong to others now, and it must start anew."""

    code = "SESSION_ENDED"
    status = 409
    retryable = False


class StoreUnavailable(EngineFault):
    """The store did not take the request; nothing of it is durable. Trying again can help."""

    code = "STORE_UNAVAILABLE"


class StoreBroken(EngineFault):
    """The store can't be used as it is: corrupt, or written by a newer version. Trying again can't help."""

    code = "STORE_BROKEN"
    retryable = False


class ObjectMissing(EngineFault):
    """A payload's object is not in the object store, or is not what was written there."""

    code = "OBJECT_MISSING"
    retryable = False
