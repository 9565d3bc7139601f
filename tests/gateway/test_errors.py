"""Errors have the shape of the API that was asked, whatever came before and whatever went wrong."""

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from gpustack.forward.listener import Server
from gpustack.gateway.front import Front
from gpustack.gateway.plane import Plane
from gpustack.lib.platform import listen
from tests.support.data_plane import AUTH, Gateway, fill, gateway
from tests.support.openai_engine import Seen, Wire, running
from tests.support.raw_http import Client, Reply, ask
from tests.support.watch_server import credential, instance, model, watch_server

CHAT, COMPLETE, RERANK = "/v1/chat/completions", "/v1/completions", "/v2/rerank"
OPENAI, OURS = {"message", "type", "param", "code", "src"}, {"code", "message", "detail"}
WRONG, WORKER = {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer worker"}

#: Who asks what, with which body -> the status.
ASKED: list[tuple[dict[str, str], str, str, object, int]] = [
    ({}, "GET", "/v1/models", None, 401),
    ({}, "POST", CHAT, {"model": "m"}, 401),
    (WRONG, "POST", CHAT, {"model": "m"}, 401),
    (WRONG, "GET", "/v1-openai/models", None, 401),
    (WORKER, "POST", CHAT, {"model": "m"}, 403),
    (WORKER, "GET", "/v1/models", None, 403),
    (AUTH, "GET", "/v1/nothing", None, 404),
    (AUTH, "GET", "/v1/models/none", None, 404),
    (AUTH, "GET", CHAT, None, 405),
    (AUTH, "DELETE", "/v1/models/m", None, 405),
    (AUTH, "POST", CHAT, b"{", 400),
    (AUTH, "POST", COMPLETE, {}, 400),
    (AUTH, "POST", CHAT, {"model": "none"}, 404),
    (AUTH, "POST", RERANK, {"model": "none"}, 404),
    (AUTH, "POST", "/v1-openai/embeddings", {"model": "waits"}, 503),
    (AUTH, "POST", CHAT, {"model": "dies"}, 502),
]


def openai(reply: Reply) -> Any:
    said = json.loads(reply.body)
    assert said.keys() == {"error"}
    assert said["error"].keys() == OPENAI
    assert said["error"]["src"] == "gateway"
    return said["error"]


async def test_the_shape_of_an_error_never_depends_on_earlier_requests(tmp_path: Path) -> None:
    async def die(seen: Seen, wire: Wire) -> None:
        wire.die()

    async with watch_server() as server, running() as engine, running(die) as dying:
        fill(server, engine)
        server.put("credentials", credential(2, "worker", kind="worker", scopes=[]))
        server.put("models", model(2, "waits"))
        server.put("models", model(3, "dies"))
        server.put("model-instances", instance(9, 3, dying.port))
        async with gateway(tmp_path, server.port) as gate:

            async def answers(order: list[int]) -> dict[int, Any]:
                found = {}
                for number in order:
                    headers, method, path, body, status = ASKED[number]
                    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                    reply = await ask(gate.port, method, path, headers, raw)
                    assert reply.status == status, (method, path, reply.body)
                    found[number] = openai(reply)
                    assert (await gate.chat()).status == 200
                    assert (await ask(gate.port, "GET", "/v2/models", AUTH)).status == 200
                return found

            order = list(range(len(ASKED)))
            first = await answers(order)
            for seed in range(3):
                random.Random(seed).shuffle(order)
                assert await answers(order) == first, f"order {order}"
            server.http.stop()
            for _ in range(2):
                reply = await ask(gate.port, "GET", "/v2/models", AUTH)
                assert (reply.status, json.loads(reply.body).keys()) == (503, OURS)
                assert openai(await ask(gate.port, "GET", "/v1/nothing", AUTH))["code"]


@asynccontextmanager
async def serving(front: Front) -> AsyncIterator[int]:
    server = Server(front)
    sock = listen("127.0.0.1", 0)
    await server.listen(sock)
    try:
        yield sock.getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", CHAT), ("POST", RERANK), ("GET", "/v1/models"), ("GET", "/v1-openai/nothing")],
)
async def test_a_mistake_of_our_own_has_the_shape_of_the_api_that_was_asked(
    method: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Front(cast("Plane", None))
    async with serving(broken) as port:
        reply = await ask(port, method, path, AUTH, b"{}")
        assert (reply.status, openai(reply)["code"]) == (500, "internal_error")
        reply = await ask(port, "GET", "/v2/models", AUTH)
        assert (reply.status, json.loads(reply.body).keys()) == (500, OURS)
    caplog.clear()


async def test_a_body_that_breaks_off_is_refused_in_the_shape_of_the_api_that_was_asked(
    tmp_path: Path,
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            for path, is_openai in ((CHAT, True), ("/v2/models", False), (CHAT, True)):
                reply = await _broken(gate, path)
                assert reply.status == 400
                if is_openai:
                    assert openai(reply)["code"] == "invalid_request"
                else:
                    assert json.loads(reply.body).keys() == OURS


async def _broken(gate: Gateway, path: str) -> Reply:
    """The answer to a request in whose body there is something else than a chunk."""
    client = await Client.to(gate.port)
    key = AUTH["Authorization"]
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
    client.send(f"{head}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\nno chunk\r\n".encode())
    return await client.reply()
