"""What every backend knows of its engine. Pure: data in, data out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gpustack.schemas.models import VersionSpec
from gpustack.schemas.profiles import Profile


@dataclass(frozen=True, slots=True)
class Demand:
    """One way to run a model: what it needs from the worker and from each device it takes.

    Attributes:
        devices: how many devices of one worker; 0 runs on the CPU.
        vram_bytes: device memory needed on each of them.
        ram_bytes: host memory.
        explanation: how the numbers came about, one line per part.
    """

    devices: int
    vram_bytes: int
    ram_bytes: int
    explanation: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an engine is to run, chosen by scheduler and agent.

    Attributes:
        model_path: absolute path of the model's file or folder on this worker.
        served_name: the name that requests carry.
        port: loopback port to listen on.
        secret_file: file with the key that requests must show.
        devices: indexes of the devices it may use; empty: CPU.
        executables: program name -> path of one that is installed on this worker.
        python: the interpreter that runs us.
    """

    model_path: str
    served_name: str
    port: int
    secret_file: str
    devices: tuple[int, ...] = ()
    executables: Mapping[str, str] = field(default_factory=dict)
    python: str = "python3"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an engine may take, seconds. A backend says what is different for its engine.

    Attributes:
        start_s: from its spawn to its first answer at the health path.
        first_s: for the first real request. What an engine compiles or reads from a cold disk
            only then is in it.
        stop_s: from SIGTERM to SIGKILL.
        poll_s: between two questions whether it still answers.
        patience_s: for the answer to such a question. A llama.cpp under 200 streams was seen to
            take 9 s: an engine that is busy must not be taken for one that hangs.
        misses: unanswered questions in a row that make it unhealthy.
        look_s: between two looks at its metrics.
        stuck_s: so long its requests may make no progress before it is asked a real request.
        probe_s: for that request. Answered in time, or with progress meanwhile, it is but busy.
        hear_s: gateways that are late to hear that it is to go still send it requests this long.
        drain_s: for the requests that it is answering to end before it is ended.
    """

    start_s: float = 600.0
    first_s: float = 300.0
    stop_s: float = 10.0
    poll_s: float = 5.0
    patience_s: float = 30.0
    misses: int = 3
    look_s: float = 30.0
    stuck_s: float = 600.0
    probe_s: float = 60.0
    hear_s: float = 1.0
    drain_s: float = 600.0


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """The smallest request that makes an engine do its real work.

    Attributes:
        body: what is sent as JSON; `model` in it is the served name.
    """

    path: str
    body: Mapping[str, Any]
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to start. Data only: `worker.supervisor` is what runs it.

    Attributes:
        busy_gauges: metrics at /metrics whose sum is the number of requests that it has; empty:
            nobody can tell.
        progress_counters: metrics there of which one grows while it works on any of them.
        probe: must be answered before the engine counts as running; None: its health path is all.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    health_path: str = "/health"
    busy_gauges: tuple[str, ...] = ()
    progress_counters: tuple[str, ...] = ()
    probe: ProbeRequest | None = None
    limits: Limits = Limits()


class Backend(Protocol):
    #: The word users write.
    name: str
    #: Programs it can use when they are installed, best first.
    programs: tuple[str, ...]

    def runs(self, spec: VersionSpec) -> bool:
        """Whether this engine understands the files that `spec` names."""
        ...

    def problem(self, spec: VersionSpec) -> str | None:
        """What is wrong with the spec's parameters for this engine; None when nothing is."""
        ...

    def demands(self, spec: VersionSpec, profile: Profile) -> Iterator[Demand]:
        """Ways to run the model, cheapest first."""
        ...

    def launch(self, spec: VersionSpec, slot: Slot) -> Launch:
        """The process that runs it in `slot`."""
        ...
