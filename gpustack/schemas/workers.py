"""A worker: a machine that runs an agent."""

from enum import StrEnum

from pydantic import BaseModel, Field

from gpustack.schemas.base import Input, Time


class WorkerState(StrEnum):
    NOT_READY = "not_ready"  # registered; has not said yet what it has
    READY = "ready"  # heard of lately
    UNREACHABLE = "unreachable"  # silent for longer than the limit, by the server's clock


class Device(BaseModel):
    """One GPU or NPU."""

    index: int
    name: str = ""
    vendor: str
    type: str = ""
    uuid: str = ""
    memory_total_bytes: int
    memory_used_bytes: int = 0
    utilization_percent: float | None = None


class WorkerStatus(Input):
    """What a worker has (facts), and how much of it is used now (measured).

    A change of a fact is news to whoever watches; measured use is not.
    """

    os: str
    arch: str
    kernel: str = ""
    cpu_count: int
    memory_total_bytes: int
    gpu_devices: list[Device] = Field(default_factory=list)
    # measured
    cpu_percent: float = 0.0
    memory_used_bytes: int = 0

    def facts(self) -> dict[str, object]:
        """What is news when it changes."""
        facts = self.model_dump(exclude={"cpu_percent", "memory_used_bytes"})
        for device in facts["gpu_devices"]:
            del device["memory_used_bytes"], device["utilization_percent"]
        return facts


class Registration(Input):
    """Body of POST /v2/workers/register, and of PUT /v2/workers/{id}/registration."""

    name: str = Field(min_length=1, max_length=253)
    hostname: str = ""
    machine_id: str
    boot_id: str
    run_id: str
    address: str
    port: int = Field(ge=1, le=65535)
    labels: dict[str, str] = Field(default_factory=dict)
    system_reserved_ram_bytes: int = Field(0, ge=0)
    system_reserved_vram_bytes: int = Field(0, ge=0)
    version: str = ""


class Registered(BaseModel):
    """Answer to a registration.

    Attributes:
        credential: the worker's own; sent as a bearer token from now on. None when it has one.
        agent_secret: what the server shows when it calls this worker.
    """

    worker_id: int
    cluster_id: str
    credential: str | None = None
    agent_secret: str


class Heartbeat(Input):
    machine_id: str
    boot_id: str
    run_id: str


class Worker(BaseModel):
    id: int
    name: str
    hostname: str
    address: str
    port: int
    labels: dict[str, str]
    system_reserved_ram_bytes: int
    system_reserved_vram_bytes: int
    state: WorkerState
    state_message: str = ""
    status: WorkerStatus | None = None
    version: str = ""
    created_at: Time
    updated_at: Time
