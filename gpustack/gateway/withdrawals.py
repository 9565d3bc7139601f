"""What is open when its credential is withdrawn: requests to models, and tunnels."""

import asyncio
from collections.abc import Callable
from typing import Final

from gpustack.forward.listener import Server
from gpustack.gateway.inference import open_requests
from gpustack.gateway.tunnels import Tunnels
from gpustack.gateway.watch import Watch

_EVERY_S: Final = 0.25


class Withdrawals:
    """Ends tunnels whose credential no longer stands; requests too, if the operator wants that."""

    def __init__(self) -> None:
        self._dirty = asyncio.Event()

    def changed(self) -> None:
        """The tables are others now."""
        self._dirty.set()

    async def run(
        self, watch: Watch, listener: Server, tunnels: Tunnels, ends: Callable[[], bool]
    ) -> None:
        """Look after each change, at most once in 250 ms, until cancelled.

        Args:
            ends: whether such requests end; else they finish.
        """
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if watch.tables is not None:
                tunnels.end_withdrawn(watch.tables)
            if ends() and watch.tables is not None:
                for request in list(open_requests(listener)):
                    request.end_if_withdrawn(watch.tables)
            await asyncio.sleep(_EVERY_S)
