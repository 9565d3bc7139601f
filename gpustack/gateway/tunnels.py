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
#: A relay that is started anew, or that looks for a new gateway process, has a tunnel within two.
AWAITED_S: Final = 3.0
#: No name of a host, nor can a worker give it as its own: what connections through tunnels have as
#: their address's.
_HOST: Final = "a tunnel.."


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

    Requests wait for a tunnel that is surely about to come: when a worker has just lost its last
    one, and when this process has just begun.

    Args:
        me: this process.
        awaited_s: for how long they do.

    Attributes:
        changed: called when a worker got its first tunnel, or has none any more.
    """

    def __init__(self, me: Process, *, awaited_s: float = AWAITED_S) -> None:
        self.me = me
        self._awaited_s = awaited_s
        self._loop = asyncio.get_running_loop()
        self._began_at = self._loop.time()
        self._lost_at: dict[int, float] = {}  # by worker
        self._news = asyncio.Event()
        self._timer = self._loop.call_later(awaited_s, self._await_no_more)
        self.changed: Callable[[], None] = lambda: None
        self._of: dict[int, list[_Held]] = {}  # by worker; the newest is last
        self._draining = False

    def has(self, worker_id: int) -> bool:
        """Whether requests to the worker can go through a tunnel now."""
        return any(held.tunnel.usable for held in self._of.get(worker_id, ()))

    def awaited(self, worker_id: int) -> bool:
        """Whether there is no tunnel to the worker, but should be in a moment."""
        return not self.has(worker_id) and self._left_s(worker_id) > 0

    def _left_s(self, worker_id: int) -> float:
        """How long a tunnel to the worker is waited for from now on."""
        since = self._lost_at.get(worker_id, self._began_at)
        return since + self._awaited_s - self._loop.time()

    def _await_no_more(self) -> None:
        """One worker's time is over, perhaps: requests to it may take another way."""
        self._lost_at = {each: at for each, at in self._lost_at.items() if self._left_s(each) > 0}
        if self._lost_at:
            next_s = max(min(map(self._left_s, self._lost_at)), 0.1)
            self._timer = self._loop.call_later(next_s, self._await_no_more)
        self.changed()

    def door(self, address: Address) -> Door | None:
        """How connections to `tunnel_to` a worker are made."""
        if not is_tunnel(address):
            return None

        async def enter(protocol: asyncio.Protocol) -> None:
            worker_id = address[1]
            while (left_s := self._left_s(worker_id)) > 0 and not self.has(worker_id):
                async with asyncio.timeout(left_s):
                    await self._news.wait()
            for held in reversed(self._of.get(worker_id, ())):
                if held.tunnel.usable:
                    held.tunnel.open(protocol)
                    return
            raise ConnectionRefusedError(f"worker {worker_id} has no tunnel to this process")

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
        self._lost_at.pop(worker_id, None)
        self._news.set()
        self._news = asyncio.Event()
        self.changed()

    def _moved(self, worker_id: int, tunnel: Tunnel) -> None:
        if tunnel.over:
            left = [held for held in self._of.get(worker_id, ()) if held.tunnel is not tunnel]
            logger.info("a tunnel of worker %d has ended", worker_id)
            if left:
                self._of[worker_id] = left
            else:
                self._of.pop(worker_id, None)
        if not self.has(worker_id) and worker_id not in self._lost_at:
            if not self._lost_at and self._loop.time() >= self._began_at + self._awaited_s:
                self._timer = self._loop.call_later(self._awaited_s, self._await_no_more)
            self._lost_at[worker_id] = self._loop.time()
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
        self._timer.cancel()
        for held in self._all():
            held.tunnel.abort()

    def _all(self) -> list[_Held]:
        return [held for of_it in self._of.values() for held in of_it]
