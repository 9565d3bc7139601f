"""Watches as answers: JSON lines, or Server-Sent Events for browsers."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from gpustack.errors import BadRequest, Forbidden
from gpustack.schemas import wire
from gpustack.server.auth.principals import Principal
from gpustack.server.db import tables
from gpustack.server.feed import Feed
from gpustack.server.views import VISIBLE, Audience

NDJSON, SSE = "application/x-ndjson", "text/event-stream"

_EVENT = {"$ref": "#/components/schemas/WatchEvent"}
_SENT_EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": _EVENT,
        },
    },
}
#: Kinds of which administrators see what everybody sees.
OF_ANY_USER = frozenset({wire.API_KEYS})
#: What a route that can be watched says of its answer.
WATCHED: dict[int | str, dict[str, Any]] = {
    200: {"content": {NDJSON: {"itemSchema": _EVENT}, SSE: {"itemSchema": _SENT_EVENT}}}
}


def watch_of(
    feed: Feed, kinds: frozenset[str], principal: Principal, since: str | None
) -> "WatchResponse":
    """The stream of changes of `kinds`, as `principal` sees them.

    Raises:
        BadRequest: a kind does not exist.
        Forbidden: a kind is not this principal's to see.
    """
    unknown = kinds - set(tables.KINDS)
    if unknown or not kinds:
        known = ", ".join(sorted(tables.KINDS))
        raise BadRequest(f"kinds: want some of {known}, got {','.join(sorted(unknown)) or 'none'}")
    audience = Audience.of(principal)
    hidden = kinds - VISIBLE[audience.kind]
    if hidden:
        raise Forbidden(f"this credential may not watch {', '.join(sorted(hidden))}")

    def watch(since: str | None) -> AsyncGenerator[bytes, None]:
        by_admin = principal.is_admin and bool(kinds - OF_ANY_USER)
        return feed.watch(kinds, audience, since, principal.credential_id, by_admin=by_admin)

    return WatchResponse(watch, since)


class WatchResponse(StreamingResponse):
    """A watch in the shape that is asked for: JSON lines, or Server-Sent Events for browsers.

    An event's id is its cursor, so a browser that connects anew goes on where it was.
    """

    def __init__(
        self, watch: Callable[[str | None], AsyncGenerator[bytes, None]], since: str | None
    ) -> None:
        super().__init__((), media_type=NDJSON)
        self._watch = watch
        self._since = since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope)
        # A browser that connects anew asks for the same `since`, and says how far it came.
        lines = self._watch(asked.get("last-event-id") or self._since)
        self.body_iterator = lines
        if SSE in asked.get("accept", ""):
            self.headers["content-type"] = SSE
            self.headers["cache-control"] = "no-store"
            self.body_iterator = events(lines)
        async with aclosing(lines):
            await super().__call__(scope, receive, send)


async def events(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Server-Sent Events out of a watch's lines; a heartbeat is one too."""
    async for line in lines:
        event = json.loads(line)
        fields = [b"event: %b" % event["type"].encode(), b"data: %b" % line.rstrip(b"\n")]
        if event["cursor"] is not None:
            fields.insert(0, b"id: %b" % event["cursor"].encode())
        yield b"\n".join(fields) + b"\n\n"
