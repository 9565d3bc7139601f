"""/v2/workers: the machines that run agents."""

import ssl
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy.exc import IntegrityError
from sqlmodel import select

from gpustack.errors import BadRequest, Conflict, Contended, Forbidden, Invalid, raises
from gpustack.lib import trust
from gpustack.lib.secrets import digest, new_secret
from gpustack.schemas import wire
from gpustack.schemas.base import Page
from gpustack.schemas.credentials import CredentialKind
from gpustack.schemas.workers import (
    Cordon,
    Heard,
    Heartbeat,
    Registered,
    Registration,
    Scheduling,
    Worker,
    WorkerReport,
    WorkerState,
    WorkerUpdate,
)
from gpustack.server.api.conditions import IfMatch, change, expect, tag
from gpustack.server.api.context import Beats, Changes, Db, Id
from gpustack.server.api.lists import Asked, WatchQuery, listed
from gpustack.server.api.repeated import Repeated
from gpustack.server.api.streams import WATCHED
from gpustack.server.auth.principals import Admin, Joiner, Principal, WorkerAgent
from gpustack.server.db import tables
from gpustack.server.db.database import Database, ReadSession, WriteSession, get
from gpustack.server.db.devices import set_devices
from gpustack.server.db.drains import leaving_of
from gpustack.server.db.instances import begin_end, on_worker, remove
from gpustack.server.db.join_tokens import admit
from gpustack.server.db.states import worker_state
from gpustack.server.db.workers import by_tunnel, is_back, is_heard, turn_drain
from gpustack.server.heartbeats import STOPPED_AFTER, Heartbeats
from gpustack.server.views import worker_view

router = APIRouter(prefix="/v2/workers", tags=["workers"], route_class=Repeated)


class WorkerQuery(WatchQuery):
    TABLE, KIND = tables.Worker, wire.WORKERS
    COLUMNS = {"state": worker_state()}
    SEARCHED = ("name", "hostname", "ip")
    SORTED = ("name", "ip", "state", "created_at", "updated_at")

    name: str | None = None
    state: list[WorkerState] = []
    scheduling: list[Scheduling] = []


@router.get("", response_model=Page[Worker], responses=WATCHED)
@raises(BadRequest)
async def list_workers(db: Db, feed: Changes, admin: Admin, query: Asked[WorkerQuery]) -> Any:
    return await listed(db, feed, admin, query)


@router.get("/{worker_id}")
async def get_worker(db: Db, admin: Admin, worker_id: Id, response: Response) -> Worker:
    """The ETag is the generation: an update may name it in If-Match."""
    async with db.read() as session:
        worker = await _shown(session, await get(session, tables.Worker, worker_id))
    tag(response, worker.generation)
    return worker


@router.put("/{worker_id}")
async def update_worker(
    db: Db, admin: Admin, worker_id: Id, wanted: WorkerUpdate, if_match: IfMatch, response: Response
) -> Worker:
    """Set the labels that administrators give. What is on the worker stays there.

    Made from another generation than the present one, it is refused (409) with the worker as it
    is. Without If-Match or `generation`, the last writer wins.
    """
    async with db.write() as session:
        row = await _expected(session, worker_id, if_match, wanted.generation)
        change(row, {"admin_labels": wanted.labels})
        worker = await _shown(session, row)
    tag(response, worker.generation)
    return worker


@router.post("/{worker_id}/cordon")
async def cordon_worker(
    db: Db, admin: Admin, worker_id: Id, body: Cordon, if_match: IfMatch, response: Response
) -> Worker:
    """Let no new instances come to the worker. What runs there stays; a drain of it ends.

    Compared as PUT has it, as are `drain` and `uncordon`.
    """
    return await _schedule(db, worker_id, Scheduling.CORDONED, body, if_match, response)


