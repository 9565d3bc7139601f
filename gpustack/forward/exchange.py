"""One request and its answer, as an application sees them."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from gpustack.errors import GPUStackError, TooLarge, Unavailable
from gpustack.forward.http1 import Headers, first, status_line

#: For browsers: what they are answered is what Content-Type says.
_NO_GUESSING = (b"x-content-type-options", b"nosniff")

#: Makes headers and body of an error.
Dialect = Callable[[GPUStackError], tuple[Headers, bytes]]


class Receiver(Protocol):
    """What an application makes of a request: it is told of the body and of the client's moves.

    Every call comes from the event loop; none may block. After `client_left` no other follows.
    """

    def body(self, chunk: bytes) -> None:
        """A piece of the request's body."""

    def body_end(self) -> None:
        """The request is complete."""

    def client_left(self) -> None:
        """The client is gone, or broke the protocol: nobody reads the answer."""

    def pause(self) -> None:
        """The client reads slower than the answer comes: stop its source."""

    def resume(self) -> None:
        """The client has caught up."""

    def end_now(self) -> None:
        """The server drains and this exchange is endless: finish it."""


class Ignored:
    """The receiver of a request that has been answered already: its body is thrown away."""

    def body(self, chunk: bytes) -> None: ...
    def body_end(self) -> None: ...
    def client_left(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def end_now(self) -> None: ...


IGNORED = Ignored()


class Link(Protocol):
    """What an exchange needs of the connection it came on."""

    @property
    def ends(self) -> bool: ...
    @property
    def scheme(self) -> bytes: ...
    def write(self, piece: bytes) -> None: ...
    def answered(self) -> None: ...
    def abort(self, *, reset: bool = False) -> None: ...
    def pause_body(self) -> None: ...
    def resume_body(self) -> None: ...
    def switch(self, protocol: asyncio.Protocol, head: bytes) -> None: ...


class Exchange:
    """One request and its answer.

    Attributes:
        method: upper case, e.g. "POST".
        target: the request line's target in origin form, as it came.
        path: the target up to "?", percent-encoding left alone.
        query: what follows "?".
        headers: (lower-case name, value), in the order they came; trailers are dropped.
        peer: address of the client, without its port: its socket's, or what a trusted proxy says.
        proxied: a trusted proxy passed it on, or it was meant for a proxy: so it is never this
            machine's own.
        endless: a watch or a followed log: ended at once when the server drains.
        complete: the whole request has come.
        status: of the answer; 0 until it started.
        finished: the answer is complete, or the client left.
        also: headers that the answer carries whoever makes it.
        upgrades: the client asks for the protocol that the server may switch to.
        vouched: the operator lets pages of this origin act with their user's session.
        dialect: how the API that is asked says errors.
    """

    __slots__ = (
        "_chunked",
        "_head",
        "_link",
        "_scheme",
        "_silent",
        "also",
        "complete",
        "dialect",
        "early",
        "endless",
        "finished",
        "headers",
        "http10",
        "keep_alive",
        "method",
        "path",
        "peer",
        "proxied",
        "query",
        "receiver",
        "status",
        "target",
        "upgrades",
        "vouched",
    )

    def __init__(
        self, link: Link, *, method: str, target: bytes, headers: Headers, peer: str, http10: bool
    ) -> None:
        self._link = link
        self.method = method
        self.target = target
        path, _, query = target.partition(b"?")
        self.path = path.decode("latin-1")
        self.query = query.decode("latin-1")
        self.headers = headers
        self.peer = peer
        self.proxied = False
        self.http10 = http10
        self.keep_alive = not http10
        self.endless = False
        self.complete = False
        self.status = 0
        self.finished = False
        self.also: Headers = []
        self.vouched = False
        self.upgrades = False
        self.dialect: Dialect = error_answer
        self.receiver: Receiver | None = None
        self.early: list[bytes] = []  # body that came before the exchange's turn
        self._head = b""
        self._chunked = False
        self._silent = False
        self._scheme: bytes | None = None

    @property
    def scheme(self) -> bytes:
        """By which the client came: http or https."""
        return self._scheme or self._link.scheme

    def passed_on_for(self, client: str, scheme: bytes | None) -> None:
        """Take a trusted proxy's word: who the client is, and by which scheme it came, if said."""
        self.peer, self._scheme, self.proxied = client, scheme, True

    def header(self, name: bytes) -> bytes | None:
        """The first header called `name` (lower case)."""
        return first(self.headers, name)

    # --- the answer ----------------------------------------------------------------------

    def respond(self, status: int, headers: Headers | None = None, body: bytes = b"") -> None:
        """Answer in one piece."""
        if status not in (204, 304):
            headers = [*(headers or ()), _NO_GUESSING, (b"content-length", b"%d" % len(body))]
        self.start(status, headers or [])
        self.finish(body)

    def respond_json(self, status: int, body: Any, headers: Headers | None = None) -> None:
        kind = (b"content-type", b"application/json")
        self.respond(status, [kind, *(headers or ())], msgspec.json.encode(body))

    def respond_error(self, error: GPUStackError, headers: Headers | None = None) -> None:
        """Answer with `error` in the API's shape; a started answer is broken off instead."""
        if self.status:
            self.abort()
            return
        said, body = self.dialect(error)
        self.respond(error.status, [*said, *(headers or ())], body)

    def switch(self, protocol: asyncio.Protocol, headers: Headers) -> None:
        """Answer with 101, where it `upgrades`: the connection is `protocol`'s from now on.

        One that is gone by now is lost to `protocol` at once.
        """
        lines = [b"HTTP/1.1 101 Switching Protocols\r\n", b"connection: upgrade\r\n"]
        lines += [b"%b: %b\r\n" % pair for pair in headers]
        self.status, self.finished = 101, True
        self._link.switch(protocol, b"".join([*lines, b"\r\n"]))

    def start(self, status: int, headers: Headers) -> None:
        """Begin the answer. The head leaves with the first write, or with `finish`.

        With a Content-Length among `headers` exactly that many bytes must follow; without one
        the body is chunked, or ends with the connection for an HTTP/1.0 client. Hop-by-hop
        headers are the caller's to leave out.
        """
        if self.finished:
            return
        if self.status:
            raise RuntimeError("the answer has been started")
        self.status = status
        self._silent = self.method == "HEAD" or status in (204, 304)
        lines = [status_line(status)]
        sized = False
        for pair in [*headers, *self.also] if self.also else headers:
            if pair[0] == b"content-length":
                sized = True
            lines.append(b"%b: %b\r\n" % pair)
        if not sized and not self._silent:
            if self.http10:
                self.keep_alive = False
            else:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
        if self._link.ends:
            self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    def write(self, piece: bytes) -> None:
        """Send a piece of the answer; an empty one sends the head alone."""
        if self.finished:
            return
        out = self._framed(piece)
        if self._head:
            out, self._head = self._head + out, b""
        if out:
            self._link.write(out)

    def finish(self, last: bytes = b"") -> None:
        """End the answer, with a last piece. One that never started breaks the connection."""
        if self.finished:
            return
        if not self.status:
            self.abort()
            return
        out = self._framed(last)
        if self._chunked:
            out += b"0\r\n\r\n"
        if self._head:
            out, self._head = self._head + out, b""
        self.finished = True
        if out:
            self._link.write(out)
        self._link.answered()

    def abort(self) -> None:
        """Break the client's connection, so that it cannot take what it has for the whole."""
        if not self.finished:
            self.finished = True
            # A body that ends with its connection would look whole after an ordinary close.
            self._link.abort(reset=self.http10)

    def _framed(self, piece: bytes) -> bytes:
        if self._silent or not piece:
            return b""
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(piece), piece)
        return piece

    # --- the request's body ----------------------------------------------------------------

    def pause(self) -> None:
        """Take no more of the request's body for now."""
        if not self.complete and not self.finished:
            self._link.pause_body()

    def resume(self) -> None:
        if not self.finished:
            self._link.resume_body()

    async def read(self, limit: int) -> bytes:
        """The whole body of the request (async handlers only).

        Raises:
            TooLarge: it has more than `limit` bytes.
        """
        return await self._inbox().read(limit)

    async def send(self, piece: bytes) -> None:
        """`write`, then wait until the client has room for more (async handlers only)."""
        self.write(piece)
        await self._inbox().writable.wait()

    def _inbox(self) -> "Inbox":
        if not isinstance(self.receiver, Inbox):
            raise TypeError("only handlers served through listener.asynchronous can wait")
        return self.receiver


