"""What the scheduler answers: a placement, or the reasons why there is none."""

from enum import StrEnum

from gpustack.schemas.base import Fact


class Claim(Fact):
    """Memory that one instance reserves on one worker.

    Attributes:
        ram_bytes: host memory.
        device_type: of its devices, such as cuda: no engine runs on two. Empty: it does not say.
        vram_bytes: device index -> device memory.
        explanation: how the numbers came about, one line per part, for people to read.
    """

    ram_bytes: int = 0
    device_type: str = ""
    vram_bytes: dict[int, int] = {}
    explanation: tuple[str, ...] = ()

    def of_device(self, type: str, index: int) -> int | None:
        """Bytes of that device; None: it is not among them.

        Devices of two vendors may have one index. A claim that says no type is of all of them: too
        much is held rather than too little.
        """
        return self.vram_bytes.get(index) if self.device_type in ("", type) else None


class ReasonCode(StrEnum):
    """Why a worker was refused. Part of the wire contract."""

    NOT_READY = "not_ready"
    LABELS = "labels"
    CORDONED = "cordoned"
    UNHEALTHY = "unhealthy"
    PLATFORM = "platform"
    RAM = "ram"
    VRAM = "vram"
    NO_WORKERS = "no_workers"
    PROFILE = "profile"
    BACKEND = "backend"
    INTERNAL = "internal"


class Reason(Fact):
    """Why one worker (or, with an empty name, the cluster) cannot take an instance."""

    code: ReasonCode
    worker: str = ""
    message: str
    needed_bytes: int | None = None
    available_bytes: int | None = None


class Placement(Fact):
    worker_id: int
    claim: Claim
