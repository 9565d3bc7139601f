"""The one loop that every controller shares."""

import asyncio
import logging
from typing import Protocol

from gpustack.errors import Conflict, DatabaseAway, LeaseLost, Unavailable
from gpustack.schemas.events import ActorKind
from gpustack.server.controllers.queue import WorkQueue
from gpustack.server.db.acting import Actor, become

logger = logging.getLogger(__name__)

#: How long each worker of a queue pauses while the database cannot be used.
AWAY_S = 1.0


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
    """Work on `queue` for ever, `workers` keys at a time.

    Raises:
        ExceptionGroup: of LeaseLost: another server does this now.
    """
    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(_work(name, reconciler, queue))


async def _work(name: str, reconciler: Reconciler, queue: WorkQueue[int]) -> None:
    become(Actor(ActorKind.CONTROLLER, name))
    while True:
        key = await queue.get()
        try:
            again_s = await reconciler.reconcile(key)
        except Conflict:
            queue.add(key)  # somebody wrote first; the next read sees what they wrote
        except LeaseLost:
            raise
        except DatabaseAway:  # which it has said itself; nothing else would fare better now
            queue.add(key)
            await asyncio.sleep(AWAY_S)
        except Unavailable as error:
            logger.warning("%s: reconciling %d has to wait: %s", name, key, error)
            queue.retry(key)
        except Exception:  # one object's trouble must not stop the others
            logger.exception("%s: reconciling %d failed", name, key)
            queue.retry(key)
        else:
            queue.forget(key)
            if again_s is not None:
                queue.add_later(key, again_s)
        finally:
            queue.done(key)
