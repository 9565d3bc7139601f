"""Rolling over the real API and database: what a worker says is said by the test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlmodel import select

from demo import tiny_gguf
from gpustack.config.load import load
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind
from gpustack.schemas.instances import AssignedInstance
from gpustack.server.app import control_plane
from gpustack.server.db import tables
from gpustack.server.db.migrate import migrate
from gpustack.server.db.versions import KEPT_VERSIONS
from gpustack.server.views import Audience, load_ids
from tests.server.conftest import (
    GATEWAY,
    JOIN,
    LOCAL_ADMIN,
    PASSWORD,
    FakeAgent,
    Plane,
)
from tests.support.wait import eventually

MIB = 1024**2
#: What one instance of MODEL claims: the process; its file is not on the server.
ONE = 48 * MIB
MODEL = {"name": "tiny", "source": "local_path", "local_path": "/models/tiny.gguf", "replicas": 2}


@contextlib.asynccontextmanager
async def working(
    *agents: FakeAgent, fails: Callable[[dict[str, Any]], bool] = lambda _: False
) -> AsyncIterator[list[int]]:
    """The agents run and end what they are told to, at once.

    Args:
        fails: whether an instance's engine cannot be started.

    Yields:
        How many instances answered, each time the agents looked.
    """
    over = asyncio.Event()
    ready: list[int] = []

    async def step(agent: FakeAgent) -> int:
        running = 0
        for one in (await agent.http.get("/v2/model-instances")).json()["items"]:
            running += one["state"] == "running"
            match one["state"]:
                case "stopping":
                    await agent.say(one["id"], "gone")
                case "scheduled":
                    await agent.say(one["id"], "starting")
                case "starting" if fails(one):
                    await agent.say(one["id"], "error", state_message="boom\nlast words")
                case "starting":
                    await agent.say(one["id"], "running", port=40000)
        return running

    async def work() -> None:
        while not over.is_set():
            ready.append(sum([await step(agent) for agent in agents]))
            await asyncio.sleep(0.005)

    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        yield ready
        over.set()


async def deploy(admin: httpx.AsyncClient, **more: Any) -> str:
    """Deploy MODEL; answers its path once all of it runs."""
    answer = await admin.post("/v2/models", json=MODEL | more)
    assert answer.status_code == 201, answer.text
    path = f"/v2/models/{answer.json()['id']}"
    await rolled(admin, path)
    return path


async def until(
    admin: httpx.AsyncClient, path: str, check: Callable[[dict[str, Any]], Any], what: str
) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    async def holds() -> bool:
        seen.clear()
        seen.update((await admin.get(path)).json())
        return bool(check(seen))

    try:
        await eventually(holds, what, within_s=30)
    except AssertionError as error:
        shown = {key: seen.get(key) for key in ("generation", "rollout", "ready_replicas")}
        raise AssertionError(f"{error}: {shown}\n{await instances(admin)}") from None
    return seen


async def rolled(admin: httpx.AsyncClient, path: str) -> dict[str, Any]:
    return await until(admin, path, lambda m: m["rollout"]["state"] == "done", "it is done")


async def paused(admin: httpx.AsyncClient, path: str, why: str) -> dict[str, Any]:
    return await until(admin, path, lambda m: why in m["rollout"]["message"], f"it says {why!r}")


async def instances(admin: httpx.AsyncClient) -> list[dict[str, Any]]:
    return list((await admin.get("/v2/model-instances")).json()["items"])


async def live(admin: httpx.AsyncClient) -> list[dict[str, Any]]:
    """Those that are not being stopped."""
    return [one for one in await instances(admin) if not one["deleting"]]


async def change(admin: httpx.AsyncClient, path: str, **changes: Any) -> dict[str, Any]:
    answer = await admin.patch(path, json=changes)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.fixture
async def admin(plane: Plane) -> httpx.AsyncClient:
    return await plane.admin()


async def test_with_room_for_one_more_every_instance_is_replaced_and_none_is_missed(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    agent = await plane.worker(memory_total_bytes=3 * ONE)
    async with working(agent) as ready:
        path = await deploy(admin)
        before = {one["id"] for one in await instances(admin)}
        ready.clear()
        await change(admin, path, env={"A": "1"})
        model = await rolled(admin, path)
        assert min(ready) >= 2
    assert model["rollout"]["versions"] == [{"generation": 2, "instances": 2, "ready": 2}]
    after = await live(admin)
    assert {one["model_generation"] for one in after} == {2}
    assert not before & {one["id"] for one in after}


async def test_without_room_they_are_replaced_in_place_one_by_one(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    agent = await plane.worker(memory_total_bytes=2 * ONE)
    async with working(agent) as ready:
        path = await deploy(admin)
        ready.clear()
        await change(admin, path, backend_parameters=["--threads=1"])
        model = await rolled(admin, path)
        assert min(ready) >= 1
    assert model["ready_replicas"] == 2
    assert {one["model_generation"] for one in await live(admin)} == {2}


async def test_what_does_not_fit_anywhere_stops_nothing_and_says_why(
    plane: Plane, admin: httpx.AsyncClient, tmp_path: Path
) -> None:
    file = tiny_gguf.write(tmp_path / "chat.gguf", context=256)
    agent = await plane.worker(memory_total_bytes=400 * MIB)
    async with working(agent) as ready:
        path = await deploy(admin, local_path=str(file))
        before = [one["id"] for one in await instances(admin)]
        ready.clear()
        await change(admin, path, backend_parameters=["--ctx-size=90000000"])
        model = await paused(admin, path, "no room")
        assert "needed" in model["rollout"]["message"]
        assert model["state_message"] == model["rollout"]["message"]
        assert model["rollout"]["state"] == "paused"
        assert [v["ready"] for v in model["rollout"]["versions"]] == [2, 0]
        back = await admin.post(f"{path}/rollback", json={})
        assert back.json()["rollout"]["generation"] == 3
        await rolled(admin, path)
        assert min(ready) == 2
    assert [one["id"] for one in await live(admin)] == before  # what says the same stays


async def test_the_first_failure_stops_the_roll_and_a_rollback_repairs(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    agent = await plane.worker()
    async with working(agent, fails=lambda one: one["model_generation"] == 2) as ready:
        path = await deploy(admin)
        before = {one["id"] for one in await instances(admin)}
        ready.clear()
        await change(admin, path, env={"A": "1"})
        model = await paused(admin, path, "failed: boom")
        assert "last words" not in model["rollout"]["message"]
        assert model["rollout"]["versions"] == [
            {"generation": 1, "instances": 2, "ready": 2},
            {"generation": 2, "instances": 1, "ready": 0},
        ]
        await admin.post(f"{path}/rollback", json={})
        model = await rolled(admin, path)
        assert min(ready) == 2
    assert (model["generation"], model["env"], model["rollout"]["message"]) == (3, {}, "")
    assert {one["id"] for one in await live(admin)} == before
    again = await admin.post(f"{path}/rollback", json={"to": 2})
    assert (again.json()["generation"], again.json()["env"]) == (4, {"A": "1"})


async def test_the_old_version_is_placed_again_when_the_new_one_does_not_fit_after_all(
    plane: Plane, admin: httpx.AsyncClient, tmp_path: Path
) -> None:
    file = tiny_gguf.write(tmp_path / "chat.gguf", context=256)
    small, large = ["--ctx-size=16"], ["--ctx-size=8192"]
    agent = await plane.worker(memory_total_bytes=1000 * MIB)
    async with working(agent):
        path = await deploy(admin, local_path=str(file), replicas=1, backend_parameters=small)
    (old,) = await instances(admin)
    await change(admin, path, replicas=0)
    need = old["claim"]["ram_bytes"]
    async with working(agent):
        await until(admin, path, lambda m: not m["rollout"]["versions"][0]["instances"], "none")
        await change(admin, path, replicas=1, backend_parameters=large)
        await rolled(admin, path)
        (new,) = await live(admin)
        need_large = new["claim"]["ram_bytes"]
        assert need_large > need
        await change(admin, path, backend_parameters=small)
        await rolled(admin, path)
    await agent.report(memory_total_bytes=need_large)
    await change(admin, path, backend_parameters=large)

    async def stopping() -> Any:
        return [one for one in await instances(admin) if one["state"] == "stopping"]

    ((old,),) = [await eventually(stopping, "the old one makes room")]
    await agent.report(memory_total_bytes=need_large - 1)  # the machine lost some
    await agent.say(old["id"], "gone")
    async with working(agent):
        await paused(admin, path, "needed")
        model = await until(admin, path, lambda m: m["ready_replicas"] == 1, "the old one serves")
        assert [v["ready"] for v in model["rollout"]["versions"]] == [1, 0]
        await agent.report(memory_total_bytes=2 * need_large)
        await rolled(admin, path)
    assert [one["model_generation"] for one in await live(admin)] == [model["generation"]]


@contextlib.asynccontextmanager
async def life(data_dir: Path) -> AsyncIterator[Plane]:
    """One life of a server, from its start to its end."""
    settings = load({"data_dir": str(data_dir), "bootstrap_password": PASSWORD}, {}).settings
    await asyncio.to_thread(migrate, settings.database_url.reveal())
    secrets = {"gateway_credential": GATEWAY, "local_admin": LOCAL_ADMIN, "join_token": JOIN}
    async with contextlib.AsyncExitStack() as stack:
        app = await stack.enter_async_context(control_plane(settings, secrets))
        yield Plane(app, data_dir, stack)


async def test_a_restarted_server_goes_on_with_a_roll(tmp_path: Path) -> None:
    async with life(tmp_path) as plane:
        admin, agent = await plane.admin(), await plane.worker(memory_total_bytes=2 * ONE)
        async with working(agent):
            path = await deploy(admin)
        await change(admin, path, env={"A": "1"})

        async def begun() -> bool:
            return any(one["state"] == "stopping" for one in await instances(admin))

        await eventually(begun, "the roll has begun")
    async with life(tmp_path) as plane:
        admin = await plane.admin()
        http = await plane.client(agent.registered["credential"])
        async with working(FakeAgent(agent.id, http, agent.registered)):
            await rolled(admin, path)
        assert {one["model_generation"] for one in await live(admin)} == {2}


async def test_a_version_that_comes_in_the_middle_of_a_roll_wins(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    agent = await plane.worker(memory_total_bytes=3 * ONE)
    async with working(agent) as ready:
        path = await deploy(admin)
        ready.clear()
        for number in range(4):
            await change(admin, path, env={"A": str(number)})
        await rolled(admin, path)
        assert min(ready) >= 2
    assert {one["model_generation"] for one in await live(admin)} == {5}


async def test_what_instances_are_not_started_from_replaces_none(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    agent = await plane.worker()
    async with working(agent):
        path = await deploy(admin)
        before = [one["id"] for one in await instances(admin)]
        await change(
            admin,
            path,
            description="d",
            worker_selector={"zone": "b"},
            placement_strategy="binpack",
            restart_on_error=False,
        )
        model = await rolled(admin, path)
    assert model["generation"] == 2
    assert model["rollout"]["generation"] == 1
    assert [one["id"] for one in await live(admin)] == before


async def test_a_crash_restarts_the_version_that_ran(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    agent = await plane.worker()
    async with working(agent, fails=lambda one: one["model_generation"] == 2):
        path = await deploy(admin, replicas=1)
        await change(admin, path, env={"A": "1"})
        await paused(admin, path, "failed")
    old, _ = await instances(admin)
    await agent.say(old["id"], "error", state_message="signal 9")
    await agent.say(old["id"], "starting", restart_count=1)
    async with plane.db.read() as session:
        (found,) = await load_ids(session, wire.INSTANCES, [old["id"]])
    assigned = found.view(Audience(CredentialKind.WORKER, agent.id))
    assert isinstance(assigned, AssignedInstance)
    assert (assigned.spec.env, assigned.deleting) == ({}, False)


async def test_one_model_at_a_time_is_rolled_on_a_worker(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    agent = await plane.worker(memory_total_bytes=4 * ONE)
    async with working(agent):
        first, second = [await deploy(admin, name=name) for name in ("first", "second")]
    for path in (first, second):
        await change(admin, path, env={"A": "1"})

    async def stopping() -> set[str]:
        return {one["model_name"] for one in await instances(admin) if one["state"] == "stopping"}

    (rolling,) = await eventually(stopping, "one is being rolled")
    other = {"first": second, "second": first}[rolling]
    await paused(admin, other, f"the roll of {rolling}")
    assert await stopping() == {rolling}


async def test_a_model_that_shrinks_gives_up_the_instance_that_is_placed_worst(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    one, two = await plane.worker("one"), await plane.worker("two")
    async with working(one, two):
        path = await deploy(admin, replicas=3)
        crowded = max((one.id, two.id), key=[i["worker_id"] for i in await instances(admin)].count)
        await change(admin, path, replicas=2)
        await rolled(admin, path)
        left = [i["worker_id"] for i in await live(admin)]
    assert sorted(left) == sorted((one.id, two.id)), f"{crowded} had two"


async def test_versions_are_kept_as_many_as_one_goes_back_to(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    created = await admin.post("/v2/models", json=MODEL | {"replicas": 0})
    path = f"/v2/models/{created.json()['id']}"
    for number in range(KEPT_VERSIONS + 5):
        await change(admin, path, env={"A": str(number)})
    listed = (await admin.get(f"{path}/versions")).json()
    assert listed["pagination"]["total"] == KEPT_VERSIONS
    newest = KEPT_VERSIONS + 6
    assert [one["generation"] for one in listed["items"]] == list(range(newest, 6, -1))
    assert [one["wanted"] for one in listed["items"]] == [True] + [False] * (KEPT_VERSIONS - 1)
    gone = await admin.post(f"{path}/rollback", json={"to": 3})
    assert (gone.status_code, gone.json()["code"]) == (404, "not_found")
    assert "no version of generation 3" in gone.json()["message"]


async def test_a_version_that_says_the_same_is_not_read_again(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    created = await admin.post("/v2/models", json=MODEL | {"replicas": 0})
    path = f"/v2/models/{created.json()['id']}"
    await until(admin, path, lambda m: m["profile"], "its files are read")
    await change(admin, path, env={"A": "1"})
    back = await admin.post(f"{path}/rollback", json={})
    assert back.json()["profile"]
    none = await admin.post(f"{path}/rollback", json={"to": 3})
    assert none.json()["generation"] == 3  # it is that already
    async with plane.db.read() as session:
        rows = (await session.exec(select(tables.ModelVersion))).all()
    assert sorted(row.generation for row in rows) == [1, 2, 3]
