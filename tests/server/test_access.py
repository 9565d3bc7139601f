"""Who sees which models: lists, reads, watches, and what gateways are told."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from sqlmodel import col, select

from gpustack.lib.secrets import digest
from gpustack.schemas.credentials import CredentialKind
from gpustack.server.db import tables
from gpustack.server.views import ADMIN, Audience
from tests.server.conftest import Plane
from tests.support.audit import entries

MODEL = {"source": "local_path", "local_path": "/srv/secret/m.gguf", "replicas": 0}
LIMITED = MODEL | {"access_policy": "allowed_users"}


class Users:
    """Ann and Bob, who are no administrators, each with an API key; and who administrates."""

    def __init__(self, plane: Plane, admin: httpx.AsyncClient) -> None:
        self.plane, self.admin = plane, admin
        self.ids: dict[str, int] = {}
        self.http: dict[str, httpx.AsyncClient] = {}

    async def add(self, name: str) -> None:
        """Not by logging in: that takes a password's time."""
        secret = f"gpustack_{name}"
        async with self.plane.db.write() as session:
            user = tables.User(username=name, password_hash="none")
            session.add(user)
            await session.flush()
            row = tables.Credential(
                kind="key", digest=digest(secret), name=name, user_id=user.id, scopes=["*"]
            )
            session.add(row)
        self.ids[name] = user.id or 0
        self.http[name] = await self.plane.client(secret)

    async def ok(self, method: str, path: str, body: Any = None) -> Any:
        """What an administrator is answered."""
        answer = await self.admin.request(method, path, json=body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    async def model(self, name: str, **more: Any) -> int:
        made = await self.ok("POST", "/v2/models", MODEL | {"name": name} | more)
        return int(made["id"])

    async def limited(self, name: str) -> int:
        return await self.model(name, access_policy="allowed_users")

    async def group(self, name: str, *members: str) -> int:
        made = await self.ok("POST", "/v2/groups", {"name": name})
        await self.join(made["id"], *members)
        return int(made["id"])

    async def join(self, group: int, *members: str) -> None:
        ids = [self.ids[member] for member in members]
        await self.ok("POST", f"/v2/groups/{group}/members", {"user_ids": ids})

    async def grant(self, model: int, *users: str, groups: tuple[int, ...] = ()) -> Any:
        body = {"user_ids": [self.ids[name] for name in users], "group_ids": [*groups]}
        return await self.ok("PUT", f"/v2/models/{model}/access", body)

    async def seen(self, who: str, **query: Any) -> list[str]:
        answer = (await self.http[who].get("/v2/models", params=query)).json()
        assert answer["pagination"]["total"] == len(answer["items"])
        return [one["name"] for one in answer["items"]]


@pytest.fixture
async def users(plane: Plane) -> Users:
    made = Users(plane, await plane.admin())
    for name in ("ann", "bob"):
        await made.add(name)
    return made


async def watched(plane: Plane, http: httpx.AsyncClient, path: str) -> AsyncGenerator[Any, None]:
    """The events of a watch but heartbeats; an in-process client would wait for its end.

    Fails when none comes for long.
    """
    scope = {
        "type": "http", "method": "GET", "path": path.partition("?")[0], "raw_path": b"",
        "query_string": path.partition("?")[2].encode(), "http_version": "1.1", "scheme": "http",
        "headers": [(b"authorization", http.headers["authorization"].encode())],
        "client": ("test", 1), "server": ("test", 80), "root_path": "",
    }  # fmt: skip
    lines: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
        elif body := message.get("body"):
            lines.put_nowait(body)
        else:
            lines.put_nowait(None)

    task = asyncio.ensure_future(plane.app(scope, receive, send))
    try:
        while (event := await asyncio.wait_for(_news(lines), 30)) is not None:
            yield event
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _news(lines: "asyncio.Queue[bytes | None]") -> Any:
    """The next event that is no heartbeat; None: there will be none."""
    while (line := await lines.get()) is not None:
        if (event := json.loads(line))["type"] != "heartbeat":
            return event
    return None


async def until_synced(events: AsyncGenerator[Any, None]) -> list[str]:
    """Names of what is listed."""
    names = []
    async for event in events:
        if event["type"] == "synced":
            break
        if event["type"] == "put":
            names.append(event["data"]["name"])
    return names


async def until(events: AsyncGenerator[Any, None], wanted: str, id: int = 0) -> list[Any]:
    """The ids of what is told before the event that is wanted; `end`: that nothing more comes.

    Controllers write to models as well, when they like: the same may be told twice.
    """
    before: list[int] = []
    async for event in events:
        if (event["type"], event.get("id")) == (wanted, id):
            return before
        before.append(event.get("id"))
    assert wanted == "end", before
    return before


async def test_users_see_what_is_every_users_or_granted_to_them_or_their_groups(
    users: Users,
) -> None:
    open_, hers = await users.model("open"), await users.limited("hers")
    theirs, nobodys = await users.limited("theirs"), await users.limited("nobodys")
    await users.grant(hers, "ann")
    group = await users.group("team", "bob")
    await users.grant(theirs, groups=(group,))
    assert await users.seen("ann") == ["open", "hers"]
    assert await users.seen("bob") == ["open", "theirs"]
    assert await users.seen("bob", search="t", sort_by="-name") == ["theirs"]
    assert await users.seen("ann", name="nobodys") == []
    assert len((await users.ok("GET", "/v2/models"))["items"]) == 4
    for who, model, status in (
        ("ann", hers, 200), ("ann", theirs, 404), ("bob", theirs, 200), ("bob", open_, 200),
    ):  # fmt: skip
        assert (await users.http[who].get(f"/v2/models/{model}")).status_code == status
    # What is not granted and what is not there are told in the same words.
    missing = nobodys + 100
    answers = [(await users.http["ann"].get(f"/v2/models/{n}")).json() for n in (nobodys, missing)]
    told = [
        str(one).replace(str(n), "N") for one, n in zip(answers, (nobodys, missing), strict=True)
    ]
    assert told[0] == told[1]


async def test_a_model_shows_users_nothing_that_is_for_who_runs_it(users: Users) -> None:
    told = {"env": {"HF_TOKEN": "hf_secret"}, "backend_parameters": ["--ctx-size=512"]}
    model = await users.model("m", worker_selector={"room": "1"}, **told)
    async with users.plane.db.write() as session:
        version = (await session.exec(select(tables.ModelVersion))).one()
        said = {"source": "/srv/secret/m.gguf", "problem": "no /srv/secret"}
        version.profile = {"weights_bytes": 1} | said
        version.problem = "no /srv/secret/m.gguf"
    ann = users.http["ann"]
    (listed,) = (await ann.get("/v2/models")).json()["items"]
    async with aclosing(watched(users.plane, ann, "/v2/models?watch=true")) as events:
        told_of = (await anext(events))["data"]
    for shown in ((await ann.get(f"/v2/models/{model}")).json(), listed, told_of):
        assert (shown["name"], shown["local_path"]) == ("m", "m.gguf")
        assert (shown["env"], shown["backend_parameters"], shown["worker_selector"]) == ({}, [], {})
        assert "secret" not in json.dumps(shown)
    whole = await users.ok("GET", f"/v2/models/{model}")
    assert whole["env"] == told["env"]
    root = await users.model("root", local_path="/", backend="llama-box")
    assert (await ann.get(f"/v2/models/{root}")).json()["local_path"] == "/"


#: What is an administrator's alone.
REFUSED = [
    ("GET", "/v2/groups", None),
    ("GET", "/v2/groups/1", None),
    ("POST", "/v2/groups", {"name": "mine"}),
    ("PUT", "/v2/groups/1", {"name": "mine"}),
    ("DELETE", "/v2/groups/1", None),
    ("GET", "/v2/groups/1/members", None),
    ("POST", "/v2/groups/1/members", {"user_ids": [2]}),
    ("DELETE", "/v2/groups/1/members/2", None),
    ("GET", "/v2/models/1/access", None),
    ("PUT", "/v2/models/1/access", {"user_ids": [2]}),
    ("PATCH", "/v2/models/1", {"access_policy": "authed"}),
    ("GET", "/v2/models/1/versions", None),
    ("GET", "/v2/models/1/instances", None),
    ("GET", "/v2/models/1/events", None),
    ("GET", "/v2/model-instances", None),
    ("GET", "/v2/watch?kinds=models", None),
    ("GET", "/v2/events", None),
    ("GET", "/v2/dashboard", None),
]


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True, scope="session")
async def test_nobody_else_grants_anything_or_sees_the_cluster(users: Users) -> None:
    """The same answer whether there is such a thing or not: it tells nothing."""
    ann = users.http["ann"]
    refused = [await ann.request(how, path, json=body) for how, path, body in REFUSED]
    await users.limited("there")
    await users.group("there", "bob")
    again = [await ann.request(how, path, json=body) for how, path, body in REFUSED]
    assert {one.status_code for one in refused} == {403}
    assert [one.text for one in refused] == [one.text for one in again]
    assert (await users.ok("GET", "/v2/models/1/access"))["users"] == []
    assert (await users.ok("GET", "/v2/groups/1"))["members"] == 1


