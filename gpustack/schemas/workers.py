"""A worker: a machine that runs an agent."""

from enum import StrEnum
from typing import Annotated, Final

from pydantic import ConfigDict, Field, Strict, StringConstraints

from gpustack.schemas.base import Body, OneLine, Schema, Time

#: Characters of what administrators say of a cordon.
SCHEDULING_REASON_LIMIT: Final = 300

LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern="^[^=]+$")]
LabelValue = Annotated[str, StringConstraints(max_length=253)]


class WorkerState(StrEnum):
    NOT_READY = "not_ready"  # registered; has not said yet what it has
    READY = "ready"  # heard of lately
    UNREACHABLE = "unreachable"  # silent for longer than the limit, by the server's clock


class Scheduling(StrEnum):
    """What administrators let happen on a worker. Part of the wire contract."""

    ACTIVE = "active"  # it takes new instances
    CORDONED = "cordoned"  # it takes none; what runs there stays
    DRAINING = "draining"  # it takes none, and what runs there moves to other workers


class ProxyMode(StrEnum):
    """How requests get to a worker."""

    DIRECT = "direct"  # gateways dial its port; where they cannot, a tunnel
    TUNNEL = "tunnel"  # its relay dials the gateways, and they send requests back


class ProblemCode(StrEnum):
    """What is wrong with a device. Part of the wire contract."""

    XID = "xid"  # NVIDIA's driver reported an error that the card does not recover from by itself
    ECC = "ecc"  # memory errors that could not be corrected
    THERMAL = "thermal"  # the hardware slows itself down, for it is too hot
    LOST = "lost"  # it was there and does not answer any more: fallen off the bus
    TOOL = "tool"  # the vendor's tool or library fails, hangs or says what nobody understands
    REPORTED = "reported"  # the vendor's own tool says that it is not well


class DeviceProblem(Schema):
    """Why a device gets no new instances.

    Attributes:
        message: the evidence, one line for people.
    """

    model_config = ConfigDict(strict=True)

    code: Annotated[ProblemCode, Strict(False)]
    message: str


class DeviceNetwork(Schema):
    """The network port of an Ascend card's own.

    Attributes:
        status: "up" or "down", as the link is.
        mtu: bytes.
    """

    model_config = ConfigDict(strict=True)

    status: str = ""
    ip: str = ""
    netmask: str = ""
    mac: str = ""
    gateway: str = ""
    interface: str = ""
    mtu: int | None = None


class DeviceProcess(Schema):
    """A process that uses a device.

    Attributes:
        memory_bytes: of the device; None: the driver does not say.
        instance_id: whose engine's it is; None: not ours.
    """

    model_config = ConfigDict(strict=True)

    pid: int
    memory_bytes: int | None = None
    instance_id: int | None = None


class Device(Schema):
    """One GPU or NPU.

    Attributes:
        index: what the engine's visible-devices variable calls it; unique per type on a worker.
        type: of its platform: cuda, rocm, cann, dcu, musa, corex, mlu, mps.
        memory_total_bytes: of the host where memory is unified.
        memory_unified: device and host share one memory.
        parent_uuid: of the card that a MIG instance is a part of.
        architecture: the vendor's word, such as "Hopper", "gfx942" or "910B3".
        compute_capability: NVIDIA's, such as "9.0".
        problems: empty: it is well. Otherwise it gets no new instances.
        memory_used_bytes: by whatever is there.
    """

    model_config = ConfigDict(strict=True)

    index: int
    name: str = ""
    vendor: str
    type: str = ""
    uuid: str = ""
    memory_total_bytes: int
    memory_unified: bool = False
    parent_uuid: str = ""
    driver_version: str = ""
    runtime_version: str = ""
    architecture: str = ""
    compute_capability: str = ""
    network: DeviceNetwork | None = None
    problems: list[DeviceProblem] = Field(default_factory=list)
    # measured
    memory_used_bytes: int = 0
    utilization_percent: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    processes: list[DeviceProcess] = Field(default_factory=list)


#: What of a device is measured: no news when it changes.
DEVICE_MEASURES: Final = frozenset(
    {
        "memory_used_bytes",
        "utilization_percent",
        "temperature_celsius",
        "power_watts",
        "processes",
    }
)


class Disk(Schema):
    """A file system that a worker keeps models or data on."""

    model_config = ConfigDict(strict=True)

    mount_point: str
    total_bytes: int
    used_bytes: int