@router.post("/{worker_id}/drain")
async def drain_worker(
    db: Db, admin: Admin, worker_id: Id, body: Cordon, if_match: IfMatch, response: Response
) -> Worker:
    """Let no new instances come to the worker, and have those that are there leave.

    Each goes once another in its place answers elsewhere, and ends its requests first. One that
    fits nowhere else stays, and goes when it does. `leaving` says what is still there.
    """
    return await _schedule(db, worker_id, Scheduling.DRAINING, body, if_match, response)


@router.post("/{worker_id}/uncordon")
async def uncordon_worker(
    db: Db, admin: Admin, worker_id: Id, if_match: IfMatch, response: Response
) -> Worker:
    """Let new instances come to the worker again. What a drain has not moved yet stays."""
    body = Cordon(reason="")
    return await _schedule(db, worker_id, Scheduling.ACTIVE, body, if_match, response)


async def _schedule(
    db: Database,
    worker_id: int,
    scheduling: Scheduling,
    body: Cordon,
    if_match: frozenset[int] | None,
    response: Response,
) -> Worker:
    async with db.write() as session:
        row = await _expected(session, worker_id, if_match, body.generation)
        reason = row.scheduling_reason if body.reason is None else body.reason
        if row.scheduling != scheduling:
            await turn_drain(session, row, scheduling)
        change(row, {"scheduling": scheduling, "scheduling_reason": reason})
        worker = await _shown(session, row)
    tag(response, worker.generation)
    return worker


async def _expected(
    session: WriteSession, worker_id: int, if_match: frozenset[int] | None, body: int | None
) -> tables.Worker:
    """The row that is to be changed, if that is meant."""
    row = await get(session, tables.Worker, worker_id)
    current = await _shown(session, row)
    expect(
        session,
        f"worker {row.name}",
        row.generation,
        header=if_match,
        body=body,
        current=current.model_dump(mode="json"),
    )
    return row


async def _shown(session: ReadSession, row: tables.Worker) -> Worker:
    return worker_view(row, (await leaving_of(session, [row])).get(row.key()[1], []))


@router.delete("/{worker_id}", status_code=204)
async def delete_worker(db: Db, admin: Admin, worker_id: Id) -> Response:
    """Forget a worker and what is on it. Its instances are made anew elsewhere."""
    async with db.write() as session:
        worker = await get(session, tables.Worker, worker_id)
        for instance in await on_worker(session, worker_id):
            if instance.worker_id == worker_id:
                await remove(session, instance)
            else:  # it lacks a part now, so its own worker ends the rest
                model = await get(session, tables.Model, instance.model_id)
                begin_end(session, instance, model, f"a part of it was on worker {worker.name}")
        parts = select(tables.Member).where(tables.Member.worker_id == worker_id)
        for member in (await session.exec(parts)).all():
            await session.delete(member)
        its = select(tables.Credential).where(tables.Credential.worker_id == worker_id)
        for credential in (await session.exec(its)).all():
            await session.delete(credential)
        files = select(tables.ModelFile).where(tables.ModelFile.worker_id == worker_id)
        for file in (await session.exec(files)).all():
            await session.delete(file)
        await session.flush()
        await session.delete(worker)
    return Response(status_code=204)


@router.post("/register")
@raises(Conflict)
async def register_worker(
    db: Db, heartbeats: Beats, joiner: Joiner, body: Registration
) -> Registered:
    """Join the cluster, with its token or a join token; answers the worker's own credential."""
    _check_certificate(body)
    secret = new_secret() + new_secret()
    try:
        async with db.write() as session:
            token = await admit(session, joiner.token_id, body) if joiner.token_id else None
            row = await _enrol(session, body, heartbeats, embedded=joiner.is_embedded)
            if token is not None and not token.reusable:
                token.worker_id = row.id  # used up
            old = select(tables.Credential).where(
                tables.Credential.worker_id == row.id,
                tables.Credential.kind == CredentialKind.WORKER,
            )
            for credential in (await session.exec(old)).all():
                await session.delete(credential)
            session.add(
                tables.Credential(
                    kind=CredentialKind.WORKER, digest=digest(secret), worker_id=row.id, scopes=[]
                )
            )
            cluster = await session.get_one(tables.Cluster, 1)
    except IntegrityError:  # another server was the first to give this name to somebody
        raise Contended from None
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
    named = select(tables.Worker).where(tables.Worker.name == body.name)
    row = (await session.exec(named.with_for_update())).one_or_none()
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
        row.agent_secret = new_secret()
        await is_back(session, row, body.model_dump())
    session.add(row)
    await session.flush()
    await is_heard(session, row)
    return row


