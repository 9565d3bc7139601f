"""Nothing with which users change something is forgotten in the audit log."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from sqlmodel import SQLModel

from gpustack.server.auth.principals import SAFE_METHODS
from gpustack.server.db import tables
from gpustack.server.db.audited import AUDITED, JOIN_TOKEN, NOT_AUDITED, Subject
from tests.server.conftest import FakeAgent, Plane, registration
from tests.support.audit import entries, verified
from tests.support.ports import free_ports
from tests.support.routes import walk
from tests.support.wait import eventually

MODEL = {"name": "tiny", "source": "local_path", "local_path": "/m.gguf", "replicas": 0}
FILE = {"source": "huggingface", "huggingface_repo_id": "org/m"}

Act = Callable[["Stage"], Awaitable[httpx.Response]]


class Stage:
    """What the routes are called on: an administrator, and one of everything."""

    def __init__(self, admin: httpx.AsyncClient, agent: FakeAgent, instance: int) -> None:
        self.admin, self.agent, self.instance = admin, agent, instance


@asynccontextmanager
async def answering(port: int) -> AsyncIterator[None]:
    """An agent that takes any log level."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\ndebug")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    async with server:
        yield


async def _worker_log_level(stage: Stage) -> httpx.Response:
    port = free_ports(1)
    again = registration(port=port)
    await stage.agent.http.put(f"/v2/workers/{stage.agent.id}/registration", json=again)
    async with answering(port):
        return await stage.admin.put(f"/v2/workers/{stage.agent.id}/log-level", content="debug")


async def _rollback(stage: Stage) -> httpx.Response:
    spec = MODEL | {"env": {"A": "1"}}
    assert (await stage.admin.put("/v2/models/1", json=spec)).is_success
    return await stage.admin.post("/v2/models/1/rollback", json={})


async def _last_key(stage: Stage, method: str, body: Any) -> httpx.Response:
    key = (await stage.admin.get("/v2/api-keys")).json()["items"][-1]
    return await stage.admin.request(method, f"/v2/api-keys/{key['id']}", json=body)


async def _last_join_token(stage: Stage) -> httpx.Response:
    token = (await stage.admin.get("/v2/join-tokens")).json()["items"][-1]
    return await stage.admin.delete(f"/v2/join-tokens/{token['id']}")


#: One call of every route with which users change something. They run in this order.
CALLS: dict[tuple[str, str], Act] = {
    ("PUT", "/debug/log_level"): lambda s: s.admin.put("/debug/log_level", content="info"),
    ("PUT", "/v2/workers/{worker_id}/log-level"): _worker_log_level,
    ("PUT", "/v2/workers/{worker_id}"): lambda s: s.admin.put(
        f"/v2/workers/{s.agent.id}", json={"labels": {"a": "b"}}
    ),
    ("POST", "/v2/models"): lambda s: s.admin.post("/v2/models", json=MODEL | {"name": "new"}),
    ("PUT", "/v2/models/{model_id}"): lambda s: s.admin.put(
        "/v2/models/1", json=MODEL | {"replicas": 1, "description": "new"}
    ),
    ("PATCH", "/v2/models/{model_id}"): lambda s: s.admin.patch(
        "/v2/models/1", json={"description": "newer"}
    ),
    ("PUT", "/v2/models/{model_id}/access"): lambda s: s.admin.put(
        "/v2/models/1/access", json={"user_ids": [1]}
    ),
    ("POST", "/v2/model-instances/{instance_id}/retry"): lambda s: s.admin.post(
        f"/v2/model-instances/{s.instance}/retry"
    ),
    ("DELETE", "/v2/model-instances/{instance_id}"): lambda s: s.admin.delete(
        f"/v2/model-instances/{s.instance}"
    ),
    ("POST", "/v2/models/{model_id}/rollback"): _rollback,
    ("POST", "/v2/apply"): lambda s: s.admin.post(
        "/v2/apply", json={"models": [MODEL | {"name": "applied"}]}
    ),
    ("POST", "/v2/model-files"): lambda s: s.admin.post(
        "/v2/model-files", json=FILE | {"worker_id": s.agent.id}
    ),
    ("POST", "/v2/model-files/{file_id}/reset"): lambda s: s.admin.post("/v2/model-files/1/reset"),
    ("DELETE", "/v2/model-files/{file_id}"): lambda s: s.admin.delete("/v2/model-files/1"),
    ("DELETE", "/v2/models"): lambda s: s.admin.delete("/v2/models", params={"ids": "2,3"}),
    ("DELETE", "/v2/models/{model_id}"): lambda s: s.admin.delete("/v2/models/1"),
    ("POST", "/v2/workers/{worker_id}/cordon"): lambda s: s.admin.post(
        f"/v2/workers/{s.agent.id}/cordon", json={"reason": "disk swap"}
    ),
    ("POST", "/v2/workers/{worker_id}/drain"): lambda s: s.admin.post(
        f"/v2/workers/{s.agent.id}/drain", json={}
    ),
    ("POST", "/v2/workers/{worker_id}/uncordon"): lambda s: s.admin.post(
        f"/v2/workers/{s.agent.id}/uncordon"
    ),
    ("DELETE", "/v2/workers/{worker_id}"): lambda s: s.admin.delete(f"/v2/workers/{s.agent.id}"),
    ("POST", "/v2/api-keys"): lambda s: s.admin.post("/v2/api-keys", json={"name": "k"}),
    ("PUT", "/v2/api-keys/{key_id}"): lambda s: _last_key(s, "PUT", {"name": "other"}),
    ("DELETE", "/v2/api-keys/{key_id}"): lambda s: _last_key(s, "DELETE", None),
    ("POST", "/v2/join-tokens"): lambda s: s.admin.post("/v2/join-tokens", json={}),
    ("DELETE", "/v2/join-tokens/{token_id}"): _last_join_token,
    ("POST", "/v2/cluster-token/rotate"): lambda s: s.admin.post("/v2/cluster-token/rotate"),
    ("PUT", "/v2/users/me"): lambda s: s.admin.put("/v2/users/me", json={"full_name": "A"}),
    ("POST", "/v2/users"): lambda s: s.admin.post("/v2/users", json={"username": "second"}),
    ("PUT", "/v2/users/{user_id}"): lambda s: s.admin.put(
        "/v2/users/2", json={"username": "third", "is_admin": False}
    ),
    ("POST", "/v2/groups"): lambda s: s.admin.post("/v2/groups", json={"name": "team"}),
    ("PUT", "/v2/groups/{group_id}"): lambda s: s.admin.put("/v2/groups/1", json={"name": "t"}),
    ("POST", "/v2/groups/{group_id}/members"): lambda s: s.admin.post(
        "/v2/groups/1/members", json={"user_ids": [2]}
    ),
    ("DELETE", "/v2/groups/{group_id}/members/{user_id}"): lambda s: s.admin.delete(
        "/v2/groups/1/members/2"
    ),
    ("DELETE", "/v2/groups/{group_id}"): lambda s: s.admin.delete("/v2/groups/1"),
    ("DELETE", "/v2/users/{user_id}"): lambda s: s.admin.delete("/v2/users/2"),
    ("PUT", "/v2/users/{user_id}/password"): lambda s: s.admin.put(
        "/v2/users/1/password", json={"password": "Better-than-2"}
    ),
    ("POST", "/auth/update-password"): lambda s: s.admin.post(
        "/auth/update-password",
        json={"current_password": "Better-than-2", "new_password": "Better-than-3"},
    ),
}


