"""The HTTP/1.1 server that gateway, relay and agent share.

    server = Server(app)                        # app: Callable[[Exchange], Receiver]
    await server.listen(sock)
    ...
    await server.drain()

An application is called once per request, when its head is there, and returns a `Receiver` that
is told of the body, of the client's leaving and of back-pressure; it answers through the
exchange (`respond`, or `start`, `write`, `finish`). No task is started and nothing is awaited.

`asynchronous(handle, group)` makes such an application of `async def handle(exchange)`, which
may `await exchange.read(limit)` and `await exchange.send(piece)`. A `GPUStackError` that it
raises becomes the answer. It is cancelled when its client leaves.
"""

import asyncio
import logging
import math
import socket
import ssl
from collections.abc import Awaitable, Callable

from gpustack.errors import GPUStackError
from gpustack.forward import guard
from gpustack.forward.connection import Connection, Limits
from gpustack.forward.exchange import IGNORED, Exchange, Inbox, Receiver
from gpustack.lib.platform import notice_dead_peer

__all__ = ["IGNORED", "App", "Exchange", "Limits", "Receiver", "Server", "asynchronous"]

logger = logging.getLogger(__name__)

#: For the rest of a request's head, once the server drains.
HURRY_S = 2.0

App = Callable[[Exchange], Receiver]


class Server:
    """Listening sockets, their connections, and how they end.

    Args:
        upgrade: the protocol that requests may ask to go on with, if any.

    Attributes:
        draining: every answer says `Connection: close`.
    """

    def __init__(
        self, app: App, *, limits: Limits | None = None, sweep_s: float = 1.0, upgrade: bytes = b""
    ) -> None:
        self.app = app
        self.upgrade = upgrade
        self.limits = limits or Limits()
        self.draining = False
        self.connections: set[Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._listeners: list[asyncio.Server] = []
        self._sweep_s = sweep_s
        self._timer: asyncio.TimerHandle | None = None
        self._idle_patience_s = math.inf
        self._changed = asyncio.Event()

    def now(self) -> float:
        return self._loop.time()

    async def listen(self, sock: socket.socket, *, tls: ssl.SSLContext | None = None) -> None:
        """Answer what comes in at `sock`, a bound socket; it belongs to the server now.

        Args:
            tls: speak HTTPS there.
        """
        notice_dead_peer(sock)  # accepted sockets inherit it
        scheme = b"http" if tls is None else b"https"
        opened = await self._loop.create_server(
            lambda: Connection(self, scheme),
            sock=sock,
            backlog=4096,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else self.limits.head_s,
            ssl_shutdown_timeout=None if tls is None else self.limits.flush_s,
        )
        self._listeners.append(opened)
        if self._timer is None:
            self._timer = self._loop.call_later(self._sweep_s, self._sweep)

    def _sweep(self) -> None:
        """One timer for all connections: a timer for each would cost every request."""
        self._timer = self._loop.call_later(self._sweep_s, self._sweep)
        now = self.now()
        for connection in list(self.connections):
            if connection.deadline <= now:
                connection.expire()
            elif self.draining:
                connection.close_if_idle(now - self._idle_patience_s)
                connection.hurry(now + HURRY_S)
                self._end_endless(connection)

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._changed.set()

    async def drain(self, *, idle_s: float = 5.0, limit_s: float = 600.0) -> None:
        """Stop accepting, let what is open end well, and return when nothing is left.

        Endless exchanges are ended at once. The next answer on every connection closes it; a
        connection without a request is closed once it has been idle for `idle_s`, so that a
        busy client never writes into a closed one. After `limit_s` all is broken off.
        """
        self.draining = True
        self._idle_patience_s = idle_s
        for listener in self._listeners:
            listener.close()
        self._sweep_s = min(self._sweep_s, max(idle_s / 4, 0.05))
        for connection in list(self.connections):
            self._end_endless(connection)
        if self._timer is not None:
            self._timer.cancel()
        self._sweep()
        try:
            async with asyncio.timeout(limit_s):
                while self.connections:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.warning("%d connections are broken off", len(self.connections))
        self.close()

    def _end_endless(self, connection: Connection) -> None:
        exchange = connection.queue[0] if connection.queue else None
        if exchange is None or not exchange.endless or exchange.finished:
            return
        if exchange.receiver is not None:
            guard.tell(exchange, exchange.receiver.end_now)

    def close(self) -> None:
        """Break everything off."""
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


Handle = Callable[[Exchange], Awaitable[None]]


def asynchronous(handle: Handle, group: asyncio.TaskGroup) -> App:
    """An application that runs `handle` as a task of `group` for each request."""

    def app(exchange: Exchange) -> Receiver:
        inbox = Inbox(exchange)
        exchange.receiver = inbox
        inbox.task = group.create_task(_answer(handle, exchange))
        return inbox

    return app


async def _answer(handle: Handle, exchange: Exchange) -> None:
    """Run `handle`, and see to it that the exchange ends whatever it does."""
    try:
        await handle(exchange)
        if not exchange.status:
            raise RuntimeError("the handler gave no answer")  # noqa: TRY301
    except GPUStackError as error:
        exchange.respond_error(error)
    except Exception:
        logger.exception("%s %s failed", exchange.method, exchange.path)
        exchange.respond_error(GPUStackError())
    finally:
        exchange.finish()
