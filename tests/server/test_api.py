"""The API as its clients see it."""

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlmodel import select

from gpustack.schemas import wire
from gpustack.server.controllers.workers import ALL, SILENT_AGAIN_S, Patience, Workers
from gpustack.server.db import tables
from gpustack.server.heartbeats import Heartbeats
from gpustack.server.views import ADMIN
from tests.server.conftest import JOIN, PASSWORD, Plane, Start, registration
from tests.support.wait import eventually

MODEL = {"name": "tiny", "source": "local_path", "local_path": "/models/tiny.gguf"}


async def instances(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    answer = await http.get("/v2/model-instances")
    return list(answer.json()["items"])


async def placed(plane: Plane, http: httpx.AsyncClient, count: int = 1) -> list[dict[str, Any]]:
    async def check() -> list[dict[str, Any]]:
        found = [one for one in await instances(http) if one["state"] == "scheduled"]
        return found if len(found) == count else []

    return list(await eventually(check, "instances are placed"))


async def test_a_deployed_model_gets_its_instances_placed_and_named_after_it(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    answer = await admin.post("/v2/models", json=MODEL | {"replicas": 2})
    assert answer.status_code == 201, answer.text
    both = await placed(plane, admin, 2)
    assert all(one["name"].startswith("tiny-") and len(one["name"]) == 10 for one in both)
    assert {one["worker_id"] for one in both} == {agent.id}
    assert all(one["claim"]["ram_bytes"] > 0 for one in both)
    assert all("secret" not in one for one in both)


async def test_a_pending_instance_says_why_for_each_worker(plane: Plane) -> None:
    admin = await plane.admin()
    await plane.worker("small", memory_total_bytes=1024**2)
    await admin.post("/v2/models", json=MODEL)

    async def reasons() -> Any:
        found = [one["reasons"] for one in await instances(admin) if one["reasons"]]
        return found if "profile" not in str(found) else []  # its file has been read

    ((reason,),) = await eventually(reasons, "the instance has reasons")
    assert (reason["code"], reason["worker"]) == ("ram", "small")
    assert reason["needed_bytes"] > reason["available_bytes"]
    await plane.worker("large")
    await placed(plane, admin)


async def test_running_instances_are_counted_and_deleting_the_model_frees_everything(
    plane: Plane,
) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    model = (await admin.post("/v2/models", json=MODEL)).json()
    (one,) = await placed(plane, admin)
    assert (await agent.say(one["id"], "starting")).status_code == 204
    assert (await agent.say(one["id"], "running", port=40000, pid=7)).status_code == 204

    assert (await admin.get(f"/v2/models/{model['id']}")).json()["ready_replicas"] == 1
    assert (await admin.delete(f"/v2/models/{model['id']}")).status_code == 202

    async def stopping() -> bool:
        return [one["state"] for one in await instances(admin)] == ["stopping"]

    await eventually(stopping, "the instance is told to stop")
    again = await admin.post("/v2/models", json=MODEL)
    assert again.status_code == 409  # the name is held until the engine is gone
    assert (await agent.say(one["id"], "gone")).status_code == 204

    async def gone() -> bool:
        return (await admin.get(f"/v2/models/{model['id']}")).status_code == 404

    await eventually(gone, "the model goes with its last instance")
    assert (await admin.post("/v2/models", json=MODEL)).status_code == 201


@pytest.mark.parametrize("last", ["error", "starting", None])
async def test_a_model_goes_with_its_last_instance_whatever_that_was_doing(
    plane: Plane, last: str | None
) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    model = (await admin.post("/v2/models", json=MODEL)).json()
    (one,) = await placed(plane, admin)
    if last:
        assert (await agent.say(one["id"], last)).status_code == 204
    await admin.delete(f"/v2/models/{model['id']}")

    async def gone() -> bool:
        await agent.say(one["id"], "gone")
        return (await admin.get(f"/v2/models/{model['id']}")).status_code == 404

    await eventually(gone, "the model is gone")


async def test_a_removed_worker_takes_its_instances_along_and_they_are_made_anew(
    plane: Plane,
) -> None:
    admin, agent = await plane.admin(), await plane.worker("one")
    await admin.post("/v2/models", json=MODEL)
    (old,) = await placed(plane, admin)
    other = await plane.worker("other")
    assert (await admin.delete(f"/v2/workers/{agent.id}")).status_code == 204
    (new,) = await placed(plane, admin)
    assert (new["id"] != old["id"], new["worker_id"]) == (True, other.id)
    assert (await agent.http.get("/v2/model-instances")).status_code == 401


async def test_scaling_down_removes_first_what_does_not_run(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    model = (await admin.post("/v2/models", json=MODEL | {"replicas": 2})).json()
    first, second = await placed(plane, admin, 2)
    await agent.say(second["id"], "starting")
    await agent.say(second["id"], "running")
    await admin.put(f"/v2/models/{model['id']}", json=MODEL | {"replicas": 1})

    async def states() -> bool:
        found = {one["id"]: one["state"] for one in await instances(admin)}
        return found == {first["id"]: "stopping", second["id"]: "running"}

    await eventually(states, "the one that does not run is stopped")


async def test_an_update_of_an_old_generation_is_a_conflict_that_shows_the_current(
    plane: Plane,
) -> None:
    admin = await plane.admin()
    model = (await admin.post("/v2/models", json=MODEL)).json()
    path = f"/v2/models/{model['id']}"
    changed = await admin.put(path, json=MODEL | {"description": "a", "generation": 1})
    assert changed.json()["generation"] == 2
    lost = await admin.put(path, json=MODEL | {"description": "b", "generation": 1})
    assert lost.status_code == 409
    assert lost.json()["detail"]["current"]["description"] == "a"
    same = await admin.put(path, json=MODEL | {"description": "a"})
    assert same.json()["generation"] == 2  # nothing changed, so nothing moved


async def test_a_change_of_the_number_of_copies_is_no_new_version(plane: Plane) -> None:
    admin = await plane.admin()
    model = (await admin.post("/v2/models", json=MODEL | {"replicas": 0})).json()
    path = f"/v2/models/{model['id']}"

    async def generations(*wanted: int) -> None:
        async def check() -> bool:
            return [one["model_generation"] for one in await instances(admin)] == [*wanted]

        await eventually(check, f"the instances are of generations {wanted}")

    for replicas in (1, 2):
        await admin.put(path, json=MODEL | {"replicas": replicas})
        await generations(*[1] * replicas)
    await admin.put(path, json=MODEL | {"env": {"A": "1"}, "replicas": 3})
    await generations(4, 4, 4)  # none has a worker yet: there is nothing to lose


@pytest.mark.parametrize("text", ["/x\ud800.gguf", "/x\0.gguf"])
async def test_text_that_cannot_be_kept_is_refused_and_breaks_nothing(
    plane: Plane, text: str
) -> None:
    admin = await plane.admin()
    body = json.dumps(MODEL | {"local_path": text}).encode()
    kind = {"Content-Type": "application/json"}
    answer = await admin.post("/v2/models", content=body, headers=kind)
    assert answer.status_code == 422
    assert "no character" in answer.json()["message"]
    assert (await admin.get("/v2/models")).json()["items"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/v2/models/{10**30}"),
        ("GET", f"/v2/model-instances/{10**30}/logs"),
        ("DELETE", f"/v2/workers/{10**30}"),
        ("GET", f"/v2/models?page={10**30}"),
        ("GET", f"/v2/model-instances?model_id={10**30}"),
        ("GET", "/v2/api-keys/0"),
    ],
)
async def test_numbers_that_no_id_can_be_are_refused(plane: Plane, method: str, path: str) -> None:
    admin = await plane.admin()
    assert (await admin.request(method, path)).status_code == 422


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "no spaces"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"local_path": None}, "local_path"),
        ({"local_path": "relative.gguf"}, "absolute"),
        ({"local_path": "/models/readme.txt"}, ".gguf"),
        ({"replicas": -1}, "replicas"),
        ({"backend": "ollama"}, "llama-box"),
        ({"backend_parameters": ["--port=1"]}, "--port"),
        ({"backend_parameters": ["--api_key=x"]}, "--api-key"),
        ({"backend_parameters": ["--ctx-size=\u00b2"]}, "--ctx-size"),
        ({"backend_parameters": ["--ctx-size=" + "9" * 400]}, "--ctx-size"),
        ({"backend_parameters": ["--ctx-size", "many"]}, "--ctx-size"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_a_bad_model_is_refused_with_a_sentence_that_names_what_is_wrong(
    plane: Plane, change: dict[str, Any], word: str
) -> None:
    admin = await plane.admin()
    answer = await admin.post("/v2/models", json=MODEL | change)
    assert answer.status_code == 422
    assert word in answer.json()["message"]
    assert (await admin.get("/v2/models")).json()["pagination"]["total"] == 0


async def test_lists_come_in_pages(plane: Plane) -> None:
    admin = await plane.admin()
    for number in range(5):
        await admin.post("/v2/models", json=MODEL | {"name": f"m{number}", "replicas": 0})
    answer = (await admin.get("/v2/models", params={"page": 2, "perPage": 2})).json()
    assert [item["name"] for item in answer["items"]] == ["m2", "m3"]
    assert answer["pagination"] == {"page": 2, "perPage": 2, "total": 5, "totalPage": 3}
    assert (await admin.get("/v2/models", params={"perPage": 101})).status_code == 422


async def test_a_generated_password_must_be_changed_before_anything_else(
    start: Start, tmp_path: Path
) -> None:
    plane = await start(tmp_path)
    browser = await plane.through_gateway()
    assert (await browser.get("/v2/models")).status_code == 401
    wrong = await browser.post("/auth/login", data={"username": "admin", "password": "no"})
    assert wrong.status_code == 401
    login = await browser.post("/auth/login", data={"username": "admin", "password": PASSWORD})
    assert login.status_code == 204
    cookie = login.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Secure" not in cookie
    assert (await browser.get("/v2/models")).status_code == 200
    # one given with --bootstrap-password need not be changed; a generated one must
    async with plane.db.write() as session:
        from gpustack.server.db.tables import User

        (await session.get_one(User, 1)).require_password_change = True
    blocked = await browser.get("/v2/models")
    assert (blocked.status_code, blocked.json()["code"]) == (403, "password_change_required")
    assert (await browser.get("/v2/users/me")).json()["require_password_change"] is True
    weak = {"current_password": PASSWORD, "new_password": "weak"}
    refused = await browser.post("/auth/update-password", json=weak)
    assert refused.status_code == 422
    assert "upper-case" in refused.json()["message"]
    good = {"current_password": PASSWORD, "new_password": "Better-than-2"}
    assert (await browser.post("/auth/update-password", json=good)).status_code == 204
    assert (await browser.get("/v2/models")).status_code == 200
    assert (await browser.post("/auth/logout")).status_code == 204
    browser.cookies.set("gpustack_session", login.cookies["gpustack_session"])
    assert (await browser.get("/v2/models")).status_code == 401  # ended on the server too


async def test_a_storm_of_logins_is_turned_away_and_a_right_one_gets_in(plane: Plane) -> None:
    browser = await plane.through_gateway()

    async def login(password: str, peer: str) -> int:
        form = {"username": "admin", "password": password}
        headers = {wire.PEER_HEADER: peer}
        return (await browser.post("/auth/login", data=form, headers=headers)).status_code

    peers = [f"203.0.113.{n}" for n in range(15)]  # fewer than the throttle lets try
    statuses = await asyncio.gather(*(login("wrong", peer) for peer in peers))
    assert {*statuses} == {401, 429}  # some were turned away before their password was looked at
    assert await login(PASSWORD, "198.51.100.7") == 204


async def test_a_cookie_is_not_enough_for_a_write_that_another_site_makes(plane: Plane) -> None:
    browser = await plane.through_gateway()
    await browser.post("/auth/login", data={"username": "admin", "password": PASSWORD})
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = await browser.post("/v2/api-keys", json={"name": "x"}, headers=headers)
        assert answer.status_code == 403
    foreign = {"Origin": "http://app.example"}
    vouched = foreign | {wire.VOUCHED_HEADER: "1"}
    answer = await browser.post("/v2/api-keys", json={"name": "x"}, headers=vouched)
    assert answer.status_code == 201
    stranger = await plane.client(None)  # who says so is no gateway
    stranger.cookies = browser.cookies
    answer = await stranger.post("/v2/api-keys", json={"name": "x"}, headers=vouched)
    assert answer.status_code == 403
    own = {"Origin": "http://test", "Sec-Fetch-Site": "same-origin"}
    assert (await browser.post("/v2/api-keys", json={"name": "y"}, headers=own)).status_code == 201


async def test_an_api_key_is_shown_once_and_works_in_each_carrier(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "ci"})).json()
    prefix, access, secret = key["value"].split("_")
    assert (prefix, len(access), len(secret)) == ("gpustack", 16, 32)
    assert key["value"] not in (await admin.get("/v2/api-keys")).text
    for headers in (
        {"Authorization": f"Bearer {key['value']}"},
        {"x-api-key": key["value"]},
        {"api-key": key["value"]},
    ):
        client = await plane.client(None, **headers)
        assert (await client.get("/v2/models")).status_code == 200
    assert (await admin.delete(f"/v2/api-keys/{key['id']}")).status_code == 204
    client = await plane.client(key["value"])
    assert (await client.get("/v2/models")).status_code == 401


