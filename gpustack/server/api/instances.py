"""/v2/model-instances: the copies of models, and what their workers say of them."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from sqlmodel import col

from gpustack.errors import Conflict, Forbidden, NotFound, Unavailable
from gpustack.lib.net import url_host
from gpustack.schemas import wire
from gpustack.schemas.base import Page
from gpustack.schemas.instances import Instance, InstanceState, InstanceStatus, can_move
from gpustack.server.api.context import Changes, Db, Id, IdFilter, PageNumber, PerPage
from gpustack.server.api.lists import page_of, watch_of
from gpustack.server.auth.principals import Admin, AnyUser, Watcher, WorkerAgent
from gpustack.server.db import tables
from gpustack.server.db.database import Database, get, touch
from gpustack.server.db.instances import begin_end, remove
from gpustack.server.views import USER, load

if TYPE_CHECKING:
    import httpx

router = APIRouter(prefix="/v2/model-instances", tags=["model-instances"])

CONNECT_TIMEOUT_S = 10.0


@router.get("", response_model=Page[Instance])
async def list_instances(
    db: Db,
    feed: Changes,
    watcher: Watcher,
    page: PageNumber = 1,
    perPage: PerPage = 100,
    model_id: IdFilter = None,
    worker_id: IdFilter = None,
    watch: bool = False,
    since: str | None = None,
) -> Any:
    if watch:
        return watch_of(feed, frozenset({wire.INSTANCES}), watcher, since)
    table = tables.Instance
    wanted = {"model_id": model_id, "worker_id": worker_id}
    where = [col(getattr(table, k)) == v for k, v in wanted.items() if v is not None]
    return await page_of(db, wire.INSTANCES, watcher, page, perPage, *where)


@router.get("/{instance_id}")
async def get_instance(db: Db, user: AnyUser, instance_id: Id) -> Instance:
    async with db.read() as session:
        await get(session, tables.Instance, instance_id)
        (found,) = await load(session, wire.INSTANCES, [instance_id])
    return Instance.model_validate(found.view(USER), from_attributes=True)


@router.delete("/{instance_id}", status_code=202)
async def delete_instance(db: Db, admin: Admin, instance_id: Id) -> Response:
    """Stop this copy. Its model gets a new one while its replicas ask for one."""
    async with db.write() as session:
        row = await get(session, tables.Instance, instance_id)
        begin_end(session, row, await get(session, tables.Model, row.model_id))
    return Response(status_code=202)


@router.post("/{instance_id}/retry", status_code=202)
async def retry_instance(db: Db, admin: Admin, instance_id: Id) -> Response:
    """Start a failed instance again now, without waiting for its back-off."""
    async with db.write() as session:
        row = await get(session, tables.Instance, instance_id)
        row.generation += 1
    return Response(status_code=202)


@router.put("/{instance_id}/status", status_code=204)
async def report(db: Db, worker: WorkerAgent, instance_id: Id, status: InstanceStatus) -> Response:
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
            if InstanceState.RUNNING in {old, status.state} and old is not status.state:
                # its ready_replicas changed
                touch(session, await get(session, tables.Model, row.model_id))
            changes = status.model_dump(exclude={"state"}) | {"reported_state": status.state}
            for name, value in changes.items():
                if getattr(row, name) != value:
                    setattr(row, name, value)
    return Response(status_code=204)


@router.get("/{instance_id}/logs")
async def logs(
    db: Db, admin: Admin, instance_id: Id, tail: int = 1000, follow: bool = False,
    previous: bool = False,
) -> StreamingResponse:  # fmt: skip
    """The engine's own output, from its worker; streamed, never held here."""
    worker = await _worker_of(db, instance_id)
    query = {"tail": str(tail), "follow": str(follow).lower(), "previous": str(previous).lower()}
    stack = AsyncExitStack()
    try:
        answer = await _ask(stack, worker, f"/v2/logs/{instance_id}", query)
    except BaseException:
        await stack.aclose()
        raise
    return StreamingResponse(_bytes(stack, answer), media_type="text/plain; charset=utf-8")


async def _ask(
    stack: AsyncExitStack, worker: tables.Worker, path: str, query: dict[str, str]
) -> "httpx.Response":
    """An answer of a worker's API whose body is still to come; `stack` closes it.

    Raises:
        NotFound: the worker has no such thing.
        Unavailable: it cannot be reached, or does not answer as it should.
    """
    import httpx  # rarely needed, and it would make every start slower

    # A followed log may be silent for hours.
    timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=None)
    client = await stack.enter_async_context(httpx.AsyncClient(timeout=timeout, trust_env=False))
    url = f"http://{url_host(worker.address)}:{worker.port}{path}"
    headers = {"Authorization": f"Bearer {worker.agent_secret}"}
    try:
        answer = await stack.enter_async_context(
            client.stream("GET", url, params=query, headers=headers)
        )
        if answer.status_code == httpx.codes.OK:
            return answer
        text = (await answer.aread()).decode(errors="replace")[:200]
    except httpx.HTTPError as error:
        raise Unavailable(f"worker {worker.name} cannot be reached: {error}") from None
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise NotFound(f"worker {worker.name}: {text}")
    raise Unavailable(f"worker {worker.name} answered {answer.status_code}: {text}")


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
