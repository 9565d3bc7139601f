"""Resources of the API that are alike: what each of them can be asked, said once."""

import builtins
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from gpustack.client.caller import Caller, Filter, not_known, parsed
from gpustack.client.watching import follow
from gpustack.errors import NotFound
from gpustack.schemas.base import Page
from gpustack.schemas.watch import EventType, WatchEvent

T = TypeVar("T", bound=BaseModel)
C = TypeVar("C", bound=BaseModel)  # what is sent to make one
M = TypeVar("M", bound=BaseModel)  # what is answered to that
U = TypeVar("U", bound=BaseModel)  # what is sent to change one

#: Objects per page of a list, at most.
PER_PAGE = 100


class Resource:
    """Something at a path of the API.

    Attributes:
        PATH: such as /v2/models.
    """

    PATH: ClassVar[str]

    def __init__(self, caller: Caller) -> None:
        self._caller = caller


class Listed(Resource, Generic[T]):
    """A list of objects. Filters are keyword arguments: see the API's description at /docs.

    Attributes:
        KIND: what is in it.
    """

    KIND: type[T]

    async def page(self, page: int = 1, per_page: int = PER_PAGE, **filters: Filter) -> Page[T]:
        """One page, the first being 1."""
        return await pages_of(self._caller, self.PATH, self.KIND, page, per_page, filters)

    async def list(self, *, limit: int | None = None, **filters: Filter) -> "builtins.list[T]":
        """All of them, or the first `limit`, in the order of `sort_by`."""
        return await list_of(self._caller, self.PATH, self.KIND, limit, filters)


class Collection(Listed[T]):
    """Objects that have ids."""

    async def get(self, id: int) -> T:
        """Raises:
        NotFound: there is none with this id.
        """
        return await self._caller.one("GET", f"{self.PATH}/{id}", self.KIND)


class Named(Listed[T]):
    """Objects that have names, each its own."""

    async def by_name(self, name: str) -> T:
        """Raises:
        NotFound: none is called so.
        """
        for one in await self.list(name=name):
            return one
        raise NotFound(f"no {self.KIND.__name__.lower()} is called {name}")


class Creates(Resource, Generic[C, M]):
    """Attributes:
    CREATED: what is answered.
    """

    CREATED: type[M]

    async def create(self, wanted: C) -> M:
        return await self._caller.one("POST", self.PATH, self.CREATED, wanted)


class Updates(Collection[T], Generic[T, U]):
    async def update(self, id: int, wanted: U) -> T:
        """Change the whole of what can be said of it."""
        return await self._caller.one("PUT", f"{self.PATH}/{id}", self.KIND, wanted)


class Deletes(Resource):
    async def delete(self, id: int) -> None:
        await self._caller.call("DELETE", f"{self.PATH}/{id}")


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """One event of a followed collection.

    Attributes:
        type: resync: a whole list follows; put: `object` is how it is now; delete: that of `id` is
            gone; synced: the list is complete, what was not in it is gone; heartbeat.
        cursor: where to follow on from later, if there is one.
    """

    type: EventType
    id: int | None
    cursor: str | None
    object: T | None


class Follows(Listed[T]):
    """Objects whose changes can be followed."""

    async def follow(self, since: str | None = None) -> AsyncGenerator[Change[T], None]:
        """All there is, then each change, for ever: broken connections are resumed.

        Args:
            since: a cursor seen before; None: begin with the whole list.

        Raises:
            Unauthorized, Forbidden: the server refuses this credential.
        """

        def connect(cursor: str | None) -> AsyncGenerator[WatchEvent, None]:
            return self._caller.watch_at(self.PATH, {"watch": True, "since": cursor})

        async with aclosing(follow(connect, since)) as events:
            async for event in events:
                yield Change(event.type, event.id, event.cursor, self._shown(event))

    def _shown(self, event: WatchEvent) -> T | None:
        try:
            return None if event.data is None else self.KIND.model_validate(event.data)
        except ValidationError as error:
            raise not_known(error) from None


async def pages_of(
    caller: Caller, path: str, kind: type[T], page: int, per_page: int, filters: dict[str, Filter]
) -> Page[T]:
    asked = {"page": page, "perPage": per_page, **filters}
    answer: Any = parsed(Page[kind], await caller.call("GET", path, asked=asked))  # type: ignore[valid-type]
    return answer  # type: ignore[no-any-return]


async def list_of(
    caller: Caller, path: str, kind: type[T], limit: int | None, filters: dict[str, Filter]
) -> list[T]:
    """What stands on the pages of a list, up to `limit`."""
    items: list[T] = []
    page, per_page = 1, min(PER_PAGE, limit or PER_PAGE)
    while limit is None or len(items) < limit:
        got = await pages_of(caller, path, kind, page, per_page, filters)
        items += got.items
        if page >= got.pagination.totalPage:
            break
        page += 1
    return items[:limit]
