"""Push endpoints of activations: `application=http://host:port`, several separated by commas."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from headrace.foundation.errors import InvalidSetting

TARGETS_MAX: Final = 256
_APPLICATION: Final = re.compile(r"[^\x00-\x20=,\x7f]{1,200}\Z")
_HINT: Final = "write application=http://host:port, several separated by commas"


class PushTarget(NamedTuple):
    """One endpoint of an application: a worker's gRPC server."""

    application: str
    host: str
    port: int
    is_tls: bool

    @property
    def authority(self) -> str:
        """Return host and port as a request names them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def push_targets(text: str) -> tuple[PushTarget, ...]:
    """Return the endpoints of a text, in order; an application may have several. Raises `InvalidSetting`."""
    words = [word.strip() for word in text.split(",")]
    if len(words) > TARGETS_MAX:
        raise InvalidSetting(f"push: expected at most {TARGETS_MAX} endpoints, got {len(words)}")
    targets = tuple(_target(word) for word in words)
    if len(set(targets)) != len(targets):
        raise InvalidSetting(
            "push: expected different endpoints, got one twice for one application", hint="name each endpoint once"
        )
    return targets


def _target(word: str) -> PushTarget:
    application, _, url = word.partition("=")
    if not _APPLICATION.match(application) or not url:
        raise InvalidSetting("push: expected an application and its endpoint", hint=_HINT)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    else:
        if parts.scheme not in ("http", "https") or parts.path.strip("/") or parts.query or parts.fragment:
            host = None
        if parts.username is not None or parts.password is not None:
            host = None
    if not host or not host.isprintable() or " " in host or port == 0:
        # The URL is not repeated: it may hold a password.
        raise InvalidSetting(f"push: expected an http or https endpoint for {application!r}", hint=_HINT)
    is_tls = parts.scheme == "https"
    return PushTarget(application, host, port or (443 if is_tls else 80), is_tls)
