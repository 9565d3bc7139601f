"""Waiting for whole answers and for lines: what control traffic needs of an upstream."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from gpustack.forward.http1 import Headers
from gpustack.forward.upstream import Address, Call, Failure, Pool

_LINE_BYTES: Final = 16 * 1024 * 1024


class FetchFailed(Exception):
    """No whole answer came."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Headers
    body: bytes


class _Whole:
    """A sink that keeps the answer."""

    def __init__(self, limit: int) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._limit = limit
        self._status = 0
        self._headers: Headers = []
        self._body = bytearray()

    def head(self, status: int, headers: Headers) -> None:
        self._status, self._headers = status, headers

    def piece(self, piece: bytes) -> None:
        self._body += piece
        if len(self._body) > self._limit and not self.answer.done():
            self.answer.set_exception(FetchFailed(f"more than {self._limit} bytes"))

    def end(self, last: bytes) -> None:
        self.piece(last)
        if not self.answer.done():
            self.answer.set_result(Answer(self._status, self._headers, bytes(self._body)))

    def failed(self, failure: Failure) -> None:
        if not self.answer.done():
            self.answer.set_exception(FetchFailed(failure.value))

    def pause_body(self) -> None: ...
    def resume_body(self) -> None: ...


async def fetch(
    pool: Pool,
    address: Address,
    method: str,
    target: bytes,
    headers: Headers,
    *,
    body: bytes = b"",
    timeout_s: float = 10.0,
    limit: int = 1024 * 1024,
) -> Answer:
    """The answer to a request, which must be one that may be made twice.

    Raises:
        FetchFailed: there is none, it is larger than `limit`, or `timeout_s` is over.
    """
    whole = _Whole(limit)
    call = pool.send(address, method, target, headers, whole, repeatable=True, body=body)
    try:
        async with asyncio.timeout(timeout_s):
            return await whole.answer
    except TimeoutError:
        raise FetchFailed(f"no answer in {timeout_s:g} s") from None
    finally:
        call.abort()


class Lines:
    """An answer read line by line: `async for line in lines`.

    Attributes:
        status: of the answer.
    """

    HIGH_WATER = 1024 * 1024  # bytes of lines not read yet, above which the source has to wait

    def __init__(self, silence_s: float) -> None:
        self.status = 0
        self.call: Call | None = None
        self._silence_s = silence_s
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._rest = b""
        self._over: str | None = None
        self._ended = False
        self._news = asyncio.Event()

    async def opened(self) -> None:
        """Wait for the answer's head."""
        while not self.status:
            await self._wait()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._lines:
            if self._ended:
                raise StopAsyncIteration
            if self.call is not None:
                self.call.resume()
            await self._wait()
        line = self._lines.popleft()
        self._waiting_bytes -= len(line)
        return line

    async def _wait(self) -> None:
        if self._over is not None:
            raise FetchFailed(self._over)
        self._news.clear()
        try:
            async with asyncio.timeout(self._silence_s):
                await self._news.wait()
        except TimeoutError:
            raise FetchFailed(f"silent for {self._silence_s:g} s") from None

    def head(self, status: int, headers: Headers) -> None:
        self.status = status
        self._news.set()

    def piece(self, piece: bytes) -> None:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._lines.extend(lines)
        self._waiting_bytes += sum(map(len, lines))
        if self._waiting_bytes > self.HIGH_WATER and self.call is not None:
            self.call.pause()
        if len(self._rest) > _LINE_BYTES:
            self._over = "a line without an end"
        self._news.set()

    def end(self, last: bytes) -> None:
        self.piece(last)
        self._ended = True

    def failed(self, failure: Failure) -> None:
        self._over = failure.value
        self._news.set()

    def pause_body(self) -> None: ...
    def resume_body(self) -> None: ...


@asynccontextmanager
async def open_lines(
    pool: Pool, address: Address, target: bytes, headers: Headers, *, silence_s: float
) -> AsyncIterator[Lines]:
    """GET `target` and read its answer line by line.

    Raises:
        FetchFailed: when opening or reading: lost, or silent for `silence_s`.
    """
    lines = Lines(silence_s)
    lines.call = pool.send(address, "GET", target, headers, lines, repeatable=True)
    try:
        await lines.opened()
        yield lines
    finally:
        lines.call.abort()
