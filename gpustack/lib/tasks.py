"""Structured concurrency helpers. Tasks are started on a TaskGroup, never with create_task."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


async def forever(
    name: str,
    step: Callable[[], Awaitable[None]],
    *,
    every_s: float,
    max_backoff_s: float = 60.0,
) -> None:
    """Run `step` every `every_s` seconds until cancelled.

    A failed step is logged with its traceback and retried with doubling, jittered backoff: the
    loop outlives any one failure. Cancellation is never swallowed.
    """
    failures = 0
    while True:
        try:
            await step()
            failures = 0
        except Exception:  # the loop outlives any one failure
            failures += 1
            logger.exception("%s failed (%d in a row)", name, failures)
        delay = min(every_s * 2 ** min(failures, 10), max(every_s, max_backoff_s))
        await asyncio.sleep(delay * random.uniform(0.9, 1.1))  # noqa: S311
