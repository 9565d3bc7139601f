"""The role of a worker machine: whatever happens to server and agent, its engines run on."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from gpustack.config import load, resources
from gpustack.config.options import Settings
from gpustack.lib import platform, role
from gpustack.lib.locks import take_over
from gpustack.worker import metrics, views
from gpustack.worker.address import first_address, keep_address
from gpustack.worker.api import Api
from gpustack.worker.attempts import Memory
from gpustack.worker.certificate import OwnCertificate
from gpustack.worker.control import Control
from gpustack.worker.desired import Desired
from gpustack.worker.detectors.detection import Detection
from gpustack.worker.device_processes import owners
from gpustack.worker.enrolment import (
    Enrolment,
    changeable,
    load_membership,
    registration,
    server_trust,
    worker_name,
)
from gpustack.worker.file_orders import FileOrders
from gpustack.worker.file_reports import FileReports
from gpustack.worker.launches import Launches
from gpustack.worker.log_keeping import keep_logs
from gpustack.worker.model_files import ModelFiles
from gpustack.worker.ports import PortLeases
from gpustack.worker.reconcile import Policy
from gpustack.worker.session import Rhythm, Session
from gpustack.worker.supervisor import adoption
from gpustack.worker.supervisor.engine import Limits
from gpustack.worker.supervisor.records import Records

logger = logging.getLogger(__name__)

#: Seconds for the last reports when the node stops.
FAREWELL_S = 1.0


async def serve(boot: role.Boot) -> None:
    """Run this worker until the launcher says otherwise.

    `stop` ends every engine; an orphaned agent lets go of them at once, and the next one adopts.
    """
    settings = load.from_json(boot.settings)
    # Two agents at once would each start engines for the same instances. Killing one that hangs
    # is safe: engines survive their agent.
    with take_over(settings.data_dir / "agent.lock"):
        await run(
            settings,
            server_url=boot.extra["server_url"],
            join_token=boot.extra["join_token"],
            leave=role.leave,
            sockets={name: boot.socket(name) for name in boot.sockets},
        )


async def run(
    settings: Settings,
    *,
    server_url: str,
    join_token: str,
    leave: Callable[[role.Reload], Awaitable[role.Leave]],
    sockets: Mapping[str, socket.socket] = MappingProxyType({}),
    policy: Policy | None = None,
    limits: Limits | None = None,
    rhythm: Rhythm | None = None,
    detection: Detection | None = None,
) -> None:
    """The agent, once it alone acts for its data directory, until `leave` returns.

    Longer than most: what is begun here is ended here, in an order that matters.

    Args:
        sockets: where it listens: agent, for its API, and worker-metrics.
    """
    platform.remove_unfinished(settings.data_dir, "worker_*")  # credential and certificate
    name, rhythm = worker_name(settings), rhythm or Rhythm()
    certificate = OwnCertificate(settings.data_dir, name)
    enrolment = await _enrolment(settings, server_url, join_token, certificate, rhythm)
    async with asyncio.TaskGroup() as group:
        told = FileReports()
        files = _files(group, settings, name, told)
        control = _control(group, settings, files, name, policy, limits)
        orders = FileOrders(group, files, told, lambda: control.sources)
        detection = detection or _detection(settings)
        session = Session(enrolment, control, orders, detection, rhythm)
        talking = group.create_task(session.run())
        lasting = [
            control.run(),
            keep_logs(settings.log_dir, lambda: control.instances),
            _keep(certificate, enrolment, every_s=rhythm.look_s),
            keep_address(settings, server_url, enrolment, every_s=rhythm.address_s),
            *_answering(sockets, settings, enrolment, control, detection),
        ]
        tasks = [talking, *(group.create_task(each) for each in lasting)]

        def reload(raw: dict[str, Any]) -> None:
            now = load.with_hot(settings, raw)
            enrolment.tell(**changeable(now))

        reason = await leave(reload)
        logger.info("leaving: %s", reason)
        if reason is role.Leave.STOP:
            await control.stop_all()
            talking.cancel()
            await session.farewell(limit_s=FAREWELL_S)
        for task in tasks:
            task.cancel()
        orders.let_go()
        control.let_go()
        detection.close()


async def _enrolment(
    settings: Settings,
    server_url: str,
    join_token: str,
    certificate: OwnCertificate,
    rhythm: Rhythm,
) -> Enrolment:
    fingerprint, tls = server_trust(settings, load_membership(settings.data_dir), server_url)
    reached_at = await first_address(settings, server_url)
    return Enrolment(
        data_dir=settings.data_dir,
        server_url=server_url,
        join_token=join_token,
        registration=registration(settings, reached_at, certificate.pem),
        fingerprint=fingerprint,
        tls=tls,
        refused_s=rhythm.refused_s,
    )


async def _keep(certificate: OwnCertificate, enrolment: Enrolment, *, every_s: float) -> None:
    """See to it that the relay finds the certificate, and the server knows it, until cancelled."""
    while True:
        await asyncio.sleep(every_s)
        try:
            if certificate.look():
                enrolment.tell(certificate=certificate.pem)
        except OSError as error:  # a full disk, perhaps: the relay has what it has read
            logger.warning("this worker's certificate cannot be kept: %s", error)


def _answering(
    sockets: Mapping[str, socket.socket],
    settings: Settings,
    enrolment: Enrolment,
    control: Control,
    detection: Detection,
) -> Iterator[Coroutine[Any, Any, None]]:
    """What serves the sockets that there are."""
    records = Records(settings.data_dir)
    if (sock := sockets.get("agent")) is not None:
        api = Api(
            log_dir=settings.log_dir,
            secret=enrolment.secret,
            instances=lambda: control.instances,
            engines=partial(views.engines, control, records, settings.log_dir),
            metrics=partial(metrics.gather, control, records, detection),
        )
        yield api.serve(sock)
    if (sock := sockets.get("worker-metrics")) is not None:
        force_auth = settings.force_auth_localhost
        yield metrics.serve(sock, control, records, detection, force_auth=force_auth)


def _detection(settings: Settings) -> Detection:
    records = Records(settings.data_dir)
    return Detection(
        owners=partial(owners, records),
        mark=records.environment_of_tools(),
        resources=resources.read(settings.resources or {}),
        folders=[settings.data_dir, settings.cache_dir],
    )


def _files(
    group: asyncio.TaskGroup, settings: Settings, name: str, told: FileReports
) -> ModelFiles:
    return ModelFiles(
        group,
        cache_dir=settings.cache_dir,
        token=settings.huggingface_token,
        worker_name=name,
        tell=told.put,
    )


def _control(
    group: asyncio.TaskGroup,
    settings: Settings,
    files: ModelFiles,
    name: str,
    policy: Policy | None,
    limits: Limits | None,
) -> Control:
    """The owner of this worker's engines, which has taken over those that an earlier agent left."""
    desired = Desired(settings.data_dir / "desired.json")
    desired.load()
    memory = Memory(settings.data_dir / "attempts.json")
    memory.load()
    records = Records(settings.data_dir)
    leases = PortLeases(settings.service_port_range)
    launches = Launches(settings, records=records, files=files, leases=leases, worker_name=name)
    control = Control(
        group,
        desired=desired,
        memory=memory,
        records=records,
        launches=launches,
        leases=leases,
        policy=policy or Policy(),
        limits=limits,
    )
    control.adopt(adoption.find(records))
    return control
