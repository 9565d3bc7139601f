"""Requests that meet others of this server, or of another one, at the worst moment."""

import asyncio
from pathlib import Path
from typing import Any

from sqlmodel import select

from gpustack.server.db.database import Database, find
from gpustack.server.db.tables import Credential, User
from gpustack.server.db.users import remove_user, set_password
from tests.server.conftest import PASSWORD, Plane, Start, registration
from tests.server.test_leases import on_shared


@on_shared
async def test_one_of_two_machines_that_join_under_one_name_at_once_is_told_to_choose_another(
    start: Start, tmp_path: Path
) -> None:
    planes = [await start(tmp_path / "a"), await start(tmp_path / "b")]
    token = (tmp_path / "a" / "token").read_text().strip()
    joiners = [await plane.client(token) for plane in planes]

    async def join(number: int, name: str, machine: str) -> int:
        body = registration(name, machine_id=machine, run_id=machine)
        return (await joiners[number].post("/v2/workers/register", json=body)).status_code

    for turn in range(5):
        name = f"w{turn}"
        others = await asyncio.gather(*(join(one, name, f"machine-{one}") for one in (0, 1)))
        assert sorted(others) == [200, 409]
    for turn in range(5):  # a new agent whose first request seemed lost
        name = f"same{turn}"
        assert await asyncio.gather(*(join(one, name, "m") for one in (0, 1))) == [200, 200]
    async with planes[0].db.read() as session:
        owners = (await session.exec(select(Credential.worker_id))).all()
    assert len([one for one in owners if one]) == 10  # one credential each


@on_shared
async def test_of_two_api_keys_of_one_name_made_at_once_one_is_refused(
    start: Start, tmp_path: Path
) -> None:
    planes = [await start(tmp_path / "a"), await start(tmp_path / "b")]
    admins = [await plane.admin() for plane in planes]
    for turn in range(10):
        body = {"name": f"k{turn}"}
        made = await asyncio.gather(*(one.post("/v2/api-keys", json=body) for one in admins))
        assert sorted(one.status_code for one in made) == [201, 409]


async def test_who_is_deleted_while_asking_gets_no_key_and_no_session(plane: Plane) -> None:
    admin = await plane.admin()
    made = (await admin.post("/v2/users", json={"username": "u", "password": PASSWORD})).json()
    login = {"username": "u", "password": PASSWORD}
    browser = await plane.client()
    assert (await browser.post("/auth/login", json=login)).status_code == 204
    async with asyncio.TaskGroup() as group:
        async with plane.db.write() as session:  # both are known, and wait for this
            asked = [
                group.create_task(browser.post("/v2/api-keys", json={"name": "k"})),
                group.create_task((await plane.client()).post("/auth/login", json=login)),
            ]
            await asyncio.sleep(1)
            await remove_user(session, await session.get_one(User, made["id"]))
    assert [one.result().status_code for one in asked] == [401, 401]


@on_shared
async def test_no_key_is_made_while_its_user_leaves_a_group(start: Start, tmp_path: Path) -> None:
    """Else gateways could hear of the key with the group, and of nothing after it."""
    planes = [await start(tmp_path / "a"), await start(tmp_path / "b")]
    admin = await planes[0].admin()
    user = {"username": "ann", "password": PASSWORD}
    ann = (await admin.post("/v2/users", json=user)).json()["id"]
    for end in ("/members/{ann}", ""):
        group = (await admin.post("/v2/groups", json={"name": f"g{end}"})).json()["id"]
        members = f"/v2/groups/{group}/members"
        assert (await admin.post(members, json={"user_ids": [ann]})).status_code == 204
        path = f"/v2/groups/{group}" + end.format(ann=ann)
        async with asyncio.TaskGroup() as tasks:
            async with planes[1].db.write() as session:
                assert await find(session, User, ann)  # as whoever makes a key does
                left = tasks.create_task(admin.delete(path))
                await asyncio.sleep(1)
                assert not left.done()
        assert left.result().status_code == 204


async def test_a_password_that_is_replaced_while_it_is_compared_opens_nothing(
    plane: Plane,
) -> None:
    admin = await plane.admin()
    made = (await admin.post("/v2/users", json={"username": "u", "password": PASSWORD})).json()
    login = {"username": "u", "password": PASSWORD}
    async with asyncio.TaskGroup() as group:
        async with plane.db.write() as session:
            asked = group.create_task((await plane.client()).post("/auth/login", json=login))
            await asyncio.sleep(1)
            user = await session.get_one(User, made["id"])
            await set_password(session, user, "another hash", must_change=False)
    assert asked.result().status_code == 401


async def test_what_another_server_deletes_at_that_moment_is_not_found(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "k"})).json()["id"]
    user = {"username": "u", "password": PASSWORD}
    user_id = (await admin.post("/v2/users", json=user)).json()["id"]
    changes = [
        (f"/v2/api-keys/{key}", {"name": "new"}),
        (f"/v2/users/{user_id}", {"username": "new", "is_admin": False}),
    ]
    other = Database(plane.db.url)
    for path, body in changes:
        async with asyncio.TaskGroup() as group:
            async with other.write() as session:
                table, row_id = (Credential, key) if "keys" in path else (User, user_id)
                row: Any = await session.get_one(table, row_id)
                await session.delete(row)
                await session.flush()
                asked = group.create_task(admin.put(path, json=body))
                await asyncio.sleep(0.5)
        assert asked.result().status_code == 404, path
    await other.close()
