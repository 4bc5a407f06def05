"""What both ends of a connection have in common: what their machine has to say goes out, once a turn of the loop."""

from __future__ import annotations

import asyncio

from headrace.grpc.transport.connection import Machine


class Talking(asyncio.Protocol):
    """A machine on a transport. While the peer makes no room nothing is taken from the machine."""

    _transport: asyncio.Transport

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._loop = asyncio.get_running_loop()
        self._is_paused = False
        self._is_due = False

    def pause_writing(self) -> None:
        """The peer owes room."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """It made room."""
        self._is_paused = False
        self._flush()

    def _soon(self) -> None:
        """Write when this turn of the loop is over, together with whatever else there is to say by then."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_due = False
        while not self._is_paused and not self._transport.is_closing():
            data = self._machine.take()
            if not data:
                break
            self._transport.write(data)
