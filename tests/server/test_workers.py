"""What administrators and heartbeats say of workers."""

import asyncio
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gpustack.server.db import tables
from gpustack.server.db.database import current_revision
from gpustack.server.heartbeats import Heartbeats
from gpustack.worker.certificate import OwnCertificate
from tests.server.conftest import JOIN, Plane, registration
from tests.support.wait import eventually

MODEL = {"name": "tiny", "source": "local_path", "local_path": "/models/tiny.gguf"}


async def announce(plane: Plane, name: str, **labels: str) -> int:
    joiner = await plane.client(JOIN)
    body = registration(name, labels=labels)
    answer = await joiner.post("/v2/workers/register", json=body)
    return int(answer.json()["worker_id"])


async def test_labels_are_the_workers_and_the_administrators_together_and_theirs_win(
    plane: Plane,
) -> None:
    admin, worker = await plane.admin(), await announce(plane, "w", zone="a", disk="fast")
    path = f"/v2/workers/{worker}"
    given = {"zone": "b", "team": "x"}
    shown = (await admin.put(path, json={"labels": given})).json()
    assert shown["labels"] == {"zone": "b", "disk": "fast", "team": "x"}
    assert (shown["admin_labels"], shown["generation"]) == (given, 2)
    assert await announce(plane, "w", zone="c", disk="slow") == worker  # it is back
    shown = (await admin.get(path)).json()
    assert shown["labels"] == {"zone": "b", "disk": "slow", "team": "x"}
    shown = (await admin.put(path, json={"labels": {}})).json()
    assert shown["labels"] == {"zone": "c", "disk": "slow"}


async def test_a_certificate_is_shown_and_goes_only_for_another(
    plane: Plane, tmp_path: Path
) -> None:
    """Who leaves it out could else have all that goes to the worker sent in clear."""
    admin, joiner = await plane.admin(), await plane.client(JOIN)
    first, second = (OwnCertificate(tmp_path / name, "w").pem for name in "ab")
    body = registration("w")
    agent = (await joiner.post("/v2/workers/register", json=body)).json()
    worker = await plane.client(agent["credential"])
    path = f"/v2/workers/{agent['worker_id']}"
    for given, shown in (("", ""), (first, first), ("", first), (second, second), ("", second)):
        told = body if given == "" else body | {"certificate": given}
        assert (await worker.put(f"{path}/registration", json=told)).status_code == 200
        assert (await admin.get(path)).json()["certificate"] == shown
    again = await joiner.post("/v2/workers/register", json=body)  # nor for its lack
    assert (again.status_code, (await admin.get(path)).json()["certificate"]) == (200, second)
    worker = await plane.client(again.json()["credential"])
    for nonsense in ("nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        told = body | {"certificate": nonsense}
        refused = await worker.put(f"{path}/registration", json=told)
        assert refused.status_code == 422
        assert "certificate: want one certificate as PEM" in refused.json()["message"]


async def test_a_model_is_placed_where_an_administrators_label_allows_it(plane: Plane) -> None:
    admin = await plane.admin()
    await plane.worker("one")
    other = await plane.worker("other")
    await admin.post("/v2/models", json=MODEL | {"worker_selector": {"team": "x"}})

    async def states() -> list[Any]:
        found = (await admin.get("/v2/model-instances")).json()["items"]
        return [
            (one["state"], one["worker_id"])
            for one in found
            if one["worker_id"] or "labels" in str(one["reasons"])
        ]

    assert await eventually(states, "no worker has the label") == [("pending", None)]
    await admin.put(f"/v2/workers/{other.id}", json={"labels": {"team": "x"}})

    async def placed() -> bool:
        return await states() == [("scheduled", other.id)]

    await eventually(placed, "the label is seen at once")


async def test_of_two_edits_of_one_generation_the_second_is_a_conflict(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    path = f"/v2/workers/{agent.id}"
    assert (await admin.put(path, json={"labels": {"a": "1"}, "generation": 1})).status_code == 200
    lost = await admin.put(path, json={"labels": {"b": "1"}, "generation": 1})
    assert lost.status_code == 409
    assert lost.json()["detail"]["current"]["admin_labels"] == {"a": "1"}
    same = await admin.put(path, json={"labels": {"a": "1"}})
    assert same.json()["generation"] == 2  # nothing changed, so nothing moved


async def test_an_edit_may_name_its_generation_in_a_header(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    path = f"/v2/workers/{agent.id}"
    read = await admin.get(path)
    assert read.headers["etag"] == '"1"'
    body, seen = {"labels": {"a": "1"}}, {"If-Match": read.headers["etag"]}
    assert (await admin.put(path, json=body, headers=seen)).headers["etag"] == '"2"'
    lost = await admin.put(path, json={"labels": {}}, headers=seen)
    assert (lost.status_code, lost.json()["message"]) == (
        409, "worker w1 is at generation 2, not 1",
    )  # fmt: skip
    assert lost.json()["detail"]["current"]["generation"] == 2


async def test_of_many_edits_at_once_of_one_generation_one_wins(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    path = f"/v2/workers/{agent.id}"
    edits = [{"labels": {"a": str(number)}, "generation": 1} for number in range(10)]
    answers = await asyncio.gather(*(admin.put(path, json=edit) for edit in edits))
    won = [answer.json() for answer in answers if answer.status_code == 200]
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 9
    shown = (await admin.get(path)).json()
    assert (shown["admin_labels"], shown["generation"]) == (won[0]["admin_labels"], 2)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"labels": {"": "x"}},
        {"labels": {"a=b": "x"}},
        {"labels": {"a": 1}},
        {"labels": {"a": "x" * 254}},
        {"labels": {str(number): "" for number in range(101)}},
        {"labels": {}, "name": "other"},
    ],
)
async def test_what_is_no_label_is_refused_with_its_place(
    plane: Plane, body: dict[str, Any]
) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    answer = await admin.put(f"/v2/workers/{agent.id}", json=body)
    assert answer.status_code == 422
    assert "labels" in answer.json()["message"] or "name" in answer.json()["message"]
    assert (await admin.get(f"/v2/workers/{agent.id}")).json()["generation"] == 1


async def test_only_administrators_label_workers(plane: Plane) -> None:
    agent = await plane.worker()
    answer = await agent.http.put(f"/v2/workers/{agent.id}", json={"labels": {}})
    assert answer.status_code == 403


async def test_heartbeats_are_written_in_one_statement_and_are_no_change(plane: Plane) -> None:
    agent = await plane.worker()
    heartbeats: Heartbeats = plane.app.state.heartbeats
    before = await state_of(plane, agent.id)
    beat = {"machine_id": "machine-w1", "boot_id": "boot", "run_id": "run"}
    path = f"/v2/workers/{agent.id}/heartbeat"
    assert (await agent.http.put(path, json=beat)).status_code == 200
    await heartbeats.write(plane.db)
    after = await state_of(plane, agent.id)
    assert after[0] != before[0]
    assert after[1] == before[1]


async def state_of(plane: Plane, worker_id: int) -> tuple[datetime | None, int]:
    """When the database last heard of it, and the newest revision of anything."""
    async with plane.db.read() as session:
        row = await session.get_one(tables.Worker, worker_id)
        return row.heartbeat_at, await current_revision(session)
