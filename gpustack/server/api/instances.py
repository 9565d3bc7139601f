"""/v2/model-instances: the copies of models, and what their workers say of them."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from gpustack.errors import BadRequest, Conflict, Forbidden, NotFound, Unavailable, raises
from gpustack.schemas import wire
from gpustack.schemas.base import Page
from gpustack.schemas.instances import Instance, InstanceState, InstanceStatus, can_move
from gpustack.server.api.agents import Gate, asked
from gpustack.server.api.context import Changes, Db, Id
from gpustack.server.api.lists import Asked, IdFilter, WatchQuery, listed
from gpustack.server.api.repeated import Repeated
from gpustack.server.api.streams import WATCHED
from gpustack.server.auth.principals import Admin, Watcher, WorkerAgent
from gpustack.server.db import tables
from gpustack.server.db.database import Database, get, touch
from gpustack.server.db.instances import begin_end, remove
from gpustack.server.db.states import instance_state
from gpustack.server.views import ADMIN, load_ids

if TYPE_CHECKING:
    import httpx

router = APIRouter(prefix="/v2/model-instances", tags=["model-instances"], route_class=Repeated)


class InstanceQuery(WatchQuery):
    TABLE, KIND = tables.Instance, wire.INSTANCES
    COLUMNS = {"state": instance_state()}
    SORTED = ("name", "state", "restart_count", "created_at", "updated_at")

    id: IdFilter = None
    model_id: IdFilter = None
    worker_id: IdFilter = None
    state: list[InstanceState] = []


@router.get("", response_model=Page[Instance], responses=WATCHED)
@raises(BadRequest)
async def list_instances(
    db: Db, feed: Changes, watcher: Watcher, query: Asked[InstanceQuery]
) -> Any:
    return await listed(db, feed, watcher, query)


@router.get("/{instance_id}")
async def get_instance(db: Db, admin: Admin, instance_id: Id) -> Instance:
    async with db.read() as session:
        await get(session, tables.Instance, instance_id)
        (found,) = await load_ids(session, wire.INSTANCES, [instance_id])
    return Instance.model_validate(found.view(ADMIN), from_attributes=True)


@router.delete("/{instance_id}", status_code=202, response_class=Response)
async def delete_instance(db: Db, admin: Admin, instance_id: Id) -> Response:
    """Stop this copy. Its model gets a new one while its replicas ask for one."""
    async with db.write() as session:
        row = await get(session, tables.Instance, instance_id)
        if row.worker_id is None:  # nobody has anything of it
            await remove(session, row)
        else:
            model = await get(session, tables.Model, row.model_id)
            begin_end(session, row, model, "this one copy was deleted")
    return Response(status_code=202)


@router.post("/{instance_id}/retry", status_code=202, response_class=Response)
async def retry_instance(db: Db, admin: Admin, instance_id: Id) -> Response:
    """Start a failed instance again now, without waiting for its back-off."""
    async with db.write() as session:
        row = await get(session, tables.Instance, instance_id)
        row.generation += 1
    return Response(status_code=202)


@router.put("/{instance_id}/status", status_code=204)
@raises(Conflict)
async def report_instance(
    db: Db, worker: WorkerAgent, instance_id: Id, status: InstanceStatus
) -> Response:
    """What the instance's worker says. `gone` ends the row: its memory and name are free."""
    async with db.write() as session:
        row = await get(session, tables.Instance, instance_id)
        if row.worker_id != worker.worker_id:
            raise Forbidden("this instance is not on this worker")
        old = InstanceState(row.reported_state or InstanceState.SCHEDULED)
        if not can_move(old, status.state):
            raise Conflict(f"instance {row.name} cannot go from {old} to {status.state}")
        if status.state is InstanceState.GONE and not row.deleting:
            raise Conflict(f"instance {row.name} is wanted: start it again")
        if status.state is InstanceState.GONE:
            await remove(session, row)
        else:
            failed = status.state is InstanceState.ERROR
            if old is not status.state or (failed and row.state_message != status.state_message):
                # it shows how its instances are
                touch(session, await get(session, tables.Model, row.model_id))
            changes = status.model_dump(exclude={"state"}) | {"reported_state": status.state}
            for name, value in changes.items():
                if getattr(row, name) != value:
                    setattr(row, name, value)
    return Response(status_code=204)


@router.get(
    "/{instance_id}/logs",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
@raises(Unavailable)
async def read_instance_logs(
    db: Db, gate: Gate, admin: Admin, instance_id: Id, tail: int = 1000, follow: bool = False,
    previous: bool = False,
) -> StreamingResponse:  # fmt: skip
    """The engine's own output, from its worker; streamed, never held here."""
    worker = await _worker_of(db, instance_id)
    query = {"tail": str(tail), "follow": str(follow).lower(), "previous": str(previous).lower()}
    stack = AsyncExitStack()
    # A followed log may be silent for hours.
    asking = asked(worker, "GET", f"/v2/logs/{instance_id}", gate=gate, query=query, read_s=None)
    answer = await stack.enter_async_context(asking)
    return StreamingResponse(_bytes(stack, answer), media_type="text/plain; charset=utf-8")


async def _bytes(stack: AsyncExitStack, answer: "httpx.Response") -> AsyncIterator[bytes]:
    async with stack:
        async for chunk in answer.aiter_raw():
            yield chunk


async def _worker_of(db: Database, instance_id: int) -> tables.Worker:
    async with db.read() as session:
        row = await get(session, tables.Instance, instance_id)
        if row.worker_id is None:
            raise NotFound(f"instance {row.name} has no log yet: it is not on a worker")
        return await get(session, tables.Worker, row.worker_id)
