"""Tokens that let workers register, and do nothing else."""

import asyncio
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlmodel import col, select, update

from gpustack.config.load import load
from gpustack.lib.secrets import digest
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind
from gpustack.server import heartbeats
from gpustack.server.api.join_tokens import reached_at
from gpustack.server.db.tables import Credential, now
from gpustack.server.views import GATEWAY
from tests.server.conftest import JOIN, Plane, Start, registration
from tests.server.test_feed import Watch
from tests.server.test_leases import on_shared
from tests.support.audit import entries
from tests.support.routes import PUBLIC, walk

REGISTER = ("POST", "/v2/workers/register")


async def make(plane: Plane, **wanted: Any) -> dict[str, Any]:
    answer = await (await plane.admin()).post("/v2/join-tokens", json=wanted)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def join(plane: Plane, token: str, name: str = "w1", **more: Any) -> httpx.Response:
    joiner = await plane.client(token)
    return await joiner.post("/v2/workers/register", json=registration(name, **more))


async def tokens(plane: Plane) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await (await plane.admin()).get("/v2/join-tokens")).json()[
        "items"
    ]
    return found


async def rotate(plane: Plane) -> dict[str, Any]:
    answer = await (await plane.admin()).post("/v2/cluster-token/rotate")
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def own_token(data_dir: Path) -> str:
    return (data_dir / "token").read_text().strip()


async def test_a_token_lets_one_worker_in(plane: Plane) -> None:
    made = await make(plane, description="rack 3")
    first = await join(plane, made["value"])
    assert first.status_code == 200, first.text
    second = await join(plane, made["value"], "w2")
    assert second.status_code == 401
    assert "was for one worker, and w1 has used it" in second.json()["message"]
    (listed,) = await tokens(plane)
    assert listed["worker_id"] == first.json()["worker_id"]
    assert (listed["description"], listed["reusable"]) == ("rack 3", False)
    worker = await plane.client(first.json()["credential"])
    assert (await worker.get("/v2/model-instances")).status_code == 200


async def test_a_worker_whose_answer_was_lost_gets_in_again_and_no_later_life_of_it(
    plane: Plane,
) -> None:
    token = (await make(plane))["value"]
    lost, again = await join(plane, token), await join(plane, token)
    assert again.status_code == 200, again.text
    assert again.json()["worker_id"] == lost.json()["worker_id"]
    for other in ({"run_id": "another"}, {"machine_id": "another"}):
        assert (await join(plane, token, **other)).status_code == 401, other
    worker = await plane.client(again.json()["credential"])
    assert (await worker.get("/v2/model-instances")).status_code == 200


async def test_a_registration_that_is_refused_uses_nothing_up(plane: Plane) -> None:
    await plane.worker("taken")
    token = (await make(plane))["value"]
    clash = await join(plane, token, "taken", machine_id="another")
    assert clash.status_code == 409
    assert (await join(plane, token, "free")).status_code == 200


async def test_a_reusable_token_lets_many_in_until_it_is_deleted(plane: Plane) -> None:
    made = await make(plane, reusable=True)
    assert [(await join(plane, made["value"], f"w{n}")).status_code for n in range(3)] == [200] * 3
    admin = await plane.admin()
    assert (await admin.delete(f"/v2/join-tokens/{made['id']}")).status_code == 204
    assert (await join(plane, made["value"], "late")).status_code == 401
    assert (await admin.delete(f"/v2/join-tokens/{made['id']}")).status_code == 404
    assert await tokens(plane) == []
    assert len((await admin.get("/v2/workers")).json()["items"]) == 3


async def test_a_token_ends_and_is_gone_when_the_next_is_made(plane: Plane) -> None:
    made = await make(plane, reusable=True)
    async with plane.db.write() as session:
        past = update(Credential).where(col(Credential.id) == made["id"])
        await session.exec(past.values(expires_at=now() - timedelta(seconds=1)))
    late = await join(plane, made["value"])
    assert (late.status_code, "has expired" in late.json()["message"]) == (401, True)
    assert [one["id"] for one in await tokens(plane)] == [made["id"]]
    other = await make(plane)
    assert [one["id"] for one in await tokens(plane)] == [other["id"]]


