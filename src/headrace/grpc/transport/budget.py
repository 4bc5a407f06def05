"""Memory for messages: one bound for the whole server, with a share for each peer address and each connection.

A message counts from its first byte until its call has ended. A peer that fills its share gets RESOURCE_EXHAUSTED, and
leaves the rest to the others.
"""

from __future__ import annotations

from typing import Final

PEER_SHARE: Final = 2
"""All connections of one address may hold one in `PEER_SHARE` of the bytes."""
CONNECTION_SHARE: Final = 4


class Budget:
    """Bytes of messages held by all connections of a process together."""

    __slots__ = ("bytes_max", "held_bytes", "peers")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.held_bytes = 0
        self.peers: dict[str, int] = {}


class Allotment:
    """The share of one connection. `peer` is its address, without the port; "" while it is unknown.

    Shares are never less than one message of `message_bytes_max`.
    """

    __slots__ = ("budget", "bytes_max", "held_bytes", "peer", "peer_bytes_max")

    def __init__(self, budget: Budget, message_bytes_max: int) -> None:
        self.budget = budget
        self.bytes_max = max(budget.bytes_max // CONNECTION_SHARE, message_bytes_max)
        self.peer_bytes_max = max(budget.bytes_max // PEER_SHARE, message_bytes_max)
        self.held_bytes = 0
        self.peer = ""

    def hold(self, bytes_count: int) -> None:
        """Count bytes that are held from now on; a negative number for released ones."""
        self.held_bytes += bytes_count
        budget, peer = self.budget, self.peer
        budget.held_bytes += bytes_count
        if peer:
            held = budget.peers.get(peer, 0) + bytes_count
            if held:
                budget.peers[peer] = held
            else:
                budget.peers.pop(peer, None)

    @property
    def left_bytes(self) -> int:
        """Bytes that this connection may hold beside those it holds."""
        budget = self.budget
        return min(
            budget.bytes_max - budget.held_bytes,
            self.peer_bytes_max - budget.peers.get(self.peer, 0),
            self.bytes_max - self.held_bytes,
        )

    @property
    def excess(self) -> str:
        """Name the bound that is exceeded; empty if none is."""
        budget = self.budget
        if budget.held_bytes > budget.bytes_max:
            return f"all calls together hold more than {budget.bytes_max} bytes of messages"
        if budget.peers.get(self.peer, 0) > self.peer_bytes_max:
            return f"the calls of this address hold more than {self.peer_bytes_max} bytes of messages"
        if self.held_bytes > self.bytes_max:
            return f"the calls of this connection hold more than {self.bytes_max} bytes of messages"
        return ""
