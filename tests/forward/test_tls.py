"""The listener over TLS: what differs from a plain socket must not show."""

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gpustack.config.load import load
from gpustack.errors import SettingsError
from gpustack.forward.listener import Exchange, Server, asynchronous
from gpustack.gateway.tls import Certificate
from gpustack.lib.platform import listen
from tests.support.certificate import Issued, expire, issue
from tests.support.raw_http import Client, raw
from tests.support.wait import eventually

Handle = Callable[[Exchange], Awaitable[None]]


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    return issue(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def serving(
    issued: Issued, handle: Handle, certificate: Certificate | None = None
) -> AsyncIterator[tuple[int, Server]]:
    async with asyncio.TaskGroup() as group:
        server = Server(asynchronous(handle, group), sweep_s=0.02)
        sock = listen("127.0.0.1", 0)
        port: int = sock.getsockname()[1]
        certificate = certificate or Certificate(issued.certfile, issued.keyfile)
        await server.listen(sock, tls=certificate.context)
        try:
            yield port, server
        finally:
            server.close()


def dial(issued: Issued, port: int) -> ssl.SSLSocket:
    """A client that blocks, for a thread: nothing reads or buffers on its behalf."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=10)
    return issued.trust().wrap_socket(
        plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False
    )


async def test_requests_share_a_connection_and_are_known_to_be_https(issued: Issued) -> None:
    async def echo(exchange: Exchange) -> None:
        body = await exchange.read(1_000_000)
        said = b"%b %b %d" % (exchange.scheme, exchange.peer.encode(), len(body))
        exchange.respond(200, [], said)

    async with serving(issued, echo) as (port, _):
        client = Client(*await asyncio.open_connection("127.0.0.1", port, ssl=issued.trust()))
        for size in (1, 300_000):
            client.ask("POST", "/", {}, b"x" * size)
            assert (await client.reply()).body == b"https 127.0.0.1 %d" % size
        await client.close()


async def test_the_protocol_is_a_modern_one(issued: Issued) -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.respond(200)

    async with serving(issued, answer) as (port, _):
        offers = issued.trust()
        offers.set_alpn_protocols(["h2", "http/1.1"])
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=offers)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        writer.transport.abort()
    lowest = Certificate(issued.certfile, issued.keyfile).context.minimum_version
    assert lowest == ssl.TLSVersion.TLSv1_2


async def test_an_upload_that_nobody_reads_has_to_wait(issued: Issued) -> None:
    release, sent = asyncio.Event(), 0

    async def late(exchange: Exchange) -> None:
        await release.wait()
        exchange.respond(200, [], b"%d" % len(await exchange.read(100_000_000)))

    def upload(port: int) -> bytes:
        nonlocal sent
        with dial(issued, port) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n")
            for _ in range(500):
                client.sendall(b"x" * 100_000)
                sent += 100_000
            return client.recv(1000)

    async with serving(issued, late) as (port, _), asyncio.TaskGroup() as group:
        answer = group.create_task(asyncio.to_thread(upload, port))
        await asyncio.sleep(0.5)
        assert sent < 20_000_000  # the rest is with the client
        release.set()
        assert (await answer).endswith(b"\r\n50000000")


async def test_a_client_that_does_not_read_makes_the_source_wait(issued: Issued) -> None:
    written = 0

    async def endless(exchange: Exchange) -> None:
        nonlocal written
        exchange.start(200, [])
        while True:
            await exchange.send(b"x" * 10_000)
            written += 10_000

    async with serving(issued, endless) as (port, _):
        client = await asyncio.to_thread(dial, issued, port)
        with client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            before = -1
            while written != before:  # until it stands still
                before = written
                await asyncio.sleep(0.2)
        assert written < 20_000_000


async def test_an_answer_before_the_body_is_read_by_a_client_that_sends_all_first(
    issued: Issued,
) -> None:
    async def refuse(exchange: Exchange) -> None:
        exchange.respond(413, [], b"too large")

    def send_all_then_read(port: int) -> bytes:
        with dial(issued, port) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
            for _ in range(30):
                client.sendall(b"x" * 100_000)
            return client.recv(1000)

    async with serving(issued, refuse) as (port, _):
        answer = await asyncio.to_thread(send_all_then_read, port)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.endswith(b"too large")


async def test_a_broken_answer_cannot_be_taken_for_a_whole_one(issued: Issued) -> None:
    async def break_off(exchange: Exchange) -> None:
        exchange.start(200, [])
        await exchange.send(b"half")
        exchange.abort()

    def read_all(port: int) -> None:
        with dial(issued, port) as client:
            client.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
            while client.recv(1000):
                pass

    async with serving(issued, break_off) as (port, _):
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            await asyncio.to_thread(read_all, port)


async def test_a_drain_ends_though_a_client_that_pools_never_ends_tls(issued: Issued) -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.respond(200)

    async with serving(issued, answer) as (port, server):
        with await asyncio.to_thread(dial, issued, port) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await asyncio.to_thread(client.recv, 1000)).startswith(b"HTTP/1.1 200 ")
            async with asyncio.timeout(3):
                await server.drain(idle_s=0.1)
            assert not client.recv(1000)


async def test_a_drain_lets_a_slow_client_have_all_of_its_answer(issued: Issued) -> None:
    size, begun = 8_000_000, asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        exchange.start(200, [(b"content-length", b"%d" % size)])
        begun.set()
        await exchange.send(b"x" * size)

    def read_late(client: ssl.SSLSocket) -> int:
        time.sleep(2.5)  # longer than the client is given to end TLS
        with client, client.makefile("rb") as answer:
            return len(answer.read().partition(b"\r\n\r\n")[2])

    async with serving(issued, answer) as (port, server), asyncio.TaskGroup() as group:
        client = await asyncio.to_thread(dial, issued, port)
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await begun.wait()
        taken = group.create_task(asyncio.to_thread(read_late, client))
        await server.drain(idle_s=0.1, limit_s=20)
        assert await taken == size


async def test_who_speaks_no_tls_is_let_go_without_a_word_in_the_log(
    issued: Issued, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.respond(200)

    caplog.set_level(logging.WARNING)
    async with serving(issued, answer) as (port, _):
        said = await raw(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not said.startswith(b"HTTP")
        silent = await Client.to(port)
        silent.abort()
        client = Client(*await asyncio.open_connection("127.0.0.1", port, ssl=issued.trust()))
        client.ask("GET", "/")
        assert (await client.reply()).status == 200
        await client.close()
    assert caplog.records == []


async def test_files_that_are_renewed_are_noticed_by_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    issued, other = issue(tmp_path), issue(tmp_path, "other")
    certificate = Certificate(issued.certfile, issued.keyfile)
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE

    async def answer(exchange: Exchange) -> None:
        exchange.respond(200)

    async with serving(issued, answer, certificate) as (port, _), asyncio.TaskGroup() as group:
        following = group.create_task(certificate.follow(every_s=0.01))

        async def shown() -> bool:
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=anything)
            found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.transport.abort()
            return found == other.der

        assert not await shown()
        issued.certfile.write_bytes(other.certfile.read_bytes())  # its key has yet to come

        async def said() -> bool:
            return "the certificate stays as it was" in caplog.text

        await eventually(said, "half a renewal is named")
        assert not await shown()
        issued.replace_by(other)
        await eventually(shown, "the new certificate is shown")
        following.cancel()


def test_files_that_are_no_certificate_are_named_in_one_sentence(
    issued: Issued, tmp_path: Path
) -> None:
    other, locked = issue(tmp_path, "other"), issue(tmp_path, "locked", password="secret")
    small = issue(tmp_path, "small", key=("rsa:1024",))
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("-----BEGIN")
    for certfile, keyfile, why in (
        (issued.certfile, other.keyfile, "the key is not the certificate's"),
        (nonsense, issued.keyfile, "want a certificate with its chain and its key"),
        (issued.certfile, nonsense, "want a certificate with its chain and its key"),
        (issued.certfile, tmp_path / "none", "No such file"),
        (locked.certfile, locked.keyfile, "is encrypted"),
        (small.certfile, small.keyfile, "the key is too small: want RSA of 2048 bits"),
    ):
        with pytest.raises(SettingsError, match=why) as caught:
            Certificate(certfile, keyfile)
        assert str(keyfile) in str(caught.value)


def test_a_certificate_that_has_expired_is_served_and_said(tmp_path: Path) -> None:
    ended = datetime.now(UTC) - timedelta(days=3)
    old = expire(issue(tmp_path, "old"), ended)
    given = {"ssl_certfile": str(old.certfile), "ssl_keyfile": str(old.keyfile)}
    (said,) = Certificate.check(load({**given, "data_dir": str(tmp_path)}, {}).settings)
    assert f"expired on {ended:%Y-%m-%d}" in said
    assert str(old.certfile) in said