#: What of a worker's host is measured, and shown alone.
_HOST_MEASURES: Final = frozenset({"swap_used_bytes", "uptime_s", "disks"})


class WorkerStatus(Schema):
    """What a worker has (facts), and how much of it is used now (measured).

    A change of a fact is news to whoever watches; measured use is not.

    Attributes:
        os: linux, darwin or windows.
        os_version: as people call it, such as "Debian GNU/Linux 12 (bookworm)".
        cpu_count: that processes may use at the same time: a container's quota counts.
        memory_total_bytes: of the machine, or of the container if it has less.
        uptime_s: of the machine.
        disks: those of the data and the cache directory.
    """

    os: str
    os_version: str = ""
    arch: str
    kernel: str = ""
    cpu_count: int
    memory_total_bytes: int
    swap_total_bytes: int = 0
    gpu_devices: list[Device] = Field(default_factory=list)
    # measured
    cpu_percent: float = 0.0
    memory_used_bytes: int = 0
    swap_used_bytes: int = 0
    uptime_s: int = 0
    disks: list[Disk] = Field(default_factory=list)

    def facts(self) -> dict[str, object]:
        """What is news when it changes."""
        measures = {"cpu_percent", "memory_used_bytes", *_HOST_MEASURES}
        facts = self.model_dump(mode="json", exclude=measures)
        for device in facts["gpu_devices"]:
            for measure in DEVICE_MEASURES:
                del device[measure]
        return facts

    def measured(self) -> dict[str, object]:
        """What is no news, with what it comes to for all devices."""
        devices = self.gpu_devices
        busy = [one.utilization_percent for one in devices if one.utilization_percent is not None]
        return {
            "cpu_percent": self.cpu_percent,
            "memory_used_bytes": self.memory_used_bytes,
            "host_used": self.model_dump(mode="json", include=set(_HOST_MEASURES)),
            "devices_used": [
                one.model_dump(mode="json", include=set(DEVICE_MEASURES)) for one in devices
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
        proxy_mode: what the worker was told.
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
    proxy_mode: Annotated[ProxyMode, Strict(False)] = ProxyMode.DIRECT


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


class Heard(Schema):
    """Answer to a heartbeat.

    Attributes:
        tunnel: the server cannot reach the worker's port: its relay should dial.
    """

    tunnel: bool = False


class WorkerUpdate(Body):
    """Body of PUT /v2/workers/{id}: what administrators say of a worker.

    Attributes:
        labels: all that they give it. The worker's own stay beside them; of two with one key,
            this one is shown.
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    labels: dict[LabelKey, LabelValue] = Field(max_length=100)
    generation: int | None = None


class Cordon(Body):
    """Body of POST /v2/workers/{id}/cordon and of POST /v2/workers/{id}/drain.

    Attributes:
        reason: for people, such as "disk swap"; None: the one that there is stays.
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    reason: Annotated[OneLine, Field(max_length=SCHEDULING_REASON_LIMIT)] | None = None
    generation: int | None = None


class Leaving(Schema):
    """An instance that is still on a worker that is being drained.

    Attributes:
        waits: it does not move now, nor will by itself; `message` says why.
        message: how far it is with leaving, for people.
    """

    id: int
    name: str
    model_name: str
    waits: bool
    message: str


class Worker(Schema):
    """A worker as the API shows it.

    Attributes:
        scheduling: whether it takes new instances.
        scheduling_reason: what administrators say of that.
        leaving: while it is being drained: what is still on it; empty: nothing is.
        ip: where gateways elsewhere reach it: a name where --advertise-address gives one.
        certificate: what its port shows, as PEM, and whoever connects asks for; empty: what goes to
            it is not encrypted.
        labels: the worker's own and the administrators' together; models select by these.
        admin_labels: those from administrators alone.
        proxy_mode: what the worker was told.
        reached_by: how requests get to it now.
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
    scheduling: Scheduling = Scheduling.ACTIVE
    scheduling_reason: str = ""
    leaving: list[Leaving] = Field(default_factory=list)
    system_reserved_ram_bytes: int
    system_reserved_vram_bytes: int
    state: WorkerState
    state_message: str = ""
    status: WorkerStatus | None = None
    version: str = ""
    certificate: str = ""
    proxy_mode: ProxyMode = ProxyMode.DIRECT
    reached_by: ProxyMode = ProxyMode.DIRECT
    created_at: Time
    updated_at: Time
