"""Takes usage from the spools to the server."""

import asyncio
import logging
from pathlib import Path
from typing import Final

import msgspec

from gpustack.forward.fetch import FetchFailed, fetch
from gpustack.forward.http1 import Headers
from gpustack.forward.upstream import Address, Pool
from gpustack.gateway.spool import Spool
from gpustack.lib.tasks import forever

logger = logging.getLogger(__name__)

_EVERY_S: Final = 1.0
_LEFT_OVER_EVERY_S: Final = 30.0
_UNREADABLE: Final = frozenset({400, 413, 422})


class Delivery:
    """Sends what is left over from earlier lives first, then this life's usage."""

    def __init__(
        self, pool: Pool, server: Address, credential: str, spool: Spool, folder: Path
    ) -> None:
        self._pool = pool
        self._server = server
        self._headers: Headers = [
            (b"host", b"%b:%d" % (server[0].encode(), server[1])),
            (b"authorization", b"Bearer " + credential.encode()),
            (b"content-type", b"application/json"),
        ]
        self._spool = spool
        self._folder = folder
        self._left: list[Spool] = []
        self._looked_at = float("-inf")
        self._dropped = 0

    async def run(self) -> None:
        """Send a batch about every second, until cancelled."""
        await forever("sending usage", self.step, every_s=_EVERY_S)

    async def step(self) -> None:
        """Send all there is, as far as the server takes it."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_at >= _LEFT_OVER_EVERY_S:
            self._looked_at = now
            self._left += Spool.left_over(self._folder)
        while self._left:
            if not await self._send_all(self._left[0]):
                return
            self._left.pop(0).close()
        await self._send_all(self._spool)
        if self._spool.dropped > self._dropped:
            logger.warning("%d usage records are lost: the spool is full", self._spool.dropped)
            self._dropped = self._spool.dropped

    async def _send_all(self, spool: Spool) -> bool:
        """Whether the server has all of it now."""
        while True:
            try:
                batch = spool.next_batch()
            except OSError:  # the spool has said so; later its disk may have room
                return False
            if batch is None:
                return True
            try:
                answer = await fetch(
                    self._pool,
                    self._server,
                    "POST",
                    b"/v2/usage",
                    self._headers,
                    body=msgspec.json.encode(batch),
                )
            except FetchFailed:
                return False
            if answer.status in _UNREADABLE:
                # It would be refused for ever, and everything behind it would wait for ever.
                logger.error("the server cannot read %d usage records", len(batch.records))
            elif answer.status >= 300:
                logger.warning("the server refuses usage with status %d", answer.status)
                return False
            spool.acked()

    async def close(self) -> None:
        """Send the rest if the server is there, and let go of the files."""
        try:
            async with asyncio.timeout(2.0):
                await self.step()
        except TimeoutError:
            pass
        for spool in (*self._left, self._spool):
            spool.close()
