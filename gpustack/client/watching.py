"""A watch that outlives its connections."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from gpustack.errors import Forbidden, GPUStackError, Unauthorized
from gpustack.lib.backoff import delay_s
from gpustack.schemas.watch import EventType, WatchEvent

logger = logging.getLogger(__name__)

#: Events whose cursor is a place to resume from.
COVERING = frozenset({EventType.SYNCED, EventType.HEARTBEAT})

Connect = Callable[[str | None], AsyncGenerator[WatchEvent, None]]


async def follow(
    connect: Connect,
    since: str | None = None,
    *,
    first_s: float = 0.1,
    limit_s: float = 10.0,
) -> AsyncGenerator[WatchEvent, None]:
    """Events for ever: each broken connection is replaced, and resumes where the last one was.

    A `resync` comes before every whole list, the first one too. So between `resync` and `synced`
    stands all that exists, and what was not in it is gone; a `synced` without a `resync` before it
    ends a resumed history and says nothing about absence.

    Args:
        connect: opens one connection from a cursor.
        first_s: wait before the first new connection; doubles to `limit_s`, with jitter.

    Raises:
        Unauthorized, Forbidden: the server refuses this credential.
    """
    cursor, failures = since, 0
    while True:
        if cursor is None:
            yield WatchEvent(type=EventType.RESYNC)
        synced = False
        try:
            async with aclosing(connect(cursor)) as stream:
                async for event in stream:
                    if event.type is EventType.RESYNC:
                        cursor, synced = None, False
                    elif event.type is EventType.SYNCED:
                        synced, failures = True, 0
                    # These cover all that was sent before them. One inside an unfinished list, or
                    # of a change in a batch that is out of order, would skip the rest of it.
                    if synced and event.type in COVERING and event.cursor is not None:
                        cursor = event.cursor
                    yield event
            why = "the server ended it"
        except (Unauthorized, Forbidden):
            raise
        except GPUStackError as error:
            why = str(error)
        failures += 1
        if failures == 1:
            logger.info("watch interrupted: %s", why)
        wait_s = delay_s(failures, first_s=first_s, limit_s=limit_s)
        await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311