async def test_a_watch_tells_of_what_is_granted_and_of_nothing_else(users: Users) -> None:
    hers, other = await users.limited("hers"), await users.limited("other")
    await users.grant(hers, "ann")
    async with aclosing(watched(users.plane, users.http["ann"], "/v2/models?watch=true")) as events:
        assert await until_synced(events) == ["hers"]
        await users.ok("PATCH", f"/v2/models/{other}", {"description": "not for her"})
        await users.ok("PATCH", f"/v2/models/{hers}", {"description": "hers"})
        assert other not in await until(events, "put", hers)
        await users.grant(other, "ann")
        await until(events, "put", other)
        await users.grant(hers, "bob")
        await until(events, "delete", hers)
        await users.ok("PATCH", f"/v2/models/{hers}", {"description": "not for her"})
        await users.ok("PATCH", f"/v2/models/{other}", {"description": "hers"})
        assert hers not in await until(events, "put", other)
        await users.ok("PATCH", f"/v2/models/{hers}", {"access_policy": "authed"})
        await until(events, "put", hers)
    cursor = users.plane.feed.cursor(1)
    path = f"/v2/models?watch=true&since={cursor}"
    async with aclosing(watched(users.plane, users.http["bob"], path)) as events:
        assert (await anext(events))["type"] == "resync"  # whatever it was shown then
        assert await until_synced(events) == ["hers"]


