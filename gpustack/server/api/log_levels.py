"""The log level of this server, and of workers: the name alone, in question and answer."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from gpustack.errors import BadRequest, TooLarge, Unavailable, raises
from gpustack.lib import log_level
from gpustack.schemas import wire
from gpustack.schemas.audit import Action
from gpustack.server.api.agents import Gate, OwnGateway, asked
from gpustack.server.api.context import Db, Id, raw_body
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db import audit_log, tables
from gpustack.server.db.audited import Entry
from gpustack.server.db.database import Database, get

router = APIRouter(
    tags=["log levels"], default_response_class=PlainTextResponse, route_class=Repeated
)

_SCHEMA = {"type": "string", "enum": list(log_level.LEVELS)}
_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"text/plain": {"schema": _SCHEMA}}}
}
OF_SERVER, OF_WORKER = "/debug/log_level", "/v2/workers/{worker_id}/log-level"


@router.get(OF_SERVER)
async def get_log_level(admin: Admin) -> str:
    return log_level.current()


@router.put(OF_SERVER, openapi_extra=_BODY)
@raises(BadRequest, TooLarge)
async def set_log_level(db: Db, request: Request, admin: Admin) -> str:
    """Until the server is started again. Body: a level's name, bare or as a JSON string."""
    before, wanted = log_level.current(), await _wanted(request)
    log_level.change(wanted)
    await _audit(db, "settings", None, "log_level", before, wanted)
    return log_level.current()


@router.get(OF_WORKER)
@raises(Unavailable)
async def get_worker_log_level(db: Db, gate: Gate, admin: Admin, worker_id: Id) -> str:
    return await _of_worker(db, gate, worker_id, "GET")


@router.put(OF_WORKER, openapi_extra=_BODY)
@raises(BadRequest, TooLarge, Unavailable)
async def set_worker_log_level(
    db: Db, gate: Gate, request: Request, admin: Admin, worker_id: Id
) -> str:
    """Until the worker's agent is started again. Body: as for the server's own level."""
    level = await _wanted(request)
    answer = await _of_worker(db, gate, worker_id, "PUT", level.encode())
    async with db.read() as session:
        name = (await get(session, tables.Worker, worker_id)).name
    await _audit(db, wire.WORKERS, worker_id, name, None, level)
    return answer


async def _wanted(request: Request) -> str:
    try:
        return log_level.parse(await raw_body(request, log_level.LIMIT_BYTES))
    except ValueError as error:
        raise BadRequest(str(error)) from None


async def _audit(
    db: Database, kind: str, row_id: int | None, name: str, before: str | None, after: str
) -> None:
    values = {"log_level": before}, {"log_level": after}
    async with db.write() as session:
        audit_log.add(session, Entry(Action.UPDATE, kind, row_id, name, *values))


async def _of_worker(
    db: Database, gate: OwnGateway, worker_id: int, method: str, body: bytes | None = None
) -> str:
    async with db.read() as session:
        worker = await get(session, tables.Worker, worker_id)
    async with asked(worker, method, "/debug/log_level", gate=gate, body=body) as answer:
        return (await answer.aread()).decode(errors="replace").strip()
