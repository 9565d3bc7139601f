"""Users: administrators make, change and remove them; at least one administrator stays."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind
from gpustack.server.auth.passwords import check_policy
from gpustack.server.auth.principals import Principal
from gpustack.server.db import tables
from gpustack.server.views import GATEWAY as GATEWAY_AUDIENCE
from gpustack.server.views import Audience
from tests.server.conftest import LOCAL_ADMIN, PASSWORD, Plane, Start

USERS = "/v2/users"


async def make(plane: Plane, username: str = "eve", **more: Any) -> dict[str, Any]:
    body = {"username": username, "password": PASSWORD} | more
    answer = await (await plane.admin()).post(USERS, json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def log_in(plane: Plane, username: str, password: str = PASSWORD) -> httpx.AsyncClient:
    browser = await plane.through_gateway()
    answer = await browser.post("/auth/login", data={"username": username, "password": password})
    assert answer.status_code == 204, answer.text
    return browser


async def test_a_new_user_can_log_in_and_is_no_administrator(plane: Plane) -> None:
    made = await make(plane, full_name="Eve Doe")
    assert (made["full_name"], made["is_admin"], made["password"]) == ("Eve Doe", False, None)
    eve = await log_in(plane, "eve")
    assert (await eve.get("/v2/users/me")).json()["username"] == "eve"
    for method, path in (("GET", USERS), ("POST", USERS), ("DELETE", f"{USERS}/1")):
        assert (await eve.request(method, path, json={})).status_code == 403


async def test_a_password_that_nobody_gave_is_made_shown_once_and_must_be_changed(
    plane: Plane,
) -> None:
    made = await make(plane, password=None)
    check_policy(made["password"])
    eve = await log_in(plane, "eve", made["password"])
    assert (await eve.get("/v2/models")).json()["code"] == "password_change_required"
    assert "password" not in (await (await plane.admin()).get(f"{USERS}/2")).json()


async def test_users_are_found_by_name_and_sorted(plane: Plane) -> None:
    await make(plane, "bob", full_name="Robert")
    await make(plane, "zoe", is_admin=True)
    admin = await plane.admin()

    async def found(asked: str) -> list[str]:
        return [one["username"] for one in (await admin.get(f"{USERS}?{asked}")).json()["items"]]

    assert await found("") == ["admin", "bob", "zoe"]
    assert await found("sort_by=-username") == ["zoe", "bob", "admin"]
    assert await found("search=ROB") == ["bob"]
    assert await found("is_admin=true") == ["admin", "zoe"]
    assert await found("username=zoe") == ["zoe"]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"username": "admin", "password": PASSWORD}, 409, "admin exists already"),
        ({"username": "", "password": PASSWORD}, 422, "username"),
        ({"username": "a b", "password": PASSWORD}, 422, "without spaces"),
        ({"username": "a:b", "password": PASSWORD}, 422, "without spaces, colons"),
        ({"username": "a\u202eb", "password": PASSWORD}, 422, "letters"),
        ({"username": "x" * 129, "password": PASSWORD}, 422, "128"),
        ({"username": "eve", "password": "weak-Pass"}, 422, "needs"),
        ({"username": "eve", "full_name": "x" * 129}, 422, "full_name"),
        ({"password": PASSWORD}, 422, "username"),
    ],
)
async def test_a_user_that_cannot_be_is_refused_with_a_sentence(
    plane: Plane, body: dict[str, str], status: int, word: str
) -> None:
    answer = await (await plane.admin()).post(USERS, json=body)
    assert (answer.status_code, word in answer.json()["message"]) == (status, True), answer.text
    assert body.get("password", "-") not in answer.text


async def test_what_a_user_may_do_changes_at_once_for_sessions_that_are_open(plane: Plane) -> None:
    await make(plane)
    admin, eve = await plane.admin(), await log_in(plane, "eve")
    assert (await eve.get(USERS)).status_code == 403
    rights = {"username": "eve", "is_admin": True}
    assert (await admin.put(f"{USERS}/2", json=rights)).json()["is_admin"] is True
    assert (await eve.get(USERS)).status_code == 200
    await admin.put(f"{USERS}/2", json=rights | {"is_admin": False})
    assert (await eve.get(USERS)).status_code == 403


async def test_a_new_password_ends_the_sessions_and_another_name_does_not(plane: Plane) -> None:
    await make(plane)
    admin, eve = await plane.admin(), await log_in(plane, "eve")
    body = {"username": "eva", "is_admin": False}
    assert (await admin.put(f"{USERS}/2", json=body)).status_code == 200
    assert (await eve.get("/v2/users/me")).json()["username"] == "eva"
    taken = await admin.put(f"{USERS}/2", json=body | {"username": "admin"})
    assert taken.status_code == 409
    changed = body | {"password": "Another-1", "require_password_change": True}
    assert (await admin.put(f"{USERS}/2", json=changed)).status_code == 200
    assert (await eve.get("/v2/users/me")).status_code == 401
    eve = await log_in(plane, "eva", "Another-1")
    assert (await eve.get("/v2/models")).json()["code"] == "password_change_required"


async def test_a_removed_users_sessions_and_keys_end_and_the_gateways_hear_of_it(
    plane: Plane,
) -> None:
    await make(plane)
    eve = await log_in(plane, "eve")
    key = (await eve.post("/v2/api-keys", json={"name": "k"})).json()["value"]
    with_key, admin = await plane.client(key), await plane.admin()
    async with plane.db.read() as session:
        counter = (await session.get_one(tables.Counter, 1)).revision
    assert (await with_key.get("/v2/users/me")).status_code == 200
    assert (await admin.delete(f"{USERS}/2")).status_code == 204
    for client in (eve, with_key):
        assert (await client.get("/v2/users/me")).status_code == 401
    assert (await admin.get(f"{USERS}/2")).status_code == 404
    async with plane.db.read() as session:
        rows = await session.get(tables.Change, (counter + 1, wire.CREDENTIALS, 4))
    assert rows is not None
    assert rows.deleted


async def test_the_last_administrator_can_neither_be_removed_nor_step_down(plane: Plane) -> None:
    await make(plane)
    admin = await plane.admin()
    for answer in (
        await admin.delete(f"{USERS}/1"),
        await admin.put(f"{USERS}/1", json={"username": "admin", "is_admin": False}),
    ):
        assert answer.status_code == 409
        assert "admin is the last administrator" in answer.json()["message"]
    assert (await admin.get(USERS)).status_code == 200


async def test_of_administrators_that_remove_each_other_one_stays(plane: Plane) -> None:
    for name in ("eve", "bob", "zoe"):
        await make(plane, name, is_admin=True)
    admin = await plane.admin()
    paths = [f"{USERS}/{number}" for number in (1, 2, 3, 4)]
    answers = await asyncio.gather(*(admin.delete(path) for path in paths))
    assert sorted(answer.status_code for answer in answers) == [204, 204, 204, 409]
    left = (await admin.get(USERS)).json()["items"]
    assert [one["is_admin"] for one in left] == [True]


async def test_the_first_administrator_may_go_and_does_not_come_back(
    start: Start, tmp_path: Path
) -> None:
    """The command line of the server's own machine acts as another administrator then."""
    plane = await start(tmp_path)
    await make(plane, "eve", is_admin=True)
    admin = await plane.admin()
    assert (await admin.delete(f"{USERS}/1")).status_code == 204
    assert (await admin.get("/v2/users/me")).json()["username"] == "eve"
    local = await plane.through_gateway(**{wire.LOCAL_HEADER: "1"})
    assert (await local.get("/v2/users/me")).json()["username"] == "eve"
    await plane.stack.aclose()
    again = await start(tmp_path)
    answer = await (await again.client(LOCAL_ADMIN)).get(USERS)
    assert [one["username"] for one in answer.json()["items"]] == ["eve"]


