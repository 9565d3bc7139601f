"""GPUs and NPUs of the whole cluster, by the names that existing clients know."""

from gpustack.schemas.base import Schema


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
    """

    total: int
    used: int
    allocated: int
    utilization_rate: float


class GPUDevice(Schema):
    """One GPU or NPU.

    Attributes:
        id: `<worker's name>:<type>:<index>`; to be parsed from the right.
        type: of its platform, such as cuda.
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
