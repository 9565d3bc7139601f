"""Requests to models that are open when their credential is withdrawn."""

import asyncio
from collections.abc import Callable
from typing import Final

from gpustack.forward.listener import Server
from gpustack.gateway.inference import open_requests
from gpustack.gateway.watch import Watch

_EVERY_S: Final = 0.25


class Withdrawals:
    """Ends requests whose credential no longer stands, where the operator wants that."""

    def __init__(self) -> None:
        self._dirty = asyncio.Event()

    def changed(self) -> None:
        """The tables are others now."""
        self._dirty.set()

    async def run(self, watch: Watch, listener: Server, ends: Callable[[], bool]) -> None:
        """Look after each change, at most once in 250 ms, until cancelled.

        Args:
            ends: whether such requests end; else they finish.
        """
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if ends() and watch.tables is not None:
                for request in list(open_requests(listener)):
                    request.end_if_withdrawn(watch.tables)
            await asyncio.sleep(_EVERY_S)
