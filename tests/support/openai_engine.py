"""An inference engine for tests of the data plane: a server in the test's own loop.

It reads requests by itself (nothing of ours is in it) and answers with what the test gives it.
"""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.support.wait import eventually


@dataclass
class Seen:
    """A request as it arrived. `raw_head` has every byte of the head."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    raw_head: bytes

    def json(self) -> object:
        return json.loads(self.body)


class Wire:
    """How an answer is written. `left` is set when the other side closed."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer

    async def raw(self, content: bytes) -> None:
        if self.writer.transport.is_closing():
            raise ConnectionResetError  # uvloop would raise RuntimeError
        self.writer.write(content)
        await self.writer.drain()

    async def json(self, body: object, status: int = 200) -> None:
        content = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
        await self.raw(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)

    async def stream_head(self) -> None:
        await self.raw(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )

    async def chunk(self, content: bytes) -> None:
        await self.raw(b"%x\r\n%b\r\n" % (len(content), content))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    def die(self) -> None:
        """Reset the connection, as the kernel does for a killed process with bytes unread."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Behaviour = Callable[[Seen, Wire], Awaitable[None]]

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


async def answer_json(seen: Seen, wire: Wire) -> None:
    await wire.json({"object": "chat.completion", "choices": [{"index": 0}], "usage": USAGE})


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def content_events(count: int) -> list[bytes]:
    return [event({"choices": [{"delta": {"content": f"w{i}"}}]}) for i in range(count)]


USAGE_EVENT = event({"choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"


def streaming(count: int, delay_s: float = 0.0, *, events: list[bytes] | None = None) -> Behaviour:
    """A stream of `count` events, with a usage event if the request asks for one."""

    async def answer(seen: Seen, wire: Wire) -> None:
        asked = seen.json()
        assert isinstance(asked, dict)
        options = asked.get("stream_options") or {}
        last = [USAGE_EVENT] if options.get("include_usage") else []
        await wire.stream_head()
        for one in [*(events or content_events(count)), *last, DONE]:
            await wire.chunk(one)
            if delay_s:
                await asyncio.sleep(delay_s)
        await wire.end()

    return answer


@dataclass
class Engine:
    """A running engine.

    Attributes:
        answer: what it does with a request; may be replaced at any time.
        left: set when a client closes its connection before it has been answered.
    """

    port: int = 0
    answer: Behaviour = answer_json
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)
    server: asyncio.Server | None = None
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.add(writer)
        try:
            while True:
                seen = await _read(reader)
                self.seen.append(seen)
                await self._answer(seen, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _answer(
        self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer, and stop when the client leaves meanwhile."""

        async def watch() -> None:
            while not reader.at_eof():
                if reader.exception() is not None:
                    break
                await asyncio.sleep(0.005)
            self.left.set()
            raise ConnectionResetError

        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(watch())
                await self.answer(seen, Wire(writer))
                watcher.cancel()
        except* ConnectionError:
            self.left.set()
            raise ConnectionResetError from None

    def stop(self) -> None:
        """Refuse connections and drop those there are, as a killed process does."""
        assert self.server is not None
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> Seen:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    pairs = [line.partition(":") for line in lines if line]
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    return Seen(method, target, headers, body, head)


@asynccontextmanager
async def running(answer: Behaviour = answer_json) -> AsyncIterator[Engine]:
    """An engine on a free port."""
    engine = Engine(answer=answer)
    engine.server = await asyncio.start_server(engine.serve, "127.0.0.1", 0, limit=64 * 1024 * 1024)
    engine.port = engine.server.sockets[0].getsockname()[1]
    try:
        yield engine
    finally:
        engine.stop()

        async def quiet() -> bool:
            return not engine.writers

        await eventually(quiet, "the engine's connections end")
