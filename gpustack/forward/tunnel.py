"""Many byte streams over one connection: how requests reach a worker that nobody can dial.

    tunnel = Tunnel(accept=lambda: Connection(server))    # a relay's end, which dialled
    tunnel = Tunnel()                                     # a gateway's end
    transport.set_protocol(tunnel); tunnel.connection_made(transport)
    tunnel.open(protocol)                                 # only where the other end accepts
    tunnel.leave()                                        # at either end: another should be found

To its protocol each stream is a connection of its own, with back-pressure of its own: a reader that
is slow holds up nobody else. What ends the tunnel ends its streams, and nothing else.

A frame is kind (1 byte), stream (4), length (4) and so many bytes. An end that breaks these rules
ends the tunnel. Each end says something at least every `beat_s`, so that no NAT forgets the
connection, and gives a silent one up after `silence_s`.
"""

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import Any, Final, cast

__all__ = ["PROTOCOL", "Stream", "Tunnel"]

logger = logging.getLogger(__name__)

#: What the connection is upgraded to.
PROTOCOL: Final = b"gpustack-tunnel/1"

_HEAD: Final = struct.Struct(">BII")
_CREDIT: Final = struct.Struct(">I")
OPEN, DATA, CREDIT, CLOSE, RESET, ALIVE, LEAVING, LEFT = range(1, 9)

#: Of one stream, on their way or not taken yet: a token stream never waits for credit, and a fast
#: one over a round trip of 50 ms still gets 5 MB/s.
WINDOW_BYTES: Final = 256 * 1024
FRAME_BYTES: Final = 32 * 1024
#: Frames of one turn of the event loop leave together, up to this.
_BATCH_BYTES: Final = 128 * 1024
#: Of what a stream's protocol has written and is not sent, above which it has to wait.
_WAITING_BYTES: Final = 64 * 1024
#: NATs and firewalls forget a connection after 30 s or more without a packet.
BEAT_S: Final = 20.0
SILENCE_S: Final = 50.0


class Broken(Exception):
    """The other end broke the rules."""


