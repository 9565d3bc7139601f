"""The server role of a node, in one process after the other, as its launcher keeps it."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

from gpustack.cli.roles import Plan
from gpustack.cli.sockets import Sockets
from gpustack.config.load import load
from gpustack.server.db.database import Database, current_revision
from tests.support.ports import free_ports


class ServerRole:
    """The launcher's own socket, settings and command; only its back-off is left out.

    The socket stays open between two processes, so whoever calls meanwhile waits for the next.

    Args:
        data_dir: an empty folder.
    """

    def __init__(self, data_dir: Path, database_url: str) -> None:
        first = free_ports(3)
        options = {
            "data_dir": str(data_dir),
            "database_url": database_url,
            "disable_worker": True,
            "port": first,
            "api_port": first + 1,
            "metrics_port": first + 2,
        }
        settings = load(options, {}).settings
        self.data_dir = data_dir
        self.database_url = database_url
        self.url = f"http://127.0.0.1:{first + 1}"
        self._sockets = Sockets(settings, {}, patient=False)
        roles = Plan(lambda: settings, self._sockets).roles()
        self._role = next(role for role in roles if role.name == "server")

    async def start(self) -> None:
        """Begin a process; it answers as soon as it can."""
        assert await self._role.start() == ""

    async def kill(self) -> None:
        """kill -9."""
        if self._role.alive:
            self._send_kill()
            assert await self._role.end() == "signal 9"

    async def kill_at_commit(self, *, within_s: float) -> None:
        """kill -9 as soon as a transaction is committed: often its request is not answered yet."""
        # In a thread: whoever uses the server keeps this loop busy.
        await asyncio.to_thread(asyncio.run, self._kill_at_commit(within_s))
        await self.kill()

    async def _kill_at_commit(self, within_s: float) -> None:
        db = Database(self.database_url)
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                before = await _revision(db)
                while await _revision(db) == before:
                    pass
                self._send_kill()
        await db.close()

    def _send_kill(self) -> None:
        assert self._role.alive
        with suppress(ProcessLookupError):  # it was sent one already
            os.kill(self._role.alive.pid, signal.SIGKILL)

    def secret(self, name: str) -> str:
        """What is in a file of the data directory."""
        return (self.data_dir / name).read_text().strip()

    def close(self) -> None:
        """Nobody may call any more."""
        for one in self._sockets._open.values():
            one.close()


async def _revision(db: Database) -> int:
    async with db.read() as session:
        return await current_revision(session)
