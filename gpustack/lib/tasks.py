"""Structured concurrency helpers. Tasks are started on a TaskGroup, never with create_task."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from gpustack.errors import Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextmanager
def cancellable() -> Iterator[None]:
    """A task that is told to end inside ends, whatever a library makes of that.

    A driver that is interrupted may raise an error of its own, and who catches that would go on.
    Not for what has a TaskGroup in it: in Python 3.11 its failure looks like a cancellation.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    except Exception:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from None
        raise


async def in_own_task(work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled with the caller and ended when this returns.

    The caller's cancellation is never lost in it. In the caller's own task it could be: a TaskGroup
    one of whose tasks fails at the same moment raises that failure alone.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # it is of no interest any more
        raise
    return task.result()


async def forever(
    name: str,
    step: Callable[[], Awaitable[None]],
    *,
    every_s: float,
    max_backoff_s: float = 60.0,
) -> None:
    """Run `step` every `every_s` seconds until cancelled.

    A failed step is logged (with its traceback, unless something is only unavailable) and retried
    with doubling, jittered backoff: the loop outlives any one failure. Cancellation is never
    swallowed.
    """
    failures = 0
    while True:
        try:
            await in_own_task(step())
            failures = 0
        except Unavailable as error:
            failures += 1
            logger.warning("%s has to wait: %s", name, error)
        except Exception:  # the loop outlives any one failure
            failures += 1
            logger.exception("%s failed (%d in a row)", name, failures)
        delay = min(every_s * 2 ** min(failures, 10), max(every_s, max_backoff_s))
        await asyncio.sleep(delay * random.uniform(0.9, 1.1))  # noqa: S311
