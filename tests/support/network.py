"""A network between a program and a server, to be cut and frozen by tests."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

CHUNK = 65536

Target = tuple[str, int] | str


class Network:
    """Passes connections on while it is up.

    Args:
        target: host and port, or the path of a Unix socket; or what says so for each connection.

    Attributes:
        port: where it listens on 127.0.0.1.
    """

    def __init__(self, target: Target | Callable[[], Target]) -> None:
        self._target = target if callable(target) else lambda: target
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.port = 0

    async def up(self) -> None:
        self._flows.set()
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuse connections, and reset those that there are."""
        if self._server is not None:
            self._server.close()
        self._server = None
        for writer in self._open:
            writer.transport.abort()
        self._flows.set()
        while self._open:  # noqa: ASYNC110
            await asyncio.sleep(0)

    def freeze(self) -> None:
        """Let nothing through, without a word to anybody."""
        self._flows.clear()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = self._target()
        if isinstance(target, str):
            theirs = await asyncio.open_unix_connection(target)
        else:
            theirs = await asyncio.open_connection(*target)
        ours = {writer, theirs[1]}
        self._open |= ours
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._flow(reader, theirs[1]))
                group.create_task(self._flow(theirs[0], writer))
        finally:
            self._open -= ours

    async def _flow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def network(target: Target | Callable[[], Target]) -> AsyncIterator[Network]:
    """A network that is up."""
    made = Network(target)
    await made.up()
    try:
        yield made
    finally:
        await made.down()
