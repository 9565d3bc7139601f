"""A gateway process: starts its parts, serves, and ends well."""

import asyncio

from gpustack.config.load import from_json
from gpustack.forward.listener import Server
from gpustack.forward.upstream import Pool
from gpustack.gateway.counts import Counts
from gpustack.gateway.delivery import Delivery
from gpustack.gateway.front import Front
from gpustack.gateway.life import end, tune_gc
from gpustack.gateway.plane import Plane
from gpustack.gateway.routes import GATEWAY as ROUTES
from gpustack.gateway.routing import Routing
from gpustack.gateway.spool import Spool
from gpustack.gateway.watch import Disk, Watch
from gpustack.lib.role import Boot, leave

__all__ = ["ROUTES", "serve"]


async def serve(boot: Boot) -> None:
    """Serve until the launcher says otherwise; return when the last stream has ended."""
    settings = from_json(boot.settings)
    extra = boot.extra
    index, address = int(extra["index"]), ("127.0.0.1", int(extra["api_port"]))
    credential = str(extra["gateway_credential"])
    counts = Counts.shared(int(extra["counts_fd"]), int(extra["processes"]), index)
    disk = Disk(settings.data_dir / "gateway_snapshot.json")
    routing = Routing(counts, settings.data_dir / "worker_credential")
    usage = settings.data_dir / "usage"
    spool = Spool.create(usage)

    def changed() -> None:
        routing.changed()
        disk.changed()

    async with asyncio.TaskGroup() as group:
        pool = Pool(group)
        watch = Watch(pool, address, credential, tables=disk.load(), changed=changed)
        delivery = Delivery(pool, address, credential, spool, usage)
        plane = Plane(
            group=group,
            pool=pool,
            watch=watch,
            routing=routing,
            ledger=spool,
            server=address,
            credential=credential,
            force_auth_localhost=settings.force_auth_localhost,
        )
        lasting = [watch.follow(), watch.answer_refreshes(), delivery.run()]
        if index == 0:
            lasting.append(disk.keep(watch))
        tasks = [group.create_task(each) for each in lasting]
        server = Server(Front(plane))
        await server.listen(boot.socket("public"))
        tune_gc()
        await end(server, await leave())
        for task in tasks:
            task.cancel()
        await delivery.close()
        pool.close()