async def test_a_watch_ends_when_its_users_groups_are_others(users: Users) -> None:
    group, model = await users.group("team"), await users.limited("theirs")
    await users.grant(model, groups=(group,))
    path = "/v2/models?watch=true"
    for change in ("POST", "DELETE"):
        async with aclosing(watched(users.plane, users.http["ann"], path)) as events:
            assert await until_synced(events) == ([] if change == "POST" else ["theirs"])
            if change == "POST":
                await users.join(group, "ann")
            else:
                await users.ok("DELETE", f"/v2/groups/{group}/members/{users.ids['ann']}")
            await until(events, "end")
    await users.join(group, "ann")
    async with aclosing(watched(users.plane, users.http["ann"], path)) as events:
        assert await until_synced(events) == ["theirs"]
        await users.ok("DELETE", f"/v2/groups/{group}")
        await until(events, "end")
    async with aclosing(watched(users.plane, users.http["ann"], path)) as events:
        assert await until_synced(events) == []
    assert await users.seen("ann") == []


async def test_a_watch_whose_credential_changed_while_it_was_let_in_ends_at_once(
    users: Users,
) -> None:
    """Nobody else would end it: the news came before it was there."""
    kinds, feed = frozenset({"models"}), users.plane.feed
    async with users.plane.db.read() as session:
        keys = select(tables.Credential).where(col(tables.Credential.user_id) == users.ids["ann"])
        key = (await session.exec(keys)).one().id
    in_group = Audience(CredentialKind.KEY, user_id=users.ids["ann"], group_ids=frozenset({99}))
    assert [line async for line in feed.watch(kinds, in_group, credential_id=key)] == []
    as_admin = feed.watch(kinds, ADMIN, credential_id=key, by_admin=True)
    assert [line async for line in as_admin] == []
    assert [line async for line in feed.watch(kinds, ADMIN, credential_id=999)] == []  # deleted


async def test_who_is_no_administrator_any_more_watches_no_more_than_is_granted(
    users: Users,
) -> None:
    await users.limited("other")
    ann = f"/v2/users/{users.ids['ann']}"
    await users.ok("PUT", ann, {"username": "ann", "is_admin": True})
    path = "/v2/models?watch=true"
    async with aclosing(watched(users.plane, users.http["ann"], path)) as events:
        assert await until_synced(events) == ["other"]
        await users.ok("PUT", ann, {"username": "ann", "is_admin": False})
        await until(events, "end")
    assert await users.seen("ann") == []


async def test_gateways_are_told_who_may_and_membership_touches_no_model(users: Users) -> None:
    open_, limited = await users.model("open"), await users.limited("limited")
    group = await users.group("team")
    gateway = await users.plane.gateway()
    path = "/v2/watch?kinds=models,credentials"
    async with aclosing(watched(users.plane, gateway, path)) as events:
        models: dict[int, Any] = {}
        async for event in events:
            if event["type"] == "synced":
                break
            if event["kind"] == "models":
                models[event["id"]] = event["data"]["granted_to"]
        assert models == {open_: None, limited: {"user_ids": [], "group_ids": []}}
        await users.grant(limited, "bob", "ann", groups=(group,))
        ids = sorted(users.ids.values())
        await granted_to(events, limited, {"user_ids": ids, "group_ids": [group]})
        await users.join(group, "ann")
        async for event in events:
            if event.get("kind") == "credentials" and event["data"]["group_ids"] == [group]:
                assert event["data"]["user_id"] == users.ids["ann"]
                break
        revision = int(event["cursor"].partition(".")[2]) + 1
        async with users.plane.db.read() as session:
            its = select(tables.Change).where(col(tables.Change.revision) == revision)
            changed = {row.kind for row in (await session.exec(its)).all()}
        assert changed == {"credentials"}  # however many models the group was granted
        await users.ok("DELETE", f"/v2/groups/{group}")
        await granted_to(events, limited, {"user_ids": ids, "group_ids": []})


