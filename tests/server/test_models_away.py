"""Workers that fall silent, and what becomes of what is on them, over the real API and database."""

import asyncio
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from sqlmodel import col, select, update

from gpustack.config.load import hot_json, load
from gpustack.schemas import instances as schemas
from gpustack.schemas import model_files, wire, workers
from gpustack.schemas.credentials import CredentialKind
from gpustack.server import app
from gpustack.server.controllers.workers import ALL, SOON_S, Patience, Workers
from gpustack.server.db import tables
from gpustack.server.db.database import get
from gpustack.server.db.workers import set_silent
from gpustack.server.heartbeats import Heartbeats
from gpustack.server.views import Audience, load_ids
from tests.server.conftest import FakeAgent, Plane, Start, registration
from tests.server.test_leases import on_shared
from tests.support.wait import eventually

MODEL = {"name": "tiny", "source": "local_path", "local_path": "/models/tiny.gguf"}
MIB = 1024**2
LONG_AGO = datetime(2026, 1, 2, 12, 3, tzinfo=UTC)
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"

Item = dict[str, Any]


@pytest.fixture
async def admin(plane: Plane) -> httpx.AsyncClient:
    return await plane.admin()


async def away(plane: Plane, agent: FakeAgent, *, lost: bool = True) -> None:
    """The worker has been silent since LONG_AGO. The plane's own controllers leave it at that."""
    plane.app.state.heartbeats._heard.pop(agent.id)
    async with plane.db.write() as session:
        its = update(tables.Worker).where(col(tables.Worker.id) == agent.id)
        await session.exec(its.values(heartbeat_at=LONG_AGO))
        worker = await get(session, tables.Worker, agent.id)
        end = None if lost else datetime.now(UTC) + timedelta(minutes=5)
        await set_silent(session, worker, silent=True, lost=lost, grace_ends_at=end)


async def listed(admin: httpx.AsyncClient) -> list[Item]:
    return list((await admin.get("/v2/model-instances")).json()["items"])


async def shown(admin: httpx.AsyncClient, id: int) -> Item:
    return dict((await admin.get(f"/v2/model-instances/{id}")).json())


async def until(admin: httpx.AsyncClient, id: int, state: str) -> Item:
    async def reached() -> Any:
        one = await shown(admin, id)
        return one.get("state") == state and one

    found: Item = await eventually(reached, f"instance {id} is {state}")
    return found


async def only(admin: httpx.AsyncClient, but: int = 0) -> Item:
    """The one instance beside `but` that is placed."""

    async def placed() -> Any:
        found = [one for one in await listed(admin) if one["id"] != but]
        return len(found) == 1 and found[0]["worker_id"] and found[0]

    one: Item = await eventually(placed, "one is placed")
    return one


async def running(plane: Plane, admin: httpx.AsyncClient) -> tuple[Item, FakeAgent]:
    """An instance that runs, and its worker."""
    agent = await plane.worker("one")
    assert (await admin.post("/v2/models", json=MODEL)).status_code == 201
    instance = await only(admin)
    for state in ("starting", "running"):
        assert (await agent.say(instance["id"], state)).status_code == 204
    return instance, agent


async def replaced(
    plane: Plane, admin: httpx.AsyncClient
) -> tuple[Item, FakeAgent, Item, FakeAgent]:
    """One that is lost with its worker, and the one in its place with its own."""
    old, agent = await running(plane, admin)
    other = await plane.worker("other")
    await away(plane, agent)
    new = await only(admin, but=old["id"])
    return old, agent, new, other


