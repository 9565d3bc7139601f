"""Workers that nobody can dial: their relay dials the gateways, and requests flow back."""

import asyncio
import itertools
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from pydantic import ValidationError

from gpustack.config import load
from gpustack.forward.connection import Connection
from gpustack.forward.listener import Server
from gpustack.forward.tunnel import PROTOCOL
from gpustack.forward.upstream import Pool
from gpustack.gateway.dial_out import DialOut
from gpustack.gateway.relay import Engines, Relay
from gpustack.gateway.tls import Certificate
from gpustack.gateway.tunnels import TUNNELS_OF_A_WORKER, tunnel_to
from gpustack.lib import trust
from gpustack.lib.platform import listen, write_private
from gpustack.schemas import wire
from gpustack.schemas.workers import Registration
from gpustack.worker.certificate import OwnCertificate
from tests.gateway.test_relay import write_record
from tests.support.data_plane import KEY, Gateway, gateway
from tests.support.network import network
from tests.support.openai_engine import DONE, Engine, running, streaming
from tests.support.raw_http import ask
from tests.support.wait import eventually
from tests.support.watch_server import WatchServer, credential, instance, model, watch_server

WORKER, OTHER, GATE = "worker-secret", "other-secret", "gateway-secret"
CHAT = {"model": "m", "messages": [], "stream": True}


def fill(server: WatchServer, *, proxy_mode: str = "tunnel", reached_by: str = "tunnel") -> None:
    """Worker 2 with instance 5 of model m, at an address where nobody is."""
    server.put("credentials", credential(1, KEY))
    for id, kind, secret, worker in (
        (2, "worker", WORKER, 2), (3, "worker", OTHER, 3), (4, "gateway", GATE, None),
    ):  # fmt: skip
        of_it = credential(id, secret) | {"kind": kind, "worker_id": worker, "scopes": []}
        server.put("credentials", of_it)
    server.put("models", model(1, "m"))
    server.put("model-instances", instance(5, 1, 1) | {"worker_id": 2, "secret": "s5"})
    place = {"id": 2, "ip": "127.0.0.1", "port": 9}
    server.put("workers", place | {"proxy_mode": proxy_mode, "reached_by": reached_by})


def prepare(folder: Path, engine: Engine) -> None:
    """What an agent leaves for the relay."""
    folder.mkdir(exist_ok=True)
    member = {"worker_id": 2, "credential": WORKER}
    write_private(folder / "worker_credential", json.dumps(member))
    write_record(folder, 5, engine.port, "s5")


@asynccontextmanager
async def dialling(
    folder: Path,
    port: int,
    engine: Engine,
    *,
    agent_port: int = 1,
    mode: str = "tunnel",
    url: str = "",
    key: str = "",
) -> AsyncIterator[DialOut]:
    """Worker 2's relay, with an engine for instance 5. Listens nowhere."""
    prepare(folder, engine)
    url = url or f"http://127.0.0.1:{port}"
    flags = {"data_dir": str(folder), "server_url": url, "token": "t", "proxy_mode": mode}
    flags |= {"server_fingerprint": key} if key else {}
    async with asyncio.TaskGroup() as group:
        pool = Pool(group, connect_timeout_s=1.0)
        server = Server(Relay(pool, Engines(folder), ("127.0.0.1", agent_port)), sweep_s=0.05)
        out = DialOut(load.load(flags, {}).settings, url, lambda: Connection(server, b"https"))
        task = group.create_task(out.run())
        try:
            yield out
        finally:
            task.cancel()
            out.close()
            server.close()
            pool.close()


async def has_tunnel(gate: Gateway, worker_id: int = 2, *, there: bool = True) -> None:
    async def holds() -> bool:
        return gate.tunnels.has(worker_id) is there

    await eventually(holds, f"tunnel of worker {worker_id}: {there}")


