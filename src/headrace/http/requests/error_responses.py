"""What goes wrong, as responses: RFC 9457 problems on `/v1`, the field's own shapes on `/api`.

Whose fault it was is the error's type; its status, its code and whether trying again helps come from there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from headrace.foundation.errors import ClientFault, EngineFault, HeadraceError, InvalidInput, NotFound

LOG: Any = structlog.get_logger("headrace.http")
PROBLEM: Final = "application/problem+json"
RETRY_AFTER_S: Final = 5
_encode: Final = msgspec.json.Encoder(enc_hook=str).encode


class Unauthorized(ClientFault):
    """Nobody knows who asks."""

    code = "UNAUTHORIZED"
    status = 401


class Forbidden(ClientFault):
    """Who asks is known, and may not do this."""

    code = "FORBIDDEN"
    status = 403


class TooLarge(ClientFault):
    """A body is over its bound."""

    code = "TOO_LARGE"
    status = 413


class UnsupportedType(ClientFault):
    """A body is not of a type that is taken here."""

    code = "UNSUPPORTED_TYPE"
    status = 415


class Unprocessable(InvalidInput):
    """The request is well formed and asks for what can't be."""

    code = "UNPROCESSABLE"
    status = 422


class Silent(ClientFault):
    """The peer sent nothing for longer than it is waited for."""

    code = "IDLE_TIMEOUT"
    status = 408
    retryable: ClassVar[bool] = True


class Gone(ClientFault):
    """The peer left in the middle of its request."""

    code = "CLIENT_GONE"
    status = 408
    retryable: ClassVar[bool] = True


class Throttled(ClientFault):
    """Too much was asked for in too short a time."""

    code = "RATE_LIMITED"
    status = 429
    retryable: ClassVar[bool] = True

    def __init__(self, message: str, *, headers: dict[str, str], **more: Any) -> None:
        super().__init__(message, **more)
        self.headers = headers


class Busy(EngineFault):
    """The server takes no more of this now: it stops, or has its hands full."""

    code = "BUSY"


def answer(value: object, status: int = 200, headers: dict[str, str] | None = None, *, kind: str = "") -> Response:
    """A JSON response."""
    return Response(_encode(value), status, headers, media_type=kind or "application/json")


def of_error(request: Request, error: Exception) -> Response:
    """The response that an error is, in the shape of the path it came from."""
    if isinstance(error, HTTPException):
        return _of_route(request, error)
    if not isinstance(error, HeadraceError):
        LOG.error("a request met an error that is nobody's", path=request.url.path, exc_info=error)
        error = EngineFault("something went wrong", hint="the server's log says more")
    headers = dict(error.headers) if isinstance(error, Throttled) else {}
    if isinstance(error, EngineFault) and error.retryable:
        headers["retry-after"] = str(RETRY_AFTER_S)
    if isinstance(error, Silent | Gone | TooLarge):
        headers["connection"] = "close"  # what is left of the body is not read
    if request.url.path.startswith("/api/"):
        return _of_api(request, error, headers)
    return problem(request, error, headers)


def problem(request: Request, error: HeadraceError, headers: dict[str, str]) -> Response:
    """An error as RFC 9457 has it, with what a person can do."""
    body: dict[str, object] = {
        "type": f"https://headrace.dev/problems/{error.code.lower().replace('_', '-')}",
        "title": (type(error).__doc__ or error.code).partition("\n")[0],
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "retryable": error.retryable,
        "request_id": request.scope.get("headrace.request_id", ""),
    }
    if error.hint:
        body["hint"] = error.hint
    headers["x-should-retry"] = "true" if error.retryable else "false"
    return answer(
        body | {name: value for name, value in error.ids.items() if name not in body},
        error.status,
        headers,
        kind=PROBLEM,
    )


def _of_api(request: Request, error: HeadraceError, headers: dict[str, str]) -> Response:
    """The shapes that clients of the field know."""
    if isinstance(error, Unauthorized) and not request.headers.get("authorization"):
        body = {
            "title": "Authorization Error",
            "status": 401,
            "type": "https://developer.mozilla.org/en-US/docs/Web/HTTP/Status/401",
            "detail": "No authorization header provided",
            "error": "No authorization header provided",
        }
        return answer(body, 401, headers, kind=PROBLEM)
    if isinstance(error, Forbidden):
        body = {"error": "Unauthorized", "code": "unauthorized", "param": "access_token", "type": "authorization"}
        return answer(body, 403, headers)
    if isinstance(error, Throttled) and error.ids.get("limit") is not None:
        return answer(
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
    return answer({"error": error.message, "code": error.code}, error.status, headers)


def _of_route(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if request.url.path.startswith("/api/"):
        said = "Method not allowed" if error.status_code == 405 else "Not found"
        if error.status_code == 405 and request.url.path.endswith("/items"):
            said = "Method not allowed. Use POST to stream batch items."
        return answer({"error": said}, error.status_code, headers)
    kind = type(
        "Route",
        (ClientFault,),
        {"status": error.status_code, "code": f"HTTP_{error.status_code}", "__doc__": error.detail},
    )
    return problem(request, kind(error.detail, hint="see /openapi.json"), headers)
