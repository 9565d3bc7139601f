"""kill -9 of the server at any moment: nothing that was acknowledged is lost, nothing half done."""

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpustack.client import Client
from gpustack.schemas import wire
from tests.support.acknowledged import Count, Entry, Facts, Key
from tests.support.busy_admin import BusyAdmin
from tests.support.databases import KINDS, Databases
from tests.support.server_role import ServerRole
from tests.support.tables import Table, listed
from tests.support.wait import eventually

logger = logging.getLogger(__name__)

#: Of the server process.
KILLS = [
    pytest.param(12, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
]
ADMINS = 4
WATCHED = frozenset({wire.MODELS, wire.INSTANCES, wire.WORKERS, wire.API_KEYS})
#: The field whose new value the audit log has of each change of such an object.
SAYS = {"models": "description", "api-keys": "description", "users": "full_name"}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Databases]:
    with KINDS[request.param](tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture
async def server(databases: Databases, tmp_path: Path) -> AsyncIterator[ServerRole]:
    """Not started; its database is empty."""
    url = await databases.empty(tmp_path)
    made = ServerRole(tmp_path / "data", url)
    yield made
    await made.kill()
    made.close()
    await databases.drop(url)


class Cluster:
    """The server, all who use it, and what it must say after each restart.

    Attributes:
        cuts: requests that were cut, by whether they had happened; None: there was none to cut.
    """

    def __init__(self, server: ServerRole, http: httpx.AsyncClient, seed: int) -> None:
        self.server, self.http = server, http
        self.count = Count(0)
        self.admins = [
            BusyAdmin(f"a{number}", server, http, self.count, seed) for number in range(ADMINS)
        ]
        self.tables = [Table(WATCHED), Table(WATCHED)]
        self._audited, self._found = Counter[Entry](), Counter[Entry]()
        self._last_entry = 0
        self.cuts = Counter[bool | None]()

    async def begin(self) -> None:
        spec = {"name": "shared", "description": "0", "replicas": 0}
        where = {"source": "local_path", "local_path": "/models/0.gguf"}
        answer = await self.http.post("/v2/models", json=spec | where)
        assert answer.status_code == 201, answer.text
        self.count.model_id = answer.json()["id"]
        self._audited[Entry("create", "models", "shared", "0")] += 1

    async def check(self) -> None:
        """All that must hold while nobody changes anything."""
        world, ids = await self._seen()
        for admin in self.admins:
            self.cuts[admin.known.settle(world)] += 1
            admin.ids |= {key: ids[key] for key in ids if key[1].startswith(admin.known.prefix)}
            await admin.prove()
        shared = world["models", "shared"]
        for number in self.count.settle(int(shared["description"])):
            self._audited[Entry("update", "models", "shared", str(number))] += 1
        await self._check_audit_log()
        await eventually(self._watchers_agree, "the watchers have seen all")
        assert [table.lists for table in self.tables] == [1, 1], "a watcher had to begin anew"

    # --- what is there -----------------------------------------------------------------------

    async def _seen(self) -> tuple[dict[Key, Facts], dict[Key, int]]:
        """What the lists show, less what is being deleted; and the id of each."""
        facts: dict[Key, Facts] = {}
        for kind in ("models", "model-instances", "workers", "users", "api-keys"):
            for one in await self._all(f"/v2/{kind}"):
                if kind != "models" or not one["deleting"]:
                    facts[kind, one.get("username") or one["name"]] = one | _inner(one)
        ids = {key: one["id"] for key, one in facts.items()}
        for one in await self._all("/v2/usage/sums", group_by="model"):
            rows = await self._all("/v2/usage", model_id=one["model_id"])
            sums = {"requests": one["request_count"], "tokens": one["prompt_token_count"]}
            facts["usage", one["model_name"]] = sums
            tokens = sum(row["prompt_token_count"] for row in rows)
            assert sums == {"requests": len(rows), "tokens": tokens}
        return facts, ids

    async def _get(self, path: str, **asked: Any) -> Any:
        answer = await self.http.get(path, params=asked)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    async def _all(self, path: str, **asked: Any) -> list[Any]:
        items: list[Any] = []
        page = 1
        while True:
            body = await self._get(path, page=page, **asked)
            items += body["items"]
            if page >= body["pagination"]["totalPage"]:
                return items
            page += 1

    async def watchers_are_ready(self) -> bool:
        """Whether they had their first list: one that is cut has to be begun anew."""
        return all(table.synced for table in self.tables)

    async def _watchers_agree(self) -> bool:
        rows = await listed(self.http, WATCHED)
        return all(table.rows == rows for table in self.tables)

    # --- who did it --------------------------------------------------------------------------

    async def _check_audit_log(self) -> None:
        checked = await self._get("/v2/audit/verify")
        assert checked["problem"] is None, checked
        self._found.update(_entry(one) for one in await self._new_entries())
        wanted = sum((admin.known.audited for admin in self.admins), self._audited)
        # Those that went with their worker are whatever the scheduler had put there.
        instances = [one for one in self._found if one.kind == wire.INSTANCES]
        assert {self._found[one] for one in instances} <= {1}, instances
        found = self._found - Counter(instances)
        assert found - wanted == Counter(), "nobody did this, or it is there twice"
        assert wanted - found == Counter(), "this is not in the audit log"

    async def _new_entries(self) -> list[Any]:
        """Those that were added since the last time."""
        new: list[Any] = []
        page = 1
        while True:
            body = await self._get("/v2/audit", page=page)
            new += [one for one in body["items"] if one["id"] > self._last_entry]
            is_last = page >= body["pagination"]["totalPage"]
            if is_last or body["items"][-1]["id"] <= self._last_entry:
                self._last_entry = new[0]["id"] if new else self._last_entry
                return new
            page += 1

    # --- that all goes on --------------------------------------------------------------------

    async def converge(self) -> None:
        """The workers do what is wanted of them until every model has its instances."""
        wanted = {
            key[1]: facts["replicas"]
            for admin in self.admins
            for key, facts in admin.known.there.items()
            if key[0] == "models" and facts
        } | {"shared": 0}

        async def is_right() -> bool:
            for admin in self.admins:
                await admin.tend()
            counts = dict.fromkeys((one["name"] for one in await self._all("/v2/models")), 0)
            for instance in await self._all("/v2/model-instances"):
                counts[instance["model_name"]] += 1
            return counts == wanted

        await eventually(
            is_right, "each model has its instances, and no other is left", within_s=50
        )


def _inner(one: Any) -> Facts:
    """What stands deeper within an object of a list, and is changed by requests of its own."""
    status, labels = one.get("status") or {}, one.get("admin_labels") or {}
    return {"label": labels.get("says"), "cpu_count": status.get("cpu_count")}


def _entry(one: Any) -> Entry:
    says = one["changed"].get(SAYS.get(one["kind"], "admin_labels"), {}).get("after")
    if isinstance(says, dict):
        says = says.get("says")
    return Entry(one["action"], one["kind"], one["name"], says)


@asynccontextmanager
async def used(server: ServerRole, seed: int) -> AsyncIterator[Cluster]:
    """The running server with everybody around it; watchers follow it inside."""
    token = server.secret("local_admin")
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=server.url,
                headers={"Authorization": f"Bearer {token}"},
                timeout=30,
                trust_env=False,
            )
        )
        client = await stack.enter_async_context(Client(server.url, token))
        cluster = Cluster(server, http, seed)
        await cluster.begin()
        async with asyncio.TaskGroup() as group:
            follower, browser = cluster.tables
            watching = [
                group.create_task(follower.follow(client)),
                group.create_task(browser.insist(http)),
            ]
            await eventually(cluster.watchers_are_ready, "the watchers have a list")
            yield cluster
            for task in watching:
                task.cancel()


