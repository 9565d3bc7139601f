"""Devices that the config file declares, for tests and for hardware that no tool reports."""

from collections.abc import Sequence

from gpustack.config.resources import Resources
from gpustack.schemas.workers import Device, WorkerStatus
from gpustack.worker.detectors.tools import Tools


class Declared:
    """A detector of what was declared: it is there, and nobody measures it."""

    vendor = "the config file"

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = list(devices)

    def look(self, tools: Tools) -> list[Device]:
        return self._devices


def devices(resources: Resources) -> list[Device] | None:
    """Those that were declared; None: they are to be detected."""
    if resources.devices is None:
        return None
    return [Device.model_validate(dict(device)) for device in resources.devices]


def with_declared(status: WorkerStatus, resources: Resources) -> WorkerStatus:
    """What the machine has, where nothing else was declared."""
    total = resources.memory_total_bytes or status.memory_total_bytes
    return status.model_copy(
        update={
            "cpu_count": resources.cpu_count or status.cpu_count,
            "memory_total_bytes": total,
            "memory_used_bytes": min(status.memory_used_bytes, total),
        }
    )
