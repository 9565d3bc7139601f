"""The server's calls to workers' agents."""

from pathlib import Path

import pytest

from gpustack.errors import Unavailable
from gpustack.forward.exchange import IGNORED, Exchange, Receiver
from gpustack.forward.listener import Server
from gpustack.gateway.tls import Certificate
from gpustack.lib.platform import listen
from gpustack.schemas.wire import WORKER_CERTIFICATE_FILE
from gpustack.server.api.agents import OwnGateway, asked
from gpustack.server.db.tables import Worker
from gpustack.worker.certificate import OwnCertificate
from tests.support.wait import settled


async def test_who_has_the_certificate_is_asked_and_nobody_else(tmp_path: Path) -> None:
    shown, other = (OwnCertificate(tmp_path / name, "w").pem for name in "ab")
    seen: list[bytes | None] = []

    def answer(exchange: Exchange) -> Receiver:
        seen.append(exchange.header(b"authorization"))
        exchange.respond(200, [], b"a log")
        return IGNORED

    file, sock = tmp_path / "a" / WORKER_CERTIFICATE_FILE, listen("127.0.0.1", 0)
    server = Server(answer)
    await server.listen(sock, tls=Certificate(file, file).context)
    row = Worker(
        name="w", hostname="", machine_id="", boot_id="", run_id="", ip="127.0.0.1",
        port=sock.getsockname()[1], labels={}, system_reserved_ram_bytes=0,
        system_reserved_vram_bytes=0, version="", certificate=shown, agent_secret="the-secret",
    )  # fmt: skip
    try:
        async with asked(row, "GET", "/v2/logs/1", gate=OwnGateway("", "")) as answered:
            assert await answered.aread() == b"a log"
        row.certificate = other
        why = (
            "worker w cannot be reached: it does not show the certificate with which it registered"
        )
        with pytest.raises(Unavailable, match=why):
            async with asked(row, "GET", "/v2/logs/1", gate=OwnGateway("", "")):
                pass
        assert seen == [b"Bearer the-secret"]
    finally:
        await settled()
        server.close()
