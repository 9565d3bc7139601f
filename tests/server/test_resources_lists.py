"""Lists: pages, filters, search and order are the same for every resource, and made in SQL."""

import contextlib
import itertools
import re
from typing import Any

import httpx
import pytest
from sqlmodel import select

from gpustack.schemas import wire
from gpustack.schemas.instances import InstanceState
from gpustack.server.db import tables
from gpustack.server.db.states import instance_state, worker_state
from gpustack.server.views import ADMIN, load
from tests.server.conftest import JOIN, Plane, registration
from tests.support.wait import eventually

MODEL = {"source": "local_path", "local_path": "/m.gguf", "replicas": 0}


class Undone(Exception):
    """Ends a transaction without a commit."""


async def deploy(http: httpx.AsyncClient, *names: str, **spec: Any) -> None:
    for name in names:
        answer = await http.post("/v2/models", json=MODEL | {"name": name} | spec)
        assert answer.status_code == 201, answer.text


async def names(http: httpx.AsyncClient, path: str = "/v2/models", **asked: Any) -> list[str]:
    answer = await http.get(path, params=asked)
    assert answer.status_code == 200, answer.text
    return [one["name"] for one in answer.json()["items"]]


def lists(plane: Plane) -> dict[str, dict[str, Any]]:
    """Each list's path -> its parameters by name, as the API describes them."""
    found = {}
    for path, methods in plane.app.openapi()["paths"].items():
        asked = {one["name"]: one for one in methods.get("get", {}).get("parameters", ())}
        if "perPage" in asked and "{" not in path:
            found[path] = asked
    return found


def words(parameter: dict[str, Any]) -> list[str]:
    """What a list can be sorted by."""
    found = re.match(r"\^-\?\((.+?)\)", parameter["schema"]["pattern"])
    assert found
    return found[1].split("|")


async def test_pages_follow_each_other_and_say_how_many_there_are(plane: Plane) -> None:
    admin = await plane.admin()
    await deploy(admin, *"abcde")
    pages = [(await admin.get(f"/v2/models?perPage=2&page={n}")).json() for n in (1, 2, 3, 4)]
    assert [[one["name"] for one in page["items"]] for page in pages] == [
        ["a", "b"], ["c", "d"], ["e"], []
    ]  # fmt: skip
    assert pages[1]["pagination"] == {"page": 2, "perPage": 2, "total": 5, "totalPage": 3}


async def test_nothing_is_a_page_too(plane: Plane) -> None:
    answer = (await (await plane.admin()).get("/v2/models")).json()
    empty = {"page": 1, "perPage": 100, "total": 0, "totalPage": 0}
    assert answer == {"items": [], "pagination": empty}


async def test_a_list_is_sorted_by_the_words_in_their_order(plane: Plane) -> None:
    admin = await plane.admin()
    await deploy(admin, "b", "d")
    await deploy(admin, "a", "c", replicas=1)
    assert await names(admin) == ["b", "d", "a", "c"]
    assert await names(admin, sort_by="name") == ["a", "b", "c", "d"]
    assert await names(admin, sort_by="-created_at") == ["c", "a", "d", "b"]
    assert await names(admin, sort_by="-replicas,name") == ["a", "c", "b", "d"]
    assert await names(admin, sort_by="replicas,-name", perPage=3, page=1) == ["d", "b", "c"]


async def test_what_is_searched_for_is_text_and_no_pattern(plane: Plane) -> None:
    admin = await plane.admin()
    await deploy(admin, "Qwen3-8B", "qwen_embed", "llama.3")
    assert await names(admin, search="QWEN") == ["Qwen3-8B", "qwen_embed"]
    assert await names(admin, search="_") == ["qwen_embed"]
    assert await names(admin, search="%") == []
    assert await names(admin, search="/") == []
    assert await names(admin, search="' OR 1=1 --") == []


async def test_filters_hold_together_and_any_of_several_values_does(plane: Plane) -> None:
    admin = await plane.admin()
    await deploy(admin, "chat", categories=["llm"])
    await deploy(admin, "embed", categories=["embedding", "reranker"])
    await deploy(admin, "other")
    assert await names(admin, categories="reranker") == ["embed"]
    assert await names(admin, categories=["llm", "embedding"]) == ["chat", "embed"]
    assert await names(admin, categories=["llm", "embedding"], search="e") == ["embed"]
    assert await names(admin, name="other", categories="llm") == []
    (chat,) = (await admin.get("/v2/models?name=chat")).json()["items"]
    changed = MODEL | {"name": "chat", "categories": ["reranker"]}
    await admin.put(f"/v2/models/{chat['id']}", json=changed)
    assert await names(admin, categories="llm") == []  # no older version counts
    assert await names(admin, categories="reranker") == ["chat", "embed"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("perPage=101", "perPage: Input should be less than or equal to 100"),
        ("page=0", "page: Input should be greater than or equal to 1"),
        (
            "sort_by=nmae",
            "sort_by: want some of name, replicas, created_at, updated_at, got 'nmae'",
        ),
        ("sort_by=", "sort_by: want some of name, replicas, created_at, updated_at, got ''"),
        ("naem=x", "naem: unknown parameter"),
        ("categories=chat", "categories.0: Input should be 'llm', 'embedding' or 'reranker'"),
        ("search=%00", "search: a text holds NUL or half a surrogate pair, which is no character"),
    ],
)
async def test_what_cannot_be_asked_is_one_clear_sentence(
    plane: Plane, asked: str, sentence: str
) -> None:
    answer = await (await plane.admin()).get(f"/v2/models?{asked}")
    assert answer.status_code == 422
    assert answer.json() == {"code": "invalid", "message": sentence, "detail": {}}


