"""A watch that outlives its connections."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from gpustack.client.place import Place
from gpustack.errors import Forbidden, GPUStackError, Unauthorized
from gpustack.lib.backoff import delay_s
from gpustack.schemas.watch import EventType, WatchEvent

logger = logging.getLogger(__name__)

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
    place, failures = Place(since), 0
    while True:
        if place.connect():
            yield WatchEvent(type=EventType.RESYNC)
        try:
            async with aclosing(connect(place.cursor)) as stream:
                async for event in stream:
                    place.hear(event.type, event.cursor)
                    if event.type is EventType.SYNCED:
                        failures = 0
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