async def test_a_key_is_shown_and_renamed_by_its_owner_without_its_value(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "ci"})).json()
    path = f"/v2/api-keys/{key['id']}"
    renamed = await admin.put(path, json={"name": "cd", "description": "deploys"})
    assert renamed.status_code == 200
    shown = (await admin.get(path)).json()
    assert (shown["name"], shown["description"], shown["prefix"]) == (
        "cd",
        "deploys",
        key["prefix"],
    )
    assert "value" not in shown
    assert (await admin.put(path, json={"name": "x", "user_id": 2})).status_code == 422
    assert (await admin.get("/v2/api-keys/999")).status_code == 404


async def test_users_change_their_name_and_nothing_that_grants_anything(plane: Plane) -> None:
    admin = await plane.admin()
    answer = await admin.put("/v2/users/me", json={"full_name": "Ada"})
    assert answer.json()["full_name"] == "Ada"
    for field in ("is_admin", "username", "require_password_change"):
        refused = await admin.put("/v2/users/me", json={"full_name": "Ada", field: True})
        assert refused.status_code == 422


async def test_an_expired_key_is_unknown(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "short", "expires_in": 1})).json()
    client = await plane.client(key["value"])

    async def refused() -> bool:
        return (await client.get("/v2/models")).status_code == 401

    await eventually(refused, "the key expires")


