"""A worker machine of a test: one data directory, and agents that act for it one by one."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gpustack.config import load
from gpustack.config.options import Settings
from gpustack.lib import platform
from gpustack.lib.role import Boot, Leave, Reload
from gpustack.schemas.models import VersionSpec
from gpustack.worker import agent
from gpustack.worker.detectors.detection import Detection
from gpustack.worker.reconcile import Policy
from gpustack.worker.session import Rhythm
from gpustack.worker.supervisor.engine import Limits
from gpustack.worker.supervisor.records import HOME_VARIABLE
from tests.support import fake_engine
from tests.support.control_plane import JOIN_TOKEN, ControlPlane

QUICK_POLICY = Policy(first_s=0.2, limit_s=30.0)
QUICK_LIMITS = Limits(start_s=10.0, stop_s=0.5, poll_s=0.1, patience_s=0.5, misses=3)
QUICK_RHYTHM = Rhythm(heartbeat_s=0.1, look_s=0.2, status_s=0.5, again_s=0.05, refused_s=0.2)


class Node:
    """A worker machine: one data directory, agents that act for it one after the other."""

    def __init__(
        self, folder: Path, plane: ControlPlane, port: int, first_engine_port: int
    ) -> None:
        self.folder = folder
        self.plane = plane
        self.data_dir = folder / "node"
        self.api_port = port
        self.reload: Reload = lambda _: None
        fake_engine.install(self.data_dir / "bin")
        self.flags: dict[str, Any] = {
            "data_dir": str(self.data_dir),
            "server_url": plane.url,
            "token": JOIN_TOKEN,
            "worker_port": str(port),
            "worker_name": "worker-ä",
            "service_port_range": f"{first_engine_port}-{first_engine_port + 9}",
        }

    @property
    def settings(self) -> Settings:
        return load.load(self.flags, {}).settings

    def spec(self, fake: str = "", **more: object) -> VersionSpec:
        return fake_engine.spec(self.folder, fake, **more)

    def log(self, instance_id: int) -> str:
        return (self.data_dir / "log/serve" / f"{instance_id}.log").read_text()

    def engines(self) -> list[int]:
        """Pids of every live process that an engine of this node is or started."""
        home = str(self.data_dir)
        return [
            pid
            for pid in platform.live_pids()
            if platform.process_environment(pid).get(HOME_VARIABLE) == home
        ]

    @asynccontextmanager
    async def agent(
        self,
        *,
        leave: Leave = Leave.STOP,
        policy: Policy = QUICK_POLICY,
        limits: Limits = QUICK_LIMITS,
        rhythm: Rhythm = QUICK_RHYTHM,
        listener: socket.socket | None = None,
        detection: Detection | None = None,
    ) -> AsyncIterator[None]:
        """An agent in this process, until the context ends; then it leaves for that reason."""
        over = asyncio.Event()

        async def told(reload: Reload) -> Leave:
            self.reload = reload
            await over.wait()
            return leave

        async with asyncio.TaskGroup() as group:
            group.create_task(
                agent.run(
                    self.settings,
                    server_url=self.plane.url,
                    join_token=JOIN_TOKEN,
                    leave=told,
                    sockets={} if listener is None else {"agent": listener},
                    policy=policy,
                    limits=limits,
                    rhythm=rhythm,
                    detection=detection,
                )
            )
            try:
                yield
            finally:
                over.set()

    async def spawn(self) -> "AgentProcess":
        """An agent as a role of its own, as the launcher starts it."""
        boot = Boot(
            settings=load.to_json(self.settings),
            extra={"server_url": self.plane.url, "join_token": JOIN_TOKEN},
        )
        script = (
            "from gpustack.lib import logs, platform, role; from gpustack.worker import agent; "
            "logs.setup('agent'); platform.run(agent.serve(role.Boot.read()))"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdin=asyncio.subprocess.PIPE
        )
        assert process.stdin
        process.stdin.write(boot.line())
        return AgentProcess(process)


class AgentProcess:
    """An agent that is a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self) -> int:
        """What the launcher does when the node stops; the agent's exit code."""
        assert self._process.stdin
        self._process.stdin.write(b"stop\n")
        return await self._process.wait()

    async def orphan(self) -> int:
        """What an agent sees when its launcher is gone."""
        assert self._process.stdin
        self._process.stdin.close()
        return await self._process.wait()


async def eventually(true: Callable[[], Any], *, limit_s: float = 5.0) -> None:
    """Return once `true()` holds, of things that tell nobody when they change."""
    async with asyncio.timeout(limit_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
