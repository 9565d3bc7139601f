"""What this machine has. One file per vendor: a tool to run, and a pure parser of its output.

A vendor's file defines a `Detector` and stands in `DETECTORS`; nothing else has to change.
"""

import asyncio
import logging
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from gpustack.schemas.workers import Device, WorkerStatus
from gpustack.worker.detectors import host

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that a look at the machine may take; a driver that hangs must not hang the agent.
LIMIT_S = 10.0


class Detector(Protocol):
    #: The tool and its arguments; a machine without the tool has no such devices.
    command: tuple[str, ...]

    def parse(self, output: str) -> list[Device]:
        """The devices that the tool's output names. Pure.

        Raises:
            ValueError: it is not what this version of the parser knows.
        """
        ...


DETECTORS: tuple[Detector, ...] = ()


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
    tool = shutil.which(detector.command[0])
    if tool is None:
        return []
    try:
        done = subprocess.run(
            [tool, *detector.command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s / 2,
            check=True,
        )
        return detector.parse(done.stdout.decode(errors="replace"))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        logger.warning("cannot read devices from %s: %s", tool, error)
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