class Tunnel(asyncio.Protocol):
    """One end of a tunnel; see the module.

    Args:
        accept: makes the protocol of a stream that the other end opens; None: it may open none.
        changed: called when `leaving` or `over` has changed.

    Attributes:
        leaving: one of the ends is about to go.
        left: the other end opens no stream any more.
        over: it has ended.
    """

    def __init__(
        self,
        *,
        accept: Callable[[], asyncio.Protocol] | None = None,
        changed: Callable[["Tunnel"], None] = lambda _: None,
        beat_s: float = BEAT_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.over = False
        self.congested = False  # the connection takes no more for now
        self._accept = accept
        self._changed = changed
        self._beat_s, self._silence_s = beat_s, silence_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, Stream] = {}
        self._waiting: dict[int, Stream] = {}  # have something to send once there is room
        self._last = 0
        self._rest = b""
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._heard_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._said = self._told = False  # this end, the other has said that it is about to go
        self.leaving = False
        self.left = asyncio.Event()

    @property
    def usable(self) -> bool:
        """Whether streams can be opened here."""
        takes = self._accept is None and not self._told
        return self._transport is not None and not self.over and takes

    def open(self, protocol: asyncio.Protocol) -> None:
        """Open a stream; `protocol` has it when this returns.

        Raises:
            ConnectionRefusedError: the tunnel takes none.
        """
        if not self.usable:
            raise ConnectionRefusedError("the tunnel takes no new streams")
        self._last += 1
        self.send(OPEN, self._last)
        self._begin(self._last, protocol)

    def leave(self) -> None:
        """Say that this end is about to go.

        One that opens streams may do so until it ends. One that accepts them gets no more once
        `left` is set, and the tunnel ends with the last of those that there are.
        """
        if not self._said and not self.over:
            self.leaving = self._said = True
            self.send(LEAVING, 0)
            self._changed(self)

    def abort(self) -> None:
        """End it and its streams at once."""
        if self._transport is not None:
            self._transport.abort()

    def facts(self, name: str, default: Any = None) -> Any:
        return default if self._transport is None else self._transport.get_extra_info(name, default)

    # --- asyncio.Protocol ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(self._beat_s, self._beat)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        data = self._rest + data if self._rest else data
        at, size = 0, len(data)
        try:
            while size - at >= _HEAD.size and not self.over:
                kind, number, length = _HEAD.unpack_from(data, at)
                end = at + _HEAD.size + _bounded(length)
                if end > size:
                    break
                self._take(kind, number, data[at + _HEAD.size : end])
                at = end
        except Broken:
            self.abort()
            return
        self._rest = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True
        self._transport = None
        self.left.set()
        if self._timer is not None:
            self._timer.cancel()
        streams, self._streams = self._streams, {}
        self._waiting.clear()
        self._out.clear()
        for stream in streams.values():
            stream.lost(exc or ConnectionResetError("the tunnel has ended"))
        self._changed(self)

    def pause_writing(self) -> None:
        self.congested = True

    def resume_writing(self) -> None:
        self.congested = False
        while self._waiting and not self.congested:
            number, stream = next(iter(self._waiting.items()))
            del self._waiting[number]
            stream.flush()  # one frame: then it is another's turn

    # --- frames --------------------------------------------------------------------------

    def send(self, kind: int, number: int, payload: bytes | bytearray = b"") -> None:
        if self._transport is None:
            return
        if not self._out:
            self._loop.call_soon(self._write)
        self._out.append(_HEAD.pack(kind, number, len(payload)))
        if payload:
            self._out.append(bytes(payload))
        self._out_bytes += _HEAD.size + len(payload)
        if self._out_bytes > _BATCH_BYTES:
            self._write()

    def _write(self) -> None:
        if self._out and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
        self._out.clear()
        self._out_bytes = 0

    def _take(self, kind: int, number: int, payload: bytes) -> None:
        stream = self._streams.get(number)
        if kind == DATA:
            if stream is not None:  # else it has been let go of here
                stream.taken(payload)
        elif kind == CREDIT:
            if len(payload) != _CREDIT.size:
                raise Broken("a credit of no size")
            if stream is not None:
                stream.credited(_CREDIT.unpack(payload)[0])
        elif kind in (CLOSE, RESET):
            if stream is not None:
                stream.ended(reset=kind == RESET)
        elif kind == OPEN:
            self._opened(number)
        elif kind == LEAVING:
            self._told_leaving()
        elif kind == LEFT:
            self._told_left()
        elif kind != ALIVE:
            raise Broken(f"a frame of kind {kind}")

    def _opened(self, number: int) -> None:
        if self._accept is None or number != self._last + 1:
            raise Broken("a stream that may not be opened")
        self._last = number
        self._begin(number, self._accept())

    def _begin(self, number: int, protocol: asyncio.Protocol) -> None:
        self._streams[number] = stream = Stream(self, number, protocol)
        protocol.connection_made(stream)

    def _told_leaving(self) -> None:
        if self._told:  # it is answered, so that many would fill our memory
            raise Broken("an end that leaves twice")
        self.leaving = self._told = True
        if self._accept is None:
            self.send(LEFT, 0)
        self._changed(self)

    def _told_left(self) -> None:
        if self._accept is None or not self._said:
            raise Broken("an answer to what was not said")
        self.left.set()
        self._end_if_left()

    def _end_if_left(self) -> None:
        if self.left.is_set() and not self._streams and self._transport is not None:
            self._write()
            self._transport.close()

    def _beat(self) -> None:
        if self._loop.time() - self._heard_at > self._silence_s:
            self.abort()
            return
        self.send(ALIVE, 0)
        self._timer = self._loop.call_later(self._beat_s, self._beat)

    # --- for streams -----------------------------------------------------------------------

    def wait(self, number: int, stream: "Stream") -> None:
        """`stream` has something to send once the connection takes more."""
        self._waiting[number] = stream

    def forget(self, number: int) -> None:
        self._streams.pop(number, None)
        self._waiting.pop(number, None)
        self._end_if_left()


def _bounded(length: int) -> int:
    if length > FRAME_BYTES:
        raise Broken(f"a frame of {length} bytes")
    return length


