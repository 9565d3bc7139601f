"""Watches: gap-free, resumable, and never a burden to a writer."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlmodel import delete, select

from gpustack.lib.secrets import digest
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind
from gpustack.server.controllers.workers import ALL, Patience, Workers
from gpustack.server.db import history, tables
from gpustack.server.db.database import Database, current_revision
from gpustack.server.feed import Subscription, Told, _changes
from gpustack.server.views import ADMIN, GATEWAY, Audience
from tests.server.conftest import PASSWORD, Plane, Start, registration
from tests.support.wait import eventually

KINDS, API_KEYS = frozenset({wire.MODELS}), frozenset({wire.API_KEYS})
MODEL = {"source": "local_path", "local_path": "/m.gguf", "replicas": 0}


class Watch:
    """A watch of the feed, read line by line."""

    def __init__(self, lines: AsyncIterator[bytes]) -> None:
        self._lines = lines
        self.cursor = ""
        self.seen: list[dict[str, Any]] = []

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(5):
            event: dict[str, Any] = json.loads(await anext(self._lines))
        self.cursor = event["cursor"] or self.cursor
        self.seen.append(event)
        return event

    async def until(self, kind: str) -> list[dict[str, Any]]:
        """The events before the next one of type `kind`."""
        events = []
        while (event := await self.next())["type"] != kind:
            events.append(event)
        return events

    async def of(self, row_id: int, kind: str = "put") -> dict[str, Any]:
        """The next event of type `kind` about one object."""
        while (event := await self.next())["id"] != row_id or event["type"] != kind:
            pass
        return event


async def add(plane: Plane, *names: str) -> list[int]:
    admin = await plane.admin()
    answers = [await admin.post("/v2/models", json=MODEL | {"name": name}) for name in names]
    return [answer.json()["id"] for answer in answers]


async def test_a_watch_lists_then_says_synced_then_follows(plane: Plane) -> None:
    await add(plane, "a", "b")
    watch = Watch(plane.feed.watch(KINDS, ADMIN))
    listed = await watch.until("synced")
    assert [event["data"]["name"] for event in listed] == ["a", "b"]
    (created,) = await add(plane, "c")
    assert (await watch.of(created))["data"]["name"] == "c"
    admin = await plane.admin()
    await admin.delete(f"/v2/models/{created}")
    gone = await watch.of(created, "delete")
    assert (gone["kind"], gone["data"]) == ("models", None)


async def test_a_resumed_watch_gets_what_it_missed_and_nothing_else(plane: Plane) -> None:
    kinds = frozenset({wire.CREDENTIALS})
    admin, gateway = await plane.admin(), await plane.gateway()

    async def key(name: str) -> int:
        return int((await admin.post("/v2/api-keys", json={"name": name})).json()["id"])

    first, untouched = await key("a"), await key("b")
    watch = Watch(plane.feed.watch(kinds, GATEWAY))
    await watch.until("synced")
    added = await key("c")
    await admin.delete(f"/v2/api-keys/{first}")
    await gateway.post("/v2/watch/flush")
    resumed = Watch(plane.feed.watch(kinds, GATEWAY, since=watch.cursor))
    missed = [(event["type"], event["id"]) for event in await resumed.until("synced")]
    assert sorted(missed) == [("delete", first), ("put", added)]
    assert untouched not in dict(missed).values()


async def test_a_watch_that_is_cut_anywhere_resumes_without_a_gap(plane: Plane) -> None:
    """Also within one transaction, whose changes share a revision, and among kinds."""
    kinds = frozenset({wire.CREDENTIALS, wire.MODELS})
    watch = Watch(plane.feed.watch(kinds, GATEWAY))
    await watch.until("synced")
    start = watch.cursor
    async with plane.db.write() as session:
        session.add(_credential("x"))
        session.add(_credential("y"))
    await add(plane, "m")
    async with plane.db.write() as session:
        session.add(_credential("z"))
    gateway = await plane.gateway()
    await gateway.post("/v2/watch/flush")
    everything = await watch.until("heartbeat")
    assert len(everything) >= 4
    for cut in range(len(everything)):
        resumed = Watch(plane.feed.watch(kinds, GATEWAY, since=everything[cut]["cursor"] or start))
        rest = {(event["kind"], event["id"]) for event in await resumed.until("synced")}
        missed = {(event["kind"], event["id"]) for event in everything[cut + 1 :]}
        assert missed <= rest


@pytest.mark.parametrize("since", ["other.1", "nonsense", "other.", ""])
async def test_a_cursor_of_another_life_leads_to_resync_and_a_full_list(
    plane: Plane, since: str
) -> None:
    await add(plane, "a")
    watch = Watch(plane.feed.watch(KINDS, ADMIN, since=since))
    assert (await watch.next())["type"] == "resync"
    assert [event["data"]["name"] for event in await watch.until("synced")] == ["a"]


async def test_a_cursor_older_than_the_history_leads_to_resync(plane: Plane) -> None:
    watch = Watch(plane.feed.watch(KINDS, ADMIN))
    await watch.until("synced")
    await add(plane, "a", "b")
    async with plane.db.write() as session:
        newest = await current_revision(session)
        await session.exec(delete(tables.Change).where(tables.Change.revision < newest))  # type: ignore[arg-type]
    resumed = Watch(plane.feed.watch(KINDS, ADMIN, since=watch.cursor))
    assert (await resumed.next())["type"] == "resync"


async def test_flush_returns_after_everything_before_it_is_on_the_watch(plane: Plane) -> None:
    gateway = await plane.gateway()
    watch = Watch(plane.feed.watch(frozenset({wire.CREDENTIALS}), GATEWAY))
    await watch.until("synced")
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "k"})).json()
    cursor = (await gateway.post("/v2/watch/flush")).json()["cursor"]
    seen = await watch.until("heartbeat")
    assert key["id"] in {event["id"] for event in seen}
    assert int(watch.cursor.split(".")[1]) >= int(cursor.split(".")[1])


async def test_a_rolled_back_write_is_never_announced(plane: Plane) -> None:
    before = await _revision(plane.db)

    class BoomError(Exception):
        pass

    async def write_and_fail() -> None:
        async with plane.db.write() as session:
            session.add(_credential("x"))
            await session.flush()
            raise BoomError

    with pytest.raises(BoomError):
        await write_and_fail()
    assert await _revision(plane.db) == before


async def test_one_transaction_is_one_revision_and_commit_order_is_its_order(plane: Plane) -> None:
    before = await _revision(plane.db)

    async def one(number: int) -> None:
        async with plane.db.write() as session:
            session.add(_credential(f"a{number}"))
            session.add(_credential(f"b{number}"))

    await asyncio.gather(*(one(number) for number in range(20)))
    async with plane.db.read() as session:
        from sqlmodel import col, select

        rows = (
            await session.exec(
                select(tables.Credential)
                .where(
                    col(tables.Credential.digest).like("a%")
                    | col(tables.Credential.digest).like("b%")
                )
                .where(tables.Credential.revision > before)
                .order_by(col(tables.Credential.id))
            )
        ).all()
    assert [row.revision for row in rows] == [before + 1 + i // 2 for i in range(40)]


async def test_what_was_listed_does_not_go_back_in_time(plane: Plane) -> None:
    """A change from before the list, that arrives after it, is dropped."""
    kinds = frozenset({wire.CREDENTIALS})  # what no controller changes meanwhile
    admin = await plane.admin()
    listed = await create_key(admin, "a")
    newest = await _revision(plane.db)
    await plane.feed.reach(newest)  # the feed is done with it
    watch = Watch(plane.feed.watch(kinds, GATEWAY))
    await watch.next()
    for subscription in plane.feed._subscriptions:
        subscription.put((wire.CREDENTIALS, listed), Told(newest, b'"again"', is_there=True))
    await watch.until("synced")
    other = await create_key(admin, "b")
    assert (await watch.next())["id"] == other


async def test_the_history_gives_each_object_once_in_the_order_of_its_last_change(
    plane: Plane,
) -> None:
    before = await _revision(plane.db)
    async with plane.db.write() as session:
        first = _credential("1")
        session.add(first)
    async with plane.db.write() as session:
        second = _credential("2")
        session.add(second)
    async with plane.db.write() as session:
        (await session.get_one(tables.Credential, first.id)).name = "changed"
    async with plane.db.read() as session:
        changed = await _changes(session, before)
    assert [row_id for _, row_id in changed] == [second.id, first.id]


async def test_the_history_is_bounded_and_expired_credentials_go(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(plane, "a", "b", "c")
    async with plane.db.write() as session:
        old = _credential("old")
        old.expires_at = datetime(2020, 1, 1, tzinfo=UTC)
        session.add(old)
    monkeypatch.setattr(history, "KEPT_REVISIONS", 2)
    before = await _revision(plane.db)  # controllers may write on meanwhile
    await history.prune(plane.db)
    async with plane.db.read() as session:
        newest = await current_revision(session)
        kept = {row.revision for row in (await session.exec(select(tables.Change))).all()}
        assert await session.get(tables.Credential, old.id) is None
    assert newest in kept
    assert min(kept) > before - 2


async def test_what_expired_while_no_server_ran_is_gone_soon_after_the_start(
    start: Start, tmp_path: Path
) -> None:
    first = await start(tmp_path)
    async with first.db.write() as session:
        session.add(_credential("old", expires_at=datetime(2020, 1, 1, tzinfo=UTC)))
    second = await start(tmp_path)

    async def gone() -> bool:
        async with second.db.read() as session:
            query = select(tables.Credential).where(tables.Credential.digest == "old")
            return (await session.exec(query)).first() is None

    await eventually(gone, "the history is pruned at the start")


async def test_a_worker_that_says_again_who_it_is_is_no_news_of_its_instances(
    plane: Plane,
) -> None:
    admin, agent = await plane.admin(), await plane.worker("one")
    await admin.post("/v2/models", json=MODEL | {"name": "m", "replicas": 1})
    watch = Watch(plane.feed.watch(frozenset({wire.MODELS, wire.INSTANCES}), ADMIN))
    seen: dict[str, Any] = {}

    async def quiet() -> None:
        await plane.feed.reach(await _revision(plane.db))
        seen.update({event["kind"]: event["data"] for event in await watch.until("heartbeat")})

    await watch.until("synced")
    while (
        seen.get(wire.INSTANCES, {}).get("state") != "scheduled"
        or not seen[wire.MODELS]["profile"]
        or seen[wire.MODELS]["rollout"]["message"]
    ):
        await quiet()
    seen.clear()
    path = f"/v2/workers/{agent.id}/registration"
    again = registration("one", run_id="the next")
    assert (await agent.http.put(path, json=again)).status_code == 200
    await quiet()
    assert seen == {}


async def test_watchers_are_told_what_the_list_shows_when_a_worker_falls_silent_and_returns(
    plane: Plane,
) -> None:
    agent = await plane.worker("one")
    admin = await plane.admin()
    created = await admin.post("/v2/models", json=MODEL | {"name": "m", "replicas": 1})
    model_id = created.json()["id"]
    watch = Watch(plane.feed.watch(frozenset({wire.MODELS, wire.INSTANCES}), ADMIN))
    shown: dict[str, Any] = {}

    async def see(*expected: object) -> None:
        while (shown.get(wire.MODELS), shown.get(wire.INSTANCES)) != expected:
            event = await watch.next()
            if event["type"] == "put":
                key = "ready_replicas" if event["kind"] == wire.MODELS else "state"
                shown[event["kind"]] = event["data"][key]

    await see(0, "scheduled")
    (one,) = (await admin.get("/v2/model-instances")).json()["items"]
    await agent.say(one["id"], "starting")
    await agent.say(one["id"], "running")
    await see(1, "running")
    await Workers(plane.db, plane.app.state.heartbeats, Patience(timedelta(0))).reconcile(ALL)
    await see(0, "unreachable")
    path = f"/v2/workers/{agent.id}/registration"
    assert (await agent.http.put(path, json=registration("one"))).status_code == 200
    await see(1, "running")
    await admin.delete(f"/v2/models/{model_id}")
    await see(0, "stopping")


async def another_user(plane: Plane) -> httpx.AsyncClient:
    """A client of a second user, who is no administrator."""
    async with plane.db.write() as session:
        user = tables.User(username="second", password_hash="none")
        session.add(user)
        await session.flush()
        opens = _credential(digest("second-secret"), user_id=user.id, name="opens", scopes=["*"])
        session.add(opens)
    return await plane.client("second-secret")


async def create_key(http: httpx.AsyncClient, name: str) -> int:
    return int((await http.post("/v2/api-keys", json={"name": name})).json()["id"])


async def log_in_and_out(plane: Plane) -> None:
    browser = await plane.through_gateway()
    login = {"username": "admin", "password": PASSWORD}
    assert (await browser.post("/auth/login", data=login)).status_code == 204
    assert (await browser.post("/auth/logout")).status_code == 204


async def test_users_watch_their_own_keys_as_the_list_shows_them(plane: Plane) -> None:
    admin = await plane.admin()
    first = await create_key(admin, "first")
    watch = Watch(plane.feed.watch(API_KEYS, await _of_user(plane, "admin")))
    listed = await watch.until("synced")
    assert [(event["kind"], event["data"]["name"]) for event in listed] == [("api-keys", "first")]
    created = await create_key(admin, "second")
    put = await watch.of(created)
    assert put["data"] == (await admin.get(f"/v2/api-keys/{created}")).json()
    assert "digest" not in json.dumps(watch.seen)
    await admin.delete(f"/v2/api-keys/{first}")
    gone = await watch.of(first, "delete")
    assert (gone["kind"], gone["data"]) == ("api-keys", None)
    await log_in_and_out(plane)  # a session is a credential too, and no key
    await plane.feed.reach(await _revision(plane.db))
    assert await watch.until("heartbeat") == []
    await admin.put(f"/v2/api-keys/{created}", json={"name": "renamed"})
    resumed = Watch(plane.feed.watch(API_KEYS, await _of_user(plane, "admin"), since=watch.cursor))
    (missed,) = await resumed.until("synced")
    assert missed["data"]["name"] == "renamed"


async def test_nobody_hears_of_another_users_keys_nor_of_other_credentials(plane: Plane) -> None:
    admin, second = await plane.admin(), await another_user(plane)
    kept = await create_key(admin, "kept")
    mine = Watch(plane.feed.watch(API_KEYS, await _of_user(plane, "second")))
    listed = await mine.until("synced")
    assert [event["data"]["name"] for event in listed] == ["opens"]
    start = mine.cursor

    revoked = await create_key(admin, "revoked")
    await admin.put(f"/v2/api-keys/{kept}", json={"name": "renamed"})
    await admin.delete(f"/v2/api-keys/{revoked}")
    await plane.worker()
    await log_in_and_out(plane)
    own = await create_key(second, "own")
    await plane.feed.reach(await _revision(plane.db))

    (shown,) = (await second.get("/v2/api-keys", params={"page": 2, "perPage": 1})).json()["items"]
    assert shown["id"] == own
    assert [event["id"] for event in await mine.until("heartbeat")] == [own]
    resumed = Watch(plane.feed.watch(API_KEYS, await _of_user(plane, "second"), since=start))
    assert [event["id"] for event in await resumed.until("synced")] == [own]
    gateway = Watch(plane.feed.watch(frozenset({wire.CREDENTIALS}), GATEWAY))
    everything = await gateway.until("synced")
    assert {kept, own} < {event["id"] for event in everything}
    assert all(event["data"]["digest"] for event in everything)


async def test_only_keys_are_made_into_bytes_for_each_user(plane: Plane) -> None:
    one, other = await _of_user(plane, "admin"), Audience(CredentialKind.KEY, user_id=99)
    shared = (wire.MODELS, wire.INSTANCES, wire.WORKERS)
    assert all(one.of_kind(kind) == other.of_kind(kind) == ADMIN for kind in shared)
    assert one.of_kind(wire.API_KEYS) != other.of_kind(wire.API_KEYS)


async def test_the_route_of_the_keys_watch_is_for_users(plane: Plane) -> None:
    second, agent, gateway = await another_user(plane), await plane.worker(), await plane.gateway()
    for client in (agent.http, gateway):
        assert (await client.get("/v2/api-keys?watch=true")).status_code == 403
    assert (await gateway.get("/v2/watch?kinds=api-keys")).status_code == 403
    assert (await second.get("/v2/watch?kinds=api-keys")).status_code == 403  # administrators'
    plane.feed.close()  # so that the stream ends with what it begins with
    answer = await second.get("/v2/api-keys?watch=true&since=old.1")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["type"] for line in lines] == ["resync", "put", "synced"]
    assert lines[1]["data"]["name"] == "opens"


async def _of_user(plane: Plane, username: str) -> Audience:
    async with plane.db.read() as session:
        query = select(tables.User).where(tables.User.username == username)
        return Audience(CredentialKind.KEY, user_id=(await session.exec(query)).one().id)


async def test_a_watch_ends_with_the_key_that_opened_it(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "k"})).json()
    stays = (await admin.post("/v2/api-keys", json={"name": "stays"})).json()
    watch = Watch(plane.feed.watch(KINDS, ADMIN, credential_id=key["id"]))
    other = Watch(plane.feed.watch(KINDS, ADMIN, credential_id=stays["id"]))
    await watch.until("synced")
    await other.until("synced")
    await admin.delete(f"/v2/api-keys/{key['id']}")
    with pytest.raises(StopAsyncIteration):
        await watch.next()
    (model,) = await add(plane, "m")
    assert (await other.of(model))["data"]["name"] == "m"


async def test_an_object_that_cannot_be_shown_ends_no_watch(plane: Plane) -> None:
    odd, sound = await add(plane, "odd", "sound")
    watch = Watch(plane.feed.watch(KINDS, ADMIN))
    await watch.until("synced")
    async with plane.db.write() as session:
        (await session.get_one(tables.Model, odd)).placement_strategy = "none that exists"
        (await session.get_one(tables.Model, sound)).description = "still told of"
    while (await watch.of(sound))["data"]["description"] is None:
        pass
    fresh = Watch(plane.feed.watch(KINDS, ADMIN))
    assert [event["id"] for event in await fresh.until("synced")] == [sound]


async def test_a_stalled_watcher_costs_one_entry_per_object() -> None:
    subscription = Subscription(KINDS, ADMIN)
    for revision in range(100_000):
        subscription.put((wire.MODELS, revision % 3), Told(revision, b"{}", is_there=True))
    assert len(subscription.pending) == 3
    assert [told.revision for told in subscription.pending.values()] == [99_997, 99_998, 99_999]


async def test_each_audience_sees_only_what_is_for_it(plane: Plane, tmp_path: Path) -> None:
    agent = await plane.worker("one")
    admin = await plane.admin()
    await admin.post("/v2/models", json=MODEL | {"name": "tiny", "replicas": 1})
    kinds = frozenset({wire.INSTANCES})

    async def first(audience: Audience) -> dict[str, Any]:
        watch = Watch(plane.feed.watch(kinds, audience))
        while True:
            event = await watch.next()
            if event["type"] == "put" and event["data"]["worker_id"]:
                data: dict[str, Any] = event["data"]
                return data

    mine = await first(Audience.of(await _principal(agent.id)))
    assert mine["secret"]
    assert mine["spec"]["local_path"] == "/m.gguf"
    gateways = await first(GATEWAY)
    assert gateways["secret"] == mine["secret"]
    assert "spec" not in gateways
    users = await first(ADMIN)
    assert "secret" not in users
    other = Watch(plane.feed.watch(kinds, Audience.of(await _principal(agent.id + 1))))
    assert await other.until("synced") == []


async def _principal(worker_id: int) -> Any:
    from gpustack.server.auth.principals import Principal

    return Principal(CredentialKind.WORKER, worker_id=worker_id)


async def _revision(db: Database) -> int:
    async with db.read() as session:
        return await current_revision(session)


def _credential(digest: str, **more: Any) -> tables.Credential:
    return tables.Credential(**{"kind": "key", "digest": digest, "scopes": []} | more)
