"""Editing models over the API: compared, patched, rolled back, deleted in bulk."""

import asyncio
import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlmodel import select

from gpustack.schemas.events import EventType
from gpustack.server.db import tables
from tests.server.conftest import Plane
from tests.server.test_feed import another_user
from tests.support.wait import eventually

MODEL = {"name": "tiny", "source": "local_path", "local_path": "/models/tiny.gguf", "replicas": 0}
MERGE_PATCH = {"Content-Type": "application/merge-patch+json"}


@pytest.fixture
async def admin(plane: Plane) -> httpx.AsyncClient:
    return await plane.admin()


async def create(admin: httpx.AsyncClient, **more: Any) -> str:
    answer = await admin.post("/v2/models", json=MODEL | more)
    assert answer.status_code == 201, answer.text
    assert answer.headers["etag"] == '"1"'
    return f"/v2/models/{answer.json()['id']}"


async def patch(admin: httpx.AsyncClient, path: str, change: Any, **headers: str) -> httpx.Response:
    content = change if isinstance(change, bytes) else json.dumps(change).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await admin.patch(path, content=content, headers=MERGE_PATCH | named)


async def remarks(plane: Plane) -> list[str]:
    async with plane.db.read() as session:
        rows = await session.exec(select(tables.AuditEntry).order_by(tables.AuditEntry.id))  # type: ignore[arg-type]
        return [row.remark for row in rows]


