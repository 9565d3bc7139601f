"""The role of a worker machine: whatever happens to server and agent, its engines run on."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from gpustack.config import load
from gpustack.config.options import Settings
from gpustack.lib import platform, role
from gpustack.worker.api import Api
from gpustack.worker.control import Control
from gpustack.worker.desired import Desired
from gpustack.worker.enrolment import Enrolment, registration
from gpustack.worker.launches import Launches
from gpustack.worker.model_files import ModelFiles
from gpustack.worker.ports import PortLeases
from gpustack.worker.reconcile import Policy
from gpustack.worker.session import Rhythm, Session
from gpustack.worker.supervisor import adoption
from gpustack.worker.supervisor.engine import Limits
from gpustack.worker.supervisor.records import Records

logger = logging.getLogger(__name__)

#: Seconds that a predecessor has to let go of the agent's lock before it is killed.
TAKE_OVER_S = 5.0
#: Seconds for the last reports when the node stops.
FAREWELL_S = 1.0


async def serve(boot: role.Boot) -> None:
    """Run this worker until the launcher says otherwise.

    `stop` ends every engine; an orphaned agent lets go of them at once, and the next one adopts.
    """
    settings = load.from_json(boot.settings)
    async with only_agent(settings.data_dir):
        await run(
            settings,
            server_url=boot.extra["server_url"],
            join_token=boot.extra["join_token"],
            leave=role.leave,
            listener=boot.socket("agent") if "agent" in boot.sockets else None,
        )


async def run(
    settings: Settings,
    *,
    server_url: str,
    join_token: str,
    leave: Callable[[], Awaitable[role.Leave]],
    listener: socket.socket | None = None,
    policy: Policy | None = None,
    limits: Limits | None = None,
    rhythm: Rhythm | None = None,
) -> None:
    """The agent, once it alone acts for its data directory, until `leave` returns."""
    about = registration(settings, server_url)
    desired = Desired(settings.data_dir / "desired.json")
    desired.load()
    records = Records(settings.data_dir)
    leases = PortLeases(settings.service_port_range)
    rhythm = rhythm or Rhythm()
    enrolment = Enrolment(
        data_dir=settings.data_dir,
        server_url=server_url,
        join_token=join_token,
        registration=about,
        refused_s=rhythm.refused_s,
    )
    async with asyncio.TaskGroup() as group:
        files = ModelFiles(
            group,
            cache_dir=settings.cache_dir,
            token=settings.huggingface_token,
            worker_name=about.name,
        )
        control = Control(
            group,
            desired=desired,
            records=records,
            launches=Launches(
                settings, records=records, files=files, leases=leases, worker_name=about.name
            ),
            leases=leases,
            policy=policy or Policy(),
            limits=limits or Limits(),
        )
        control.adopt(adoption.find(records))
        session = Session(server_url, enrolment, control, rhythm)
        tasks = [group.create_task(control.run()), group.create_task(session.run())]
        if listener is not None:
            api = Api(log_dir=settings.log_dir, secret=enrolment.secret)
            tasks.append(group.create_task(api.serve(listener)))
        reason = await leave()
        logger.info("leaving: %s", reason)
        if reason is role.Leave.STOP:
            await control.stop_all()
            await session.farewell(limit_s=FAREWELL_S)
        for task in tasks:
            task.cancel()
        control.let_go()


@asynccontextmanager
async def only_agent(data_dir: Path, *, patience_s: float = TAKE_OVER_S) -> AsyncIterator[None]:
    """Hold `<data-dir>/agent.lock`: two agents would each start engines for the same instances.

    A predecessor that still holds it after `patience_s` is killed; engines survive that.
    """
    with _lock_file(data_dir) as file:
        while not await _locked(file, patience_s):
            file.seek(0)
            if (pid := file.read().strip()).isdigit() and int(pid) != os.getpid():
                logger.warning("killing agent %s, which does not let go of the lock", pid)
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    logger.debug("agent %s is gone", pid)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _lock_file(data_dir: Path) -> IO[str]:
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return (data_dir / "agent.lock").open("a+", encoding="ascii")


async def _locked(file: IO[str], patience_s: float) -> bool:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    while not platform.lock(file):
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(0.02)
    return True
