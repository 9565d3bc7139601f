"""Events: what happened, why, and by whom; once each, and within bounds."""

from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlmodel import select

from gpustack.schemas.events import EventType
from gpustack.server.controllers.workers import ALL, Patience, Workers
from gpustack.server.db import history, tables
from gpustack.server.db.transitions import Happening
from tests.server.conftest import JOIN, FakeAgent, Plane, registration
from tests.support.wait import eventually

MODEL = {"name": "tiny", "source": "local_path", "local_path": "/models/tiny.gguf"}
INSTANCES = "model-instances"
Seen = dict[str, Any]


async def events(plane: Plane, **query: Any) -> list[Seen]:
    """Oldest first."""
    answer = await (await plane.admin()).get("/v2/events", params=query)
    assert answer.status_code == 200, answer.text
    return list(reversed(answer.json()["items"]))


async def told(plane: Plane, kind: str, object_id: int) -> list[tuple[str, str]]:
    """What happened to an object, each with who did it."""
    answer = await (await plane.admin()).get(f"/v2/{kind}/{object_id}/events")
    found = reversed(answer.json()["items"])
    return [(one["type"], " ".join(one["by"].values()).strip()) for one in found]


async def placed(admin: httpx.AsyncClient) -> dict[str, Any]:
    async def check() -> Any:
        items = (await admin.get("/v2/model-instances")).json()["items"]
        return next((one for one in items if one["state"] == "scheduled"), None)

    found: dict[str, Any] = await eventually(check, "an instance is placed")
    return found


async def gone(admin: httpx.AsyncClient, path: str) -> None:
    async def check() -> bool:
        return (await admin.get(path)).status_code == 404

    await eventually(check, f"{path} is gone")


async def stopping(admin: httpx.AsyncClient, instance_id: int) -> None:
    async def check() -> bool:
        shown = await admin.get(f"/v2/model-instances/{instance_id}")
        return bool(shown.json()["state"] == "stopping")

    await eventually(check, "it is told to stop")


async def deployed(plane: Plane) -> tuple[httpx.AsyncClient, FakeAgent, int]:
    """Model `tiny`, its instance on worker `w1`."""
    admin, agent = await plane.admin(), await plane.worker()
    assert (await admin.post("/v2/models", json=MODEL)).status_code == 201
    return admin, agent, (await placed(admin))["id"]


async def test_a_life_is_told_from_its_beginning_to_its_end_with_who_did_what(
    plane: Plane,
) -> None:
    admin, agent, instance = await deployed(plane)
    for state in ("starting", "running"):
        await agent.say(instance, state)
    for state in ("error", "starting"):
        await agent.say(instance, state, state_message="", restart_count=int(state == "starting"))
    await admin.post(f"/v2/model-instances/{instance}/retry")
    await admin.put("/v2/models/1", json=MODEL | {"description": "x", "replicas": 1})
    await admin.delete("/v2/models/1")
    await stopping(admin, instance)
    await agent.say(instance, "gone")
    await gone(admin, "/v2/models/1")

    life = await told(plane, INSTANCES, instance)
    if ("unplaced", "controller placement") in life:  # its model's file was not read yet
        life.remove(("unplaced", "controller placement"))
    assert life == [
        ("created", "controller models"),
        ("placed", "controller placement"),
        ("starting", "worker w1"),
        ("running", "worker w1"),
        ("error", "worker w1"),
        ("restarted", "worker w1"),
        ("retried", "user admin"),
        ("stopping", "controller models"),
        ("gone", "worker w1"),
    ]
    of_model = await told(plane, "models", 1)
    if ("stalled", "controller models") in of_model:  # seen between the failure and the retry
        of_model.remove(("stalled", "controller models"))
    assert of_model == [
        ("created", "user admin"),
        ("profile_read", "controller profiles"),
        ("profile_problem", "controller profiles"),
        ("changed", "user admin"),
        ("deleting", "user admin"),
        ("gone", "controller models"),
    ]
    (changed,) = await events(plane, kind="models", type="changed")
    assert changed["message"] == "generation 2: description"
    (placing,) = await events(plane, type="placed")
    assert placing["message"] == "on worker w1, which has 48.0 MiB of memory for it"
    assert placing["name"].startswith("tiny-")
    (made,) = await events(plane, type="created", kind=INSTANCES)
    assert made["message"] == "the model wants 1 instance"
    (stopped,) = await events(plane, type="stopping")
    assert stopped["message"] == "its model is being deleted"