async def test_updates_are_made_from_the_user_that_was_read(plane: Plane) -> None:
    made = await make(plane)
    admin, path = await plane.admin(), f"{USERS}/{made['id']}"
    read = await admin.get(path)
    body, seen = {"username": "eve", "is_admin": False}, {"If-Match": read.headers["etag"]}
    answer = await admin.put(path, json=body | {"full_name": "E"}, headers=seen)
    assert (answer.status_code, answer.headers["etag"]) == (200, '"2"')
    assert answer.json()["generation"] == 2
    late = await admin.put(path, json=body | {"full_name": "late"}, headers=seen)
    assert late.status_code == 409
    assert late.json()["message"] == "user eve is at generation 2, not 1"
    assert late.json()["detail"]["current"] == (await admin.get(path)).json()
    late = await admin.put(path, json=body | {"generation": 1, "password": "Better-than-2"})
    assert late.status_code == 409  # and the password is what it was
    eve = await log_in(plane, "eve")
    assert (await eve.put(f"{USERS}/me", json={"full_name": "late"}, headers=seen)).json()[
        "detail"
    ]["current"]["full_name"] == "E"
    mine = {"full_name": "Eve", "generation": 2}
    assert (await eve.put(f"{USERS}/me", json=mine)).json()["generation"] == 3
    assert (await eve.get(f"{USERS}/me")).headers["etag"] == '"3"'
    same = await admin.put(path, json=body | {"full_name": "Eve"})
    assert same.json()["generation"] == 3  # nothing changed
    await admin.put(f"{path}/password", json={"password": "Better-than-2"})
    assert (await admin.get(path)).json()["generation"] == 4


