"""What this machine has. One file per vendor: a thin runner of its tool, and a pure parser.

A vendor's file defines a `Detector` and stands in `DETECTORS`; nothing else has to change.
`detection` asks them all and remembers what they said.
"""

from typing import Protocol

from gpustack.schemas.workers import Device
from gpustack.worker.detectors.amd import Amd
from gpustack.worker.detectors.apple import Apple
from gpustack.worker.detectors.ascend import Ascend
from gpustack.worker.detectors.cambricon import Cambricon
from gpustack.worker.detectors.hygon import Hygon
from gpustack.worker.detectors.iluvatar import Iluvatar
from gpustack.worker.detectors.moore_threads import MooreThreads
from gpustack.worker.detectors.nvidia import Nvidia
from gpustack.worker.detectors.tools import Tools


class Detector(Protocol):
    #: The vendor's name, as devices carry it.
    vendor: str

    def look(self, tools: Tools) -> list[Device]:
        """The devices of this vendor; none where its tool is not installed.

        The problem `thermal` is of this moment: it counts once it lasts (`heat`).
        Blocks, in a thread of its own; never twice at a time. A device that is there and does not
        answer may be given with `memory_total_bytes` 0 and the problem that it has: what was known
        of it before stays.

        Raises:
            ToolFailed: the tool is there and does not work.
            ValueError: it said what this version of the parser does not know.
        """
        ...


DETECTORS: tuple[Detector, ...] = (
    Nvidia(),
    Amd(),
    Ascend(),
    Hygon(),
    MooreThreads(),
    Iluvatar(),
    Cambricon(),
    Apple(),
)
