"""What every schema shares."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, PlainSerializer, model_validator

T = TypeVar("T")


def _rfc3339(time: datetime) -> str:
    aware = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return aware.isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str)]


class Input(BaseModel):
    """A body that somebody sends: an unknown field is a mistake worth naming."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _is_text_that_can_be_kept(cls, body: Any) -> Any:
        """Half a surrogate pair cannot be encoded, and NUL ends a text for half the world."""
        for text in _texts(body):
            if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError("a text holds NUL or half a surrogate pair, which is no character")
        return body


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


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
