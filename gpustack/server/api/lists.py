"""Lists: a page of what there is, or a watch of it. What is asked for becomes SQL, all of it.

A resource declares what its list can be asked as a subclass of one of the queries below.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import date
from typing import Annotated, Any, ClassVar, Self, TypeVar

from fastapi import Query, Response
from pydantic import BaseModel, BeforeValidator, Field, field_validator
from sqlalchemy import ColumnElement, GenerativeSelect, func, or_
from sqlmodel import select

from gpustack.errors import BadRequest, Forbidden
from gpustack.schemas.base import Input, Page, Pagination
from gpustack.server.api.streams import watch_of
from gpustack.server.auth.principals import Principal
from gpustack.server.db.database import Database, ReadSession
from gpustack.server.feed import Feed
from gpustack.server.views import VISIBLE, Audience, load_ids, rows_for

T = TypeVar("T", bound="PageQuery")
Q = TypeVar("Q", bound=GenerativeSelect)

#: A list's query, as a parameter of its handler.
Asked = Annotated[T, Query()]
#: As large as a database's integer.
RowId = Annotated[int, Field(ge=1, le=2**63 - 1)]
IdFilter = RowId | None


def _is_written_out(day: Any) -> Any:
    """Else a number would be seconds since the epoch."""
    if isinstance(day, str) and not re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", day):
        raise ValueError("want a date such as 2026-01-31")
    return day


Day = Annotated[date, BeforeValidator(_is_written_out)]
#: From ids to what is shown of these objects, by id.
Show = Callable[[ReadSession, Sequence[int]], Awaitable[Mapping[int, BaseModel]]]


class PageQuery(Input):
    """Which part of a list."""

    page: int = Field(1, ge=1, le=10**12)
    perPage: int = Field(100, ge=1, le=100)

    @property
    def before(self) -> int:
        """How many objects stand on the pages before."""
        return (self.page - 1) * self.perPage


class ListQuery(PageQuery):
    """What every list of rows can be asked. Fields of subclasses are filters.

    A filter or a word of `sort_by` stands for the column of that name, or for the expression of
    that name in `COLUMNS`. Of a filter's several values, any may hold.

    Attributes:
        TABLE: whose rows are listed; it has an id.
        SORTED: the words of `sort_by`.
    """

    TABLE: ClassVar[Any]
    COLUMNS: ClassVar[Mapping[str, Any]] = {}
    SORTED: ClassVar[tuple[str, ...]] = ()
    #: Fields that are no filters.
    COMMON: ClassVar[frozenset[str]] = frozenset({"page", "perPage", "sort_by"})

    sort_by: str | None = None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Say in the API's description what this list can be sorted by."""
        words = "|".join(cls.SORTED)
        field = cls.model_fields["sort_by"]
        field.description = "Comma-separated; a minus before a word turns the order round."
        field.json_schema_extra = {"pattern": f"^-?({words})(,-?({words}))*$"}

    @field_validator("sort_by")
    @classmethod
    def _knows_thewords(cls, sort_by: str | None) -> str | None:
        unknown = [word for word in words(sort_by) if word.removeprefix("-") not in cls.SORTED]
        if unknown:
            raise ValueError(f"want some of {', '.join(cls.SORTED)}, got {unknown[0]!r}")
        return sort_by

    def filters(self) -> list[str]:
        """The filters that were given."""
        names = (name for name in type(self).model_fields if name not in self.COMMON)
        return [name for name in names if getattr(self, name) not in (None, [])]

    def where(self) -> list[ColumnElement[bool]]:
        return [self.holds(name, getattr(self, name)) for name in self.filters()]

    def holds(self, name: str, value: Any) -> ColumnElement[bool]:
        """The condition that a filter stands for."""
        column = self._column(name)
        condition = column.in_(value) if isinstance(value, list) else column == value
        return condition  # type: ignore[no-any-return]

    def order(self) -> list[Any]:
        """Oldest first, unless another order is asked for."""
        asked = words(self.sort_by)
        columns = [(self._column(word.removeprefix("-")), word[0] == "-") for word in asked]
        columns.append((self.TABLE.id, bool(asked) and asked[0][0] == "-"))
        return [column.desc() if is_turned else column for column, is_turned in columns]

    def part(self, query: Q) -> Q:
        """The page of a query's rows."""
        return query.offset(self.before).limit(self.perPage)

    def _column(self, name: str) -> Any:
        return self.COLUMNS[name] if name in self.COLUMNS else getattr(self.TABLE, name)


class SearchQuery(ListQuery):
    """A list that can be searched.

    Attributes:
        SEARCHED: columns; one of them holds what is searched for.
    """

    SEARCHED: ClassVar[tuple[str, ...]] = ("name",)

    search: str | None = Field(None, max_length=255, description="Part of the name, in any case.")

    def holds(self, name: str, value: Any) -> ColumnElement[bool]:
        if name != "search":
            return super().holds(name, value)
        columns = (self._column(column) for column in self.SEARCHED)
        return or_(*(column.icontains(value, autoescape=True) for column in columns))


class WatchQuery(SearchQuery):
    """A list that can be watched.

    Attributes:
        KIND: of `schemas.wire`.
    """

    KIND: ClassVar[str]
    COMMON: ClassVar[frozenset[str]] = ListQuery.COMMON | {"watch", "since"}

    watch: bool = Field(False, description="All there is, then every change, without end.")
    since: str | None = Field(None, description="With watch: a cursor seen before.")

    def whole(self) -> Self:
        """The same.

        Raises:
            BadRequest: it asks for a part. A watch is always of all that there is.
        """
        if filters := self.filters():
            raise BadRequest(f"watch=true is of all there is: leave out {', '.join(filters)}")
        return self


def words(sort_by: str | None) -> list[str]:
    """What to sort by, each perhaps with a minus."""
    return sort_by.split(",") if sort_by is not None else []


async def listed(db: Database, feed: Feed, principal: Principal, asked: WatchQuery) -> Response:
    """The list of a watched kind as `principal` sees it: a page, or its watch.

    A page is written here: FastAPI would check each object of it once more.

    Raises:
        BadRequest: filters came with a watch.
        Forbidden: the kind is not this principal's to see.
    """
    kind, audience = asked.KIND, Audience.of(principal)
    if asked.watch:
        return watch_of(feed, frozenset({kind}), principal, asked.whole().since)
    if kind not in VISIBLE[audience.kind]:
        raise Forbidden(f"this credential may not list {kind}")

    async def show(session: ReadSession, ids: Sequence[int]) -> Mapping[int, BaseModel]:
        return {one.id: one.view(audience) for one in await load_ids(session, kind, ids)}

    page = await page_of(db, asked, show, *rows_for(kind, audience))
    return Response(page.model_dump_json(), media_type="application/json")


async def page_of(
    db: Database, asked: ListQuery, show: Show, *where: ColumnElement[bool]
) -> Page[Any]:
    """The page that is asked for, of the rows that fit `where` too."""
    conditions = (*where, *asked.where())
    table = asked.TABLE
    async with db.read() as session:
        count = select(func.count()).select_from(table).where(*conditions)
        total = (await session.exec(count)).one()
        query = select(table.id).where(*conditions).order_by(*asked.order())
        ids = (await session.exec(asked.part(query))).all()
        shown = await show(session, ids)
    return Page(items=[shown[key] for key in ids], pagination=pagination(asked, total))


def pagination(asked: PageQuery, total: int) -> Pagination:
    pages = (total + asked.perPage - 1) // asked.perPage
    return Pagination(page=asked.page, perPage=asked.perPage, total=total, totalPage=pages)
