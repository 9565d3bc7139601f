"""What every schema shares."""

from datetime import UTC, datetime
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, PlainSerializer

T = TypeVar("T")


def _rfc3339(time: datetime) -> str:
    aware = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return aware.isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str)]


class Input(BaseModel):
    """A body that somebody sends: an unknown field is a mistake worth naming."""

    model_config = ConfigDict(extra="forbid")


class Fact(BaseModel):
    """Something the pure core reasons on: it never changes."""

    model_config = ConfigDict(frozen=True)


class Pagination(BaseModel):
    page: int
    perPage: int
    total: int
    totalPage: int


class Page(BaseModel, Generic[T]):
    items: list[T]
    pagination: Pagination
