"""A worker: a machine that runs an agent."""

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints

from gpustack.schemas.base import Body, OneLine, Schema, Time

LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern="^[^=]+$")]
LabelValue = Annotated[str, StringConstraints(max_length=253)]


class WorkerState(StrEnum):
    NOT_READY = "not_ready"  # registered; has not said yet what it has
    READY = "ready"  # heard of lately
    UNREACHABLE = "unreachable"  # silent for longer than the limit, by the server's clock


class Device(Schema):
    """One GPU or NPU."""

    model_config = ConfigDict(strict=True)

    index: int
    name: str = ""
    vendor: str
    type: str = ""
    uuid: str = ""
    memory_total_bytes: int
    memory_used_bytes: int = 0
    utilization_percent: float | None = None


class WorkerStatus(Schema):
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

    def measured(self) -> dict[str, object]:
        """What is no news, with what it comes to for all devices."""
        devices = self.gpu_devices
        busy = [one.utilization_percent for one in devices if one.utilization_percent is not None]
        return {
            "cpu_percent": self.cpu_percent,
            "memory_used_bytes": self.memory_used_bytes,
            "devices_used": [
                one.model_dump(include={"memory_used_bytes", "utilization_percent"})
                for one in devices
            ],
            "gpu_percent": sum(busy) / len(busy) if busy else None,
            "vram_used_bytes": sum(one.memory_used_bytes for one in devices),
        }


class WorkerReport(WorkerStatus, Body):
    """Body of PUT /v2/workers/{id}/status."""


class Registration(Body):
    """Body of POST /v2/workers/register, and of PUT /v2/workers/{id}/registration.

    Attributes:
        certificate: what its port shows, as PEM; empty: it speaks no TLS. Once there was one, an
            empty one changes nothing.
    """

    name: OneLine = Field(min_length=1, max_length=253)
    hostname: str = ""
    machine_id: str
    boot_id: str
    run_id: str
    ip: str = Field(max_length=253, pattern=r"^[^.]{1,63}(\.[^.]{1,63})*$")
    port: int = Field(ge=1, le=65535)
    labels: dict[str, str] = Field(default_factory=dict)
    system_reserved_ram_bytes: int = Field(0, ge=0)
    system_reserved_vram_bytes: int = Field(0, ge=0)
    version: str = ""
    certificate: str = Field("", max_length=2048)


class Registered(Schema):
    """Answer to a registration.

    Attributes:
        credential: the worker's own; sent as a bearer token from now on. None when it has one.
        agent_secret: what the server shows when it calls this worker.
    """

    worker_id: int
    cluster_id: str
    credential: str | None = None
    agent_secret: str


class Heartbeat(Body):
    machine_id: str
    boot_id: str
    run_id: str


class WorkerUpdate(Body):
    """Body of PUT /v2/workers/{id}: what administrators say of a worker.

    Attributes:
        labels: all that they give it. The worker's own stay beside them; of two with one key,
            this one is shown.
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    labels: dict[LabelKey, LabelValue] = Field(max_length=100)
    generation: int | None = None


class Worker(Schema):
    """A worker as the API shows it.

    Attributes:
        ip: where gateways elsewhere reach it: a name where --advertise-address gives one.
        certificate: what its port shows, as PEM, and whoever connects asks for; empty: what goes to
            it is not encrypted.
        labels: the worker's own and the administrators' together; models select by these.
        admin_labels: those from administrators alone.
        generation: counts what administrators changed.
    """

    id: int
    name: str
    hostname: str
    ip: str
    port: int
    labels: dict[str, str]
    admin_labels: dict[str, str] = Field(default_factory=dict)
    generation: int = 1
    system_reserved_ram_bytes: int
    system_reserved_vram_bytes: int
    state: WorkerState
    state_message: str = ""
    status: WorkerStatus | None = None
    version: str = ""
    certificate: str = ""
    created_at: Time
    updated_at: Time
