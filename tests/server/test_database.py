"""Transactions on every database: what they see, what they lock, what fails and how."""

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, StatementError
from sqlmodel import SQLModel, col, select

from gpustack.errors import Conflict, Contended, DatabaseAway, Invalid
from gpustack.server.api.pages import Navigated
from gpustack.server.api.repeated import Repeated
from gpustack.server.db import engines
from gpustack.server.db.database import Database, ReadSession, get
from gpustack.server.db.tables import Counter, Credential, Model, User
from gpustack.server.db.url import Kind
from tests.server.conftest import Plane
from tests.support.databases import KINDS, Databases

MODEL = {"name": "m", "source": "local_path", "local_path": "/m.gguf", "replicas": 0}
#: Databases that are servers.
on_servers = pytest.mark.parametrize(
    "databases",
    [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "sqlite"],
    indirect=True,
    scope="session",
)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    db = Database(database_url)
    await add(db, Counter(revision=0))
    yield db
    await db.close()


@pytest.fixture
def short_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are waited for as briefly as each database can."""
    monkeypatch.setattr(engines, "LOCK_S", 0.2)
    monkeypatch.setitem(engines._GREETING, Kind.POSTGRESQL, ("SET lock_timeout = '200ms'",))
    monkeypatch.setitem(engines._GREETING, Kind.MYSQL, ("SET innodb_lock_wait_timeout = 1",))


def user(name: str, **more: Any) -> User:
    return User(username=name, password_hash="hash", **more)


async def add(db: Database, *rows: Any) -> None:
    async with db.write() as session:
        session.add_all(rows)


# --- what is kept --------------------------------------------------------------------------


async def test_a_time_comes_back_in_utc_to_the_microsecond(db: Database) -> None:
    moment = datetime(2026, 3, 29, 3, 30, 0, 123456, timezone(timedelta(hours=2)))
    await add(db, user("u", created_at=moment))
    async with db.read() as session:
        found = (await session.exec(select(User))).one()
        earlier = select(User).where(col(User.created_at) < moment + timedelta(microseconds=1))
        assert (await session.exec(earlier)).all() == [found]
        later = select(User).where(col(User.created_at) > moment)
        assert (await session.exec(later)).all() == []
    assert found.created_at == moment
    assert found.created_at.tzinfo is UTC


async def test_a_time_without_a_zone_is_refused(db: Database) -> None:
    with pytest.raises(StatementError, match="without a zone"):
        await add(db, user("u", created_at=datetime(2026, 1, 1)))  # noqa: DTZ001


async def test_names_differ_by_case_and_sort_by_code_points(db: Database) -> None:
    names = ["b", "B", "a-1", "a_1", "A", "ä", "a", "Z", "ß", "ss", "é", "e\u0301", "名", "😀"]
    await add(db, *map(user, names))
    async with db.read() as session:
        found = await session.exec(select(User.username).order_by(User.username))
        assert found.all() == sorted(names)
        assert (await session.exec(select(User).where(User.username == "SS"))).all() == []
    with pytest.raises(IntegrityError):
        await add(db, user("ss"))


async def test_json_and_long_text_come_back_as_they_went(db: Database) -> None:
    scopes = ["*", "\u0000é名😀\"'\\", "x" * 100_000]
    row = Credential(kind="key", digest="d", scopes=scopes, description="é😀" * 40_000)
    await add(db, row)
    async with db.read() as session:
        found = (await session.exec(select(Credential))).one()
    assert (found.scopes, found.description) == (scopes, row.description)


async def test_a_value_that_has_no_room_is_the_senders_mistake(
    db: Database, databases: Databases
) -> None:
    if databases.kind == "sqlite":  # which has room for everything
        await add(db, user("x" * 1000))
        return
    with pytest.raises(Invalid, match="has room for"):
        await add(db, user("x" * 1000))


async def test_no_error_shows_what_was_to_be_stored(db: Database) -> None:
    await add(db, user("u"))
    with pytest.raises(IntegrityError) as caught:
        await add(db, user("u", full_name="a secret"))
    assert "a secret" not in str(caught.value)


# --- what others see -----------------------------------------------------------------------


async def test_a_reader_sees_one_moment_from_its_first_look_to_its_last(db: Database) -> None:
    async with db.read() as session:
        assert (await session.exec(select(User))).all() == []
        await add(db, user("u"))
        assert (await session.exec(select(User))).all() == []
    async with db.read() as session:
        assert len((await session.exec(select(User))).all()) == 1


async def test_a_writer_sees_what_others_committed_while_it_waited(
    db: Database, database_url: str
) -> None:
    """Compare and swap holds among servers: who reads a row to change it has it locked."""
    await add(db, _model("m"))
    others = Database(database_url)

    async def add_one(one: Database) -> None:
        async with one.write() as session:
            row = await get(session, Model, 1)
            row.replicas += 1

    await asyncio.gather(*(add_one(one) for one in (db, others) * 20))
    async with db.read() as session:
        assert (await get(session, Model, 1)).replicas == 40
    await others.close()


def _model(name: str) -> Model:
    return Model(
        name=name, replicas=0, placement_strategy="spread", worker_selector={},
        restart_on_error=True,
    )  # fmt: skip


# --- what is in the way --------------------------------------------------------------------


@asynccontextmanager
async def locked(url: str, table: type[SQLModel]) -> AsyncIterator[None]:
    """Another server holds every row of the table; it waits for its turn, as long as it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "LOCK_S", 5)
        others = Database(url)
    try:
        async with others.write() as session:
            await session.exec(select(table).with_for_update())
            yield
    finally:
        await others.close()


