"""What this machine has and how it does, looked up off the event loop, vendor by vendor."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from gpustack.config.resources import Resources
from gpustack.schemas.workers import Device, Disk, WorkerStatus
from gpustack.worker.detectors import DETECTORS, Detector, declared, host
from gpustack.worker.detectors.asking import Asking
from gpustack.worker.detectors.heat import Heats, steadied
from gpustack.worker.detectors.known import (
    Known,
    after_answer,
    after_failure,
    alike,
    distinct,
    unwell_since,
)
from gpustack.worker.detectors.reading import few
from gpustack.worker.detectors.tools import LIMIT_S, ToolFailed, Tools

logger = logging.getLogger(__name__)

#: Seconds that a look waits for who has answered before: healthy tools need less, and what comes
#: later is told at the next look.
PATIENCE_S: Final = 2.0

#: Share of a detector's time that its tools have: what they are called is better evidence than
#: "it has not answered".
_TOOLS_SHARE: Final = 0.8

#: Pids -> the instances whose engines' they are. Called in detectors' threads; may block.
Owners = Callable[[Collection[int]], Mapping[int, int]]


class Detection:
    """Owns what is known of this machine: call `look` again and again, one at a time.

    A vendor's tool that fails, hangs, prints garbage or is gone costs its devices their health,
    and one warning. It delays no other vendor, nor what the machine itself says.

    Args:
        owners: told which processes use a device.
        limit_s: seconds after which a detector that has not answered is taken for hung.
        patience_s: seconds that a look waits for a detector that has answered before.
        resources: what the config file declares: its devices are all that there are.
        folders: whose file systems are told.
        mark: variables that vendors' tools carry, so that what a killed agent left is found.
    """

    def __init__(
        self,
        detectors: Sequence[Detector] = DETECTORS,
        *,
        owners: Owners = lambda _: {},
        limit_s: float = LIMIT_S,
        patience_s: float = PATIENCE_S,
        resources: Resources = Resources(),  # noqa: B008  frozen
        folders: Sequence[Path] = (),
        mark: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if (devices := declared.devices(resources)) is not None:
            detectors = [declared.Declared(devices)]
        self._resources = resources
        self._vendors = [
            _Vendor(
                one, owners, Tools(limit_s=limit_s * _TOOLS_SHARE, mark=mark), limit_s, patience_s
            )
            for one in detectors
        ]
        self._host = Asking("host", host.status)
        # A question of its own: a file server that is away would hold up all else.
        self._disks = Asking("disks", lambda: host.disks(folders))
        self._known_disks: list[Disk] = []
        self._host_failed = False
        self._limit_s = limit_s
        self._patience_s = patience_s
        self._status: WorkerStatus | None = None
        self._left_out: list[str] = []

    async def look(self) -> WorkerStatus:
        """Facts and measures of this machine as they are now, or were when last it answered.

        Waits for who has never answered, `limit_s` at most: a worker whose devices are not known
        yet would be given what runs on processors.

        Raises:
            TimeoutError: the machine itself has not said yet what it has.
        """
        async with asyncio.TaskGroup() as group:
            looks = [group.create_task(vendor.look()) for vendor in self._vendors]
            machine = group.create_task(self._machine())
            disks = group.create_task(self._file_systems())
        devices, left_out = distinct([look.result() for look in looks])
        if left_out != self._left_out:
            for sentence in left_out:
                logger.warning("%s", sentence)
            self._left_out = left_out
        if (status := machine.result()) is None:
            raise TimeoutError("this machine does not say what it has")
        self._status = declared.with_declared(
            status.model_copy(update={"gpu_devices": devices, "disks": disks.result()}),
            self._resources,
        )
        return self._status

    def close(self) -> None:
        """End what detectors have started; there is no look after this."""
        for vendor in self._vendors:
            vendor.close()

    @property
    def status(self) -> WorkerStatus | None:
        """What the last look saw; None: there was none yet."""
        return self._status

    async def _file_systems(self) -> list[Disk]:
        said = await self._disks.ask(wait_s=self._patience_s)
        if isinstance(said, list):
            self._known_disks = said
        return self._known_disks

    async def _machine(self) -> WorkerStatus | None:
        wait_s = self._limit_s if self._status is None else self._patience_s
        said = await self._host.ask(wait_s=wait_s)
        if isinstance(said, Exception):
            if not self._host_failed:
                logger.warning("this machine does not say what it has: %r", said)
            self._host_failed = True
            return self._status
        self._host_failed = False
        return said or self._status


class _Vendor:
    """One detector, with what it has found so far."""

    def __init__(
        self, detector: Detector, owners: Owners, tools: Tools, limit_s: float, patience_s: float
    ) -> None:
        self._detector = detector
        self._owners = owners
        self._limit_s = limit_s
        self._patience_s = patience_s
        self._tools = tools
        self._asking = Asking(f"detect {detector.vendor}", self._look)
        self._known = Known()
        self._heats: Heats = {}
        self._is_first = True

    async def look(self) -> Sequence[Device]:
        wait_s = self._limit_s if self._is_first else self._patience_s
        said = await self._asking.ask(wait_s=wait_s)
        if said is None and self._asking.waiting_s < self._limit_s:
            return self._known.devices
        self._is_first = False
        before = self._known
        if isinstance(said, list):
            found, self._heats = steadied(self._heats, said, asyncio.get_running_loop().time())
            self._known = after_answer(before, found)
        else:
            self._known = after_failure(before, _why(said, self._limit_s))
        self._tell(before.complaints)
        for sentence in unwell_since(before, self._known):
            logger.warning("%s", sentence)
        return self._known.devices

    def close(self) -> None:
        self._tools.close()

    def _look(self) -> list[Device]:
        self._tools.begin()
        found = few(self._detector.look(self._tools), self._detector.vendor)
        pids = {process.pid for device in found for process in device.processes}
        owners = self._owners(pids) if pids else {}
        return [_with_owners(device, owners) for device in found]

    def _tell(self, before: Sequence[str]) -> None:
        """Once per change: what lasts is in the devices' problems."""
        now = self._known.complaints
        if now and not alike(now, before):
            vendor = self._detector.vendor
            logger.warning("cannot read the devices of %s: %s", vendor, "; ".join(now))
        elif before and not now:
            logger.info("the devices of %s can be read again", self._detector.vendor)


def _with_owners(device: Device, owners: Mapping[int, int]) -> Device:
    processes = [
        one.model_copy(update={"instance_id": owners.get(one.pid)}) for one in device.processes
    ]
    return device.model_copy(update={"processes": processes})


def _why(said: Exception | None, limit_s: float) -> str:
    if said is None:
        return f"it has not answered within {limit_s:g} s: its driver may hang"
    sentence = " ".join(str(said).split())
    if isinstance(said, ToolFailed):
        return sentence
    return f"what it said is not understood: {sentence or type(said).__name__}"
