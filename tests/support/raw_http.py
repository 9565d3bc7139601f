"""HTTP/1.1 by hand: requests that no well-behaved client would send, answers byte by byte."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import cast


@dataclass
class Reply:
    """An answer as it came.

    Attributes:
        headers: lower-case names; the last of equal ones.
        pieces: the chunks of a chunked body, as they were framed.
        whole: the body's end was seen.
    """

    status: int
    headers: dict[str, str]
    body: bytes = b""
    pieces: tuple[bytes, ...] = ()
    whole: bool = True


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its sockets with it
            self.writer.transport.abort()

    @classmethod
    async def to(cls, port: int) -> "Client":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, raw: bytes) -> None:
        self.writer.write(raw)

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> None:
        fields = {"Host": "127.0.0.1", **(headers or {})}
        if body or method == "POST":
            fields.setdefault("Content-Length", str(len(body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    async def head(self) -> Reply:
        async with asyncio.timeout(10):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines if line]
        status = int(first.split(" ")[1])
        return Reply(status, {name.lower(): value.strip() for name, _, value in pairs})

    async def reply(self, *, head_only: bool = False) -> Reply:
        """The next answer; `whole` is False when the connection ended before it did."""
        found = await self.head()
        if head_only or found.status in (204, 304) or found.status < 200:
            return found
        try:
            async with asyncio.timeout(10):
                if found.headers.get("transfer-encoding") == "chunked":
                    pieces = [piece async for piece in self.chunks()]
                    found.pieces, found.body = tuple(pieces), b"".join(pieces)
                elif "content-length" in found.headers:
                    found.body = await self.reader.readexactly(int(found.headers["content-length"]))
                else:
                    found.body = await self.reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            found.whole = False
        return found

    async def chunk(self) -> bytes:
        size = int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16)
        piece = await self.reader.readexactly(size + 2)
        return piece[:-2]

    async def chunks(self) -> AsyncIterator[bytes]:
        while piece := await self.chunk():
            yield piece

    def stop_reading(self) -> None:
        cast("asyncio.Transport", self.writer.transport).pause_reading()

    def read_on(self) -> None:
        cast("asyncio.Transport", self.writer.transport).resume_reading()

    async def closed(self, *, within_s: float = 5) -> bool:
        """Whether the other side ends the connection, with nothing more to say."""
        try:
            async with asyncio.timeout(within_s):
                return await self.reader.read(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass

    def abort(self) -> None:
        self.writer.transport.abort()


async def ask(
    port: int, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
) -> Reply:
    """One request on a connection of its own."""
    client = await Client.to(port)
    try:
        client.ask(method, path, headers, body)
        return await client.reply(head_only=method == "HEAD")
    finally:
        await client.close()


async def raw(port: int, message: bytes) -> bytes:
    """All that comes back for `message` until the other side closes."""
    client = await Client.to(port)
    try:
        client.send(message)
        async with asyncio.timeout(10):
            return await client.reader.read()
    finally:
        await client.close()