@on_shared
async def test_of_two_machines_that_show_one_token_at_once_one_gets_in(
    start: Start, tmp_path: Path
) -> None:
    planes = [await start(tmp_path / "a"), await start(tmp_path / "b")]
    for turn in range(5):
        token = (await make(planes[turn % 2]))["value"]
        answers = await asyncio.gather(
            *(join(plane, token, f"w{turn}-{at}") for at, plane in enumerate(planes))
        )
        assert sorted(one.status_code for one in answers) == [200, 401]


async def test_of_machines_that_show_one_token_at_once_one_gets_in(plane: Plane) -> None:
    token = (await make(plane))["value"]
    answers = await asyncio.gather(*(join(plane, token, f"w{at}") for at in range(8)))
    assert sorted(one.status_code for one in answers) == [200] + [401] * 7
    assert len((await (await plane.admin()).get("/v2/workers")).json()["items"]) == 1


async def test_a_worker_that_is_deleted_does_not_come_back_with_the_token_it_used(
    plane: Plane,
) -> None:
    token = (await make(plane))["value"]
    worker = (await join(plane, token)).json()["worker_id"]
    assert (await (await plane.admin()).delete(f"/v2/workers/{worker}")).status_code == 204
    assert (await join(plane, token)).status_code == 401


async def test_the_server_keeps_and_shows_no_token(plane: Plane) -> None:
    made = await make(plane)
    access, secret = made["value"].rsplit("_", 1)
    assert (access, len(secret)) == (made["prefix"], 32)
    async with plane.db.read() as session:
        joins = select(Credential).where(Credential.kind == CredentialKind.JOIN)
        (row,) = (await session.exec(joins)).all()
    assert row.digest == digest(made["value"])
    assert secret not in row.model_dump_json()
    (listed,) = await tokens(plane)
    assert secret not in str(listed)
    assert row.digest not in str(listed)
    kept = [one for one in await entries(plane) if one["kind"] == "join-tokens"]
    assert [(one["action"], one["name"]) for one in kept] == [("create", made["prefix"])]
    assert not any(word in str(kept) for word in (secret, row.digest))


async def test_gateways_hear_nothing_of_tokens_to_join_with(plane: Plane) -> None:
    made = await make(plane)
    kinds = frozenset({wire.CREDENTIALS})
    watch = Watch(plane.feed.watch(kinds, GATEWAY))
    listed = await watch.until("synced")
    assert {one["data"]["kind"] for one in listed} == {CredentialKind.LOCAL, CredentialKind.GATEWAY}
    await join(plane, made["value"])  # uses it up
    await (await plane.admin()).delete(f"/v2/join-tokens/{made['id']}")
    await (await plane.admin()).post("/v2/api-keys", json={"name": "last"})
    await (await plane.gateway()).post("/v2/watch/flush")
    resumed = await Watch(plane.feed.watch(kinds, GATEWAY, since=watch.cursor)).until("synced")
    assert [one["data"]["kind"] for one in resumed] == [CredentialKind.WORKER, CredentialKind.KEY]


@pytest.mark.parametrize("lifetime_s", [0, 366 * 86400])
async def test_every_token_ends(plane: Plane, lifetime_s: int) -> None:
    answer = await (await plane.admin()).post("/v2/join-tokens", json={"expires_in": lifetime_s})
    assert answer.status_code == 422


async def test_lists_of_tokens_have_pages(plane: Plane) -> None:
    made = [await make(plane) for _ in range(3)]
    page = await (await plane.admin()).get("/v2/join-tokens?perPage=2&page=2&sort_by=-created_at")
    body = page.json()
    assert [one["id"] for one in body["items"]] == [made[0]["id"]]
    assert body["pagination"] == {"page": 2, "perPage": 2, "total": 3, "totalPage": 2}


