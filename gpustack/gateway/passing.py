"""Requests that are not the gateway's own: passed on as they are, both ways."""

from collections.abc import Callable

from gpustack.forward.exchange import Exchange
from gpustack.forward.http1 import Headers, end_to_end
from gpustack.forward.upstream import Address, Call, Failure, Pool

Refuse = Callable[[Exchange, Failure], None]


class Passing:
    """Receiver of a client's request and sink of an upstream's answer: bytes in, bytes out.

    Args:
        headers: end-to-end headers for the upstream, without the body's framing.
        refuse: answers the client if the upstream does not.
    """

    __slots__ = ("_call", "_exchange", "_refuse")

    def __init__(
        self, pool: Pool, exchange: Exchange, address: Address, headers: Headers, refuse: Refuse
    ) -> None:
        self._exchange = exchange
        self._refuse = refuse
        chunked = exchange.header(b"transfer-encoding") is not None
        self._call: Call = pool.send(
            address,
            exchange.method,
            exchange.target,
            headers,
            self,
            body=None,
            chunked=chunked,
        )

    # --- the client ------------------------------------------------------------------------

    def body(self, chunk: bytes) -> None:
        self._call.write(chunk)

    def body_end(self) -> None:
        self._call.finish()

    def client_left(self) -> None:
        self._call.abort()

    def pause(self) -> None:
        self._call.pause()

    def resume(self) -> None:
        self._call.resume()

    def end_now(self) -> None:
        self._call.abort()
        self._exchange.finish()

    # --- the upstream ------------------------------------------------------------------------

    def head(self, status: int, headers: Headers) -> None:
        self._exchange.start(status, end_to_end(headers))

    def piece(self, piece: bytes) -> None:
        self._exchange.write(piece)

    def end(self, last: bytes) -> None:
        self._exchange.finish(last)

    def failed(self, failure: Failure) -> None:
        if failure is Failure.BROKEN:
            self._exchange.abort()
        else:
            self._refuse(self._exchange, failure)

    def pause_body(self) -> None:
        self._exchange.pause()

    def resume_body(self) -> None:
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
    return any(part in ("watch=true", "follow=true") for part in query.lower().split("&"))