async def test_only_a_gateways_word_makes_a_request_local(plane: Plane) -> None:
    anyone = await plane.client(None, **{"x-gpustack-local": "1"})
    assert (await anyone.get("/v2/models")).status_code == 401
    forged = {"x-gpustack-local": "1", "x-gpustack-gateway": "guess"}
    assert (await (await plane.client(None, **forged)).get("/v2/models")).status_code == 401
    local = await plane.through_gateway(**{"x-gpustack-local": "1"})
    assert (await local.get("/v2/users/me")).json()["username"] == "admin"


async def test_a_worker_sees_and_writes_only_what_is_its_own(plane: Plane) -> None:
    admin, one = await plane.admin(), await plane.worker("one")
    await admin.post("/v2/models", json=MODEL)
    (instance,) = await placed(plane, admin)
    other = await plane.worker("other")
    assert (await other.say(instance["id"], "running")).status_code == 403
    assert (await other.http.put(f"/v2/workers/{one.id}/status", json={})).status_code in {403, 422}
    assert (await other.http.get("/v2/model-instances")).json()["items"] == []
    assert (await other.http.get("/v2/models")).status_code == 403
    (own,) = (await one.http.get("/v2/model-instances")).json()["items"]
    assert own["id"] == instance["id"]


async def test_a_worker_that_is_back_at_another_address_is_news_of_its_instances(
    plane: Plane,
) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await admin.post("/v2/models", json=MODEL)
    (instance,) = await placed(plane, admin)
    assert instance["worker_ip"] == "127.0.0.1"
    watch = plane.feed.watch(frozenset({wire.INSTANCES}), ADMIN)
    while json.loads(await anext(watch))["type"] != "synced":
        pass
    moved = registration(ip="10.0.0.9")
    answer = await agent.http.put(f"/v2/workers/{agent.id}/registration", json=moved)
    assert answer.status_code == 200
    assert json.loads(await anext(watch))["data"]["worker_ip"] == "10.0.0.9"
    await watch.aclose()


