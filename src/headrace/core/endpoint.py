"""HTTP endpoints of tasks: which addresses may be reached, signatures, and the meaning of status codes.

Signatures follow the Standard Webhooks specification (standardwebhooks.com): `webhook-id`, `webhook-timestamp`, and
`webhook-signature`, which is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`. There is one for each
secret, separated by spaces, so that secrets can be rotated without an interruption. The id is the run's: the same on
every attempt.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from headrace.core.retry import RetryAfter
from headrace.foundation.errors import InvalidSetting

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

URL_CHARS_MAX: Final = 2_048
SECRET_BYTES_MIN: Final = 16
SECRETS_MAX: Final = 8
NETWORKS_MAX: Final = 100
RETRY_AFTER_S_MAX: Final = 86_400.0
"""Longest wait that an endpoint may ask for: one day, so that a wrong clock can't delay a run for years."""

_PREFIX: Final = "whsec_"
_TOO_MANY: Final = 429
_UNAVAILABLE: Final = 503
_EMBEDDING: Final = (
    ip_network("64:ff9b::/96"),
    ip_network("64:ff9b:1::/48"),
    ip_network("2002::/16"),
    ip_network("2001::/32"),
)
"""Addresses that embed another address (NAT64, 6to4, Teredo): a gateway may forward them anywhere."""

_GLOBAL_UNICAST: Final = ip_network("2000::/3")
"""The IPv6 addresses that IANA has assigned to the internet. Any other one is local, reserved or obsolete."""

_SPECIAL: Final = (
    ip_network("2001::/23"),
    ip_network("2001:db8::/32"),
    ip_network("3fff::/20"),
    ip_network("192.0.0.0/24"),
    ip_network("192.88.99.0/24"),
)
"""Networks of IANA's special-purpose registries (protocols, documentation, the 6to4 relays) that `is_global` accepts
in some versions of Python.
"""


class EndpointRefused(Exception):
    """The endpoint rejected the request, or may not be reached; another attempt would end the same way."""


class EndpointFailed(Exception):
    """The endpoint failed; another attempt may succeed."""


class EndpointBusy(RetryAfter):
    """The endpoint asked for a retry after some time."""

    def __init__(self, seconds: float, status: int) -> None:
        super().__init__(seconds)
        self.status = status

    def __str__(self) -> str:
        return f"the endpoint responded {self.status} and asked for a retry in {self.seconds:g} s"


class EndpointAddress(NamedTuple):
    """The address of an endpoint. `target`: path and query."""

    scheme: str
    host: str
    port: int
    target: str


def parse_url(url: object) -> EndpointAddress:
    """Parse an `https://` or `http://` URL of at most 2,048 characters. Raises `InvalidSetting`."""
    if not isinstance(url, str) or not 0 < len(url) <= URL_CHARS_MAX or not url.isascii() or not url.isprintable():
        raise InvalidSetting(f"url: expected 1 to {URL_CHARS_MAX} printable ASCII characters", hint=_FORM)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidSetting("url: the URL of an endpoint is invalid", hint=_FORM) from None
    if parts.scheme not in ("https", "http") or not parts.hostname or port == 0 or " " in url:
        raise InvalidSetting("url: expected https://host/path", hint=_FORM)
    if "@" in parts.netloc or parts.fragment:
        raise InvalidSetting(
            "url: a password or a fragment is not allowed in the URL of an endpoint",
            hint="pass credentials in headers=…",
        )
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return EndpointAddress(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), target)


_FORM: Final = "write https://host/path; http:// is only allowed for networks in allow=[…]"


def networks_of(names: Sequence[str]) -> tuple[Network, ...]:
    """Parse the networks that may be reached although they are not public. Raises `InvalidSetting`."""
    if isinstance(names, str) or len(names) > NETWORKS_MAX:
        raise InvalidSetting(f"allow: expected a list of at most {NETWORKS_MAX} networks", hint='write ["10.1.0.0/16"]')
    try:
        return tuple(ip_network(name) for name in names)
    except ValueError as error:
        raise InvalidSetting(f"allow: {error}", hint="write networks as 10.1.0.0/16 or fd00::/8") from None


