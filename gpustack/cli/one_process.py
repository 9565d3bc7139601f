"""Server and gateway in one process: `--gateway-mode disabled`.

The gateway's code has the public socket, as always, and reaches the API over socket pairs; no
other port is opened. What one process means: whatever ends the server ends open streams too.
"""

import asyncio
import os
import socket
from typing import Any, Final

from gpustack.config.load import from_json
from gpustack.forward.upstream import Address
from gpustack.gateway.app import data_plane
from gpustack.gateway.counts import Counts
from gpustack.gateway.life import end, tune_gc
from gpustack.lib.role import Boot, Leave, Reload, leave
from gpustack.server.app import ApiServer, run

#: By which the gateway's code knows the server next to it.
SERVER: Final[Address] = ("server", 80)


class Entrance:
    """Where connections to the server begin. Whoever comes before it answers waits."""

    def __init__(self) -> None:
        self._server: asyncio.Future[ApiServer] = asyncio.get_running_loop().create_future()

    def open(self, server: ApiServer) -> None:
        self._server.set_result(server)

    async def enter(self, protocol: asyncio.Protocol) -> None:
        """Connect `protocol` to the server.

        Raises:
            ConnectionRefusedError: it is about to end.
        """
        server = await asyncio.shield(self._server)
        ours, theirs = socket.socketpair()
        try:
            await server.attach(theirs)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        await asyncio.get_running_loop().create_unix_connection(lambda: protocol, sock=ours)


async def serve(boot: Boot) -> None:
    """Run both until the launcher says otherwise.

    Told to stop, it finishes open requests to models, closes `drained_fd` and serves the agent on
    until it is told again. Without its launcher the server ends at once, since another waits to
    take its place, and open streams are finished.
    """
    settings, entrance = from_json(boot.settings), Entrance()
    left: asyncio.Future[Leave] = asyncio.get_running_loop().create_future()
    async with (
        data_plane(
            settings,
            server=SERVER,
            credential=str(boot.extra["gateway_credential"]),
            counts=Counts.private(),
            doors={SERVER: entrance.enter},
        ) as public,
        asyncio.TaskGroup() as group,
    ):
        reloads: list[Reload] = [public.reload]

        def told_by(reload: Reload) -> asyncio.Future[Leave]:
            reloads.append(reload)
            return left

        group.create_task(run(boot, told_by, started=entrance.open))
        await public.listen(boot)
        tune_gc()

        def reload(raw: dict[str, Any]) -> None:
            for take_in in reloads:
                take_in(raw)

        reason = await leave(reload)
        public.tunnels.leave()
        if reason is Leave.STOP:
            await public.finish_inference()
            os.close(int(boot.extra["drained_fd"]))
            reason = await leave()
        if reason is Leave.STOP:
            await end(public.listener, reason)
            left.set_result(reason)
        else:
            left.set_result(reason)
            await end(public.listener, reason)
