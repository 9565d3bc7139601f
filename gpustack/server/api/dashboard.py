"""/v2/dashboard: counts, load and usage at a glance."""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import model_validator
from sqlalchemy import and_, func
from sqlalchemy import select as select_rows
from sqlmodel import col, select

from gpustack.schemas.base import Input
from gpustack.schemas.dashboard import (
    ActiveModel,
    Dashboard,
    Load,
    LoadHistory,
    ModelUsage,
    Point,
    ResourceClaim,
    ResourceCounts,
    SystemLoad,
    UsageStats,
    UserUsage,
)
from gpustack.schemas.placements import Claim
from gpustack.schemas.usage import UsageBy
from gpustack.server.api.context import Db
from gpustack.server.api.lists import Day, RowId
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db.database import ReadSession
from gpustack.server.db.tables import (
    Device,
    Instance,
    LoadSample,
    Member,
    Model,
    ModelVersion,
    UsageHour,
    Worker,
)
from gpustack.server.db.usage import GROUPS, names, since, summed, today, until
from gpustack.server.db.versions import of_newest_version
from gpustack.server.load import current_load

router = APIRouter(prefix="/v2/dashboard", tags=["dashboard"], route_class=Repeated)

#: Days that are shown unless others are asked for, today included.
GLANCE_DAYS, STATS_DAYS = 8, 31
TOP = 10
_DAY_S, _MINUTE_S = 86_400, 60


class StatsQuery(Input):
    """Days are in UTC; both are part of what is asked for."""

    start_date: Day | None = None
    end_date: Day | None = None
    model_ids: list[RowId] = []
    user_ids: list[RowId] = []

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> "StatsQuery":
        if self.start_date and self.end_date and self.start_date > self.end_date:
            raise ValueError(f"start_date {self.start_date} is after end_date {self.end_date}")
        return self

    def where(self) -> list[Any]:
        last = self.end_date or today()
        first = self.start_date or _before(last, STATS_DAYS)
        where = [since(first), until(last)]
        where += [col(UsageHour.model_id).in_(self.model_ids)] if self.model_ids else []
        return where + ([col(UsageHour.user_id).in_(self.user_ids)] if self.user_ids else [])


def _before(last: date, days: int) -> date:
    """The first of so many days."""
    return max(date.min + timedelta(days), last) - timedelta(days - 1)


Stats = Annotated[StatsQuery, Query()]


@router.get("")
async def get_dashboard(db: Db, admin: Admin) -> Dashboard:
    """Everything at a glance: now, the last hour, the last week."""
    async with db.read() as session:
        last_days = since(_before(today(), GLANCE_DAYS))
        return Dashboard(
            resource_counts=await _counts(session),
            system_load=await _load(session),
            model_usage=await _usage(session, last_days),
            active_models=await _active_models(session, last_days),
        )


@router.get("/usage")
async def get_dashboard_usage(db: Db, admin: Admin, query: Stats) -> ModelUsage:
    """Requests and tokens by day, and who has used most."""
    async with db.read() as session:
        return await _usage(session, *query.where())


@router.get("/usage/stats")
async def get_dashboard_usage_stats(db: Db, admin: Admin, query: Stats) -> UsageStats:
    """Requests and tokens by day."""
    async with db.read() as session:
        return await _stats(session, *query.where())


async def _counts(session: ReadSession) -> ResourceCounts:
    counts = [
        (await session.exec(select(func.count()).select_from(table))).one()
        for table in (Worker, Device, Model, Instance)
    ]
    return ResourceCounts(
        worker_count=counts[0],
        gpu_count=counts[1],
        model_count=counts[2],
        model_instance_count=counts[3],
    )


async def _load(session: ReadSession) -> SystemLoad:
    samples = (await session.exec(select(LoadSample).order_by(col(LoadSample.minute)))).all()
    now = await current_load(session, 0)
    kinds = tuple(Load.model_fields)
    history = {
        kind: [
            Point(timestamp=one.minute * _MINUTE_S, value=value)
            for one in samples
            if (value := getattr(one, kind)) is not None
        ]
        for kind in kinds
    }
    current = {kind: getattr(now, kind) or 0.0 for kind in kinds}
    return SystemLoad(current=Load(**current), history=LoadHistory(**history))


async def _stats(session: ReadSession, *where: Any) -> UsageStats:
    by_day = summed([UsageBy.DATE], *where).order_by(*GROUPS[UsageBy.DATE])
    days = (await session.exec(by_day)).all()

    def points(name: str) -> list[Point]:
        return [Point(timestamp=one.day * _DAY_S, value=getattr(one, name)) for one in days]

    return UsageStats(
        api_request_history=points("request_count"),
        prompt_token_history=points("prompt_token_count"),
        completion_token_history=points("completion_token_count"),
    )


async def _usage(session: ReadSession, *where: Any) -> ModelUsage:
    tokens = func.sum(col(UsageHour.prompt_tokens) + col(UsageHour.completion_tokens))
    by_user = summed([UsageBy.USER], *where, UsageHour.user_id != 0)
    rows = (await session.exec(by_user.order_by(tokens.desc()).limit(TOP))).all()
    users, _ = await names(session, {row.user_id for row in rows}, set())
    top = [
        UserUsage(
            user_id=row.user_id,
            username=users.get(row.user_id, ""),
            prompt_token_count=row.prompt_token_count,
            completion_token_count=row.completion_token_count,
        )
        for row in rows
    ]
    stats = await _stats(session, *where)
    return ModelUsage(**dict(stats), top_users=top)


async def _active_models(session: ReadSession, last_days: Any) -> list[ActiveModel]:
    used = (
        select(func.sum(col(UsageHour.prompt_tokens) + col(UsageHour.completion_tokens)))
        .where(col(UsageHour.model_id) == col(Model.id), last_days)
        .correlate(Model)
        .scalar_subquery()
    )
    tokens = func.coalesce(used, 0)
    count = (
        select(func.count())
        .where(col(Instance.model_id) == col(Model.id))
        .correlate(Model)
        .scalar_subquery()
    )
    query: Any = (
        select_rows(col(Model.id), col(Model.name), col(ModelVersion.spec), count, tokens)
        .join(ModelVersion, and_(*of_newest_version()))
        .where(count > 0)
        .order_by(tokens.desc(), col(Model.id))
        .limit(TOP)
    )
    rows = (await session.exec(query)).all()
    claims = await _claims(session, [row[0] or 0 for row in rows])
    return [
        ActiveModel(
            id=model_id or 0,
            name=name,
            categories=spec.get("categories", []),
            resource_claim=claims[model_id or 0],
            instance_count=instances,
            token_count=used,
        )
        for model_id, name, spec, instances, used in rows
    ]


async def _claims(session: ReadSession, models: Sequence[int]) -> dict[int, ResourceClaim]:
    """By model: what its instances claim, with all their parts."""
    claims = {model_id: ResourceClaim(ram=0, vram=0) for model_id in models}
    of_whole = select(Instance.model_id, Instance.claim)
    of_parts = select(Instance.model_id, Member.claim).join(
        Member, col(Member.instance_id) == col(Instance.id)
    )
    for query in (of_whole, of_parts):
        for model_id, raw in await session.exec(query.where(col(Instance.model_id).in_(models))):
            claim = Claim.model_validate(raw or {})
            claims[model_id].ram += claim.ram_bytes
            claims[model_id].vram += sum(claim.vram_bytes.values())
    return claims
