"""Which workers' ports can be dialled from here; the others are told to have their relay dial."""

import asyncio
from typing import Final

from gpustack.lib import trust
from gpustack.lib.net import url_host
from gpustack.schemas.workers import ProxyMode
from gpustack.server.db.database import Database, find
from gpustack.server.db.tables import Worker

#: Workers that are dialled at a time: those that do not answer take the whole time-out. So 400 that
#: never do are dialled as often as they should, and a new one among them has its turn soon.
AT_ONCE: Final = 64
#: How long a port is tried alike before that counts: a relay that is started anew is no firewall.
AFTER_S: Final = 10.0
#: Until a worker is dialled again: one whose port answers; one whose port does not; one of which
#: it has just changed.
WELL_S, TUNNELLED_S, AGAIN_S = 60.0, 20.0, 5.0
_DIAL_S: Final = 3.0

#: Host, port and certificate.
Place = tuple[str, int, str]


class Reach:
    """Dials each worker's port, and writes down why that fails."""

    def __init__(self, db: Database, *, after_s: float = AFTER_S, again_s: float = AGAIN_S) -> None:
        self._db = db
        self._after_s, self._again_s = after_s, again_s
        #: Where and when it first was other than what is written.
        self._since: dict[int, tuple[Place, float]] = {}

    async def reconcile(self, key: int) -> float | None:
        async with self._db.read() as session:
            worker = await find(session, Worker, key)
        if worker is None or worker.silent or not worker.certificate:
            self._since.pop(key, None)
            return None  # whatever changes that is a change of its row
        place = worker.ip, worker.port, worker.certificate
        if worker.proxy_mode == ProxyMode.TUNNEL:
            await self._write(key, "", place)
            return None
        why = await unreached(*place)
        if bool(why) == bool(worker.unreached):
            self._since.pop(key, None)
            return TUNNELLED_S if why else WELL_S
        now = asyncio.get_running_loop().time()
        where, since = self._since.get(key, (place, now))
        if where != place:
            since = now
        self._since[key] = place, since
        if now - since < self._after_s:
            return self._again_s
        await self._write(key, why, place)
        del self._since[key]
        return TUNNELLED_S if why else WELL_S

    async def _write(self, key: int, why: str, place: Place) -> None:
        async with self._db.write() as session:
            worker = await find(session, Worker, key)
            if worker is None or (worker.ip, worker.port, worker.certificate) != place:
                return  # it has moved meanwhile, which is a change of its row
            if worker.unreached != why:
                worker.unreached = why


async def unreached(host: str, port: int, certificate: str) -> str:
    """Why the relay at an address does not answer; empty: it does."""
    try:
        tls = trust.exactly(certificate)
        async with asyncio.timeout(_DIAL_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=tls)
            try:
                request = f"GET /healthz HTTP/1.1\r\nHost: {url_host(host)}\r\n"
                writer.write(f"{request}Connection: close\r\n\r\n".encode())
                status = await reader.readline()
            finally:
                writer.transport.abort()
    except TimeoutError:
        return "timed out"
    except (OSError, ValueError) as error:  # ValueError: no such name can be
        if trust.tls_error(error) is not None:
            return "something else answers there"
        return (getattr(error, "strerror", None) or str(error))[:200]
    return "" if b" 200 " in status else "something else answers there"
