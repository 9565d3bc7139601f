"""What every backend knows of its engine. Pure: data in, data out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

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
class Launch:
    """A process to start. Data only: `worker.supervisor` is what runs it.

    Attributes:
        busy_gauges: metrics at /metrics whose sum is the number of requests that it has; empty:
            nobody can tell.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    health_path: str = "/health"
    busy_gauges: tuple[str, ...] = ()


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