async def test_joining_needs_the_token_and_a_name_that_no_other_machine_has(plane: Plane) -> None:
    stranger = await plane.client("not the token")
    answer = await stranger.post("/v2/workers/register", json=registration())
    assert answer.status_code == 401
    token = (plane.data_dir / "token").read_text().strip()
    assert (plane.data_dir / "token").stat().st_mode & 0o777 == 0o600
    joiner = await plane.client(token)
    first = await joiner.post("/v2/workers/register", json=registration("工人"))
    assert first.status_code == 200, first.text
    clash = await joiner.post(
        "/v2/workers/register", json=registration("工人", machine_id="another")
    )
    assert clash.status_code == 409
    again = await joiner.post("/v2/workers/register", json=registration("工人"))
    assert again.json()["worker_id"] == first.json()["worker_id"]
    old = await plane.client(first.json()["credential"])
    assert (await old.get("/v2/model-instances")).status_code == 401  # replaced by the new one


async def test_a_running_worker_keeps_its_name_also_on_its_own_machine(plane: Plane) -> None:
    joiner = await plane.client((plane.data_dir / "token").read_text().strip())
    first = await joiner.post("/v2/workers/register", json=registration("w", run_id="one"))
    second = await joiner.post("/v2/workers/register", json=registration("w", run_id="two"))
    assert (second.status_code, "--worker-name" in second.json()["message"]) == (409, True)
    alive = await plane.client(first.json()["credential"])
    assert (await alive.get("/v2/model-instances")).status_code == 200
    own = await plane.client(JOIN)  # this node's agent, whose data directory lost its credential
    again = await own.post("/v2/workers/register", json=registration("w", run_id="three"))
    assert again.json()["worker_id"] == first.json()["worker_id"]