@router.put("/{worker_id}/registration")
@raises(Conflict)
async def announce_worker(
    db: Db, heartbeats: Beats, worker: WorkerAgent, worker_id: Id, body: Registration
) -> Registered:
    """A known worker is back, perhaps with another address.

    While it is heard of, no other machine takes its place, nor a copy of the whole machine: that
    has its id, but not its boot. One that was started anew is let in once the old life is silent.
    """
    _own(worker, worker_id)
    _check_certificate(body)
    async with db.write() as session:
        row = await get(session, tables.Worker, worker_id)
        here = (row.machine_id, row.boot_id) == (body.machine_id, body.boot_id)
        if not here and heartbeats.is_live(worker_id, within=STOPPED_AFTER):
            raise Conflict(
                f"worker {row.name} is running on another machine: two machines must not share "
                "a copy of one data directory; on a copy, remove worker_credential and give "
                "another --worker-name (a machine that was just restarted is let in soon)"
            )
        await is_back(session, row, body.model_dump(exclude={"name"}))
        cluster = await session.get_one(tables.Cluster, 1)
    heartbeats.heard(worker_id)
    return Registered(
        worker_id=worker_id, cluster_id=cluster.cluster_id, agent_secret=row.agent_secret
    )


@router.put("/{worker_id}/heartbeat")
@raises(Conflict)
async def beat(
    db: Db, heartbeats: Beats, worker: WorkerAgent, worker_id: Id, body: Heartbeat
) -> Heard:
    """Still there. 409 when another machine uses the same credential."""
    _own(worker, worker_id)
    tunnel = heartbeats.tunnels.get(worker_id)
    if tunnel is None or body.run_id != heartbeats.runs.get(worker_id):
        before = heartbeats.forgotten
        async with db.read() as session:
            row = await get(session, tables.Worker, worker_id)
        if body.run_id != row.run_id:
            raise Conflict(
                f"worker {row.name} is already running as another process (machine "
                f"{row.machine_id}): two machines must not share a data directory or a copy of it"
            )
        tunnel = by_tunnel(row)
        if heartbeats.forgotten == before:  # else the row may be another by now
            heartbeats.runs[worker_id], heartbeats.tunnels[worker_id] = row.run_id, tunnel
    heartbeats.heard(worker_id)
    return Heard(tunnel=tunnel)


@router.put("/{worker_id}/status", status_code=204)
async def report_worker(
    db: Db, heartbeats: Beats, worker: WorkerAgent, worker_id: Id, body: WorkerReport
) -> Response:
    """What the worker has. News only when a fact changed; measured use takes no revision."""
    _own(worker, worker_id)
    heartbeats.heard(worker_id)
    heartbeats.measured(worker_id, body)
    if heartbeats.facts.get(worker_id) != (facts := body.facts()):
        async with db.write() as session:
            row = await get(session, tables.Worker, worker_id)
            if row.facts != facts:
                row.facts = facts
                await set_devices(session, worker_id, body.gpu_devices)
        heartbeats.facts[worker_id] = facts
    return Response(status_code=204)


def _check_certificate(body: Registration) -> None:
    """Gateways could not reach a worker whose certificate is none."""
    if body.certificate:
        try:
            trust.exactly(body.certificate)
        except ssl.SSLError:
            raise Invalid("certificate: want one certificate as PEM") from None


def _own(worker: Principal, worker_id: int) -> None:
    if worker.worker_id != worker_id:
        raise Forbidden("this is another worker's")
