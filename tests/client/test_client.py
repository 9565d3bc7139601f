"""The client against a real socket; the server's side is written out in each test."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from gpustack import errors
from gpustack.client import Client
from gpustack.client.watching import follow
from gpustack.forward.listener import Exchange, Server, asynchronous
from gpustack.lib.secrets import Secret
from gpustack.schemas import wire
from gpustack.schemas.credentials import ApiKeyCreate
from gpustack.schemas.models import Model, ModelCreate, Source
from gpustack.schemas.watch import EventType, WatchEvent

Answer = Callable[[Exchange], Awaitable[None]]
NOW = datetime.now(UTC).isoformat()


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    sock = socket.create_server(("127.0.0.1", 0))
    async with asyncio.TaskGroup() as group:
        server = Server(asynchronous(answer, group))
        await server.listen(sock)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.close()


def model(id: int, name: str) -> dict[str, Any]:
    spec = {"name": name, "source": "local_path", "local_path": "/m.gguf"}
    rollout = {"generation": 1, "state": "done", "versions": []}
    times = {"created_at": NOW, "updated_at": NOW}
    return {**spec, "id": id, "generation": 1, "rollout": rollout, **times}


async def test_a_call_carries_the_credential_and_the_typed_body() -> None:
    seen: list[tuple[str, str, bytes | None, Any]] = []

    async def answer(exchange: Exchange) -> None:
        body = json.loads(await exchange.read(1 << 16) or b"null")
        head = exchange.header(b"authorization")
        seen.append((exchange.method, exchange.path, head, body))
        if exchange.method == "DELETE":
            exchange.respond(202)
        else:
            exchange.respond_json(201, model(5, "m"))

    async with serving(answer) as url, Client(url, Secret("k")) as client:
        made = await client.models.create(
            ModelCreate(name="m", source=Source.LOCAL_PATH, local_path="/m.gguf")
        )
        assert isinstance(made, Model)
        assert made.id == 5
        assert (await client.models.get(5)).name == "m"
        await client.models.delete(5)
    assert [(method, path) for method, path, _, _ in seen] == [
        ("POST", "/v2/models"),
        ("GET", "/v2/models/5"),
        ("DELETE", "/v2/models/5"),
    ]
    assert {head for _, _, head, _ in seen} == {b"Bearer k"}
    assert seen[0][3]["local_path"] == "/m.gguf"


async def test_a_list_is_all_of_its_pages() -> None:
    async def answer(exchange: Exchange) -> None:
        page = 2 if "page=2" in exchange.query else 1
        items = [] if "name=m3" in exchange.query else [model(page, f"m{page}")]
        pages = {"page": page, "perPage": 100, "total": 2, "totalPage": 2}
        exchange.respond_json(200, {"items": items, "pagination": pages})

    async with serving(answer) as url, Client(url) as client:
        assert [one.name for one in await client.models.list()] == ["m1", "m2"]
        with pytest.raises(errors.NotFound, match="no model is called m3"):
            await client.models.by_name("m3")


async def test_a_refusal_is_raised_as_the_error_that_the_server_named() -> None:
    async def answer(exchange: Exchange) -> None:
        raise errors.Conflict("the name is taken", kind="models")

    async with serving(answer) as url, Client(url) as client:
        with pytest.raises(errors.Conflict, match="the name is taken") as caught:
            await client.api_keys.create(ApiKeyCreate(name="k"))
        assert caught.value.detail == {"kind": "models"}
        with pytest.raises(errors.Conflict):
            async for _ in client.instances.logs(1):
                pass


async def test_a_server_that_cannot_be_reached_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with Client(url, timeout_s=0.2) as client:
            with pytest.raises(errors.Unavailable, match=url):  # it accepts and says nothing
                await client.users.me()
    async with Client(url) as client:
        with pytest.raises(errors.Unavailable, match=url):  # nobody listens
            await client.users.me()
        with pytest.raises(errors.Unavailable):
            await anext(client.watch([wire.MODELS]))


async def test_an_answer_that_makes_no_sense_is_an_error_and_not_a_crash() -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.respond(200, body=b"<html>")

    async with serving(answer) as url, Client(url) as client:
        with pytest.raises(errors.GPUStackError, match="not what this version knows"):
            await client.users.me()
        with pytest.raises(errors.Unavailable, match="no event"):
            await anext(client.watch([wire.MODELS]))


async def test_a_followed_object_that_makes_no_sense_is_an_error_of_ours_too() -> None:
    script = Script([put(1, 5)])
    async with serving(script.answer) as url, Client(url) as client:
        async with asyncio.timeout(5), aclosing(client.models.follow()) as changes:
            assert (await anext(changes)).type is EventType.RESYNC
            with pytest.raises(errors.GPUStackError, match="not what this version knows"):
                await anext(changes)


async def test_a_kind_that_nobody_knows_is_not_waited_for() -> None:
    async with Client("http://127.0.0.1:1") as client:
        with pytest.raises(errors.BadRequest, match=r"want some of .*models.*, got modles"):
            client.follow(["models", "modles"])


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")

    async def answer(exchange: Exchange) -> None:
        exchange.respond_json(200, model(1, "m"))

    async with serving(answer) as url, Client(url) as client:
        assert (await client.models.get(1)).name == "m"


async def test_logs_come_as_they_are_written() -> None:
    asked: list[str] = []
    more = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        asked.append(exchange.target.decode())
        exchange.start(200, [])
        await exchange.send(b"one\n")
        await more.wait()
        await exchange.send(b"two\n")

    async with serving(answer) as url, Client(url) as client:
        async with aclosing(client.instances.logs(4, tail=10, follow=True)) as pieces:
            assert await anext(pieces) == b"one\n"
            more.set()
            assert await anext(pieces) == b"two\n"
    assert asked == ["/v2/model-instances/4/logs?follow=true&tail=10"]


def event(type: str, revision: int | None = None, **more: Any) -> dict[str, Any]:
    return {"type": type, "cursor": None if revision is None else f"e.{revision}", **more}


def put(id: int, revision: int) -> dict[str, Any]:
    return event("put", revision, kind=wire.MODELS, id=id, data={"id": id})


class Script:
    """A server whose watches each send the next list of events, then break."""

    def __init__(self, *connections: list[dict[str, Any]] | int) -> None:
        self.connections = list(connections)
        self.since: list[str] = []

    async def answer(self, exchange: Exchange) -> None:
        self.since.append(exchange.query.partition("since=")[2])
        events = self.connections.pop(0)
        if isinstance(events, int):
            exchange.respond_json(events, {"code": "x", "message": "no"})
            return
        exchange.start(200, [])
        for line in events:
            # Lines and packets have nothing to do with each other.
            raw = json.dumps(line).encode() + b"\n"
            await exchange.send(raw[:7])
            await exchange.send(raw[7:])
        if not self.connections:
            await asyncio.Event().wait()
        exchange.abort()


async def heard(client: Client, count: int) -> list[tuple[EventType, int | None]]:
    events: list[tuple[EventType, int | None]] = []
    connect = lambda since: client.watch([wire.MODELS], since)  # noqa: E731
    async with asyncio.timeout(5), aclosing(follow(connect, first_s=0.01)) as stream:
        async for one in stream:
            if one.type is not EventType.HEARTBEAT:
                events.append((one.type, one.id))
            if len(events) == count:
                return events
    raise AssertionError("the stream ended")


async def test_a_watch_is_parsed_event_by_event() -> None:
    script = Script([put(1, 5), event("synced", 5), event("heartbeat", 6)])
    async with serving(script.answer) as url, Client(url) as client:
        async with aclosing(client.watch([wire.MODELS, wire.WORKERS])) as events:
            first = await anext(events)
            assert first == WatchEvent(
                type=EventType.PUT, kind=wire.MODELS, id=1, cursor="e.5", data={"id": 1}
            )
            assert [(await anext(events)).type, (await anext(events)).type] == [
                EventType.SYNCED,
                EventType.HEARTBEAT,
            ]


async def test_a_silent_watch_is_given_up() -> None:
    script = Script([event("synced", 5)])
    async with serving(script.answer) as url, Client(url) as client:
        events = client.watch([wire.MODELS], silence_s=0.1)
        assert (await anext(events)).type is EventType.SYNCED
        with pytest.raises(errors.Unavailable):
            await anext(events)


async def test_a_broken_watch_resumes_where_everything_before_was_heard() -> None:
    script = Script(
        [put(1, 5), event("synced", 5), put(2, 7), event("heartbeat", 7), put(3, 9)],
        503,
        [put(3, 9), event("delete", 10, kind=wire.MODELS, id=1), event("synced", 10)],
    )
    async with serving(script.answer) as url, Client(url) as client:
        assert await heard(client, 8) == [
            (EventType.RESYNC, None),  # a whole list follows
            (EventType.PUT, 1),
            (EventType.SYNCED, None),
            (EventType.PUT, 2),
            (EventType.PUT, 3),
            (EventType.PUT, 3),  # resumed: not a list, so no resync
            (EventType.DELETE, 1),
            (EventType.SYNCED, None),
        ]
    assert script.since == ["", "e.7", "e.7"]


async def test_a_list_that_broke_off_is_asked_for_again_in_whole() -> None:
    script = Script([put(1, 5)], [put(1, 5), put(2, 6), event("synced", 6)])
    async with serving(script.answer) as url, Client(url) as client:
        assert await heard(client, 6) == [
            (EventType.RESYNC, None),
            (EventType.PUT, 1),
            (EventType.RESYNC, None),
            (EventType.PUT, 1),
            (EventType.PUT, 2),
            (EventType.SYNCED, None),
        ]
    assert script.since == ["", ""]


async def test_a_history_that_does_not_reach_back_starts_a_list_that_may_break_too() -> None:
    script = Script(
        [event("synced", 5)],
        [event("resync"), put(1, 90)],
        [put(1, 90), event("synced", 90)],
    )
    async with serving(script.answer) as url, Client(url) as client:
        assert await heard(client, 7) == [
            (EventType.RESYNC, None),
            (EventType.SYNCED, None),
            (EventType.RESYNC, None),
            (EventType.PUT, 1),
            (EventType.RESYNC, None),
            (EventType.PUT, 1),
            (EventType.SYNCED, None),
        ]
    assert script.since == ["", "e.5", ""]


@pytest.mark.parametrize(("status", "error"), [(401, errors.Unauthorized), (403, errors.Forbidden)])
async def test_a_watch_that_is_refused_is_not_tried_again(
    status: int, error: type[errors.GPUStackError]
) -> None:
    script = Script([event("synced", 5)], status)
    async with serving(script.answer) as url, Client(url) as client:
        with pytest.raises(error):
            await heard(client, 9)