async def test_a_silent_worker_is_unreachable_with_its_instances_until_it_is_heard(
    plane: Plane,
) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await admin.post("/v2/models", json=MODEL)
    (one,) = await placed(plane, admin)
    await agent.say(one["id"], "starting")
    heartbeats = plane.app.state.heartbeats

    async def look(limit: timedelta) -> tuple[str, str]:
        await Workers(plane.db, heartbeats, Patience(limit)).reconcile(ALL)
        (worker,) = (await admin.get("/v2/workers")).json()["items"]
        return worker["state"], (await instances(admin))[0]["state"]

    assert await look(timedelta(0)) == ("unreachable", "unreachable")
    heartbeats.heard(agent.id)
    assert await look(timedelta(seconds=60)) == ("ready", "starting")


async def test_one_look_judges_every_worker(plane: Plane) -> None:
    first, second = await plane.worker("first"), await plane.worker("second")
    plane.app.state.heartbeats._heard.clear()  # the plane's own control leaves all as it is
    async with plane.db.write() as session:  # it has registered, and that was all
        await session.exec(update(tables.Worker).values(heartbeat_at=None))
    heard = Heartbeats()
    assert (await Workers(plane.db, heard, Patience(timedelta(0))).reconcile(ALL)) is not None
    heard.heard(first.id)
    again_s = await Workers(plane.db, heard, Patience(timedelta(minutes=1))).reconcile(ALL)
    admin = await plane.admin()
    states = {w["id"]: w["state"] for w in (await admin.get("/v2/workers")).json()["items"]}
    assert states == {first.id: "ready", second.id: "unreachable"}
    assert again_s == SILENT_AGAIN_S  # the earliest of what is due


async def test_two_that_wait_are_not_placed_on_the_same_memory(plane: Plane) -> None:
    admin = await plane.admin()
    await plane.worker("small", memory_total_bytes=80 * 1024**2)
    await admin.post("/v2/models", json=MODEL | {"replicas": 2})

    async def settled() -> list[str]:
        found = await instances(admin)
        done = len(found) == 2 and all(
            one["worker_id"] or "'ram'" in str(one["reasons"]) for one in found
        )
        return sorted(one["state"] for one in found) if done else []

    assert await eventually(settled, "both are decided") == ["pending", "scheduled"]


