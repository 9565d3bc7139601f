"""The talk with the server while it knows this worker: heartbeats, status, watch, reports."""

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass

from gpustack.client.agents import AgentClient
from gpustack.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    GPUStackError,
    Invalid,
    Unauthorized,
)
from gpustack.lib.tasks import forever, in_own_task
from gpustack.schemas import wire
from gpustack.schemas.workers import Heartbeat, Registration
from gpustack.worker.control import Control
from gpustack.worker.detectors.detection import Detection
from gpustack.worker.enrolment import Enrolment, Membership
from gpustack.worker.file_orders import FileOrders

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rhythm:
    """Seconds between what is said.

    Attributes:
        heartbeat_s: the server counts silence in tens of seconds.
        look_s: between two looks at what the worker has; a change is told at once.
        address_s: the same at its address, without which nobody elsewhere reaches it.
        status_s: between two statuses without a change; with a look it stays below the 30 s
            after which measured use is old.
        again_s: from a credential's refusal to the next attempt to join.
        refused_s: the same, where the credential is known and may not do this.
    """

    heartbeat_s: float = 10.0
    look_s: float = 10.0
    address_s: float = 5.0
    status_s: float = 20.0
    again_s: float = 1.0
    refused_s: float = 60.0


class Session:
    """Keeps the server informed, and this worker, whatever happens in between."""

    def __init__(
        self,
        enrolment: Enrolment,
        control: Control,
        orders: FileOrders,
        detection: Detection,
        rhythm: Rhythm,
    ) -> None:
        self._enrolment = enrolment
        self._control = control
        self._orders = orders
        self._detection = detection
        self._rhythm = rhythm
        self._membership: Membership | None = None

    async def run(self) -> None:
        """Join and talk, for ever; engines run on whatever happens here."""
        await forever("session with the server", self._once, every_s=self._rhythm.again_s)

    async def _once(self) -> None:
        membership = await self._enrolment.join()
        self._membership = membership
        logger.info("worker %d of cluster %s", membership.worker_id, membership.cluster_id)
        refused = await self._until_refused(membership)
        logger.warning("the server refuses this worker's credential: %s", refused)
        if isinstance(refused, Forbidden):
            await asyncio.sleep(self._rhythm.refused_s)

    async def farewell(self, *, limit_s: float) -> None:
        """Say the last things, if the server answers within `limit_s` seconds."""
        if self._membership is None:
            return
        try:
            async with (
                asyncio.timeout(limit_s),
                self._enrolment.client(self._membership.credential) as client,
            ):
                await self._control.reports.send_pending(client)
        except (TimeoutError, GPUStackError) as error:
            logger.info("the server did not hear our last reports: %r", error)

    async def _until_refused(self, membership: Membership) -> GPUStackError:
        async with self._enrolment.client(membership.credential) as client:
            try:
                await in_own_task(self._talk(client, membership))
            except* (Unauthorized, Forbidden) as refusals:
                refusal = refusals.exceptions[0]
        return refusal if isinstance(refusal, GPUStackError) else Unauthorized()

    async def _talk(self, client: AgentClient, membership: Membership) -> None:
        worker_id = membership.worker_id
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch(client))
            group.create_task(self._control.reports.send(client))
            group.create_task(self._orders.reports.send(client, worker_id))
            group.create_task(self._status(client, worker_id))
            group.create_task(self._heartbeats(client, worker_id))
            group.create_task(self._announcements(membership.credential, worker_id))

    async def _watch(self, client: AgentClient) -> None:
        async with aclosing(client.follow([wire.INSTANCES, wire.MODEL_FILES])) as events:
            async for event in events:
                if event.kind != wire.MODEL_FILES:
                    self._control.hear(event)
                self._orders.hear(event)

    async def _heartbeats(self, client: AgentClient, worker_id: int) -> None:
        beat = _beat(self._enrolment.registration)
        said = ""
        while True:
            why = ""
            try:
                self._enrolment.told_tunnel((await client.heartbeat(worker_id, beat)).tunnel)
            except (Unauthorized, Forbidden):
                raise
            except Conflict as error:
                why = f"another machine or process uses this worker's credential: {error}"
            except GPUStackError as error:
                why = f"the server does not hear us: {error}"
            if why and why != said:
                logger.warning("%s", why)
            said = why
            await asyncio.sleep(self._rhythm.heartbeat_s)

    async def _announcements(self, credential: str, worker_id: int) -> None:
        said = ""
        while True:
            await self._enrolment.news.wait()
            self._enrolment.news.clear()
            try:
                # With a new address, connections from the old one may lead nowhere.
                async with self._enrolment.client(credential) as client:
                    await client.announce(worker_id, self._enrolment.registration)
                said = ""
            except (Unauthorized, Forbidden):
                raise
            except GPUStackError as error:
                if str(error) != said:
                    logger.warning("the server did not hear our news, again soon: %s", error)
                said = str(error)
                self._enrolment.news.set()
                await asyncio.sleep(self._rhythm.again_s)

    async def _status(self, client: AgentClient, worker_id: int) -> None:
        loop = asyncio.get_running_loop()
        told: dict[str, object] | None = None
        told_at, refused = 0.0, ""
        while True:
            try:
                status = await self._detection.look()
                facts = status.facts()
                if facts != told or loop.time() - told_at >= self._rhythm.status_s:
                    await client.report_worker(worker_id, status)
                    told, told_at, refused = facts, loop.time(), ""
            except (Unauthorized, Forbidden):
                raise
            except (BadRequest, Invalid) as error:  # an older server, perhaps
                if str(error) != refused:
                    logger.warning("the server refuses what this worker has: %s", error)
                refused = str(error)
            except GPUStackError as error:
                logger.debug("status not told: %s", error)  # heartbeats say it aloud
            except TimeoutError:
                logger.warning("this machine does not say what it has: a driver may hang")
            await asyncio.sleep(self._rhythm.look_s)


def _beat(registration: Registration) -> Heartbeat:
    return Heartbeat(
        machine_id=registration.machine_id,
        boot_id=registration.boot_id,
        run_id=registration.run_id,
    )
