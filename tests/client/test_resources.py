"""Every method of the client against a real node, and every route by a method."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx
import pytest

from gpustack.client import Client
from gpustack.errors import Conflict, Forbidden, Invalid, NotFound, Unavailable
from gpustack.schemas.access import GroupCreate, GroupUpdate
from gpustack.schemas.apply import Apply
from gpustack.schemas.credentials import ApiKeyCreate, ApiKeyUpdate, JoinTokenCreate
from gpustack.schemas.events import EventKind
from gpustack.schemas.model_files import ModelFileCreate, ModelFileState
from gpustack.schemas.models import AccessPolicy, Model, ModelCreate, ModelUpdate, Source
from gpustack.schemas.users import MeUpdate, UserCreate, UserUpdate
from gpustack.schemas.watch import EventType
from gpustack.schemas.workers import WorkerUpdate
from tests.client.conftest import FILE, REPO
from tests.support.node import Node
from tests.support.wait import eventually

#: What other parts of the product say to the server, and what needs no client.
NOT_FOR_USERS = re.compile(
    "POST /v2/workers/register|PUT /v2/workers/{worker_id}/(registration|status|heartbeat)"
    "|POST /v2/workers/{worker_id}/model-files|POST /v2/usage|POST /v2/watch/flush"
    "|PUT /v2/model-(instances|files)/{[a-z]+_id}/status|(GET|PUT) .*/log-level"
)


class Recorded(Client):
    """A client that keeps what it asked for: method and path."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.url, (node.data_dir / "local_admin").read_text().strip())
        self.asked: set[tuple[str, str]] = set()
        self._http.event_hooks["request"].append(self._note)

    async def _note(self, request: httpx.Request) -> None:
        self.asked.add((request.method, request.url.path))


@pytest.fixture
async def client(node: Node) -> AsyncIterator[Recorded]:
    async with Recorded(node) as client:
        yield client


def spec(name: str, **more: object) -> ModelCreate:
    source = {"source": Source.HUGGING_FACE, "huggingface_repo_id": REPO}
    return ModelCreate.model_validate(source | {"huggingface_filename": FILE, "name": name} | more)


async def use_models(client: Client) -> None:
    made = await client.models.create(spec("one", replicas=0))
    assert (await client.models.get(made.id)).name == "one"
    assert (await client.models.by_name("one")).id == made.id
    with pytest.raises(NotFound, match="no model is called none"):
        await client.models.by_name("none")
    with pytest.raises(Conflict, match="a model named one exists already"):
        await client.models.create(spec("one"))
    wanted = ModelUpdate.model_validate(spec("one", replicas=0, env={"A": "1"}).model_dump())
    assert (await client.models.update(made.id, wanted)).generation == 2
    assert (await client.models.patch(made.id, {"description": "x"})).description == "x"
    back = await client.models.roll_back(made.id)
    assert [one.generation for one in await client.models.versions(made.id)] == [
        back.generation, 2, 1,
    ]  # fmt: skip
    planned = await client.apply(Apply(models=[spec("two", replicas=0)], dry_run=True))
    assert [change.name for change in planned.changes] == ["two"]
    await client.apply(Apply(models=[spec("two", replicas=0)]))
    assert [one.name for one in await client.models.list(sort_by="-name")] == ["two", "one"]
    assert [one.name for one in await client.models.list(search="TW")] == ["two"]
    assert (await client.models.page(2, per_page=1)).pagination.totalPage == 2
    two = await client.models.by_name("two")
    (deletion,) = (await client.models.delete_many([two.id])).items
    assert deletion.deleting
    await client.models.delete(made.id)


async def use_instances(client: Client) -> None:
    model = await client.models.create(spec("runs"))

    async with asyncio.timeout(60), aclosing(client.instances.follow()) as changes:
        async for change in changes:
            if change.object and change.object.state == "running":
                break
    (instance,) = await client.instances.list(model_id=model.id, state=["running", "starting"])
    assert await client.instances.get(instance.id) == instance
    assert [one.id for one in await client.models.instances(model.id)] == [instance.id]
    assert b"".join([piece async for piece in client.instances.logs(instance.id, tail=5)])
    since = client.instances.logs(instance.id, since="2020-01-01T00:00:00Z", tail=1)
    assert b"".join([piece async for piece in since]).count(b"\n") <= 1
    with pytest.raises(NotFound, match="no previous log on this worker"):
        await anext(client.instances.logs(instance.id, previous=1))
    (engine,) = await client.workers.engines(instance.worker_id or 0)
    assert (engine.instance_name, engine.port, engine.phase) == (
        instance.name, instance.port, "running"
    )  # fmt: skip
    assert engine.age_s
    assert engine.log_bytes
    await client.instances.retry(instance.id)
    await client.instances.delete(instance.id)
    events = await client.events.of(EventKind.INSTANCES, instance.id, sort_by="first_at")
    assert {"created", "placed", "running"} <= {one.type.value for one in events}
    assert (await client.events.list(name="runs", type="created", limit=1))[0].name
    await client.models.delete(model.id)
    await eventually(lambda: _gone(client, model), "the model is gone")


