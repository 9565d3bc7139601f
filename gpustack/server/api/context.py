"""What routes work with, as parameter types."""

from typing import Annotated

from fastapi import Depends, Path, Query, Request

from gpustack.schemas.base import Pagination
from gpustack.server.db.database import Database
from gpustack.server.feed import Feed
from gpustack.server.heartbeats import Heartbeats


def _db(request: Request) -> Database:
    db: Database = request.app.state.db
    return db


def _feed(request: Request) -> Feed:
    feed: Feed = request.app.state.feed
    return feed


def _heartbeats(request: Request) -> Heartbeats:
    heartbeats: Heartbeats = request.app.state.heartbeats
    return heartbeats


Db = Annotated[Database, Depends(_db)]
Changes = Annotated[Feed, Depends(_feed)]
Beats = Annotated[Heartbeats, Depends(_heartbeats)]

#: As large as a database's integer.
Id = Annotated[int, Path(ge=1, le=2**63 - 1)]
IdFilter = Annotated[int | None, Query(ge=1, le=2**63 - 1)]
PageNumber = Annotated[int, Query(ge=1, le=10**12)]
PerPage = Annotated[int, Query(ge=1, le=100, alias="perPage")]


def pagination(page: int, per_page: int, total: int) -> Pagination:
    return Pagination(
        page=page, perPage=per_page, total=total, totalPage=(total + per_page - 1) // per_page
    )
