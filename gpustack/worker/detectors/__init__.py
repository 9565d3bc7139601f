"""What this machine has. One file per vendor: a thin runner of its tool, and a pure parser.

A vendor's file defines a `Detector` and stands in `DETECTORS`; nothing else has to change.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from gpustack.schemas.workers import Device, WorkerStatus
from gpustack.worker.detectors import host
from gpustack.worker.detectors.amd import Amd
from gpustack.worker.detectors.apple import Apple
from gpustack.worker.detectors.ascend import Ascend
from gpustack.worker.detectors.cambricon import Cambricon
from gpustack.worker.detectors.hygon import Hygon
from gpustack.worker.detectors.iluvatar import Iluvatar
from gpustack.worker.detectors.moore_threads import MooreThreads
from gpustack.worker.detectors.tools import LIMIT_S, ToolFailed, Tools

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Detector(Protocol):
    #: The vendor's name, as devices carry it.
    vendor: str

    def look(self, tools: Tools) -> list[Device]:
        """The devices of this vendor; none where its tool is not installed.

        Blocks, in a thread of its own.

        Raises:
            ToolFailed: the tool is there and does not work.
            ValueError: it said what this version of the parser does not know.
        """
        ...


DETECTORS: tuple[Detector, ...] = (
    Amd(),
    Ascend(),
    Hygon(),
    MooreThreads(),
    Iluvatar(),
    Cambricon(),
    Apple(),
)


async def detect(
    detectors: Sequence[Detector] = DETECTORS, *, limit_s: float = LIMIT_S
) -> WorkerStatus:
    """Facts and measures of this machine, looked up off the event loop.

    Raises:
        TimeoutError: the machine did not say within `limit_s` seconds.
    """
    async with asyncio.timeout(limit_s):
        return await _in_daemon_thread(lambda: _look(detectors, limit_s))


def _look(detectors: Sequence[Detector], limit_s: float) -> WorkerStatus:
    found: list[Device] = []
    for detector in detectors:
        found += _devices(detector, limit_s)
    return host.status().model_copy(update={"gpu_devices": found})


def _devices(detector: Detector, limit_s: float) -> list[Device]:
    try:
        return detector.look(Tools(limit_s=limit_s / 2))
    except (ToolFailed, ValueError) as error:
        logger.warning("cannot read the devices of %s: %s", detector.vendor, error)
        return []


async def _in_daemon_thread(look: Callable[[], T]) -> T:
    """The result of `look`, run in a thread that never keeps this process from exiting.

    Threads of asyncio's own executor are joined at exit: a hung driver would hang the exit.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def tell(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return  # nobody waits any more
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value: T | None = None
        failure: BaseException | None = None
        try:
            value = look()
        except Exception as error:  # noqa: BLE001  carried to who awaits
            failure = error
        try:
            loop.call_soon_threadsafe(tell, value, failure)
        except RuntimeError:
            return  # the loop is closed: nobody waits

    threading.Thread(target=run, name="detect", daemon=True).start()
    return await result
