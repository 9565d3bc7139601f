"""Requests to other HTTP/1.1 servers over pooled connections, answers pushed to a sink.

    call = pool.send(address, method, target, headers, sink, repeatable=True, body=b"...")
    call = pool.send(address, method, target, headers, sink, chunked=True)
    call.write(piece); call.finish()
    call.abort()                # at once, whatever has come

The sink is called from the event loop: `head` once, `piece` any number of times, then `end` or
`failed`; nothing follows `abort`. For a `repeatable` request a pooled connection that turns out
to be dead before any byte of an answer came is replaced by a fresh one without the sink's
knowledge: its server may have carried the request out all the same. Other requests are sent once,
on a connection of their own.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Final, cast

import httptools

from gpustack.forward.call import ONE_WRITE_BYTES, Address, Call, Failure, Peer, Sink
from gpustack.forward.http1 import Headers, HttpError, framing, write_head
from gpustack.lib import trust
from gpustack.lib.net import is_loopback
from gpustack.lib.platform import notice_dead_peer

__all__ = ["Address", "Call", "Door", "Doors", "Failure", "Pool", "Sink"]

logger = logging.getLogger(__name__)

_HEAD_BYTES: Final = 128 * 1024
#: A request on a kept connection to a host that lost its cable is given up after this. With a
#: fresh connection's time-out it stays below the minute that many clients wait.
_UNACKNOWLEDGED_S: Final = 45.0


class Connection(asyncio.Protocol):
    """One connection to an upstream, lent to one call at a time."""

    def __init__(self, pool: "Pool", peer: Peer) -> None:
        self._pool = pool
        self.peer = peer
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._call: Call | None = None
        self._fresh = True
        self._paused = False
        self._reset()

    def _reset(self) -> None:
        self._status = 0
        self._headers: Headers = []
        self._head_bytes = 0
        self._unsaid_bytes = 0
        self._in_head = True
        self._pieces: list[bytes] = []
        self._received = False
        self._new_head = False
        self._complete = False
        self._reusable = False
        self._until_eof = False

    def _open(self) -> asyncio.Transport | None:
        """The transport while it takes anything: uvloop raises on one that is closing."""
        transport = self._transport
        return None if transport is None or transport.is_closing() else transport

    @property
    def usable(self) -> bool:
        return self._open() is not None

    def begin(self, call: Call) -> None:
        self._call = call
        self._reset()
        call.begin(self, may_repeat=not self._fresh)

    def write(self, raw: bytes) -> None:
        if (transport := self._open()) is not None:
            transport.write(raw)

    def writelines(self, pieces: list[bytes]) -> None:
        if (transport := self._open()) is not None:
            transport.writelines(pieces)

    def pause(self) -> None:
        if not self._paused and (transport := self._open()) is not None:
            self._paused = True
            transport.pause_reading()

    def resume(self) -> None:
        if self._paused and (transport := self._open()) is not None:
            self._paused = False
            transport.resume_reading()

    def drop(self) -> None:
        """Close at once, telling nobody."""
        self._call = None
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            here = is_loopback(self.peer.address[0])  # its kernel cannot vanish without ours
            notice_dead_peer(sock, unacknowledged_s=None if here else _UNACKNOWLEDGED_S)

    def data_received(self, data: bytes) -> None:
        if self._call is None:  # an answer that nobody asked for
            self.drop()
            return
        self._received = True
        self._unsaid_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if self._unsaid_bytes > _HEAD_BYTES:  # a field without end, which the parser collects
                self._fail()
                return
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._complete:
                self._fail()
                return
            self._reusable = False  # whole, and then rubbish
        self._deliver()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        call = self._call
        if call is None:
            return
        if self._until_eof and exc is None:
            self._complete = True
            self._deliver()
        elif self._fresh or self._received or not call.again():
            self._fail()
        self._call = None

    def pause_writing(self) -> None:
        if self._call is not None:
            self._call.sink.pause_body()

    def resume_writing(self) -> None:
        if self._call is not None:
            self._call.sink.resume_body()

    def _fail(self) -> None:
        call = self._call
        self.drop()
        if call is not None:
            call.fail(Failure.BROKEN if call.started else Failure.LOST)

    def _deliver(self) -> None:
        """Hand what one read brought to the sink, in as few calls as possible."""
        call = self._call
        if call is None:
            return
        sink = call.sink
        new_head, self._new_head = self._new_head, False
        if new_head:
            call.answering()
            sink.head(self._status, self._headers)
            if call.done:
                return
        pieces, self._pieces = self._pieces, []
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self._complete:
            self._call = None
            call.settle()
            self.resume()
            if self._reusable and call.sent_all:
                self._fresh = False
                self._pool.put_back(self)
            elif self._transport is not None:
                self._transport.close()
            sink.end(piece)
        elif piece or new_head:
            sink.piece(piece)

    # --- httptools -----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._unsaid_bytes = 0
        if self._complete:  # a second answer to one request
            self._reusable = False
            raise HttpError(502, "an answer that nobody asked for")
        self._headers = []
        self._head_bytes = 0
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._unsaid_bytes = 0
        if not self._in_head:
            return  # a trailer
        self._head_bytes += len(name) + len(value or b"")
        if self._head_bytes > _HEAD_BYTES:
            raise HttpError(502, "the answer's head is too large")
        self._headers.append((name.lower(), value or b""))

    def on_headers_complete(self) -> None:
        self._in_head = False
        status = self._parser.get_status_code()
        if status == 101:
            raise HttpError(502, "another protocol was not asked for")
        if status < 200:
            return
        length, chunked = framing(self._headers)
        self._status = status
        self._new_head = True
        if self._call is not None and self._call.method == "HEAD":
            self._complete = True  # the parser would wait for a body: it is of no more use
        elif length is None and not chunked and status not in (204, 304):
            self._until_eof = True

    def on_body(self, piece: bytes) -> None:
        self._unsaid_bytes = 0
        if not self._complete:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        if self._complete or not self._status:
            return  # after a HEAD's answer, or an interim one
        self._complete = True
        self._reusable = bool(self._parser.should_keep_alive())


#: Connects the protocol that it is given to something that no network reaches.
#:
#: Raises:
#:     OSError: there is nothing behind it.
Door = Callable[[asyncio.Protocol], Awaitable[None]]
#: The door to an address; None: it is dialled.
Doors = Callable[[Address], Door | None]


class Pool:
    """Kept-alive connections by address. Everything it starts belongs to `group`.

    Args:
        doors: to addresses that are dialled in another way.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        *,
        connect_timeout_s: float = 5.0,
        idle_s: float = 60.0,
        idle_max: int = 256,
        doors: Doors = lambda _: None,
    ) -> None:
        self._group = group
        self._doors = doors
        self._loop = asyncio.get_running_loop()
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._idle_max = idle_max
        self._idle: dict[Peer, list[Connection]] = {}
        self._untrusted: set[Address] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._connecting: set[asyncio.Task[None]] = set()

    def send(
        self,
        address: Address,
        method: str,
        target: bytes,
        headers: Headers,
        sink: Sink,
        *,
        repeatable: bool = False,
        body: bytes | None = b"",
        chunked: bool = False,
        certificate: str = "",
    ) -> Call:
        """Send a request; the sink is called later, never from here.

        Args:
            headers: all but those that say how the body is framed.
            repeatable: twice does no more than once.
            body: whole, or None: it follows through the call's `write` and `finish`.
            chunked: how a body that follows is framed; without, `headers` has its length.
            certificate: speak TLS, with nobody but who has this one (PEM).
        """
        peer = Peer(address, certificate)
        call = Call(self, peer, method, sink, chunked=chunked)
        if body is not None:
            if body or method in ("POST", "PUT", "PATCH"):
                headers = [*headers, (b"content-length", b"%d" % len(body))]
            call.sent_all = True
        elif chunked:
            headers = [*headers, (b"transfer-encoding", b"chunked")]
        head = write_head(b"%b %b HTTP/1.1\r\n" % (method.encode(), target), headers)
        if body and len(body) < ONE_WRITE_BYTES:
            call.put(head + body, keep=True)
        else:
            call.put(head, keep=True)
            if body:
                call.put(body, keep=True)
        idle = self._idle.get(peer)
        if idle and not repeatable:
            # Its server may close a kept connection just as the request leaves. One goes, as the
            # new one will be kept in its stead.
            idle.pop(0).drop()
            idle = None
        while idle:
            connection = idle.pop()
            if connection.usable:
                connection.begin(call)
                return call
        self.connect(peer, call)
        return call

    def connect(self, peer: Peer, call: Call) -> None:
        """Begin `call` on a connection of its own."""
        task = self._group.create_task(self._connect(peer, call))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, peer: Peer, call: Call) -> None:
        connection, failure = None, Failure.UNCONNECTED
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connection = await self._dial(peer)
            self._untrusted.discard(peer.address)
        except ssl.SSLError as error:
            failure = Failure.UNTRUSTED
            self._distrust(peer, error)
        except (OSError, TimeoutError, ValueError):
            pass  # ValueError: no such name can be, such as "a..b"
        try:
            if connection is None:
                call.fail(failure)
            elif call.done:
                self.put_back(connection)
            else:
                connection.begin(call)
        except Exception:  # a sink's mistake ends its own request, not the group's others
            logger.exception("a request failed inside the gateway")
            call.fail(Failure.LOST)

    def _distrust(self, peer: Peer, error: ssl.SSLError) -> None:
        """Say so, once until it is better."""
        if peer.address not in self._untrusted:
            self._untrusted.add(peer.address)
            logger.warning(
                "%s:%d does not show the certificate with which it registered, so nothing is "
                "sent there (%s): somebody stands between, or its agent is about to say its "
                "new one",
                *peer.address,
                trust.reason(error),
            )

    async def _dial(self, peer: Peer) -> Connection:
        connection = Connection(self, peer)
        if (door := self._doors(peer.address)) is not None:
            await door(connection)
        else:
            tls = trust.exactly(peer.certificate) if peer.certificate else None
            await self._loop.create_connection(lambda: connection, *peer.address, ssl=tls)
        return connection

    def put_back(self, connection: Connection) -> None:
        if not connection.usable:
            return
        idle = self._idle.setdefault(connection.peer, [])
        if len(idle) >= self._idle_max:
            connection.drop()
            return
        connection.idle_since = self._loop.time()
        idle.append(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(self._idle_s / 4, self._sweep)

    def forget(self, connection: Connection) -> None:
        idle = self._idle.get(connection.peer)
        if idle is not None and connection in idle:
            idle.remove(connection)

    def _sweep(self) -> None:
        self._timer = None
        old = self._loop.time() - self._idle_s
        for peer, idle in list(self._idle.items()):
            for connection in [c for c in idle if c.idle_since <= old]:
                idle.remove(connection)
                connection.drop()
            if not idle:
                del self._idle[peer]
        if self._idle:
            self._timer = self._loop.call_later(self._idle_s / 4, self._sweep)

    def close(self) -> None:
        """Give up connecting, and close the connections that no call is using."""
        for task in self._connecting:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for idle in self._idle.values():
            for connection in idle[:]:
                connection.drop()
        self._idle.clear()
