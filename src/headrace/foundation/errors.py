"""Errors of Headrace, as types.

Rule 1: the type says who is at fault. `ClientFault`: the caller must change something before the same call can work.
`EngineFault`: the call was correct; the store, the disk or the network failed. Rule 2: an error says what was
attempted, with which ids, whether a retry can help, and what a person can do.
"""

from __future__ import annotations

from typing import ClassVar


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose.

    `retryable`: the same call may succeed later without a change. `code`: a stable word for programs. `status`: the
    HTTP status that fits. `exit_code`: the exit code of the command line.
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
    """The request is invalid; the same call will fail again."""

    code = "INVALID"
    status = 400
    exit_code = 2


class EngineFault(HeadraceError):
    """The call was correct; the store, the disk or the network failed."""

    retryable = True
    status = 503


class InvalidInput(ClientFault):
    """An argument, item or file is outside a stated bound or form."""


class InvalidSetting(ClientFault):
    """A setting has an unknown name or a value outside its bounds."""

    code = "INVALID_SETTING"


class NotFound(ClientFault):
    """This environment has no object with that id."""

    code = "NOT_FOUND"
    status = 404


class Conflict(ClientFault):
    """The request contradicts what is stored."""

    code = "CONFLICT"
    status = 409


class IllegalTransition(ClientFault):
    """A state change that the table of states does not allow; nothing was changed."""

    code = "ILLEGAL_TRANSITION"
    status = 409


class SessionEnded(EngineFault):
    """The session lapsed or ended: its leases belong to other sessions now, and a new session is required."""

    code = "SESSION_ENDED"
    status = 409
    retryable = False


class StoreUnavailable(EngineFault):
    """The store could not take the request, and nothing of it is durable. A retry can help."""

    code = "STORE_UNAVAILABLE"


class StoreUnreachable(StoreUnavailable):
    """The store did not answer: it is down, the connection was lost, or another process locks it."""


class StoreBroken(EngineFault):
    """The store is unusable: corrupt, or written by a newer version. A retry can't help."""

    code = "STORE_BROKEN"
    retryable = False


class SchemaOutdated(StoreBroken):
    """The database has an older schema than this code needs, or none, and this process must not migrate it."""

    code = "SCHEMA_OUTDATED"


class ObjectMissing(EngineFault):
    """An object is missing in the object store, or is not the one that was written there."""

    code = "OBJECT_MISSING"
    retryable = False
