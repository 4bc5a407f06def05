"""The access declaration of the route of a request, and the proof that the request was admitted.

Rule 1: no body is read before its request is admitted. Rule 2: a body that announces more bytes than its route accepts
is refused before it is read.
"""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from headrace.foundation.access import Access
from headrace.http.requests.error_responses import TooLarge

_ACCESS: Final = "headrace.access"
_IS_ADMITTED: Final = "headrace.is_admitted"


def declare(request: Request, access: Access) -> None:
    """Set the declaration of a request: that of its route, or a narrower one."""
    request.scope[_ACCESS] = access


def access_of(request: Request) -> Access:
    """Return the declaration of a request."""
    access: Access = request.scope[_ACCESS]
    return access


def admit(request: Request) -> None:
    """Record that the client of a request may call its route. Raises `TooLarge`."""
    bytes_max = access_of(request).body_bytes_max
    content_length = request.headers.get("content-length", "")
    if bytes_max is not None and content_length.isdigit() and int(content_length[:20]) > bytes_max:
        raise TooLarge("Request body too large", hint=f"the limit is {bytes_max} bytes")
    request.scope[_IS_ADMITTED] = True


def is_admitted(request: Request) -> bool:
    """True after `admit`."""
    return _IS_ADMITTED in request.scope
