"""How a process of the data plane begins and ends, gateway or relay."""

import gc
from typing import Final

from gpustack.forward.listener import Server
from gpustack.lib.role import Leave

#: How long open requests may go on when the node stops; the launcher is more patient than that.
STOP_LIMIT_S: Final = 30.0


async def end(server: Server, reason: Leave) -> None:
    """Drain `server`: patiently when a successor has the sockets, shortly when all stops."""
    if reason is Leave.STOP:
        await server.drain(idle_s=0.4, limit_s=STOP_LIMIT_S)
    else:
        await server.drain(idle_s=5.0, limit_s=600.0)


def tune_gc() -> None:
    """Keep the collector away from what lives as long as the process.

    Requests leave no cycles behind, so it has little to find; a full collection would stop
    every stream for the time it takes to walk the tables.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
