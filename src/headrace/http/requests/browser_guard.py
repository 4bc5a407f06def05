"""Protection of a server without authentication against web pages in the browser of its user.

Any page may send requests to an address of this machine. A browser asks the server first only for requests that no
HTML form could send. A page may also let its own name lead to this machine (DNS rebinding): then its requests are of
the same origin, and it reads the responses. Three rules therefore hold for requests without a key. Rule 1: the `Host`
must be a name of the server. Rule 2: an `Origin` must be the server's own. Rule 3: a body must have a content type that
no form can send.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from typing import Final

from starlette.requests import Request

from headrace.http.requests.error_responses import Forbidden, UnsupportedType, WrongHost

_HOST: Final = re.compile(r"(\[[^\]]*\]|[^:]*)(?::[0-9]*)?")
LOOPBACK_NAMES: Final = frozenset(("localhost", "127.0.0.1", "[::1]"))

_FORM_TYPES: Final = frozenset(("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"))


def check_host(request: Request, names: AbstractSet[str]) -> None:
    """Raise `WrongHost` for a request to another name than those of the server. The port is not compared."""
    host = request.headers.get("host", "").lower()
    parts = _HOST.fullmatch(host)
    if parts is None or parts[1] not in names:
        raise WrongHost(
            f"without authentication this server answers to its own names only: expected {', '.join(sorted(names))}, "
            f"got {host:.200}",
            hint="use one of these names, or add yours to the server's allowed_hosts",
        )


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