async def test_a_lock_that_is_held_for_too_long_is_one_error(
    short_locks: None, db: Database
) -> None:
    await add(db, user("u"))

    async def change() -> None:
        async with db.write() as session:
            (await session.exec(select(User))).one().full_name = "new"

    async with locked(db.url, User):
        with pytest.raises(Contended):
            await change()
    await change()  # it was only for then


async def test_a_write_that_is_cancelled_anywhere_holds_no_lock(
    short_locks: None, database_url: str, db: Database
) -> None:
    cut = []  # what they raised keeps alive all that they had in hand

    async def write(name: str) -> None:
        async with db.write() as session:
            session.add(user(name))
            for _ in range(20):
                (await session.exec(select(User))).all()

    other = Database(database_url)
    for number in range(60):
        try:
            async with asyncio.timeout(random.uniform(0, 0.02)):
                await write(f"u{number}")
        except TimeoutError as error:
            cut.append(error)
        await add(other, user(f"other-{number}"))
    await other.close()
    assert cut


def test_a_connection_that_is_given_up_while_it_opens_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = threading.Event()
    raised: list[threading.ExceptHookArgs] = []
    connect = sqlite3.connect

    def slowly(*args: Any, **more: Any) -> Any:
        opening.set()
        time.sleep(0.3)
        return connect(*args, **more)

    async def main() -> None:
        db = Database(f"sqlite:///{tmp_path / 'new.db'}")
        reading = asyncio.ensure_future(add(db, Counter(revision=0)))
        assert await asyncio.to_thread(opening.wait, 10)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await db.close()

    monkeypatch.setattr(sqlite3, "connect", slowly)
    monkeypatch.setattr(threading, "excepthook", raised.append)
    asyncio.run(main())
    assert [one.name for one in threading.enumerate() if "_connection_worker" in one.name] == []
    assert raised == []


@on_servers
async def test_of_two_that_lock_each_other_out_one_gives_way(
    db: Database, database_url: str
) -> None:
    await add(db, user("a"), user("b"))
    others = Database(database_url)
    has_first = [asyncio.Event(), asyncio.Event()]

    async def lock_both(one: Database, names: str, me: int) -> None:
        async with one.write() as session:
            for name in names:
                row = (await session.exec(select(User).where(User.username == name))).one()
                row.full_name = str(me)
                await session.flush()
                has_first[me].set()
                await has_first[1 - me].wait()

    ends = await asyncio.gather(
        lock_both(db, "ab", 0), lock_both(others, "ba", 1), return_exceptions=True
    )
    assert sorted(type(end).__name__ for end in ends) == ["Contended", "NoneType"]
    async with db.read() as session:
        names = {row.full_name for row in (await session.exec(select(User))).all()}
    assert names == {str(ends.index(None))}
    await others.close()


