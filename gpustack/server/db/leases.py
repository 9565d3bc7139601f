"""The lease: of several servers on one database, one controls.

Its row has a token that grows with every term. Who takes or renews it compares first, by the
database's clock alone. A write of the leader begins with a look at the token that holds the row
until the commit, so one that was frozen, and replaced meanwhile, writes nothing any more.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta

from sqlalchemy import update
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from gpustack.errors import LeaseLost
from gpustack.lib.tasks import cancellable
from gpustack.server.db.clock import clock
from gpustack.server.db.engines import controlling
from gpustack.server.db.tables import Lease
from gpustack.server.db.url import Kind, parse

#: The name of the one lease there is. Its row comes with the schema.
CONTROL = "control"
#: Who did not renew for this long holds it no more.
LASTS_S, RENEW_EVERY_S = 6.0, 2.0

_LONG_AGO = datetime.fromtimestamp(0, UTC)
_OURS = col(Lease.name) == CONTROL

_token: ContextVar[int | None] = ContextVar("token", default=None)


class Leases:
    """Takes, renews and gives back the lease. It has a connection of its own: no other waits.

    Everything raises DatabaseAway or Contended as `Database` does.

    Args:
        holder: this node, over all its lives.
    """

    def __init__(self, url: str, holder: str, *, lasts_s: float = LASTS_S) -> None:
        self._place = parse(url)
        self._engine = controlling(self._place)
        self._holder = holder
        self.lasts_s = lasts_s

    @property
    def is_shared(self) -> bool:
        """Whether other servers may want it too. An SQLite file has one server."""
        return self._place.kind is not Kind.SQLITE

    async def take(self, *, from_myself: bool = False) -> int | None:
        """The token of a new term; None: somebody leads, or was faster.

        Args:
            from_myself: take it also from an earlier life of this node, which has ended.
        """
        async with self._session() as session:
            lease, now = (await session.exec(select(Lease, clock()).where(_OURS))).one()
            free = now - lease.renewed_at >= timedelta(seconds=self.lasts_s)
            mine = from_myself and lease.holder == self._holder
            if not (free or mine):
                return None
            token = lease.token + 1
            taken = await session.exec(
                update(Lease)
                .where(
                    _OURS,
                    col(Lease.token) == lease.token,
                    col(Lease.renewed_at) == lease.renewed_at,
                )
                .values(holder=self._holder, token=token, renewed_at=clock())
                .execution_options(synchronize_session=False)
            )
            await session.commit()
            return token if taken.rowcount else None

    async def renew(self, token: int) -> None:
        """Hold it for another `lasts_s`.

        Raises:
            LeaseLost: another server has taken it.
        """
        if not await self._set(token, clock()):
            raise LeaseLost

    async def give_back(self, token: int) -> None:
        """Let others take it at once; nothing, if they have."""
        await self._set(token, _LONG_AGO)

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[AsyncSession]:
        with cancellable():
            async with AsyncSession(self._engine) as session:
                yield session

    async def _set(self, token: int, renewed_at: clock | datetime) -> bool:
        async with self._session() as session:
            mine = update(Lease).where(_OURS, col(Lease.token) == token)
            found = await session.exec(
                mine.values(renewed_at=renewed_at).execution_options(synchronize_session=False)
            )
            await session.commit()
            return bool(found.rowcount)


@contextmanager
def leading(token: int) -> Iterator[None]:
    """Whatever is written inside, and by tasks that start there, is checked against `token`."""
    before = _token.set(token)
    try:
        yield
    finally:
        _token.reset(before)


def is_leading() -> bool:
    """Whether this task acts for the leader, as far as it knows."""
    return _token.get() is not None


async def check(session: AsyncSession) -> None:
    """Let a leader's transaction go on only if it leads, and nobody take the lease before its end.

    Raises:
        LeaseLost: another server leads.
    """
    token = _token.get()
    if token is None:
        return
    held = select(Lease.token).where(_OURS).with_for_update(read=True)
    if (await session.exec(held)).one() != token:
        raise LeaseLost


async def alone(session: AsyncSession) -> None:
    """Wait for other servers that do what is done once per cluster, until this commits."""
    await session.exec(select(Lease.token).where(_OURS).with_for_update())
