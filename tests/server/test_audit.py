"""The audit log: every change by a user, and no secret."""

import json
from typing import Any

import httpx
import pytest
from sqlmodel import select

from gpustack.lib.secrets import digest
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind, Scope
from gpustack.schemas.events import ActorKind
from gpustack.server.db import audit_log, tables
from gpustack.server.db.acting import actor
from tests.server.conftest import JOIN, LOCAL_ADMIN, PASSWORD, Plane
from tests.support.audit import entries
from tests.support.wait import eventually

MODEL = {"name": "tiny", "source": "local_path", "local_path": "/m.gguf", "replicas": 0}
PEER = "192.0.2.7"


async def user(plane: Plane, name: str = "second", *, is_admin: bool = False) -> httpx.AsyncClient:
    """A client with the key of a new user."""
    async with plane.db.write() as session:
        row = tables.User(username=name, password_hash="none", is_admin=is_admin)
        session.add(row)
        await session.flush()
        session.add(
            tables.Credential(
                kind=CredentialKind.KEY,
                name=f"key of {name}",
                digest=digest(name),
                user_id=row.id,
                scopes=[Scope.ALL],
            )
        )
    return await plane.client(name)


async def test_a_change_says_who_made_it_with_what_from_where_and_what_it_was(
    plane: Plane,
) -> None:
    key = await plane.client("second", **{wire.GATEWAY_HEADER: "gateway-secret"})
    await user(plane, is_admin=True)
    from_afar = {wire.PEER_HEADER: PEER}
    made = await key.post("/v2/models", json=MODEL | {"description": "a"}, headers=from_afar)
    assert made.status_code == 201, made.text
    wanted = MODEL | {"description": "b", "env": {"A": "1"}, "generation": 1}
    assert (await key.put("/v2/models/1", json=wanted, headers=from_afar)).is_success
    assert (await key.delete("/v2/models/1", headers=from_afar)).is_success
    created, updated, deleted = await entries(plane)
    who = {
        "user_id": 2,
        "username": "second",
        "credential_kind": "key",
        "credential_name": "key of second",
        "peer": PEER,
        "kind": "models",
        "object_id": 1,
        "name": "tiny",
    }
    assert all(one.items() >= who.items() for one in (created, updated, deleted))
    assert [one["action"] for one in (created, updated, deleted)] == ["create", "update", "delete"]
    assert created["changed"]["description"] == {"before": None, "after": "a"}
    assert created["changed"]["local_path"] == {"before": None, "after": "/m.gguf"}
    assert updated["changed"] == {
        "description": {"before": "a", "after": "b"},
        "env": {"before": {}, "after": {"A": "********"}},
    }
    assert deleted["changed"]["description"] == {"before": "b", "after": None}


async def test_the_loopback_rule_and_sessions_are_told_apart(plane: Plane) -> None:
    local = {wire.LOCAL_HEADER: "1", wire.PEER_HEADER: "127.0.0.1"}
    here = await plane.through_gateway(**local)
    assert (await here.post("/v2/models", json=MODEL)).is_success
    browser = await plane.through_gateway(**{wire.PEER_HEADER: PEER})
    form = {"username": "admin", "password": PASSWORD}
    assert (await browser.post("/auth/login", data=form)).is_success
    assert (await browser.post("/v2/models", json=MODEL | {"name": "other"})).is_success
    found = [(one["username"], one["credential_kind"], one["peer"]) for one in await entries(plane)]
    assert found == [("admin", "local", "127.0.0.1"), ("admin", "session", PEER)]


async def test_an_actor_ends_with_its_request(plane: Plane) -> None:
    assert (await (await plane.admin()).post("/v2/models", json=MODEL)).is_success
    assert actor().kind is ActorKind.SERVER


async def test_nobody_but_a_gateway_says_where_a_request_is_from(plane: Plane) -> None:
    admin = await plane.client(LOCAL_ADMIN, **{wire.PEER_HEADER: PEER})
    assert (await admin.post("/v2/models", json=MODEL)).is_success
    assert [one["peer"] for one in await entries(plane)] == ["127.0.0.1"]


