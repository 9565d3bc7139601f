"""A gateway process: starts its parts, serves, and ends well."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType

from gpustack.config.load import from_json
from gpustack.config.options import Settings
from gpustack.forward.upstream import Address, Door, Pool
from gpustack.gateway.counts import Counts
from gpustack.gateway.delivery import Delivery
from gpustack.gateway.front import Front
from gpustack.gateway.life import end, tune_gc
from gpustack.gateway.plane import Plane
from gpustack.gateway.process import Process
from gpustack.gateway.public import Public
from gpustack.gateway.routes import GATEWAY as ROUTES
from gpustack.gateway.routing import Routing
from gpustack.gateway.spool import Spool
from gpustack.gateway.tunnels import Tunnels
from gpustack.gateway.watch import Disk, Watch
from gpustack.gateway.withdrawals import Withdrawals
from gpustack.lib.role import Boot, leave
from gpustack.lib.secrets import digest, new_secret

__all__ = ["ROUTES", "data_plane", "serve"]


async def serve(boot: Boot) -> None:
    """Serve until the launcher says otherwise; return when the last stream has ended."""
    extra = boot.extra
    index, address = int(extra["index"]), ("127.0.0.1", int(extra["api_port"]))
    processes = int(extra["processes"])
    counts = Counts.shared(int(extra["counts_fd"]), processes, index)
    async with data_plane(
        from_json(boot.settings),
        server=address,
        credential=str(extra["gateway_credential"]),
        counts=counts,
        place=(index, processes),
    ) as public:
        await public.listen(boot)
        tune_gc()
        reason = await leave(public.reload)
        public.tunnels.leave()
        await end(public.listener, reason)


@asynccontextmanager
async def data_plane(
    settings: Settings,
    *,
    server: Address,
    credential: str,
    counts: Counts,
    place: tuple[int, int] = (0, 1),
    doors: Mapping[Address, Door] = MappingProxyType({}),
) -> AsyncIterator[Public]:
    """All that a gateway is made of, running; listens nowhere yet.

    Longer than most: each part is made of those before it, and named once.

    Args:
        server: the control plane, which `credential` opens for gateways.
        place: this process's index, and how many gateway processes the node has. The first
            writes the tables to disk for its successors.
        doors: addresses that are dialled in another way.
    """
    disk = Disk(settings.data_dir / "gateway_snapshot.json")
    tunnels = Tunnels(Process(digest(credential)[:16], new_secret(), *place))
    routing = Routing(counts, settings.data_dir / "worker_credential", tunnels)
    tunnels.changed = routing.changed
    usage = settings.data_dir / "usage"
    spool = Spool.create(usage)
    withdrawals = Withdrawals()

    def changed() -> None:
        withdrawals.changed()
        routing.changed()
        disk.changed()

    async with asyncio.TaskGroup() as group:
        pool = Pool(group, doors=lambda address: doors.get(address) or tunnels.door(address))
        watch = Watch(pool, server, credential, tables=disk.load(), changed=changed)
        delivery = Delivery(pool, server, credential, spool, usage)
        plane = Plane(
            group=group,
            pool=pool,
            watch=watch,
            routing=routing,
            ledger=spool,
            server=server,
            credential=credential,
            tunnels=tunnels,
            force_auth_localhost=settings.force_auth_localhost,
        )
        public = Public(Front(plane), settings, tunnels)
        lasting = [
            public.open_tls(),
            watch.follow(),
            watch.answer_refreshes(),
            delivery.run(),
            withdrawals.run(watch, public.listener, tunnels, public.ends_revoked),
        ]
        if place[0] == 0:
            lasting.append(disk.keep(watch))
        tasks = [group.create_task(each) for each in lasting]
        yield public
        for task in tasks:
            task.cancel()
        await delivery.close()
        tunnels.close()
        pool.close()