class Inbox:
    """The receiver behind an async handler: keeps the body, and cancels it with its client."""

    HIGH_WATER = 256 * 1024  # bytes not yet read, above which the client has to wait

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._news = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        self.task: asyncio.Task[None] | None = None

    def body(self, chunk: bytes) -> None:
        self._pieces.append(chunk)
        self._size += len(chunk)
        if self._size > self.HIGH_WATER:
            self._exchange.pause()
        self._news.set()

    def body_end(self) -> None:
        self._news.set()

    def client_left(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def pause(self) -> None:
        self.writable.clear()

    def resume(self) -> None:
        self.writable.set()

    def end_now(self) -> None:
        self.client_left()

    async def read(self, limit: int) -> bytes:
        taken: list[bytes] = []
        size = 0
        while True:
            self._news.clear()
            while self._pieces:
                piece = self._pieces.popleft()
                size += len(piece)
                taken.append(piece)
            self._size = 0
            if size > limit:
                raise TooLarge(f"the body has more than {limit} bytes")
            if self._exchange.complete:
                return b"".join(taken)
            self._exchange.resume()
            await self._news.wait()


def error_answer(error: GPUStackError) -> tuple[Headers, bytes]:
    """Headers and body of an error in our own API's shape."""
    headers = [(b"content-type", b"application/json")]
    if isinstance(error, Unavailable):
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    body = {"code": error.code, "message": str(error), "detail": error.detail}
    return headers, msgspec.json.encode(body)
