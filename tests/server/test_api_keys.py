"""API keys: what they may do, and when they were last used."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind
from gpustack.server.auth.last_uses import LastUses
from gpustack.server.auth.principals import Principal
from gpustack.server.views import Audience
from tests.server.conftest import GATEWAY, Plane
from tests.support.wait import eventually

KEYS = "/v2/api-keys"


async def make(http: httpx.AsyncClient, name: str, **more: Any) -> dict[str, Any]:
    answer = await http.post(KEYS, json={"name": name} | more)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def test_a_key_is_for_all_unless_said_otherwise(plane: Plane) -> None:
    admin = await plane.admin()
    made = await make(admin, "k")
    assert (made["scope"], made["allowed_model_names"]) == (["*"], None)
    some = await make(
        admin, "s", scope=["metrics", "inference", "metrics"], allowed_model_names=["b", "a"]
    )
    assert (some["scope"], some["allowed_model_names"]) == (["inference", "metrics"], ["a", "b"])
    assert (await admin.get(f"{KEYS}/{some['id']}")).json()["scope"] == ["inference", "metrics"]
    bodies: tuple[dict[str, Any], ...] = (
        {"scope": []},
        {"scope": ["all"]},
        {"allowed_model_names": ["a b"]},
    )
    for wrong in bodies:
        assert (await admin.post(KEYS, json={"name": "x"} | wrong)).status_code == 422


@pytest.mark.parametrize(
    ("scope", "status"), [("inference", 403), ("metrics", 403), ("management", 200), ("*", 200)]
)
async def test_only_keys_for_management_manage(plane: Plane, scope: str, status: int) -> None:
    key = (await make(await plane.admin(), "k", scope=[scope]))["value"]
    client = await plane.client(key)
    for path in ("/v2/models", "/v2/users/me", KEYS):
        assert (await client.get(path)).status_code == status


async def test_a_key_gives_no_more_than_it_has(plane: Plane) -> None:
    admin = await plane.admin()
    key = await make(admin, "k", scope=["management"], allowed_model_names=["a", "b"])
    other = await make(admin, "other")
    client = await plane.client(key["value"])
    within = {"scope": ["management"], "allowed_model_names": ["a"]}
    made = await make(client, "within", **within)
    for more in (
        {},
        {"scope": ["management", "inference"], "allowed_model_names": ["a"]},
        {"scope": ["management"]},
        {"scope": ["management"], "allowed_model_names": ["a", "c"]},
    ):
        assert (await client.post(KEYS, json={"name": "x"} | more)).status_code == 403
    changes: tuple[tuple[int, dict[str, Any]], ...] = (
        (key["id"], {"allowed_model_names": None}),
        (key["id"], {"scope": ["*"]}),
        (made["id"], {"scope": ["metrics"]}),
        (other["id"], {"allowed_model_names": ["a"]}),  # which has scope *
    )
    for id, more in changes:
        answer = await client.put(f"{KEYS}/{id}", json={"name": "y"} | more)
        assert answer.status_code == 403, more
    renamed = await client.put(f"{KEYS}/{other['id']}", json={"name": "renamed"})
    assert (renamed.status_code, renamed.json()["scope"]) == (200, ["*"])


async def test_what_a_key_that_ends_makes_ends_no_later(plane: Plane) -> None:
    admin = await plane.admin()
    ending = await make(admin, "ending", scope=["management"], expires_in=3600)
    client = await plane.client(ending["value"])
    for more in ({}, {"expires_in": 3700}):
        body = {"name": "x", "scope": ["management"]} | more
        assert (await client.post(KEYS, json=body)).status_code == 403
    await make(client, "sooner", scope=["management"], expires_in=60)


async def test_a_limited_key_gets_no_more_by_way_of_a_login(plane: Plane) -> None:
    admin = await plane.admin()
    limited = [{"scope": ["management"]}, {"allowed_model_names": ["a"]}]
    body = {"username": "eve", "is_admin": False}
    assert (await admin.post("/v2/users", json={"username": "eve"})).status_code == 201
    for number, limit in enumerate(limited):
        client = await plane.client((await make(admin, f"k{number}", **limit))["value"])
        for method, path, asked in (
            ("PUT", "/v2/users/1/password", {}),
            ("PUT", "/v2/users/2/password", {"password": "Better-than-2"}),
            ("PUT", "/v2/users/2", body | {"password": "Better-than-2"}),
            ("PUT", "/v2/users/2", body | {"is_admin": True}),
            ("POST", "/v2/users", {"username": "mallory", "is_admin": True}),
        ):
            assert (await client.request(method, path, json=asked)).status_code == 403, path
        renamed = await client.put("/v2/users/2", json=body | {"full_name": f"Eve {number}"})
        assert renamed.status_code == 200
    whole = await plane.client((await make(admin, "whole"))["value"])
    assert (await whole.put("/v2/users/2/password")).status_code == 200


async def test_a_watch_ends_when_its_key_is_no_longer_for_it(plane: Plane) -> None:
    admin = await plane.admin()
    key = await make(admin, "k")
    principal = Principal(CredentialKind.KEY, credential_id=key["id"], user_id=1, is_admin=True)
    watch = plane.feed.watch(
        frozenset({wire.MODELS}), Audience.of(principal), None, key["id"], by_admin=True
    )
    while json.loads(await anext(watch))["type"] != "synced":
        pass
    assert (
        await admin.put(f"{KEYS}/{key['id']}", json={"name": "k", "scope": ["inference"]})
    ).status_code == 200
    async with asyncio.timeout(10):
        async for _ in watch:
            pass


async def test_what_an_update_does_not_say_stays(plane: Plane) -> None:
    admin = await plane.admin()
    made = await make(admin, "k", scope=["inference"], allowed_model_names=["a"])
    path = f"{KEYS}/{made['id']}"
    same = (await admin.put(path, json={"name": "k"})).json()
    assert (same["scope"], same["allowed_model_names"], same["generation"]) == (
        ["inference"], ["a"], 1,
    )  # fmt: skip
    wider = (await admin.put(path, json={"name": "k", "allowed_model_names": None})).json()
    assert (wider["scope"], wider["allowed_model_names"]) == (["inference"], None)
    assert (await admin.put(path, json={"name": "k", "scope": ["*"]})).json()["scope"] == ["*"]


async def test_a_key_shows_when_it_was_last_used(plane: Plane) -> None:
    admin = await plane.admin()
    made = [await make(admin, name) for name in ("managing", "running", "unused")]
    client = await plane.client(made[0]["value"])
    assert (await client.get("/v2/models")).status_code == 200
    uses: LastUses = plane.app.state.last_uses
    record = {
        "request_id": "r", "credential_id": made[1]["id"], "user_id": 1, "model_id": 1,
        "model": "m", "operation": "chat/completions", "started_at": 1_700_000_000.0,
    }  # fmt: skip
    batch = {"spool": "0" * 32, "sequence": 1, "records": [record]}
    gateway = await plane.client(GATEWAY)
    assert (await gateway.post("/v2/usage", json=batch)).status_code == 204

    async def shown() -> list[str | None]:
        await uses.write(plane.db)
        keys = (await admin.get(KEYS)).json()["items"]
        return [key["last_used_at"] for key in keys]

    async def written() -> Any:
        managing, running, unused = await shown()
        return managing and running and (managing, running, unused)

    managing, running, unused = await eventually(written, "uses are written")
    assert managing > made[0]["created_at"]
    assert (running, unused) == ("2023-11-14T22:13:20.000Z", None)
    older = batch | {"sequence": 2, "records": [record | {"request_id": "s", "started_at": 1.0}]}
    assert (await gateway.post("/v2/usage", json=older)).status_code == 204
    assert (await shown())[1] == running  # an older use came later
    assert (await admin.get(f"{KEYS}/{made[1]['id']}")).json()["generation"] == 1
