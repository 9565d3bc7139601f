"""/v2/watch: every kind in one stream."""

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from gpustack.errors import BadRequest, raises
from gpustack.server.api.context import Changes, Db
from gpustack.server.api.repeated import Repeated
from gpustack.server.api.streams import WATCHED, watch_of
from gpustack.server.auth.principals import Gateway, Watcher
from gpustack.server.db.database import current_revision

router = APIRouter(prefix="/v2/watch", tags=["watch"], route_class=Repeated)


class Flushed(BaseModel):
    cursor: str


@router.get("", response_class=StreamingResponse, responses=WATCHED)
@raises(BadRequest)
async def watch(
    feed: Changes, watcher: Watcher, kinds: str, since: str | None = None
) -> StreamingResponse:
    """The list of each kind as puts, `synced`, then every change. Kinds: comma-separated.

    JSON lines; Server-Sent Events where `Accept` asks for them.
    """
    wanted = frozenset(kind.strip() for kind in kinds.split(",") if kind.strip())
    return watch_of(feed, wanted, watcher, since)


@router.post("/flush")
async def flush_watches(db: Db, feed: Changes, gateway: Gateway) -> Flushed:
    """Answer once all that was committed before is on the watches of this server."""
    async with db.read() as session:
        revision = await current_revision(session)
    await feed.reach(revision)
    return Flushed(cursor=feed.cursor(revision))
