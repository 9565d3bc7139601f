"""GPUs and NPUs of the whole cluster, by the names that existing clients know."""

from pydantic import Field

from gpustack.schemas.base import Schema
from gpustack.schemas.workers import DeviceNetwork, DeviceProblem, DeviceProcess


class DeviceCore(Schema):
    """Attributes:
    utilization_rate: percent; None: not measured.
    """

    utilization_rate: float | None = None


class DeviceMemory(Schema):
    """All in bytes but the last.

    Attributes:
        used: by whatever is there, as the worker measured it.
        allocated: claimed by instances.
        utilization_rate: used of total, percent.
        is_unified_memory: it is the host's.
    """

    total: int
    used: int
    allocated: int
    utilization_rate: float
    is_unified_memory: bool = False


class GPUDevice(Schema):
    """One GPU or NPU.

    Attributes:
        id: `<worker's name>:<type>:<index>`; to be parsed from the right.
        type: of its platform, such as cuda.
        parent_uuid: of the card that a MIG instance is a part of.
        temperature: degrees Celsius; None, as for power_watts: not measured.
        network: of an Ascend card's own port.
        problems: empty: it is well. Otherwise it gets no new instances.
        processes: what uses it, largest first where there are many.
    """

    id: str
    worker_id: int
    worker_name: str
    worker_ip: str
    index: int
    name: str
    vendor: str
    type: str
    uuid: str
    core: DeviceCore
    memory: DeviceMemory
    parent_uuid: str = ""
    driver_version: str = ""
    runtime_version: str = ""
    architecture: str = ""
    compute_capability: str = ""
    temperature: float | None = None
    power_watts: float | None = None
    network: DeviceNetwork | None = None
    problems: list[DeviceProblem] = Field(default_factory=list)
    processes: list[DeviceProcess] = Field(default_factory=list)
