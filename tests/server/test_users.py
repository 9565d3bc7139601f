"""Users, and how an administrator gives them new passwords."""

import json

import httpx
import pytest

from gpustack.server.auth.passwords import check_policy
from gpustack.server.db import tables
from tests.server.conftest import PASSWORD, Plane


async def log_in(plane: Plane, password: str) -> tuple[int, httpx.AsyncClient]:
    browser = await plane.through_gateway()
    form = {"username": "admin", "password": password}
    return (await browser.post("/auth/login", data=form)).status_code, browser


async def test_a_generated_password_replaces_the_old_one_and_every_session(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "k"})).json()["value"]
    _, browser = await log_in(plane, PASSWORD)
    assert (await browser.get("/v2/models")).status_code == 200
    answer = await admin.put("/v2/users/1/password")
    assert answer.status_code == 200, answer.text
    password = answer.json()["password"]
    check_policy(password)
    assert (await browser.get("/v2/models")).status_code == 401
    assert (await log_in(plane, PASSWORD))[0] == 401
    status, browser = await log_in(plane, password)
    assert status == 204
    assert (await browser.get("/v2/models")).json()["code"] == "password_change_required"
    with_key = await plane.client(key)
    assert (await with_key.get("/v2/models")).status_code == 200  # keys are no sessions


async def test_a_given_password_holds_as_it_is_and_is_not_repeated(plane: Plane) -> None:
    admin = await plane.admin()
    answer = await admin.put("/v2/users/1/password", json={"password": "Better-than-2"})
    assert answer.json() == {"password": None}
    status, browser = await log_in(plane, "Better-than-2")
    assert status == 204
    assert (await browser.get("/v2/models")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v2/users/1/password", {"password": "weak-Pass"}, 422),
        ("/v2/users/1/password", {"passwort": "Better-than-2"}, 422),
        ("/v2/users/9/password", {}, 404),
    ],
)
async def test_what_cannot_be_changes_nothing(
    plane: Plane, path: str, body: dict[str, str], status: int
) -> None:
    admin = await plane.admin()
    answer = await admin.put(path, json=body)
    assert answer.status_code == status
    assert not any(word in answer.text for word in body.values())
    assert (await log_in(plane, PASSWORD))[0] == 204


async def test_only_administrators_reset_passwords(plane: Plane) -> None:
    async with plane.db.write() as session:
        (await session.get_one(tables.User, 1)).is_admin = False
    _, browser = await log_in(plane, PASSWORD)
    agent = await plane.worker()
    for client in (browser, agent.http):
        answer = await client.put("/v2/users/1/password", content=json.dumps({}))
        assert answer.status_code == 403
