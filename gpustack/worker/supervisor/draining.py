"""Waiting until an engine has answered what it has begun to answer."""

import asyncio
from collections.abc import Collection
from typing import Final

from gpustack.lib import platform
from gpustack.lib.secrets import Secret
from gpustack.worker.supervisor.progress import read_metrics, values

#: Seconds between two looks. Two in a row must find it idle: what it counts as answered may
#: still be on its way out.
LOOK_EVERY_S: Final = 0.2


async def until_idle(port: int, secret: Secret, gauges: Collection[str]) -> None:
    """Return once the engine has no request, or nobody can tell.

    One that does not say how many it has, as llama-box, is idle when nobody is connected to it:
    callers and engines close connections that they do not use within a minute.

    Args:
        gauges: its metrics whose sum is the number of requests that it has.
    """
    idle = 0
    while idle < 2:
        try:
            seen = values(await read_metrics(port, secret), gauges)
        except TimeoutError:
            idle = 0  # too busy to say so
        except OSError:
            return  # it does not listen any more
        else:
            requests = sum(seen.values()) if seen else platform.connections_to(port)
            if requests is None:
                return
            idle = 0 if requests > 0 else idle + 1
        await asyncio.sleep(LOOK_EVERY_S)
