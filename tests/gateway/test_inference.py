"""The path of a request through the gateway, with real sockets at both ends."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from gpustack.gateway.inference import HELD_BYTES, Inference
from gpustack.worker.certificate import OwnCertificate
from tests.gateway.test_relay import secured, write_record
from tests.support.data_plane import AUTH, fill, gateway
from tests.support.openai_engine import (
    DONE,
    USAGE,
    USAGE_EVENT,
    Seen,
    Wire,
    content_events,
    running,
    streaming,
)
from tests.support.raw_http import Client, Reply
from tests.support.wait import eventually
from tests.support.watch_server import instance, model, watch_server, worker

STREAM = {"model": "m", "stream": True}


def error(reply: Reply) -> Any:
    return json.loads(reply.body)["error"]


async def test_an_answer_comes_back_as_the_engine_wrote_it(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat()
            assert reply.status == 200
            assert json.loads(reply.body)["usage"] == USAGE
            assert gate.outstanding(1) == 0


async def test_the_body_goes_to_the_engine_unchanged(tmp_path: Path) -> None:
    raw = b'{ "model" :"m",  "x_unknown": {"a":[1, 2]}, "messages":[] }'
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            await gate.chat(raw, path="/v1-openai/chat/completions?a=b")
            assert engine.seen[0].body == raw
            assert engine.seen[0].target == "/v1/chat/completions?a=b"


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ("/v1/completions", "/v1/completions"),
        ("/v1/embeddings", "/v1/embeddings"),
        ("/v1/rerank", "/v1/rerank"),
        ("/v2/rerank", "/v1/rerank"),
        ("/v1-openai/embeddings", "/v1/embeddings"),
    ],
)
async def test_every_operation_reaches_its_route_of_the_engine(
    tmp_path: Path, asked: str, served: str
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            assert (await gate.chat(path=asked)).status == 200
            assert engine.seen[0].target == served


async def test_a_stream_arrives_byte_for_byte_without_the_usage_event_we_asked_for(
    tmp_path: Path,
) -> None:
    async with watch_server() as server, running(streaming(20)) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat(STREAM)
            assert reply.body == b"".join(content_events(20)) + DONE
            assert engine.seen[0].json() == {**STREAM, "stream_options": {"include_usage": True}}


async def test_a_client_that_asks_for_usage_gets_it(tmp_path: Path) -> None:
    async with watch_server() as server, running(streaming(3)) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat({**STREAM, "stream_options": {"include_usage": True}})
            assert reply.body == b"".join(content_events(3)) + USAGE_EVENT + DONE


async def test_the_usage_event_is_removed_however_the_engine_splits_its_writes(
    tmp_path: Path,
) -> None:
    whole = b"".join(content_events(3)) + USAGE_EVENT + DONE
    cuts = [1] * len(whole)

    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        start = 0
        for size in cuts:
            await wire.chunk(whole[start : start + size])
            start += size
        await wire.end()

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            for sizes in ([1] * len(whole), [len(whole)], [100, len(whole) - 100]):
                cuts[:] = sizes
                reply = await gate.chat(STREAM)
                assert reply.body == whole.replace(USAGE_EVENT, b"")


async def test_a_stream_that_says_its_length_is_whole_without_its_usage_event(
    tmp_path: Path,
) -> None:
    whole = b"".join(content_events(3)) + USAGE_EVENT + DONE

    async def answer(seen: Seen, wire: Wire) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        await wire.raw(head + b"content-length: %d\r\n\r\n" % len(whole) + whole)

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat(STREAM)
            assert reply.whole
            assert reply.body == whole.replace(USAGE_EVENT, b"")


async def test_the_first_event_reaches_the_client_before_the_second_is_written(
    tmp_path: Path,
) -> None:
    go_on = asyncio.Event()

    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await wire.chunk(content_events(1)[0])
        await go_on.wait()
        await wire.chunk(DONE)
        await wire.end()

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            client = await Client.to(gate.port)
            client.ask("POST", "/v1/chat/completions", AUTH, json.dumps(STREAM).encode())
            await client.head()
            async with asyncio.timeout(2):
                assert await client.chunk() == content_events(1)[0]
            go_on.set()
            assert await client.chunk() == DONE
            await client.close()


async def test_the_clients_secrets_stay_and_the_engines_own_goes_with_the_request(
    tmp_path: Path,
) -> None:
    secrets = {"Cookie": "gpustack_session=s", "X-Api-Key": "k", "Api-Key": "k"}
    private = {"X-GPUStack-Instance": "9", "X-GPUStack-Gateway": "g", "X-GPUStack-Local": "1"}
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            await gate.chat(
                headers={**secrets, **private, "X-Mine": "stays", "Accept-Encoding": "gzip"}
            )
            seen = engine.seen[0].headers
            assert seen["authorization"] == "Bearer secret-1"
            assert seen["x-mine"] == "stays"
            assert not {name for name in seen if name.startswith("x-gpustack")}
            assert not set(seen) & {"cookie", "x-api-key", "api-key", "accept-encoding"}
            assert engine.seen[0].raw_head.lower().count(b"authorization:") == 1


async def test_headers_of_one_connection_stay_on_it_and_pages_elsewhere_may_read_nothing(
    tmp_path: Path,
) -> None:
    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.raw(
            b"HTTP/1.1 200 OK\r\nServer: engine/1\r\nAccess-Control-Allow-Origin: *\r\n"
            b'Set-Cookie: gpustack_session=mine\r\nClear-Site-Data: "*"\r\n'
            b"Access-Control-Allow-Credentials: true\r\nServer-Timing: x\r\nX-Own: 1\r\n"
            b"Content-Length: 2\r\n\r\n{}"
        )

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat(
                headers={"Connection": "keep-alive, X-Mine", "X-Mine": "1", "X-Kept": "2"}
            )
            assert reply.status == 200
            there = set(reply.headers)
            assert not {name for name in there if name.startswith("access-control")}
            assert not there & {"server", "set-cookie", "clear-site-data"}
            assert {"server-timing", "x-own"} <= there
            seen = engine.seen[0].headers
            assert not {"connection", "x-mine"} & set(seen)
            assert seen["x-kept"] == "2"


async def test_an_instance_elsewhere_is_reached_through_its_relay(tmp_path: Path) -> None:
    async with watch_server() as server, running() as relay:
        fill(server)
        server.put("workers", worker(2, relay.port))
        server.put("model-instances", instance(5, 1, 40000, worker_id=2))
        async with gateway(tmp_path, server.port) as gate:
            assert (await gate.chat()).status == 200
            assert relay.seen[0].headers["x-gpustack-instance"] == "5"
            assert relay.seen[0].headers["authorization"] == "Bearer secret-5"


@pytest.mark.parametrize("shows_its_own", [True, False])
async def test_an_instance_elsewhere_is_sent_requests_if_its_relay_shows_its_certificate(
    tmp_path: Path, shows_its_own: bool
) -> None:
    folder = tmp_path / "elsewhere"
    shown, other = OwnCertificate(folder, "w"), OwnCertificate(tmp_path / "other", "w")
    registered = shown if shows_its_own else other
    async with watch_server() as server, running() as engine, secured(folder, 1) as port:
        write_record(folder, 5, engine.port, "secret-5")
        fill(server)
        server.put("workers", worker(2, port, certificate=registered.pem))
        server.put("model-instances", instance(5, 1, 40000, worker_id=2))
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat()
            if shows_its_own:
                assert (reply.status, len(engine.seen)) == (200, 1)
            else:
                assert (reply.status, engine.seen) == (503, [])
                said = "does not show the certificate with which it registered"
                assert said in error(reply)["message"]


async def test_of_a_worker_without_a_certificate_it_is_said_once_that_bytes_go_in_clear(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watch_server() as server, running() as relay:
        fill(server)
        server.put("workers", worker(2, relay.port))
        server.put("model-instances", instance(5, 1, 40000, worker_id=2))
        async with gateway(tmp_path, server.port) as gate:
            for count in (1, 2):
                server.put("model-instances", instance(5, 1, 40000 + count, worker_id=2))
                assert (await gate.chat()).status == 200
    said = [one for one in caplog.messages if "requests to worker 2 go in clear" in one]
    assert len(said) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"",
        b'{"model": 5}',
        b'{"messages": []}',
        b"\xff",
        b'{"model": "\xff"}',
        b'{"model": "m", "messages": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'{"model": "m", "stream": true, "stream_options": {"a": '
        + b"[" * 3000
        + b"]" * 3000
        + b"}}",
    ],
)
async def test_a_broken_body_is_refused_in_openais_shape(tmp_path: Path, body: bytes) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat(body)
            assert reply.status == 400
            assert set(error(reply)) == {"message", "type", "param", "code", "src"}
            assert error(reply)["src"] == "gateway"
            assert not engine.seen


async def test_an_unknown_model_is_not_found(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        server.put("models", model(2, "going", deleting=True))
        async with gateway(tmp_path, server.port) as gate:
            for name in ("absent", "going"):
                reply = await gate.chat({"model": name})
                assert (reply.status, error(reply)["code"]) == (404, "model_not_found")


async def test_a_model_without_a_ready_instance_says_in_which_state_they_are(
    tmp_path: Path,
) -> None:
    async with watch_server() as server:
        fill(server)
        server.put("model-instances", instance(1, 1, None, state="pending"))
        server.put("model-instances", instance(2, 1, None, state="starting"))
        server.put("model-instances", instance(3, 1, None, state="starting"))
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat()
            assert reply.status == 503
            assert "1 pending, 2 starting" in error(reply)["message"]
            assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize("content", [b'{"worker_id": "\xff"}', b"[" * 3000, b"{"])
async def test_a_credential_file_that_is_not_readable_makes_every_engine_one_elsewhere(
    tmp_path: Path, content: bytes
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            (tmp_path / "worker_credential").write_bytes(content)
            server.put("workers", worker(1, engine.port))

            async def relayed() -> bool:
                assert (await gate.chat()).status == 200
                return "x-gpustack-instance" in engine.seen[-1].headers

            await eventually(relayed, "the relay")


async def test_an_instance_that_became_ready_just_now_is_used_at_once(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server)
        async with gateway(tmp_path, server.port) as gate:
            server.announces = False
            server.put("model-instances", instance(1, 1, engine.port))
            assert (await gate.chat()).status == 200


async def test_an_engines_own_error_passes_through_unchanged(tmp_path: Path) -> None:
    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.json({"error": {"message": "too long", "odd": True}}, 400)

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat()
            assert reply.status == 400
            assert json.loads(reply.body) == {"error": {"message": "too long", "odd": True}}


async def test_requests_go_to_the_instance_with_the_fewest(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def hold(seen: Seen, wire: Wire) -> None:
        await held.wait()
        await wire.json({})

    async with watch_server() as server, running(hold) as one, running(hold) as two:
        fill(server, one, two)
        async with gateway(tmp_path, server.port) as gate:
            async with asyncio.TaskGroup() as group:
                for _ in range(10):
                    group.create_task(gate.chat())

                async def all_there() -> bool:
                    return len(one.seen) + len(two.seen) == 10

                await eventually(all_there, "ten requests at the engines")
                assert gate.outstanding(1) == gate.outstanding(2) == 5
                held.set()
            assert gate.outstanding(1) == gate.outstanding(2) == 0


async def test_a_dead_instance_loses_no_request_while_another_lives(tmp_path: Path) -> None:
    async with watch_server() as server, running() as one, running() as two:
        fill(server, one, two)
        async with gateway(tmp_path, server.port) as gate:
            assert (await gate.chat()).status == 200
            one.stop()
            replies = [await gate.chat() for _ in range(20)]
            assert {reply.status for reply in replies} == {200}
            assert gate.outstanding(1) == gate.outstanding(2) == 0


async def test_a_connection_lost_before_the_first_byte_is_tried_elsewhere(tmp_path: Path) -> None:
    async def die(seen: Seen, wire: Wire) -> None:
        wire.die()

    async with watch_server() as server, running(die) as one, running() as two:
        fill(server, one, two)
        async with gateway(tmp_path, server.port) as gate:
            replies = [await gate.chat() for _ in range(4)]
            assert {reply.status for reply in replies} == {200}
            assert one.seen


@pytest.mark.parametrize("status", [429, 502, 503])
async def test_an_overloaded_instance_is_left_for_another(tmp_path: Path, status: int) -> None:
    async def busy(seen: Seen, wire: Wire) -> None:
        await wire.json({"error": "busy"}, status)

    async with watch_server() as server, running(busy) as one, running() as two:
        fill(server, one, two)
        async with gateway(tmp_path, server.port) as gate:
            assert {(await gate.chat()).status for _ in range(4)} == {200}
            assert one.seen
            server.delete("model-instances", 2)

            async def alone() -> bool:
                return (await gate.chat()).status == status

            await eventually(alone, "the only instance's own answer")
            assert two.seen


async def test_nothing_is_tried_again_after_the_first_byte(tmp_path: Path) -> None:
    async def die_halfway(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await wire.chunk(content_events(1)[0])
        await asyncio.sleep(0.05)
        wire.die()

    async with watch_server() as server:
        async with running(die_halfway) as one, running(die_halfway) as two:
            fill(server, one, two)
            async with gateway(tmp_path, server.port) as gate:
                reply = await gate.chat(STREAM)
                assert not reply.whole
                assert reply.pieces == ()
                assert len(one.seen) + len(two.seen) == 1
                assert gate.outstanding(1) == gate.outstanding(2) == 0


async def test_a_single_instance_that_is_gone_is_a_503_and_one_that_dies_a_502(
    tmp_path: Path,
) -> None:
    async def die(seen: Seen, wire: Wire) -> None:
        wire.die()

    async with watch_server() as server, running(die) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            assert (await gate.chat()).status == 502
            engine.stop()
            reply = await gate.chat()
            assert reply.status == 503
            assert error(reply)["src"] == "gateway"


async def test_an_engine_that_does_not_know_our_secret_is_not_the_clients_mistake(
    tmp_path: Path,
) -> None:
    async def refuse(seen: Seen, wire: Wire) -> None:
        await wire.json({"error": "no"}, 401)

    async with watch_server() as server, running(refuse) as one, running() as two:
        fill(server, one)
        async with gateway(tmp_path, server.port) as gate:
            assert (await gate.chat()).status == 502
            server.put("model-instances", instance(2, 1, two.port))

            async def other() -> bool:
                return (await gate.chat()).status == 200

            await eventually(other, "the other instance answers")


async def test_a_relay_that_has_no_such_engine_is_no_answer(tmp_path: Path) -> None:
    async def refuse(seen: Seen, wire: Wire) -> None:
        await wire.raw(
            b"HTTP/1.1 404 X\r\ncontent-length: 0\r\nx-gpustack-relay-refused: 1\r\n\r\n"
        )

    async with watch_server() as server, running(refuse) as relay, running() as engine:
        fill(server, engine)
        server.put("workers", worker(2, relay.port))
        server.put("model-instances", instance(5, 1, 40000, worker_id=2))
        async with gateway(tmp_path, server.port) as gate:
            assert {(await gate.chat()).status for _ in range(4)} == {200}
            server.delete("model-instances", 1)

            async def alone() -> bool:
                return (await gate.chat()).status == 503

            await eventually(alone, "503 from the gateway")


async def test_an_instance_that_just_failed_is_left_alone_for_a_while(tmp_path: Path) -> None:
    async def die(seen: Seen, wire: Wire) -> None:
        wire.die()

    async with watch_server() as server, running(die) as one, running() as two:
        fill(server, one, two)
        async with gateway(tmp_path, server.port) as gate:

            async def failed_once() -> bool:
                await gate.chat()
                return bool(one.seen)

            await eventually(failed_once, "the first failure")
            for id in range(10, 14):
                server.put("models", model(id, f"m{id}"))  # news does not make it forgotten
                assert (await gate.chat()).status == 200
            assert len(one.seen) == 1


async def test_an_unreachable_instance_is_the_last_resort(tmp_path: Path) -> None:
    async with watch_server() as server, running() as one, running() as two:
        fill(server, one, two)
        server.put("model-instances", instance(1, 1, one.port, state="unreachable"))
        async with gateway(tmp_path, server.port) as gate:
            assert {(await gate.chat()).status for _ in range(4)} == {200}
            assert not one.seen
            two.stop()
            assert (await gate.chat()).status == 200
            assert one.seen


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_closes_its_upstream_at_once(
    tmp_path: Path, stream: bool
) -> None:
    async def never(seen: Seen, wire: Wire) -> None:
        if stream:
            await wire.stream_head()
            await wire.chunk(content_events(1)[0])
        await asyncio.Event().wait()

    async with watch_server() as server, running(never) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            client = await Client.to(gate.port)
            client.ask("POST", "/v1/chat/completions", AUTH, json.dumps(STREAM).encode())
            if stream:
                await client.head()
            else:

                async def there() -> bool:
                    return bool(engine.seen)

                await eventually(there, "the request at the engine")
            client.abort()
            left_at = time.monotonic()
            async with asyncio.timeout(5):
                await engine.left.wait()
            assert time.monotonic() - left_at < 0.5

            async def released() -> bool:
                return gate.outstanding(1) == 0

            await eventually(released, "the count is back")


async def test_a_slow_client_holds_its_engine_back(tmp_path: Path) -> None:
    written = 0

    async def flood(seen: Seen, wire: Wire) -> None:
        nonlocal written
        await wire.stream_head()
        while True:
            await wire.chunk(b"x" * 65536)
            written += 65536

    async with watch_server() as server, running(flood) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            client = await Client.to(gate.port)
            client.stop_reading()
            client.ask("POST", "/v1/chat/completions", AUTH, b'{"model":"m"}')
            before = -1

            async def stalled() -> bool:
                nonlocal before
                before, last = written, before
                await asyncio.sleep(0.2)
                return written > 0 and written == before == last

            await eventually(stalled, "the engine waits")
            assert written < 64 * 1024 * 1024
            client.read_on()
            wanted = written + 8 * 1024 * 1024
            async with asyncio.timeout(10):
                while written < wanted:
                    assert await client.reader.read(1024 * 1024)
            client.abort()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_nine_mebibytes_is_streamed(tmp_path: Path, chunked: bool) -> None:
    body = b'{"model": "m", "x": "' + b"y" * (9 * 1024 * 1024) + b'"}'
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            client = await Client.to(gate.port)
            if chunked:
                client.send(
                    b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
                    + f"Authorization: {AUTH['Authorization']}\r\n\r\n".encode()
                )
                for start in range(0, len(body), 100_000):
                    piece = body[start : start + 100_000]
                    client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
                client.send(b"0\r\n\r\n")
            else:
                client.ask("POST", "/v1/embeddings", AUTH, body)
            assert (await client.reply()).status == 200
            assert engine.seen[0].body == body
            await client.close()


async def test_a_large_body_is_let_go_when_its_answer_begins(tmp_path: Path) -> None:
    begun, more = asyncio.Event(), asyncio.Event()

    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        begun.set()
        await more.wait()
        await wire.end()

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            body = b'{"model": "m", "x": "' + b"x" * HELD_BYTES + b'"}'
            client = await Client.to(gate.port)
            client.ask("POST", "/v1/chat/completions", AUTH, body)
            assert (await client.head()).status == 200
            (exchange,) = [c.queue[0] for c in gate.server.connections if c.queue]
            assert isinstance(exchange.receiver, Inference)
            assert sum(map(len, exchange.receiver._pieces)) == 0
            more.set()


async def test_a_large_body_whose_first_instance_is_gone_goes_to_another(tmp_path: Path) -> None:
    body = b'{"model": "m", "x": "' + b"y" * (9 * 1024 * 1024) + b'"}'
    async with watch_server() as server, running() as one, running() as two:
        fill(server, one, two)
        async with gateway(tmp_path, server.port) as gate:
            one.stop()
            for _ in range(2):
                reply = await gate.chat(body)
                assert reply.status == 200
            assert [seen.body == body for seen in two.seen] == [True, True]


async def test_a_body_that_a_dead_instance_paused_goes_on_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next has a connection that takes the beginning at once, so nothing there resumes it."""
    monkeypatch.setattr("gpustack.gateway.inference.HELD_BYTES", 100_000)
    body = b'{"model": "m", "x": "' + b"y" * 250_000 + b'"}'
    async with watch_server() as server, running() as one, running() as two:
        fill(server, one, two)
        async with gateway(tmp_path, server.port) as gate:
            for _ in range(2):
                assert (await gate.chat(b'{"model": "m"}')).status == 200
            one.stop()
            for _ in range(2):
                assert (await gate.chat(body)).status == 200
            assert [seen.body == body for seen in two.seen[-2:]] == [True, True]


