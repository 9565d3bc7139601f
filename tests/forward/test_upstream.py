"""The upstream client against servers of every kind."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from gpustack.forward.call import Peer
from gpustack.forward.fetch import Answer, FetchFailed, fetch, open_lines
from gpustack.forward.http1 import Headers, end_to_end
from gpustack.forward.upstream import Call, Connection, Failure, Pool
from tests.support.openai_engine import Engine, Seen, Wire, answer_json, running
from tests.support.wait import eventually

HOST: Headers = [(b"host", b"x")]


@asynccontextmanager
async def pooled() -> AsyncIterator[Pool]:
    async with asyncio.TaskGroup() as group:
        pool = Pool(group, connect_timeout_s=1.0)
        try:
            yield pool
        finally:
            pool.close()


@dataclass
class Recorder:
    """A sink that notes what it is told."""

    heads: list[tuple[int, Headers]] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    failure: Failure | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    paused: bool = False

    def head(self, status: int, headers: Headers) -> None:
        assert not self.heads
        assert not self.over.is_set()
        self.heads.append((status, headers))

    def piece(self, piece: bytes) -> None:
        assert self.heads
        assert not self.over.is_set()
        self.pieces.append(piece)

    def end(self, last: bytes) -> None:
        self.piece(last)
        self.over.set()

    def failed(self, failure: Failure) -> None:
        assert not self.over.is_set()
        self.failure = failure
        self.over.set()

    def pause_body(self) -> None:
        self.paused = True

    def resume_body(self) -> None:
        self.paused = False

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


def saying(parts: Iterable[bytes], *, close: bool = False, reset: bool = False):  # type: ignore[no-untyped-def]
    async def answer(seen: Seen, wire: Wire) -> None:
        for part in parts:
            await wire.raw(part)
            await asyncio.sleep(0.005)
        if close:
            wire.writer.close()
        if reset:
            wire.die()

    return answer


async def ask(pool: Pool, engine: Engine, method: str = "GET", body: bytes = b"") -> Recorder:
    sink = Recorder()
    pool.send(("127.0.0.1", engine.port), method, b"/", HOST, sink, repeatable=True, body=body)
    async with asyncio.timeout(5):
        await sink.over.wait()
    return sink


async def test_connections_are_used_again() -> None:
    async with running() as engine, pooled() as pool:
        for _ in range(5):
            assert (await ask(pool, engine)).heads[0][0] == 200
        assert engine.connections == 1


OK = b"HTTP/1.1 200 OK\r\n"
BODIES = {
    "length": ([OK + b"Content-Length: 5\r\n\r\nhello"], 1),
    "length in pieces": ([OK + b"Content-Len", b"gth: 5\r\n\r\nhe", b"llo"], 1),
    "chunked": ([OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"], 1),
    "with trailers": (
        [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Late: 1\r\n\r\n"],
        1,
    ),
    "interim answers": (
        [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nX-E: 1\r\n\r\n" + OK,
         b"Content-Length: 5\r\n\r\nhello"],
        1,
    ),
    "closing": ([OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello"], 2),
    "http 1.0": ([b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"], 2),
    "more than said": ([OK + b"Content-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n"], 2),
    "a second answer": (
        [OK + b"Content-Length: 5\r\n\r\nhello" + OK + b"Content-Length: 4\r\n\r\nevil"],
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_is_whole_however_it_is_framed(name: str) -> None:
    parts, connections = BODIES[name]
    async with running(saying(parts)) as engine, pooled() as pool:
        for _ in range(2):
            sink = await ask(pool, engine)
            assert sink.failure is None
            assert sink.body == b"hello"
            assert not {n for n, _ in sink.heads[0][1]} & {b"x-late", b"x-e"}
        assert engine.connections == connections


async def test_a_body_that_ends_with_its_connection_is_whole() -> None:
    parts = [OK + b"\r\nhel", b"lo"]
    async with running(saying(parts, close=True)) as engine, pooled() as pool:
        sink = await ask(pool, engine)
        assert (sink.body, sink.failure) == (b"hello", None)


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("HEAD", OK + b"Content-Length: 5\r\n\r\n"),
        ("HEAD", OK + b"Transfer-Encoding: chunked\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 No\r\nContent-Length: 5\r\n\r\n"),
    ],
)
async def test_an_answer_without_a_body_ends_with_its_head(method: str, head: bytes) -> None:
    async with running(saying([head])) as engine, pooled() as pool:
        sink = await ask(pool, engine, method)
        assert (sink.body, sink.failure) == (b"", None)


@pytest.mark.parametrize(
    "head",
    [
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        OK + b"Transfer-Encoding: gzip\r\n\r\nhello",
        OK + b"Content-Length: -1\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"SSH-2.0\r\n\r\n",
        OK + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        OK + b"X: a\r\n b\r\n\r\n",
    ],
)
async def test_what_two_readers_could_read_differently_is_no_answer(head: bytes) -> None:
    async with running(saying([head])) as engine, pooled() as pool:
        sink = await ask(pool, engine)
        assert sink.failure is Failure.LOST
        assert not sink.heads


@pytest.mark.parametrize(
    ("before", "failure"),
    [
        (OK, Failure.LOST),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n0\r\n", Failure.BROKEN),
    ],
)
async def test_a_field_without_end_is_not_collected(before: bytes, failure: Failure) -> None:
    """The parser keeps a field until it is whole."""
    async with running(saying([before + b"X: ", *[b"a" * 60_000] * 10])) as engine:
        async with pooled() as pool:
            assert (await ask(pool, engine)).failure is failure


async def test_how_far_a_call_came_is_known() -> None:
    async with pooled() as pool, running() as engine:
        engine.answer = saying([OK + b"Content-Length: 5\r\n\r\nhe"], close=True)
        assert (await ask(pool, engine)).failure is Failure.BROKEN
        engine.answer = saying([OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n"], close=True)
        assert (await ask(pool, engine)).failure is Failure.BROKEN
        engine.answer = saying([OK + b"\r\nhalf"], reset=True)
        assert (await ask(pool, engine)).failure is Failure.BROKEN
        engine.answer = saying([], close=True)
        assert (await ask(pool, engine)).failure is Failure.LOST
        engine.stop()
        assert (await ask(pool, engine)).failure is Failure.UNCONNECTED


async def test_a_host_that_never_accepts_is_given_up_in_time() -> None:
    async with pooled() as pool:
        sink = Recorder()
        pool.send(("192.0.2.1", 9), "GET", b"/", HOST, sink)  # RFC 5737: nobody is there
        async with asyncio.timeout(3):
            await sink.over.wait()
        assert sink.failure is Failure.UNCONNECTED


@pytest.mark.parametrize("size", [5, 300_000])
async def test_a_pooled_connection_that_died_is_replaced_unseen(size: int) -> None:
    async with running() as engine, pooled() as pool:
        await ask(pool, engine, "POST", b"x")

        async def die_once(seen: Seen, wire: Wire) -> None:
            engine.answer = answer_json
            wire.die()

        engine.answer = die_once
        sink = await ask(pool, engine, "POST", b"y" * size)
        assert sink.heads[0][0] == 200
        assert engine.seen[-1].body == b"y" * size
        assert engine.connections == 2


async def test_what_must_not_be_done_twice_gets_a_connection_of_its_own() -> None:
    async with running() as engine, pooled() as pool:
        await ask(pool, engine)
        sink = Recorder()
        pool.send(("127.0.0.1", engine.port), "POST", b"/", HOST, sink, body=b"x")
        await sink.over.wait()
        assert sink.heads[0][0] == 200
        assert engine.connections == 2


async def test_a_fresh_connection_that_dies_is_not_tried_again() -> None:
    async with running(saying([], reset=True)) as engine, pooled() as pool:
        assert (await ask(pool, engine)).failure is Failure.LOST
        assert len(engine.seen) == 1


async def test_a_pooled_connection_is_not_replaced_after_an_answer_began() -> None:
    async with running() as engine, pooled() as pool:
        await ask(pool, engine)
        engine.answer = saying([b"HTTP/1.1 2"], reset=True)
        assert (await ask(pool, engine)).failure is Failure.LOST
        assert len(engine.seen) == 2


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_in_pieces_arrives_whole(chunked: bool) -> None:
    async with running() as engine, pooled() as pool:
        for size in (0, 10, 100_000, 5_000_000):
            sink = Recorder()
            headers = HOST if chunked else [*HOST, (b"content-length", b"%d" % size)]
            address = ("127.0.0.1", engine.port)
            call = pool.send(address, "POST", b"/", headers, sink, body=None, chunked=chunked)
            for start in range(0, size, 50_000):
                call.write(b"z" * min(50_000, size - start))
            call.finish()
            async with asyncio.timeout(5):
                await sink.over.wait()
            assert engine.seen[-1].body == b"z" * size


async def test_a_connection_whose_request_was_not_all_sent_is_not_used_again() -> None:
    seen = bytearray()

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 413 X\r\nContent-Length: 0\r\n\r\n")
        seen.extend(await reader.read())
        writer.close()

    async with await asyncio.start_server(early, "127.0.0.1", 0) as server, pooled() as pool:
        address = ("127.0.0.1", server.sockets[0].getsockname()[1])
        for _ in range(2):
            sink = Recorder()
            headers = [*HOST, (b"content-length", b"10")]
            pool.send(address, "POST", b"/", headers, sink, body=None)
            async with asyncio.timeout(5):
                await sink.over.wait()
            assert sink.heads[0][0] == 413
            assert sink.failure is None


async def test_an_aborted_call_hears_nothing_more_and_its_server_sees_it_close() -> None:
    async def slowly(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        for _ in range(1000):
            await wire.chunk(b"x")
            await asyncio.sleep(0.005)

    async with running(slowly) as engine, pooled() as pool:
        sink = Recorder()
        call = pool.send(("127.0.0.1", engine.port), "GET", b"/", HOST, sink)

        async def began() -> bool:
            return bool(sink.pieces)

        await eventually(began, "the answer")
        call.abort()
        count = len(sink.pieces)
        async with asyncio.timeout(0.5):
            await engine.left.wait()
        assert len(sink.pieces) == count
        assert not sink.over.is_set()


async def test_a_call_aborted_before_its_connection_is_there_sends_nothing() -> None:
    async with running() as engine, pooled() as pool:
        call: Call = pool.send(("127.0.0.1", engine.port), "GET", b"/", HOST, Recorder())
        call.abort()
        assert (await ask(pool, engine)).heads
        assert len(engine.seen) == 1


async def test_an_answer_nobody_asked_for_ends_the_connection() -> None:
    async with running() as engine, pooled() as pool:
        await ask(pool, engine)
        for writer in engine.writers:
            writer.write(OK + b"Content-Length: 4\r\n\r\nevil")
        await asyncio.sleep(0.05)
        sink = await ask(pool, engine)
        assert b"evil" not in sink.body
        assert engine.connections == 2


async def test_fetch_answers_or_says_why_not() -> None:
    async with running() as engine, pooled() as pool:
        address = ("127.0.0.1", engine.port)
        answer = await fetch(pool, address, "POST", b"/", HOST, body=b"{}")
        assert isinstance(answer, Answer)
        assert answer.status == 200
        engine.answer = saying([OK + b"Content-Length: 100\r\n\r\n" + b"x" * 100])
        with pytest.raises(FetchFailed, match="more than 10 bytes"):
            await fetch(pool, address, "GET", b"/", HOST, limit=10)

        async def never(seen: Seen, wire: Wire) -> None:
            await asyncio.Event().wait()

        engine.answer = never
        with pytest.raises(FetchFailed, match="no answer in"):
            await fetch(pool, address, "GET", b"/", HOST, timeout_s=0.05)
        engine.stop()
        with pytest.raises(FetchFailed, match="unconnected"):
            await fetch(pool, address, "GET", b"/", HOST)


async def test_lines_arrive_whole_and_silence_is_a_failure() -> None:
    async def lines(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        for piece in (b"on", b"e\ntwo\nth", b"ree\n"):
            await wire.chunk(piece)
            await asyncio.sleep(0.005)
        await asyncio.Event().wait()

    async with running(lines) as engine, pooled() as pool:
        address = ("127.0.0.1", engine.port)
        found = []

        async def read_all() -> None:
            async with open_lines(pool, address, b"/", HOST, silence_s=0.2) as read:
                assert read.status == 200
                async for line in read:
                    found.append(line)

        with pytest.raises(FetchFailed, match="silent"):
            await read_all()
        assert found == [b"one", b"two", b"three"]
        async with asyncio.timeout(0.5):
            await engine.left.wait()


def test_headers_named_by_connection_go_no_further() -> None:
    kept = end_to_end(
        [
            (b"connection", b"close, X-One,content-length"),
            (b"x-one", b"1"),
            (b"x-two", b"2"),
            (b"content-length", b"3"),
            (b"te", b"trailers"),
            (b"keep-alive", b"5"),
        ]
    )
    assert kept == [(b"x-two", b"2"), (b"content-length", b"3")]


@pytest.mark.parametrize(
    "name",
    [b"host", b"authorization", b"x-api-key", b"api-key", b"cookie", b"origin", b"sec-fetch-site"],
)
def test_connection_takes_nothing_away_that_says_who_asks(name: bytes) -> None:
    assert end_to_end([(b"connection", name), (name, b"1")]) == [(name, b"1")]


@pytest.mark.parametrize(("address", "limit_ms"), [("127.0.0.1", 0), ("10.90.0.1", 45_000)])
async def test_only_another_host_is_given_up_for_not_acknowledging(
    address: str, limit_ms: int
) -> None:
    async with running() as engine, pooled() as pool:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(pool, Peer((address, 1))), "127.0.0.1", engine.port
        )
        assert connection._transport is not None
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == limit_ms
        connection.drop()
