"""Usage: requests as they were, and their sums by the hour."""

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import func, update
from sqlalchemy import select as select_rows
from sqlmodel import col, select

from gpustack.schemas.credentials import CredentialKind
from gpustack.schemas.usage import UsageBy, UsageRecord
from gpustack.server.db.database import ReadSession, WriteSession
from gpustack.server.db.tables import Credential, Usage, UsageHour, User

_HOUR_S, _HOURS, _FAILED = 3600, 24, 400
_SUMS = ("requests", "failed", "prompt_tokens", "completion_tokens")
_KEY = ("hour", "model_id", "user_id", "credential_id", "operation")
_EPOCH = date(1970, 1, 1)

#: What sums are made by -> the columns that say it.
GROUPS: dict[UsageBy, tuple[Any, ...]] = {
    UsageBy.DATE: ((col(UsageHour.hour) // _HOURS).label("day"),),
    UsageBy.MODEL: (col(UsageHour.model_id),),
    UsageBy.USER: (col(UsageHour.user_id),),
    UsageBy.CREDENTIAL: (col(UsageHour.credential_id),),
    UsageBy.OPERATION: (col(UsageHour.operation),),
}


async def add_usage(session: WriteSession, records: Sequence[UsageRecord]) -> None:
    """Store requests, and add them to the sums of their hours."""
    session.add_all(Usage(**record.model_dump()) for record in records)
    sums: dict[tuple[Any, ...], UsageHour] = {}
    for record in records:
        one = _as_sum(record)
        key = tuple(getattr(one, name) for name in _KEY)
        if (known := sums.setdefault(key, one)) is not one:
            known.model = one.model
            for name in _SUMS:
                setattr(known, name, getattr(known, name) + getattr(one, name))
    for key in sorted(sums):  # in one order, so that no two servers wait for each other
        await _add(session, sums[key])


def _as_sum(record: UsageRecord) -> UsageHour:
    return UsageHour(
        hour=int(record.started_at // _HOUR_S),
        model_id=record.model_id,
        model=record.model,
        user_id=record.user_id or 0,
        credential_id=record.credential_id or 0,
        operation=record.operation,
        requests=1,
        failed=int(record.status >= _FAILED),
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
    )


async def _add(session: WriteSession, one: UsageHour) -> None:
    same = [getattr(UsageHour, name) == getattr(one, name) for name in _KEY]
    more = {name: getattr(UsageHour, name) + getattr(one, name) for name in _SUMS}
    added = await session.exec(update(UsageHour).where(*same).values(model=one.model, **more))
    if not added.rowcount:
        session.add(one)


def summed(by: Iterable[UsageBy], *where: Any) -> Any:
    """Sums by all of `by`; by nothing: one row. Named as in `schemas.usage.UsageSum`, but `day`."""
    groups = [column for one in by for column in GROUPS[one]]
    total = {name: func.coalesce(func.sum(getattr(UsageHour, name)), 0) for name in _SUMS}
    query = select_rows(
        *groups,
        func.max(UsageHour.model).label("model_name"),
        total["requests"].label("request_count"),
        total["failed"].label("failed_count"),
        total["prompt_tokens"].label("prompt_token_count"),
        total["completion_tokens"].label("completion_token_count"),
    )
    return query.where(*where).group_by(*groups)


def since(day: date) -> Any:
    """The condition that a sum is of this day or later."""
    return col(UsageHour.hour) >= (day - _EPOCH).days * _HOURS


def until(day: date) -> Any:
    """The condition that a sum is of this day or earlier."""
    return col(UsageHour.hour) < ((day - _EPOCH).days + 1) * _HOURS


def day_of(number: int) -> date:
    """The date of a `day` of `summed`."""
    return _EPOCH + timedelta(days=int(number))  # MySQL divides to decimals


def today() -> date:
    return datetime.now(UTC).date()


async def names(
    session: ReadSession, users: set[int], credentials: set[int]
) -> tuple[dict[int, str], dict[int, str]]:
    """What users and API keys with these ids are called; what is gone is left out."""
    of_users = select(User.id, User.username).where(col(User.id).in_(users))
    of_keys = select(Credential.id, Credential.name).where(
        col(Credential.id).in_(credentials), Credential.kind == CredentialKind.KEY
    )
    found = [(await session.exec(query)).all() for query in (of_users, of_keys)]
    by_id = [{key: name for key, name in rows if key is not None} for rows in found]
    return by_id[0], by_id[1]
