"""The relay: what it lets through to which engine, with the agent there or not."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gpustack.forward.listener import Server
from gpustack.forward.upstream import Pool
from gpustack.gateway.relay import ROUTES, Engines, Relay
from gpustack.gateway.relay import listen as answer_at
from gpustack.lib import trust
from gpustack.lib.platform import listen, write_private
from gpustack.schemas.engines import EngineRecord
from gpustack.schemas.wire import WORKER_CERTIFICATE_FILE
from gpustack.worker.certificate import OwnCertificate
from tests.support.openai_engine import DONE, content_events, running, streaming
from tests.support.raw_http import Client, ask, raw
from tests.support.wait import eventually


def write_record(folder: Path, instance_id: int, port: int, secret: str, uid: str = "") -> None:
    """As an agent does it."""
    uid = uid or f"u{instance_id}"
    key = folder / f"{uid}.key"
    write_private(key, secret)
    record = EngineRecord(
        uid=uid,
        instance_id=instance_id,
        instance_name="m-abcde",
        generation=1,
        port=port,
        secret_file=str(key),
        log_file="log",
        argv=["engine"],
        health_path="/health",
        boot_id="b",
        pid=1,
    )
    write_private(folder / f"{uid}.json", record.model_dump_json())


@asynccontextmanager
async def relay(folder: Path, agent_port: int) -> AsyncIterator[int]:
    async with asyncio.TaskGroup() as group:
        pool = Pool(group, connect_timeout_s=1.0)
        server = Server(Relay(pool, Engines(folder), ("127.0.0.1", agent_port)), sweep_s=0.05)
        sock = listen("127.0.0.1", 0)
        port = sock.getsockname()[1]
        await server.listen(sock)
        try:
            yield port
        finally:
            server.close()
            pool.close()


def to(instance: int | str, secret: str) -> dict[str, str]:
    return {"X-GPUStack-Instance": str(instance), "Authorization": f"Bearer {secret}"}


CHAT = "/v1/chat/completions"


async def test_a_gateway_with_the_secret_reaches_the_engine(tmp_path: Path) -> None:
    async with running() as engine, relay(tmp_path, 1) as port:
        write_record(tmp_path, 5, engine.port, "s5")
        reply = await ask(port, "POST", CHAT, to(5, "s5"), b'{"a":1}')
        assert reply.status == 200
        seen = engine.seen[0]
        assert seen.body == b'{"a":1}'
        assert seen.headers["authorization"] == "Bearer s5"
        assert not {name for name in seen.headers if name.startswith("x-gpustack")}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (to(5, "wrong"), 401),
        (to(5, ""), 401),
        (to(5, "s6"), 401),
        ({"X-GPUStack-Instance": "5"}, 401),
        ({"X-GPUStack-Instance": "5", "Authorization": "Basic s5"}, 401),
        (to(7, "s5"), 401),
        (to("", "s5"), 401),
        (to("../5", "s5"), 401),
        (to("-5", "s5"), 401),
        (to("5.0", "s5"), 401),
        (to("5" * 5000, "s5"), 401),
    ],
)
async def test_without_the_secret_of_that_very_instance_nothing_goes_through(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    async with running() as engine, running() as agent, relay(tmp_path, agent.port) as port:
        write_record(tmp_path, 5, engine.port, "s5")
        write_record(tmp_path, 6, engine.port, "s6")
        reply = await ask(port, "POST", CHAT, headers, b"{}")
        assert reply.status == status
        assert reply.headers["x-gpustack-relay-refused"] == "1"
        assert not engine.seen
        assert not agent.seen


async def test_an_instance_started_again_is_found_at_its_new_port(tmp_path: Path) -> None:
    async with running() as one, running() as two, relay(tmp_path, 1) as port:
        write_record(tmp_path, 5, one.port, "s5", "first")
        assert (await ask(port, "POST", CHAT, to(5, "s5"), b"{}")).status == 200
        write_record(tmp_path, 5, two.port, "s5b", "second")

        async def moved() -> bool:
            return (await ask(port, "POST", CHAT, to(5, "s5b"), b"{}")).status == 200

        await eventually(moved, "the new engine")
        assert two.seen
        (tmp_path / "second.json").unlink()
        (tmp_path / "first.json").unlink()

        async def gone() -> bool:
            return (await ask(port, "POST", CHAT, to(5, "s5b"), b"{}")).status == 401

        await eventually(gone, "no engine")


async def test_a_record_that_is_not_readable_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "letters.json").write_bytes(b'{"instance_id":1,"port":1,"secret_file":"\xff"}')
    (tmp_path / "deep.json").write_bytes(b'{"x":' + b"[" * 3000)
    async with running() as engine, relay(tmp_path, 1) as port:
        write_record(tmp_path, 5, engine.port, "s5")
        assert (await ask(port, "POST", CHAT, to(5, "s5"), b"{}")).status == 200


async def test_an_engine_without_a_secret_is_reached_by_nobody(tmp_path: Path) -> None:
    async with running() as engine, relay(tmp_path, 1) as port:
        write_record(tmp_path, 5, engine.port, "")
        assert (await ask(port, "POST", CHAT, to(5, ""), b"{}")).status == 401


async def test_a_dead_engine_is_the_relays_own_503(tmp_path: Path) -> None:
    async with running() as engine, relay(tmp_path, 1) as port:
        write_record(tmp_path, 5, engine.port, "s5")
        engine.stop()
        reply = await ask(port, "POST", CHAT, to(5, "s5"), b"{}")
        assert reply.status == 503
        assert reply.headers["x-gpustack-relay-refused"] == "1"
        assert reply.headers["retry-after"] == "1"


async def test_a_stream_arrives_byte_for_byte_with_the_agent_dead(tmp_path: Path) -> None:
    async with running(streaming(50, 0.002)) as engine, running() as agent:
        async with relay(tmp_path, agent.port) as port:
            write_record(tmp_path, 5, engine.port, "s5")
            client = await Client.to(port)
            client.ask("POST", CHAT, to(5, "s5"), b'{"stream":true}')
            await client.head()
            agent.stop()
            pieces = [piece async for piece in client.chunks()]
            assert b"".join(pieces) == b"".join(content_events(50)) + DONE


async def test_all_else_goes_to_the_agent_without_our_private_headers(tmp_path: Path) -> None:
    async with running() as agent, relay(tmp_path, agent.port) as port:
        forged = {"X-GPUStack-Gateway": "g", "X-GPUStack-Local": "1", "Authorization": "Bearer a"}
        assert (await ask(port, "GET", "/v2/logs?x=1", forged)).status == 200
        seen = agent.seen[0]
        assert seen.target == "/v2/logs?x=1"
        assert seen.headers["authorization"] == "Bearer a"
        assert not {name for name in seen.headers if name.startswith("x-gpustack")}


async def test_with_the_agent_away_the_relay_says_so_and_is_healthy(tmp_path: Path) -> None:
    async with running() as agent:
        agent.stop()
        async with relay(tmp_path, agent.port) as port:
            reply = await ask(port, "GET", "/v2/logs")
            said: Any = json.loads(reply.body)
            assert (reply.status, said["code"]) == (503, "unavailable")
            for route in ROUTES:
                if route.public:
                    assert (await ask(port, route.method, route.pattern)).status == 200


async def test_before_anything_is_known_only_health_is_answered(tmp_path: Path) -> None:
    """No engine was ever started here, and the agent has no secret that would be right."""
    async with running() as agent, relay(tmp_path / "none", agent.port) as port:
        assert (await ask(port, "GET", "/healthz")).status == 200
        assert (await ask(port, "HEAD", "/healthz")).status == 200
        for shown in ("", "Bearer", "Bearer None", "Basic Og=="):
            for instance in ("0", "1", "-1", "", "1, 2", "\u0661"):
                said = {"X-GPUStack-Instance": instance, "Authorization": shown}
                assert (await ask(port, "GET", "/healthz", said)).status == 401
        assert not agent.seen
        for path in ("/readyz", "/version", "/healthz/", "/HEALTHZ", "//healthz", "/metrics"):
            assert (await ask(port, "GET", path)).status == 200  # of this agent, which asks nobody
        assert len(agent.seen) == 6


async def test_of_two_instances_that_are_named_the_first_counts(tmp_path: Path) -> None:
    async with running() as one, running() as two, relay(tmp_path, 1) as port:
        write_record(tmp_path, 5, one.port, "s5")
        write_record(tmp_path, 6, two.port, "s6")
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
            b"X-GPUStack-Instance: 6\r\nX-GPUStack-Instance: 5\r\n"
            b"Authorization: Bearer s5\r\nAuthorization: Bearer s6\r\nConnection: close\r\n\r\n"
        )
        assert b" 401 " in (await raw(port, head)).split(b"\r\n")[0]
        assert not one.seen
        assert not two.seen


async def test_a_client_that_leaves_closes_the_engines_connection(tmp_path: Path) -> None:
    async with running(streaming(10_000, 0.01)) as engine, relay(tmp_path, 1) as port:
        write_record(tmp_path, 5, engine.port, "s5")
        client = await Client.to(port)
        client.ask("POST", CHAT, to(5, "s5"), b'{"stream":true}')
        await client.head()
        client.abort()
        async with asyncio.timeout(0.5):
            await engine.left.wait()


@asynccontextmanager
async def secured(folder: Path, agent_port: int) -> AsyncIterator[int]:
    """The relay as its role has it: it waits for a certificate, and follows it."""
    async with asyncio.TaskGroup() as group:
        pool = Pool(group)
        server = Server(Relay(pool, Engines(folder), ("127.0.0.1", agent_port)))
        sock = listen("127.0.0.1", 0)
        task = group.create_task(answer_at(server, sock, folder / WORKER_CERTIFICATE_FILE))
        try:
            yield sock.getsockname()[1]
        finally:
            task.cancel()
            server.close()
            pool.close()


async def over_tls(port: int, certificate: str) -> Client:
    tls = trust.exactly(certificate)
    return Client(*await asyncio.open_connection("127.0.0.1", port, ssl=tls))


async def test_it_speaks_tls_alone_once_the_agent_has_made_a_certificate(tmp_path: Path) -> None:
    async with running() as engine, secured(tmp_path, engine.port) as port:
        write_record(tmp_path, 5, engine.port, "s5")
        early = asyncio.ensure_future(raw(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))
        own = OwnCertificate(tmp_path, "w")
        client = await over_tls(port, own.pem)
        client.ask("GET", "/healthz")
        assert (await client.reply()).status == 200
        client.ask("POST", CHAT, to(5, "s5"), b'{"a":1}')
        assert (await client.reply()).status == 200
        await client.close()
        assert b"HTTP" not in await early
        assert len(engine.seen) == 1


async def test_a_certificate_that_was_made_anew_is_shown_to_who_comes_now(tmp_path: Path) -> None:
    own = OwnCertificate(tmp_path, "w")
    async with running() as engine, secured(tmp_path, engine.port) as port:
        kept = await over_tls(port, own.pem)
        (tmp_path / WORKER_CERTIFICATE_FILE).unlink()
        assert own.look()

        async def shown() -> bool:
            try:
                client = await over_tls(port, own.pem)
            except ssl.SSLError:
                return False
            await client.close()
            return True

        await eventually(shown, "the new certificate is shown")
        kept.ask("GET", "/healthz")  # what was open goes on
        assert (await kept.reply()).status == 200
        await kept.close()
