"""Workers are cordoned, drained and opened again, over the real API and database.

What the plan decides has tests of its own (test_models_leaving); here it meets the world.
"""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlmodel import col, select

from gpustack.schemas import wire
from gpustack.server.db import tables
from gpustack.server.db.database import get
from gpustack.server.db.workers import set_silent
from tests.server.conftest import JOIN, FakeAgent, Plane, Start, registration
from tests.server.test_leases import on_shared
from tests.server.test_members import distributed
from tests.server.test_models_roll import (
    MODEL,
    ONE,
    change,
    deploy,
    instances,
    live,
    rolled,
    working,
)
from tests.support.wait import eventually


@pytest.fixture
async def admin(plane: Plane) -> httpx.AsyncClient:
    return await plane.admin()


async def schedule(
    admin: httpx.AsyncClient, agent: FakeAgent, how: str, **body: Any
) -> dict[str, Any]:
    json = None if how == "uncordon" else body
    answer = await admin.post(f"/v2/workers/{agent.id}/{how}", json=json)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def leaving(admin: httpx.AsyncClient, agent: FakeAgent) -> list[dict[str, Any]]:
    return list((await admin.get(f"/v2/workers/{agent.id}")).json()["leaving"])


async def drained(admin: httpx.AsyncClient, agent: FakeAgent) -> None:
    async def is_empty() -> bool:
        return not await leaving(admin, agent)

    try:
        await eventually(is_empty, "nothing is left", within_s=30)
    except AssertionError as error:
        raise AssertionError(f"{error}: {await leaving(admin, agent)}") from None


async def stuck(admin: httpx.AsyncClient, agent: FakeAgent, why: str) -> list[dict[str, Any]]:
    """What is left once all of it waits for that."""

    async def waits() -> list[dict[str, Any]]:
        left = await leaving(admin, agent)
        return left if left and all(one["waits"] and why in one["message"] for one in left) else []

    try:
        return await eventually(waits, f"all that is left waits: {why}", within_s=30)
    except AssertionError as error:
        raise AssertionError(f"{error}: {await leaving(admin, agent)}") from None


async def from_now_on(ready: list[int]) -> None:
    """Forget what was counted, and the count that is under way, which began before."""
    ready.clear()

    async def counted() -> bool:
        return bool(ready)

    await eventually(counted, "the agents have looked", within_s=30)
    ready.clear()


async def places(admin: httpx.AsyncClient) -> Counter[int | None]:
    """Worker -> instances on it that are not being stopped."""
    return Counter(one["worker_id"] for one in await live(admin))


# --- cordon ----------------------------------------------------------------------------------


