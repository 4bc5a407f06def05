"""Connections of one server: a bound for all together, and one for each peer address.

At a bound the connection that has been idle longest is closed for a new one: of the same peer at its own bound, of all
at that of the server. A connection is idle while no handler works for it, however many bytes its peer sends. Without an
idle one the new connection is refused: the first of them are answered, and closed soon.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterator
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, Protocol

from headrace.foundation.logs import get_logger

LOG: Any = get_logger("headrace.connections")
REFUSED_MAX: Final = 32
"""Refused connections that are kept until they were answered."""
RESCAN_S_EACH: Final = 0.000_025
"""Pause after a search for an idle connection that found none, for each connection that was looked at."""
LOG_S: Final = 60.0


class Admission(enum.Enum):
    """Decision on a new connection. `REFUSED`: answer and close it. `DROPPED`: close it at once."""

    ADMITTED = "admitted"
    REFUSED = "refused"
    DROPPED = "dropped"


class HeldConnection(Protocol):
    """A connection as the table sees it."""

    @property
    def idle_since_s(self) -> float | None:
        """Time on the event loop's clock since which the connection is idle; None while a handler works for it."""

    def close_idle(self) -> None:
        """Close the connection, since another one needs its place."""


class _BoundedGroup:
    """Connections that share a bound."""

    __slots__ = ("_candidates", "_scan_again_s", "connections")

    def __init__(self) -> None:
        self.connections: dict[HeldConnection, None] = {}
        self._candidates: list[tuple[float, HeldConnection]] = []
        self._scan_again_s = 0.0

    def longest_idle(self, now_s: float) -> HeldConnection | None:
        """Return the connection that has been idle longest.

        The order is found once for many calls: a peer that opens connections fast does not cause a sort for each.
        """
        if (connection := self._next_candidate()) is not None:
            return connection
        if now_s < self._scan_again_s:
            return None
        idle = ((connection.idle_since_s, connection) for connection in self.connections)
        self._candidates = [(since_s, connection) for since_s, connection in idle if since_s is not None]
        self._candidates.sort(key=itemgetter(0), reverse=True)
        if not self._candidates:
            self._scan_again_s = now_s + RESCAN_S_EACH * len(self.connections)
        return self._next_candidate()

    def _next_candidate(self) -> HeldConnection | None:
        while self._candidates:
            since_s, connection = self._candidates.pop()
            if connection in self.connections and connection.idle_since_s == since_s:
                return connection
        return None


class ConnectionTable:
    """All connections of one server, used by one event loop."""

    def __init__(self, *, connections_max: int, peer_connections_max: int) -> None:
        self.connections_max = connections_max
        self.peer_connections_max = peer_connections_max
        self.closed_count = 0
        self.refused_count = 0
        self._all = _BoundedGroup()
        self._peers: dict[str, _BoundedGroup] = {}
        self._peer_of: dict[HeldConnection, str] = {}
        self._refused: set[HeldConnection] = set()
        self._log_again_s = 0.0

    def __len__(self) -> int:
        return len(self._all.connections)

    def __iter__(self) -> Iterator[HeldConnection]:
        return iter(tuple(self._all.connections))

    def admit(self, connection: HeldConnection, address: str, *, now_s: float) -> Admission:
        """Admit a new connection, if need be in the place of an idle one."""
        peer = network_of(address)
        group = self._peers.get(peer) or _BoundedGroup()
        if len(group.connections) >= self.peer_connections_max:
            idle = group.longest_idle(now_s)
        elif len(self) >= self.connections_max:
            idle = self._all.longest_idle(now_s)
        else:
            self._add(connection, peer, group)
            return Admission.ADMITTED
        self._log(peer, group, now_s)
        if idle is None:
            self.refused_count += 1
            if len(self._refused) >= REFUSED_MAX:
                return Admission.DROPPED
            self._refused.add(connection)
            return Admission.REFUSED
        self.closed_count += 1
        self.remove(idle)
        idle.close_idle()
        self._add(connection, peer, self._peers.get(peer) or group)
        return Admission.ADMITTED

    def remove(self, connection: HeldConnection) -> None:
        """Forget a connection that has ended."""
        self._refused.discard(connection)
        peer = self._peer_of.pop(connection, None)
        if peer is None:
            return
        del self._all.connections[connection]
        group = self._peers[peer]
        del group.connections[connection]
        if not group.connections:
            del self._peers[peer]

    def replace(self, connection: HeldConnection, successor: HeldConnection) -> None:
        """Put another object in the place of an admitted connection."""
        peer = self._peer_of.get(connection)
        if peer is not None:
            group = self._peers[peer]
            self.remove(connection)
            self._add(successor, peer, group)

    def _add(self, connection: HeldConnection, peer: str, group: _BoundedGroup) -> None:
        self._peers[peer] = group
        self._peer_of[connection] = peer
        self._all.connections[connection] = group.connections[connection] = None

    def _log(self, peer: str, group: _BoundedGroup, now_s: float) -> None:
        if now_s >= self._log_again_s:
            self._log_again_s = now_s + LOG_S
            LOG.warning(
                "connections.limit_reached",
                connections=len(self),
                peer=peer,
                peer_connections=len(group.connections),
                closed=self.closed_count,
                refused=self.refused_count,
            )


@lru_cache(1_024)
def network_of(address: str) -> str:
    """Return what counts as one peer: an IPv4 address, or the 64-bit network of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a local socket, or unknown
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(parsed) >> 64 << 64))
