"""What is asked at /v2/tunnel: a tunnel, by a relay; an agent's answer, by this node's server."""

from typing import Final

from gpustack.errors import GPUStackError, NotFound, Unavailable
from gpustack.forward.exchange import IGNORED, Exchange, Receiver
from gpustack.forward.upstream import Failure
from gpustack.gateway.passing import Passing, is_endless, without_private
from gpustack.gateway.plane import Plane, Stranger
from gpustack.gateway.tables import Credential
from gpustack.gateway.tunnels import tunnel_to
from gpustack.schemas import wire

_PRIVATE: Final = wire.PRIVATE_PREFIX.encode()
_AGENT: Final = wire.AGENT_HEADER.encode()


class Arriving:
    """A relay that asks for a tunnel."""

    def __init__(self, plane: Plane, exchange: Exchange) -> None:
        self._plane = plane
        self._exchange = exchange

    def begin(self) -> Receiver:
        try:
            self._take(self._plane.part(self._exchange, "worker"))
        except Stranger:
            self._plane.later(self._exchange, self._again())
        except GPUStackError as error:
            self._exchange.respond_error(error)
        return IGNORED

    async def _again(self) -> None:
        try:
            self._take(await self._plane.again(lambda: self._plane.part(self._exchange, "worker")))
        except GPUStackError as error:
            self._exchange.respond_error(error)

    def _take(self, credential: Credential) -> None:
        if not self._exchange.finished:
            self._plane.tunnels.take(self._exchange, credential)


def pass_to_agent(plane: Plane, exchange: Exchange, below: str) -> Receiver:
    """Pass a request of this node's server on to a worker's agent.

    Args:
        below: of the path: the worker's id, a slash, and the rest of the agent's path.
    """
    worker_id, slash, rest = below.partition("/")
    secret = exchange.header(_AGENT)
    try:
        plane.part(exchange, "gateway")
        if not (worker_id.isdecimal() and worker_id.isascii()) or not slash or secret is None:
            raise NotFound("want a worker's id, a path, and its agent's secret")
        if not (plane.tunnels.has(int(worker_id)) or plane.tunnels.awaited(int(worker_id))):
            raise Unavailable("It has no tunnel to this server.")
    except GPUStackError as error:
        exchange.respond_error(error)
        return IGNORED
    headers = [
        pair for pair in without_private(exchange.headers, _PRIVATE) if pair[0] != b"authorization"
    ]
    exchange.endless = is_endless(exchange.query)
    query = f"?{exchange.query}" if exchange.query else ""
    return Passing(
        plane.pool,
        exchange,
        tunnel_to(int(worker_id)),
        [*headers, (b"authorization", b"Bearer " + secret)],
        _lost,
        target=f"/{rest}{query}".encode("latin-1"),
        patience_s=plane.server_patience_s,
    )


def _lost(exchange: Exchange, failure: Failure) -> None:
    exchange.respond_error(Unavailable("Its tunnel to this server does not answer."))
