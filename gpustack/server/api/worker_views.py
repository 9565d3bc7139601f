"""What is read from workers themselves: engines' logs, and what runs there."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import (
    AwareDatetime,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from gpustack.errors import BadRequest, NotFound, Unavailable, raises
from gpustack.lib.units import seconds
from gpustack.schemas.engines import Engine, Engines
from gpustack.schemas.instances import InstanceState
from gpustack.server.api.agents import Gate, asked
from gpustack.server.api.context import Db, Id
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db import tables
from gpustack.server.db.database import Database, get

if TYPE_CHECKING:
    import httpx

router = APIRouter(route_class=Repeated)

#: Of lines, unless the log is asked for since a time, or to be kept.
DEFAULT_TAIL = 1000
#: A longer time ago than any log; workers take no more digits.
_EVER_S = 1e10
#: For a worker to begin its answer, seconds: it may have to look for its lines from the end of a
#: gigabyte. A worker that hangs must not keep who asks, nor the asking, for ever.
BEGINS_S = 20.0
#: The same for more of an answer that has an end.
GOES_ON_S = 60.0


def _want(what: str) -> WrapValidator:
    """Say what is wanted instead of why each of the possible types is not what was given."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"want {what}, got {str(value)[:40]!r}") from None

    return WrapValidator(validate)


# A number alone is seconds, of at most nine digits: with ten it is a time, as Unix counts them.
_NUMBER = r"[0-9]{1,9}(\.[0-9]{1,3})?"
Duration = Annotated[
    str, StringConstraints(pattern=rf"^(({_NUMBER}[smhd]){{1,4}}({_NUMBER})?|{_NUMBER})$")
]
Tail = Annotated[
    int | None,
    Query(
        ge=-1,
        le=2**31,
        description=f"This many lines from the end; -1: all. By default {DEFAULT_TAIL}, or all "
        "with `since` or `download`.",
    ),
]
Previous = Annotated[
    bool | Annotated[int, Query(ge=0, le=10**6)],
    _want("true, false or how many runs back"),
    Query(description="The run before the present one; a number counts back further."),
]
Since = Annotated[
    AwareDatetime | Duration | None,
    _want("a time such as 2026-01-31T12:00:00Z or a duration such as 10m"),
    Query(description="What was written after a time (RFC 3339), or in the last `10m`."),
]
Download = Annotated[bool, Query(description="All of it, to be kept as a file.")]


@router.get(
    "/v2/model-instances/{instance_id}/logs",
    tags=["model-instances"],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
@raises(BadRequest, Unavailable)
async def read_instance_logs(
    db: Db, gate: Gate, admin: Admin, instance_id: Id, tail: Tail = None, follow: bool = False,
    previous: Previous = False, since: Since = None, download: Download = False,
) -> StreamingResponse:  # fmt: skip
    """The engine's own output, from its worker; streamed, never held here.

    Byte for byte, colours included. `since` may give some seconds more than were asked for, never
    less. A followed log goes on with the next runs, and ends with the instance.
    """
    instance, worker = await _placed(db, instance_id)
    if tail is None and since is None and not download:
        tail = DEFAULT_TAIL
    query = {"follow": str(follow).lower(), "previous": str(int(previous))}
    if tail is not None and tail >= 0:
        query["tail"] = str(tail)
    if since is not None:
        query["since"] = f"{_ago_s(since):.3f}"
    stack = AsyncExitStack()
    # A followed log may be silent for hours, once it has begun.
    read_s, path = None if follow else GOES_ON_S, f"/v2/logs/{instance_id}"
    asking = asked(worker, "GET", path, gate=gate, query=query, read_s=read_s)
    try:
        async with asyncio.timeout(BEGINS_S):
            answer = await stack.enter_async_context(asking)
    except TimeoutError:
        why = f"it has not begun to answer within {BEGINS_S:g} s"
        raise Unavailable(f"worker {worker.name} cannot be reached: {why}") from None
    except NotFound:
        if not previous and (why := _not_started(instance)):
            raise NotFound(f"instance {instance.name} has no log yet: {why}") from None
        raise
    headers = {"X-Accel-Buffering": "no"}  # nginx would keep what is followed to itself
    if download:
        headers["Content-Disposition"] = f'attachment; filename="{file_name(instance, previous)}"'
    kind = "text/plain; charset=utf-8"
    return StreamingResponse(_bytes(stack, answer), media_type=kind, headers=headers)


async def _bytes(stack: AsyncExitStack, answer: "httpx.Response") -> AsyncIterator[bytes]:
    async with stack:
        async for chunk in answer.aiter_raw():
            yield chunk


async def _placed(db: Database, instance_id: int) -> tuple[tables.Instance, tables.Worker]:
    async with db.read() as session:
        row = await get(session, tables.Instance, instance_id)
        if row.worker_id is None:
            raise NotFound(f"instance {row.name} has no log yet: it is not on a worker")
        return row, await get(session, tables.Worker, row.worker_id)


def _not_started(instance: tables.Instance) -> str:
    """Why its engine has said nothing yet; "" if it has been started."""
    state = InstanceState(instance.reported_state or InstanceState.SCHEDULED)
    if state in (InstanceState.STARTING, InstanceState.RUNNING):
        return ""
    why = instance.state_message.partition("\n")[0]
    if state is InstanceState.ERROR and why:
        return why
    return f"its engine has not been started, it is {state}"


def _ago_s(since: datetime | str) -> float:
    """How long ago, by this server's clock: workers' clocks may be anything."""
    ago_s = seconds(since) if isinstance(since, str) else 0.0
    if isinstance(since, datetime):
        ago_s = (datetime.now(UTC) - since).total_seconds()
    return min(max(ago_s, 0.0), _EVER_S)


def file_name(instance: tables.Instance, previous: int) -> str:
    """A name for a downloaded log that every system takes. Models' names may have slashes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", instance.name).lstrip(".-")
    return f"{name}.previous-{int(previous)}.log" if previous else f"{name}.log"


@router.get("/v2/workers/{worker_id}/engines", tags=["workers"])
@raises(Unavailable)
async def list_worker_engines(db: Db, gate: Gate, admin: Admin, worker_id: Id) -> list[Engine]:
    """What runs on a worker now, as its agent says: also what nobody wants there any more."""
    async with db.read() as session:
        worker = await get(session, tables.Worker, worker_id)
    try:
        async with asked(worker, "GET", "/v2/engines", gate=gate) as answer:
            return Engines.model_validate_json(await answer.aread()).root
    except NotFound:
        raise Unavailable(
            f"worker {worker.name} does not say what runs on it: its version is "
            f"{worker.version}; update it"
        ) from None
