"""Gates: decide which calls reach their handlers, by the access declarations of the methods."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, Final, Protocol

from headrace.foundation.access import Access
from headrace.grpc.transport.service_methods import CallContext
from headrace.grpc.transport.signing import HEADER
from headrace.grpc.transport.status import Code, GrpcError

AUTHORIZATION: Final = "authorization"


class Gate(Protocol):
    """Authentication of calls."""

    @property
    def is_open(self) -> bool:
        """True if clients need no credential."""
        ...

    def admit(self, access: Access, call: CallContext) -> Coroutine[Any, Any, None] | None:
        """Admit a call. Returns a coroutine if that takes a look into the store. Raises `GrpcError`, also in it."""
        ...


class SignatureGate:
    """A gate that knows signatures only. Without secrets every call is admitted."""

    def __init__(self, *, has_secrets: bool) -> None:
        self._has_secrets = has_secrets

    @property
    def is_open(self) -> bool:
        """True if there are no secrets."""
        return not self._has_secrets

    def admit(self, access: Access, call: CallContext) -> Coroutine[Any, Any, None] | None:
        """Admit a call that is signed, or to a method that is open."""
        if self._has_secrets and not (access.is_open or call.is_signed):
            raise unauthenticated()
        return None


def unauthenticated() -> GrpcError:
    """Return the status of a call without a valid signature, as Sentry's taskbroker words it."""
    return GrpcError(Code.UNAUTHENTICATED, "Authentication failed")


def message_bytes_max(access: Access, headers: Mapping[str, str], gate: Gate, bytes_max: int) -> int:
    """Return the bound of a call's message: a small one for a peer without a credential, before it is read."""
    declared = access.body_bytes_max
    if not (gate.is_open or HEADER in headers or AUTHORIZATION in headers):
        declared = access.unauthenticated_bytes_max
    return bytes_max if declared is None else min(declared, bytes_max)