async def test_before_the_grace_period_is_over_nothing_is_replaced_and_it_says_when(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    old, agent = await running(plane, admin)
    await plane.worker("other")
    await away(plane, agent, lost=False)
    (one,) = await listed(admin)
    assert (one["id"], one["state"], one["replaced_by"]) == (old["id"], "unreachable", None)
    # When that is, the plane's own controller reckons anew.
    assert re.fullmatch(
        "one is silent since 2026-01-02 12:03:00 UTC; another instance takes this one's place at "
        f"{TIME}, unless it is heard of before",
        one["state_message"],
    )
    worker = (await admin.get(f"/v2/workers/{agent.id}")).json()
    assert worker["state_message"].startswith("silent since 2026-01-02 12:03:00 UTC; what is on")
    await agent.http.put(f"/v2/workers/{agent.id}/registration", json=registration("one"))
    assert (await shown(admin, old["id"]))["state"] == "running"
    assert len(await listed(admin)) == 1


async def test_afterwards_another_takes_its_place_elsewhere_and_both_say_so(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    old, _, new, other = await replaced(plane, admin)
    assert new["worker_id"] == other.id
    one = await shown(admin, old["id"])
    assert (one["state"], one["replaced_by"]) == ("unreachable", new["id"])
    assert one["state_message"] == (
        f"one is silent since 2026-01-02 12:03:00 UTC; replaced by {new['name']}; this instance "
        f"stays if it still runs when one returns, and {new['name']} does not run by then"
    )
    events = (await admin.get("/v2/events", params={"object_id": new["id"]})).json()["items"]
    why = f"it takes the place of {old['name']}, which is out of reach"
    assert why in [event["message"] for event in events]
    await other.say(new["id"], "starting")
    await other.say(new["id"], "running")
    model = (await admin.get(f"/v2/models/{old['model_id']}")).json()
    assert (model["rollout"]["state"], model["ready_replicas"]) == ("done", 1)


async def test_one_that_runs_on_its_return_stays_while_its_successor_does_not_run(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    old, agent, new, other = await replaced(plane, admin)
    await other.say(new["id"], "starting")
    assert (await agent.say(old["id"], "running")).status_code == 204
    await until(admin, new["id"], "stopping")
    assert (await shown(admin, old["id"]))["state"] == "running"
    assert (await admin.get(f"/v2/workers/{agent.id}")).json()["state"] == "ready"
    await other.say(new["id"], "gone")

    async def rest() -> bool:
        return [(o["id"], o["replaced_by"]) for o in await listed(admin)] == [(old["id"], None)]

    await eventually(rest, "the old one is the only one")


async def test_one_whose_successor_runs_goes_and_may_finish_its_streams(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    old, agent, new, other = await replaced(plane, admin)
    for state in ("starting", "running"):
        await other.say(new["id"], state)
    await agent.say(old["id"], "running")
    await until(admin, old["id"], "stopping")
    async with plane.db.read() as session:
        (found,) = await load_ids(session, wire.INSTANCES, [old["id"]])
    assigned = found.view(Audience(CredentialKind.WORKER, agent.id))
    assert isinstance(assigned, schemas.AssignedInstance)
    assert assigned.drain
    await agent.say(old["id"], "gone")
    assert [(o["id"], o["state"]) for o in await listed(admin)] == [(new["id"], "running")]


@pytest.mark.parametrize("how", ["registration", "heartbeat", "status"])
async def test_what_a_worker_had_before_its_silence_counts_for_nothing_until_it_says_so_again(
    plane: Plane, admin: httpx.AsyncClient, how: str
) -> None:
    """Its engines may have ended meanwhile."""
    old, agent, new, other = await replaced(plane, admin)
    await other.say(new["id"], "starting")
    body = registration("one")
    path = f"/v2/workers/{agent.id}/{how}"
    match how:
        case "heartbeat":
            body = {key: body[key] for key in ("machine_id", "boot_id", "run_id")}
            await agent.http.put(path, json=body)
        case "status":
            await agent.report()
        case _:
            await agent.http.put(path, json=body)
    await Workers(plane.db, plane.app.state.heartbeats).reconcile(ALL)
    assert (await admin.get(f"/v2/workers/{agent.id}")).json()["state"] == "ready"
    one = await shown(admin, old["id"])
    assert (one["state"], one["replaced_by"]) == ("unreachable", new["id"])
    assert "has not said yet how this instance is" in one["state_message"]
    await agent.say(old["id"], "starting", restart_count=1)
    await until(admin, old["id"], "stopping")
    assert (await shown(admin, new["id"]))["state"] == "starting"


async def test_a_deleted_instance_of_a_lost_worker_is_given_up_with_its_model(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    old, agent = await running(plane, admin)
    await away(plane, agent, lost=False)
    path = f"/v2/models/{old['model_id']}"
    await admin.delete(path)
    one = await until(admin, old["id"], "stopping")
    assert re.search(
        f"; the end of this instance is waited for until {TIME}$", one["state_message"]
    )
    assert one["claim"]  # held, for it may be running
    await away_for_good(plane, agent)

    async def gone() -> bool:
        return (await admin.get(path)).status_code == 404

    await eventually(gone, "the model is gone")
    assert await listed(admin) == []
    answer = await agent.say(old["id"], "running")  # so the agent ends it
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def away_for_good(plane: Plane, agent: FakeAgent) -> None:
    async with plane.db.write() as session:
        worker = await get(session, tables.Worker, agent.id)
        await set_silent(session, worker, silent=True, lost=True)


async def test_what_is_made_beside_a_lost_one_of_a_drained_worker_is_not_made_for_the_drain(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    old, agent, new, other = await replaced(plane, admin)
    for state in ("starting", "running"):
        await other.say(new["id"], state)
    await admin.post(f"/v2/workers/{agent.id}/drain", json={})
    await admin.patch(f"/v2/models/{old['model_id']}", json={"replicas": 2})

    async def third() -> list[int]:
        return [o["id"] for o in await listed(admin) if o["id"] not in {old["id"], new["id"]}]

    (more,) = await eventually(third, "there is one more")
    events = (await admin.get("/v2/events", params={"object_id": more})).json()["items"]
    (why,) = [e["message"] for e in events if e["object_id"] == more and e["type"] == "created"]
    assert why == "the model wants 2 instances"


async def test_with_its_worker_a_replaced_one_goes_and_its_successor_stays(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    _, agent, new, _ = await replaced(plane, admin)
    await admin.delete(f"/v2/workers/{agent.id}")
    model = (await admin.get(f"/v2/models/{new['model_id']}")).json()
    assert [one["id"] for one in await listed(admin)] == [new["id"]]
    assert model["rollout"]["versions"][0]["instances"] == 1


async def test_an_instance_is_replaced_when_any_worker_of_it_is_lost(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    old, first = await running(plane, admin)
    second, third = await plane.worker("second"), await plane.worker("third")
    async with plane.db.write() as session:
        for rank, on in enumerate((first, second)):
            part = {"instance_id": old["id"], "rank": rank, "worker_id": on.id}
            session.add(tables.Member(**part, claim={"ram_bytes": 90 * MIB}))
        await session.flush()
    await away(plane, second)
    new = await only(admin, but=old["id"])
    assert new["worker_id"] in {first.id, third.id}
    one = await shown(admin, old["id"])
    assert (one["state"], one["replaced_by"]) == ("unreachable", new["id"])
    assert one["state_message"].startswith("second is silent since")
    await first.say(old["id"], "running")  # it may answer without that part: then it is kept
    assert (await shown(admin, old["id"]))["replaced_by"] == new["id"]
    await first.say(old["id"], "error", state_message="a part is missing")
    await until(admin, old["id"], "stopping")


@on_shared
async def test_nothing_is_placed_on_a_worker_while_it_is_marked_as_lost(
    start: Start, tmp_path: Path
) -> None:
    """It would not be lost, nor ever answer."""
    leader, other = await start(tmp_path / "a"), await start(tmp_path / "b")
    admin, agent = await leader.admin(), await leader.worker()
    made = await admin.post("/v2/models", json=MODEL | {"replicas": 0})
    leader.app.state.heartbeats._heard.pop(agent.id)
    async with other.db.write() as session:
        row = await get(session, tables.Worker, agent.id)
        row.heartbeat_at = LONG_AGO
        await set_silent(session, row, silent=True, lost=True)
        await session.flush()
        await admin.patch(f"/v2/models/{made.json()['id']}", json={"replicas": 1})
        await asyncio.sleep(1)  # it is being placed where the worker is in reach yet

    async def decided() -> Any:
        (one,) = await listed(admin)
        return one if one["worker_id"] or "silent" in str(one["reasons"]) else None

    assert (await eventually(decided, "it has a place, or none"))["state"] == "pending"


# --- whose clock it is -----------------------------------------------------------------------


async def look(
    plane: Plane,
    worker_id: int,
    *,
    led_for: timedelta,
    silent_for: timedelta | None = None,
    quiet_for: timedelta = timedelta(hours=1),
    grace: timedelta = timedelta(minutes=5),
) -> tables.Worker:
    """The worker as a server leaves it that looks once.

    Args:
        led_for: it has led for so long.
        silent_for: it has seen the worker silent for so long; None: it looks for the first time.
        quiet_for: since the last heartbeat by the database's clock.
    """
    async with plane.db.write() as session:
        its = update(tables.Worker).where(col(tables.Worker.id) == worker_id)
        await session.exec(its.values(heartbeat_at=datetime.now(UTC) - quiet_for))
    controller = Workers(plane.db, Heartbeats(), Patience(timedelta(seconds=60), grace))
    controller._began -= led_for.total_seconds()
    if silent_for is not None:
        controller._silent_from[worker_id] = monotonic() - silent_for.total_seconds()
    again_s = await controller.reconcile(ALL)
    assert again_s is not None
    assert again_s > 0
    async with plane.db.read() as session:
        query = select(tables.Worker).where(tables.Worker.id == worker_id)
        return (await session.exec(query)).one()


async def test_grace_counts_as_silence_does_and_not_while_no_server_looked(plane: Plane) -> None:
    agent = await plane.worker()
    plane.app.state.heartbeats._heard.clear()
    minutes = [timedelta(minutes=number) for number in range(7)]
    silent = await look(plane, agent.id, led_for=minutes[6], silent_for=minutes[2])
    assert (silent.silent, silent.lost) == (True, False)
    assert silent.grace_ends_at is not None
    left = silent.grace_ends_at.replace(tzinfo=UTC) - datetime.now(UTC)
    assert minutes[2] < left <= minutes[3]
    anew = await look(plane, agent.id, led_for=minutes[0])  # another server leads
    assert (anew.silent, anew.lost) == (True, False)
    # The database's clock is set forward: that is no silence.
    assert not (await look(plane, agent.id, led_for=minutes[6])).lost
    lost = await look(plane, agent.id, led_for=minutes[6], silent_for=minutes[5])
    assert (lost.lost, lost.grace_ends_at) == (True, None)
    assert (await look(plane, agent.id, led_for=minutes[0])).lost  # it has said nothing since
    back = await look(plane, agent.id, led_for=minutes[6], quiet_for=minutes[0])
    assert (back.silent, back.lost) == (False, False)


async def test_a_database_whose_clock_was_set_back_hides_no_silence(plane: Plane) -> None:
    agent = await plane.worker()
    plane.app.state.heartbeats._heard.clear()
    controller = Workers(plane.db, Heartbeats(), Patience(timedelta(seconds=0.5)))
    controller._began -= 60
    ahead = datetime.now(UTC) + timedelta(hours=1)

    async def says() -> None:  # to another server
        async with plane.db.write() as session:
            its = update(tables.Worker).where(col(tables.Worker.id) == agent.id)
            await session.exec(its.values(heartbeat_at=ahead))

    async def is_silent() -> bool:
        again_s = await controller.reconcile(ALL)
        assert again_s is not None
        assert again_s < 10
        async with plane.db.read() as session:
            return (await session.get_one(tables.Worker, agent.id)).silent

    await says()
    assert not await is_silent()
    await eventually(is_silent, "it is silent")
    ahead += timedelta(seconds=1)
    await says()
    assert not await is_silent()


async def test_what_is_heard_while_the_silent_are_looked_for_counts(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await plane.worker()
    mark = Workers._mark

    async def marked(self: Workers, *args: Any) -> bool:  # it speaks to another server right then
        async with plane.db.write() as session:
            its = update(tables.Worker).where(col(tables.Worker.id) == agent.id)
            await session.exec(its.values(heartbeat_at=LONG_AGO))
        return await mark(self, *args)

    plane.app.state.heartbeats._heard.clear()
    controller = Workers(plane.db, Heartbeats(), Patience(timedelta(0), timedelta(0)))
    controller._began -= 60
    monkeypatch.setattr(Workers, "_mark", marked)
    assert await controller.reconcile(ALL) == SOON_S
    async with plane.db.read() as session:
        worker = await session.get_one(tables.Worker, agent.id)
    assert (worker.silent, worker.lost) == (False, False)


async def test_the_end_of_the_grace_period_is_written_once_and_again_when_the_option_changes(
    plane: Plane,
) -> None:
    agent = await plane.worker()
    plane.app.state.heartbeats._heard.clear()
    led = timedelta(minutes=2)
    first = await look(plane, agent.id, led_for=led, silent_for=led)
    same = await look(plane, agent.id, led_for=led, silent_for=led)
    assert (same.grace_ends_at, same.revision) == (first.grace_ends_at, first.revision)
    longer = await look(plane, agent.id, led_for=led, silent_for=led, grace=timedelta(minutes=9))
    assert longer.grace_ends_at is not None
    assert first.grace_ends_at is not None
    assert timedelta(minutes=3) < longer.grace_ends_at - first.grace_ends_at < timedelta(minutes=5)
    shorter = timedelta(minutes=1)
    assert (await look(plane, agent.id, led_for=led, silent_for=led, grace=shorter)).lost


async def test_a_running_server_takes_another_grace_period_in(plane: Plane) -> None:
    told = {"data_dir": str(plane.data_dir), "unreachable_grace": "90s"}
    app._take_in(plane.app, hot_json(load(told, {}).settings))
    assert plane.app.state.patience.grace == timedelta(seconds=90)


@pytest.mark.parametrize(
    "said",
    [
        workers.Heartbeat,
        workers.Registration,
        workers.WorkerReport,
        schemas.InstanceStatus,
        model_files.ModelFileReport,
        model_files.ModelFileStatus,
    ],
)
def test_no_worker_says_what_time_it_is(said: type[BaseModel]) -> None:
    """So none of their clocks can decide anything."""
    assert "date-time" not in str(said.model_json_schema())
    named = [name for name in said.model_fields if name.endswith(("_at", "time", "date"))]
    assert named == []


async def test_a_time_that_a_worker_adds_is_refused(plane: Plane) -> None:
    agent = await plane.worker()
    beat = {key: registration()[key] for key in ("machine_id", "boot_id", "run_id")}
    path = f"/v2/workers/{agent.id}/heartbeat"
    wrong = await agent.http.put(path, json=beat | {"heartbeat_at": "1970-01-01T00:00:00Z"})
    assert (wrong.status_code, "heartbeat_at: unknown field" in wrong.text) == (422, True)
    old = {"Date": "Thu, 01 Jan 1970 00:00:00 GMT"}
    assert (await agent.http.put(path, json=beat, headers=old)).status_code == 200
    assert plane.app.state.heartbeats.is_live(agent.id)
