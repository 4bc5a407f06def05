"""Checks of `headrace doctor` for unsafe set-ups: open servers, missing keys, secrets that others can read."""

from __future__ import annotations

import asyncio
import http.client
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

from headrace.cli.administration.checks import OTHERS, CheckFailed, CheckNoted
from headrace.foundation.addresses import is_loopback
from headrace.foundation.settings import CONFIG_VARIABLE, FILE_NAME, hidden

if TYPE_CHECKING:
    from headrace.foundation.settings import Settings
    from headrace.runtime.engine import Engine

PROBE_S: Final = 2.0
PROBE_BYTES_MAX: Final = 64 * 1024
PROBED: Final[Mapping[str, bytes]] = {"/v1/about": b'"environment"', "/metrics": b"headrace_"}
"""Paths that need a key on a public address, and a text of their answers."""
EVERY_ADDRESS: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - a comparison


class UnsafeSetting(NamedTuple):
    """An unsafe setting or answer, and the remedy. `is_certain`: it gives access to strangers."""

    message: str
    hint: str
    is_certain: bool


async def exposure(engine: Engine, settings: Settings) -> str:
    """Find a server that answers without a key, and settings of one that would."""
    is_client = not engine.is_maintained_here
    host = (urlsplit(settings.store).hostname or "") if is_client else settings.host
    is_public = not is_loopback(host)
    problems = await _settings_problems(engine, settings) if is_public and not is_client else []
    base = settings.store if is_client else _base_url(settings)
    open_paths = await asyncio.to_thread(_open_paths, base) if base else None
    if is_public:
        problems += [
            UnsafeSetting(
                f"{base} answers {path} without a key",
                "serve without --no-auth, and let a proxy pass on the header Authorization"
                if path != "/metrics"
                else "let the proxy set X-Forwarded-For, or refuse /metrics there; docs/security.md",
                is_certain=True,
            )
            for path in open_paths or ()
        ]
        if is_client and urlsplit(settings.store).scheme == "http":
            problems.append(
                UnsafeSetting(f"the key is sent to {host} without TLS", "use an https:// URL", is_certain=False),
            )
    elif unkeyed := [path for path in open_paths or () if path != "/metrics"]:
        problems.append(
            UnsafeSetting(
                f"{base} answers {unkeyed[0]} without a key: every program of this machine has access",
                "serve without --no-auth, and create a key: headrace key create",
                is_certain=False,
            )
        )
    if problems:
        problems.sort(key=lambda problem: not problem.is_certain)
        kind = CheckFailed if problems[0].is_certain else CheckNoted
        raise kind("; ".join(problem.message for problem in problems), problems[0].hint)
    where = f"{host} is a loopback address" if not is_public else f"{host} is a public address"
    return f"{where}, {'no server answers there now' if open_paths is None else 'its server needs keys as it should'}"


async def _settings_problems(engine: Engine, settings: Settings) -> list[UnsafeSetting]:
    """List unsafe settings of a server on a public address."""
    problems = []
    if settings.delivery is not None and not settings.grpc_secrets:
        problems.append(
            UnsafeSetting(
                f"delivery is {settings.delivery} on {settings.host}, and grpc_secrets is not set",
                "set HEADRACE_GRPC_SECRETS",
                is_certain=True,
            )
        )
    if settings.api_key is None and not await engine.administration.has_keys():
        problems.append(
            UnsafeSetting(
                f"no API key exists, so no client can use a server on {settings.host}",
                "create one: headrace key create --scopes batches:write,batches:read",
                is_certain=False,
            )
        )
    if settings.tls_cert is None:
        problems.append(
            UnsafeSetting(
                f"a server on {settings.host} has no TLS: keys and payloads are readable on the way",
                "set HEADRACE_TLS_CERT and HEADRACE_TLS_KEY, or listen on 127.0.0.1 behind a proxy with TLS",
                is_certain=False,
            )
        )
    if not settings.grpc_secrets and any(not is_loopback(_host_of(target.authority)) for target in settings.push):
        problems.append(
            UnsafeSetting("activations are pushed without a signature", "set HEADRACE_GRPC_SECRETS", is_certain=False)
        )
    return problems


def _host_of(authority: str) -> str:
    return urlsplit(f"//{authority}").hostname or ""


def _base_url(settings: Settings) -> str:
    """Return the URL on which a server of these settings answers on this machine; empty if it is unknown."""
    if not settings.port:
        return ""
    host = EVERY_ADDRESS.get(settings.host, settings.host)
    scheme = "http" if settings.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"


def _open_paths(base: str) -> list[str] | None:
    """Return the paths that a server answers without a key; None if no server answers."""
    url = urlsplit(base)
    if url.scheme == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing secret is sent
        port = url.port or 443
        connection = http.client.HTTPSConnection(url.hostname or "", port, timeout=PROBE_S, context=context)
    else:
        connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=PROBE_S)  # type: ignore[assignment]  # its base class
    open_paths = []
    try:
        for path, text in PROBED.items():
            connection.request("GET", url.path.rstrip("/") + path, headers={"connection": "close"})
            answer = connection.getresponse()
            if answer.status == 200 and text in answer.read(PROBE_BYTES_MAX):
                open_paths.append(path)
            connection.close()
    except (OSError, http.client.HTTPException):
        return None
    return open_paths


async def secrets(settings: Settings) -> str:
    """Find files with secrets that other users of this machine may read: the settings file and the TLS key."""
    name = os.environ.get(CONFIG_VARIABLE) or FILE_NAME
    named = [
        setting
        for setting, source in settings.sources.items()
        if source == name and hidden(setting, str(settings.value(setting))) != str(settings.value(setting))
    ]
    files = {Path(name): f"holds {', '.join(named)}"} if named else {}
    if settings.tls_key is not None:
        files[Path(settings.tls_key)] = "is the TLS key"
    wide = [
        f"{path} ({path.stat().st_mode & 0o777:04o}) {what}"
        for path, what in files.items()
        if path.exists() and path.stat().st_mode & OTHERS
    ]
    if wide:
        raise CheckNoted(f"other users of this machine may read secrets: {'; '.join(wide)}", "chmod go-rwx")
    return "no file with secrets is readable by other users"
