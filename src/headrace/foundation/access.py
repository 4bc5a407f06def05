"""Access declarations: who may call a route or a gRPC method, and how many bytes of a call are read.

Every route and every method has one, and the servers enforce it. Documents and tests are made from the same
declarations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from headrace.foundation.limits import KIB

Credential = Literal["none", "key", "key_once_one_exists", "key_off_loopback", "signed_url"]
CREDENTIALS: Final[dict[Credential, str]] = {
    "none": "everyone",
    "key": "a key",
    "key_once_one_exists": "a key, as soon as the store has one",
    "key_off_loopback": "a key, unless the server listens on a loopback address",
    "signed_url": "a URL signed by the server",
}
"""Each kind of credential, for people. A gRPC call that is signed with a secret of the server needs no key."""

SMALL_BYTES_MAX: Final = 64 * KIB
"""Bytes of a small gRPC message, and of a message of a peer that sent no credential."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Access to one route or method.

    - `credential`: what a client must show. `scopes`: a key with any of them is enough.
    - `body_bytes_max`: the largest body or message that is read; None where only its items are bounded.
    - `unauthenticated_bytes_max`: how much of it is read before the client is authenticated.
    - `is_metered`: calls count against the request rate of the environment.
    - `is_of_server`: only keys of the server's own environment are accepted.
    """

    credential: Credential
    scopes: tuple[str, ...] = ()
    body_bytes_max: int | None
    unauthenticated_bytes_max: int = 0
    is_metered: bool = False
    is_of_server: bool = False

    def __post_init__(self) -> None:
        is_keyed = self.credential not in ("none", "signed_url")
        if is_keyed is not bool(self.scopes):
            raise ValueError(f"expected scopes with a key only, got {self.credential!r} and {self.scopes!r}")
        if self.body_bytes_max is not None and self.unauthenticated_bytes_max > self.body_bytes_max:
            raise ValueError(
                f"expected at most {self.body_bytes_max} bytes before authentication, "
                f"got {self.unauthenticated_bytes_max}"
            )
        if self.credential == "none" and self.unauthenticated_bytes_max != self.body_bytes_max:
            raise ValueError("expected equal bounds where no credential is needed")

    @property
    def is_open(self) -> bool:
        """True if no credential is ever needed."""
        return self.credential == "none"


def open_to_all(body_bytes_max: int = 0) -> Access:
    """Declare a route or method that needs no credential."""
    return Access(credential="none", body_bytes_max=body_bytes_max, unauthenticated_bytes_max=body_bytes_max)