#: Ways in and out, which change nobody's rights: a session is opened or ended.
SESSIONS = {("POST", "/auth/login"), ("POST", "/auth/logout"), ("POST", "/auth/saml/callback")}
#: Routes that an administrator may not use. The test sees to it that this is so.
NOT_FOR_USERS = {
    ("POST", "/v2/workers/register"): 401,
    ("PUT", "/v2/workers/{worker_id}/registration"): 403,
    ("PUT", "/v2/workers/{worker_id}/heartbeat"): 403,
    ("PUT", "/v2/workers/{worker_id}/status"): 403,
    ("PUT", "/v2/model-instances/{instance_id}/status"): 403,
    ("PUT", "/v2/model-files/{file_id}/status"): 403,
    ("POST", "/v2/workers/{worker_id}/model-files"): 403,
    ("POST", "/v2/watch/flush"): 403,
    ("POST", "/v2/usage"): 403,
}


async def test_every_route_with_which_users_change_something_leaves_an_entry(
    plane: Plane,
) -> None:
    routes = {one for one in walk(plane.app.routes) if one[0] not in SAFE_METHODS}
    known = {*CALLS, *SESSIONS, *NOT_FOR_USERS}
    assert routes == known, "a new route needs a call here that shows its entry in the audit log"
    stage = await _stage(plane)
    for (method, path), status in NOT_FOR_USERS.items():
        place = re.sub(r"\{\w+_id\}", "1", path)
        answer = await stage.admin.request(method, place, json={})
        assert answer.status_code == status, (method, path, answer.text)
    for route, call in CALLS.items():
        before = (await verified(plane))["last_id"]
        answer = await call(stage)
        assert answer.is_success, (route, answer.text)
        kept = [one for one in await entries(plane) if one["id"] > (before or 0)]
        assert kept, f"{route} left no entry"
        assert {one["username"] for one in kept} == {"admin"}, route
        assert "refused" not in {one["action"] for one in kept}, route
        if route == ("DELETE", "/v2/models"):
            assert {one["name"] for one in kept} == {"new", "applied"}
    assert (await verified(plane))["problem"] is None


async def _stage(plane: Plane) -> Stage:
    admin, agent = await plane.admin(), await plane.worker()
    await admin.post("/v2/models", json=MODEL | {"replicas": 1})

    async def placed() -> Any:
        items = (await admin.get("/v2/model-instances")).json()["items"]
        return next((one for one in items if one["worker_id"]), None)

    return Stage(admin, agent, (await eventually(placed, "an instance is placed"))["id"])


def test_every_table_says_whether_it_is_audited() -> None:
    mapped = {mapper.class_ for mapper in SQLModel._sa_registry.mappers}
    assert mapped == {*AUDITED, *NOT_AUDITED}


@pytest.mark.parametrize(
    ("table", "subject"),
    [*AUDITED.items(), (tables.Credential, JOIN_TOKEN)],
    ids=lambda one: one.kind if isinstance(one, Subject) else one.__name__,
)
def test_every_column_says_whether_it_is_shown(table: Any, subject: Subject) -> None:
    parts = [subject.columns, subject.omitted, frozenset(subject.secret)]
    assert set().union(*parts) == set(table.__table__.columns.keys())
    assert sum(map(len, parts)) == len(table.__table__.columns)
