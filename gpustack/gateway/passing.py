"""Requests that are not the gateway's own: passed on as they are, both ways."""

import asyncio
from collections.abc import Callable
from typing import Final

from gpustack.forward.exchange import Exchange
from gpustack.forward.http1 import Headers, end_to_end
from gpustack.forward.upstream import Address, Call, Failure, Pool

Refuse = Callable[[Exchange, Failure], None]

#: RFC 9110 section 9.2.2: once or twice is the same.
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})
PATIENCE_S: Final = 30.0  # the server's and the agent's slowest answers begin sooner


class Passing:
    """Receiver of a client's request and sink of an upstream's answer: bytes in, bytes out.

    Args:
        headers: end-to-end headers for the upstream, without the body's framing.
        refuse: answers the client if the upstream does not.
        target: of the request, where it is another than the client's.
        repeatable: whatever the method, the request may be sent twice.
        patience_s: for the answer's head, without the upstream taking any of the body; None:
            an engine may think for hours.
    """

    __slots__ = (
        "_call",
        "_exchange",
        "_loop",
        "_moved_at",
        "_patience_s",
        "_paused",
        "_refuse",
        "_timer",
    )

    def __init__(
        self,
        pool: Pool,
        exchange: Exchange,
        address: Address,
        headers: Headers,
        refuse: Refuse,
        *,
        target: bytes | None = None,
        repeatable: bool = False,
        patience_s: float | None = PATIENCE_S,
    ) -> None:
        self._exchange = exchange
        self._refuse = refuse
        self._loop = asyncio.get_running_loop()
        self._patience_s = patience_s
        self._moved_at = self._loop.time()  # when the upstream last took any of the body
        self._paused = False  # it takes none now
        self._timer: asyncio.TimerHandle | None = None
        if patience_s is not None:
            self._timer = self._loop.call_later(patience_s, self._check)
        chunked = exchange.header(b"transfer-encoding") is not None
        self._call: Call = pool.send(
            address,
            exchange.method,
            exchange.target if target is None else target,
            headers,
            self,
            repeatable=repeatable or exchange.method in _IDEMPOTENT,
            body=None,
            chunked=chunked,
        )

    def _check(self) -> None:
        """Give the upstream up if it has made us wait for too long."""
        self._timer = None
        if self._patience_s is None:
            return
        waits = self._exchange.complete or self._paused  # else it is the client that we wait for
        left = self._patience_s - (self._loop.time() - self._moved_at if waits else 0.0)
        if left > 0:
            self._timer = self._loop.call_later(left, self._check)
            return
        self._call.abort()
        self._refuse(self._exchange, Failure.LOST)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- the client ------------------------------------------------------------------------

    def body(self, chunk: bytes) -> None:
        self._moved_at = self._loop.time()
        self._call.write(chunk)

    def body_end(self) -> None:
        self._moved_at = self._loop.time()
        self._call.finish()

    def client_left(self) -> None:
        self._wait_no_more()
        self._call.abort()

    def pause(self) -> None:
        self._call.pause()

    def resume(self) -> None:
        self._call.resume()

    def end_now(self) -> None:
        self._wait_no_more()
        self._call.abort()
        self._exchange.finish()

    # --- the upstream ------------------------------------------------------------------------

    def head(self, status: int, headers: Headers) -> None:
        self._wait_no_more()
        self._exchange.start(status, end_to_end(headers))

    def piece(self, piece: bytes) -> None:
        self._exchange.write(piece)

    def end(self, last: bytes) -> None:
        self._exchange.finish(last)

    def failed(self, failure: Failure) -> None:
        self._wait_no_more()
        if failure is Failure.BROKEN:
            self._exchange.abort()
        else:
            self._refuse(self._exchange, failure)

    def pause_body(self) -> None:
        self._paused = True
        self._exchange.pause()

    def resume_body(self) -> None:
        self._paused = False
        self._moved_at = self._loop.time()
        self._exchange.resume()


def without_private(headers: Headers, prefix: bytes) -> Headers:
    """End-to-end headers less those that only our own parts may set; `expect` is answered here."""
    return [
        pair
        for pair in end_to_end(headers)
        if not pair[0].startswith(prefix) and pair[0] != b"expect"
    ]


def is_endless(query: str) -> bool:
    """Whether the answer goes on until somebody ends it: a watch, or a followed log."""
    return any(
        name in ("watch", "follow") and value in ("true", "1", "yes", "on", "t", "y")
        for name, _, value in (part.partition("=") for part in query.lower().split("&"))
    )
