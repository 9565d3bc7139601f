"""Waiting until nothing is left on a worker that is being drained."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from gpustack.errors import Conflict, Unavailable
from gpustack.schemas.workers import Leaving, Scheduling, Worker

if TYPE_CHECKING:
    from gpustack.client import Client

#: Between two looks at the worker.
LOOK_S = 1.0
#: When nothing has moved for so long, nothing will: longer than a model waits to look again.
STUCK_S = 15.0


async def until_drained(
    client: "Client", worker: Worker, tell: Callable[[str], None], *, timeout_s: float | None
) -> None:
    """Return once no instance is left on `worker`, which is being drained.

    Args:
        tell: hears of every step, one sentence each.
        timeout_s: give up after so many seconds; None: only when nothing moves any more.

    Raises:
        Unavailable: what is left does not move, or not in time; the message says what and why.
            The worker goes on being drained.
        Conflict: somebody has ended the drain.
        NotFound: the worker was deleted meanwhile.
    """
    loop = asyncio.get_running_loop()
    began = moved = loop.time()
    told: dict[int, str] = {}
    while True:
        if worker.scheduling is not Scheduling.DRAINING:
            raise Conflict(f"{worker.name} is not being drained any more, but {worker.scheduling}")
        left = worker.leaving
        if not left:
            return
        if (said := _news(left, told)) is not None:
            tell("; ".join([f"{worker.name}: {_count(left)} left", *said]))
            moved = loop.time()
        if not all(one.waits for one in left):
            moved = loop.time()
        if loop.time() - moved > STUCK_S:
            raise Unavailable(f"{_count(left)} of {worker.name} cannot move now: {_whys(left)}")
        if timeout_s is not None and loop.time() - began > timeout_s:
            raise Unavailable(
                f"not within {timeout_s:g} s: {_count(left)} left on {worker.name}: {_whys(left)}"
            )
        await asyncio.sleep(LOOK_S)
        with suppress(Unavailable):  # a server that is away for a while ends no drain
            worker = await client.workers.get(worker.id)


def _news(left: Sequence[Leaving], told: dict[int, str]) -> list[str] | None:
    """What of those that are left was not `told` yet, and is now; None: nothing has changed."""
    now = {one.id: f"{one.name}: {one.message}" for one in left}
    if now == told:
        return None
    news = [words for key, words in now.items() if told.get(key) != words]
    told.clear()
    told.update(now)
    return news


def _count(left: Sequence[Leaving]) -> str:
    return f"{len(left)} instance{'' if len(left) == 1 else 's'}"


def _whys(left: Sequence[Leaving]) -> str:
    return "; ".join(f"{one.name}: {one.message}" for one in left)