async def test_what_workers_and_controllers_do_is_no_administrative_change(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await admin.post("/v2/models", json=MODEL | {"replicas": 1})

    async def placed() -> Any:
        items = (await admin.get("/v2/model-instances")).json()["items"]
        return next((one for one in items if one["worker_id"]), None)

    one = await eventually(placed, "it is placed")
    await agent.say(one["id"], "running")
    assert [(one["kind"], one["action"]) for one in await entries(plane)] == [("models", "create")]


async def test_an_update_that_names_no_generation_says_so(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await admin.put(f"/v2/workers/{agent.id}", json={"labels": {"a": "1"}})
    await admin.put(f"/v2/workers/{agent.id}", json={"labels": {"a": "2"}, "generation": 2})
    said = [(one["remark"], one["changed"]) for one in await entries(plane)]
    assert said == [
        (
            audit_log.LAST_WRITER_WINS,
            {"admin_labels": {"before": {}, "after": {"a": "1"}}},
        ),
        ("", {"admin_labels": {"before": {"a": "1"}, "after": {"a": "2"}}}),
    ]


async def test_no_secret_ever_gets_into_the_log(plane: Plane) -> None:
    admin = await plane.admin()
    given = ["hunter2-env", "hunter2-key", "hunter2-token", "Hunter2-password"]
    parameters = [f"--rpc-key={given[1]}", "--hf-token", given[2], "--ctx-size=256"]
    spec = MODEL | {"env": {"HF_TOKEN": given[0]}, "backend_parameters": parameters}
    assert (await admin.post("/v2/models", json=spec)).is_success
    key = (await admin.post("/v2/api-keys", json={"name": "k"})).json()["value"]
    assert (await admin.put("/v2/users/1/password", json={"password": given[3]})).is_success
    log = json.dumps(await entries(plane))
    async with plane.db.read() as session:
        credentials = (await session.exec(select(tables.Credential))).all()
        hashed = (await session.exec(select(tables.User.password_hash))).one()
    for secret in (*given, key, hashed, *(row.digest for row in credentials)):
        assert secret not in log
    model, _, password = await entries(plane)
    assert model["changed"]["backend_parameters"]["after"] == [
        "--rpc-key=********",
        "--hf-token",
        "********",
        "--ctx-size=256",
    ]
    stars = {"before": "********", "after": "********"}
    assert password["changed"] == {"password": stars}


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [
        (["--hf-token hunter2"], ["--hf-token", "********"]),
        (["-hft", "hunter2"], ["-hft", "********"]),
        (["--HF_TOKEN=hunter2"], ["--HF_TOKEN=********"]),
        (["--apikey  hunter2", "-v"], ["--apikey", "********", "-v"]),
        (
            ["--max-tokens", "5", "--key-only", "-c 9"],
            ["--max-tokens", "5", "--key-only", "-c", "9"],
        ),
    ],
)
async def test_a_secret_among_parameters_is_hidden_however_it_is_written(
    plane: Plane, parameters: list[str], shown: list[str]
) -> None:
    admin = await plane.admin()
    assert (
        await admin.post("/v2/models", json=MODEL | {"backend_parameters": parameters})
    ).is_success
    (entry,) = await entries(plane)
    assert entry["changed"]["backend_parameters"]["after"] == shown


async def test_a_secret_that_changes_is_seen_to_change(plane: Plane) -> None:
    admin = await plane.admin()
    for env in ({"A": "1", "B": "1"}, {"A": "2", "B": "1"}):
        await admin.request(
            "PUT" if env["A"] == "2" else "POST",
            "/v2/models/1" if env["A"] == "2" else "/v2/models",
            json=MODEL | {"env": env},
        )
    _, updated = await entries(plane)
    assert set(updated["changed"]) == {"env"}


async def test_a_book_of_a_description_is_cut(plane: Plane) -> None:
    admin = await plane.admin()
    await admin.post("/v2/models", json=MODEL | {"description": "x" * 100_000})
    (entry,) = await entries(plane)
    assert len(entry["changed"]["description"]["after"]) < 5000


async def test_what_was_not_allowed_is_kept_once_and_reading_is_no_attempt(plane: Plane) -> None:
    second = await user(plane)
    for _ in range(3):
        assert (await second.post("/v2/models", json=MODEL)).status_code == 403
    assert (await second.put("/v2/users/1/password")).status_code == 403
    assert (await second.get("/v2/workers")).status_code == 403
    agent = await plane.worker()
    assert (await agent.http.post("/v2/models", json=MODEL)).status_code == 403
    found = [(one["username"], one["action"], one["name"]) for one in await entries(plane)]
    assert found == [
        ("second", "refused", "POST /v2/models"),
        ("second", "refused", "PUT /v2/users/1/password"),
    ]


async def test_what_did_not_happen_is_not_kept(plane: Plane) -> None:
    admin = await plane.admin()
    await admin.post("/v2/models", json=MODEL)
    assert (await admin.post("/v2/models", json=MODEL)).status_code == 409
    assert (await admin.delete("/v2/models/1")).is_success
    await admin.delete("/v2/models/1")  # it is being deleted, or gone, already
    assert [one["action"] for one in await entries(plane)] == ["create", "delete"]


async def test_the_log_is_for_administrators(plane: Plane) -> None:
    second = await user(plane)
    for path in ("/v2/audit", "/v2/audit/verify"):
        assert (await second.get(path)).status_code == 403
        assert (await (await plane.client()).get(path)).status_code == 401


async def test_pages_have_the_newest_first_and_filters_are_combined(plane: Plane) -> None:
    admin = await plane.admin()
    for name in ("a", "b", "c"):
        await admin.post("/v2/models", json=MODEL | {"name": name})
    await admin.delete("/v2/models/1")
    page = (await admin.get("/v2/audit", params={"page": 1, "perPage": 3})).json()
    assert [one["id"] for one in page["items"]] == [4, 3, 2]
    assert page["pagination"]["totalPage"] == 2
    found = await entries(plane, kind="models", action="create", name="b", username="admin")
    assert [one["object_id"] for one in found] == [2]
    assert await entries(plane, username="nobody") == []


async def test_a_token_that_does_not_fit_joins_nobody_and_is_nobodys_change(plane: Plane) -> None:
    joiner = await plane.client(f"not {JOIN}")
    assert (await joiner.post("/v2/workers/register", json={})).status_code == 401
    assert await entries(plane) == []
