"""Requests to engines that are no better HTTP servers than they must be."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gpustack.lib.secrets import Secret
from gpustack.worker.supervisor.asking import Answer, ask


@asynccontextmanager
async def engine(says: bytes, *, closes: bool) -> AsyncIterator[int]:
    """One that answers every request with `says`; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(says)
        if not closes:
            await reader.read()  # until its client has left
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("says", "closes", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", False, b"{}"),
        (b"HTTP/1.1 200 OK\r\ncontent-length:2 \r\nX: y\r\n\r\n{}", True, b"{}"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", False, b""),
        (b"HTTP/1.0 200\r\n\r\n" + b"x" * 100, True, b"x" * 100),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", True, b"{}"),
    ],
)
async def test_an_answer_is_read_to_the_end_that_it_has(
    says: bytes, closes: bool, body: bytes
) -> None:
    async with engine(says, closes=closes) as port:
        answer = await ask(port, "/", Secret("s"), limit_s=5, at_most=1000)
    assert answer == Answer(200, body)


@pytest.mark.parametrize(
    "says",
    [
        b"",
        b"SSH-2.0\r\n",
        b"HTTP/1.1 OK 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
        b"HTTP/1.1 200 " + b"x" * 100_000,
    ],
)
async def test_what_is_no_http_is_an_error_of_the_connection(says: bytes) -> None:
    async with engine(says, closes=True) as port:
        with pytest.raises(ConnectionError, match=r"no HTTP|no answer"):
            await ask(port, "/", Secret("s"), limit_s=5, at_most=1000)