async def test_a_token_to_join_with_opens_no_other_door(plane: Plane) -> None:
    made = await make(plane, reusable=True)
    shown = {"join token": made["value"], "cluster's": own_token(plane.data_dir), "agent's": JOIN}
    for name, secret in shown.items():
        assert await doors(await plane.client(secret), walk(plane.app.routes)) == [], name
        cookie = await plane.client(None, Cookie=f"{wire.SESSION_COOKIE}={secret}")
        assert (await cookie.post("/v2/workers/register", json=registration())).status_code == 401
        gateway = await plane.client(None, **{wire.GATEWAY_HEADER: secret, wire.LOCAL_HEADER: "1"})
        assert (await gateway.get("/v2/users/me")).status_code == 401, name


async def doors(client: httpx.AsyncClient, routes: Iterable[tuple[str, str]]) -> list[Any]:
    """Routes that do not refuse this client, but for those that are everybody's."""
    found = []
    for method, path in routes:
        if path in PUBLIC or (method, path) == REGISTER:
            continue
        answer = await client.request(method, re.sub(r"\{[^}]*\}", "1", path), json={})
        if answer.status_code not in {401, 403}:
            found.append((method, path, answer.status_code))
    return found


async def test_only_administrators_have_a_say_in_who_joins(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    made = await make(plane)
    login = {"username": "eve", "password": "Hunter-2"}
    assert (await admin.post("/v2/users", json=login)).is_success
    browser = await plane.client()
    assert (await browser.post("/auth/login", json=login)).status_code == 204
    for client in (browser, agent.http, await plane.gateway()):
        for method, path in (
            ("GET", "/v2/join-tokens"),
            ("POST", "/v2/join-tokens"),
            ("DELETE", f"/v2/join-tokens/{made['id']}"),
            ("POST", "/v2/cluster-token/rotate"),
        ):
            answer = await client.request(method, path, json={} if method == "POST" else None)
            assert answer.status_code == 403, (method, path)
    assert len(await tokens(plane)) == 1


# --- the cluster's own token ------------------------------------------------------------------


async def test_the_clusters_token_is_replaced_and_workers_that_have_joined_go_on(
    plane: Plane,
) -> None:
    old = own_token(plane.data_dir)
    worker = await plane.client((await join(plane, old)).json()["credential"])
    made = await rotate(plane)
    assert made["is_option"] is False
    refused = await join(plane, old, "w2")
    assert refused.status_code == 401
    assert "this token is not the cluster's" in refused.json()["message"]
    assert (await join(plane, made["value"], "w2")).status_code == 200
    assert (await worker.get("/v2/model-instances")).status_code == 200
    assert own_token(plane.data_dir) == made["value"] != old
    assert (plane.data_dir / "token").stat().st_mode & 0o777 == 0o600
    (entry,) = [one for one in await entries(plane) if one["kind"] == "cluster"]
    assert (entry["username"], entry["action"]) == ("admin", "update")
    assert list(entry["changed"]) == ["token"]
    assert not any(text in str(entry) for text in (made["value"], digest(made["value"]), old))


async def test_a_restart_does_not_bring_the_old_token_back(start: Start, tmp_path: Path) -> None:
    first = await start(tmp_path)
    old = own_token(tmp_path)
    new = (await rotate(first))["value"]
    second = await start(tmp_path)
    assert own_token(tmp_path) == new
    assert (await join(second, old)).status_code == 401
    assert (await join(second, new)).status_code == 200


async def test_a_token_among_the_options_is_the_clusters_again_at_the_next_start(
    start: Start, tmp_path: Path
) -> None:
    first = await start(tmp_path, token="from-the-options")
    made = await rotate(first)
    assert made["is_option"] is True
    assert (await join(first, "from-the-options")).status_code == 401
    second = await start(tmp_path, token="from-the-options")
    assert (await join(second, "from-the-options")).status_code == 200
    assert (await join(second, made["value"], "w2")).status_code == 401
    assert not (tmp_path / "token").exists()  # what it said is true no more


async def test_a_file_of_a_token_that_another_server_replaced_goes_at_the_next_start(
    start: Start, tmp_path: Path
) -> None:
    await start(tmp_path / "a")
    assert (tmp_path / "a" / "token").exists()
    made = await rotate(await start(tmp_path / "b"))
    assert own_token(tmp_path / "b") == made["value"]
    await start(tmp_path / "a")
    assert not (tmp_path / "a" / "token").exists()


async def test_a_token_that_cannot_be_kept_replaces_nothing(plane: Plane) -> None:
    old = own_token(plane.data_dir)
    (plane.data_dir / "token").unlink()
    (plane.data_dir / "token" / "in the way").mkdir(parents=True)
    answer = await (await plane.admin()).post("/v2/cluster-token/rotate")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "token cannot be written: Is a directory" in answer.json()["message"]
    assert (await join(plane, old)).status_code == 200


# --- where workers reach the server -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({"server_external_url": "https://gpu.example/"}, "https://gpu.example"),
        ({"advertise_address": "10.0.0.7"}, "http://10.0.0.7:80"),
        ({"host": "10.0.0.8", "port": "8000"}, "http://10.0.0.8:8000"),
        ({"advertise_address": "fd00::7", "host": "10.0.0.8"}, "http://[fd00::7]:80"),
    ],
)
def test_the_url_in_the_join_command_is_what_the_operator_said(
    options: dict[str, str], url: str
) -> None:
    assert reached_at(load(options, {}).settings) == url


