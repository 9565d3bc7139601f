"""What routes work with, as parameter types."""

import re
from typing import Annotated

from fastapi import Depends, Path, Request
from pydantic import BeforeValidator
from starlette.requests import ClientDisconnect

from gpustack.errors import BadRequest, Contended, DatabaseAway, TooLarge, raises
from gpustack.server.db.database import Database
from gpustack.server.feed import Feed
from gpustack.server.heartbeats import Heartbeats

# Coroutines, since a plain function would be run in a thread.


@raises(Contended, DatabaseAway)
async def _db(request: Request) -> Database:
    db: Database = request.app.state.db
    return db


async def _feed(request: Request) -> Feed:
    feed: Feed = request.app.state.feed
    return feed


async def _heartbeats(request: Request) -> Heartbeats:
    heartbeats: Heartbeats = request.app.state.heartbeats
    return heartbeats


Db = Annotated[Database, Depends(_db)]
Changes = Annotated[Feed, Depends(_feed)]
Beats = Annotated[Heartbeats, Depends(_heartbeats)]

#: Of a body that is held as a whole; `gpustack apply` sends the longest.
BODY_BYTES = 4 * 2**20


def _is_written_out(value: object) -> object:
    """Else `1_0` and `10.0` would be 10, and a slip of a key would delete another object."""
    if isinstance(value, str) and not re.fullmatch("0|[1-9][0-9]*", value):
        raise ValueError("want an id such as 12")
    return value


#: As large as a database's integer.
Id = Annotated[int, Path(ge=1, le=2**63 - 1), BeforeValidator(_is_written_out)]


async def raw_body(request: Request, limit: int) -> bytes:
    """The body as it came. It can be asked for again.

    Raises:
        TooLarge: it is longer than `limit` bytes.
        BadRequest: the client left in the middle of it, and hears nothing of this.
    """
    if not hasattr(request.state, "raw_body"):
        raw = bytearray()
        try:
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > limit:
                    raise TooLarge(f"the body has more than {limit} bytes")
        except ClientDisconnect:
            raise BadRequest("the body has no end") from None
        request.state.raw_body = bytes(raw)
    body: bytes = request.state.raw_body
    return body
