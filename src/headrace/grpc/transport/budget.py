"""Memory for messages and processor time that peers share, with a bound for the server and one for each address.

A message counts from its first byte until its call has ended. A peer that fills its share gets RESOURCE_EXHAUSTED, and
leaves the rest to the others. Processor time counts for one turn of the event loop. A peer that used up its own time
continues in the next turn, after the others.
"""

from __future__ import annotations

from typing import Final

PEER_SHARE: Final = 2
"""All connections of one address may hold one in `PEER_SHARE` of the bytes."""
CONNECTION_SHARE: Final = 4
TURN_S: Final = 0.002
"""Processor time that all connections of one address may use before the event loop serves the others."""
SERVER_TURN_S: Final = 0.008
"""Processor time that all connections together may use before the event loop does its other work. Each connection may
always process one step.
"""
DISTRUST_S: Final = 60.0
"""Time after which an address that used up the allowance of a connection is trusted again."""
DISTRUSTED_MAX: Final = 4_096


class Budget:
    """Bytes of messages held by all connections of a process together, their processor time in the current turn of the
    event loop, and the addresses that exceeded the allowance of a connection.
    """

    __slots__ = ("_distrusted_s", "_peer_turns_s", "_turn_s", "bytes_max", "held_bytes", "peers")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.held_bytes = 0
        self.peers: dict[str, PeerShare] = {}
        self._turn_s = 0.0
        self._peer_turns_s: dict[str, float] = {}
        self._distrusted_s: dict[str, float] = {}

    def begin_turn(self) -> None:
        """Begin a turn of the event loop, in which no time was used."""
        self._turn_s = 0.0
        self._peer_turns_s.clear()

    def use_time(self, peer: str, seconds: float) -> None:
        """Count processor time of a peer in this turn."""
        self._turn_s += seconds
        self._peer_turns_s[peer] = self._peer_turns_s.get(peer, 0.0) + seconds

    def has_time(self, peer: str) -> bool:
        """True while a peer may process more in this turn."""
        return self._turn_s < SERVER_TURN_S and self._peer_turns_s.get(peer, 0.0) < TURN_S

    def distrust(self, peer: str, now_s: float) -> None:
        """Remember that a connection of this address used up its allowance: its next ones start with less."""
        self._distrusted_s.pop(peer, None)
        self._distrusted_s[peer] = now_s
        if len(self._distrusted_s) > DISTRUSTED_MAX:
            del self._distrusted_s[next(iter(self._distrusted_s))]

    def is_distrusted(self, peer: str, now_s: float) -> bool:
        """True if a connection of this address used up its allowance in the last `DISTRUST_S`."""
        distrusted_s = self._distrusted_s.get(peer)
        return distrusted_s is not None and now_s - distrusted_s < DISTRUST_S


class PeerShare:
    """Bytes held by all connections of one address."""

    __slots__ = ("connections_count", "held_bytes")

    def __init__(self) -> None:
        self.connections_count = 0
        self.held_bytes = 0


class Allotment:
    """The share of one connection. `peer` is its address, without the port; "" while it is unknown.

    Shares are never less than one message of `message_bytes_max`.
    """

    __slots__ = ("_share", "budget", "bytes_max", "held_bytes", "peer", "peer_bytes_max")

    def __init__(self, budget: Budget, message_bytes_max: int) -> None:
        self.budget = budget
        self.bytes_max = max(budget.bytes_max // CONNECTION_SHARE, message_bytes_max)
        self.peer_bytes_max = max(budget.bytes_max // PEER_SHARE, message_bytes_max)
        self.held_bytes = 0
        self.peer = ""
        self._share = PeerShare()

    def join(self, peer: str) -> None:
        """Count this connection to an address. Call it before anything is held."""
        self.peer = peer
        self._share = self.budget.peers.setdefault(peer, PeerShare())
        self._share.connections_count += 1

    def leave(self) -> None:
        """Forget the address, once nothing is held any more."""
        if self.peer:
            self._share.connections_count -= 1
            if not self._share.connections_count:
                del self.budget.peers[self.peer]
            self.peer = ""

    def hold(self, bytes_count: int) -> bool:
        """Count bytes that are held from now on; a negative number for released ones. True if a bound is exceeded."""
        budget, share = self.budget, self._share
        self.held_bytes += bytes_count
        share.held_bytes += bytes_count
        budget.held_bytes += bytes_count
        return (
            self.held_bytes > self.bytes_max
            or share.held_bytes > self.peer_bytes_max
            or budget.held_bytes > budget.bytes_max
        )

    @property
    def left_bytes(self) -> int:
        """Bytes that this connection may hold beside those it holds."""
        budget = self.budget
        return min(
            budget.bytes_max - budget.held_bytes,
            self.peer_bytes_max - self._share.held_bytes,
            self.bytes_max - self.held_bytes,
        )

    @property
    def excess(self) -> str:
        """Name the bound that is exceeded; empty if none is."""
        budget = self.budget
        if budget.held_bytes > budget.bytes_max:
            return f"all calls together hold more than {budget.bytes_max} bytes of messages"
        if self._share.held_bytes > self.peer_bytes_max:
            return f"the calls of this address hold more than {self.peer_bytes_max} bytes of messages"
        if self.held_bytes > self.bytes_max:
            return f"the calls of this connection hold more than {self.bytes_max} bytes of messages"
        return ""
