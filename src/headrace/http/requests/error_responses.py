"""Errors as HTTP responses: RFC 9457 problems on `/v1`, trigger.dev's formats on `/api`.

The error's class determines status, code and whether a retry can help. The first line of its docstring is the title of
the problem.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final

import msgspec
from msgspec import UNSET, UnsetType
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from headrace.foundation.errors import ClientFault, EngineFault, HeadraceError, InvalidInput, NotFound
from headrace.foundation.ids import session_name
from headrace.foundation.logs import get_logger

LOG: Any = get_logger("headrace.http")
PROBLEM: Final = "application/problem+json"
RETRY_AFTER_S: Final = 5
_SESSION_ID: Final = re.compile(r"session_[0-9a-z]{26}")
_encode: Final = msgspec.json.Encoder(enc_hook=str).encode


class Problem(msgspec.Struct, kw_only=True):
    """Error of `/v1`, in the form of RFC 9457. Ids of the objects it concerns are added as further fields."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool
    request_id: str
    hint: str | UnsetType = UNSET


class Unauthorized(ClientFault):
    """Authentication required."""

    code = "UNAUTHORIZED"
    status = 401


class Forbidden(ClientFault):
    """The credentials do not allow this operation."""

    code = "FORBIDDEN"
    status = 403


class WrongHost(ClientFault):
    """The request names another host than this server."""

    code = "WRONG_HOST"
    status = 421


class TooLarge(ClientFault):
    """The request body is too large."""

    code = "TOO_LARGE"
    status = 413


class UnsupportedType(ClientFault):
    """The content type or encoding of the request body is not supported."""

    code = "UNSUPPORTED_TYPE"
    status = 415


class Unprocessable(InvalidInput):
    """The request is well-formed but can't be carried out."""

    code = "UNPROCESSABLE"
    status = 422


class IdleTimeout(ClientFault):
    """The client sent nothing for too long."""

    code = "IDLE_TIMEOUT"
    status = 408
    retryable: ClassVar[bool] = True


class ClientGone(ClientFault):
    """The client disconnected before the end of its request."""

    code = "CLIENT_GONE"
    status = 408
    retryable: ClassVar[bool] = True


class Throttled(ClientFault):
    """Rate limit exceeded."""

    code = "RATE_LIMITED"
    status = 429
    retryable: ClassVar[bool] = True

    def __init__(self, message: str, *, headers: dict[str, str], **more: Any) -> None:
        super().__init__(message, **more)
        self.headers = headers


class TooManyStreams(Throttled):
    """The environment has its share of the server's streams."""

    code = "TOO_MANY_STREAMS"


class Busy(EngineFault):
    """The server does not accept this request now: it is stopping or at a limit."""

    code = "BUSY"


def loggable_path(path: str) -> str:
    """Return a path for a log line: a session id, which is a secret, is replaced with the session's name."""
    return _SESSION_ID.sub(lambda match: session_name(match[0]), path)


def json_response(
    value: object, status: int = 200, headers: dict[str, str] | None = None, *, kind: str = ""
) -> Response:
    """Build a JSON response."""
    return Response(_encode(value), status, headers, media_type=kind or "application/json")


def error_response(request: Request, error: Exception) -> Response:
    """Build the response for an error, in the format of the request's API."""
    if isinstance(error, HTTPException):
        return _route_error_response(request, error)
    if not isinstance(error, HeadraceError):
        LOG.error("http.request_failed", path=loggable_path(request.url.path), exc_info=error)
        error = EngineFault("internal error", hint="see the server's log")
    headers = dict(error.headers) if isinstance(error, Throttled) else {}
    if isinstance(error, EngineFault) and error.retryable:
        headers["retry-after"] = str(RETRY_AFTER_S)
    if isinstance(error, IdleTimeout | ClientGone | TooLarge):
        headers["connection"] = "close"  # the rest of the body is not read
    if request.url.path.startswith("/api/"):
        return _api_error_response(request, error, headers)
    return problem_response(request, error, headers)


def problem_response(request: Request, error: HeadraceError, headers: dict[str, str]) -> Response:
    """Build an RFC 9457 problem, with a hint for the reader."""
    body: dict[str, object] = msgspec.to_builtins(
        Problem(
            type=f"https://headrace.dev/problems/{error.code.lower().replace('_', '-')}",
            title=(type(error).__doc__ or error.code).partition("\n")[0],
            status=error.status,
            detail=error.message,
            code=error.code,
            retryable=error.retryable,
            request_id=request.scope.get("headrace.request_id", ""),
            hint=error.hint or UNSET,
        )
    )
    headers["x-should-retry"] = "true" if error.retryable else "false"
    return json_response(
        body | {name: value for name, value in error.ids.items() if name not in body},
        error.status,
        headers,
        kind=PROBLEM,
    )


def _api_error_response(request: Request, error: HeadraceError, headers: dict[str, str]) -> Response:
    """Build an error in the formats that trigger.dev's clients expect."""
    if isinstance(error, Unauthorized) and not request.headers.get("authorization"):
        body = {
            "title": "Authorization Error",
            "status": 401,
            "type": "https://developer.mozilla.org/en-US/docs/Web/HTTP/Status/401",
            "detail": "No authorization header provided",
            "error": "No authorization header provided",
        }
        return json_response(body, 401, headers, kind=PROBLEM)
    if isinstance(error, Forbidden):
        body = {"error": "Unauthorized", "code": "unauthorized", "param": "access_token", "type": "authorization"}
        return json_response(body, 403, headers)
    if isinstance(error, Throttled) and error.ids.get("limit") is not None:
        return json_response(
            {
                "title": "Rate Limit Exceeded",
                "status": 429,
                "type": "https://developer.mozilla.org/en-US/docs/Web/HTTP/Status/429",
                "detail": error.message,
                "error": error.message,
                **error.ids,
            },
            429,
            headers,
            kind=PROBLEM,
        )
    if isinstance(error, NotFound):
        headers.setdefault("x-should-retry", "true" if request.method == "GET" else "false")
    return json_response({"error": error.message, "code": error.code}, error.status, headers)


def _route_error_response(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if request.url.path.startswith("/api/"):
        message = "Method not allowed" if error.status_code == 405 else "Not found"
        if error.status_code == 405 and request.url.path.endswith("/items"):
            message = "Method not allowed. Use POST to stream batch items."
        return json_response({"error": message}, error.status_code, headers)
    kind = type(
        "Route",
        (ClientFault,),
        {"status": error.status_code, "code": f"HTTP_{error.status_code}", "__doc__": error.detail},
    )
    return problem_response(request, kind(error.detail, hint="GET /openapi.json lists the endpoints"), headers)