async def granted_to(events: AsyncGenerator[Any, None], model: int, grants: Any) -> None:
    """Return once a gateway is told this of the model."""
    async for event in events:
        if (event.get("kind"), event.get("id")) == ("models", model):
            if event["data"]["granted_to"] == grants:
                return
    raise AssertionError("the watch has ended")


async def test_groups_have_names_of_their_own_and_members(users: Users) -> None:
    group = await users.group("team", "ann")
    await users.join(group, "bob", "ann")
    assert (await users.ok("GET", f"/v2/groups/{group}"))["members"] == 2
    (listed,) = (await users.ok("GET", "/v2/groups?search=TEA"))["items"]
    assert listed["members"] == 2
    members = await users.ok("GET", f"/v2/groups/{group}/members?sort_by=-username")
    assert [one["username"] for one in members["items"]] == ["bob", "ann"]
    other = await users.group("other")
    for body, status in (
        ({"name": "team"}, 409), ({"name": ""}, 422), ({"name": "a\nb"}, 422),
        ({"name": "x", "members": 3}, 422),
    ):  # fmt: skip
        for method, path in (("POST", "/v2/groups"), ("PUT", f"/v2/groups/{other}")):
            answer = await users.admin.request(method, path, json=body)
            assert answer.status_code == status, (method, body, answer.text)
    changed = await users.ok("PUT", f"/v2/groups/{other}", {"name": "others", "generation": 1})
    assert (changed["name"], changed["generation"]) == ("others", 2)
    late = await users.admin.put(f"/v2/groups/{other}", json={"name": "late", "generation": 1})
    assert late.status_code == 409
    gone = await users.admin.delete(f"/v2/groups/{other}/members/{users.ids['ann']}")
    assert gone.status_code == 404
    kept = [one for one in await entries(users.plane) if one["kind"] == "groups"]
    assert {"added": ["ann"]} in [
        {"added": one["changed"]["members_added"]["after"]}
        for one in kept
        if "members_added" in one["changed"]
    ]


async def test_what_is_not_there_is_granted_nothing(users: Users) -> None:
    model = await users.limited("m")
    for body in ({"user_ids": [999]}, {"group_ids": [999]}):
        answer = await users.admin.put(f"/v2/models/{model}/access", json=body)
        assert answer.status_code == 422
        assert "id 999" in answer.json()["message"]
    granted = await users.grant(model, "ann")
    assert granted["users"] == [{"id": users.ids["ann"], "username": "ann"}]
    await users.ok("DELETE", f"/v2/users/{users.ids['ann']}")
    assert (await users.ok("GET", f"/v2/models/{model}/access"))["users"] == []


async def test_a_user_who_is_deleted_while_a_model_is_granted_leaves_nothing(users: Users) -> None:
    """Whoever comes first: both are answered, and no grant is of a user who is gone."""
    group = await users.group("team")
    for turn in range(5):
        name = f"user{turn}"
        await users.add(name)
        user = users.ids[name]
        model = await users.limited(name)
        wanted = {"user_ids": [user]}
        granted, joined, deleted = await asyncio.gather(
            users.admin.put(f"/v2/models/{model}/access", json=wanted),
            users.admin.post(f"/v2/groups/{group}/members", json=wanted),
            users.admin.delete(f"/v2/users/{user}"),
        )
        assert granted.status_code in {200, 422}
        assert joined.status_code in {204, 422}
        assert deleted.status_code == 204
        assert (await users.ok("GET", f"/v2/models/{model}/access"))["users"] == []
    assert (await users.ok("GET", f"/v2/groups/{group}"))["members"] == 0


async def test_the_policy_is_applied_and_exported_and_rolls_nothing(users: Users) -> None:
    await users.model("m", replicas=1)
    wanted = LIMITED | {"name": "m", "replicas": 1}
    plan = await users.ok("POST", "/v2/apply", {"models": [wanted], "dry_run": True})
    (change,) = plan["changes"]
    assert change["fields"] == {"access_policy": {"before": "authed", "after": "allowed_users"}}
    assert not change["rolls"]
    await users.ok("POST", "/v2/apply", {"models": [wanted]})
    assert (await users.ok("GET", "/v2/models/1"))["access_policy"] == "allowed_users"
    assert len((await users.ok("GET", "/v2/models/1/versions"))["items"]) == 1
    answer = await users.admin.patch("/v2/models/1", json={"access_policy": "everybody"})
    assert answer.status_code == 422