async def test_requests_and_streams_go_back_through_the_tunnel(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(watch_server())
        engine = await stack.enter_async_context(running(streaming(3)))
        fill(server)
        gate = await stack.enter_async_context(gateway(tmp_path, server.port))
        assert (await gate.chat()).status == 503
        await stack.enter_async_context(dialling(tmp_path / "worker", gate.port, engine))
        await has_tunnel(gate)
        replies = await asyncio.gather(*(gate.chat(CHAT) for _ in range(30)))
        assert {reply.status for reply in replies} == {200}
        assert all(reply.body.endswith(DONE) for reply in replies)
        assert engine.seen[0].headers["authorization"] == "Bearer s5"
        big = json.dumps({"model": "m", "messages": ["x" * 3_000_000]}).encode()
        assert (await gate.chat(big)).status == 200
        assert engine.seen[-1].body == big
        assert gate.outstanding(5) == 0


async def test_each_process_behind_one_address_gets_a_tunnel_and_a_new_one_too(
    tmp_path: Path,
) -> None:
    gates: list[Gateway] = []
    turns = itertools.count()

    def picked() -> tuple[str, int]:
        """One is reached far more often than the others, as kernels have it."""
        turn = next(turns)
        return "127.0.0.1", gates[turn // 5 % len(gates) if turn % 5 == 0 else 0].port

    async with watch_server() as server, running() as engine, AsyncExitStack() as stack:
        fill(server)

        async def begin(index: int) -> Gateway:
            folder = tmp_path / f"g{index}"
            folder.mkdir()
            its = gateway(folder, server.port, place=(index, 4))
            gates.append(await stack.enter_async_context(its))
            return gates[-1]

        for index in range(3):
            await begin(index)
        there = await stack.enter_async_context(network(picked))
        await stack.enter_async_context(dialling(tmp_path / "worker", there.port, engine))
        for gate in gates:
            await has_tunnel(gate)
        await has_tunnel(await begin(3))
        gates[1].tunnels.close()
        await has_tunnel(gates[1], there=False)
        await has_tunnel(gates[1])


def test_no_worker_can_say_that_it_is_reached_by_anothers_tunnel() -> None:
    host, port = tunnel_to(2)
    with pytest.raises(ValidationError, match="ip"):
        Registration(
            name="w", machine_id="m", boot_id="b", run_id="r", ip=host, port=port, version=""
        )


def upgrade(secret: str, **more: str) -> dict[str, str]:
    asked = {"Connection": "upgrade", "Upgrade": PROTOCOL.decode()}
    return asked | {"Authorization": f"Bearer {secret}"} | more


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (upgrade("made-up"), 401),
        ({"Connection": "upgrade", "Upgrade": PROTOCOL.decode()}, 401),
        (upgrade(KEY), 403),
        (upgrade(GATE), 403),
        ({"Authorization": f"Bearer {WORKER}"}, 400),
        (upgrade(WORKER, Upgrade="websocket"), 400),
    ],
)
async def test_only_a_workers_credential_opens_a_tunnel(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    async with watch_server() as server, gateway(tmp_path, server.port) as gate:
        fill(server)
        await gate.watch.refresh()
        reply = await ask(gate.port, "GET", wire.TUNNEL_PATH, headers)
        assert reply.status == status
        assert not gate.tunnels.has(2)


async def test_a_worker_gets_its_own_requests_alone(tmp_path: Path) -> None:
    """Whose tunnel it is, the credential says: there is no name to claim."""
    async with watch_server() as server, gateway(tmp_path, server.port) as gate:
        fill(server)
        await gate.watch.refresh()
        claims = upgrade(OTHER) | {"X-GPUStack-Worker": "2", "X-GPUStack-Instance": "5"}
        with socket.create_connection(("127.0.0.1", gate.port)) as other:
            lines = [f"{name}: {value}" for name, value in claims.items()]
            head = [f"GET {wire.TUNNEL_PATH}?worker_id=2 HTTP/1.1", "Host: x", *lines, "", ""]
            other.sendall("\r\n".join(head).encode())
            await has_tunnel(gate, 3)
            assert not gate.tunnels.has(2)
            assert (await gate.chat()).status == 503
        await has_tunnel(gate, 3, there=False)


async def test_a_withdrawn_credential_ends_the_tunnel(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server)
        async with (
            gateway(tmp_path, server.port) as gate,
            dialling(tmp_path / "worker", gate.port, engine),
        ):
            await has_tunnel(gate)
            server.delete("credentials", 2)
            await has_tunnel(gate, there=False)


async def test_a_broken_tunnel_breaks_its_streams_and_comes_back(tmp_path: Path) -> None:
    async with watch_server() as server, running(streaming(1000, 0.05)) as engine:
        fill(server)
        async with (
            gateway(tmp_path, server.port) as gate,
            dialling(tmp_path / "worker", gate.port, engine),
        ):
            await has_tunnel(gate)
            stream = asyncio.ensure_future(gate.chat(CHAT))

            async def runs() -> bool:
                return bool(engine.seen)

            await eventually(runs, "the stream has begun")
            gate.tunnels.close()
            with pytest.raises((OSError, asyncio.IncompleteReadError, AssertionError)):
                assert DONE in (await stream).body
            await has_tunnel(gate)
            assert gate.outstanding(5) == 0


@pytest.mark.parametrize("proxy_mode", ["tunnel", "direct"])
async def test_requests_wait_for_a_tunnel_that_is_about_to_come(
    tmp_path: Path, proxy_mode: str
) -> None:
    """When a gateway process has just begun, and when a relay has just been started anew."""
    async with watch_server() as server, running() as engine:
        fill(server, proxy_mode=proxy_mode)
        async with gateway(tmp_path, server.port, awaited_s=30.0) as gate:
            for _ in range(2):
                asked = asyncio.ensure_future(gate.chat())
                await asyncio.sleep(0.05)  # time enough for an answer that did not wait
                assert not asked.done()
                async with dialling(tmp_path / "worker", gate.port, engine):
                    assert (await asked).status == 200
                await has_tunnel(gate, there=False)


async def test_a_tunnel_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server)
        async with gateway(tmp_path, server.port, awaited_s=0.3) as gate:
            assert (await gate.chat()).status == 503
            async with dialling(tmp_path / "worker", gate.port, engine):
                await has_tunnel(gate)
            await has_tunnel(gate, there=False)
            assert gate.tunnels.awaited(2)

            async def given_up() -> bool:
                return not gate.tunnels.awaited(2)

            await eventually(given_up, "nobody waits any more")
            assert (await gate.chat()).status == 503


