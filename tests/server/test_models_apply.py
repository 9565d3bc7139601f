"""Bringing a cluster to what a file says, over the real API and database."""

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlmodel import select

from gpustack.cli.manifest import parse, render
from gpustack.schemas.models import Model
from gpustack.server.db import tables
from tests.server.conftest import Plane
from tests.support.model_specs import specs
from tests.support.wait import eventually

TINY = {"name": "tiny", "source": "local_path", "local_path": "/models/tiny.gguf", "replicas": 0}
HUB = {"name": "hub", "source": "huggingface", "huggingface_repo_id": "org/x-GGUF", "replicas": 0}


@pytest.fixture
async def admin(monkeypatch: pytest.MonkeyPatch, plane: Plane) -> httpx.AsyncClient:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nobody is there
    return await plane.admin()


async def apply(admin: httpx.AsyncClient, *models: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = await admin.post("/v2/apply", json={"models": models} | more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def models(admin: httpx.AsyncClient) -> list[dict[str, Any]]:
    return list((await admin.get("/v2/models")).json()["items"])


def said(applied: dict[str, Any]) -> list[tuple[str, str]]:
    return [(change["action"], change["name"]) for change in applied["changes"]]


async def test_models_are_created_updated_and_left_alone(admin: httpx.AsyncClient) -> None:
    await apply(admin, TINY, HUB)
    assert [m["name"] for m in await models(admin)] == ["tiny", "hub"]
    changed = TINY | {"description": "d", "env": {"A": "1"}, "replicas": 1}
    dry = await apply(admin, HUB, changed, {**HUB, "name": "new"}, dry_run=True)
    assert said(dry) == [("update", "tiny"), ("create", "new")]
    update, creation = dry["changes"]
    assert update["fields"] == {
        "description": {"before": None, "after": "d"},
        "env": {"before": {}, "after": {"A": "1"}},
        "replicas": {"before": 0, "after": 1},
    }
    assert (update["generation"], update["rolls"]) == (1, True)
    assert creation["fields"]["huggingface_repo_id"] == {"before": None, "after": "org/x-GGUF"}
    assert (creation["generation"], "description" in creation["fields"]) == (None, False)
    assert len(await models(admin)) == 2  # it was dry
    done = await apply(admin, HUB, changed, {**HUB, "name": "new"}, plan=dry["plan"])
    assert (done["changes"], done["dry_run"]) == (dry["changes"], False)
    assert {m["name"]: m["generation"] for m in await models(admin)} == {
        "tiny": 2,
        "hub": 1,
        "new": 1,
    }
    assert (await apply(admin, HUB, changed))["changes"] == []


async def test_what_a_file_leaves_out_is_the_default(admin: httpx.AsyncClient) -> None:
    await apply(admin, TINY | {"description": "d", "env": {"A": "1"}})
    applied = await apply(admin, TINY)
    assert applied["changes"][0]["fields"].keys() == {"description", "env"}


async def test_nothing_is_deleted_unless_it_is_asked_for(admin: httpx.AsyncClient) -> None:
    await apply(admin, TINY, HUB)
    assert (await apply(admin, TINY))["changes"] == []
    assert (await admin.post("/v2/apply", json={"prune": True})).json()["changes"] == []
    pruned = await apply(admin, TINY, prune=True)
    assert said(pruned) == [("delete", "hub")]
    assert [m["name"] for m in await models(admin) if not m["deleting"]] == ["tiny"]


async def test_a_plan_that_is_out_of_date_changes_nothing(admin: httpx.AsyncClient) -> None:
    await apply(admin, TINY)
    wanted = TINY | {"description": "mine"}
    dry = await apply(admin, wanted, prune=True, dry_run=True)
    for method, path, change in (
        ("PATCH", "/v2/models/1", {"env": {"B": "2"}}),
        ("POST", "/v2/models", HUB),
    ):
        assert (await admin.request(method, path, json=change)).is_success
        body = {"models": [wanted], "prune": True, "plan": dry["plan"]}
        late = await admin.post("/v2/apply", json=body)
        assert (late.status_code, late.json()["code"]) == (409, "conflict")
        dry = late.json()["detail"]["current"]
    assert said(dry) == [("update", "tiny"), ("delete", "hub")]
    assert (await models(admin))[0]["description"] is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (HUB | {"backend_parameters": ["--port=1"]}, "model hub: backend parameter --port"),
        (TINY, "model tiny is there twice"),
        (HUB | {"huggingface_repo_id": "org/x"}, "model hub: no backend runs org/x"),
    ],
)
async def test_one_mistake_and_nothing_is_done(
    admin: httpx.AsyncClient, bad: dict[str, Any], message: str
) -> None:
    for dry_run in (True, False):
        body = {"models": [TINY, bad], "dry_run": dry_run}
        answer = await admin.post("/v2/apply", json=body)
        assert answer.status_code == 422
        assert message in answer.json()["message"]
        assert answer.json()["detail"]["index"] == 1
    assert await models(admin) == []


async def test_a_model_that_is_being_deleted_is_in_the_way(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    await apply(admin, TINY)
    worker = await plane.worker()
    async with plane.db.write() as session:  # as while its engine is being ended
        row = (await session.exec(select(tables.Model))).one()
        version = (await session.exec(select(tables.ModelVersion))).one()
        session.add(
            tables.Instance(
                name="tiny-x", model_id=row.key()[1], version_id=version.id or 0,
                worker_id=worker.id,
            )
        )  # fmt: skip
        row.deleting = True
    answer = await admin.post("/v2/apply", json={"models": [HUB, TINY]})
    assert (answer.status_code, answer.json()["detail"]["index"]) == (409, 1)
    assert "is being deleted" in answer.json()["message"]
    assert len(await models(admin)) == 1


async def test_an_apply_without_a_plan_is_marked_in_the_audit_log(
    plane: Plane, admin: httpx.AsyncClient
) -> None:
    await apply(admin, TINY)
    dry = await apply(admin, TINY, HUB, dry_run=True)
    await apply(admin, TINY, HUB, plan=dry["plan"])
    async with plane.db.read() as session:
        entries = {row.name: row.remark for row in await session.exec(select(tables.AuditEntry))}
    assert "generation" in entries["tiny"]
    assert entries["hub"] == ""


async def test_only_administrators_apply(plane: Plane) -> None:
    stranger = await plane.client(None)
    assert (await stranger.post("/v2/apply", json={"models": []})).status_code == 401


# --- export, then apply ----------------------------------------------------------------------


@given(st.lists(specs(), max_size=4, unique_by=lambda spec: spec["name"]))
@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink one would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_what_is_exported_and_applied_changes_nothing(
    admin: httpx.AsyncClient, wanted: list[dict[str, Any]]
) -> None:
    await apply(admin, prune=True)

    async def empty() -> bool:
        return not await models(admin)

    await eventually(empty, "what the example before made is gone")
    await apply(admin, *wanted)
    before = await models(admin)
    assert [model["name"] for model in before] == [spec["name"] for spec in wanted]
    text = render([Model.model_validate(model) for model in before])
    manifest, _ = parse(text, "exported")
    body = manifest.model_dump(mode="json")
    for dry_run in (True, False):
        answer = await admin.post("/v2/apply", json=body | {"prune": True, "dry_run": dry_run})
        assert answer.json().get("changes") == [], (answer.text, text)
    assert [model["generation"] for model in await models(admin)] == [1] * len(wanted)
