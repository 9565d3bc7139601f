"""The watch stream: one JSON object per line."""

from enum import StrEnum
from typing import Any

from gpustack.schemas.base import Schema


class EventType(StrEnum):
    PUT = "put"  # the object as it is now
    DELETE = "delete"  # the object is gone
    SYNCED = "synced"  # everything that existed when the stream began has been sent
    RESYNC = "resync"  # the history does not reach back to `since`: a full list follows
    HEARTBEAT = "heartbeat"  # nothing happened, up to and including `cursor`


class WatchEvent(Schema):
    type: EventType
    kind: str | None = None
    id: int | None = None
    cursor: str | None = None
    data: Any = None