def is_allowed(address: str, scheme: str, allowed: Sequence[Network]) -> bool:
    """True if a request may go to an address to which a name was resolved.

    Public addresses over https are allowed, and all addresses of networks that are allowed by name. Private, loopback,
    link-local (where clouds serve credentials), multicast and reserved addresses are refused, and addresses that embed
    one of these. Of IPv6 only global unicast addresses are public.
    """
    try:
        parsed: Address = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    if any(parsed in network for network in allowed if network.version == parsed.version):
        return True
    if isinstance(parsed, IPv6Address) and parsed not in _GLOBAL_UNICAST:
        return False
    if any(parsed in network for network in (*_EMBEDDING, *_SPECIAL) if network.version == parsed.version):
        return False
    return scheme == "https" and parsed.is_global and not parsed.is_multicast


def secrets_of(secret: object) -> tuple[bytes, ...]:
    """Parse the signing keys, newest first: one string or several. `whsec_` and base64, or any string of 16 bytes or
    more.

    Raises `InvalidSetting`, which never contains the secret.
    """
    texts = [secret] if isinstance(secret, str) else secret
    if not isinstance(texts, Sequence) or not 1 <= len(texts) <= SECRETS_MAX:
        raise InvalidSetting(f"secret: expected a string, or 1 to {SECRETS_MAX} strings", hint=_HINT)
    keys = []
    for text in texts:
        if not isinstance(text, str):
            raise InvalidSetting("secret: expected a string", hint=_HINT)
        try:
            encoded = text.removeprefix(_PREFIX)
            key = base64.b64decode(encoded, validate=True) if text.startswith(_PREFIX) else text.encode()
        except (ValueError, UnicodeEncodeError):
            raise InvalidSetting("secret: expected base64 after the prefix whsec_", hint=_HINT) from None
        if len(key) < SECRET_BYTES_MIN:
            raise InvalidSetting(f"secret: expected at least {SECRET_BYTES_MIN} bytes", hint=_HINT)
        keys.append(key)
    return tuple(keys)


_HINT: Final = "generate one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"


def signature(keys: Sequence[bytes], name: str, timestamp_s: int, body: bytes) -> str:
    """Return the `webhook-signature` of a request: one for each key, separated by spaces."""
    signed = b"%b.%d.%b" % (name.encode(), timestamp_s, body)
    digests = (hmac.digest(key, signed, hashlib.sha256) for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def judge(status: int, retry_after: str | None, now_us: int) -> None:
    """Return for a 2xx status; otherwise raise the error that the status means.

    429 and 503 are retried at the time that the endpoint names (`EndpointBusy`), or by the policy; any other 5xx and
    1xx by the policy (`EndpointFailed`). Every other 4xx is final, and so is a redirect, which is never followed, since
    it could lead to any address (`EndpointRefused`).
    """
    if 200 <= status < 300:
        return
    if status in (_TOO_MANY, _UNAVAILABLE) and (wait_s := _wait_s(retry_after, now_us)) is not None:
        raise EndpointBusy(wait_s, status)
    if status == _TOO_MANY or status >= 500 or status < 200:
        raise EndpointFailed(f"the endpoint responded {status}")
    if status < 400:
        raise EndpointRefused(f"the endpoint responded {status}: redirects are not followed, use the final URL")
    raise EndpointRefused(f"the endpoint responded {status}")


def _wait_s(retry_after: str | None, now_us: int) -> float | None:
    """Parse `Retry-After`, in seconds or as a date; None if it is missing or invalid."""
    if retry_after is None:
        return None
    retry_after = retry_after.strip()
    if retry_after.isascii() and retry_after.isdigit():
        return min(float(retry_after[:18]), RETRY_AFTER_S_MAX)
    try:
        at_s = parsedate_to_datetime(retry_after).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(at_s - now_us / 1_000_000, 0.0), RETRY_AFTER_S_MAX)
