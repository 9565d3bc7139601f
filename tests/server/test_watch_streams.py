"""Watches as they go over the wire: JSON lines, Server-Sent Events, readers that do not read."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median

import httpx
import pytest
import uvicorn
from sqlmodel import select

from gpustack.lib.platform import listen
from gpustack.server.db import tables
from gpustack.server.db.database import current_revision, touch
from tests.server.conftest import LOCAL_ADMIN, PASSWORD, Plane
from tests.server.test_feed import add
from tests.support.raw_http import Client
from tests.support.wait import eventually

SSE = {"Accept": "text/event-stream"}


@asynccontextmanager
async def served(plane: Plane) -> AsyncIterator[httpx.AsyncClient]:
    """The API over a real socket: a client in the same process would collect endless answers."""
    sock = listen("127.0.0.1", 0)
    config = uvicorn.Config(plane.app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{sock.getsockname()[1]}",
            headers={"Authorization": f"Bearer {LOCAL_ADMIN}"},
            trust_env=False,
        ) as client:
            yield client
    finally:
        plane.feed.close()
        server.should_exit = True
        await task


async def event(lines: AsyncIterator[str]) -> dict[str, str]:
    """The next Server-Sent Event: its fields."""
    fields: dict[str, str] = {}
    async with asyncio.timeout(5):
        async for line in lines:
            if not line:
                return fields
            name, _, value = line.partition(": ")
            fields[name] = value
    raise EOFError


async def test_a_browser_gets_events_and_goes_on_where_it_was(plane: Plane) -> None:
    async with served(plane) as client:
        await client.post("/v2/api-keys", json={"name": "a"})
        path = "/v2/watch?kinds=api-keys,workers"
        async with client.stream("GET", path, headers=SSE) as stream:
            assert stream.headers["content-type"] == "text/event-stream"
            lines = stream.aiter_lines()
            listed = await event(lines)
            assert listed["event"] == "put"
            assert json.loads(listed["data"])["data"]["name"] == "a"
            synced = await event(lines)
            assert synced["event"] == "synced"
            assert synced["id"] == json.loads(synced["data"])["cursor"]
        await client.post("/v2/api-keys", json={"name": "b"})
        again = SSE | {"Last-Event-ID": synced["id"]}
        async with client.stream("GET", path, headers=again) as stream:
            lines = stream.aiter_lines()
            missed = [json.loads((await event(lines))["data"]) for _ in range(2)]
        assert [(one["type"], (one.get("data") or {}).get("name")) for one in missed] == [
            ("put", "b"),
            ("synced", None),
        ]


async def test_a_browser_that_began_at_a_cursor_does_not_go_back_there(plane: Plane) -> None:
    """It connects anew to the address it had, and says in a header how far it came."""
    async with served(plane) as client:
        async with client.stream("GET", "/v2/watch?kinds=api-keys", headers=SSE) as stream:
            began = await event(stream.aiter_lines())
        path = f"/v2/watch?kinds=api-keys&since={began['id']}"
        await client.post("/v2/api-keys", json={"name": "a"})
        async with client.stream("GET", path, headers=SSE) as stream:
            lines = stream.aiter_lines()
            assert [(await event(lines))["event"] for _ in range(2)] == ["put", "synced"]
            await client.post("/v2/api-keys", json={"name": "b"})
            await event(lines)
            reached = await client.post("/v2/api-keys", json={"name": "c"})
            came = await event(lines)
            assert json.loads(came["data"])["id"] == reached.json()["id"]
        again = SSE | {"Last-Event-ID": came["id"]}
        async with client.stream("GET", path, headers=again) as stream:
            missed = json.loads((await event(stream.aiter_lines()))["data"])
        assert missed["data"]["name"] == "c"


async def test_who_is_no_administrator_any_more_watches_no_longer_what_they_see(
    plane: Plane,
) -> None:
    async with served(plane) as client:
        user = {"username": "u", "password": PASSWORD, "is_admin": True}
        made = (await client.post("/v2/users", json=user)).json()
        async with httpx.AsyncClient(base_url=client.base_url, trust_env=False) as browser:
            login = {"username": "u", "password": PASSWORD}
            assert (await browser.post("/auth/login", json=login)).status_code == 204
            paths = ["/v2/model-instances?watch=true", "/v2/models?watch=true"]
            async with AsyncExitStack() as stack:
                opened = [browser.stream("GET", path, headers=SSE) for path in paths]
                instances, models = [
                    (await stack.enter_async_context(one)).aiter_lines() for one in opened
                ]
                for lines in (instances, models):
                    assert (await event(lines))["event"] == "synced"
                path = f"/v2/users/{made['id']}"
                wanted = {"username": "u", "is_admin": False}
                assert (await client.put(path, json=wanted)).status_code == 200
                for lines in (instances, models):  # of models there is less to see now
                    with pytest.raises(EOFError):
                        await event(lines)
            assert (await browser.get("/v2/model-instances")).status_code == 403


@pytest.mark.parametrize("accept", ["*/*", "application/x-ndjson", "application/json"])
async def test_everybody_else_gets_json_lines(plane: Plane, accept: str) -> None:
    async with served(plane) as client:
        headers = {"Accept": accept}
        async with client.stream("GET", "/v2/models?watch=true", headers=headers) as stream:
            assert stream.headers["content-type"] == "application/x-ndjson"
            assert json.loads(await anext(stream.aiter_lines()))["type"] == "synced"


async def test_a_browser_that_leaves_ends_its_watch(plane: Plane) -> None:
    async with served(plane) as client:
        async with client.stream("GET", "/v2/models?watch=true", headers=SSE) as stream:
            await event(stream.aiter_lines())
            assert len(plane.feed._subscriptions) == 1

        async def gone() -> bool:
            return not plane.feed._subscriptions

        await eventually(gone, "nobody watches any more")


@pytest.mark.slow
async def test_a_watcher_that_never_reads_costs_an_entry_per_object_and_no_writer_waits(
    plane: Plane,
) -> None:
    """100,000 changes against it, in 1,001 transactions; then it reads, and sees the newest."""
    objects, rounds = 100, 1000
    await add(plane, *(f"m{number}" for number in range(objects)))

    async def change_all(description: str = "") -> float:
        """How long a transaction with a change of every object takes, s."""
        began = time.perf_counter()
        async with plane.db.write() as session:
            for row in (await session.exec(select(tables.Model))).all():
                touch(session, row)
                row.description = description
        return time.perf_counter() - began

    alone = [await change_all() for _ in range(rounds // 10)]
    async with served(plane) as client:
        stalled = await Client.to(client.base_url.port or 0)
        bearer = {"Authorization": f"Bearer {LOCAL_ADMIN}"}
        stalled.ask("GET", "/v2/models?watch=true", bearer)

        async def is_watching() -> bool:
            return bool(plane.feed._subscriptions)

        await eventually(is_watching, "it watches")
        (subscription,) = plane.feed._subscriptions
        watched = [await change_all() for _ in range(rounds)]
        await change_all("the last")
        await _feed_is_done(plane)
        assert len(subscription.pending) == objects
        assert median(watched) < 2 * median(alone)
        assert max(watched) < 10 + max(alone)  # none of them waited for it
        last = b'"description":"the last"'
        seen = 0
        async with asyncio.timeout(60):
            while seen < objects:
                seen += last in await stalled.reader.readline()
        assert not subscription.pending


async def _feed_is_done(plane: Plane) -> None:
    async with plane.db.read() as session:
        newest = await current_revision(session)
    await plane.feed.reach(newest)
