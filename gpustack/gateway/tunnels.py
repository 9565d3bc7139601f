"""The tunnels that end in this gateway process: the way to workers that cannot be dialled.

A worker's relay dials the public port, shows the worker's credential and asks for
`Upgrade: gpustack-tunnel/1`. The tables answer who it is, so tunnels come about with the server
away. Only this end opens streams; each carries HTTP/1.1 to the relay, which asks for the instance's
secret as it does at its port.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gpustack.errors import BadRequest, Conflict, Unavailable
from gpustack.forward.exchange import Exchange
from gpustack.forward.tunnel import PROTOCOL, Tunnel
from gpustack.forward.upstream import Address, Door
from gpustack.gateway.process import Process
from gpustack.gateway.tables import Credential, Tables
from gpustack.lib.net import is_loopback
from gpustack.schemas import wire

logger = logging.getLogger(__name__)

#: Of one worker: its relay's, those of relays before it that finish their streams, one to spare.
TUNNELS_OF_A_WORKER: Final = 4
#: A relay dials several times at once: it has been given a tunnel and does not know it yet.
_JUST_S: Final = 10.0
#: No name of a host: what connections through tunnels have as their address's.
_HOST: Final = "a worker's tunnel"


def tunnel_to(worker_id: int) -> Address:
    """By which `Tunnels.door` knows the worker."""
    return _HOST, worker_id


def is_tunnel(address: Address) -> bool:
    return address[0] == _HOST


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    tunnel: Tunnel
    credential: Credential
    relay: bytes
    since: float


class Tunnels:
    """Opens streams to workers over the tunnels that there are.

    Args:
        me: this process.

    Attributes:
        changed: called when a worker got its first tunnel, or has none any more.
    """

    def __init__(self, me: Process) -> None:
        self.me = me
        self.changed: Callable[[], None] = lambda: None
        self._of: dict[int, list[_Held]] = {}  # by worker; the newest is last
        self._draining = False

    def has(self, worker_id: int) -> bool:
        """Whether requests to the worker can go through a tunnel now."""
        return any(held.tunnel.usable for held in self._of.get(worker_id, ()))

    def door(self, address: Address) -> Door | None:
        """How connections to `tunnel_to` a worker are made."""
        if not is_tunnel(address):
            return None

        async def enter(protocol: asyncio.Protocol) -> None:
            for held in reversed(self._of.get(address[1], ())):
                if held.tunnel.usable:
                    held.tunnel.open(protocol)
                    return
            raise ConnectionRefusedError(f"worker {address[1]} has no tunnel to this process")

        return enter

    def take(self, exchange: Exchange, credential: Credential) -> None:
        """Make a tunnel of the connection on which the worker with `credential` asks for one.

        Raises:
            BadRequest: it does not ask for a tunnel.
            Unavailable: this process is about to end.
        """
        if not exchange.upgrades or credential.worker_id is None:
            raise BadRequest(f"want a tunnel: Upgrade: {PROTOCOL.decode()}")
        if self._draining:
            raise Unavailable("This process is about to end.")
        worker_id, had = credential.worker_id, self.has(credential.worker_id)
        said = [(wire.PROCESS_HEADER.encode(), self.me.header())]
        relay = exchange.header(wire.RELAY_HEADER.encode()) or b""
        now = asyncio.get_running_loop().time()
        known = (exchange.header(wire.HAS_HEADER.encode()) or b"").split(b",")
        if self.me.life.encode() in known or any(
            held.relay == relay and held.tunnel.usable and now - held.since < _JUST_S
            for held in self._of.get(worker_id, ())
        ):
            exchange.respond_error(Conflict("There is a tunnel to this process already."), said)
            return
        tunnel = Tunnel(changed=lambda tunnel: self._moved(worker_id, tunnel))
        of_it = self._of.setdefault(worker_id, [])
        of_it.append(_Held(tunnel, credential, relay, now))
        for held in of_it[:-TUNNELS_OF_A_WORKER]:
            held.tunnel.abort()
        logger.info("worker %d has a tunnel to this process", worker_id)
        if not had and exchange.scheme == b"http" and not is_loopback(exchange.peer):
            logger.warning(
                "requests to worker %d go in clear through its tunnel: give it a --server-url "
                "that begins with https://",
                worker_id,
            )
        exchange.switch(tunnel, [(b"upgrade", PROTOCOL), *said])
        self.changed()

    def _moved(self, worker_id: int, tunnel: Tunnel) -> None:
        if tunnel.over:
            left = [held for held in self._of.get(worker_id, ()) if held.tunnel is not tunnel]
            logger.info("a tunnel of worker %d has ended", worker_id)
            if left:
                self._of[worker_id] = left
            else:
                self._of.pop(worker_id, None)
        self.changed()

    def end_withdrawn(self, tables: Tables) -> None:
        """End the tunnels whose credential is gone."""
        for held in self._all():
            now = tables.credentials.get(held.credential.id)
            if now is None or now.digest != held.credential.digest:
                held.tunnel.abort()

    def leave(self) -> None:
        """Have relays look for another process. Open streams are finished."""
        self._draining = True
        for held in self._all():
            held.tunnel.leave()

    def close(self) -> None:
        """End all tunnels and their streams."""
        for held in self._all():
            held.tunnel.abort()

    def _all(self) -> list[_Held]:
        return [held for of_it in self._of.values() for held in of_it]