async def test_updates_are_made_from_the_api_key_that_was_read(plane: Plane) -> None:
    admin = await plane.admin()
    path = f"/v2/api-keys/{(await admin.post('/v2/api-keys', json={'name': 'k'})).json()['id']}"
    seen = {"If-Match": (await admin.get(path)).headers["etag"]}
    answer = await admin.put(path, json={"name": "l"}, headers=seen)
    assert (answer.status_code, answer.headers["etag"]) == (200, '"2"')
    for late in (
        await admin.put(path, json={"name": "late"}, headers=seen),
        await admin.put(path, json={"name": "late", "generation": 1}),
    ):
        assert late.status_code == 409
        assert late.json()["message"] == "API key l is at generation 2, not 1"
        assert late.json()["detail"]["current"] == answer.json()
    assert (await admin.put(path, json={"name": "last"})).json()["generation"] == 3


async def test_a_users_api_keys_have_different_names(plane: Plane) -> None:
    await make(plane)
    admin, eve = await plane.admin(), await log_in(plane, "eve")
    for name in ("a", "b"):
        assert (await admin.post("/v2/api-keys", json={"name": name})).status_code == 201
    assert (await eve.post("/v2/api-keys", json={"name": "a"})).status_code == 201  # hers
    refused = await admin.post("/v2/api-keys", json={"name": "a"})
    assert refused.status_code == 409
    assert refused.json()["message"] == "you have an API key named a already"
    (a, _) = (await admin.get("/v2/api-keys?sort_by=name")).json()["items"]
    path = f"/v2/api-keys/{a['id']}"
    assert (await admin.put(path, json={"name": "b"})).status_code == 409
    assert (await admin.put(path, json={"name": "a", "description": "x"})).status_code == 200
    await admin.delete(path)
    assert (await admin.post("/v2/api-keys", json={"name": "a"})).status_code == 201


async def test_a_disabled_user_can_do_nothing_until_enabled_again(plane: Plane) -> None:
    made = await make(plane)
    admin, path = await plane.admin(), f"{USERS}/{made['id']}"
    eve = await log_in(plane, "eve")
    key = (await eve.post("/v2/api-keys", json={"name": "k"})).json()["value"]
    with_key = await plane.client(key)
    assert (await with_key.get("/v2/users/me")).json()["is_active"]
    body = {"username": "eve", "is_admin": False}
    off = await admin.put(path, json=body | {"is_active": False})
    assert (off.status_code, off.json()["is_active"]) == (200, False)
    for client in (eve, with_key):
        assert (await client.get("/v2/users/me")).status_code == 401
    wrong = await (await plane.through_gateway()).post(
        "/auth/login", data={"username": "eve", "password": PASSWORD}
    )
    nobody = await (await plane.through_gateway()).post(
        "/auth/login", data={"username": "nobody", "password": PASSWORD}
    )
    assert (wrong.status_code, wrong.json()) == (nobody.status_code, nobody.json())
    same = await admin.put(path, json=body)
    assert not same.json()["is_active"]  # what is not said stays
    assert (await admin.put(path, json=body | {"is_active": True})).json()["is_active"]
    assert (await with_key.get("/v2/users/me")).status_code == 200
    assert (await eve.get("/v2/users/me")).status_code == 401  # that session is over


async def test_the_last_administrator_cannot_be_disabled(plane: Plane) -> None:
    admin = await plane.admin()
    body = {"username": "admin", "is_admin": True, "is_active": False}
    refused = await admin.put(f"{USERS}/1", json=body)
    assert refused.status_code == 409
    assert "last administrator" in refused.json()["message"]
    made = await make(plane, is_admin=True)
    assert (await admin.put(f"{USERS}/1", json=body)).status_code == 200
    assert (await admin.get(f"{USERS}/me")).json()["username"] == "eve"  # the server's own way in
    last = {"username": "eve", "is_admin": True, "is_active": False}
    assert (await admin.put(f"{USERS}/{made['id']}", json=last)).status_code == 409


async def test_watches_of_a_disabled_user_end_and_gateways_hear_of_it(plane: Plane) -> None:
    made = await make(plane)
    eve, admin = await log_in(plane, "eve"), await plane.admin()
    key = (await eve.post("/v2/api-keys", json={"name": "k"})).json()
    async with plane.db.read() as session:
        row = await session.get_one(tables.Credential, key["id"])
    mine = plane.feed.watch(frozenset({wire.API_KEYS}), Audience.of(_as_user(row)), None, row.id)
    seen = plane.feed.watch(frozenset({wire.CREDENTIALS}), GATEWAY_AUDIENCE)
    for watch in (mine, seen):
        while json.loads(await anext(watch))["type"] != "synced":
            pass
    body = {"username": "eve", "is_admin": False, "is_active": False}
    assert (await admin.put(f"{USERS}/{made['id']}", json=body)).status_code == 200
    async with asyncio.timeout(10):
        async for line in seen:
            event = json.loads(line)
            if event["id"] == key["id"]:
                assert event["data"]["user_disabled"]
                break
        async for _ in mine:
            pass
    await seen.aclose()


def _as_user(row: tables.Credential) -> Principal:
    return Principal(CredentialKind.KEY, credential_id=row.id, user_id=row.user_id)
