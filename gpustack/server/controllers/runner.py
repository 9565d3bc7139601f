"""The one loop that every controller shares."""

import asyncio
import logging
from typing import Protocol

from gpustack.errors import Conflict
from gpustack.server.controllers.queue import WorkQueue

logger = logging.getLogger(__name__)


class Reconciler(Protocol):
    async def reconcile(self, key: int) -> float | None:
        """Drive one object from what is to what should be.

        Receives an id, never an event: read everything needed from the database, so that a
        missed, repeated or reordered hint changes nothing. Must be idempotent.

        Returns:
            Seconds until this object should be looked at again; None: only on change.
        """
        ...


async def run(
    name: str, reconciler: Reconciler, queue: WorkQueue[int], *, workers: int = 2
) -> None:
    """Work on `queue` for ever, `workers` keys at a time."""
    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(_work(name, reconciler, queue))


async def _work(name: str, reconciler: Reconciler, queue: WorkQueue[int]) -> None:
    while True:
        key = await queue.get()
        try:
            again_s = await reconciler.reconcile(key)
        except Conflict:
            queue.add(key)  # somebody wrote first; the next read sees what they wrote
        except Exception:  # one object's trouble must not stop the others
            logger.exception("%s: reconciling %d failed", name, key)
            queue.retry(key)
        else:
            queue.forget(key)
            if again_s is not None:
                queue.add_later(key, again_s)
        finally:
            queue.done(key)
