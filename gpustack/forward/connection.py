"""One client's connection: requests in, answers out, in the order they were asked.

Longer than most: reading, answering and ending share the state of one connection.
"""

import asyncio
import math
import socket
import struct
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import httptools

from gpustack.errors import BadRequest
from gpustack.forward import guard
from gpustack.forward.exchange import IGNORED, Dialect, Exchange, error_answer
from gpustack.forward.flush import is_flushed
from gpustack.forward.http1 import Headers, HttpError, framing

if TYPE_CHECKING:
    from gpustack.forward.listener import Server

#: Of an answer that the client has not taken, above which its source has to wait.
_WRITE_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """How much patience and memory one connection gets.

    Attributes:
        head_bytes: request line and headers of one request.
        head_s: for a whole head, from its first byte (or from the connection's start).
        body_s: without a byte of a body that has begun.
        idle_s: between requests.
        ahead: requests taken from one read while the first is not answered yet.
        held_bytes: of later requests, unread, before the client has to wait.
        discard_bytes: of a body that nobody wants, read so that the connection can live on.
        linger_s: for the client to read an answer after which the connection ends.
        flush_s: for the last bytes of an ending connection.
        notify_s: for the client to end TLS too; those that pool connections never do.
    """

    head_bytes: int = 64 * 1024
    head_s: float = 20.0
    body_s: float = 60.0
    idle_s: float = 75.0
    ahead: int = 128
    held_bytes: int = 64 * 1024
    discard_bytes: int = 256 * 1024
    linger_s: float = 2.0
    flush_s: float = 60.0
    notify_s: float = 1.0