async def test_a_watch_is_of_all_there_is(plane: Plane) -> None:
    answer = await (await plane.admin()).get("/v2/models?watch=true&search=a&name=b")
    assert answer.status_code == 400
    assert answer.json()["message"] == "watch=true is of all there is: leave out search, name"


async def test_every_list_knows_pages_and_can_be_sorted_by_each_of_its_words(plane: Plane) -> None:
    admin = await plane.admin()
    await plane.worker()
    await deploy(admin, "m", replicas=1)
    await admin.post("/v2/api-keys", json={"name": "k"})
    for path, asked in lists(plane).items():
        page = (await admin.get(path)).json()
        assert set(page) == {"items", "pagination"}, path
        search = {"search": "m"} if "search" in asked else {}
        # Start options are no rows: they come in the order of the help.
        for word in words(asked["sort_by"]) if path != "/v2/settings" else ():
            for sort_by in (word, f"-{word}"):
                answer = await admin.get(path, params={"sort_by": sort_by} | search)
                assert answer.status_code == 200, (path, sort_by, answer.text)
        for wrong in ("perPage=101", "page=0", "sort_by=x", "naem=x"):
            answer = await admin.get(f"{path}?{wrong}")
            assert answer.status_code == 422, (path, wrong)
            assert answer.json()["message"].startswith(wrong.split("=")[0]), (path, wrong)


async def test_an_instances_state_in_sql_is_the_one_that_it_shows(plane: Plane) -> None:
    """Every combination of what a state is computed from; undone before a controller sees it."""
    await deploy(await plane.admin(), "m")
    heard, silent = await plane.worker("heard"), await plane.worker("silent")
    with contextlib.suppress(Undone):
        async with plane.db.write() as session:
            (await session.get_one(tables.Worker, silent.id)).silent = True
            places, reported = [None, heard.id, silent.id], [None, *InstanceState]
            facts = list(itertools.product(places, [True, False], reported))
            session.add_all(
                tables.Instance(
                    name=f"m-{number}",
                    model_id=1,
                    version_id=1,
                    worker_id=place,
                    deleting=deleting,
                    reported_state=state,
                )
                for number, (place, deleting, state) in enumerate(facts)
            )
            await session.flush()
            found = await session.exec(select(tables.Instance.id, instance_state()))
            in_sql = dict(found.all())
            shown = {one.id: one.view(ADMIN) for one in await load(session, wire.INSTANCES)}
            raise Undone
    assert len(in_sql) == len(facts)
    assert in_sql == {key: view.model_dump()["state"] for key, view in shown.items()}


async def test_instances_are_found_by_what_they_belong_to_and_their_state(plane: Plane) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    await deploy(admin, "a", "b", replicas=2)
    path = "/v2/model-instances"

    async def placed() -> bool:
        return len(await names(admin, path, state="scheduled")) == 4

    await eventually(placed, "all four are placed")
    of_b = await names(admin, path, model_id=2)
    assert {name[:2] for name in of_b} == {"b-"}
    assert await names(admin, path, worker_id=agent.id, model_id=2) == of_b
    assert await names(admin, path, worker_id=9) == []
    (first, *_) = (await admin.get(path)).json()["items"]
    await agent.say(first["id"], "starting")
    assert await names(admin, path, state="starting") == [first["name"]]
    assert len(await names(admin, path, state=["starting", "scheduled"])) == 4
    assert await names(admin, path, id=first["id"]) == [first["name"]]


async def test_a_models_instances_are_listed_where_older_clients_ask_for_them(plane: Plane) -> None:
    admin = await plane.admin()
    await deploy(admin, "a", "b", replicas=2)

    async def all_there() -> bool:
        return len(await names(admin, "/v2/model-instances")) == 4

    await eventually(all_there, "each has two")
    for id in (1, 2):
        asked = {"sort_by": "-name", "state": "pending"}
        shown = await names(admin, f"/v2/models/{id}/instances", **asked)
        assert len(shown) == 2
        assert shown == await names(admin, "/v2/model-instances", **asked, model_id=id)
    assert (await admin.get("/v2/models/99/instances")).status_code == 404


async def test_a_workers_state_in_sql_is_the_one_that_it_shows(plane: Plane) -> None:
    for name in ("ready", "gone", "mute", "gone and mute"):
        await plane.worker(name)
    with contextlib.suppress(Undone):
        async with plane.db.write() as session:
            for row in (await session.exec(select(tables.Worker))).all():
                row.silent = "gone" in row.name
                row.facts = None if "mute" in row.name else row.facts
            await session.flush()
            in_sql = (await session.exec(select(tables.Worker.name, worker_state()))).all()
            shown = [one.view(ADMIN).model_dump() for one in await load(session, wire.WORKERS)]
            raise Undone
    assert sorted(in_sql) == sorted((view["name"], view["state"]) for view in shown)
    assert len(set(in_sql)) == 4


async def test_workers_are_found_by_their_state_name_and_address(plane: Plane) -> None:
    admin, joiner = await plane.admin(), await plane.client(JOIN)
    await plane.worker("ready")
    await joiner.post("/v2/workers/register", json=registration("mute", ip="10.0.0.9"))
    path = "/v2/workers"
    assert await names(admin, path, state="ready") == ["ready"]
    assert await names(admin, path, state="not_ready") == ["mute"]
    assert await names(admin, path, state=["ready", "not_ready"]) == ["ready", "mute"]
    assert await names(admin, path, sort_by="state") == ["mute", "ready"]
    assert await names(admin, path, search="0.0.9") == ["mute"]
    assert await names(admin, path, search="READ") == ["ready"]