async def test_tunnels_come_about_without_the_server(tmp_path: Path) -> None:
    """A gateway that starts from its snapshot knows the workers' credentials."""
    async with watch_server() as server, gateway(tmp_path, server.port) as gate:
        fill(server)

        async def written() -> bool:
            file = tmp_path / "gateway_snapshot.json"
            return file.exists() and b"s5" in file.read_bytes()

        await eventually(written, "the snapshot")
    async with (
        running() as engine,
        gateway(tmp_path, 1, ready=False, from_disk=True) as gate,
        dialling(tmp_path / "worker", gate.port, engine),
    ):
        await has_tunnel(gate)
        assert (await gate.chat()).status == 200


async def test_direct_is_tried_where_there_is_no_tunnel_and_goes_on_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with watch_server() as server, running() as engine, running() as direct:
        fill(server, proxy_mode="direct")
        place = {"id": 2, "ip": "127.0.0.1", "port": direct.port, "proxy_mode": "direct"}
        server.put("workers", place | {"reached_by": "tunnel"})
        async with gateway(tmp_path, server.port) as gate:
            assert (await gate.chat()).status == 200
            assert len(direct.seen) == 1
            async with dialling(tmp_path / "worker", gate.port, engine, mode="direct") as out:
                assert not gate.tunnels.has(2)
                member = {"worker_id": 2, "credential": WORKER, "tunnel": True}
                write_private(tmp_path / "worker/worker_credential", json.dumps(member))
                await has_tunnel(gate)
                assert (await gate.chat()).status == 200
                assert len(engine.seen) == 1
                server.put("workers", place | {"reached_by": "direct"})
                write_private(
                    tmp_path / "worker/worker_credential", json.dumps(member | {"tunnel": False})
                )
                await has_tunnel(gate, there=False)
                assert (await gate.chat()).status == 200
                assert (len(direct.seen), len(engine.seen)) == (2, 1)
                assert out is not None


