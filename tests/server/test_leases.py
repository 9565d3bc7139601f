"""Several servers on one database: one leads, all serve."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlmodel import col, select

from gpustack.errors import LeaseLost
from gpustack.lib.secrets import digest
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind
from gpustack.server.controllers.workers import ALL, Patience, Workers
from gpustack.server.db.bootstrap import bootstrap, node_id
from gpustack.server.db.database import Database
from gpustack.server.db.leases import Leases, leading
from gpustack.server.db.tables import (
    Cluster,
    Credential,
    Instance,
    Lease,
    Model,
    ModelVersion,
    User,
    Worker,
)
from gpustack.server.heartbeats import Heartbeats
from gpustack.server.leading import Control, lead
from gpustack.server.views import ADMIN, GATEWAY
from tests.server.conftest import Plane, Start
from tests.support.databases import KINDS
from tests.support.leader import model
from tests.support.wait import eventually, soon

LASTS_S, RENEW_S = 1.0, 0.2
SPEC = {"source": "local_path", "local_path": "/m.gguf"}

#: SQLite has one server.
on_shared = pytest.mark.parametrize(
    "databases",
    [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "sqlite"],
    indirect=True,
    scope="session",
)


async def boot(db: Database, data_dir: Path, secret: str) -> None:
    await bootstrap(
        db,
        data_dir=data_dir,
        token=None,
        password=None,
        hash_password=lambda _: "",
        local_admin=f"local-{secret}",
        gateway_credential=f"gateway-{secret}",
    )


@pytest.fixture
async def db(database_url: str, tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(database_url)
    await boot(made, tmp_path, "one")
    yield made
    await made.close()


@pytest.fixture
async def nodes(database_url: str) -> AsyncIterator[list[Leases]]:
    """The lease as eight servers know it."""
    made = [Leases(database_url, f"node-{number}", lasts_s=LASTS_S) for number in range(8)]
    yield made
    for one in made:
        await one.close()


async def names(db: Database) -> list[str]:
    """Of the models, in the order of their commits."""
    async with db.read() as session:
        rows = await session.exec(select(Model.name).order_by(col(Model.revision)))
        return list(rows.all())


async def taken(leases: Leases) -> int:
    return await eventually(leases.take, "the lease is free", within_s=10) or 0


# --- the lease -------------------------------------------------------------------------------


async def test_one_of_many_takes_it_and_nobody_else_until_it_is_not_renewed(
    nodes: list[Leases],
) -> None:
    async def attempt(one: Leases) -> int | None:
        try:
            return await one.take()
        except Exception:  # noqa: BLE001  another one held the file
            return None

    tokens = await asyncio.gather(*(attempt(one) for one in nodes))
    assert sorted(token for token in tokens if token) == [1]
    leader = nodes[tokens.index(1)]
    other = next(one for one in nodes if one is not leader)
    for _ in range(6):  # longer than it lasts
        await asyncio.sleep(LASTS_S / 4)
        await leader.renew(1)
        assert await other.take() is None
    assert await taken(other) == 2
    with pytest.raises(LeaseLost):
        await leader.renew(1)
    await leader.give_back(1)  # changes nothing
    assert await leader.take() is None


async def test_what_is_given_back_is_free_at_once(nodes: list[Leases]) -> None:
    assert await nodes[0].take() == 1
    await nodes[0].give_back(1)
    assert await nodes[1].take() == 2


@on_shared
async def test_a_server_that_loses_it_while_it_ends_does_not_lead_again(
    nodes: list[Leases],
) -> None:
    works, lost = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        works.set()
        await lost.wait()
        raise LeaseLost

    leader = asyncio.ensure_future(lead(nodes[0], work, renew_every_s=RENEW_S))
    await works.wait()
    lost.set()
    leader.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await leader
    assert await nodes[1].take() == 2  # it gave it back


@on_shared
async def test_a_node_takes_it_from_its_own_earlier_life_and_from_nobody_else(
    database_url: str, nodes: list[Leases]
) -> None:
    assert await nodes[0].take() == 1
    assert await nodes[1].take(from_myself=True) is None
    assert await nodes[0].take() is None
    assert await nodes[0].take(from_myself=True) == 2


async def test_who_lost_it_writes_nothing(db: Database, nodes: list[Leases]) -> None:
    old = await nodes[0].take() or 0
    with leading(old):
        async with db.write() as session:
            session.add(model("before"))
    await nodes[0].give_back(old)
    new = await nodes[1].take() or 0
    with leading(old), pytest.raises(LeaseLost, match="Another server leads now"):
        async with db.write() as session:
            session.add(model("after"))
    with leading(new):
        async with db.write() as session:
            session.add(model("new"))
    async with db.write() as session:  # the API needs no lease
        session.add(model("api"))
    assert await names(db) == ["before", "new", "api"]


@on_shared
async def test_nobody_takes_it_while_its_holder_commits(db: Database, nodes: list[Leases]) -> None:
    token = await nodes[0].take() or 0
    await nodes[0].give_back(token)
    with leading(token):
        async with db.write() as session, asyncio.TaskGroup() as group:
            taking = group.create_task(nodes[1].take())
            await asyncio.wait({taking}, timeout=0.3)
            assert not taking.done()
            session.add(model("in time"))
            await session.commit()
    assert taking.result() == token + 1


# --- the leader ------------------------------------------------------------------------------


class Leader:
    """`tests.support.leader` on a database."""

    def __init__(self, url: str, holder: str, *more: str) -> None:
        module = (sys.executable, "-m", "tests.support.leader")
        self.process = subprocess.Popen(
            [*module, holder, str(LASTS_S), str(RENEW_S), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(url + "\n")
        self.process.stdin.flush()

    async def until(self, word: str) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(20):
            while (said := await asyncio.to_thread(self.process.stdout.readline)).strip() != word:
                assert said, f"it ended before it said {word}"

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def is_frozen(self) -> bool:
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"


@pytest.fixture
def leaders(db: Database) -> Iterator[Any]:
    made: list[Leader] = []

    def begin(holder: str, *more: str) -> Leader:
        made.append(Leader(db.url, holder, *more))
        return made[-1]

    yield begin
    for one in made:
        one.process.kill()
        one.process.wait(10)
        for pipe in (one.process.stdin, one.process.stdout):
            assert pipe is not None
            pipe.close()


@on_shared
async def test_after_a_kill_another_leads(leaders: Any) -> None:
    first = leaders("first")
    await first.until("wrote")
    second = leaders("second")
    first.send(signal.SIGKILL)
    began = time.monotonic()
    await second.until("wrote")
    assert time.monotonic() - began < LASTS_S + RENEW_S + 3


@on_shared
@pytest.mark.parametrize("freeze", ["", "freeze"])
async def test_a_frozen_leader_is_replaced_and_writes_nothing_any_more(
    db: Database, leaders: Any, freeze: str
) -> None:
    """Frozen between its transactions, or within one."""
    first = leaders("first", freeze)
    await first.until("wrote")
    second = leaders("second")
    if not freeze:
        first.send(signal.SIGSTOP)
    soon(first.is_frozen, "it is frozen")
    began = time.monotonic()
    await second.until("wrote")
    assert time.monotonic() - began < 10
    first.send(signal.SIGCONT)
    for _ in range(20):
        await second.until("wrote")
    terms = [int(name.partition("-")[0]) for name in await names(db)]
    assert terms == sorted(terms)
    assert set(terms) == {1, 2}
    assert not freeze or "1-3" not in await names(db)


async def _hold(db: Database, holder: str) -> None:
    async with db.write() as session:
        await session.exec(update(Lease).values(holder=holder, token=Lease.token + 1))


@asynccontextmanager
async def controlling(db: Database, leases: Leases) -> AsyncIterator[Control]:
    control = Control(db, Heartbeats(), None, Patience())
    async with asyncio.TaskGroup() as group:
        task = group.create_task(lead(leases, control.run, renew_every_s=RENEW_S))
        yield control
        task.cancel()


@on_shared
async def test_a_new_term_looks_at_everything(
    db: Database, nodes: list[Leases], caplog: pytest.LogCaptureFixture
) -> None:
    """What happened while nobody of ours led is seen, and then led again."""
    caplog.set_level(logging.INFO)
    async with controlling(db, nodes[0]):

        async def leads() -> bool:
            return "leads, term 1" in caplog.text

        await eventually(leads, "it leads")
        await _hold(db, "somebody")

        async def lost() -> bool:
            return "term 1 of this server has ended: Another server leads now" in caplog.text

        await eventually(lost, "it sees that it has lost the lease")
        async with db.write() as session:
            made = model("made-meanwhile")
            session.add(made)
            await session.flush()
            session.add(ModelVersion(model_id=made.id or 0, generation=1, spec=SPEC))
            made.deleting = True

        async def gone() -> bool:
            return not await names(db)

        await eventually(gone, "the new term has looked at it")
    assert "Traceback" not in caplog.text


# --- what every server does ------------------------------------------------------------------


async def _next_model(lines: AsyncIterator[bytes], name: str) -> None:
    async with asyncio.timeout(5):
        while (json.loads(await anext(lines)).get("data") or {}).get("name") != name:
            pass


@on_shared
async def test_watchers_of_one_server_hear_within_a_second_of_what_another_changes(
    start: Start, tmp_path: Path
) -> None:
    here, there = await start(tmp_path / "a"), await start(tmp_path / "b")
    admin = await here.admin()
    lines = there.feed.watch(frozenset({wire.MODELS}), ADMIN)
    await anext(lines)
    took = []
    for number in range(6):
        began = time.monotonic()
        answer = await admin.post("/v2/models", json=SPEC | {"name": f"m{number}", "replicas": 0})
        assert answer.status_code == 201
        await _next_model(lines, f"m{number}")
        took.append(time.monotonic() - began)
    # The first one may come before this one listens, and a busy machine may halt at any other.
    assert median(took) < 1
    await lines.aclose()


@on_shared
async def test_a_watch_that_one_server_cut_goes_on_at_another_without_a_gap(
    start: Start, tmp_path: Path
) -> None:
    here, there = await start(tmp_path / "a"), await start(tmp_path / "b")
    first, second = await here.admin(), await there.admin()
    kinds = frozenset({wire.CREDENTIALS})  # what no controller changes meanwhile

    async def key(admin: httpx.AsyncClient, name: str) -> int:
        return int((await admin.post("/v2/api-keys", json={"name": name})).json()["id"])

    gone, kept = await key(first, "gone"), await key(second, "kept")
    lines = here.feed.watch(kinds, GATEWAY)
    cursor = None
    async for line in lines:
        if (cursor := json.loads(line)["cursor"]) is not None:
            break
    await lines.aclose()
    made = [await key(first, "here"), await key(second, "there")]
    await second.delete(f"/v2/api-keys/{gone}")
    missed = []
    lines = there.feed.watch(kinds, GATEWAY, since=cursor)
    async for line in lines:
        if (event := json.loads(line))["type"] == "synced":
            break
        missed.append((event["type"], event["id"]))
    await lines.aclose()
    assert sorted(missed) == [("delete", gone), *(("put", one) for one in made)]
    assert kept not in dict(missed).values()


@on_shared
async def test_a_key_that_one_server_revokes_is_none_at_the_other(
    start: Start, tmp_path: Path
) -> None:
    here, there = await start(tmp_path / "a"), await start(tmp_path / "b")
    admin = await here.admin()
    made = (await admin.post("/v2/api-keys", json={"name": "k"})).json()
    user = await there.client(made["value"])
    assert (await user.get("/v2/models")).status_code == 200
    await admin.delete(f"/v2/api-keys/{made['id']}")

    async def refused() -> bool:
        return (await user.get("/v2/models")).status_code == 401

    await eventually(refused, "the other server knows", within_s=1)


@on_shared
async def test_one_server_controls_what_users_ask_of_the_other(
    start: Start, tmp_path: Path
) -> None:
    planes = [await start(tmp_path / "a"), await start(tmp_path / "b")]
    spec = SPEC | {"replicas": 3}
    for number, plane in enumerate(planes):
        answer = await (await plane.admin()).post("/v2/models", json=spec | {"name": f"m{number}"})
        assert answer.status_code == 201

    async def instances() -> int:
        async with planes[0].db.read() as session:
            return len((await session.exec(select(Instance.id))).all())

    async def all_there() -> bool:
        return await instances() == 6

    await eventually(all_there, "each has its three")


async def test_a_worker_that_speaks_to_another_server_is_not_silent(plane: Plane) -> None:
    agent = await plane.worker()
    plane.app.state.heartbeats._heard.clear()  # the plane's own control leaves all as it is
    limit = timedelta(seconds=60)

    async def look(heartbeats: Heartbeats, *, led_for: timedelta) -> bool:
        controller = Workers(plane.db, heartbeats, Patience(limit))
        controller._began -= led_for.total_seconds()
        await controller.reconcile(ALL)
        async with plane.db.read() as session:
            found = await session.get(Worker, agent.id)
            assert found is not None
            return found.silent

    elsewhere = Heartbeats()
    elsewhere.heard(agent.id)
    await elsewhere.write(plane.db)
    assert not await look(Heartbeats(), led_for=2 * limit)
    async with plane.db.write() as session:
        await session.exec(update(Worker).values(heartbeat_at=datetime.now(UTC) - 2 * limit))
    assert not await look(Heartbeats(), led_for=timedelta(0))
    assert await look(Heartbeats(), led_for=2 * limit)
    assert await look(Heartbeats(), led_for=timedelta(0))  # it has not spoken since
    await elsewhere.write(plane.db)  # nothing
    elsewhere.heard(agent.id)
    await elsewhere.write(plane.db)
    assert not await look(Heartbeats(), led_for=timedelta(0))


BOOT = """
import asyncio, sys
from pathlib import Path
from gpustack.server.auth.passwords import hash_now
from gpustack.server.db.bootstrap import bootstrap
from gpustack.server.db.database import Database
from gpustack.server.db.migrate import migrate

