"""What every schema shares."""

from collections.abc import Iterable
from datetime import UTC, datetime
from math import isfinite
from typing import Annotated, Any, Generic, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

T = TypeVar("T")


def _rfc3339(time: datetime) -> str:
    aware = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return aware.isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str)]


class Schema(BaseModel):
    """Made ready when it is first used: at a start most are not, and all would take a while."""

    model_config = ConfigDict(defer_build=True)


class Input(Schema):
    """What somebody sends, in a query or a body: an unknown field is a mistake worth naming."""

    # FastAPI makes these ready at once; later it would warn of what it put there itself.
    model_config = ConfigDict(extra="forbid", defer_build=False)

    @model_validator(mode="before")
    @classmethod
    def _can_be_kept(cls, body: Any) -> Any:
        if problem := _problem(body):
            raise ValueError(problem)
        waiting: list[tuple[str, Any]] = [("", body)]
        while waiting:  # however deep it is
            place, container = waiting.pop()
            for key, value in _items(container):
                if problem := _problem(key):
                    raise ValueError(f"{place[:-1]}: {problem}" if place else problem)
                if isinstance(value, dict | list | tuple):
                    waiting.append((f"{place}{key}.", value))
                elif problem := _problem(value):
                    raise ValueError(f"{place}{key}: {problem}")
        return body


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(container, dict):
        return container.items()
    return enumerate(container) if isinstance(container, list | tuple) else ()


def _problem(value: Any) -> str:
    """Why `value` cannot be kept; empty: it can, as far as it is no list or object.

    Half a surrogate pair cannot be encoded, and NUL ends a text for half the world; no database
    has larger integers, and JSON knows neither infinity nor NaN.
    """
    # Not a match statement: this runs for every value of a report, 33 times a second with a
    # thousand workers.
    if isinstance(value, str):
        if "\0" in value or not (value.isascii() or _encodes(value)):
            return "a text holds NUL or half a surrogate pair, which is no character"
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            return "want an integer of at most 64 bits"
    elif isinstance(value, float) and not isfinite(value):
        return "want a finite number"
    return ""


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Body(Input):
    """A body that somebody sends: in JSON a number is no text, and true is no number."""

    model_config = ConfigDict(strict=True)


def _is_one_line(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("want one line of letters, digits, signs and spaces between them")
    return text


#: Text that is shown as it is: in tables, metrics and logs.
OneLine = Annotated[
    str, Field(json_schema_extra={"pattern": r"^\S(.*\S)?$"}), AfterValidator(_is_one_line)
]


class Fact(Schema):
    """Something the pure core reasons on: it never changes."""

    model_config = ConfigDict(frozen=True)


class Pagination(Schema):
    page: int
    perPage: int
    total: int
    totalPage: int


class Page(Schema, Generic[T]):
    items: list[T]
    pagination: Pagination
