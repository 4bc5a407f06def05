"""Protection of a server without authentication against web pages in the browser of its user.

Any page may send requests to an address of this machine. A browser asks the server first only for requests that no
HTML form could send. Two rules therefore hold for requests without a key. Rule 1: an `Origin` must be the server's
own. Rule 2: a body must have a content type that no form can send.
"""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from headrace.http.requests.error_responses import Forbidden, UnsupportedType

_FORM_TYPES: Final = frozenset(("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"))


def check_not_foreign(request: Request) -> None:
    """Raise `Forbidden` for a request of another site's page, and `UnsupportedType` for a body of a form's type."""
    origin = request.headers.get("origin")
    server = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if origin is not None and origin.lower() != server.lower():
        raise Forbidden(
            f"a page of another origin may not use a server without authentication: expected {server}, "
            f"got {origin:.200}",
            hint="serve without --no-auth and send a key",
        )
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and content_type in _FORM_TYPES and _has_body(request):
        raise UnsupportedType(
            f"expected a body of type application/json or application/x-ndjson, got {content_type or 'no type'}",
            hint="set the header Content-Type; without authentication no type of a web page's form is accepted",
        )


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0").strip("0") != "" or "transfer-encoding" in request.headers