async def test_what_models_are_started_with_is_for_administrators(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    """Their environments hold tokens, and engines' last words hold anything."""
    path = await create(admin, env={"HF_TOKEN": "hunter2"}, replicas=1)
    await plane.worker()

    async def placed() -> Any:
        return (await admin.get("/v2/model-instances")).json()["items"]

    (instance,) = await eventually(placed, "there is an instance")
    second = await another_user(plane)
    for where in (f"{path}/versions", f"/v2/model-instances/{instance['id']}"):
        assert (await second.get(where)).status_code == 403, where
    for where in ("/v2/models", path):  # they see that it is there
        shown = await second.get(where)
        assert shown.is_success
        assert "tiny" in shown.text
        assert "hunter2" not in shown.text


# --- compare and swap ------------------------------------------------------------------------


async def test_an_update_made_from_another_generation_is_refused_with_what_is_there(
    admin: httpx.AsyncClient,
) -> None:
    path = await create(admin)
    shown = await admin.get(path)
    assert shown.headers["etag"] == '"1"'
    seen = {"If-Match": shown.headers["etag"]}
    first = await admin.put(path, json=MODEL | {"description": "a"}, headers=seen)
    assert (first.status_code, first.headers["etag"]) == (200, '"2"')
    for method, body in (("PUT", MODEL), ("PATCH", {"description": "b"})):
        lost = await admin.request(method, path, json=body, headers=seen)
        assert (lost.status_code, lost.json()["code"]) == (409, "conflict")
        assert lost.json()["message"] == "model tiny is at generation 2, not 1"
        assert lost.json()["detail"]["current"]["description"] == "a"
        in_body = await admin.request(method, path, json=body | {"generation": 1})
        assert in_body.status_code == 409
    rollback = await admin.post(f"{path}/rollback", json={"to": 1}, headers=seen)
    assert rollback.status_code == 409
    assert (await admin.get(path)).json()["generation"] == 2


async def test_if_match_is_read_as_the_standard_has_it(admin: httpx.AsyncClient) -> None:
    path = await create(admin)
    for tags, status in (
        ('"1"', 200),
        ('"7", "2"', 200),
        ("*", 200),
        ('W/"4"', 409),
        ('"abc"', 409),
        ('"7"', 409),
        ("4", 400),
        ('"4', 400),
    ):
        change = {"description": tags}
        answer = await admin.patch(path, json=change, headers={"If-Match": tags})
        assert answer.status_code == status, (tags, answer.text)


async def test_header_and_body_must_both_fit(admin: httpx.AsyncClient) -> None:
    path = await create(admin)
    for header, body in ((1, 2), (2, 1)):
        answer = await admin.patch(
            path, json={"generation": body}, headers={"If-Match": f'"{header}"'}
        )
        assert answer.status_code == 409


async def test_of_many_at_once_that_saw_the_same_one_wins(admin: httpx.AsyncClient) -> None:
    path = await create(admin)

    async def edit(number: int) -> int:
        change = {"description": str(number), "generation": 1}
        return (await admin.patch(path, json=change)).status_code

    statuses = await asyncio.gather(*(edit(number) for number in range(20)))
    assert sorted(statuses) == [200] + [409] * 19
    assert (await admin.get(path)).json()["generation"] == 2


async def test_without_a_generation_the_last_writer_wins_and_the_audit_log_says_so(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    path = await create(admin)
    await admin.patch(path, json={"description": "a", "generation": 1})
    await admin.put(path, json=MODEL | {"description": "b"})
    made, compared, uncompared = await remarks(plane)
    assert (made, compared) == ("", "")
    assert "generation" in uncompared


async def test_two_that_patch_different_parts_lose_neither(admin: httpx.AsyncClient) -> None:
    path = await create(admin)
    changes = [{"env": {f"V{n}": "x"}} for n in range(10)] + [{"description": "d"}]
    answers = await asyncio.gather(*(admin.patch(path, json=change) for change in changes))
    assert {answer.status_code for answer in answers} == {200}
    model = (await admin.get(path)).json()
    assert (len(model["env"]), model["description"]) == (10, "d")
    assert model["generation"] == 12


# --- merge patch -----------------------------------------------------------------------------


async def test_a_patch_changes_what_it_names_and_null_is_the_default(
    admin: httpx.AsyncClient,
) -> None:
    path = await create(admin, env={"A": "1", "B": "2"}, description="d", replicas=0)
    answer = await patch(admin, path, {"env": {"A": None, "C": "3"}, "description": None})
    assert answer.status_code == 200, answer.text
    shown = answer.json()
    assert (shown["env"], shown["description"]) == ({"B": "2", "C": "3"}, None)
    assert (shown["local_path"], shown["replicas"]) == ("/models/tiny.gguf", 0)
    nothing = await patch(admin, path, {})
    assert nothing.json()["generation"] == 2


BAD_PATCHES: tuple[tuple[Any, int, str], ...] = (
    ({"replicas": -1}, 422, "replicas"),
    ({"colour": "red"}, 422, "colour: unknown field"),
    ({"id": 7}, 422, "id: unknown field"),
    ({"source": None}, 422, "source"),
    ({"local_path": None}, 422, "local_path"),
    ({"local_path": "relative.gguf"}, 422, "absolute"),
    ({"backend_parameters": ["--port=1"]}, 422, "--port"),
    ({"name": "other"}, 422, "keeps its name"),
    ({"env": {"A": "\0"}}, 422, "no character"),
    (["a", "list"], 422, ""),
    (None, 422, ""),
    (b"{", 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b"\xff", 400, "not JSON"),
)


async def test_a_patch_is_checked_as_a_whole_spec_is(admin: httpx.AsyncClient) -> None:
    path = await create(admin)
    for change, status, word in BAD_PATCHES:
        answer = await patch(admin, path, change)
        assert answer.status_code == status, (change, answer.text)
        assert word in answer.json()["message"]
    assert (await admin.get(path)).json()["generation"] == 1


async def test_a_patch_says_what_it_is(admin: httpx.AsyncClient) -> None:
    path = await create(admin)
    for kind, status in (
        ("application/merge-patch+json; charset=utf-8", 200),
        ("application/json", 200),
        ("application/json-patch+json", 415),
        ("", 415),
    ):
        headers = {"Content-Type": kind} if kind else {}
        answer = await admin.patch(path, content=b"{}", headers=headers)
        assert answer.status_code == status, answer.text
    assert "application/merge-patch+json" in answer.json()["message"]
    assert (await admin.patch("/v2/models/99", json={})).status_code == 404


# --- the rest --------------------------------------------------------------------------------


async def test_a_deletion_may_name_the_generation_that_was_read(admin: httpx.AsyncClient) -> None:
    path = await create(admin)
    refused = await admin.delete(path, headers={"If-Match": '"7"'})
    assert (refused.status_code, refused.json()["detail"]["current"]["generation"]) == (409, 1)
    assert not (await admin.get(path)).json()["deleting"]
    assert (await admin.delete(path, headers={"If-Match": '"1"'})).status_code == 202


async def test_several_models_are_deleted_at_once_with_an_answer_for_each(
    admin: httpx.AsyncClient,
) -> None:
    ids = [int((await create(admin, name=f"m{n}")).rsplit("/", 1)[1]) for n in range(3)]
    answer = await admin.delete("/v2/models", params={"ids": f"{ids[0]},99,{ids[1]},{ids[0]}"})
    assert answer.status_code == 200
    assert [(one["id"], one["deleting"]) for one in answer.json()["items"]] == [
        (ids[0], True),
        (99, False),
        (ids[1], True),
    ]
    assert "no model with id 99" in answer.json()["items"][1]["message"]

    async def left() -> bool:
        return [m["name"] for m in (await admin.get("/v2/models")).json()["items"]] == ["m2"]

    await eventually(left, "two are gone")


async def test_of_several_models_all_are_deleted_or_none(plane: Plane) -> None:
    """One transaction: a server that is killed meanwhile has begun no part of it."""
    admin = await plane.admin()
    ids = [int((await create(admin, name=f"m{n}")).rsplit("/", 1)[1]) for n in range(3)]
    await admin.delete("/v2/models", params={"ids": ",".join(map(str, ids))})
    async with plane.db.read() as session:
        deleting = tables.Event.type == EventType.DELETING
        moments = (await session.exec(select(tables.Event.first_at).where(deleting))).all()
    assert len(moments) == 3
    assert len(set(moments)) == 1


async def test_ids_that_are_none_delete_nothing(admin: httpx.AsyncClient) -> None:
    await create(admin)
    for ids in ("", "a", "1,", ",1", "1,,2", "-1", "1" * 19, None):
        answer = await admin.delete("/v2/models", params={"ids": ids} if ids is not None else None)
        assert answer.status_code == 422, ids
    many = await admin.delete("/v2/models", params={"ids": ",".join(map(str, range(1, 102)))})
    assert (many.status_code, "at most 100" in many.json()["message"]) == (400, True)
    assert (await admin.get("/v2/models")).json()["pagination"]["total"] == 1


async def test_only_administrators_edit(plane: Plane, admin: httpx.AsyncClient) -> None:
    path = await create(admin)
    user = await plane.client(None)
    for method, where, body in (
        ("PATCH", path, {}),
        ("PUT", path, MODEL),
        ("POST", f"{path}/rollback", {}),
        ("DELETE", "/v2/models?ids=1", None),
    ):
        assert (await user.request(method, where, json=body)).status_code == 401


async def test_a_rollback_keeps_what_instances_are_not_started_from(
    admin: httpx.AsyncClient,
) -> None:
    path = await create(admin, env={"A": "1"})
    nothing = await admin.post(f"{path}/rollback", json={})
    assert (nothing.status_code, nothing.json()["code"]) == (404, "not_found")
    assert nothing.json()["message"] == "model tiny has no earlier version"
    await admin.patch(path, json={"description": "kept"})
    await admin.patch(path, json={"env": {"A": "2"}})
    back = (await admin.post(f"{path}/rollback", json={})).json()
    assert (back["generation"], back["env"], back["description"]) == (4, {"A": "1"}, "kept")
    again = (await admin.post(f"{path}/rollback", json={})).json()  # undoes the undoing
    assert (again["generation"], again["env"]) == (5, {"A": "2"})
    for to in (0, 10**30, "x"):
        assert (await admin.post(f"{path}/rollback", json={"to": to})).status_code == 422
    listed = (await admin.get(f"{path}/versions")).json()["items"]
    assert [(one["generation"], one["wanted"]) for one in listed] == [
        (5, True),
        (4, False),
        (3, True),
        (1, False),
    ]
    assert listed[0]["spec"]["env"] == {"A": "2"}
    assert (await admin.get("/v2/models/99/versions")).status_code == 404


async def test_names_of_the_allowed_characters_are_found_as_they_are(
    admin: httpx.AsyncClient,
) -> None:
    for name in ("a", "x" * 128, "org/model:7b", "A.b_c-1", "..", "a//b"):
        await create(admin, name=name)
        found = (await admin.get(f"/v2/models?name={quote(name, safe='')}")).json()["items"]
        assert [one["name"] for one in found] == [name]
        taken = await admin.post("/v2/models", json=MODEL | {"name": name})
        assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
        assert taken.json()["message"] == f"a model named {name} exists already"


async def test_other_names_are_refused_with_what_would_be_right(admin: httpx.AsyncClient) -> None:
    for name in ("", "x" * 129, "a b", "a\n", "模型", "a%2Fb", "a?b"):
        answer = await admin.post("/v2/models", json=MODEL | {"name": name})
        assert answer.status_code == 422, name
        assert answer.json()["message"] == "name: want 1 to 128 of A-Z a-z 0-9 . _ : / -"


async def test_names_differ_by_case(admin: httpx.AsyncClient) -> None:
    for name in ("tiny", "Tiny", "TINY"):
        await create(admin, name=name)
    found = (await admin.get("/v2/models?name=Tiny")).json()["items"]
    assert [one["name"] for one in found] == ["Tiny"]
