"""What every request of a gateway process shares."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from gpustack.errors import Forbidden, GPUStackError, Unauthorized, Unavailable
from gpustack.forward.address import is_local
from gpustack.forward.exchange import Exchange
from gpustack.forward.upstream import Address, Pool
from gpustack.gateway import credentials
from gpustack.gateway.answers import ModelNotFound, refuse
from gpustack.gateway.passing import PATIENCE_S
from gpustack.gateway.routing import Routing
from gpustack.gateway.spool import Record
from gpustack.gateway.tables import Credential, Model, Tables
from gpustack.gateway.tunnels import Tunnels
from gpustack.gateway.watch import Watch
from gpustack.lib.secrets import digest

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Ledger(Protocol):
    """Where requests to engines are written down."""

    def start(self, record: Record) -> None: ...
    def end(self, record: Record) -> None: ...


@dataclass(frozen=True, slots=True)
class Plane:
    """What every request of a gateway process shares.

    Attributes:
        group: for the few requests that have to wait for news from the server.
        server: where everything goes that is not the gateway's own.
        credential: with which the server knows this gateway.
        tunnels: those that end in this process.
        force_auth_localhost: loopback needs credentials as well.
        server_patience_s: for the head of an answer to what is passed on.
    """

    group: asyncio.TaskGroup
    pool: Pool
    watch: Watch
    routing: Routing
    ledger: Ledger
    server: Address
    credential: str
    tunnels: Tunnels
    force_auth_localhost: bool
    server_patience_s: float = PATIENCE_S

    def now(self) -> float:
        """The event loop's clock."""
        return asyncio.get_running_loop().time()

    def later(self, exchange: Exchange, news: Coroutine[Any, Any, None]) -> None:
        """Run `news`, which waits for the server; an error that it raises is the answer."""
        self.group.create_task(_guarded(exchange, news))

    @property
    def tables(self) -> Tables:
        """The tables of now.

        Raises:
            Unavailable: there are none yet.
        """
        if self.watch.tables is None:
            raise Unavailable("The gateway has just started and knows no models yet.")
        return self.watch.tables

    def needs_no_login(self, exchange: Exchange) -> bool:
        """Whether the loopback rule holds."""
        if self.force_auth_localhost or exchange.proxied:
            return False
        return is_local(exchange.peer, exchange.headers, http10=exchange.http10)

    def identify(self, exchange: Exchange) -> Credential | None:
        """Who asks; None: nobody in particular, under the loopback rule.

        Raises:
            Unauthorized: no credential.
            Stranger: one that the tables do not have; newer tables may.
            Forbidden: one that may not run models.
        """
        shown = credentials.presented(exchange.headers)
        if shown is None:
            if self.needs_no_login(exchange):
                return None
            raise Unauthorized()
        known = self.tables.by_digest.get(digest(shown.secret))
        if known is None:
            if shown.secret:
                raise Stranger("This credential is not known.")
            raise Unauthorized()
        credentials.check(
            known,
            cookie=shown.cookie and not exchange.vouched,
            method=exchange.method,
            headers=exchange.headers,
        )
        return known

    def part(self, exchange: Exchange, kind: str) -> Credential:
        """The credential of a part of the product that asks: "worker" or "gateway".

        Raises:
            Unauthorized: no credential, or one that has ended.
            Stranger: one that the tables do not have; newer tables may.
            Forbidden: another's.
        """
        shown = credentials.presented(exchange.headers)
        if shown is None or not shown.secret:
            raise Unauthorized()
        known = self.tables.by_digest.get(digest(shown.secret))
        if known is None:
            raise Stranger("This credential is not known.")
        credentials.check_standing(known)
        if known.kind != kind:
            raise Forbidden(f"This is for a {kind} alone.")
        return known

    def model(self, name: str, credential: Credential | None) -> Model:
        """The model called `name`.

        Raises:
            Forbidden: the credential is not for it, be there such a model or not.
            ModelNotFound: there is none that its user may use; newer tables may have it.
        """
        if not credentials.is_for(credential, name):
            raise Forbidden(f"This API key is not for the model {name!r}.")
        model = self.tables.by_name.get(name)
        if model is None or model.deleting or not credentials.may_use(credential, model):
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        return model

    async def again(self, look_up: Callable[[], T]) -> T:
        """What `look_up` finds after asking the server for news.

        Raises:
            Unavailable: it finds nothing, which proves nothing while the server is away.
        """
        fresh = await self.watch.refresh()
        try:
            return look_up()
        except (Stranger, ModelNotFound):
            if fresh:
                raise
            message = "The server is away: what is new since then cannot be known."
            raise Unavailable(message) from None


async def _guarded(exchange: Exchange, news: Coroutine[Any, Any, None]) -> None:
    try:
        await news
    except GPUStackError as error:
        refuse(exchange, error)
    except Exception:  # one request's mistake must not end the others in this process
        logger.exception("%s %s failed", exchange.method, exchange.path)
        exchange.abort()


class Stranger(Unauthorized):
    """A credential that the tables do not have."""
