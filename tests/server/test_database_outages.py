"""Databases that are not there, at the start or later, and what becomes of who needs them."""

import asyncio
import gc
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import text
from sqlmodel import select

from gpustack.errors import SettingsError
from gpustack.schemas import wire
from gpustack.server.db import database as module
from gpustack.server.db import engines
from gpustack.server.db.migrate import migrate
from gpustack.server.db.tables import Worker
from gpustack.server.db.url import parse
from gpustack.server.views import ADMIN
from tests.server.conftest import Plane, Start
from tests.support.databases import KINDS, Databases
from tests.support.network import Network, network
from tests.support.wait import eventually

PASSWORD = "a-password"
MODEL = {"name": "m", "source": "local_path", "local_path": "/m.gguf"}

pytestmark = pytest.mark.parametrize(
    "databases",
    [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "sqlite"],
    indirect=True,
    scope="session",
)


@pytest.fixture
async def between(database_url: str) -> AsyncIterator[Network]:
    """The network between a server and its database."""
    parts = urlsplit(database_url)
    folder = parse_qs(parts.query).get("host")
    port = {"postgresql": 5432, "mysql": 3306}[parts.scheme]
    target = f"{folder[0]}/.s.PGSQL.5432" if folder else (parts.hostname or "", parts.port or port)
    async with network(target) as made:
        yield made


@pytest.fixture(scope="module")
def user(databases: Databases) -> str:
    return databases.user(PASSWORD)


@pytest.fixture
def url(between: Network, user: str, database_url: str) -> str:
    """Of the database, over the network."""
    netloc = f"{user}:{PASSWORD}@127.0.0.1:{between.port}"
    return urlsplit(database_url)._replace(netloc=netloc, query="").geturl()


@pytest.fixture
async def plane(start: Start, tmp_path: Path, url: str) -> Plane:
    return await start(tmp_path, database_url=url)


async def test_a_connection_that_is_lost_before_it_is_given_back_is_no_news(
    url: str, between: Network, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engines.reading(parse(url))
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await connection.rollback()
        await between.down()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    await engine.dispose()


async def test_a_database_that_goes_away_is_waited_for(
    plane: Plane, between: Network, caplog: pytest.LogCaptureFixture
) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    heartbeats = plane.app.state.heartbeats
    watch = plane.feed.watch(frozenset({wire.MODELS}), ADMIN)
    assert json.loads(await anext(watch))["type"] == "synced"
    caplog.clear()

    await between.down()
    for answer in (
        await admin.get("/v2/models"),
        await admin.post("/v2/models", json=MODEL),
        await agent.say(1, "running"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert answer.json()["message"].endswith("the server's log says why.")
        assert "Retry-After" in answer.headers
    heartbeats.heard(agent.id)
    await heartbeats.write(plane.db)  # fails, and forgets nobody
    ended = plane.feed.watch(frozenset({wire.MODELS}), ADMIN)
    assert [line async for line in ended] == []

    await between.up()

    async def served() -> bool:
        return (await admin.get("/v2/models")).status_code == 200

    await eventually(served, "the server has its database again")
    made = await admin.post("/v2/models", json=MODEL)
    assert made.status_code == 201
    async with asyncio.timeout(20):
        while (told := json.loads(await anext(watch)))["type"] != "put":
            pass
    assert told["data"]["name"] == "m"

    async def placed() -> list[Any]:
        found = (await admin.get("/v2/model-instances")).json()["items"]
        return [one for one in found if one["worker_id"] == agent.id]

    await eventually(placed, "the controllers work again", within_s=20)
    await heartbeats.write(plane.db)
    async with plane.db.read() as session:
        assert (await session.exec(select(Worker))).one().heartbeat_at is not None
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert [line for line in said if "cannot be used" in line] == said[:1] == said
    assert f"127.0.0.1:{between.port}" in said[0]
    assert PASSWORD not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_database_that_says_nothing_is_as_good_as_gone(
    plane: Plane, between: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = await plane.admin()
    monkeypatch.setattr(module, "TRANSACTION_S", 0.5)
    monkeypatch.setattr(engines, "CONNECT_S", 0.5)
    between.freeze()
    async with asyncio.timeout(5):
        answer = await admin.get("/v2/models")
    assert answer.json()["code"] == "database_unavailable"
    await between.down()
    await between.up()

    async def served() -> bool:
        return (await admin.get("/v2/models")).status_code == 200

    await eventually(served, "the server has its database again")


async def test_connections_that_the_database_has_ended_are_replaced_unnoticed(
    plane: Plane, databases: Databases, database_url: str
) -> None:
    """As when it was started again, or `wait_timeout` is over."""
    admin = await plane.admin()
    assert (await admin.post("/v2/models", json=MODEL)).status_code == 201
    await databases.disconnect(database_url)
    assert (await admin.get("/v2/models")).status_code == 200
    answer = await admin.post("/v2/models", json=MODEL | {"name": "other"})
    assert answer.status_code == 201, answer.text


def test_a_connection_that_is_given_up_while_it_is_made_is_closed(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[object] = []  # what the garbage collector finds open
    monkeypatch.setattr(sys, "unraisablehook", lambda found: left.append(found.exc_value))

    async def give_up(turns: int) -> None:
        engine = engines.reading(parse(database_url))

        async def connect() -> None:
            async with engine.connect():
                await asyncio.Event().wait()

        connecting = asyncio.ensure_future(connect())
        for _ in range(turns):
            await asyncio.sleep(0)
        connecting.cancel()
        with suppress(asyncio.CancelledError):
            await connecting
        await engine.dispose()

    for turns in range(60):
        asyncio.run(give_up(turns))
    gc.collect()
    assert left == []


# --- at the start --------------------------------------------------------------------------


def refused(url: str) -> str:
    with pytest.raises(SettingsError) as caught:
        migrate(url)
    sentence = str(caught.value)
    assert sentence.startswith("--database-url: ")
    assert "\n" not in sentence
    assert PASSWORD not in sentence
    return sentence


async def test_a_database_that_does_not_answer_is_one_sentence_at_the_start(
    url: str, between: Network
) -> None:
    await between.down()
    said = await asyncio.to_thread(refused, url)
    assert f"127.0.0.1:{between.port}" in said
    assert "onnect" in said


async def test_a_database_that_is_not_there_is_one_sentence_at_the_start(url: str) -> None:
    elsewhere = urlsplit(url)._replace(path="/no_such_db").geturl()
    assert "no_such_db" in await asyncio.to_thread(refused, elsewhere)


async def test_a_user_who_may_not_enter_is_one_sentence_at_the_start(url: str, user: str) -> None:
    other = url.replace(f"//{user}:", "//no_such_user:")
    assert "no_such_user" in await asyncio.to_thread(refused, other)
