"""What one end of a connection says: streams, their windows, and messages that wait for room.

A small answer is one piece of bytes, headers, message and status. A message that is larger than the peer's windows or a
frame waits in its stream's queue, and goes out in turn with others as `take` is called and room is made.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import FRAME_BYTES, Fault
from headrace.grpc.transport.headers import Headers, literal, percent
from headrace.grpc.transport.status import Code

STREAM_WINDOW: Final = 256 * 1024
"""What a peer may send on a stream before it hears from us; opened again as the bytes come."""

TAKE_BYTES: Final = 256 * 1024
"""About what one `take` hands out of messages that wait for room."""

LAST_ID: Final = 2**31 - 1
PATIENCE_MAX: Final = 2_000
PAYING_BYTES: Final = 1_024
"""A frame of ours of this size pays for the window updates that it will bring."""

PREFIX_BYTES: Final = 5
"""Before each message: whether it is compressed, and its length."""

CONTENT_TYPE: Final = "application/grpc"
ENCODINGS: Final = "identity,gzip"
_ANSWER: Final = b"\x88" + literal("content-type", CONTENT_TYPE) + literal("grpc-accept-encoding", ENCODINGS)
_DONE: Final = literal("grpc-status", "0")
_ANSWER_HEAD: Final = len(_ANSWER).to_bytes(3, "big") + bytes((frames.HEADERS, frames.END_HEADERS))
_DONE_HEAD: Final = len(_DONE).to_bytes(3, "big") + bytes((frames.HEADERS, frames.END_HEADERS | frames.END_STREAM))


class Budget:
    """Bytes of messages held by every connection of a process together."""

    __slots__ = ("bytes_max", "held_bytes")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.held_bytes = 0


class Stream:
    """One call on a connection. `is_heard`: the peer has said all; `is_said`: we have."""

    __slots__ = (
        "body",
        "credit",
        "expected",
        "fed_us",
        "headers",
        "id",
        "is_begun",
        "is_heard",
        "is_said",
        "queue",
        "tail",
        "trailers",
        "window",
    )

    def __init__(self, stream_id: int, window: int) -> None:
        self.id = stream_id
        self.headers: Headers | None = None
        self.trailers: Headers | None = None
        self.body: bytes | bytearray = b""
        self.expected = -1
        self.fed_us = 0
        self.credit = STREAM_WINDOW
        self.window = window
        self.queue: deque[memoryview] = deque()
        self.tail: bytes | None = None
        self.is_begun = False
        self.is_heard = False
        self.is_said = False


class Sender:
    """The saying half of a machine. `sent_bytes` counts what went out of messages, `pending_bytes` waits for room."""

    def __init__(self, budget: Budget, *, is_client: bool) -> None:
        self.is_client = is_client
        self.is_leaving = False
        self.last_id = 0
        self.pending_bytes = 0
        self.sent_bytes = 0
        self._budget = budget
        self._streams: dict[int, Stream] = {}
        self._lingering: set[int] = set()
        self._queued: dict[int, Stream] = {}
        self._window = frames.WINDOW_FIRST
        self._stream_window = frames.WINDOW_FIRST
        self._frame_max = FRAME_BYTES
        self._patience = PATIENCE_MAX
        self._next_id = 1
        self._out: list[bytes] = []

    def take(self) -> bytes:
        """What is to be written now; nothing when the peer has no room, or there is nothing to say."""
        if self._queued and self._window > 0:
            self._pump()
        if not self._out:
            return b""
        out, self._out = self._out, []
        return out[0] if len(out) == 1 else b"".join(out)

    @property
    def streams_count(self) -> int:
        """Calls under way, with those whose handlers have yet to end."""
        return len(self._streams) + len(self._lingering)

    @property
    def is_spent(self) -> bool:
        """Whether a client has used up nearly all numbers there are, and should begin a new connection."""
        return self._next_id > LAST_ID - 2_000

    def answer(self, stream_id: int, message: bytes) -> None:
        """End a call with its message."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        size = PREFIX_BYTES + len(message)
        if self._queued or stream.is_begun or size > min(self._window, stream.window, self._frame_max):
            self.say(stream_id, message)
            self.fail(stream_id, Code.OK, "")
            return
        self._window -= size
        self.sent_bytes += size
        word = stream_id.to_bytes(4, "big")
        parts = (_ANSWER_HEAD, word, _ANSWER, size.to_bytes(3, "big"), b"\x00\x00", word)
        self._out.append(b"".join((*parts, b"\x00", len(message).to_bytes(4, "big"), message, _DONE_HEAD, word, _DONE)))
        self._forget(stream)

    def say(self, stream_id: int, message: bytes) -> None:
        """One message of an answer that may have several."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if not stream.is_begun:
            stream.is_begun = True
            self._out.append(frames.frame(frames.HEADERS, frames.END_HEADERS, stream_id, _ANSWER))
        self._queue(stream, message)

    def fail(self, stream_id: int, code: Code, what: str) -> None:
        """End a call with its status; OK ends one whose messages were said."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if code is Code.OK:
            status = _DONE
        else:
            status = literal("grpc-status", str(int(code))) + literal("grpc-message", percent(what))
            if code is Code.UNIMPLEMENTED and not stream.is_begun:
                status += literal("grpc-accept-encoding", ENCODINGS)
        self._end(stream, status if stream.is_begun else b"\x88" + literal("content-type", CONTENT_TYPE) + status)

    def _end(self, stream: Stream, block: bytes) -> None:
        """The last headers of an answer, behind what of it still waits."""
        if stream.tail is not None:
            return
        tail = frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream.id, block)
        if not stream.is_heard:
            tail += frames.rst_stream(stream.id, Fault.NO_ERROR)
        if stream.queue:
            stream.tail = tail
        else:
            self._out.append(tail)
            self._forget(stream)

    def call(self, block: bytes, message: bytes) -> int:
        """A client's call; answers its number."""
        stream_id = self._next_id
        self._next_id += 2
        stream = self._streams[stream_id] = Stream(stream_id, self._stream_window)
        opening = frames.head(len(block), frames.HEADERS, frames.END_HEADERS, stream_id)
        size = PREFIX_BYTES + len(message)
        if self._queued or size > min(self._window, stream.window, self._frame_max):
            self._out.append(opening + block)
            self._queue(stream, message)
            stream.tail = b""
            return stream_id
        self._window -= size
        self.sent_bytes += size
        stream.is_said = True
        data = frames.head(size, frames.DATA, frames.END_STREAM, stream_id)
        self._out.append(b"".join((opening, block, data, b"\x00", len(message).to_bytes(4, "big"), message)))
        return stream_id

    def reset(self, stream_id: int, fault: Fault) -> None:
        """Give a stream up."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._out.append(frames.rst_stream(stream_id, fault))
            self._forget(stream)

    def abandon(self, stream_id: int, code: Code, what: str) -> None:
        """End a call with its status though its handler has yet to end: it counts until `done`."""
        self._lingering.add(stream_id)
        self.fail(stream_id, code, what)

    def done(self, stream_id: int) -> None:
        """The handler of a stream that was given up has ended."""
        self._lingering.discard(stream_id)

    def ping(self) -> None:
        """Ask the peer for a sign of life."""
        self._out.append(frames.frame(frames.PING, 0, 0, b"headrace"))

    def leave(self) -> None:
        """Take no new streams; those under way may end."""
        if not self.is_leaving:
            self.is_leaving = True
            self._out.append(frames.goaway(self.last_id, Fault.NO_ERROR))

    def _queue(self, stream: Stream, message: bytes) -> None:
        framed = b"\x00" + len(message).to_bytes(4, "big") + message
        stream.queue.append(memoryview(framed))
        self.pending_bytes += len(framed)
        self._budget.held_bytes += len(framed)
        self._queued[stream.id] = stream

    def _pump(self) -> None:
        """Frames of the messages that wait, a frame a stream in turn, as far as there is room."""
        left = TAKE_BYTES
        while left > 0:
            sent = 0
            for stream in tuple(self._queued.values()):
                room = min(self._window, stream.window, self._frame_max)
                if room <= 0:
                    continue
                sent += self._pump_one(stream, room)
            if not sent:
                return
            left -= sent

    def _pump_one(self, stream: Stream, room: int) -> int:
        first = stream.queue[0]
        piece, rest = first[:room], first[room:]
        size = len(piece)
        self._window -= size
        stream.window -= size
        self.pending_bytes -= size
        self._budget.held_bytes -= size
        self.sent_bytes += size
        if size >= PAYING_BYTES:
            self._patience = min(PATIENCE_MAX, self._patience + 2)
        if rest:
            stream.queue[0] = rest
        else:
            stream.queue.popleft()
        is_last = not stream.queue and stream.tail is not None
        flags = frames.END_STREAM if is_last and self.is_client else 0
        self._out.append(b"".join((frames.head(size, frames.DATA, flags, stream.id), piece)))
        if not stream.queue:
            del self._queued[stream.id]
            if is_last:
                stream.is_said = True
                if not self.is_client:
                    self._out.append(stream.tail or b"")
                    self._forget(stream)
        return size

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.id, None)
        self._queued.pop(stream.id, None)
        unsent = sum(map(len, stream.queue))
        self.pending_bytes -= unsent
        self._budget.held_bytes -= len(stream.body) + unsent
