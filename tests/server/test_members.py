"""Members: the parts of an instance that is on several workers."""

from typing import Any

import httpx
import pytest
from sqlalchemy.exc import IntegrityError
from sqlmodel import select

from gpustack.server.db import tables
from gpustack.server.db.database import get
from gpustack.server.db.workers import set_silent
from tests.server.conftest import FakeAgent, Plane
from tests.support.wait import eventually

MODEL = {"name": "tiny", "source": "local_path", "local_path": "/models/tiny.gguf"}
MIB = 1024**2


async def only_instance(http: httpx.AsyncClient) -> dict[str, Any]:
    async def placed() -> Any:
        found = (await http.get("/v2/model-instances")).json()["items"]
        return found[0] if found and found[0]["worker_id"] else None

    one: dict[str, Any] = await eventually(placed, "the instance is placed")
    return one


async def distributed(plane: Plane) -> tuple[dict[str, Any], FakeAgent, FakeAgent]:
    """An instance on two workers, as the scheduler will write it, and those two."""
    admin, first = await plane.admin(), await plane.worker("first")
    await admin.post("/v2/models", json=MODEL)
    instance = await only_instance(admin)
    second = await plane.worker("second", memory_total_bytes=100 * MIB)
    async with plane.db.write() as session:
        row = await session.get_one(tables.Instance, instance["id"])
        row.claim = None
        for rank, worker, ports in ((1, second, {"store": 40001}), (0, first, {})):
            session.add(
                tables.Member(
                    instance_id=instance["id"],
                    rank=rank,
                    worker_id=worker.id,
                    claim={"ram_bytes": 90 * MIB},
                    ports=ports,
                )
            )
    return instance, first, second


async def test_an_instance_shows_its_members_by_rank(plane: Plane) -> None:
    instance, first, second = await distributed(plane)
    admin = await plane.admin()
    await first.say(instance["id"], "starting")

    async def members() -> list[dict[str, Any]]:
        return list((await admin.get(f"/v2/model-instances/{instance['id']}")).json()["members"])

    one, two = await members()
    assert [(one["rank"], one["worker_name"]), (two["rank"], two["worker_name"])] == [
        (0, "first"),
        (1, "second"),
    ]
    assert (two["claim"]["ram_bytes"], two["ports"], two["state"]) == (
        90 * MIB,
        {"store": 40001},
        "scheduled",
    )
    async with plane.db.write() as session:
        await set_silent(session, await get(session, tables.Worker, second.id), silent=True)
    assert [one["state"] for one in await members()] == ["scheduled", "unreachable"]


async def test_an_instance_on_one_worker_has_no_members(plane: Plane) -> None:
    admin = await plane.admin()
    await plane.worker()
    await admin.post("/v2/models", json=MODEL)
    assert (await only_instance(admin))["members"] == []


async def test_a_rank_is_taken_once(plane: Plane) -> None:
    instance, first, _ = await distributed(plane)

    async def add() -> None:
        async with plane.db.write() as session:
            ours = {"instance_id": instance["id"], "worker_id": first.id}
            session.add(tables.Member(**ours, rank=1, claim={}))

    with pytest.raises(IntegrityError):
        await add()


async def test_what_a_member_claims_is_not_given_to_others(plane: Plane) -> None:
    _, first, second = await distributed(plane)
    admin = await plane.admin()
    await first.report(memory_total_bytes=100 * MIB)
    await admin.post("/v2/models", json=MODEL | {"name": "other"})

    async def reasons() -> list[tuple[str, str]]:
        found = (await admin.get("/v2/model-instances")).json()["items"]
        given: list[dict[str, str]] = next(
            (one["reasons"] for one in found if one["model_name"] == "other"), []
        )
        return [(one["code"], one["worker"]) for one in given if one["worker"]]

    expected = [("ram", "first"), ("ram", "second")]
    assert await eventually(reasons, "both workers are refused") == expected
    await second.report(memory_total_bytes=1000 * MIB)

    async def placed() -> bool:
        found = (await admin.get("/v2/model-instances")).json()["items"]
        return second.id in {one["worker_id"] for one in found}

    await eventually(placed, "there is room beside the member")


async def test_an_instance_ends_when_the_worker_of_a_part_of_it_is_removed(plane: Plane) -> None:
    instance, first, second = await distributed(plane)
    admin = await plane.admin()
    assert (await admin.delete(f"/v2/workers/{second.id}")).status_code == 204
    shown = (await admin.get(f"/v2/model-instances/{instance['id']}")).json()
    assert shown["state"] == "stopping"
    assert [member["rank"] for member in shown["members"]] == [0]
    assert (await first.say(instance["id"], "gone")).status_code == 204
    async with plane.db.read() as session:
        assert (await session.exec(select(tables.Member))).all() == []
