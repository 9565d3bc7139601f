"""Model files: what workers have of models' files, and what they are asked to have."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from gpustack.schemas import wire
from gpustack.server.db import tables
from gpustack.server.views import ADMIN
from tests.server.conftest import FakeAgent, Plane

FILES = "/v2/model-files"
REMOTE = {"source": "huggingface", "huggingface_repo_id": "org/m", "huggingface_filename": "m.gguf"}
LOCAL = {"source": "local_path", "local_path": "/models/m.gguf"}


async def listed(http: httpx.AsyncClient, **asked: Any) -> list[dict[str, Any]]:
    answer = await http.get(FILES, params=asked)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["items"])


async def ids(http: httpx.AsyncClient, **asked: Any) -> list[int]:
    return [one["id"] for one in await listed(http, **asked)]


async def asked_for(admin: httpx.AsyncClient, agent: FakeAgent, **source: Any) -> dict[str, Any]:
    answer = await admin.post(FILES, json={"worker_id": agent.id} | (source or REMOTE))
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def reported(agent: FakeAgent, state: str, **more: Any) -> dict[str, Any]:
    body = REMOTE | {"state": state} | more
    answer = await agent.http.post(f"/v2/workers/{agent.id}/model-files", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def say(agent: FakeAgent, file_id: int, state: str, **more: Any) -> httpx.Response:
    return await agent.http.put(f"{FILES}/{file_id}/status", json={"state": state} | more)


async def deployed(plane: Plane, admin: httpx.AsyncClient, worker_id: int, **source: Any) -> None:
    """An instance of a model with this source, placed without asking any Hub."""
    body = {"name": "m", "replicas": 0} | source
    assert (await admin.post("/v2/models", json=body)).status_code == 201
    async with plane.db.write() as session:
        session.add(tables.Instance(name="m-abcde", model_id=1, version_id=1, worker_id=worker_id))


async def test_what_a_worker_fetches_unasked_gets_a_row_once(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    first = await reported(agent, "downloading", download_progress=12.5)
    assert (first["state"], first["download_progress"]) == ("downloading", 12.5)
    again = await reported(agent, "ready", size=7, resolved_paths=["/cache/m.gguf"])
    assert again["id"] == first["id"]
    (shown,) = await listed(admin)
    assert (shown["worker_id"], shown["state"], shown["size"]) == (agent.id, "ready", 7)
    assert shown["resolved_paths"] == ["/cache/m.gguf"]
    assert {name: shown[name] for name in REMOTE} == REMOTE
    assert (await admin.get(f"{FILES}/{first['id']}")).json() == shown


async def test_what_an_administrator_asks_for_is_under_way_until_the_worker_says(
    plane: Plane,
) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    row = await asked_for(admin, agent)
    assert (row["state"], row["generation"], row["observed_generation"]) == ("downloading", 1, 0)
    assert (await say(agent, row["id"], "error", state_message="no such file")).status_code == 204
    (shown,) = await listed(admin, state="error")
    assert shown["state_message"] == "no such file"
    again = await admin.post(f"{FILES}/{row['id']}/reset")
    assert (again.status_code, again.json()["state"]) == (202, "downloading")
    assert await ids(admin, state="downloading") == [row["id"]]
    await say(agent, row["id"], "ready", observed_generation=2)
    assert await ids(admin, state="ready") == [row["id"]]


async def test_a_worker_is_asked_for_a_source_once(plane: Plane) -> None:
    admin, agent, other = await plane.admin(), await plane.worker(), await plane.worker("w2")
    row = await asked_for(admin, agent)
    answer = await admin.post(FILES, json={"worker_id": agent.id, **REMOTE, "local_path": "/x"})
    assert answer.status_code == 409
    assert "has org/m:m.gguf as model file 1 already" in answer.json()["message"]
    assert answer.json()["detail"]["current"]["id"] == row["id"]
    await asked_for(admin, other)
    await asked_for(admin, agent, **REMOTE | {"huggingface_filename": "n.gguf"})
    assert (await admin.post(FILES, json={"worker_id": 99, **REMOTE})).status_code == 404


async def test_files_are_filtered_searched_sorted_and_paged(plane: Plane) -> None:
    admin, agent, other = await plane.admin(), await plane.worker(), await plane.worker("w2")
    for worker, source in ((agent, REMOTE), (other, REMOTE), (other, LOCAL)):
        await asked_for(admin, worker, **source)
    await say(other, 3, "ready", size=5)
    assert await ids(admin) == [1, 2, 3]
    assert await ids(admin, worker_id=other.id) == [2, 3]
    assert await ids(admin, source="local_path") == [3]
    assert await ids(admin, state=["ready", "error"]) == [3]
    assert await ids(admin, search="ORG/M") == [1, 2]
    assert await ids(admin, search="models/m") == [3]
    assert await ids(admin, huggingface_filename="m.gguf", sort_by="-worker_id") == [2, 1]
    assert await ids(admin, perPage=2, page=2) == [3]


async def test_a_worker_sees_its_own_and_a_gateway_none(plane: Plane) -> None:
    admin, agent, other = await plane.admin(), await plane.worker(), await plane.worker("w2")
    await asked_for(admin, agent)
    await asked_for(admin, other)
    assert await ids(agent.http) == [1]
    gateway = await plane.gateway()
    for asked in ({}, {"watch": "true"}):
        assert (await gateway.get(FILES, params=asked)).status_code == 403
    assert (await gateway.get("/v2/watch", params={"kinds": "model-files"})).status_code == 403
    assert (await agent.http.get(f"{FILES}/1")).status_code == 403
    assert (await agent.http.post(FILES, json={"worker_id": 1, **REMOTE})).status_code == 403


async def test_a_worker_speaks_for_its_own_files_only(plane: Plane) -> None:
    admin, agent, other = await plane.admin(), await plane.worker(), await plane.worker("w2")
    row = await asked_for(admin, agent)
    assert (await say(other, row["id"], "ready")).status_code == 403
    place = f"/v2/workers/{agent.id}/model-files"
    assert (await other.http.post(place, json=REMOTE | {"state": "ready"})).status_code == 403
    assert (await say(agent, row["id"], "gone")).status_code == 409
    assert (await say(agent, 99, "ready")).status_code == 404
    answer = await agent.http.post(place, json=LOCAL | {"state": "gone"})
    assert (answer.status_code, await ids(admin)) == (400, [1])


async def test_a_deleted_row_is_gone_and_watchers_hear_of_all_of_it(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    kinds = frozenset({wire.MODEL_FILES})
    async with asyncio.timeout(10), aclosing(plane.feed.watch(kinds, ADMIN)) as lines:
        assert json.loads(await anext(lines))["type"] == "synced"
        row = await asked_for(admin, agent)
        put = json.loads(await anext(lines))
        assert (put["kind"], put["id"]) == (wire.MODEL_FILES, row["id"])
        assert put["data"]["state"] == "downloading"
        await say(agent, row["id"], "ready")
        assert json.loads(await anext(lines))["data"]["state"] == "ready"
        assert (await admin.delete(f"{FILES}/{row['id']}")).status_code == 204
        gone = json.loads(await anext(lines))
        assert (gone["type"], gone["id"]) == ("delete", row["id"])


async def test_cleaning_up_waits_for_the_worker(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await reported(agent, "ready")
    assert (await admin.delete(f"{FILES}/1", params={"cleanup": "true"})).status_code == 202
    (shown,) = await listed(agent.http)
    assert (shown["deleting"], shown["generation"]) == (True, 2)
    assert (await admin.post(f"{FILES}/1/reset")).status_code == 409
    assert (await say(agent, 1, "gone", observed_generation=2)).status_code == 204
    assert await ids(admin) == []


async def test_a_worker_that_is_away_keeps_nobody_from_forgetting_a_file(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await reported(agent, "ready")
    await admin.delete(f"{FILES}/1", params={"cleanup": "true"})
    assert (await admin.delete(f"{FILES}/1")).status_code == 204
    assert (await say(agent, 1, "gone")).status_code == 404


async def test_what_a_user_put_there_is_never_cleaned_up(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    row = await asked_for(admin, agent, **LOCAL)
    answer = await admin.delete(f"{FILES}/{row['id']}", params={"cleanup": "true"})
    assert answer.status_code == 400
    assert "/models/m.gguf was not put there by gpustack" in answer.json()["message"]
    assert [one["deleting"] for one in await listed(admin)] == [False]


@pytest.mark.parametrize(
    ("filename", "is_used"), [("m.gguf", True), ("m*.gguf", True), ("other.gguf", False)]
)
async def test_a_file_that_an_instance_there_uses_is_not_cleaned_up(
    plane: Plane, filename: str, is_used: bool
) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await reported(agent, "ready")
    await deployed(plane, admin, agent.id, **REMOTE | {"huggingface_filename": filename})
    answer = await admin.delete(f"{FILES}/1", params={"cleanup": "true"})
    assert answer.status_code == (409 if is_used else 202)
    if is_used:
        assert "is used by m-abcde" in answer.json()["message"]
        assert (await admin.delete(f"{FILES}/1")).status_code == 204


async def test_files_go_with_their_worker(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await reported(agent, "ready")
    assert (await admin.delete(f"/v2/workers/{agent.id}")).status_code == 204
    assert await ids(admin) == []


async def test_what_happened_to_a_file_is_told(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    row = await asked_for(admin, agent)
    await say(agent, row["id"], "downloading", download_progress=3.0)
    await say(agent, row["id"], "downloading", download_progress=60.0)
    await say(agent, row["id"], "error", state_message="no space left")
    await admin.post(f"{FILES}/{row['id']}/reset")
    await say(agent, row["id"], "ready", observed_generation=2)
    await admin.delete(f"{FILES}/{row['id']}")
    answer = await admin.get(f"{FILES}/{row['id']}/events", params={"sort_by": "first_at"})
    told = [(one["type"], one["message"]) for one in answer.json()["items"]]
    assert told == [
        ("created", "on worker w1"), ("downloading", ""), ("error", "no space left"),
        ("retried", ""), ("ready", ""), ("gone", "from worker w1"),
    ]  # fmt: skip
    assert {one["name"] for one in answer.json()["items"]} == {"org/m:m.gguf"}