class Connection(asyncio.Protocol):
    """One client's connection.

    `queue` holds the exchanges that are not done, oldest first; only the first has been given to
    the application. `incoming` is the one whose body is still coming. While the first waits for
    its answer and no body is coming, later bytes are held unparsed.

    Args:
        scheme: by which the client came, http or https.
    """

    def __init__(self, server: "Server", scheme: bytes = b"http") -> None:
        self.server = server
        self.scheme = scheme
        self.queue: deque[Exchange] = deque()
        self.incoming: Exchange | None = None
        self.deadline = math.inf
        self.idle_since = 0.0
        self.closing = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._peer = ""
        self._flush_until = 0.0
        self._held = bytearray()
        self._feeding = False
        self._advancing = False
        self._paused = False
        self._client_is_slow = False  # it has not taken what was written
        self._refusal: tuple[HttpError, Dialect] | None = None
        self._target = b""
        self._headers: Headers = []
        self._in_head = False
        self._head_size = 0  # bytes of the fields that the parser has handed over
        self._fed = 0  # bytes read since the head's first read, or the last of the body's
        self._upgrade: bytes | None = None
        self._switching = False  # what follows the request is another protocol's
        self._next: tuple[asyncio.Protocol, bytes] | None = None  # to whom, after which bytes
        self._unread = 0.0  # bytes of the incoming body that are still to come

    # --- asyncio.Protocol ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) and peer else ""
        self._transport.set_write_buffer_limits(_WRITE_BYTES)  # TLS would take eight times that
        self.server.connections.add(self)
        self.idle_since = self.server.now()
        self.deadline = self.idle_since + self.server.limits.head_s

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        if self.queue and self.incoming is None:
            self._held += data
            if len(self._held) > self.server.limits.held_bytes:
                self.pause_body()
            return
        self._feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.closing = True
        self.server.forget(self)
        self._held.clear()
        self.incoming = None
        queue, self.queue = self.queue, deque()
        for exchange in queue:
            was_finished, exchange.finished = exchange.finished, True
            if exchange.receiver is not None and not was_finished:
                guard.tell(exchange, exchange.receiver.client_left)

    def pause_writing(self) -> None:
        self._client_is_slow = True
        if self.queue and (receiver := self.queue[0].receiver) is not None:
            guard.tell(self.queue[0], receiver.pause)

    def resume_writing(self) -> None:
        self._client_is_slow = False
        if self.queue and (receiver := self.queue[0].receiver) is not None:
            guard.tell(self.queue[0], receiver.resume)
        self._advance()

    # --- reading -------------------------------------------------------------------------

    def _feed(self, chunk: bytes) -> None:
        rest = self._parse(chunk)
        if rest is not None and self._switching:
            self._held += rest
        elif rest is not None:
            self._without_upgrade(rest)
        self._advance()

    def _parse(self, chunk: bytes) -> bytes | None:
        """Give `chunk` to the parser. Answers what it left for another protocol, if it did."""
        self._feeding = True
        self._fed += len(chunk)
        try:
            self._parser.feed_data(chunk)
            if self._in_head or self.incoming is not None:  # one field that never ends
                self._count(0)
        except httptools.HttpParserUpgrade as stop:
            return chunk[stop.args[0] :]
        except HttpError as error:
            self._refuse(error)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, HttpError):
                raise
            self._refuse(cause)
        except httptools.HttpParserError as error:
            if not self.closing:
                self._refuse(HttpError(400, f"not HTTP/1.1: {error}"))
        finally:
            self._feeding = False
        return None

    def _without_upgrade(self, rest: bytes) -> None:
        """Read the request again as if it had not asked for another protocol, as RFC 9110
        section 7.8 allows: the parser took its body for that protocol's bytes."""
        head, self._upgrade = self._upgrade, None
        if head is None:
            self._refuse(HttpError(400, "this server is not a tunnel"))
            return
        self._parser = httptools.HttpRequestParser(self)
        self._feed(head + rest)

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers = []
        self._in_head = True
        self._head_size = self._fed = 0
        self.deadline = self.server.now() + self.server.limits.head_s

    def on_url(self, part: bytes) -> None:
        self._target += part
        self._count(len(part))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else a trailer: nobody checks those, so nobody gets them
            self._headers.append((name.lower(), value or b""))
            self._count(len(name) + len(value or b"") + 4)

    def _count(self, size: int) -> None:
        self._head_size += size
        if max(self._head_size, self._fed) > self.server.limits.head_bytes:
            raise HttpError(431, "the request's head, or what follows its body, is too large")

    def on_headers_complete(self) -> None:
        self._in_head = False
        method = self._parser.get_method()
        if method == b"CONNECT":
            raise HttpError(400, "this server is not a tunnel")
        self._switching = self._parser.should_upgrade() and self._may_switch()
        if self._parser.should_upgrade() and not self._switching:
            kept = [pair for pair in self._headers if pair[0] != b"upgrade"]
            lines = [b"%b %b HTTP/1.1\r\n" % (method, self._target)]
            lines += [b"%b: %b\r\n" % pair for pair in kept]
            self._upgrade = b"".join([*lines, b"\r\n"])
            return
        exchange = self._exchange(method.decode(), self._parser.get_http_version())
        length, chunked = framing(self._headers)
        if chunked and exchange.http10:
            raise HttpError(400, "HTTP/1.0 knows no transfer coding")
        exchange.keep_alive = not exchange.http10 and bool(self._parser.should_keep_alive())
        exchange.upgrades = self._switching
        if self._switching:
            exchange.keep_alive = False  # no HTTP follows, whatever the answer is
        if len(self.queue) >= self.server.limits.ahead:
            raise HttpError(400, "too many requests at once")
        self.incoming = exchange
        self.queue.append(exchange)
        self._unread = math.inf if chunked else length or 0
        self.deadline = self.server.now() + self.server.limits.body_s
        if len(self.queue) == 1 and not self._client_is_slow:
            self._dispatch(exchange)

    def _may_switch(self) -> bool:
        """Whether the server speaks the protocol that a request without a body asks for."""
        wanted = [value for name, value in self._headers if name == b"upgrade"]
        return wanted == [self.server.upgrade] and framing(self._headers) in (
            (None, False),
            (0, False),
        )

    def _exchange(self, method: str, version: str) -> Exchange:
        target, headers = self._target, self._headers
        hosts = [value for name, value in headers if name == b"host"]
        if version not in ("1.0", "1.1"):
            raise HttpError(505, "this server speaks HTTP/1.1")
        if len(hosts) != 1 and (version == "1.1" or hosts):
            raise HttpError(400, "want one Host header")
        absolute = not target.startswith(b"/") and target != b"*"
        if absolute:
            scheme, mark, rest = target.partition(b"://")
            if not mark or scheme.lower() not in (b"http", b"https"):
                raise HttpError(400, "the request's target must begin with a slash")
            # RFC 9112 section 3.2.2: the absolute form's authority replaces Host.
            cut = min((i for i in (rest.find(b"/"), rest.find(b"?")) if i >= 0), default=len(rest))
            authority, target = rest[:cut], rest[cut:]
            target = target if target.startswith(b"/") else b"/" + target
            headers = [(n, authority if n == b"host" else v) for n, v in headers]
        if b"#" in target:
            raise HttpError(400, "a request's target has no fragment")
        exchange = Exchange(
            self, method=method, target=target, headers=headers, peer=self._peer,
            http10=version == "1.0",
        )  # fmt: skip
        exchange.proxied = absolute  # which is how proxies are asked
        return exchange

    def on_body(self, chunk: bytes) -> None:
        exchange = self.incoming
        if exchange is None:
            return  # of a request whose upgrade is refused: read again by `_without_upgrade`
        self._fed = 0
        self.deadline = self.server.now() + self.server.limits.body_s
        self._unread -= len(chunk)
        if exchange.finished:
            return
        if exchange.receiver is None:
            exchange.early.append(chunk)
        else:
            guard.tell(exchange, exchange.receiver.body, chunk)

    def on_message_complete(self) -> None:
        exchange, self.incoming = self.incoming, None
        self._unread = 0
        if exchange is None:
            return
        exchange.complete = True
        self.resume_body()  # a paused connection would not show its client's leaving
        self.deadline = math.inf
        if exchange.receiver is not None and not exchange.finished:
            guard.tell(exchange, exchange.receiver.body_end)

    # --- answering -----------------------------------------------------------------------

    def _dispatch(self, exchange: Exchange) -> None:
        exchange.receiver = IGNORED  # while the application decides
        expects = exchange.header(b"expect")
        if expects is not None and expects.lower() != b"100-continue":
            exchange.respond(417)
            return
        receiver = guard.ask(self.server.app, exchange)
        if exchange.finished:
            return
        exchange.receiver = receiver
        waits = expects is not None and not exchange.http10 and not exchange.early
        if waits and not exchange.status and not exchange.complete:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        early, exchange.early = exchange.early, []
        for chunk in early:
            if not exchange.finished:
                guard.tell(exchange, receiver.body, chunk)
        if exchange.complete and not exchange.finished:
            guard.tell(exchange, receiver.body_end)

    def answered(self) -> None:
        """The first exchange's answer is written."""
        if not self._feeding:
            self._advance()

    def _advance(self) -> None:
        """Go on with the next request where there is one."""
        if self._advancing or self._feeding:
            return
        self._advancing = True
        try:
            self._advance_all()
        finally:
            self._advancing = False

    def _advance_all(self) -> None:
        while not self.closing or self.queue:
            if self.queue:
                exchange = self.queue[0]
                if exchange.receiver is None:
                    if self._client_is_slow:
                        return
                    self._dispatch(exchange)
                if not exchange.finished:
                    return
                if self._next is not None:
                    self._hand_over(*self._next)
                    return
                if not exchange.complete:
                    self._answered_early(exchange)
                    return
                self.queue.popleft()
                exchange.receiver = IGNORED  # no cycle: memory is free at once
                if not exchange.keep_alive:
                    self.queue.clear()
                    self._close()
                    return
            elif self._refusal is not None:
                self._send_refusal(*self._refusal)
                return
            elif self._held:
                held, self._held = bytes(self._held), bytearray()
                self.resume_body()
                self._advancing = False
                self._feed(held)
                return
            else:
                break
        if not self.closing and not self._in_head:
            self.idle_since = self.server.now()
            self.deadline = self.idle_since + self.server.limits.idle_s

    def _hand_over(self, protocol: asyncio.Protocol, head: bytes) -> None:
        """Let `protocol` have the connection."""
        self.resume_body()
        transport, self._transport = self._transport, None
        self.closing, self.deadline = True, math.inf
        self.queue.clear()
        self.server.forget(self)
        if transport is None or transport.is_closing():
            protocol.connection_lost(None)
            return
        transport.write(head)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._held:
            protocol.data_received(bytes(self._held))
            self._held.clear()

    def _answered_early(self, exchange: Exchange) -> None:
        """The answer is out and the request's body is still coming."""
        self.resume_body()
        if exchange.keep_alive and not self.ends:
            return
        self._linger()

    def _refuse(self, error: HttpError) -> None:
        """Answer what came before, then say what is wrong and end the connection."""
        self._in_head = False
        exchange, self.incoming = self.incoming, None
        self._refusal = (error, exchange.dialect if exchange else error_answer)
        if exchange is None:
            return  # _advance sends it in its turn
        receiver, exchange.receiver = exchange.receiver, IGNORED
        if receiver is not None and not exchange.finished:
            guard.tell(exchange, receiver.client_left)
        started = exchange.status and not exchange.finished
        exchange.complete = exchange.finished = exchange.keep_alive = True
        if started:
            self.abort()

    def _send_refusal(self, error: HttpError, dialect: Dialect) -> None:
        headers, body = dialect(BadRequest(str(error)))
        exchange = Exchange(self, method="GET", target=b"", headers=[], peer="", http10=False)
        exchange.keep_alive = False
        self.closing = True
        exchange.respond(error.status, headers, body)
        self._linger()

    # --- for exchanges and the server ------------------------------------------------------

    @property
    def ends(self) -> bool:
        """Whether an answer begun now is the connection's last."""
        return self.server.draining or self._unread > self.server.limits.discard_bytes

    def write(self, piece: bytes) -> None:
        # uvloop raises on a transport that is closed and has not said so yet.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(piece)

    def switch(self, protocol: asyncio.Protocol, head: bytes) -> None:
        if self._transport is None:
            protocol.connection_lost(None)
            return
        self._next = (protocol, head)
        self.answered()

    def pause_body(self) -> None:
        transport = self._transport
        if transport is not None and not self._paused and not transport.is_closing():
            self._paused = True
            self.deadline = math.inf
            transport.pause_reading()

    def resume_body(self) -> None:
        transport = self._transport
        if transport is not None and self._paused and not transport.is_closing():
            self._paused = False
            if self.incoming is not None:
                self.deadline = self.server.now() + self.server.limits.body_s
            transport.resume_reading()

    def abort(self, *, reset: bool = False) -> None:
        """Close at once. `reset`: so that the client gets an error instead of an end."""
        self.closing = True
        if self._transport is None:
            return
        if reset and (sock := self._transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _close(self) -> None:
        """End the connection after what has been written."""
        self.closing = True
        now, limits = self.server.now(), self.server.limits
        self._flush_until, self.deadline = now + limits.flush_s, now + limits.notify_s
        if self._transport is not None:
            self._transport.close()

    def _linger(self) -> None:
        """End the connection, but read on for a while: closing with unread bytes would reset it,
        and the client might lose the answer."""
        self.closing = True
        self.deadline = self.server.now() + self.server.limits.linger_s
        transport = self._transport
        if transport is not None and not transport.is_closing() and transport.can_write_eof():
            transport.write_eof()  # TLS cannot: the client goes by the answer's own length

    def close_if_idle(self, since: float) -> None:
        """Close the connection if no request has begun on it since `since` (the loop's clock)."""
        if not self.queue and not self._in_head and not self.closing and self.idle_since <= since:
            self._close()

    def hurry(self, by: float) -> None:
        """A head that has begun has to be there at `by` (the loop's clock)."""
        self.deadline = min(self.deadline, by) if self._in_head else self.deadline

    def expire(self) -> None:
        """The deadline has passed."""
        now = self.server.now()
        if self.closing and (now >= self._flush_until or is_flushed(self._transport)):
            self.abort()
        elif self.closing:
            self.deadline = now + self.server.limits.notify_s
        elif self._in_head or self.incoming is not None:
            self._refuse(HttpError(408, "the request did not come in time"))
            self._advance()
        else:
            self._close()