@pytest.mark.parametrize("kills", KILLS)
async def test_what_was_acknowledged_outlives_a_kill_at_any_moment(
    server: ServerRole, kills: int
) -> None:
    seed = int(os.environ.get("GPUSTACK_TEST_SEED", "") or random.randrange(10**6))
    logger.warning("GPUSTACK_TEST_SEED=%d", seed)
    rng = random.Random(seed)
    left = kills

    def one_less() -> None:
        nonlocal left
        left -= 1
        logger.info("%d kills are left", left)

    async def start() -> None:
        """Sometimes it does not get to its first request."""
        await server.start()
        while left and rng.random() < 0.25:
            await asyncio.sleep(rng.uniform(0, 1.5))
            await server.kill()
            one_less()
            await server.start()

    await start()
    async with used(server, seed) as cluster:
        while left:
            enough = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                for admin in cluster.admins:
                    group.create_task(admin.run(enough))
                await asyncio.sleep(rng.uniform(0, 1.5))
                if rng.random() < 0.5:
                    await server.kill_at_commit(within_s=1)
                else:
                    await server.kill()
                enough.set()
                one_less()
                await start()
            await cluster.check()
        await cluster.converge()
        await cluster.check()
        done, cuts = sum(admin.known.done for admin in cluster.admins), cluster.cuts
        logger.info("%d changes; %d cut and done, %d cut and not", done, cuts[True], cuts[False])