def test_without_a_word_it_is_the_address_of_the_machine() -> None:
    found = reached_at(load({"port": "8000"}, {}).settings)
    assert re.fullmatch(r"http://[0-9.]+:8000", found)
    assert "0.0.0.0" not in found


# --- who a worker is ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["节点-1", "räck 3", "узел", "😀", "gpu-é.例え.jp"])
async def test_a_host_may_be_called_anything(plane: Plane, name: str) -> None:
    token = (await make(plane))["value"]
    answer = await join(plane, token, name, hostname=name)
    assert answer.status_code == 200, answer.text
    (worker,) = (await (await plane.admin()).get(f"/v2/workers?name={name}")).json()["items"]
    assert (worker["name"], worker["hostname"]) == (name, name)


@pytest.mark.parametrize(
    "copied",
    [
        {"machine_id": "another", "boot_id": "another", "run_id": "clone"},  # the data directory
        {"boot_id": "another", "run_id": "clone"},  # the whole machine, its id among it
    ],
)
async def test_a_copy_of_a_worker_is_told_so_and_does_not_take_its_place(
    plane: Plane, copied: dict[str, str]
) -> None:
    agent = await plane.worker()
    path = f"/v2/workers/{agent.id}/registration"
    answer = await agent.http.put(path, json=registration(ip="10.0.0.9", **copied))
    assert answer.status_code == 409
    assert "is running on another machine" in answer.json()["message"]
    assert "remove worker_credential" in answer.json()["message"]
    worker = (await (await plane.admin()).get(f"/v2/workers/{agent.id}")).json()
    assert worker["ip"] == "127.0.0.1"
    beat = {"machine_id": "machine-w1", "boot_id": "boot", "run_id": "run"}
    assert (await agent.http.put(f"{path[:-13]}/heartbeat", json=beat)).status_code == 200


async def test_a_machine_that_was_restarted_is_let_in_once_its_old_life_is_silent(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await plane.worker()
    path = f"/v2/workers/{agent.id}/registration"
    again = registration(run_id="two")  # only the agent: at once
    assert (await agent.http.put(path, json=again)).status_code == 200
    rebooted = registration(boot_id="two", run_id="three")
    assert (await agent.http.put(path, json=rebooted)).status_code == 409
    plane.app.state.heartbeats._heard[agent.id] -= heartbeats.STOPPED_AFTER.total_seconds()
    assert (await agent.http.put(path, json=rebooted)).status_code == 200
