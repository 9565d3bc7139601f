"""Placing many at once: others write meanwhile, and none is forgotten."""

import pytest
from sqlmodel import col, select

from gpustack.server.controllers import placement
from gpustack.server.controllers.placement import ALL, Placements
from gpustack.server.controllers.world import World
from gpustack.server.db import tables
from tests.server.conftest import Plane
from tests.server.test_feed import MODEL
from tests.support.wait import eventually


async def unplaced(plane: Plane) -> int:
    async with plane.db.read() as session:
        rows = select(tables.Instance).where(col(tables.Instance.worker_id).is_(None))
        return len((await session.exec(rows)).all())


async def test_a_run_that_takes_too_long_is_followed_by_one_that_goes_on(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also past those that fit nowhere: else they would keep the others waiting for ever."""
    admin = await plane.admin()
    selector = {"worker_selector": {"zone": "none"}}
    await admin.post("/v2/models", json=MODEL | {"name": "stuck", "replicas": 4} | selector)
    await admin.post("/v2/models", json=MODEL | {"name": "fits", "replicas": 4})

    async def made() -> bool:
        return await unplaced(plane) == 8

    await eventually(made, "all instances wait for a worker")
    monkeypatch.setattr(placement, "RUN_S", 0.0)
    await plane.worker()

    async def placed() -> bool:
        return await unplaced(plane) == 4

    await eventually(placed, "those that fit are placed, one in each run")
    placements = Placements(plane.db, World())
    answers = [await placements.reconcile(ALL) for _ in range(4)]
    assert answers == [0.0, 0.0, 0.0, placement.AGAIN_S]
    assert await placements.reconcile(ALL) == 0.0  # and all over again


async def test_what_was_parsed_is_as_the_database_has_it(plane: Plane) -> None:
    world = World()
    agent = await plane.worker("w1")
    other = await plane.worker("w2")
    admin = await plane.admin()
    model = (await admin.post("/v2/models", json=MODEL | {"name": "m", "replicas": 2})).json()

    async def placed() -> bool:
        return await unplaced(plane) == 0

    async def seen() -> None:
        async with plane.db.read() as session:
            assert await world.read(session) == await World().read(session)

    await eventually(placed, "both are placed")
    await seen()
    await agent.report(memory_total_bytes=2**33)
    await seen()
    await admin.put(f"/v2/workers/{other.id}", json={"labels": {"a": "b"}})
    await admin.put(f"/v2/models/{model['id']}", json=MODEL | {"name": "m", "replicas": 1})
    await seen()
    await admin.delete(f"/v2/workers/{other.id}")
    await seen()
    async with plane.db.read() as session:
        snapshot, _ = await world.read(session)
    (node,) = snapshot.nodes
    assert node.worker.status is not None
    assert node.worker.status.memory_total_bytes == 2**33
