"""A gateway in the test's own loop, between a watch server and engines."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from gpustack.forward import tunnel
from gpustack.forward.listener import Server
from gpustack.forward.upstream import Pool
from gpustack.gateway import proxies
from gpustack.gateway.cors import Policy, around
from gpustack.gateway.counts import Counts
from gpustack.gateway.delivery import Delivery
from gpustack.gateway.front import Front
from gpustack.gateway.plane import Plane
from gpustack.gateway.process import Process
from gpustack.gateway.routing import Routing
from gpustack.gateway.spool import Spool
from gpustack.gateway.tunnels import Tunnels
from gpustack.gateway.watch import Disk, Watch
from gpustack.gateway.withdrawals import Withdrawals
from gpustack.lib.platform import listen, write_private
from gpustack.lib.secrets import new_secret
from tests.support.openai_engine import Engine
from tests.support.raw_http import Reply, ask
from tests.support.wait import eventually
from tests.support.watch_server import WatchServer, credential, instance, model

KEY = "gpustack_0123456789abcdef_0123456789abcdef0123456789abcdef"
AUTH = {"Authorization": f"Bearer {KEY}"}


@dataclass
class Gateway:
    port: int
    server: Server
    watch: Watch
    routing: Routing
    spool: Spool
    delivery: Delivery
    pool: Pool
    tunnels: Tunnels

    async def chat(
        self, body: object = None, headers: dict[str, str] | None = None, path: str = ""
    ) -> Reply:
        asked = {"model": "m", "messages": []} if body is None else body
        raw = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        return await ask(
            self.port, "POST", path or "/v1/chat/completions", AUTH | (headers or {}), raw
        )

    def outstanding(self, instance_id: int) -> int:
        return self.routing.counts.total(instance_id)


@asynccontextmanager
async def gateway(
    data_dir: Path,
    api_port: int,
    *,
    force_auth: bool = True,
    ready: bool = True,
    from_disk: bool = False,
    cors: Policy | None = None,
    trusted_proxies: Sequence[str] = (),
    server_patience_s: float = 10.0,
    place: tuple[int, int] = (0, 1),
    awaited_s: float = 0.0,
) -> AsyncIterator[Gateway]:
    """A gateway with local worker 1. `ready`: wait until it has the server's tables.

    Args:
        place: its index, and how many processes its node has.
        awaited_s: for how long requests wait for a tunnel that is about to come.
    """
    write_private(data_dir / "worker_credential", '{"worker_id": 1, "credential": "x"}')
    address = ("127.0.0.1", api_port)
    disk = Disk(data_dir / "gateway_snapshot.json")
    tunnels = Tunnels(Process("node", new_secret(), *place), awaited_s=awaited_s)
    routing = Routing(Counts.private(), data_dir / "worker_credential", tunnels)
    tunnels.changed = routing.changed
    withdrawals = Withdrawals()
    spool = Spool.create(data_dir / "usage")

    def changed() -> None:
        withdrawals.changed()
        routing.changed()
        disk.changed()

    async with asyncio.TaskGroup() as group:
        pool = Pool(group, connect_timeout_s=max(1.0, awaited_s), doors=tunnels.door)
        tables = disk.load() if from_disk else None
        watch = Watch(pool, address, "gateway-secret", tables=tables, changed=changed)
        delivery = Delivery(pool, address, "gateway-secret", spool, data_dir / "usage")
        plane = Plane(
            group=group,
            pool=pool,
            watch=watch,
            routing=routing,
            ledger=spool,
            server=address,
            credential="gateway-secret",
            tunnels=tunnels,
            force_auth_localhost=force_auth,
            server_patience_s=server_patience_s,
        )
        lasting = [watch.follow(), watch.answer_refreshes(), disk.keep(watch, every_s=0.01)]
        app = proxies.around(around(Front(plane), cors), trusted_proxies)
        server = Server(app, sweep_s=0.05, upgrade=tunnel.PROTOCOL)
        lasting.append(withdrawals.run(watch, server, tunnels, lambda: False))
        tasks = [group.create_task(each) for each in lasting]
        sock = listen("127.0.0.1", 0)
        port = sock.getsockname()[1]
        await server.listen(sock)
        try:
            if ready:

                async def connected() -> bool:
                    return watch.connected

                await eventually(connected, "the gateway has the server's tables")
            yield Gateway(port, server, watch, routing, spool, delivery, pool, tunnels)
        finally:
            server.close()
            tunnels.close()
            for task in tasks:
                task.cancel()
            pool.close()
            spool.close()


def fill(server: WatchServer, *engines: Engine) -> None:
    """Key KEY, model m, and an instance of it on each engine: ids 1, 2, …"""
    server.put("credentials", credential(1, KEY))
    server.put("models", model(1, "m"))
    for id, engine in enumerate(engines, 1):
        server.put("model-instances", instance(id, 1, engine.port))
