"""What NVML says: asked of a process of its own, and given as plain values.

NVML is used instead of `nvidia-smi`, which is a program on top of it: it alone tells Xid errors
without root and inside containers. `nvml_process` is who calls it, and says why it stays. As with
every program that does, `nvidia-smi --gpu-reset` needs the agent to be stopped.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, TypeAdapter

from gpustack.worker.detectors.tools import ToolFailed, Tools

_PROGRAM: Final = Path(__file__).with_name("nvml_process.py")

_LIBRARY: Final = "libnvidia-ml.so.1"

#: What the driver makes when it is loaded: on servers, on Jetson.
_NODES: Final = ("/dev/nvidiactl", "/dev/nvhost-ctrl-gpu")

#: Where distributions, container runtimes, GKE, WSL and NixOS put the library.
_FOLDERS: Final = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu/nvidia",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/nvidia/lib64",
    "/usr/lib/wsl/lib",
    "/run/opengl-driver/lib",
)

# nvml.h, nvmlReturn_t
NOT_SUPPORTED: Final = 3
NO_PERMISSION: Final = 4
LIBRARY_NOT_FOUND: Final = 12
GPU_IS_LOST: Final = 15


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Refusal(_Value):
    """In place of a value: NVML's error.

    Attributes:
        refused: its code.
        text: NVML's own.
    """

    refused: int
    text: str = ""


class Memory(_Value):
    """Bytes; what the driver keeps for itself is not in `used`, as in nvidia-smi."""

    total: int
    used: int


class Process(_Value):
    """Attributes:
    memory: bytes; None: not told.
    """

    pid: int
    memory: int | None


class MigInstance(_Value):
    """A part of a card.

    Attributes:
        position: among the card's.
        gpu_instance, compute_instance: how Xid errors name it.
    """

    position: int
    uuid: str | Refusal
    name: str | Refusal
    memory: Memory | Refusal
    gpu_instance: int | Refusal
    compute_instance: int | Refusal
    processes: tuple[Process, ...] | Refusal = ()


#: Rows corrected, not corrected, whether some wait for a reset, whether one failed.
RemappedRows = tuple[int, int, int, int]


class Card(_Value):
    """A card as NVML tells it.

    Attributes:
        architecture: of nvmlDeviceArchitecture_t.
        power_milliwatts: drawn now.
        slowdowns: bits of nvmlClocksEventReasons.
        ecc_uncorrected: errors since the driver was loaded.
        mig: its instances; None: MIG is off.
    """

    index: int
    uuid: str | Refusal
    name: str | Refusal
    memory: Memory | Refusal
    utilization_percent: int | Refusal
    temperature_celsius: int | Refusal
    power_milliwatts: int | Refusal
    architecture: int | Refusal
    capability: tuple[int, int] | Refusal
    slowdowns: int | Refusal
    ecc_uncorrected: int | Refusal
    remapped: RemappedRows | Refusal
    processes: tuple[Process, ...] | Refusal = ()
    mig: tuple[MigInstance, ...] | None = None


class SilentCard(_Value):
    """A card that NVML counts and lets nobody ask."""

    index: int
    silent: Refusal


class Xid(_Value):
    """An error that the driver reported.

    Attributes:
        card: UUID.
        gpu_instance, compute_instance: None: it is not of one MIG instance.
    """

    card: str
    code: int
    gpu_instance: int | None = None
    compute_instance: int | None = None


class Reading(_Value):
    """All that one look saw.

    Attributes:
        cuda: the newest CUDA that the driver runs, 1000 * major + 10 * minor.
        xids: reported since the look before.
    """

    driver: str | Refusal
    cuda: int | Refusal
    cards: tuple[Card | SilentCard, ...]
    xids: tuple[Xid, ...] = ()


Answer: Final[TypeAdapter[Reading | Refusal]] = TypeAdapter(Reading | Refusal)


def read(tools: Tools) -> Reading | None:
    """What NVML says now; None: this machine has no NVIDIA driver. Blocks.

    Raises:
        ToolFailed: there is one, and NVML does not work.
        ValueError: it says what nobody understands.
    """
    if not is_installed(os.environ):
        return None
    # -P: the folder of this file is no place for modules to come from.
    try:
        said = tools.ask(sys.executable, "-P", str(_PROGRAM))
    except ToolFailed as error:
        raise ToolFailed(f"the process that asks NVML {error}") from None
    answer = Answer.validate_json(said)
    if not isinstance(answer, Refusal):
        return answer
    if answer.refused == LIBRARY_NOT_FOUND:
        raise ToolFailed(
            f"{_LIBRARY} is not found or cannot be loaded, and there is an NVIDIA driver: a "
            "container needs the driver's capability `utility`"
        )
    raise ToolFailed(f"NVML: {answer.text}")


def is_installed(environment: Mapping[str, str]) -> bool:
    """Whether there are signs of an NVIDIA driver: a machine without starts no process for it.

    Files are looked for: loaded here, the library could crash the agent after all.
    """
    if sys.platform == "win32":
        return shutil.which("nvidia-smi") is not None  # comes with each driver
    own = environment.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    folders = (*filter(None, own), *_FOLDERS)
    return any(map(os.path.exists, _NODES)) or any(
        os.path.exists(f"{folder}/{_LIBRARY}") for folder in folders
    )
