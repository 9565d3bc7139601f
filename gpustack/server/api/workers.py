"""/v2/workers: the machines that run agents."""

from typing import Any

from fastapi import APIRouter, Response
from sqlmodel import col, select

from gpustack.errors import Conflict, Forbidden
from gpustack.lib.secrets import digest, new_secret
from gpustack.schemas import wire
from gpustack.schemas.base import Page
from gpustack.schemas.credentials import CredentialKind
from gpustack.schemas.workers import Heartbeat, Registered, Registration, Worker, WorkerStatus
from gpustack.server.api.context import Beats, Changes, Db, Id, PageNumber, PerPage
from gpustack.server.api.lists import page_of, watch_of
from gpustack.server.auth.principals import Admin, Joiner, Principal, WorkerAgent
from gpustack.server.db import tables
from gpustack.server.db.database import WriteSession, get
from gpustack.server.db.instances import remove
from gpustack.server.db.workers import set_silent
from gpustack.server.heartbeats import Heartbeats
from gpustack.server.views import worker_view

router = APIRouter(prefix="/v2/workers", tags=["workers"])


@router.get("", response_model=Page[Worker])
async def list_workers(
    db: Db,
    feed: Changes,
    admin: Admin,
    page: PageNumber = 1,
    perPage: PerPage = 100,
    name: str | None = None,
    watch: bool = False,
    since: str | None = None,
) -> Any:
    if watch:
        return watch_of(feed, frozenset({wire.WORKERS}), admin, since)
    where = [col(tables.Worker.name) == name] if name is not None else []
    return await page_of(db, wire.WORKERS, admin, page, perPage, *where)


@router.get("/{worker_id}")
async def get_worker(db: Db, admin: Admin, worker_id: Id) -> Worker:
    async with db.read() as session:
        return worker_view(await get(session, tables.Worker, worker_id))


@router.delete("/{worker_id}", status_code=204)
async def delete_worker(db: Db, admin: Admin, worker_id: Id) -> Response:
    """Forget a worker and what is on it. Its instances are made anew elsewhere."""
    async with db.write() as session:
        worker = await get(session, tables.Worker, worker_id)
        on_it = select(tables.Instance).where(tables.Instance.worker_id == worker_id)
        for instance in (await session.exec(on_it)).all():
            await remove(session, instance)
        its = select(tables.Credential).where(tables.Credential.worker_id == worker_id)
        for credential in (await session.exec(its)).all():
            await session.delete(credential)
        await session.flush()
        await session.delete(worker)
    return Response(status_code=204)


@router.post("/register")
async def register(db: Db, heartbeats: Beats, joiner: Joiner, body: Registration) -> Registered:
    """Join the cluster, with its token; answers the worker's own credential."""
    secret = new_secret() + new_secret()
    async with db.write() as session:
        row = await _enrol(session, body, heartbeats, embedded=joiner.is_embedded)
        old = select(tables.Credential).where(tables.Credential.worker_id == row.id)
        for credential in (await session.exec(old)).all():
            await session.delete(credential)
        session.add(
            tables.Credential(
                kind=CredentialKind.WORKER, digest=digest(secret), worker_id=row.id, scopes=[]
            )
        )
        cluster = await session.get_one(tables.Cluster, 1)
    worker_id = row.key()[1]
    heartbeats.heard(worker_id)
    return Registered(
        worker_id=worker_id,
        cluster_id=cluster.cluster_id,
        credential=secret,
        agent_secret=row.agent_secret,
    )


async def _enrol(
    session: WriteSession, body: Registration, heartbeats: Heartbeats, *, embedded: bool
) -> tables.Worker:
    """The row of the worker that registers: its own from before, or a new one.

    A name belongs to the machine that took it, and on that machine to the agent that is running.
    The server's own agent may take its name back, whatever became of the machine's id.
    """
    row = (
        await session.exec(select(tables.Worker).where(tables.Worker.name == body.name))
    ).one_or_none()
    if row is None:
        row = tables.Worker(**body.model_dump(), agent_secret=new_secret())
    else:
        elsewhere = row.machine_id != body.machine_id
        running = row.run_id != body.run_id and heartbeats.is_live(row.key()[1])
        if (elsewhere or running) and not embedded:
            where = "on another machine" if elsewhere else "and runs"
            raise Conflict(
                f"a worker named {body.name} exists already {where}: choose another "
                "--worker-name, or delete that worker first"
            )
        row.sqlmodel_update(body.model_dump())
        row.agent_secret = new_secret()
        await set_silent(session, row, silent=False)
    session.add(row)
    await session.flush()
    return row


@router.put("/{worker_id}/registration")
async def announce(
    db: Db, heartbeats: Beats, worker: WorkerAgent, worker_id: Id, body: Registration
) -> Registered:
    """A known worker is back, perhaps with another address."""
    _own(worker, worker_id)
    async with db.write() as session:
        row = await get(session, tables.Worker, worker_id)
        if row.machine_id != body.machine_id and heartbeats.is_live(worker_id):
            raise Conflict(
                f"worker {row.name} is running on another machine: two machines must not share "
                "a copy of one data directory; remove worker_credential from this one's"
            )
        row.sqlmodel_update(body.model_dump(exclude={"name"}))
        await set_silent(session, row, silent=False)
        cluster = await session.get_one(tables.Cluster, 1)
    heartbeats.heard(worker_id)
    return Registered(
        worker_id=worker_id, cluster_id=cluster.cluster_id, agent_secret=row.agent_secret
    )


@router.post("/{worker_id}/heartbeat", status_code=204)
async def heartbeat(
    db: Db, heartbeats: Beats, worker: WorkerAgent, worker_id: Id, body: Heartbeat
) -> Response:
    """Still there. 409 when another machine uses the same credential."""
    _own(worker, worker_id)
    async with db.read() as session:
        row = await get(session, tables.Worker, worker_id)
    if body.run_id != row.run_id:
        raise Conflict(
            f"worker {row.name} is already running as another process (machine {row.machine_id}): "
            "two machines must not share a data directory or a copy of it"
        )
    heartbeats.heard(worker_id)
    return Response(status_code=204)


@router.put("/{worker_id}/status", status_code=204)
async def status(
    db: Db, heartbeats: Beats, worker: WorkerAgent, worker_id: Id, body: WorkerStatus
) -> Response:
    """What the worker has. News only when a fact changed; measured use takes no revision."""
    _own(worker, worker_id)
    heartbeats.heard(worker_id)
    async with db.write() as session:
        row = await get(session, tables.Worker, worker_id)
        if row.facts != (facts := body.facts()):
            row.facts = facts
        await heartbeats.measured(session, worker_id, body)
    return Response(status_code=204)


def _own(worker: Principal, worker_id: int) -> None:
    if worker.worker_id != worker_id:
        raise Forbidden("this is another worker's")
