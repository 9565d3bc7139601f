"""Requests to those alone who have the certificate that was asked for."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpustack.forward.upstream import Failure, Pool
from gpustack.schemas.wire import WORKER_CERTIFICATE_FILE
from gpustack.worker.certificate import OwnCertificate
from tests.forward.test_upstream import Recorder

SECRET = b"the-secret-of-an-instance"


@dataclass
class Peer:
    """Answers whatever comes, over TLS once it has all of a head.

    Attributes:
        handshakes: connections on which TLS, or none, was agreed on.
        heard: all that came, as who listens here reads it.
    """

    tls: bool
    port: int = 0
    handshakes: int = 0
    heard: bytearray = field(default_factory=bytearray)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.handshakes += 1
        try:
            while piece := await reader.read(65536):
                self.heard += piece
                if not self.tls or piece.endswith(b"\r\n\r\n"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except OSError:
            pass
        finally:
            writer.transport.abort()


@asynccontextmanager
async def peer(folder: Path | None) -> AsyncIterator[Peer]:
    """Speaks TLS with the worker's certificate in `folder`; without one, no TLS."""
    context = None
    if folder is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / WORKER_CERTIFICATE_FILE)
    made = Peer(context is not None)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()


@asynccontextmanager
async def pooled() -> AsyncIterator[Pool]:
    async with asyncio.TaskGroup() as group:
        pool = Pool(group, connect_timeout_s=30.0)
        try:
            yield pool
        finally:
            pool.close()


async def ask(pool: Pool, port: int, certificate: str) -> Recorder:
    """A request with a secret, and what came of it."""
    headers = [(b"host", b"x"), (b"authorization", b"Bearer " + SECRET)]
    sink = Recorder()
    pool.send(
        ("127.0.0.1", port), "GET", b"/", headers, sink, repeatable=True, certificate=certificate
    )
    async with asyncio.timeout(60):
        await sink.over.wait()
    return sink


@pytest.fixture
def own(tmp_path: Path) -> OwnCertificate:
    return OwnCertificate(tmp_path, "one")


async def test_who_has_the_certificate_is_asked_over_one_connection(
    tmp_path: Path, own: OwnCertificate
) -> None:
    async with peer(tmp_path) as there, pooled() as pool:
        for _ in range(3):
            assert (await ask(pool, there.port, own.pem)).pieces == [b"ok"]
        assert there.handshakes == 1
        assert there.heard.count(SECRET) == 3


@pytest.mark.parametrize("shows", ["another worker's certificate", "no TLS"])
async def test_to_anybody_else_no_byte_of_a_request_is_sent(
    tmp_path: Path, own: OwnCertificate, shows: str, caplog: pytest.LogCaptureFixture
) -> None:
    OwnCertificate(tmp_path / "other", "one")  # the name and all else is the same, not the key
    folder = None if shows == "no TLS" else tmp_path / "other"
    caplog.set_level(logging.WARNING)
    async with peer(folder) as there, pooled() as pool:
        for _ in range(3):
            assert (await ask(pool, there.port, own.pem)).failure is Failure.UNTRUSTED
        if shows == "no TLS":
            assert there.heard[:1] == b"\x16"  # a handshake's first record
            assert b"HTTP" not in there.heard
        else:
            assert there.heard == b""
        assert SECRET not in there.heard
    said = "does not show the certificate with which it registered, so nothing is sent there"
    assert [said in one.getMessage() for one in caplog.records] == [True]  # once


async def test_a_kept_connection_serves_the_certificate_alone_that_it_was_opened_for(
    tmp_path: Path, own: OwnCertificate
) -> None:
    other = OwnCertificate(tmp_path / "other", "one")
    async with peer(tmp_path) as there, pooled() as pool:
        assert (await ask(pool, there.port, own.pem)).pieces == [b"ok"]
        assert (await ask(pool, there.port, other.pem)).failure is Failure.UNTRUSTED
        assert (await ask(pool, there.port, "")).failure is not None
        assert there.heard.count(SECRET) == 1


async def test_what_is_no_certificate_is_no_reason_to_trust(tmp_path: Path) -> None:
    async with peer(None) as there, pooled() as pool:
        for nonsense in ("-----BEGIN CERTIFICATE-----", "Ä"):
            assert (await ask(pool, there.port, nonsense)).failure is Failure.UNTRUSTED
        assert there.heard == b""


@pytest.mark.parametrize("name", [".x", "a..b", "a" * 64, ""])
async def test_what_is_no_name_of_a_host_is_an_address_that_cannot_be_reached(
    own: OwnCertificate, name: str
) -> None:
    async with pooled() as pool:
        for certificate in ("", own.pem):
            sink, headers = Recorder(), [(b"host", b"x")]
            pool.send(
                (name, 1), "GET", b"/", headers, sink, repeatable=True, certificate=certificate
            )
            async with asyncio.timeout(60):
                await sink.over.wait()
            assert sink.failure is Failure.UNCONNECTED
