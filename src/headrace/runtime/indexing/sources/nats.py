"""Events from a NATS JetStream stream, in the order of its sequence numbers, which are the positions.

No message is acknowledged to the server, because the indexer's position is in its own database. The stream therefore
needs no durable consumer, and reading again after a rollback starts at a number.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from headrace.core.sequencer import Arrived, Position
from headrace.foundation.errors import InvalidInput, InvalidSetting, StoreUnavailable
from headrace.runtime.indexing.sources.source import Arrival

if TYPE_CHECKING:
    from nats.aio.client import Client

PIECE_EVENTS: Final = 500
WAIT_S: Final = 1.0
CONNECT_S: Final = 5.0
IDLE_S: Final = 30.0


class Nats:
    """The messages of a stream, each one JSON event. `subject` selects messages; with `follow` the source waits for
    more at the end.
    """

    def __init__(self, url: str, stream: str, *, subject: str, follow: bool) -> None:
        self._url = url
        self._stream = stream
        self._subject = subject
        self._follow = follow

    async def head(self) -> Position | None:
        """Return the stream's last sequence number."""
        client = await self._connected()
        try:
            info = await client.jetstream().stream_info(self._stream)
        finally:
            await client.close()
        last: int = info.state.last_seq
        return last

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """Yield the messages after a number. Raises `InvalidInput` if the server has deleted some of them."""
        from nats.errors import Error
        from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

        client = await self._connected()
        try:
            stream = client.jetstream()
            state = (await stream.stream_info(self._stream)).state
            first = 1 if after is None else int(after) + 1
            if after is not None and state.first_seq > first:
                raise InvalidInput(
                    f"the stream {self._stream!r} starts at {state.first_seq}, expected {first}",
                    hint="the server deleted messages: raise its limits, or start over with `headrace index reset`",
                )
            config = ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=max(first, 1),
                ack_policy=AckPolicy.NONE,
                inactive_threshold=IDLE_S,
            )
            subscription = await stream.pull_subscribe(self._subject, stream=self._stream, config=config)
            async for arrived in self._pulled(stream, subscription, first - 1):
                yield arrived
        except Error as error:
            raise StoreUnavailable(f"the stream {self._stream!r} can't be read: {error}") from error
        finally:
            with suppress(Exception):
                await client.close()

    async def _pulled(self, stream: Any, subscription: Any, seen: int) -> AsyncIterator[Arrival]:
        from nats.errors import TimeoutError as Nothing

        last = (await stream.stream_info(self._stream)).state.last_seq
        while self._follow or seen < last:
            try:
                messages = await subscription.fetch(PIECE_EVENTS, timeout=WAIT_S)
            except (TimeoutError, Nothing):
                if not self._follow:
                    return
                continue
            numbers = [message.metadata.sequence.stream for message in messages]
            fresh = [(number, message.data) for number, message in zip(numbers, messages, strict=True) if number > seen]
            if fresh:
                seen = fresh[-1][0]
                yield Arrived([number for number, _ in fresh], [data for _, data in fresh])

    async def _connected(self) -> Client:
        try:
            import nats
        except ModuleNotFoundError:
            raise InvalidSetting(
                "a NATS source requires the package nats-py", hint="pip install 'headrace[nats]'"
            ) from None
        try:
            return await nats.connect(
                self._url, connect_timeout=int(CONNECT_S), max_reconnect_attempts=3, error_cb=_quiet
            )
        except Exception as error:
            raise StoreUnavailable(f"the NATS server {self._url} can't be reached: {error}") from error


async def _quiet(_: Exception) -> None:
    """Ignore errors of the connection; calls raise them."""