async def test_an_instance_that_is_stopped_says_why(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    assert (await admin.post("/v2/models", json=MODEL | {"replicas": 2})).status_code == 201

    async def run(count: int) -> Any:
        """Whether so many run; what is placed is started."""
        found = (await admin.get("/v2/model-instances")).json()["items"]
        for one in found:
            if one["state"] == "scheduled":
                await agent.say(one["id"], "starting")
                await agent.say(one["id"], "running")
            elif one["state"] == "stopping":
                await agent.say(one["id"], "gone")
        states = [one["state"] for one in found]
        return states == ["running"] * count and found

    async def why(count: int) -> str:
        async def said() -> Any:
            stopped = await events(plane, type="stopping")
            return len(stopped) == count and stopped[-1]["message"]

        return str(await eventually(said, "it is told to stop"))

    await eventually(lambda: run(2), "two run")
    await admin.put("/v2/models/1", json=MODEL | {"replicas": 1})
    assert await why(1) == "the model wants 1 instance"
    (left,) = await eventually(lambda: run(1), "one runs")
    assert (await admin.delete(f"/v2/model-instances/{left['id']}")).status_code == 202
    assert await why(2) == "this one copy was deleted"
    await eventually(lambda: run(1), "another runs")
    changed = MODEL | {"replicas": 1, "env": {"A": "1"}}
    assert (await admin.put("/v2/models/1", json=changed)).status_code == 200

    async def rolled() -> Any:
        await run(1)
        return len(await events(plane, type="stopping")) == 3

    await eventually(rolled, "the old one is stopped")
    assert await why(3) == "it is of another version than wanted"


async def test_a_worker_is_told_of_from_its_registration_to_its_deletion(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    again = registration(run_id="another", port=10151)
    assert (await agent.http.put(f"/v2/workers/{agent.id}/registration", json=again)).is_success
    await agent.report(memory_total_bytes=1)
    await admin.put(f"/v2/workers/{agent.id}", json={"labels": {"zone": "b"}})
    await admin.delete(f"/v2/workers/{agent.id}")
    assert await told(plane, "workers", agent.id) == [
        ("registered", "worker"),
        ("ready", "worker w1"),
        ("restarted", "worker w1"),
        ("changed", "worker w1"),
        ("changed", "worker w1"),
        ("changed", "user admin"),
        ("gone", "user admin"),
    ]
    said = [one["message"] for one in await events(plane, kind="workers", type="changed")]
    assert said == [
        "port",
        "what it has: memory_total_bytes",
        "labels from administrators none -> zone=b",
    ]


async def test_the_silence_of_a_worker_is_its_instances_as_well(plane: Plane) -> None:
    _, agent, instance = await deployed(plane)
    heartbeats = plane.app.state.heartbeats
    await Workers(plane.db, heartbeats, Patience(timedelta(0))).reconcile(ALL)
    await Workers(plane.db, heartbeats).reconcile(ALL)
    assert [kind for kind, _ in await told(plane, "workers", agent.id)][-2:] == [
        "unreachable",
        "ready",
    ]
    *_, silent, back = await events(plane, kind=INSTANCES, object_id=instance)
    assert (silent["type"], silent["message"]) == ("unreachable", "worker w1 is silent")
    assert (back["type"], back["message"]) == ("reachable", "worker w1 is heard of again")


async def test_an_instance_without_a_worker_says_why_in_words_and_in_codes(plane: Plane) -> None:
    admin = await plane.admin()
    for number in range(5):
        await plane.worker(f"small-{number}", memory_total_bytes=1024**2)
    await admin.post("/v2/models", json=MODEL)

    async def unplaced() -> Any:
        found = await events(plane, type="unplaced", name="tiny")
        return next((one for one in found if one["codes"] == ["ram"]), None)

    event = await eventually(unplaced, "it says why")
    assert event["kind"] == INSTANCES
    assert event["message"].startswith("small-0: ")
    assert event["message"].endswith("; and 2 more")
    # Other numbers for the same reason are no news.
    agent = await plane.worker("small-5", memory_total_bytes=1024**2 + 1)
    await agent.report(memory_total_bytes=1024**2 + 2)

    async def counted() -> Any:
        now = await unplaced()
        return now if now["message"].endswith("; and 3 more") else None

    now = await eventually(counted, "its last words are the newest")
    assert now["id"] == event["id"]
    assert now["count"] > event["count"]


async def test_a_failure_that_repeats_is_one_event_that_counts(plane: Plane) -> None:
    _, agent, instance = await deployed(plane)
    for number in range(4):
        message = f"the engine exited with code 1\nlast words, {number}"
        assert (await agent.say(instance, "starting", restart_count=number)).is_success
        assert (await agent.say(
            instance, "error", restart_count=number, state_message=message
        )).is_success  # fmt: skip
    killed = "the engine was ended by signal 9 (SIGKILL)"
    await agent.say(instance, "starting", restart_count=4)
    await agent.say(instance, "error", restart_count=4, state_message=killed)
    first, other = await events(plane, kind=INSTANCES, type="error")
    assert (first["count"], first["message"].splitlines()) == (
        4,
        ["the engine exited with code 1", "last words, 3"],
    )
    assert first["first_at"] < first["last_at"] < other["last_at"]
    assert (other["count"], other["message"]) == (1, killed)
    (restarts,) = await events(plane, kind=INSTANCES, type="restarted")
    assert (restarts["count"], restarts["message"]) == (4, "start 5")


async def test_what_fails_again_much_later_is_another_event(plane: Plane) -> None:
    _, agent, instance = await deployed(plane)
    await agent.say(instance, "error", state_message="no")
    async with plane.db.write() as session:
        (row,) = (
            await session.exec(select(tables.Event).where(tables.Event.type == "error"))
        ).all()
        row.last_at -= timedelta(hours=2)
    await agent.say(instance, "starting")
    await agent.say(instance, "error", state_message="no")
    assert [one["count"] for one in await events(plane, type="error")] == [1, 1]


async def test_what_users_do_is_never_the_same_as_before(plane: Plane) -> None:
    admin = await plane.admin()
    await admin.post("/v2/models", json=MODEL | {"replicas": 0})
    for description in ("a", "b"):
        await admin.put("/v2/models/1", json=MODEL | {"replicas": 0, "description": description})
    assert [one["count"] for one in await events(plane, type="changed")] == [1, 1]


async def test_progress_and_use_are_no_events(plane: Plane) -> None:
    _, agent, instance = await deployed(plane)
    await agent.say(instance, "downloading", download_progress=1)
    before = len(await events(plane))
    for percent in (2, 50, 100):
        await agent.say(instance, "downloading", download_progress=percent)
    await agent.report(cpu_percent=50.0)
    assert len(await events(plane)) == before


async def test_what_was_rolled_back_did_not_happen(plane: Plane) -> None:
    admin = await plane.admin()
    assert (await admin.post("/v2/models", json=MODEL | {"replicas": 0})).status_code == 201
    assert (await admin.post("/v2/models", json=MODEL | {"replicas": 0})).status_code == 409
    assert len(await events(plane, type="created")) == 1


async def test_pages_have_the_newest_first_and_filters_are_combined(plane: Plane) -> None:
    admin = await plane.admin()
    for name in ("a", "b", "c"):
        await admin.post("/v2/models", json=MODEL | {"name": name, "replicas": 0})

    async def page(number: int) -> Any:
        query: dict[str, Any] = {"type": "created", "kind": "models"}
        query |= {"page": number, "perPage": 2}
        return (await admin.get("/v2/events", params=query)).json()

    first, second = await page(1), await page(2)
    assert [one["name"] for one in first["items"] + second["items"]] == ["c", "b", "a"]
    assert second["pagination"] == {"page": 2, "perPage": 2, "total": 3, "totalPage": 2}
    assert len(await events(plane, type="created", object_id=2)) == 1
    assert await events(plane, type="created", object_id=2, kind="workers") == []


async def test_a_models_name_means_its_instances_as_well_and_nobody_elses(plane: Plane) -> None:
    await deployed(plane)
    admin = await plane.admin()
    for other in ("tiny-b", "tin", "tiny-much-longer"):
        await admin.post("/v2/models", json=MODEL | {"name": other, "replicas": 0})
    found = {one["name"] for one in await events(plane, name="tiny")}
    assert {name[:5] for name in found} == {"tiny", "tiny-"}
    assert not found & {"tiny-b", "tin", "tiny-much-longer"}
    assert await events(plane, name="100%") == []


@pytest.mark.parametrize("path", ["/v2/events", "/v2/models/1/events"])
async def test_events_are_for_administrators(plane: Plane, path: str) -> None:
    agent = await plane.worker()
    assert (await agent.http.get(path)).status_code == 403
    assert (await (await plane.client()).get(path)).status_code == 401


async def test_nobody_can_ask_for_what_does_not_exist(plane: Plane) -> None:
    admin = await plane.admin()
    for path in ("/v2/events?type=nothing", "/v2/events?kind=users", "/v2/users/1/events"):
        assert (await admin.get(path)).status_code == 422, path
    assert (await admin.get("/v2/models/99/events")).json()["items"] == []


async def test_events_are_bounded_by_age_and_by_count(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = await plane.admin()
    for number in range(10):
        await admin.post("/v2/models", json=MODEL | {"name": f"m{number}", "replicas": 0})
    await history.prune(plane.db)
    kept = await events(plane, type="created")
    assert len(kept) == 10
    async with plane.db.write() as session:
        old = [await session.get_one(tables.Event, one["id"]) for one in kept[:3]]
        for row in old:
            row.last_at -= history.EVENTS_KEPT_FOR
    await history.prune(plane.db)
    assert [one["name"] for one in await events(plane, type="created")] == [
        f"m{number}" for number in range(3, 10)
    ]
    newest = (await events(plane))[-4:]
    monkeypatch.setattr(history, "KEPT_EVENTS", 4)
    await history.prune(plane.db)
    assert await events(plane) == newest


async def test_a_worker_that_registers_anew_says_so(plane: Plane) -> None:
    agent = await plane.worker()
    joiner = await plane.client(JOIN)
    assert (await joiner.post("/v2/workers/register", json=registration("w1"))).is_success
    *_, last = await events(plane, kind="workers", object_id=agent.id)
    assert (last["type"], last["message"]) == ("registered", "again, at 127.0.0.1:10150")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("port 40001 is taken", "port 40002 is taken", True),
        ("exited with code 1", "exited with code 2", False),
        ("was ended by signal 9 (SIGKILL)", "was ended by signal 6 (SIGABRT)", False),
        ("it failed (3 times alike)\nhere", "it failed (4 times alike)\nthere", True),
        ("no file", "no room", False),
    ],
)
def test_numbers_and_last_words_do_not_make_another_failure(
    one: str, other: str, same: bool
) -> None:
    def of(message: str) -> str:
        return Happening("k", 1, "n", EventType.ERROR, message).alike()

    assert (of(one) == of(other)) is same
    assert of(one) != Happening("k", 2, "n", EventType.ERROR, one).alike()