async def test_a_model_that_the_scheduler_cannot_think_about_holds_up_no_other(
    plane: Plane,
) -> None:
    admin = await plane.admin()
    await plane.worker()
    odd = (await admin.post("/v2/models", json=MODEL | {"name": "odd"})).json()

    async def read() -> bool:
        return (await admin.get(f"/v2/models/{odd['id']}")).json()["profile"] is not None

    await eventually(read, "its file was looked for")
    async with plane.db.write() as session:  # as a defect elsewhere might leave it
        row = (await session.exec(select(tables.ModelVersion))).one()
        row.profile = {"weights_bytes": "many"}
        for instance in (await session.exec(select(tables.Instance))).all():
            instance.worker_id, instance.claim = None, None
    await admin.post("/v2/models", json=MODEL | {"name": "sound"})

    async def states() -> bool:
        found = {one["model_name"]: one for one in await instances(admin)}
        reasons = found.get("odd", {}).get("reasons")
        return bool(
            found.get("sound", {}).get("state") == "scheduled"
            and reasons
            and reasons[0]["code"] == "internal"
        )

    await eventually(states, "one is placed, the other says why not")


async def test_a_token_that_is_given_replaces_the_one_before(start: Start, tmp_path: Path) -> None:
    first = await start(tmp_path)
    old = (tmp_path / "token").read_text().strip()
    second = await start(tmp_path, token="given-token")
    for plane, token, status in ((second, old, 401), (second, "given-token", 200)):
        joiner = await plane.client(token)
        answer = await joiner.post("/v2/workers/register", json=registration(token))
        assert answer.status_code == status
    assert first.db.url == second.db.url


async def test_a_second_process_with_one_credential_is_told_so(plane: Plane) -> None:
    agent = await plane.worker()
    beat = {"machine_id": "machine-w1", "boot_id": "boot", "run_id": "run"}
    path = f"/v2/workers/{agent.id}/heartbeat"
    assert (await agent.http.put(path, json=beat)).json() == {"tunnel": False}
    assert (await agent.http.put(path, json=beat | {"run_id": "clone"})).status_code == 409
    clone = registration(machine_id="another machine", run_id="clone")
    answer = await agent.http.put(f"/v2/workers/{agent.id}/registration", json=clone)
    assert answer.status_code == 409


async def test_an_instance_cannot_make_an_illegal_move(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await admin.post("/v2/models", json=MODEL)
    (one,) = await placed(plane, admin)
    answer = await agent.say(one["id"], "pending")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    wanted = await agent.say(one["id"], "gone")
    assert wanted.status_code == 409  # nobody asked it to go
    assert (await agent.say(999, "running")).status_code == 404


async def test_usage_is_stored_once_however_often_it_is_sent(plane: Plane) -> None:
    gateway = await plane.gateway()
    record = {
        "request_id": "r1",
        "model_id": 1,
        "model": "tiny",
        "operation": "chat/completions",
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "started_at": 1.0,
    }
    batch = {"spool": "ab" * 16, "sequence": 1, "records": [record]}
    for _ in range(2):
        assert (await gateway.post("/v2/usage", json=batch)).status_code == 204
    assert (await gateway.post("/v2/usage", json=batch | {"sequence": 2})).status_code == 204
    async with plane.db.read() as session:
        from sqlmodel import select

        from gpustack.server.db.tables import Usage

        assert [row.completion_tokens for row in await session.exec(select(Usage))] == [5, 5]
    admin = await plane.admin()
    assert (await admin.post("/v2/usage", json=batch)).status_code == 403


async def test_errors_have_one_shape_and_no_traceback(plane: Plane) -> None:
    admin = await plane.admin()
    for method, path, status in (
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/99", 404),
        ("PATCH", "/v2/models", 405),
        ("GET", "/v2/models/abc", 422),
        ("GET", "/v2/watch?kinds=dogs", 400),
    ):
        answer = await admin.request(method, path)
        assert answer.status_code == status, path
        assert set(answer.json()) == {"code", "message", "detail"}
        assert "Traceback" not in answer.text
