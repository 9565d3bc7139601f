"""Who asks is remembered, and forgotten as soon as it may be somebody else."""

from datetime import timedelta

import httpx
from sqlalchemy import event
from sqlmodel import select

from gpustack.server.auth.known import LIMIT, Known
from gpustack.server.db import tables
from tests.server.conftest import Plane, registration

HOUR = timedelta(hours=1)


def test_what_changed_during_the_look_is_not_remembered() -> None:
    known = Known[str]()
    mark = known.mark
    known.forget()
    known.remember("secret", "admin", None, mark)
    assert known.find("secret") is None
    known.remember("secret", "admin", None, known.mark)
    assert known.find("secret") == "admin"


def test_what_expires_is_not_found_and_the_number_is_bounded() -> None:
    known = Known[int]()
    known.remember("old", 1, tables.now() - HOUR, known.mark)
    known.remember("new", 2, tables.now() + HOUR, known.mark)
    assert (known.find("old"), known.find("new")) == (None, 2)
    for number in range(LIMIT):
        known.remember(str(number), number, None, known.mark)
    assert len(known._found) <= LIMIT


async def status_of(client: httpx.AsyncClient) -> int:
    return (await client.get("/v2/models")).status_code


async def test_a_revoked_key_and_a_lost_role_count_with_the_next_request(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "x"})).json()
    client = await plane.client(key["value"])
    assert await status_of(client) == 200
    assert (await client.get("/v2/workers")).status_code == 200
    async with plane.db.write() as session:
        user = (await session.exec(select(tables.User))).one()
        user.is_admin = False
    assert (await client.get("/v2/workers")).status_code == 403
    async with plane.db.write() as session:
        user = (await session.exec(select(tables.User))).one()
        user.is_admin = True
    assert (await client.get("/v2/workers")).status_code == 200
    await admin.delete(f"/v2/api-keys/{key['id']}")
    assert await status_of(client) == 401


async def test_a_gateway_hears_that_a_user_changed(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "x"})).json()
    async with plane.db.read() as session:
        before = await session.get_one(tables.Credential, key["id"])
    async with plane.db.write() as session:
        user = (await session.exec(select(tables.User))).one()
        user.full_name = "Somebody"
    async with plane.db.read() as session:
        after = await session.get_one(tables.Credential, key["id"])
    assert after.revision > before.revision


async def test_heartbeats_and_unchanged_statuses_cost_no_statement(plane: Plane) -> None:
    agent = await plane.worker()
    beat = {"machine_id": "machine-w1", "boot_id": "boot", "run_id": "run"}
    path = f"/v2/workers/{agent.id}/heartbeat"
    assert (await agent.http.put(path, json=beat)).status_code == 200
    await agent.report()
    statements: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        statements.append(statement)

    engines = [plane.db._readers.sync_engine, plane.db._writer.sync_engine]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    mine = len(statements)
    for _ in range(20):
        assert (await agent.http.put(path, json=beat)).status_code == 200
        await agent.report(cpu_percent=50.0)
    for engine in engines:
        event.remove(engine, "before_cursor_execute", note)
    # What the feed and the controllers do meanwhile is theirs.
    assert not [one for one in statements[mine:] if one.startswith(("INSERT", "DELETE"))]
    assert len(statements) < 20
    plane.app.state.heartbeats.forget(agent.id)
    await plane.app.state.heartbeats.write(plane.db)
    admin = await plane.admin()
    worker = (await admin.get(f"/v2/workers/{agent.id}")).json()
    assert worker["status"]["cpu_percent"] == 50.0


async def test_another_run_takes_over_and_the_old_one_is_refused_at_once(plane: Plane) -> None:
    agent = await plane.worker()
    path = f"/v2/workers/{agent.id}"
    old = {"machine_id": "machine-w1", "boot_id": "boot", "run_id": "run"}
    assert (await agent.http.put(f"{path}/heartbeat", json=old)).status_code == 200
    body = registration("w1", run_id="next")
    assert (await agent.http.put(f"{path}/registration", json=body)).status_code == 200
    assert (await agent.http.put(f"{path}/heartbeat", json=old)).status_code == 409
    new = old | {"run_id": "next"}
    assert (await agent.http.put(f"{path}/heartbeat", json=new)).status_code == 200
