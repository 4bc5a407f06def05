"""gRPC status codes, and the conversion of Headrace errors to them."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from headrace.foundation.errors import EngineFault, HeadraceError

MESSAGE_CHARS_MAX: Final = 1_000


class Code(IntEnum):
    """gRPC status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_BY_STATUS: Final = {
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    408: Code.DEADLINE_EXCEEDED,
    409: Code.FAILED_PRECONDITION,
    413: Code.RESOURCE_EXHAUSTED,
    429: Code.RESOURCE_EXHAUSTED,
}


class GrpcError(Exception):
    """Ends a call with a status other than OK. Raised by handlers and by the client."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message[:MESSAGE_CHARS_MAX]

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


def to_grpc_error(error: HeadraceError) -> GrpcError:
    """Convert a Headrace error to a gRPC status. The message includes the hint."""
    if isinstance(error, EngineFault):
        code = Code.UNAVAILABLE if error.retryable else Code.ABORTED if error.status == 409 else Code.INTERNAL
    else:
        code = _BY_STATUS.get(error.status, Code.INVALID_ARGUMENT)
    return GrpcError(code, f"{error.message}; {error.hint}" if error.hint else error.message)
