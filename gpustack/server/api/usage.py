"""/v2/usage: token counts from gateways, each exactly once; and what they come to."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, time
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import func
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from gpustack.errors import Contended
from gpustack.schemas.base import Page
from gpustack.schemas.usage import UsageBatch, UsageBy, UsageEntry, UsageSum
from gpustack.server.api.context import Db
from gpustack.server.api.lists import Asked, Day, IdFilter, ListQuery, page_of, pagination, words
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.last_uses import LastUses
from gpustack.server.auth.principals import AnyUser, Gateway, Principal
from gpustack.server.db.database import ReadSession
from gpustack.server.db.tables import Usage, UsageHour, UsageSpool
from gpustack.server.db.usage import GROUPS, add_usage, day_of, names, since, summed, until
from gpustack.server.metrics import Served

router = APIRouter(prefix="/v2/usage", tags=["usage"], route_class=Repeated)

_DAY_S = 86_400.0
_COUNTS = ("prompt_token_count", "completion_token_count")


class UsageFilters(ListQuery):
    """Days are in UTC; both are part of what is asked for."""

    start_date: Day | None = None
    end_date: Day | None = None
    model_id: IdFilter = None
    user_id: IdFilter = None
    credential_id: IdFilter = None
    operation: str | None = None


class UsageQuery(UsageFilters):
    TABLE = Usage
    COLUMNS = {
        "prompt_token_count": col(Usage.prompt_tokens),
        "completion_token_count": col(Usage.completion_tokens),
    }
    SORTED = ("started_at", *_COUNTS, "total_ms")

    sort_by: str | None = "-started_at"
    cut: bool | None = None

    def holds(self, name: str, value: Any) -> Any:
        if name == "start_date":
            return col(Usage.started_at) >= _midnight(value)
        if name == "end_date":
            return col(Usage.started_at) < _midnight(value) + _DAY_S
        return super().holds(name, value)


class SumQuery(UsageFilters):
    TABLE = UsageHour
    SORTED = ("date", "request_count", *_COUNTS)
    COMMON = ListQuery.COMMON | {"group_by"}

    group_by: list[UsageBy] = []

    def holds(self, name: str, value: Any) -> Any:
        if name == "start_date":
            return since(value)
        return until(value) if name == "end_date" else super().holds(name, value)


def _midnight(day: date) -> float:
    return datetime.combine(day, time(), UTC).timestamp()


@router.get("")
async def list_usage(db: Db, user: AnyUser, query: Asked[UsageQuery]) -> Page[UsageEntry]:
    """Requests to models, the newest first. Who is no administrator sees the own ones."""
    return await page_of(db, query, _shown, *_seen_by(user, Usage))


@router.get("/sums")
async def list_usage_sums(db: Db, user: AnyUser, query: Asked[SumQuery]) -> Page[UsageSum]:
    """Sums of requests and tokens by each of `group_by`; by nothing: one of all."""
    sums = summed(dict.fromkeys(query.group_by), *_seen_by(user, UsageHour), *query.where())
    asked = query.part(sums.order_by(*_order(query, sums)))
    async with db.read() as session:
        total = (await session.exec(select(func.count()).select_from(sums.subquery()))).one()
        items = await sums_of(session, asked)
    return Page(items=items, pagination=pagination(query, total))


@router.post("", status_code=204)
async def add_usage_batch(
    request: Request, db: Db, gateway: Gateway, batch: UsageBatch
) -> Response:
    """Store a batch, unless its sequence was stored before: a repeated one changes nothing."""
    try:
        async with db.write() as session:
            spool = await session.get(UsageSpool, batch.spool)
            if spool is None:
                spool = UsageSpool(spool=batch.spool, sequence=0)
            new = batch.sequence > spool.sequence
            if new:
                spool.sequence = batch.sequence
                session.add(spool)
                await add_usage(session, batch.records)
    except IntegrityError:  # another server was the first to add to the same sum
        raise Contended from None
    if new:
        served: Served = request.app.state.served
        served.add(batch.records)
        last_uses: LastUses = request.app.state.last_uses
        for record in batch.records:
            if record.credential_id is not None:
                last_uses.used(record.credential_id, datetime.fromtimestamp(record.started_at, UTC))
    return Response(status_code=204)


def _seen_by(user: Principal, table: Any) -> Iterable[Any]:
    return [] if user.is_admin else [table.user_id == user.user_id]


def _order(query: SumQuery, sums: Any) -> Iterator[Any]:
    """By what is asked for, then by what they are grouped by."""
    for word in words(query.sort_by):
        name = word.removeprefix("-")
        column = sums.selected_columns.get("day" if name == "date" else name)
        if column is not None:  # else it is of no date, as all the others
            yield column.desc() if word.startswith("-") else column
    for one in query.group_by:
        yield from GROUPS[one]


async def sums_of(session: ReadSession, sums: Any) -> list[UsageSum]:
    """The rows of `db.usage.summed`, with names."""
    rows = [dict(row) for row in (await session.exec(sums)).mappings()]
    ids = [{row.get(key) or 0 for row in rows} for key in ("user_id", "credential_id")]
    users, keys = await names(session, *ids)
    for row in rows:
        row["date"] = day_of(row["day"]) if "day" in row else None
        row["user_name"] = users.get(row.get("user_id", 0))
        row["credential_name"] = keys.get(row.get("credential_id", 0))
        if "model_id" not in row:
            row["model_name"] = None
        for key in ("user_id", "credential_id"):
            row[key] = row.get(key) or None
    return [UsageSum.model_validate(row) for row in rows]


async def _shown(session: ReadSession, ids: Sequence[int]) -> dict[int, UsageEntry]:
    rows = (await session.exec(select(Usage).where(col(Usage.id).in_(ids)))).all()
    users, keys = await names(
        session, {row.user_id or 0 for row in rows}, {row.credential_id or 0 for row in rows}
    )
    return {
        row.id or 0: UsageEntry.model_validate(
            row.model_dump()
            | {
                "user_name": users.get(row.user_id or 0),
                "credential_name": keys.get(row.credential_id or 0),
                "model_name": row.model,
                "prompt_token_count": row.prompt_tokens,
                "completion_token_count": row.completion_tokens,
                "completed": not row.cut and row.status < 400,
                "started_at": datetime.fromtimestamp(row.started_at, UTC),
            }
        )
        for row in rows
    }