async def test_a_cordoned_worker_keeps_what_it_has_takes_nothing_and_is_the_reason(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    agent = await plane.worker("rack/1")
    async with working(agent):
        path = await deploy(admin, replicas=1)
        worker = await schedule(admin, agent, "cordon", reason="disk swap")
        assert (worker["scheduling"], worker["scheduling_reason"]) == ("cordoned", "disk swap")
        await change(admin, path, replicas=2)

        async def refused() -> list[str]:
            return [one["message"] for i in await instances(admin) for one in i["reasons"]]

        assert await eventually(refused, "one waits") == ["rack/1 is cordoned: disk swap"]
        assert (await places(admin))[agent.id] == 1
    joiner = await plane.client(JOIN)  # the worker registers anew
    again = await joiner.post("/v2/workers/register", json=registration("rack/1"))
    shown = (await admin.get(f"/v2/workers/{again.json()['worker_id']}")).json()
    assert (shown["scheduling"], shown["scheduling_reason"]) == ("cordoned", "disk swap")
    agent.http = await plane.client(again.json()["credential"])
    async with working(agent):
        await schedule(admin, agent, "uncordon")
        await rolled(admin, path)


async def test_the_same_again_changes_nothing_and_what_is_not_said_stays(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    agent = await plane.worker()

    async def said(how: str, **body: Any) -> tuple[str, str, int]:
        worker = await schedule(admin, agent, how, **body)
        return worker["scheduling"], worker["scheduling_reason"], worker["generation"]

    for _ in range(2):
        assert await said("cordon", reason="disk swap") == ("cordoned", "disk swap", 2)
    for _ in range(2):
        assert await said("drain") == ("draining", "disk swap", 3)
    assert await said("drain", reason="") == ("draining", "", 4)
    for _ in range(2):
        assert await said("uncordon") == ("active", "", 5)
    found = await admin.get("/v2/workers", params={"scheduling": "draining"})
    assert found.json()["items"] == []
    path = f"/v2/workers/{agent.id}"
    lost = await admin.post(f"{path}/drain", json={"generation": 4})
    assert (lost.status_code, lost.json()["detail"]["current"]["generation"]) == (409, 5)
    for how, body in (("drain", {}), ("cordon", {}), ("uncordon", None)):
        lost = await admin.post(f"{path}/{how}", json=body, headers={"If-Match": '"1"'})
        assert lost.status_code == 409
    for reason in ("two\nlines", "x" * 301):
        assert (await admin.post(f"{path}/drain", json={"reason": reason})).status_code == 422
    events = (await admin.get(f"{path}/events")).json()["items"]  # the newest first
    assert [(one["type"], one["message"]) for one in events[:4]] == [
        ("uncordoned", ""),
        ("draining", ""),
        ("draining", "disk swap"),
        ("cordoned", "disk swap"),
    ]


@on_shared
async def test_nothing_is_placed_on_a_worker_once_its_cordon_is_acknowledged(
    start: Start, tmp_path: Path
) -> None:
    leader, other = await start(tmp_path / "a"), await start(tmp_path / "b")
    admin, agent = await leader.admin(), await leader.worker()
    made = await admin.post("/v2/models", json=MODEL | {"replicas": 0})
    async with other.db.write() as session:
        row = await get(session, tables.Worker, agent.id)
        row.scheduling = "cordoned"
        await change(admin, f"/v2/models/{made.json()['id']}", replicas=1)
        await asyncio.sleep(1)  # it is being placed where the worker's row still says active

    async def decided() -> Any:
        (one,) = await instances(admin)
        return one if one["worker_id"] or "is cordoned" in str(one["reasons"]) else None

    assert (await eventually(decided, "it has a place, or none"))["state"] == "pending"


# --- drain -----------------------------------------------------------------------------------


async def test_a_drain_moves_all_models_and_none_is_missed_for_a_moment(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    one, two = await plane.worker("one"), await plane.worker("two")
    async with working(one, two) as ready:
        paths = [await deploy(admin, name=name, replicas=2) for name in ("a", "b")]
        assert (await places(admin))[one.id] == 2
        await from_now_on(ready)
        worker = await schedule(admin, one, "drain", reason="new driver")
        assert len(worker["leaving"]) == 2
        await drained(admin, one)
        for path in paths:
            await rolled(admin, path)
        assert min(ready) >= 4
        assert await places(admin) == {two.id: 4}
        await schedule(admin, one, "uncordon")
    assert await places(admin) == {two.id: 4}


@pytest.mark.slow  # a model looks for room every 10 s
async def test_what_fits_nowhere_else_stays_says_why_and_moves_when_it_fits(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    one = await plane.worker("one")
    async with working(one) as ready:
        await deploy(admin, replicas=2)
        two = await plane.worker("two", memory_total_bytes=ONE)
        async with working(two):
            await from_now_on(ready)
            await schedule(admin, one, "drain")
            (left,) = await stuck(admin, one, "no room elsewhere")
            assert "two: 0.0 MiB of memory free" in left["message"]
            assert "one is being drained" in left["message"]
            model = (await admin.get("/v2/models")).json()["items"][0]
            assert (model["ready_replicas"], model["state_message"]) == (2, left["message"])
            await two.report(memory_total_bytes=2 * ONE)
            await drained(admin, one)
    assert await places(admin) == {two.id: 2}


@pytest.mark.slow
async def test_a_drain_of_all_workers_moves_nobody(plane: Plane, admin: httpx.AsyncClient) -> None:
    one, two = await plane.worker("one"), await plane.worker("two")
    async with working(one, two) as ready:
        path = await deploy(admin, replicas=2)
        before = {i["id"] for i in await instances(admin)}
        await from_now_on(ready)
        await schedule(admin, two, "cordon")
        for agent in (one, two):
            await schedule(admin, agent, "drain")
        for agent in (one, two):
            (left,) = await stuck(admin, agent, "no room elsewhere")
            assert "one is being drained; two is being drained" in left["message"]
        assert {i["id"] for i in await instances(admin)} == before
        await schedule(admin, two, "uncordon")
        await drained(admin, one)
        await rolled(admin, path)
        assert min(ready) >= 2
    assert await places(admin) == {two.id: 2}


@pytest.mark.slow
async def test_two_workers_are_drained_at_once(plane: Plane, admin: httpx.AsyncClient) -> None:
    agents = [await plane.worker(name) for name in ("one", "two", "three")]
    async with working(*agents) as ready:
        await deploy(admin, replicas=3)
        await from_now_on(ready)
        for agent in agents[:2]:
            await schedule(admin, agent, "drain")
        for agent in agents[:2]:
            await drained(admin, agent)
        assert min(ready) >= 3
    assert await places(admin) == {agents[2].id: 3}


@pytest.mark.slow
async def test_a_drain_that_ends_in_the_middle_removes_what_is_not_needed(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    one = await plane.worker("one")
    async with working(one):
        path = await deploy(admin, replicas=2)
        before = {i["id"] for i in await instances(admin)}
        two = await plane.worker("two")
        await schedule(admin, one, "drain")

        async def successor() -> bool:  # which does not answer: nobody acts for its worker
            return (await places(admin))[two.id] == 1

        await eventually(successor, "one is being moved")
        (new,) = [i["name"] for i in await live(admin) if i["worker_id"] == two.id]
        left = await leaving(admin, one)
        assert [(i["waits"], i["message"]) for i in left] == [
            (False, f"{new} is to take its place")
        ] * 2
        await schedule(admin, one, "uncordon")
        async with working(two):
            await rolled(admin, path)
    assert {i["id"] for i in await live(admin)} == before


@pytest.mark.slow
async def test_a_roll_and_a_drain_go_together(plane: Plane, admin: httpx.AsyncClient) -> None:
    one, two = await plane.worker("one"), await plane.worker("two", memory_total_bytes=5 * ONE)
    async with working(one, two) as ready:
        path = await deploy(admin, replicas=4)
        await from_now_on(ready)
        await change(admin, path, env={"A": "1"})
        await schedule(admin, one, "drain")
        await drained(admin, one)
        model = await rolled(admin, path)
        assert min(ready) >= 4
    assert model["rollout"]["versions"] == [{"generation": 2, "instances": 4, "ready": 4}]
    assert await places(admin) == {two.id: 4}


@pytest.mark.slow
async def test_a_model_that_shrinks_or_goes_leaves_the_drained_worker_first(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    one, two = await plane.worker("one"), await plane.worker("two", memory_total_bytes=2 * ONE)
    async with working(one, two):
        path = await deploy(admin, replicas=4)
        assert await places(admin) == {one.id: 2, two.id: 2}
        await schedule(admin, one, "drain")
        await stuck(admin, one, "no room")
        await change(admin, path, replicas=3)
        await rolled(admin, path)
        assert await places(admin) == {one.id: 1, two.id: 2}
        await admin.delete(path)
        await drained(admin, one)


@pytest.mark.slow
async def test_what_was_on_a_worker_that_falls_silent_is_made_elsewhere_all_the_same(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    one, two = await plane.worker("one"), await plane.worker("two")
    async with working(two):
        async with working(one):
            path = await deploy(admin, replicas=2)
        plane.app.state.heartbeats._heard.pop(one.id)  # as if it were long ago
        async with plane.db.write() as session:
            row = await get(session, tables.Worker, one.id)
            row.heartbeat_at = None
            await set_silent(session, row, silent=True)
        await schedule(admin, one, "drain")
        await stuck(admin, one, "its worker is silent")
        await rolled(admin, path)
        assert await places(admin) == {two.id: 2}
        plane.app.state.heartbeats.heard(one.id)
        async with working(one):
            await drained(admin, one)


async def test_what_is_lost_itself_is_said_to_take_nobodys_place(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    one, two = await plane.worker("one"), await plane.worker("two")
    async with working(one, two):
        path = await deploy(admin, replicas=2)
    assert await places(admin) == {one.id: 1, two.id: 1}
    async with plane.db.write() as session:
        on_two = select(tables.Instance).where(tables.Instance.worker_id == two.id)
        (await session.exec(on_two)).one().reported_state = "starting"
        await session.flush()
        for agent in (one, two):
            plane.app.state.heartbeats._heard.pop(agent.id)
            row = await get(session, tables.Worker, agent.id)
            row.heartbeat_at = None
            await set_silent(session, row, silent=True, lost=True)
    async with working(await plane.worker("three")):
        await rolled(admin, path)
    await schedule(admin, one, "drain")
    await stuck(admin, one, "its worker is silent")


async def test_an_instance_with_a_part_on_the_worker_is_moved_as_a_whole(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    instance, first, second = await distributed(plane)
    async with working(first):
        await schedule(admin, second, "drain")
        (left,) = await eventually(lambda: leaving(admin, second), "it is to leave")
        assert left["id"] == instance["id"]
        await drained(admin, second)
        (moved,) = await live(admin)
    assert (moved["worker_id"], moved["members"]) == (first.id, [])
    assert moved["id"] != instance["id"]


@pytest.mark.slow
async def test_watchers_of_a_worker_see_its_drain_to_the_end(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    one, two = await plane.worker("one"), await plane.worker("two")
    async with working(one, two):
        await deploy(admin, replicas=2)
        (old,) = [i["id"] for i in await instances(admin) if i["worker_id"] == one.id]
        await schedule(admin, one, "drain")
        await drained(admin, one)
    gone = select(tables.Change.revision).where(
        tables.Change.kind == wire.INSTANCES, tables.Change.object_id == old
    )
    async with plane.db.read() as session:
        worker = await session.get_one(tables.Worker, one.id)
        assert worker.revision >= max((await session.exec(gone)).all())


async def test_watchers_of_a_worker_see_what_is_given_up_once_it_is_lost(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    one = await plane.worker("one")
    async with working(one):
        path = await deploy(admin, replicas=1)
    await schedule(admin, one, "drain")
    plane.app.state.heartbeats._heard.pop(one.id)
    async with plane.db.write() as session:
        row = await get(session, tables.Worker, one.id)
        row.heartbeat_at = None
        await set_silent(session, row, silent=True)
    await admin.delete(path)
    await stuck(admin, one, "it is to end, but its worker is silent")
    async with plane.db.write() as session:
        row = await get(session, tables.Worker, one.id)
        await set_silent(session, row, silent=True, lost=True)
    await drained(admin, one)
    gone = select(tables.Change.revision).where(
        tables.Change.kind == wire.INSTANCES, col(tables.Change.deleted)
    )
    async with plane.db.read() as session:
        worker = await session.get_one(tables.Worker, one.id)
        assert worker.revision >= max((await session.exec(gone)).all())
