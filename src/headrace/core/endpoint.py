"""Tasks that live behind a URL: where a request may lead, how it is signed, and what an answer decides.

Signatures are those of the Standard Webhooks specification (standardwebhooks.com): `webhook-id`, `webhook-timestamp`,
and `webhook-signature`, which is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`; one for each secret,
parted by spaces, so that secrets can be changed without a pause. The id is the run's: the same on every attempt.
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
"""What an endpoint asks to wait is kept to a day: a slip of its clock must not park a run for years."""

_PREFIX: Final = "whsec_"
_TOO_MANY: Final = 429
_UNAVAILABLE: Final = 503
_EMBEDDING: Final = (
    ip_network("64:ff9b::/96"),
    ip_network("64:ff9b:1::/48"),
    ip_network("2002::/16"),
    ip_network("2001::/32"),
)
"""Addresses that are another address in disguise (NAT64, 6to4, Teredo): a gateway may lead them anywhere."""


class EndpointRefused(Exception):
    """The endpoint said no, or may not be asked: another attempt would end the same way."""


class EndpointFailed(Exception):
    """The endpoint did not do it, this time."""


class EndpointBusy(RetryAfter):
    """The endpoint asked to be left alone for a while."""

    def __init__(self, seconds: float, status: int) -> None:
        super().__init__(seconds)
        self.status = status

    def __str__(self) -> str:
        return f"the endpoint answered {self.status} and asks to be tried again in {self.seconds:g} s"


class EndpointAddress(NamedTuple):
    """Where an endpoint is. `target`: path and query."""

    scheme: str
    host: str
    port: int
    target: str


def place_of(url: object) -> EndpointAddress:
    """Raises `InvalidSetting` for what is no `https://` or `http://` URL of at most 2,048 characters."""
    if not isinstance(url, str) or not 0 < len(url) <= URL_CHARS_MAX or not url.isascii() or not url.isprintable():
        raise InvalidSetting(f"an endpoint's URL is 1 to {URL_CHARS_MAX} printable ASCII characters", hint=_FORM)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidSetting("an endpoint's URL can't be read", hint=_FORM) from None
    if parts.scheme not in ("https", "http") or not parts.hostname or port == 0 or " " in url:
        raise InvalidSetting("an endpoint is named as https://host/path", hint=_FORM)
    if "@" in parts.netloc or parts.fragment:
        raise InvalidSetting("an endpoint's URL holds neither a password nor a fragment", hint="pass headers=…")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return EndpointAddress(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), target)


_FORM: Final = "write https://host/path; http:// is for networks that are allowed by name"


def networks_of(names: Sequence[str]) -> tuple[Network, ...]:
    """Networks that may be reached though they are not public. Raises `InvalidSetting`."""
    if isinstance(names, str) or len(names) > NETWORKS_MAX:
        raise InvalidSetting(f"allow takes a list of at most {NETWORKS_MAX} networks", hint='write ["10.1.0.0/16"]')
    try:
        return tuple(ip_network(name) for name in names)
    except ValueError as error:
        raise InvalidSetting(f"allow: {error}", hint="write networks as 10.1.0.0/16 or fd00::/8") from None


def is_allowed(address: str, scheme: str, allowed: Sequence[Network]) -> bool:
    """Whether a request may go to an address that a name was resolved to.

    Public addresses over https, and anything in a network that is allowed by name. What is private, loopback, link
    local (where clouds keep their credentials), multicast, reserved, or any of these in disguise is refused.
    """
    try:
        found: Address = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    if any(found in network for network in allowed if network.version == found.version):
        return True
    if any(found in network for network in _EMBEDDING if network.version == found.version):
        return False
    return scheme == "https" and found.is_global and not found.is_multicast


def secrets_of(secret: object) -> tuple[bytes, ...]:
    """The keys of signatures, newest first: a text, or several. `whsec_` and base64, or any text of 16 bytes or more.

    Raises `InvalidSetting`, which does not repeat the secret.
    """
    given = [secret] if isinstance(secret, str) else secret
    if not isinstance(given, Sequence) or not 1 <= len(given) <= SECRETS_MAX:
        raise InvalidSetting(f"secret is a text, or 1 to {SECRETS_MAX} of them", hint=_HINT)
    keys = []
    for one in given:
        if not isinstance(one, str):
            raise InvalidSetting("a secret is a text", hint=_HINT)
        try:
            encoded = one.removeprefix(_PREFIX)
            key = base64.b64decode(encoded, validate=True) if one.startswith(_PREFIX) else one.encode()
        except (ValueError, UnicodeEncodeError):
            raise InvalidSetting("a secret that begins with whsec_ goes on in base64", hint=_HINT) from None
        if len(key) < SECRET_BYTES_MIN:
            raise InvalidSetting(f"a secret has {SECRET_BYTES_MIN} bytes or more", hint=_HINT)
        keys.append(key)
    return tuple(keys)


_HINT: Final = "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"


def signature(keys: Sequence[bytes], name: str, timestamp_s: int, body: bytes) -> str:
    """The `webhook-signature` of a request: one for each key, parted by spaces."""
    signed = b"%b.%d.%b" % (name.encode(), timestamp_s, body)
    digests = (hmac.digest(key, signed, hashlib.sha256) for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def judge(status: int, retry_after: str | None, now_us: int) -> None:
    """Return for a 2xx; else raise what the status decides.

    429 and 503 are tried again, when the endpoint says (`EndpointBusy`) or when the policy does; any other 5xx and
    1xx when the policy does (`EndpointFailed`). Every other 4xx is final, and so is a redirect, which is never
    followed: it could lead anywhere (`EndpointRefused`).
    """
    if 200 <= status < 300:
        return
    if status in (_TOO_MANY, _UNAVAILABLE) and (wait_s := _wait_s(retry_after, now_us)) is not None:
        raise EndpointBusy(wait_s, status)
    if status == _TOO_MANY or status >= 500 or status < 200:
        raise EndpointFailed(f"the endpoint answered {status}")
    if status < 400:
        raise EndpointRefused(f"the endpoint answered {status}: redirects are not followed; name the place it leads to")
    raise EndpointRefused(f"the endpoint answered {status}")


def _wait_s(told: str | None, now_us: int) -> float | None:
    """`Retry-After` in seconds or as a date; None for nothing that can be read."""
    if told is None:
        return None
    told = told.strip()
    if told.isascii() and told.isdigit():
        return min(float(told[:18]), RETRY_AFTER_S_MAX)
    try:
        at_s = parsedate_to_datetime(told).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(at_s - now_us / 1_000_000, 0.0), RETRY_AFTER_S_MAX)