@on_servers
async def test_a_transaction_that_does_nothing_is_not_in_the_way_for_ever(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server is frozen, or the power of its machine is cut: the database hears nothing."""
    await add(db, user("u"))
    for kind, statements in engines._GREETING.items():
        said = (one.replace(f"{engines.IDLE_S}s", "1s") for one in statements)
        short = tuple(one.replace(f"= {engines.IDLE_S}", "= 1") for one in said)
        monkeypatch.setitem(engines._GREETING, kind, short)
    frozen = Database(db.url)

    async def frozen_while_others_write() -> None:
        async with frozen.write() as session:
            (await session.exec(select(User).with_for_update())).one().full_name = "late"
            await session.flush()
            async with db.write() as other:
                (await get_user(other)).full_name = "new"

    with pytest.raises(DatabaseAway):
        await frozen_while_others_write()
    async with db.read() as session:
        assert (await get_user(session)).full_name == "new"
    await frozen.close()


async def get_user(session: ReadSession) -> User:
    return (await session.exec(select(User))).one()


async def met_once(
    plane: Plane, request: Coroutine[Any, Any, httpx.Response], table: type[SQLModel]
) -> httpx.Response:
    """The answer to a request that another server is in the way of, but only the first time."""
    failed = asyncio.Event()
    event.listen(plane.db._writer.sync_engine, "checkin", lambda *_: failed.set())
    async with AsyncExitStack() as held, asyncio.TaskGroup() as group:
        await held.enter_async_context(locked(plane.db.url, table))
        asked = group.create_task(request)
        failed.clear()
        await failed.wait()
        await held.aclose()
    return asked.result()


async def test_a_request_that_met_another_transaction_is_carried_out_again(
    short_locks: None, plane: Plane
) -> None:
    admin = await plane.admin()
    answer = await met_once(plane, admin.put("/v2/users/me", json={"full_name": "again"}), User)
    assert (answer.status_code, answer.json()["full_name"]) == (200, "again")


async def test_also_a_body_that_is_read_as_it_comes_is_there_the_second_time(
    short_locks: None, plane: Plane
) -> None:
    admin = await plane.admin()
    path = f"/v2/models/{(await admin.post('/v2/models', json=MODEL)).json()['id']}"
    answer = await met_once(plane, admin.patch(path, json={"description": "again"}), Model)
    assert (answer.status_code, answer.json()["description"]) == (200, "again")


async def test_in_the_end_it_is_told_to_come_back(short_locks: None, plane: Plane) -> None:
    admin = await plane.admin()
    async with locked(plane.db.url, User):
        answer = await admin.put("/v2/users/me", json={"full_name": "never"})
    assert (answer.status_code, answer.json()["code"]) == (503, "contended")
    assert answer.headers["Retry-After"] == "1"
    assert (await admin.get("/v2/users/me")).json()["full_name"] is None


@pytest.mark.parametrize(
    ("error", "times"), [(Contended, 3), (DatabaseAway, 1), (Conflict, 1), (ValueError, 1)]
)
async def test_only_what_changed_nothing_is_repeated_and_three_times_at_most(
    error: type[Exception], times: int
) -> None:
    app, router = FastAPI(), APIRouter(route_class=Repeated)
    runs = 0

    @router.post("/")
    async def handler(body: dict[str, int]) -> None:
        nonlocal runs
        runs += body["one"]
        raise error

    app.include_router(router)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(error):
            await client.post("/", json={"one": 1})
    assert runs == times


async def test_every_route_that_uses_the_database_is_repeated(plane: Plane) -> None:
    # What comes from an identity provider is good for once: `external.log_in` repeats its part.
    plain = {
        getattr(route, "path", "")
        for route in plane.app.routes
        if not isinstance(route, Repeated | Navigated) and hasattr(route, "methods")
    }
    assert {path for path in plain if path.startswith(("/v2", "/auth"))} == set()
