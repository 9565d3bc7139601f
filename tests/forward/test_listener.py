"""The listener against clients of every kind: polite, slow, impatient and malicious."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpustack.errors import Conflict
from gpustack.forward.listener import (
    IGNORED,
    Exchange,
    Limits,
    Receiver,
    Server,
    asynchronous,
)
from gpustack.lib.platform import listen
from tests.support.raw_http import Client, raw
from tests.support.wait import eventually

Handle = Callable[[Exchange], Awaitable[None]]
HOST = b"Host: x\r\n"


async def echo(exchange: Exchange) -> None:
    body = await exchange.read(1024 * 1024)
    said = f"{exchange.method} {exchange.path} {len(body)}".encode()
    exchange.respond(200, [(b"x-query", exchange.query.encode())], said)


@dataclass
class Served:
    port: int
    server: Server


@asynccontextmanager
async def serving(
    handle: Handle = echo, *, limits: Limits | None = None, sweep_s: float = 0.02
) -> AsyncIterator[Served]:
    async with asyncio.TaskGroup() as group:
        server = Server(asynchronous(handle, group), limits=limits, sweep_s=sweep_s)
        sock = listen("127.0.0.1", 0)
        port = sock.getsockname()[1]
        await server.listen(sock)
        try:
            yield Served(port, server)
        finally:
            server.close()


async def test_a_connection_serves_one_request_after_the_other() -> None:
    async with serving() as served:
        client = await Client.to(served.port)
        for number in range(3):
            client.ask("POST", f"/{number}?q={number}", {}, b"x" * number)
            reply = await client.reply()
            assert reply.body == f"POST /{number} {number}".encode()
            assert reply.headers["x-query"] == f"q={number}"
            assert "connection" not in reply.headers
        await client.close()


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    running: list[str] = []

    async def slow_first(exchange: Exchange) -> None:
        running.append(exchange.path)
        assert len(running) == 1, "the second began before the first was answered"
        await asyncio.sleep(0.05 if exchange.path == "/1" else 0)
        running.remove(exchange.path)
        exchange.respond(200, [], exchange.path.encode())

    async with serving(slow_first) as served:
        client = await Client.to(served.port)
        for number in range(1, 30):
            client.ask("GET", f"/{number}")
        for number in range(1, 30):
            assert (await client.reply()).body == f"/{number}".encode()
        await client.close()


async def test_pipelined_bodies_reach_their_own_requests() -> None:
    async with serving() as served:
        client = await Client.to(served.port)
        client.ask("POST", "/a", {}, b"aaa")
        client.ask("POST", "/b", {}, b"b" * 200_000)
        client.ask("POST", "/c", {}, b"")
        bodies = [(await client.reply()).body for _ in range(3)]
        assert bodies == [b"POST /a 3", b"POST /b 200000", b"POST /c 0"]
        await client.close()


async def test_a_client_that_sends_far_ahead_has_to_wait() -> None:
    release = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        await release.wait()
        exchange.respond(200, [], b"ok")

    async with serving(hold) as served:
        client = await Client.to(served.port)
        client.ask("GET", "/")
        await asyncio.sleep(0.05)
        request = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
        client.send(request * 400_000)
        await asyncio.sleep(0.3)
        # 12 MB were sent; nearly all of it is still with the client or in the kernel.
        assert client.writer.transport.get_write_buffer_size() > 1024 * 1024
        client.abort()
        release.set()


async def test_a_client_that_does_not_read_gets_no_second_answer_begun() -> None:
    begun = 0

    async def large(exchange: Exchange) -> None:
        nonlocal begun
        begun += 1
        exchange.respond(200, [], b"x" * 20_000_000)

    async with serving(large) as served:
        client = await Client.to(served.port)
        client.stop_reading()
        for _ in range(3):
            client.ask("GET", "/")
            await asyncio.sleep(0.05)
        assert begun == 1
        client.read_on()
        for _ in range(3):
            assert len((await client.reply()).body) == 20_000_000
        await client.close()


async def test_a_chunked_body_arrives_whole_and_its_trailers_do_not() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def keep(exchange: Exchange) -> None:
        body = await exchange.read(100)
        seen.extend(exchange.headers)
        exchange.respond(200, [], body)

    async with serving(keep) as served:
        answer = await raw(
            served.port,
            b"POST / HTTP/1.1\r\n"
            + HOST
            + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3;ext=1\r\nabc\r\n2\r\nde\r\n0\r\nX-GPUStack-Local: 1\r\n\r\n",
        )
        assert answer.endswith(b"abcde")
        assert b"x-gpustack-local" not in dict(seen)


SMUGGLED = {
    "length and chunked": b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": b"Content-Length: 3, 4\r\n\r\nabcd",
    "a signed length": b"Content-Length: +3\r\n\r\nabc",
    "a negative length": b"Content-Length: -3\r\n\r\nabc",
    "a hex length": b"Content-Length: 0x3\r\n\r\nabc",
    "a huge length": b"Content-Length: 99999999999999999999999\r\n\r\n",
    "a folded header": b"X: a\r\n b\r\n\r\n",
    "a folded coding": b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "a coding before chunked": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding after chunked": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an obscured coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"Content-Length : 3\r\n\r\nabc",
    "a bare line feed": b"X: a\nContent-Length: 3\r\n\r\nabc",
    "a bare carriage return": b"X: a\rb\r\n\r\n",
    "a zero byte": b"X: a\x00b\r\n\r\n",
    "no name": b": a\r\n\r\n",
    "a second host": b"Host: y\r\n\r\n",
    "a bad chunk size": b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "a chunk longer than said": b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("rest", SMUGGLED.values(), ids=SMUGGLED.keys())
async def test_what_two_readers_could_read_differently_is_refused_and_closed(rest: bytes) -> None:
    async with serving() as served:
        answer = await raw(
            served.port, b"POST /a HTTP/1.1\r\n" + HOST + rest + b"GET /evil HTTP/1.1\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in answer


@pytest.mark.parametrize(
    ("first_line", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 505),
        (b"FOO / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET ftp://x/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),  # TLS
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ],
)
async def test_what_is_not_http_1_1_is_refused(first_line: bytes, status: int) -> None:
    async with serving() as served:
        answer = await raw(served.port, first_line)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer


async def test_the_authority_of_an_absolute_target_replaces_host() -> None:
    async def tell(exchange: Exchange) -> None:
        exchange.respond(200, [], (exchange.header(b"host") or b"") + exchange.target)

    async with serving(tell) as served:
        answer = await raw(
            served.port,
            b"GET http://evil.example/p?q HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        )
        assert answer.endswith(b"evil.example/p?q")


@pytest.mark.parametrize("step", [1_000_000, 1000])
async def test_a_head_larger_than_the_limit_is_a_431(step: int) -> None:
    head = b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 70_000 + b"\r\n\r\n"
    async with serving() as served:
        client = await Client.to(served.port)
        for start in range(0, len(head), step):
            client.send(head[start : start + step])
            await asyncio.sleep(0)
        assert (await client.reply()).status == 431
        await client.close()


class Other(asyncio.Protocol):
    """A protocol that a connection was to be handed to."""

    lost = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


@pytest.mark.parametrize("gone", [False, True])
async def test_a_connection_that_ends_before_it_switches_is_lost_to_its_new_protocol(
    gone: bool,
) -> None:
    asked: list[Exchange] = []

    def app(exchange: Exchange) -> Receiver:
        asked.append(exchange)
        return IGNORED

    server, sock = Server(app, upgrade=b"other"), listen("127.0.0.1", 0)
    await server.listen(sock)
    client = await Client.to(sock.getsockname()[1])
    client.send(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: other\r\n\r\n")

    async def came() -> bool:
        return bool(asked)

    await eventually(came, "the request")
    next(iter(server.connections)).abort()
    if gone:

        async def forgotten() -> bool:
            return not server.connections

        await eventually(forgotten, "the connection's end")
    other = Other()
    asked[0].switch(other, [])
    assert other.lost
    server.close()
    await client.close()


@pytest.mark.parametrize("before", [b"0\r\nX: ", b"3;"])
async def test_a_trailer_without_end_is_not_collected(before: bytes) -> None:
    """The parser keeps a field until it is whole."""
    head = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    async with serving() as served:
        client = await Client.to(served.port)
        client.send(head + before)
        for _ in range(100):
            client.send(b"a" * 5000)
            await asyncio.sleep(0)
        assert (await client.reply()).status == 431
        await client.close()


async def test_a_head_below_the_limit_passes_however_it_is_split() -> None:
    head = b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 60_000 + b"\r\n\r\n"
    async with serving() as served:
        client = await Client.to(served.port)
        for start in range(0, len(head), 5000):
            client.send(head[start : start + 5000])
            await asyncio.sleep(0.001)
        assert (await client.reply()).status == 200
        await client.close()


async def test_a_head_that_does_not_come_in_time_is_a_408() -> None:
    async with serving(limits=Limits(head_s=0.2)) as served:
        client = await Client.to(served.port)
        started = time.monotonic()
        client.send(b"GET / HTTP/1.1\r\n")

        async def drip() -> None:
            while True:
                client.send(b"X: y\r\n")
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as group:
            dripping = group.create_task(drip())
            assert (await client.reply()).status == 408
            assert time.monotonic() - started < 2
            dripping.cancel()
        assert await client.closed()


async def test_a_body_that_stops_is_a_408() -> None:
    async with serving(limits=Limits(body_s=0.2, linger_s=0.1)) as served:
        client = await Client.to(served.port)
        client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nab")
        assert (await client.reply()).status == 408
        assert await client.closed()


async def test_a_connection_without_a_request_is_closed_after_a_while() -> None:
    async with serving(limits=Limits(head_s=0.2, idle_s=0.2)) as served:
        silent = await Client.to(served.port)
        assert await silent.closed()
        idle = await Client.to(served.port)
        idle.ask("GET", "/")
        await idle.reply()
        assert await idle.closed()


async def test_a_client_that_expects_100_is_told_to_go_on() -> None:
    async with serving() as served:
        client = await Client.to(served.port)
        client.send(
            b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        )
        assert (await client.head()).status == 100
        client.send(b"abc")
        assert (await client.reply()).body == b"POST / 3"
        client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nExpect: tea\r\n\r\nabc")
        assert (await client.reply()).status == 417
        await client.close()


async def test_a_head_request_gets_no_body() -> None:
    async with serving() as served:
        client = await Client.to(served.port)
        client.ask("HEAD", "/a")
        client.ask("GET", "/b")
        assert (await client.reply(head_only=True)).headers["content-length"] == "9"
        assert (await client.reply()).body == b"GET /b 0"
        await client.close()


async def test_an_http_1_0_client_gets_an_answer_that_ends_with_the_connection() -> None:
    async def stream(exchange: Exchange) -> None:
        exchange.start(200, [])
        for _ in range(3):
            await exchange.send(b"abc")

    async with serving(stream) as served:
        answer = await raw(served.port, b"GET / HTTP/1.0\r\n\r\n")
        assert answer.endswith(b"\r\n\r\nabcabcabc")
        assert b"transfer-encoding" not in answer
        assert b"connection: close" in answer


async def test_a_request_to_upgrade_is_served_as_if_it_had_not_asked() -> None:
    async with serving() as served:
        client = await Client.to(served.port)
        for piece in (
            b"POST /h2c HTTP/1.1\r\n" + HOST + b"Connection: Upgrade, HTTP2-Settings\r\n",
            b"Upgrade: h2c\r\nHTTP2-Settings: AAA\r\nContent-Length: 3\r\n\r\na",
            b"bc",
        ):
            client.send(piece)
            await asyncio.sleep(0.01)
        assert (await client.reply()).body == b"POST /h2c 3"
        client.ask("GET", "/next")
        assert (await client.reply()).body == b"GET /next 0"
        await client.close()


async def test_an_early_answer_to_a_small_body_keeps_the_connection() -> None:
    async def refuse(exchange: Exchange) -> None:
        exchange.respond(401)

    async with serving(refuse) as served:
        client = await Client.to(served.port)
        for _ in range(3):
            client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 100000\r\n\r\n")
            assert (await client.reply()).status == 401
            client.send(b"x" * 100_000)
        await client.close()


async def test_an_early_answer_to_a_large_body_is_read_before_the_connection_ends() -> None:
    async def refuse(exchange: Exchange) -> None:
        exchange.respond(413)

    async with serving(refuse) as served:
        for _ in range(10):
            client = await Client.to(served.port)
            client.ask("POST", "/", {}, b"x" * 5_000_000)
            reply = await client.reply()
            assert reply.status == 413
            assert reply.headers["connection"] == "close"
            await client.close()


async def test_a_handlers_error_is_its_answer() -> None:
    async def fail(exchange: Exchange) -> None:
        if exchange.path == "/known":
            raise Conflict("no", field=1)
        raise ValueError("secret detail")

    async with serving(fail) as served:
        client = await Client.to(served.port)
        client.ask("GET", "/known")
        reply = await client.reply()
        assert reply.status == 409
        assert reply.body == b'{"code":"conflict","message":"no","detail":{"field":1}}'
        client.ask("GET", "/bug")
        reply = await client.reply()
        assert reply.status == 500
        assert b"secret" not in reply.body
        await client.close()


async def test_a_handler_is_cancelled_when_its_client_leaves() -> None:
    cancelled = asyncio.Event()

    async def wait(exchange: Exchange) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with serving(wait) as served:
        client = await Client.to(served.port)
        client.ask("GET", "/")
        await asyncio.sleep(0.05)
        client.abort()
        async with asyncio.timeout(1):
            await cancelled.wait()


async def test_an_answer_broken_off_cannot_be_taken_for_the_whole() -> None:
    async def break_off(exchange: Exchange) -> None:
        exchange.start(200, [])
        await exchange.send(b"half")
        raise Conflict()

    async with serving(break_off) as served:
        client = await Client.to(served.port)
        client.ask("GET", "/")
        reply = await client.reply()
        assert not reply.whole
        client = await Client.to(served.port)
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await client.reader.read()


async def test_an_upload_that_nobody_reads_has_to_wait() -> None:
    release = asyncio.Event()

    async def late(exchange: Exchange) -> None:
        await release.wait()
        body = await exchange.read(100_000_000)
        exchange.respond(200, [], b"%d" % len(body))

    async with serving(late) as served:
        client = await Client.to(served.port)
        client.ask("POST", "/", {}, b"x" * 50_000_000)
        await asyncio.sleep(0.3)
        assert client.writer.transport.get_write_buffer_size() > 10_000_000
        release.set()
        assert (await client.reply()).body == b"50000000"
        await client.close()


def _send_all_then_read(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
        for _ in range(30):
            client.sendall(b"x" * 100_000)
        return client.recv(1000)


async def test_a_client_that_reads_only_when_it_has_sent_all_gets_an_early_answer() -> None:
    async def refuse(exchange: Exchange) -> None:
        exchange.respond(413)

    async with serving(refuse) as served:
        answer = await asyncio.to_thread(_send_all_then_read, served.port)
        assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_body_paused_in_its_last_piece_does_not_stop_the_next_request() -> None:
    class Pausing(Push):
        def body(self, chunk: bytes) -> None:
            super().body(chunk)
            self.exchange.pause()

    server = Server(Pausing)
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    await server.listen(sock)
    client = await Client.to(port)
    for _ in range(2):
        client.ask("POST", "/", {}, b"abc")
        assert (await client.reply()).status == 200
    await client.close()
    server.close()


# --- drain ---------------------------------------------------------------------------------


async def test_a_drain_under_keep_alive_load_costs_no_request() -> None:
    async def work(exchange: Exchange) -> None:
        await asyncio.sleep(0.002)
        exchange.respond(200, [], b"ok")

    async with serving(work) as served:
        answered = 0

        async def load() -> None:
            nonlocal answered
            client = await Client.to(served.port)
            while True:
                client.ask("GET", "/")
                reply = await client.reply()
                assert reply.status == 200
                assert reply.body == b"ok"
                answered += 1
                if reply.headers.get("connection") == "close":
                    await client.close()
                    return
                await asyncio.sleep(0.003)

        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(load())
            await asyncio.sleep(0.3)
            await served.server.drain(idle_s=5, limit_s=10)
        assert answered > 50
        assert not served.server.connections


async def test_a_drain_lets_what_runs_finish_and_ends_what_is_endless() -> None:
    release = asyncio.Event()

    async def work(exchange: Exchange) -> None:
        exchange.endless = exchange.path == "/watch"
        exchange.start(200, [])
        await exchange.send(b"begin")
        await (asyncio.Event() if exchange.endless else release).wait()
        await exchange.send(b"end")

    async with serving(work) as served:
        finite, endless = await Client.to(served.port), await Client.to(served.port)
        finite.ask("GET", "/work")
        endless.ask("GET", "/watch")
        for client in (finite, endless):
            await client.head()
            assert await client.chunk() == b"begin"
        async with asyncio.TaskGroup() as group:
            drained = group.create_task(served.server.drain(idle_s=0.1))
            async with asyncio.timeout(2):
                assert await endless.chunk() == b""
            assert not drained.done()
            release.set()
            assert await finite.chunk() == b"end"
            assert await finite.chunk() == b""
            async with asyncio.timeout(2):
                await drained


async def test_a_drain_closes_idle_connections_only_after_they_were_idle_for_a_while() -> None:
    async with serving() as served:
        client = await Client.to(served.port)
        client.ask("GET", "/")
        await client.reply()
        async with asyncio.TaskGroup() as group:
            drained = group.create_task(served.server.drain(idle_s=0.5))
            await asyncio.sleep(0.2)
            client.ask("GET", "/late")
            reply = await client.reply()
            assert reply.headers["connection"] == "close"
            async with asyncio.timeout(2):
                await drained


async def test_a_drain_waits_only_shortly_for_a_head_that_has_begun() -> None:
    async with serving() as served:
        client = await Client.to(served.port)
        client.writer.write(b"GET / HTTP/1.1\r\nHos")

        async def begun() -> bool:
            return any(each._in_head for each in served.server.connections)

        await eventually(begun, "the head has begun")
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            group.create_task(served.server.drain(idle_s=0.1))
            assert (await client.reply()).status == 408
            await client.close()


async def test_a_drain_ends_at_its_limit() -> None:
    async def never(exchange: Exchange) -> None:
        await asyncio.Event().wait()

    async with serving(never) as served:
        client = await Client.to(served.port)
        client.ask("GET", "/")
        await asyncio.sleep(0.05)
        async with asyncio.timeout(2):
            await served.server.drain(idle_s=0, limit_s=0.2)
        assert await client.closed()


# --- any bytes at all ----------------------------------------------------------------------


@dataclass
class Push:
    """A push-style application that checks the order of what it is told."""

    exchange: Exchange
    calls: list[str] = field(default_factory=list)

    def body(self, chunk: bytes) -> None:
        assert "left" not in self.calls
        assert "end" not in self.calls
        self.calls.append("body")

    def body_end(self) -> None:
        assert "left" not in self.calls
        assert "end" not in self.calls
        self.calls.append("end")
        self.exchange.respond(200, [], b"ok")

    def client_left(self) -> None:
        assert "left" not in self.calls
        self.calls.append("left")

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def end_now(self) -> None: ...


_PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nUpgrade: a\r\nConnection: upgrade\r\n\r\n",
        b"Content-Length: 5\r\n",
        b"\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"0\r\n\r\n",
        b"Expect: 100-continue\r\n",
    ]
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.one_of(_PIECES, st.binary(max_size=20)), min_size=1, max_size=8), st.booleans())
async def test_no_bytes_break_the_listener_or_its_applications_trust(
    pieces: list[bytes], slowly: bool
) -> None:
    failures: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(context))

    def app(exchange: Exchange) -> Receiver:
        return Push(exchange) if exchange.method != "HEAD" else IGNORED

    limits = Limits(head_s=0.05, body_s=0.05, idle_s=0.05, linger_s=0.05)
    server = Server(app, limits=limits, sweep_s=0.01)
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    await server.listen(sock)
    client = await Client.to(port)
    answer = b""
    with contextlib.suppress(ConnectionError, RuntimeError):  # it may close at any time
        for piece in pieces:
            client.send(piece)
            if slowly:
                await asyncio.sleep(0)
        client.writer.write_eof()
        async with asyncio.timeout(5):
            answer = await client.reader.read()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    await client.close()

    async def all_gone() -> bool:
        return not server.connections

    await eventually(all_gone, "connections are forgotten")
    server.close()
    assert not failures


# --- peers that are silent -------------------------------------------------------------------


def unacknowledged_ms(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


async def test_the_kernel_never_ends_a_client_for_not_reading() -> None:
    async with serving() as served:
        client = await Client.to(served.port)
        client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        await client.reply()
        (connection,) = served.server.connections
        assert connection._transport is not None
        accepted = connection._transport.get_extra_info("socket")
        assert unacknowledged_ms(accepted) == 0
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.slow
async def test_a_client_that_does_not_read_for_forty_seconds_gets_the_whole_answer() -> None:
    async def large(exchange: Exchange) -> None:
        exchange.respond(200, [], b"x" * 20_000_000)

    async with serving(large) as served:
        client = await Client.to(served.port)
        client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        await client.head()
        client.stop_reading()
        await asyncio.sleep(40)  # longer than keepalive's patience
        client.read_on()
        async with asyncio.timeout(20):
            assert await client.reader.readexactly(20_000_000) == b"x" * 20_000_000