async def _gone(client: Client, model: Model) -> bool:
    return not await client.models.list(name=model.name)


async def use_workers(client: Client, node: Node) -> None:
    (worker,) = await client.workers.list(state="ready")
    assert await client.workers.by_name(worker.name) == await client.workers.get(worker.id)
    changed = await client.workers.update(worker.id, WorkerUpdate(labels={"a": "b"}))
    assert changed.labels["a"] == "b"
    assert (await client.workers.cordon(worker.id, "disk swap")).scheduling == "cordoned"
    drained = await client.workers.drain(worker.id)
    assert (drained.scheduling, drained.scheduling_reason) == ("draining", "disk swap")
    assert (await client.workers.uncordon(worker.id)).scheduling_reason == ""
    for device in await client.gpu_devices.list(worker_id=worker.id):
        assert await client.gpu_devices.get(device.id) == device
    with pytest.raises(NotFound, match="there is no GPU device rack/a b:cuda:7"):
        await client.gpu_devices.get("rack/a b:cuda:7")
    with pytest.raises(NotFound):
        await client.workers.delete(worker.id + 1)


async def use_model_files(client: Client, node: Node) -> None:
    (worker,) = await client.workers.list()
    cached = node.data_dir / "cache/huggingface" / REPO / FILE

    async def ready() -> bool:
        return bool(await client.model_files.list(state="ready", worker_id=worker.id))

    await eventually(ready, "what the instance needed is shown")
    (file,) = await client.model_files.list()
    assert (file.location, file.resolved_paths) == (f"{REPO}:{FILE}", [str(cached)])
    await client.model_files.delete(file.id, cleanup=True)

    async def none() -> bool:
        return not await client.model_files.list()

    await eventually(none, "the file is cleaned up")
    assert not cached.exists()
    wanted = ModelFileCreate(
        source=Source.HUGGING_FACE, huggingface_repo_id=REPO, worker_id=worker.id
    )
    made = await client.model_files.create(wanted)
    async with asyncio.timeout(30), aclosing(client.model_files.follow()) as changes:
        async for change in changes:
            if change.object and change.object.state is ModelFileState.READY:
                break
    assert cached.exists()
    assert (await client.model_files.reset(made.id)).generation == 2
    assert (await client.model_files.get(made.id)).size == cached.stat().st_size
    await client.model_files.delete(made.id)


async def use_users(client: Client) -> None:
    eve = await client.users.create(UserCreate(username="eve"))
    assert eve.password
    wanted = UserUpdate(username="eva", is_admin=False)
    assert (await client.users.update(eve.id, wanted)).username == "eva"
    assert [one.username for one in await client.users.list(is_admin=False)] == ["eva"]
    assert (await client.users.get(eve.id)).require_password_change
    assert await client.users.reset_password(eve.id)
    assert await client.users.reset_password(eve.id, "Better-than-2") is None
    me = await client.users.me()
    assert (await client.users.update_me(MeUpdate(full_name="A"))).id == me.id
    await client.users.delete(eve.id)
    with pytest.raises(NotFound):
        await client.users.get(eve.id)


async def use_groups(client: Client) -> None:
    eve = await client.users.create(UserCreate(username="eve"))
    team = await client.groups.create(GroupCreate(name="team"))
    await client.groups.add(team.id, [eve.id])
    assert [one.username for one in await client.groups.members(team.id)] == ["eve"]
    changed = await client.groups.update(team.id, GroupUpdate(name="crew", generation=1))
    assert (await client.groups.by_name("crew")) == changed
    model = await client.models.create(
        spec("hers", replicas=0, access_policy=AccessPolicy.ALLOWED_USERS)
    )
    granted = await client.models.grant(model.id, [eve.id], [team.id])
    assert await client.models.access(model.id) == granted
    assert [one.name for one in granted.groups] == ["crew"]
    await client.models.delete(model.id)
    await client.groups.remove(team.id, eve.id)
    assert (await client.groups.get(team.id)).members == 0
    await client.groups.delete(team.id)
    await client.users.delete(eve.id)