async def test_only_the_server_asks_an_agent_through_a_tunnel(tmp_path: Path) -> None:
    path = f"{wire.TUNNEL_PATH}/2/v2/logs/5?tail=3"
    secret = {wire.AGENT_HEADER: "agent-secret"}
    async with watch_server() as server, running() as engine, running() as agent:
        fill(server)
        async with (
            gateway(tmp_path, server.port) as gate,
            dialling(tmp_path / "worker", gate.port, engine, agent_port=agent.port),
        ):
            await has_tunnel(gate)
            for shown, status in (({}, 401), ({"Authorization": f"Bearer {KEY}"}, 403)):
                assert (await ask(gate.port, "GET", path, secret | shown)).status == status
            assert not agent.seen
            gates = {"Authorization": f"Bearer {GATE}"}
            missing = await ask(gate.port, "GET", path.replace("/2/", "/3/"), secret | gates)
            assert missing.status == 503
            await ask(gate.port, "GET", path, secret | gates)
            seen = agent.seen[0]
            assert seen.headers["authorization"] == "Bearer agent-secret"
            assert not {name for name in seen.headers if name.startswith("x-gpustack")}


async def test_over_https_the_relay_knows_its_server_by_its_key(tmp_path: Path) -> None:
    pem = OwnCertificate(tmp_path, "server").pem
    file = tmp_path / wire.WORKER_CERTIFICATE_FILE
    right = trust.fingerprint(ssl.PEM_cert_to_DER_cert(pem))
    async with watch_server() as server, running(streaming(3)) as engine:
        fill(server)
        async with gateway(tmp_path, server.port) as gate:
            sock = listen("127.0.0.1", 0)
            url = f"https://127.0.0.1:{sock.getsockname()[1]}"
            await gate.server.listen(sock, tls=Certificate(file, file).context)
            wrong = dialling(
                tmp_path / "worker", gate.port, engine, url=url, key=f"sha256:{'0' * 64}"
            )
            async with wrong as out:

                async def refused() -> bool:
                    return "has fingerprint" in out.said

                await eventually(refused, "the relay says what is wrong")
                assert not gate.tunnels.has(2)
            async with dialling(tmp_path / "worker", gate.port, engine, url=url, key=right):
                await has_tunnel(gate)
                replies = await asyncio.gather(*(gate.chat(CHAT) for _ in range(20)))
                assert all(reply.body.endswith(DONE) for reply in replies)
                big = json.dumps({"model": "m", "messages": ["x" * 3_000_000]}).encode()
                assert (await gate.chat(big)).status == 200
                assert engine.seen[-1].body == big


@pytest.mark.parametrize("who", ["gateway", "relay"])
async def test_who_leaves_lets_its_streams_finish(tmp_path: Path, who: str) -> None:
    async with watch_server() as server, running(streaming(100, 0.01)) as engine:
        fill(server)
        async with (
            gateway(tmp_path, server.port) as gate,
            dialling(tmp_path / "worker", gate.port, engine) as out,
        ):
            await has_tunnel(gate)
            stream = asyncio.ensure_future(gate.chat(CHAT))

            async def runs() -> bool:
                return bool(engine.seen)

            await eventually(runs, "the stream has begun")
            if who == "gateway":
                gate.tunnels.leave()
                assert (await gate.chat(CHAT)).body.endswith(DONE)  # of a client that it still has
            else:
                out.leave()
                async with asyncio.timeout(10):
                    await out.left()
            assert not stream.done() or who == "gateway"
            assert (await stream).body.endswith(DONE)


async def test_a_worker_has_so_many_tunnels_to_a_process_and_no_more(tmp_path: Path) -> None:
    async with watch_server() as server, gateway(tmp_path, server.port) as gate:
        fill(server)
        await gate.watch.refresh()
        opened = []
        for number in range(TUNNELS_OF_A_WORKER + 2):
            reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
            opened.append((reader, writer))
            asked = upgrade(WORKER) | {wire.RELAY_HEADER: f"relay {number}"}
            lines = [f"{name}: {value}" for name, value in asked.items()]
            head = [f"GET {wire.TUNNEL_PATH} HTTP/1.1", "Host: x", *lines, "", ""]
            writer.write("\r\n".join(head).encode())
            async with asyncio.timeout(10):
                assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        for reader, _ in opened[:2]:
            async with asyncio.timeout(10):
                with suppress(ConnectionResetError):
                    assert await reader.read() == b""
        assert not any(reader.at_eof() for reader, _ in opened[2:])
        for _, writer in opened:
            writer.close()
        await has_tunnel(gate, there=False)
