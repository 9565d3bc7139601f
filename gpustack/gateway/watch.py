"""The gateway's ear: keeps the tables as the server has them, and can ask for the newest."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from gpustack.client.place import Place
from gpustack.forward.fetch import FetchFailed, fetch, open_lines
from gpustack.forward.http1 import Headers
from gpustack.forward.upstream import Address, Pool
from gpustack.gateway.tables import KINDS, Tables
from gpustack.lib.backoff import delay_s
from gpustack.lib.decode import UNREADABLE
from gpustack.lib.platform import remove_unfinished, write_private

logger = logging.getLogger(__name__)

REFRESH_S: Final = 0.5  # what one request waits at most for news
_REFRESH_EVERY_S: Final = 0.1  # strangers with made-up keys must not busy the server
_SILENCE_S: Final = 30.0  # heartbeats come every 10 s
_UNFINISHED_S: Final = 60.0  # nobody takes so long to write a snapshot


class _Event(msgspec.Struct):
    """See schemas.watch.WatchEvent."""

    type: str
    kind: str | None = None
    id: int | None = None
    cursor: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


class _Flushed(msgspec.Struct):
    cursor: str


_event = msgspec.json.Decoder(_Event)


class Watch:
    """The tables, followed from the server for ever.

    Attributes:
        tables: None until there are any; replaced only by a complete set.
        connected: what the server commits reaches the tables now.
    """

    def __init__(
        self,
        pool: Pool,
        server: Address,
        credential: str,
        *,
        tables: Tables | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.tables = tables
        self.connected = False
        self._pool = pool
        self._server = server
        self._headers: Headers = [
            (b"host", b"%b:%d" % (server[0].encode(), server[1])),
            (b"authorization", b"Bearer " + credential.encode()),
        ]
        self._changed = changed
        self._place = Place()
        self._progress = asyncio.Event()
        self._wanted = asyncio.Event()
        self._reconnect = asyncio.Event()
        self._asked: asyncio.Future[bool] | None = None

    # --- following -----------------------------------------------------------------------

    async def follow(self) -> None:
        """Follow the server until cancelled; while it is away, the tables stay as they are."""
        failures = 0
        while True:
            try:
                await self._follow_once()
                failures = 0
            except FetchFailed as error:
                failures = 1 if self.connected else failures + 1
                log = logger.warning if failures == 1 else logger.debug
                log("the server's watch ended: %s", error)
            except Exception:  # the loop outlives anything that a server may send
                failures += 1
                logger.exception("the server's watch failed")
            finally:
                self.connected = False
            self._reconnect.clear()
            try:
                async with asyncio.timeout(delay_s(failures, first_s=0.1, limit_s=5.0)):
                    await self._reconnect.wait()
            except TimeoutError:
                pass

    async def _follow_once(self) -> None:
        fresh = Tables() if self._place.connect() else None
        target = b"/v2/watch?kinds=" + ",".join(KINDS).encode()
        if self._place.cursor is not None:
            target += b"&since=" + quote(self._place.cursor).encode()
        async with open_lines(
            self._pool, self._server, target, self._headers, silence_s=_SILENCE_S
        ) as lines:
            if lines.status != 200:
                self._place = Place()  # perhaps it was the cursor; a whole list is never wrong
                raise FetchFailed(f"status {lines.status}")
            async for line in lines:
                if line:
                    fresh = self._take(_event.decode(line), fresh)
        raise FetchFailed("the server closed it")

    def _take(self, event: _Event, fresh: Tables | None) -> Tables | None:
        """Take in one event. `fresh`: the tables being filled until `synced`, else None."""
        self._place.hear(event.type, event.cursor)
        if event.type == "resync":
            self.connected = False
            return Tables()
        tables = self.tables if fresh is None else fresh
        if tables is not None and event.kind is not None and event.id is not None:
            if event.type == "put":
                try:
                    tables.put(event.kind, event.data)
                except UNREADABLE as error:
                    logger.warning("%s %d is not readable: %s", event.kind, event.id, error)
            elif event.type == "delete":
                tables.delete(event.kind, event.id)
        if event.type == "synced":
            if fresh is not None:
                self.tables, fresh = fresh, None
            self.connected = True
            logger.info("tables are complete")
        if fresh is None:
            self._progress.set()
            if event.type != "heartbeat":
                self._changed()
        return fresh

    # --- asking --------------------------------------------------------------------------

    async def refresh(self) -> bool:
        """Whether the tables hold, now, all that was committed before this call.

        Takes REFRESH_S at most. Callers share one question to the server; one who comes while
        it is being answered waits for the next, since his change may be newer than it.
        """
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_future()
            self._wanted.set()
        try:
            async with asyncio.timeout(REFRESH_S):
                return await asyncio.shield(self._asked)
        except TimeoutError:
            return False

    async def answer_refreshes(self) -> None:
        """Ask the server for those that wait in `refresh`, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            asked, self._asked = self._asked, None
            fresh = False
            try:
                async with asyncio.timeout(REFRESH_S):
                    fresh = await self._ask()
            except (TimeoutError, FetchFailed, *UNREADABLE):
                pass
            finally:
                if asked is not None and not asked.done():
                    asked.set_result(fresh)
            await asyncio.sleep(_REFRESH_EVERY_S)

    async def _ask(self) -> bool:
        if not self.connected:
            self._reconnect.set()
        answer = await fetch(
            self._pool,
            self._server,
            "POST",
            b"/v2/watch/flush",
            self._headers,
            timeout_s=REFRESH_S,
        )
        if answer.status != 200:
            return False
        wanted = msgspec.json.decode(answer.body, type=_Flushed).cursor
        while not self.connected or not reached(self._place.cursor, wanted):
            self._progress.clear()
            await self._progress.wait()
        return True


def reached(cursor: str | None, wanted: str) -> bool:
    """Whether `cursor` says all that `wanted` says: same epoch, and no older."""
    epoch, _, revision = (cursor or "").rpartition(".")
    wanted_epoch, _, wanted_revision = wanted.rpartition(".")
    if not revision.isdigit() or not wanted_revision.isdigit():
        return False
    return epoch == wanted_epoch and int(revision) >= int(wanted_revision)


class Disk:
    """The snapshot that a gateway starts from."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dirty = asyncio.Event()

    def load(self) -> Tables | None:
        """The tables of an earlier life; None, with a warning, if they are not usable."""
        # Another gateway of this node may be writing them just now.
        remove_unfinished(self._path.parent, self._path.name, older_than_s=_UNFINISHED_S)
        try:
            return Tables.load(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, *UNREADABLE) as error:
            logger.warning("snapshot %s is ignored: %s", self._path, error)
            return None

    def changed(self) -> None:
        self._dirty.set()

    async def keep(self, watch: Watch, *, every_s: float = 1.0) -> None:
        """Write the tables after each change, at most once in `every_s`, until cancelled."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if watch.tables is not None:
                raw = watch.tables.dump()
                try:
                    await asyncio.to_thread(write_private, self._path, raw)
                except OSError as error:
                    logger.warning("snapshot %s is not written: %s", self._path, error)
            await asyncio.sleep(every_s)
