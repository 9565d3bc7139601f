"""Gateway and relay as real processes, told by a launcher's pipe how to start and to leave."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpustack.config.load import load, to_json
from gpustack.lib import trust
from gpustack.lib.platform import listen
from gpustack.lib.role import Boot
from gpustack.worker.certificate import OwnCertificate
from tests.gateway.test_relay import to, write_record
from tests.support.data_plane import AUTH, fill
from tests.support.openai_engine import DONE, content_events, running, streaming
from tests.support.raw_http import Client, ask
from tests.support.wait import eventually
from tests.support.watch_server import watch_server

SCRIPT = """
import importlib, sys
from gpustack.lib import logs, platform, role
logs.setup(sys.argv[1])
module = importlib.import_module("gpustack.gateway." + sys.argv[1])
platform.run(module.serve(role.Boot.read()))
"""


@dataclass
class Role:
    process: asyncio.subprocess.Process
    port: int

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"stop\n")

    def orphan(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def ended(self, within_s: float = 10) -> int:
        async with asyncio.timeout(within_s):
            return await self.process.wait()


@asynccontextmanager
async def role(
    module: str,
    data_dir: Path,
    extra: dict[str, Any],
    name: str,
    shared: socket.socket | None = None,
) -> AsyncIterator[Role]:
    """A process of `gpustack.gateway.<module>` that inherits a listening socket as `name`."""
    settings = load({"data_dir": str(data_dir), "force_auth_localhost": "true"}, {}).settings
    sock = shared.dup() if shared is not None else listen("127.0.0.1", 0)
    counts = os.memfd_create("counts")
    boot = Boot(to_json(settings), {name: sock.fileno()}, {**extra, "counts_fd": counts})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, module, stdin=asyncio.subprocess.PIPE,
        pass_fds=(sock.fileno(), counts),
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(boot.line())
    port = sock.getsockname()[1]
    try:
        yield Role(process, port)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process.stdin.close()
        sock.close()
        os.close(counts)


def gateway_extra(api_port: int, index: int = 0) -> dict[str, Any]:
    known = {"index": index, "processes": 2, "api_port": api_port}
    return {**known, "gateway_credential": "gateway-secret"}


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def ready(port: int) -> None:
    async def answers() -> bool:
        return (await ask(port, "GET", "/readyz")).status == 200

    await eventually(answers, "/readyz is 200")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "worker_credential").write_text('{"worker_id": 1}')
    return tmp_path


CHAT = "/v1/chat/completions"
STREAM = json.dumps({"model": "m", "stream": True}).encode()


async def test_a_gateway_process_serves_delivers_usage_and_stays_small(data_dir: Path) -> None:
    async with watch_server() as server, running(streaming(3)) as engine:
        fill(server, engine)
        async with role("app", data_dir, gateway_extra(server.port), "public") as gate:
            await ready(gate.port)
            for _ in range(20):
                reply = await ask(gate.port, "POST", CHAT, AUTH, STREAM)
                assert reply.body == b"".join(content_events(3)) + DONE

            async def delivered() -> bool:
                return len(server.records()) == 20

            await eventually(delivered, "usage of 20 requests")
            assert resident_mib(gate.process.pid) < 40
            assert (data_dir / "gateway_snapshot.json").exists()
            gate.stop()
            assert await gate.ended(5) == 0
            assert not list((data_dir / "usage").iterdir())


async def test_an_orphaned_gateway_finishes_its_streams_and_then_ends(data_dir: Path) -> None:
    async with watch_server() as server, running(streaming(100, 0.01)) as engine:
        fill(server, engine)
        async with role("app", data_dir, gateway_extra(server.port), "public") as gate:
            await ready(gate.port)
            client = await Client.to(gate.port)
            client.ask("POST", CHAT, AUTH, STREAM)
            await client.head()
            gate.orphan()
            pieces = [piece async for piece in client.chunks()]
            assert b"".join(pieces) == b"".join(content_events(100)) + DONE
            await client.close()
            assert await gate.ended() == 0
            assert len(server.records()) == 1


async def test_a_gateway_killed_in_a_stream_leaves_a_cut_record_for_the_next(
    data_dir: Path,
) -> None:
    async with watch_server() as server, running(streaming(1000, 0.01)) as engine:
        fill(server, engine)
        async with role("app", data_dir, gateway_extra(server.port), "public") as gate:
            await ready(gate.port)
            client = await Client.to(gate.port)
            client.ask("POST", CHAT, AUTH, STREAM)
            await client.head()
            await client.chunk()
            gate.process.kill()
            await gate.ended()
        async with role("app", data_dir, gateway_extra(server.port), "public") as gate:

            async def delivered() -> bool:
                return bool(server.records())

            await eventually(delivered, "the cut record")
            (one,) = server.records()
            assert one["cut"] is True
            assert one["estimated"] is True


async def test_a_gateway_takes_over_from_another_under_load_without_losing_a_request(
    data_dir: Path,
) -> None:
    answered: list[int] = []
    stop = asyncio.Event()

    async def use(port: int) -> None:
        """A client that keeps its connection as long as it may, and then makes another."""
        client = await Client.to(port)
        while not stop.is_set():
            client.ask("POST", CHAT, AUTH, b'{"model":"m"}')
            reply = await client.reply()
            answered.append(reply.status)
            if reply.headers.get("connection") == "close":
                await client.close()
                client = await Client.to(port)
        await client.close()

    sock = listen("127.0.0.1", 0)
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        extra = gateway_extra(server.port)
        async with role("app", data_dir, extra, "public", sock) as old:
            await ready(old.port)
            async with asyncio.TaskGroup() as group:
                for _ in range(10):
                    group.create_task(use(old.port))
                await asyncio.sleep(0.2)
                old.orphan()
                async with role("app", data_dir, extra, "public", sock) as new:
                    assert await old.ended() == 0
                    before = len(answered)

                    async def goes_on() -> bool:
                        return len(answered) > before + 100

                    await eventually(goes_on, "the new process answers")
                    stop.set()
                    new.stop()
                    assert await new.ended() == 0
    sock.close()
    assert set(answered) == {200}


async def test_a_relay_process_serves_and_ends(data_dir: Path) -> None:
    async with running(streaming(50, 0.005)) as engine, running() as agent:
        write_record(data_dir / "engines", 5, engine.port, "s5")
        tls = trust.exactly(OwnCertificate(data_dir, "w").pem)
        async with role("relay", data_dir, {"agent_port": agent.port}, "worker") as relay:
            async with asyncio.timeout(30):  # the socket was open before the process
                client = Client(*await asyncio.open_connection("127.0.0.1", relay.port, ssl=tls))
            client.ask("POST", CHAT, to(5, "s5"), STREAM)
            await client.head()
            relay.orphan()
            pieces = [piece async for piece in client.chunks()]
            assert b"".join(pieces).endswith(DONE)
            await client.close()
            assert await relay.ended() == 0
