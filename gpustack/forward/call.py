"""One request to an upstream, seen from both its ends: whoever asked, and the connection."""

from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from gpustack.forward.http1 import Headers

Address = tuple[str, int]


class Peer(NamedTuple):
    """The other end of a connection.

    Attributes:
        certificate: the one that it must show, as PEM; empty: bytes go in clear.
    """

    address: Address
    certificate: str = ""


#: Of a streamed body, kept so that a dead pooled connection can be replaced; more is sent once.
_KEPT_BYTES: Final = 64 * 1024
ONE_WRITE_BYTES: Final = 64 * 1024  # above, joining head and body costs more than a writev


class Carrier(Protocol):
    """What a call needs of the connection that carries it."""

    def write(self, raw: bytes) -> None: ...
    def writelines(self, pieces: list[bytes]) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def drop(self) -> None: ...


class Dialler(Protocol):
    """What a call needs of the pool that made it."""

    def connect(self, peer: Peer, call: "Call") -> None: ...


class Failure(StrEnum):
    """How far a call came that got no whole answer."""

    UNCONNECTED = "unconnected"  # no byte of the request has left
    UNTRUSTED = "untrusted"  # nor here: the peer does not show the certificate that it must
    LOST = "lost"  # no byte of the answer has come
    BROKEN = "broken"  # the answer had begun

    @property
    def unsent(self) -> bool:
        """Whether no byte of the request has left."""
        return self in (Failure.UNCONNECTED, Failure.UNTRUSTED)


class Sink(Protocol):
    """Where an answer goes. Hop-by-hop headers are still in it."""

    def head(self, status: int, headers: Headers) -> None: ...

    def piece(self, piece: bytes) -> None:
        """A piece of the answer; empty when a head came alone."""

    def end(self, last: bytes) -> None:
        """The answer is whole, with this last piece."""

    def failed(self, failure: Failure) -> None: ...

    def pause_body(self) -> None:
        """The upstream takes the request's body slower than it comes."""

    def resume_body(self) -> None: ...


class _Nobody:
    """The sink of a call that is done: keeps it from holding on to what it served."""

    def head(self, status: int, headers: Headers) -> None: ...
    def piece(self, piece: bytes) -> None: ...
    def end(self, last: bytes) -> None: ...
    def failed(self, failure: Failure) -> None: ...
    def pause_body(self) -> None: ...
    def resume_body(self) -> None: ...


_NOBODY: Final = _Nobody()


class Call:
    """One request under way.

    Attributes:
        done: its sink hears nothing more.
        started: the answer's head has come.
    """

    __slots__ = (
        "_chunked",
        "_kept",
        "_kept_bytes",
        "_peer",
        "_pool",
        "connection",
        "done",
        "method",
        "sent_all",
        "sink",
        "started",
    )

    def __init__(
        self, pool: Dialler, peer: Peer, method: str, sink: Sink, *, chunked: bool
    ) -> None:
        self._pool = pool
        self._peer = peer
        self._chunked = chunked
        self._kept: list[bytes] | None = []
        self._kept_bytes = 0
        self.connection: Carrier | None = None
        self.method = method
        self.sink = sink
        self.sent_all = False
        self.done = False
        self.started = False

    def write(self, piece: bytes) -> None:
        """Send a piece of the request's body."""
        if piece and not self.done:
            self.put(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)

    def finish(self) -> None:
        """The request's body is complete."""
        if not self.sent_all and not self.done:
            self.sent_all = True
            if self._chunked:
                self.put(b"0\r\n\r\n")

    def put(self, raw: bytes, *, keep: bool = False) -> None:
        """Send bytes of the message; `keep`: whatever their size, for a second attempt."""
        connection = self.connection
        if self._kept is not None:
            self._kept_bytes += len(raw)
            if keep or connection is None or self._kept_bytes <= _KEPT_BYTES:
                self._kept.append(raw)
            else:
                self._kept = None
        if connection is not None:
            connection.write(raw)
        elif self._kept_bytes > _KEPT_BYTES and not keep:
            self.sink.pause_body()

    def begin(self, connection: Carrier, *, may_repeat: bool) -> None:
        """Send what has been put so far over `connection`."""
        self.connection = connection
        pieces = self._kept or []
        if not may_repeat:
            self._kept = None
        if len(pieces) == 1:
            connection.write(pieces[0])
        elif sum(map(len, pieces)) <= ONE_WRITE_BYTES:
            connection.write(b"".join(pieces))
        else:
            connection.writelines(pieces)
        if self._kept_bytes > _KEPT_BYTES:
            self.sink.resume_body()

    def again(self) -> bool:
        """Try once more on a fresh connection, if all that was sent is still here."""
        if self._kept is None:
            return False
        self.connection = None
        self._pool.connect(self._peer, self)
        return True

    def answering(self) -> None:
        """The answer has begun: nothing will be sent again."""
        self.started = True
        self._kept = None

    def fail(self, failure: Failure) -> None:
        if not self.done:
            self.settle().failed(failure)

    def settle(self) -> Sink:
        """Be done. Answers the sink, for its last call."""
        sink, self.sink = self.sink, _NOBODY
        self.done = True
        self.connection = None
        return sink

    def abort(self) -> None:
        """Give the call up: the upstream sees its connection close."""
        if self.done:
            return
        connection = self.connection
        self.settle()
        if connection is not None:
            connection.drop()

    def pause(self) -> None:
        """Take no more of the answer for now."""
        if self.connection is not None and not self.done:
            self.connection.pause()

    def resume(self) -> None:
        if self.connection is not None and not self.done:
            self.connection.resume()