async def use_api_keys(client: Client) -> None:
    key = await client.api_keys.create(ApiKeyCreate(name="k", expires_in=60))
    async with Client(client.base_url, key.value) as other, asyncio.timeout(10):
        async with aclosing(other.api_keys.follow()) as changes:
            types = [(await anext(changes)).type for _ in range(3)]
    assert types == [EventType.RESYNC, EventType.PUT, EventType.SYNCED]
    assert (await client.api_keys.update(key.id, ApiKeyUpdate(name="n"))).name == "n"
    assert [one.name for one in await client.api_keys.list()] == ["n"]
    assert (await client.api_keys.get(key.id)).prefix == key.prefix
    await client.api_keys.delete(key.id)
    assert await client.api_keys.list() == []


async def use_join_tokens(client: Client) -> None:
    made = await client.join_tokens.create(JoinTokenCreate(description="d", expires_in=60))
    assert made.value.startswith(made.prefix)
    assert [one.id for one in await client.join_tokens.list(sort_by="-expires_at")] == [made.id]
    await client.join_tokens.delete(made.id)
    assert (await client.join_tokens.page()).items == []
    assert len((await client.rotate_cluster_token()).value) == 32


async def use_what_is_only_read(client: Client) -> None:
    assert await client.usage.list(start_date="2020-01-01") == []
    assert await client.usage.sums(["date", "model"], limit=3) == []
    assert (await client.dashboard.get()).resource_counts.worker_count == 1
    assert (await client.dashboard.usage(model_ids=[1, 2])).top_users == []
    assert (await client.dashboard.usage_stats()).api_request_history == []
    assert {"port", "data_dir"} <= {one.key for one in await client.settings.list()}
    assert (await client.audit.list(action=["create", "update"], limit=150))[0].username == "admin"
    assert (await client.audit.verify()).problem is None
    with pytest.raises(Invalid, match="no_such_filter"):
        await client.workers.list(no_such_filter=1)


async def test_the_client_has_a_method_for_every_route(client: Recorded, node: Node) -> None:
    await use_models(client)
    await use_instances(client)
    await use_workers(client, node)
    await use_model_files(client, node)
    await use_users(client)
    await use_groups(client)
    await use_api_keys(client)
    await use_join_tokens(client)
    await use_what_is_only_read(client)
    async with aclosing(client.watch(["models"])) as events:
        assert (await anext(events)).type in {EventType.PUT, EventType.SYNCED}
    with node.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    routes = {
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        for method in methods
        if path.startswith("/v2/")
    }
    missing = [
        route
        for route in sorted(routes)
        if not NOT_FOR_USERS.fullmatch(route) and not _was_asked(route, client.asked)
    ]
    assert missing == [], "a new route needs a method of the client, and its call here"


def _was_asked(route: str, asked: set[tuple[str, str]]) -> bool:
    method, path = route.split(" ")
    path = path.replace("{device_id}", ".+")  # workers' names may hold slashes
    pattern = re.compile(re.sub(r"\{[a-z_]+\}", "[^/]+", path))
    return any(method == how and pattern.fullmatch(where) for how, where in asked)


async def test_a_followed_collection_goes_on_where_its_cursor_was(
    client: Recorded, node: Node
) -> None:
    async with asyncio.timeout(30), aclosing(client.models.follow()) as changes:
        async for change in changes:
            if change.type is EventType.SYNCED:
                break
    made = await client.models.create(spec("later", replicas=0))
    async with asyncio.timeout(30), aclosing(client.models.follow(change.cursor)) as changes:
        first = await anext(changes)
    assert first.type is EventType.PUT
    assert first.object is not None
    assert (first.id, first.object.name) == (made.id, "later")
    await client.models.delete(made.id)


async def test_a_user_who_is_no_administrator_follows_the_own_keys(
    client: Recorded, node: Node
) -> None:
    eve = await client.users.create(UserCreate(username="eve", password="Hunter-2"))
    async with httpx.AsyncClient(base_url=node.url) as browser:
        form = {"username": "eve", "password": "Hunter-2"}
        (await browser.post("/auth/login", data=form)).raise_for_status()
        key = (await browser.post("/v2/api-keys", json={"name": "hers"})).json()["value"]
    async with Client(node.url, key) as hers, asyncio.timeout(10):
        async with aclosing(hers.api_keys.follow()) as changes:
            seen = [await anext(changes) for _ in range(3)]
        assert [one.object.name for one in seen if one.object] == ["hers"]
        async with aclosing(hers.workers.follow()) as refused:
            assert (await anext(refused)).type is EventType.RESYNC
            with pytest.raises(Forbidden, match="this needs an administrator"):
                await anext(refused)
    await client.users.delete(eve.id)


async def test_a_server_that_is_away_is_one_error() -> None:
    async with Client("http://127.0.0.1:1", timeout_s=1) as client:
        for call in (client.models.list(), client.dashboard.get(), client.settings.list()):
            with pytest.raises(Unavailable, match="no answer from the server"):
                await call