class Stream(asyncio.Transport):
    """One stream, as its protocol sees it. Closing closes both directions, as TLS does."""

    def __init__(self, tunnel: Tunnel, number: int, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._tunnel = tunnel
        self._number = number
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._credit = WINDOW_BYTES  # that the other end still takes
        self._allowed = WINDOW_BYTES  # that the other end may still send
        self._out = bytearray()
        self._in = bytearray()  # that came while reading was paused
        self._reading = True
        self._closing = False
        self._ended = False  # the other end has closed it
        self._over = False
        self._limit = _WAITING_BYTES
        self._writer_waits = False

    # --- asyncio.Transport -----------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As of the tunnel's connection; there is no socket of the stream's own."""
        return default if name == "socket" else self._tunnel.facts(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast("asyncio.Protocol", protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_closing(self) -> bool:
        return self._closing or self._over

    def is_reading(self) -> bool:
        return self._reading

    def can_write_eof(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._limit = _WAITING_BYTES if high is None else high

    def get_write_buffer_size(self) -> int:
        return len(self._out)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_closing() or not data:
            return
        if not self._out and not self._tunnel.congested and len(data) <= min(
            self._credit, FRAME_BYTES
        ):  # fmt: skip
            self._credit -= len(data)
            self._tunnel.send(DATA, self._number, bytes(data))
            return
        self._out += data
        self._push()
        if len(self._out) > self._limit and not self._writer_waits and not self._over:
            self._writer_waits = True
            self._protocol.pause_writing()

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            if self._in or self._ended:
                self._loop.call_soon(self._deliver)

    def close(self) -> None:
        if not self._closing and not self._over:
            self._closing = True
            if not self._out:
                self._end(CLOSE)

    def abort(self) -> None:
        if not self._over:
            self._end(RESET)

    # --- sending ---------------------------------------------------------------------------

    def _push(self) -> None:
        """Send what can be sent now."""
        while self._out and self._credit and not self._tunnel.congested:
            self._send_frame()
        self._settle()

    def flush(self) -> None:
        """The connection takes more: send one frame."""
        if self._out and self._credit:
            self._send_frame()
        self._settle()

    def _send_frame(self) -> None:
        size = min(len(self._out), self._credit, FRAME_BYTES)
        self._credit -= size
        self._tunnel.send(DATA, self._number, self._out[:size])
        del self._out[:size]

    def _settle(self) -> None:
        if self._out and self._credit:
            self._tunnel.wait(self._number, self)
        if self._writer_waits and len(self._out) <= self._limit // 4 and not self._over:
            self._writer_waits = False
            self._protocol.resume_writing()
        if self._closing and not self._out and not self._over:
            self._end(CLOSE)

    def credited(self, size: int) -> None:
        """The other end takes so many bytes more."""
        self._credit += size
        if self._credit > WINDOW_BYTES:
            raise Broken("more credit than was used")
        self._push()

    # --- receiving -------------------------------------------------------------------------

    def taken(self, data: bytes) -> None:
        self._allowed -= len(data)
        if self._allowed < 0:
            raise Broken("more than there was credit for")
        if self.is_closing():
            return
        if self._reading and not self._in:
            self._give(data)
        else:
            self._in += data

    def _give(self, data: bytes) -> None:
        try:
            self._protocol.data_received(data)
        except Exception:  # one stream's mistake must not end the others
            logger.exception("a stream of a tunnel failed")
            self.abort()
        self._grant()

    def _deliver(self) -> None:
        if self._in and self._reading and not self.is_closing():
            held, self._in = bytes(self._in), bytearray()
            self._give(held)
        if self._ended and self._reading and not self._in:
            self.lost(None)

    def _grant(self) -> None:
        """Let the other end send what has been taken here, not for every frame."""
        used = WINDOW_BYTES - self._allowed - len(self._in)
        if used >= WINDOW_BYTES // 2 and not self._over:
            self._allowed += used
            self._tunnel.send(CREDIT, self._number, _CREDIT.pack(used))

    def ended(self, *, reset: bool) -> None:
        """The other end has closed it."""
        if reset:
            self.lost(ConnectionResetError("the other end has reset the stream"))
        elif self._reading and not self._in:
            self.lost(None)
        else:
            self._ended = True  # once what has come is read

    # --- the end ---------------------------------------------------------------------------

    def _end(self, kind: int) -> None:
        self._tunnel.send(kind, self._number)
        self.lost(None)

    def lost(self, exc: Exception | None) -> None:
        if not self._over:
            self._over = self._closing = True
            self._out.clear()
            self._in.clear()
            self._tunnel.forget(self._number)
            self._loop.call_soon(self._protocol.connection_lost, exc)