url, folder = sys.stdin.readline().strip(), Path(sys.argv[1])
migrate(url)

async def boot():
    db = Database(url)
    await bootstrap(
        db, data_dir=folder, token=None, password=None, hash_password=hash_now,
        local_admin=f"local-{folder.name}", gateway_credential=f"gateway-{folder.name}",
    )
    await db.close()

asyncio.run(boot())
"""


@on_shared
async def test_servers_that_start_at_once_on_an_empty_database_make_one_cluster(
    empty_url: str, tmp_path: Path
) -> None:
    folders = [tmp_path / letter for letter in "abc"]

    async def booted(folder: Path) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", BOOT, str(folder), stdin=subprocess.PIPE, env=dict(os.environ)
        )
        await process.communicate(f"{empty_url}\n".encode())
        return process.returncode or 0

    assert await asyncio.gather(*(booted(folder) for folder in folders)) == [0, 0, 0]
    db = Database(empty_url)
    async with db.read() as session:
        assert len((await session.exec(select(Cluster))).all()) == 1
        assert len((await session.exec(select(User))).all()) == 1
        credentials = (await session.exec(select(Credential))).all()
    await db.close()
    for name in ("token", "initial_admin_password"):
        assert len([folder for folder in folders if (folder / name).exists()]) == 1
    for kind in (CredentialKind.LOCAL, CredentialKind.GATEWAY):
        assert {one.name for one in credentials if one.kind == kind} == {
            f"{node_id(folder)} at {folder}" for folder in folders
        }


async def test_data_directories_of_one_path_on_two_machines_keep_their_credentials(
    db: Database, tmp_path: Path
) -> None:
    async def gateways() -> set[str]:
        async with db.read() as session:
            mine = select(Credential.digest).where(Credential.kind == CredentialKind.GATEWAY)
            return set((await session.exec(mine)).all())

    (tmp_path / "node_id").unlink()  # now it is another machine's
    await boot(db, tmp_path, "two")
    assert await gateways() == {digest("gateway-one"), digest("gateway-two")}
    await boot(db, tmp_path, "new")  # the file of its secret was removed
    assert await gateways() == {digest("gateway-one"), digest("gateway-new")}
