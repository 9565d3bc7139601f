"""Who may use the gateway, and what it passes on."""

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from gpustack.gateway.routes import AGENTS, GATEWAY, TUNNEL
from tests.support.data_plane import AUTH, KEY, fill, gateway
from tests.support.openai_engine import Seen, Wire, running
from tests.support.raw_http import Client, ask, raw
from tests.support.wait import eventually
from tests.support.watch_server import credential, model, watch_server

BODY = b'{"model": "m"}'
CHAT = "/v1/chat/completions"


def code(body: bytes) -> Any:
    return json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"X-Api-Key": KEY},
     {"Api-Key": KEY}, {"X-Api-Key": "", "Api-Key": KEY},
     {"Cookie": f"gpustack_session=old; gpustack_session={KEY}"}],
)  # fmt: skip
async def test_a_key_is_taken_wherever_clients_put_it(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            assert (await ask(gate.port, "POST", CHAT, headers, BODY)).status == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"X-Api-Key": ""},
     {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}, {"Cookie": "gpustack_session=x"},
     {"Authorization": "Bearer \xff\xfe"}, {"Authorization": "Basic x", "X-Api-Key": KEY},
     {"Authorization": "Basic x", "Cookie": f"gpustack_session={KEY}"}],
)  # fmt: skip
async def test_without_a_known_credential_no_route_answers(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            for route in GATEWAY:
                if not route.public:
                    method = route.method.replace("*", "POST")
                    reply = await ask(gate.port, method, route.pattern, headers, BODY)
                    assert reply.status == 401, route
                    if route in (TUNNEL, AGENTS):  # our own parts speak our own dialect
                        assert json.loads(reply.body)["code"] == "unauthorized"
                    else:
                        assert code(reply.body) == "invalid_api_key"
            assert (await ask(gate.port, "GET", "/v1/made-up", headers)).status == 401
            assert not engine.seen


async def test_probes_answer_without_credentials(tmp_path: Path) -> None:
    async with watch_server() as server:
        async with gateway(tmp_path, server.port) as gate:
            for route in GATEWAY:
                if route.public:
                    assert (await ask(gate.port, route.method, route.pattern)).status == 200
            assert "version" in json.loads((await ask(gate.port, "GET", "/version")).body)


@pytest.mark.parametrize(
    ("more", "status", "word"),
    [
        ({"scopes": ["inference"]}, 200, None),
        ({"scopes": ["management"]}, 403, "forbidden"),
        ({"kind": "worker"}, 403, "forbidden"),
        ({"kind": "gateway"}, 403, "forbidden"),
        ({"kind": "local"}, 200, None),
        ({"kind": "session", "password_change_required": True}, 403, "password_change_required"),
        ({"expires_at": "2020-01-01T00:00:00.000Z"}, 401, "invalid_api_key"),
        ({"expires_at": "2120-01-01T00:00:00.000Z"}, 200, None),
        ({"user_disabled": True}, 401, "invalid_api_key"),
        ({"allowed_model_names": ["m", "n"]}, 200, None),
        ({"allowed_model_names": ["n"]}, 403, "forbidden"),
        ({"allowed_model_names": []}, 403, "forbidden"),
    ],
)
async def test_a_credential_opens_only_what_it_is_for(
    tmp_path: Path, more: dict[str, Any], status: int, word: str | None
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        server.put("credentials", credential(2, "other", **more))
        async with gateway(tmp_path, server.port) as gate:
            reply = await ask(gate.port, "POST", CHAT, {"Authorization": "Bearer other"}, BODY)
            assert reply.status == status
            assert word is None or code(reply.body) == word


async def test_a_key_for_some_models_sees_and_runs_no_others(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        server.put("models", model(2, "other"))
        server.put("credentials", credential(2, "some", allowed_model_names=["m", "gone"]))
        bearer = {"Authorization": "Bearer some"}
        async with gateway(tmp_path, server.port) as gate:
            listed = await ask(gate.port, "GET", "/v1/models", bearer)
            assert [one["id"] for one in json.loads(listed.body)["data"]] == ["m"]
            for name, status in (("m", 200), ("gone", 404), ("other", 403), ("never", 403)):
                reply = await ask(gate.port, "GET", f"/v1/models/{name}", bearer)
                assert reply.status == status, name
            for name in ("other", "never"):  # whether it exists is not said
                body = json.dumps({"model": name}).encode()
                reply = await ask(gate.port, "POST", CHAT, bearer, body)
                said = json.loads(reply.body)["error"]["message"]
                assert said == f"This API key is not for the model {name!r}."
            assert server.flushes <= 1  # "gone" alone may be news


async def test_a_browsers_cookie_runs_models_only_for_our_own_pages(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        server.put("credentials", credential(2, "login", kind="session"))
        async with gateway(tmp_path, server.port) as gate:
            cookie = {"Cookie": "a=b; gpustack_session=login; c=d", "Host": "gpu.example"}
            for more, status in (
                ({}, 200),  # no browser: those say where a request comes from
                ({"Origin": "https://evil.example"}, 403),
                ({"Sec-Fetch-Site": "cross-site"}, 403),
                ({"Origin": "https://gpu.example"}, 200),
                ({"Sec-Fetch-Site": "same-origin"}, 200),
            ):
                reply = await ask(gate.port, "POST", CHAT, cookie | more, BODY)
                assert reply.status == status, more
            assert (await ask(gate.port, "GET", "/v1/models", cookie)).status == 200


async def test_loopback_needs_no_login_unless_told_so(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path / "a", server.port, force_auth=False) as gate:
            assert (await ask(gate.port, "POST", CHAT, {}, BODY)).status == 200
            for more in (
                {"Host": "evil.example"},
                {"Via": "x"},
                {"Origin": "http://evil.example"},
                {"Sec-Fetch-Site": "cross-site"},
            ):
                assert (await ask(gate.port, "POST", CHAT, more, BODY)).status == 401
            old = b"GET /v1/models HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"
            assert (await raw(gate.port, old)).startswith(b"HTTP/1.1 401")
            wrong = {"Authorization": "Bearer wrong"}
            assert (await ask(gate.port, "POST", CHAT, wrong, BODY)).status == 401
        async with gateway(tmp_path / "b", server.port, force_auth=True) as gate:
            assert (await ask(gate.port, "POST", CHAT, {}, BODY)).status == 401


async def test_a_key_is_usable_right_after_its_creation(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            server.announces = False
            server.put("credentials", credential(2, "new"))
            reply = await ask(gate.port, "POST", CHAT, {"Authorization": "Bearer new"}, BODY)
            assert reply.status == 200


async def test_a_strangers_body_is_not_taken_in_before_he_is_known(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            server.flushing.clear()
            client = await Client.to(gate.port)
            wrong = {"Authorization": "Bearer wrong"}
            client.ask("POST", CHAT, wrong, b"x" * 50_000_000)

            async def asked() -> bool:
                return server.flushes > 0

            await eventually(asked, "a flush")
            await asyncio.sleep(0.1)
            assert client.writer.transport.get_write_buffer_size() > 30_000_000
            server.flushing.set()
            assert (await client.reply()).status == 401


async def test_a_deleted_key_is_refused_at_once(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            assert (await gate.chat()).status == 200
            server.delete("credentials", 1)

            async def refused() -> bool:
                return (await gate.chat()).status == 401

            await eventually(refused, "the key is refused")


async def test_with_the_server_away_known_keys_work_and_unknown_ones_get_503(
    tmp_path: Path,
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            server.http.stop()

            async def noticed() -> bool:
                return not gate.watch.connected

            await eventually(noticed, "the gateway sees that the server is away")
            assert (await gate.chat()).status == 200
            started = time.monotonic()
            reply = await gate.chat(headers={"Authorization": "Bearer unknown"})
            assert (reply.status, code(reply.body)) == (503, "unavailable")
            reply = await gate.chat({"model": "unknown"})
            assert (reply.status, code(reply.body)) == (503, "unavailable")
            assert (await ask(gate.port, "GET", "/v1/models/unknown", AUTH)).status == 503
            assert (await ask(gate.port, "GET", "/v1/models/m", AUTH)).status == 200
            assert time.monotonic() - started < 3


async def test_strangers_share_their_questions_to_the_server(tmp_path: Path) -> None:
    async with watch_server() as server:
        fill(server)
        async with gateway(tmp_path, server.port) as gate:
            wrong = {"Authorization": "Bearer wrong"}
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(gate.chat(headers=wrong)) for _ in range(100)]
            assert {task.result().status for task in asked} == {401}
            assert server.flushes <= 5


async def test_a_secret_is_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            await gate.chat()
            await gate.chat(headers={"Authorization": "Bearer unknown-secret"})
            server.http.stop()
            await gate.chat(headers={"Authorization": "Bearer unknown-secret"})
    for secret in (KEY, "unknown-secret", "secret-1", "gateway-secret"):
        assert secret not in caplog.text


# --- what is passed on ---------------------------------------------------------------------


async def test_everything_else_goes_to_the_server_with_its_origin_vouched_for(
    tmp_path: Path,
) -> None:
    async with watch_server() as server:
        async with gateway(tmp_path, server.port, force_auth=False) as gate:
            forged = {"X-GPUStack-Gateway": "f", "X-GPUStack-Local": "1", "X-GPUStack-Peer": "1.1"}
            own = {"Authorization": "Bearer a", "Cookie": "c=d", "X-Forwarded-For": "9.9.9.9"}
            reply = await ask(
                gate.port, "PUT", "/v2/models/a%2Fb?x=1", forged | own, b"z" * 3_000_000
            )
            assert json.loads(reply.body) == {"path": "/v2/models/a%2Fb?x=1", "size": 3_000_000}
            seen = server.passed[0].headers
            assert seen["x-gpustack-gateway"] == "gateway-secret"
            assert seen["x-gpustack-peer"] == "127.0.0.1"
            assert seen["x-gpustack-scheme"] == "http"
            assert "x-gpustack-local" not in seen  # a forwarding header
            assert (seen["authorization"], seen["cookie"]) == ("Bearer a", "c=d")
            assert seen["host"] == "127.0.0.1"
            await ask(gate.port, "GET", "/v2/models")
            assert server.passed[1].headers["x-gpustack-local"] == "1"


async def test_with_the_server_away_its_routes_are_a_503(tmp_path: Path) -> None:
    async with watch_server() as server:
        async with gateway(tmp_path, server.port) as gate:
            server.http.stop()
            reply = await ask(gate.port, "GET", "/v2/models")
            assert reply.status == 503
            assert json.loads(reply.body)["code"] == "unavailable"


async def test_a_server_that_hangs_is_a_503(tmp_path: Path) -> None:
    async def hang(seen: Seen, wire: Wire) -> None:
        await asyncio.Event().wait()

    async with running(hang) as server:
        async with gateway(tmp_path, server.port, ready=False, server_patience_s=0.3) as gate:
            for method, body in (("GET", b""), ("POST", b"{}")):
                started = time.monotonic()
                reply = await ask(gate.port, method, "/v2/models", {}, body)
                assert (reply.status, json.loads(reply.body)["code"]) == (503, "unavailable")
                assert 0.3 <= time.monotonic() - started < 3
                assert reply.headers["retry-after"] == "1"


async def test_a_server_that_takes_no_more_of_a_body_is_a_503(tmp_path: Path) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    listening = await asyncio.start_server(deaf, "127.0.0.1", 0, limit=1000)
    port = listening.sockets[0].getsockname()[1]
    async with gateway(tmp_path, port, ready=False, server_patience_s=0.3) as gate:
        client = await Client.to(gate.port)
        client.ask("POST", "/v2/models", {}, b"x" * 30_000_000)
        assert (await client.reply()).status == 503
    gone.set()
    listening.close()


async def test_a_slow_client_and_a_long_answer_wear_out_nobodys_patience(tmp_path: Path) -> None:
    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await asyncio.sleep(0.6)
        await wire.chunk(b"late")
        await wire.end()

    async with running(answer) as server:
        async with gateway(tmp_path, server.port, ready=False, server_patience_s=0.2) as gate:
            client = await Client.to(gate.port)
            client.send(b"POST /v2/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\na")
            await asyncio.sleep(0.6)
            client.send(b"b")
            reply = await client.reply()
            assert (reply.status, reply.body) == (200, b"late")


@pytest.mark.parametrize("method", ["POST", "PATCH", "GET", "PUT", "DELETE"])
async def test_what_changes_something_is_never_sent_twice(tmp_path: Path, method: str) -> None:
    died: list[str] = []

    async def die_once(seen: Seen, wire: Wire) -> None:
        if seen.target == "/v2/dies" and not died:
            died.append(seen.method)
            wire.die()
        else:
            await wire.json({})

    async with running(die_once) as server:
        async with gateway(tmp_path, server.port, ready=False) as gate:
            assert (await ask(gate.port, "GET", "/v2/warm")).status == 200
            reply = await ask(gate.port, method, "/v2/dies", {}, b"{}")
            seen = [one for one in server.seen if one.target == "/v2/dies"]
            if method in ("POST", "PATCH"):
                assert (reply.status, len(seen)) == (503, 1)
                assert "look whether it did" in json.loads(reply.body)["message"]
            else:
                assert (reply.status, len(seen)) == (200, 2)


async def test_a_kept_connection_closed_just_now_costs_no_change_its_success(
    tmp_path: Path,
) -> None:
    async def close_after(seen: Seen, wire: Wire) -> None:
        await wire.json({})
        wire.writer.close()

    async with running(close_after) as server:
        async with gateway(tmp_path, server.port, ready=False) as gate:
            for _ in range(20):
                assert (await ask(gate.port, "GET", "/v2/warm")).status == 200
                assert (await ask(gate.port, "POST", "/v2/x", {}, b"{}")).status == 200


async def test_hop_by_hop_headers_stay_on_their_hop(tmp_path: Path) -> None:
    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.raw(
            b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n"
            b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 2\r\n\r\nok"
        )

    async with running(answer) as server:
        async with gateway(tmp_path, server.port, ready=False) as gate:
            client = await Client.to(gate.port)
            client.ask(
                "GET", "/ui", {"Connection": "close, X-Mine", "X-Mine": "1", "TE": "trailers"}
            )
            raw = await client.reader.read()
            assert b"x-hop" not in raw.lower()
            assert b"keep-alive" not in raw.lower()
            assert raw.lower().count(b"set-cookie") == 2
            ui = next(seen for seen in server.seen if seen.target == "/ui")
            assert not {"x-mine", "te", "connection"} & set(ui.headers)


async def test_a_drain_ends_a_passed_watch_at_once_and_lets_a_finite_answer_end(
    tmp_path: Path,
) -> None:
    finish = asyncio.Event()

    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await wire.chunk(b"begin")
        await finish.wait()
        await wire.chunk(b"end")
        await wire.end()

    async with running(answer) as server:
        async with gateway(tmp_path, server.port, ready=False) as gate:
            finite, *endless = [await Client.to(gate.port) for _ in range(3)]
            finite.ask("GET", "/v2/download")
            endless[0].ask("GET", "/v2/models?watch=true")
            endless[1].ask("GET", "/v2/watch?kinds=models")
            for client in (finite, *endless):
                await client.head()
                assert await client.chunk() == b"begin"
            async with asyncio.TaskGroup() as group:
                drained = group.create_task(gate.server.drain(idle_s=0.1))
                async with asyncio.timeout(1):
                    for client in endless:
                        assert await client.chunk() == b""
                assert not drained.done()
                finish.set()
                assert await finite.chunk() == b"end"


async def test_the_gateways_routes_are_data() -> None:
    assert {route.pattern for route in GATEWAY if route.public} == {
        "/healthz",
        "/readyz",
        "/version",
    }
    assert AUTH
