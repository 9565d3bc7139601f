"""Whether the server can dial a worker's port, and who is told when it cannot."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gpustack.forward.exchange import IGNORED, Exchange, Receiver
from gpustack.forward.listener import Server, asynchronous
from gpustack.gateway.tls import Certificate
from gpustack.lib.platform import listen
from gpustack.schemas.wire import WORKER_CERTIFICATE_FILE
from gpustack.server.controllers.reach import AGAIN_S, TUNNELLED_S, WELL_S, Reach, unreached
from gpustack.server.db.database import Database, ReadSession, get
from gpustack.server.db.tables import Worker
from gpustack.worker.certificate import OwnCertificate
from tests.server.conftest import FakeAgent, Plane, registration
from tests.support.ports import free_ports
from tests.support.wait import settled


@asynccontextmanager
async def relay(folder: Path, port: int) -> AsyncIterator[None]:
    def answer(exchange: Exchange) -> Receiver:
        exchange.respond(200 if exchange.path == "/healthz" else 404)
        return IGNORED

    file = folder / WORKER_CERTIFICATE_FILE
    server = Server(answer)
    await server.listen(listen("127.0.0.1", port), tls=Certificate(file, file).context)
    try:
        yield
    finally:
        await settled()
        server.close()


async def announce(agent: FakeAgent, port: int, certificate: str, **more: Any) -> None:
    body = registration(port=port, certificate=certificate, **more)
    answer = await agent.http.put(f"/v2/workers/{agent.id}/registration", json=body)
    assert answer.status_code == 200, answer.text


async def test_a_worker_that_cannot_be_dialled_is_told_and_told_again_when_it_can(
    plane: Plane, tmp_path: Path
) -> None:
    port, pem = free_ports(1), OwnCertificate(tmp_path, "w").pem
    agent, admin = await plane.worker(), await plane.admin()
    worker = agent.id
    await announce(agent, port, pem)
    reach = Reach(plane.db, after_s=0.0)

    async def shown() -> tuple[str, str]:
        its = (await admin.get(f"/v2/workers/{worker}")).json()
        assert its["proxy_mode"] == "direct"
        return its["reached_by"], its["state_message"].partition(" (")[0]

    assert (await shown())[0] == "direct"
    assert await reach.reconcile(worker) == TUNNELLED_S
    assert await shown() == ("tunnel", f"it cannot be reached at 127.0.0.1:{port} from the server")
    assert await reach.reconcile(worker) == TUNNELLED_S
    async with relay(tmp_path, port):
        assert await reach.reconcile(worker) == WELL_S
        assert (await shown())[0] == "direct"
        assert await reach.reconcile(worker) == WELL_S


async def test_one_failure_changes_nothing_and_explicit_tunnels_are_not_dialled(
    plane: Plane, tmp_path: Path
) -> None:
    port, pem = free_ports(1), OwnCertificate(tmp_path, "w").pem
    agent, admin = await plane.worker(), await plane.admin()
    worker = agent.id
    await announce(agent, port, pem)
    assert await Reach(plane.db, after_s=60.0).reconcile(worker) == AGAIN_S
    assert (await admin.get(f"/v2/workers/{worker}")).json()["reached_by"] == "direct"
    await announce(agent, port, pem, proxy_mode="tunnel")
    assert await Reach(plane.db, after_s=0.0).reconcile(worker) is None
    its = (await admin.get(f"/v2/workers/{worker}")).json()
    assert (its["proxy_mode"], its["reached_by"]) == ("tunnel", "tunnel")
    assert "cannot be reached" not in its["state_message"]


async def test_a_dead_address_is_not_said_of_the_new_one(plane: Plane, tmp_path: Path) -> None:
    """The worker says its new address while the old one is being dialled."""
    port, pem = free_ports(1), OwnCertificate(tmp_path, "w").pem
    agent, admin = await plane.worker(), await plane.admin()
    await announce(agent, port, pem)
    reach = Reach(plane.db, after_s=0.0)

    async def move(exchange: Exchange) -> None:
        await announce(agent, port, pem, ip="127.0.0.2")
        exchange.respond(404)

    file = tmp_path / WORKER_CERTIFICATE_FILE
    async with asyncio.TaskGroup() as group:
        server = Server(asynchronous(move, group))
        await server.listen(listen("127.0.0.1", port), tls=Certificate(file, file).context)
        await reach.reconcile(agent.id)
        server.close()
    its = (await admin.get(f"/v2/workers/{agent.id}")).json()
    assert (its["ip"], its["reached_by"], its["state_message"]) == ("127.0.0.2", "direct", "")


async def test_a_new_address_has_time_of_its_own(plane: Plane, tmp_path: Path) -> None:
    port, pem = free_ports(1), OwnCertificate(tmp_path, "w").pem
    agent, admin = await plane.worker(), await plane.admin()
    await announce(agent, port, pem)
    reach = Reach(plane.db, after_s=0.05)
    assert await reach.reconcile(agent.id) == AGAIN_S
    await announce(agent, port, pem, ip="127.0.0.2")
    await asyncio.sleep(0.1)
    assert await reach.reconcile(agent.id) == AGAIN_S
    assert (await admin.get(f"/v2/workers/{agent.id}")).json()["reached_by"] == "direct"


class Overtaken:
    """A database whose first reader is overtaken by a writer."""

    def __init__(self, db: Database, worker_id: int) -> None:
        self._db = db
        self._worker_id: int | None = worker_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[ReadSession]:
        async with self._db.read() as session:
            yield session
        worker_id, self._worker_id = self._worker_id, None
        if worker_id is not None:
            async with self._db.write() as writer:
                (await get(writer, Worker, worker_id)).unreached = "timed out"


async def test_a_heartbeat_that_a_change_overtakes_remembers_nothing(plane: Plane) -> None:
    agent = await plane.worker()
    beat = {"machine_id": "machine-w1", "boot_id": "boot", "run_id": "run"}
    path, db = f"/v2/workers/{agent.id}/heartbeat", plane.db
    # Who asks is known from here on, so that the next reader is the heartbeat's.
    assert (await agent.http.put(path, json=beat | {"run_id": "other"})).status_code == 409
    plane.app.state.db = Overtaken(db, agent.id)
    assert (await agent.http.put(path, json=beat)).status_code == 200
    plane.app.state.db = db
    assert (await agent.http.put(path, json=beat)).json() == {"tunnel": True}


async def test_the_heartbeats_answer_says_whether_to_dial(plane: Plane, tmp_path: Path) -> None:
    agent = await plane.worker()
    beat = {"machine_id": "machine-w1", "boot_id": "boot", "run_id": "run"}
    path = f"/v2/workers/{agent.id}"
    assert (await agent.http.put(f"{path}/heartbeat", json=beat)).json() == {"tunnel": False}
    body = registration(proxy_mode="tunnel")
    assert (await agent.http.put(f"{path}/registration", json=body)).status_code == 200
    assert (await agent.http.put(f"{path}/heartbeat", json=beat)).json() == {"tunnel": True}


@pytest.mark.parametrize(("host", "why"), [("127.0.0.1", "something else answers there")])
async def test_somebody_else_at_that_address_is_no_worker(
    tmp_path: Path, host: str, why: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        OwnCertificate(tmp_path / name, "w")
    port, other = free_ports(1), OwnCertificate(tmp_path / "b", "w").pem
    async with relay(tmp_path / "a", port):
        assert await unreached(host, port, OwnCertificate(tmp_path / "a", "w").pem) == ""
        assert await unreached(host, port, other) == why