async def test_a_large_body_that_names_no_model_early_is_refused(tmp_path: Path) -> None:
    body = b'{"x": "' + b"y" * (9 * 1024 * 1024) + b'", "model": "m"}'
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat(body)
            assert reply.status == 400
            assert error(reply)["param"] == "model"
            assert not engine.seen


async def test_models_are_listed_without_those_that_are_going(tmp_path: Path) -> None:
    async with watch_server() as server:
        fill(server)
        server.put("models", model(2, "org/name:tag"))
        server.put("models", model(3, "going", deleting=True))
        async with gateway(tmp_path, server.port) as gate:
            client = await Client.to(gate.port)
            client.ask("GET", "/v1/models", AUTH)
            listed = json.loads((await client.reply()).body)
            assert listed["object"] == "list"
            assert [one["id"] for one in listed["data"]] == ["m", "org/name:tag"]
            assert listed["data"][0] == {
                "id": "m",
                "object": "model",
                "created": 1767323045,
                "owned_by": "gpustack",
            }
            for path, status in (
                ("/v1/models/org%2Fname:tag", 200),
                ("/v1-openai/models/org/name:tag", 200),
                ("/v1/models/going", 404),
                ("/v1/nothing", 404),
                ("/v1/chat/completions", 405),
            ):
                client.ask("GET", path, AUTH)
                assert (await client.reply()).status == status, path
            await client.close()
